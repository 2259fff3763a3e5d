"""The Bone experiment's tasks: a base model and what it is adapted to.

teacher       a random perceptron learns the outputs of the same one with blocks of its weights changed
gsm8k         answers to grade-school problems (T1 of the sheet); questions are cut to their last tokens
shakespeare   tiny-shakespeare, every token (T2)
sums          additions with worked steps, exact match (T3)
recurrent     an RWKV-like net, trained on WikiText-2 here, adapted to tiny-shakespeare
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.finetuning import Apply, Rows, answer_rows, held_out_loss, text_rows, token_loss
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.core.transforms import Adapter, AdapterState
from mechlab.data.text import load_problems, load_text, rows_of
from mechlab.data.worlds.sums import worked_sums
from mechlab.models import hub
from mechlab.models.linear_recurrent import RecurrentConfig, linear_recurrent
from mechlab.models.mlp import MLPConfig, mlp
from mechlab.models.subjects import load_stories260k
from mechlab.models.transformer import llama, transformer
from mechlab.reporting.log import Log
from mechlab.training.batches import shuffled
from mechlab.training.loop import fit

if TYPE_CHECKING:
    from experiments.adaptation.bone import Config

PROJECTIONS = "**/attn/[qkvo]/kernel|**/mlp/*/kernel"
"""The seven projections of a Llama block."""

RECURRENT = "**/mix/[rkvgo]/kernel|**/channels/*/kernel"
"""r, k, v, g, o and the three matrices of the channel mix."""

END = 2
"""The end-of-text token of the Llama vocabularies."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is adapted to what.

    Attributes:
      apply, params: the base.
      loss: ``loss(apply, params, batch)``.
      train, validation, test: rows; three disjoint sets.
      score: ``score(adapter, states, rows) -> (lanes,)``, held-out loss.
      pattern: the kernels that adapters change.
      unit: of the loss.
      model: given where exact match is measured.
      read: what counts of an answer's tokens there.
    """

    apply: Apply
    params: Any
    loss: Callable[[Apply, Any, Any], jax.Array]
    train: Any
    validation: Any
    test: Any
    score: Callable[[Adapter, AdapterState, Any], np.ndarray]
    pattern: str
    unit: str
    model: Model | None = None
    read: Callable[[list[int]], Any] = tuple


@dataclasses.dataclass(frozen=True)
class Base:
    """A pre-trained decoder: what it is, and how it spells."""

    model: Model
    params: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def make_tasks(key: jax.Array, config: Config, log: Log) -> dict[str, Task]:
    """The configured tasks, by name; a base that several share is made once."""
    if config.tasks == ("teacher",):
        return {"teacher": teacher(stream(key, "teacher"), config)}
    base = load_base(stream(key, "base"), config, log)
    makers: dict[str, Callable[[], Task]] = {
        "gsm8k": lambda: gsm8k(base, config, log),
        "shakespeare": lambda: shakespeare(base, config, log),
        "sums": lambda: sums(stream(key, "sums"), base, config),
        "recurrent": lambda: recurrent(stream(key, "recurrent"), base, config, log),
    }
    return {name: makers[name]() for name in config.tasks}


def teacher(key: jax.Array, config: Config) -> Task:
    """Outputs of a perceptron whose kernels were changed blockwise: W_ab + small (W_ab M_a + N_a), M and N random.

    No arm can write all of the change: it mixes what the guide reaches with what it does not, at full rank.
    """
    model = mlp(MLPConfig(widths=(32, 64, 16)))
    params = model.init(stream(key, "student"))

    def changed(path: str, kernel: jax.Array) -> jax.Array:
        inputs, outputs = kernel.shape
        shape = (inputs // 4, 4, outputs // 4, 4)
        mixing, added = (jax.random.normal(stream(key, path, name), (shape[2], 4, 4)) for name in ("M", "N"))
        change = jnp.einsum("bkai,akj->bjai", kernel.reshape(shape), mixing) + 0.3 * added.transpose(2, 0, 1)
        return kernel + 0.2 * change.reshape(kernel.shape)

    target = {name: {**layer, "kernel": changed(name, layer["kernel"])} for name, layer in params.items()}
    x = jax.random.normal(stream(key, "inputs"), (config.train_rows + 2 * config.test_rows, 32))
    pairs = {"x": x, "y": model.apply({"params": target}, x)}
    cuts = np.cumsum([0, config.train_rows, config.test_rows, config.test_rows])
    train, validation, test = (
        jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], pairs) for a, b in itertools.pairwise(cuts)
    )

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x)

    def loss(apply: Apply, params: Any, batch: Any) -> jax.Array:
        return jnp.square(apply(params, batch["x"]) - batch["y"]).mean()

    def score(adapter: Adapter, states: AdapterState, rows: Any) -> np.ndarray:
        return np.asarray(jax.vmap(lambda state: loss(apply, adapter.merge(params, state), rows))(states))

    return Task(apply, params, loss, train, validation, test, score, "**/kernel", "mean squared error")


def load_base(key: jax.Array, config: Config, log: Log) -> Base:
    """stories260K, a decoder trained here, or one of the hub."""
    if config.base == "stories260k":
        model, params, vocabulary = load_stories260k()
        return Base(model, params, lambda text: vocabulary.encode(text, begin=False), vocabulary.decode)
    if config.base != "own":
        model, params, tokenizer = hub.load(config.base, dtype="bfloat16")
        return Base(model, params, lambda text: list(tokenizer.encode(text)), tokenizer.decode)
    vocabulary = load_stories260k()[2]

    def encode(text: str) -> list[int]:
        return vocabulary.encode(text, begin=False)

    # Simple sums of two terms; the task later asks for three, with steps.
    short = " ".join(f"{q}{a}\n" for q, a in worked_sums(stream(key, "sums"), 20_000, terms=2))
    ids = np.concatenate([encode(load_text("wikitext")[0]), encode(short)])
    model = transformer(
        llama(vocabulary=512, layers=config.layers, width=config.width, heads=8, hidden=3 * config.width, context=512)
    )
    return Base(model, pretrained(stream(key, "training"), model, ids, config, log, "base"), encode, vocabulary.decode)


def pretrained(key: jax.Array, model: Model, ids: Any, config: Config, log: Log, name: str) -> Any:
    """A language model trained on running text."""
    rows = text_rows(rows_of(ids, config.length))
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.pretrain_rate, 100, max(101, config.pretrain_steps))
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))

    def loss(params: Any, batch: Rows) -> jax.Array:
        return token_loss(_apply_of(model), params, batch)

    batches = shuffled(rows, min(config.pretrain_batch, len(rows.tokens)))
    start = model.init(stream(key, "init"))
    trained = fit(
        stream(key, "batches"), loss, start, optimiser, batches, steps=config.pretrain_steps, log=log, name=name
    )
    log.say(f"{name}: trained to {np.mean(trained.losses[-20:]):.3f} nats per token")
    return trained.params


def gsm8k(base: Base, config: Config, log: Log) -> Task:
    """Answers to word problems: the last ``prompt`` tokens of the question, and as much of the answer as there is room.

    Whole problems are longer than the rows of the small presets. Where nothing is cut, exact match of the number
    behind "####" is measured.
    """
    train, test = load_problems()
    wanted = config.train_rows + config.validation_rows
    pairs = train[:wanted] + test[: config.test_rows]
    prompts = [base.encode(question + "\n")[-config.prompt :] for question, _ in pairs]
    answers = [[*base.encode(answer), END] for _, answer in pairs]
    room = [config.length - len(prompt) for prompt in prompts]
    whole = [len(answer) <= space for answer, space in zip(answers, room, strict=True)]
    log.say(f"gsm8k: {np.mean(whole):.0%} of the answers fit whole into rows of {config.length} tokens")
    rows = answer_rows(prompts, [a[:space] for a, space in zip(answers, room, strict=True)], config.length)

    def number(ids: list[int]) -> str:
        return base.decode(ids).rpartition("####")[2].strip()

    return _language_task(base, _split(rows, config), PROJECTIONS, base.model if all(whole) else None, number)


def shakespeare(base: Base, config: Config, log: Log) -> Task:
    """Running text, every token predicted."""
    return _language_task(base, _plays(base, config), PROJECTIONS)


def sums(key: jax.Array, base: Base, config: Config) -> Task:
    """Additions of three numbers with worked steps; exact match of the whole answer."""
    n = config.train_rows + config.validation_rows + config.test_rows
    problems = list(dict.fromkeys(worked_sums(key, 2 * n)))[:n]
    answers = [[*base.encode(answer), END] for _, answer in problems]
    rows = answer_rows([base.encode(question) for question, _ in problems], answers, config.length)
    return _language_task(base, _split(rows, config), PROJECTIONS, base.model)


def recurrent(key: jax.Array, base: Base, config: Config, log: Log) -> Task:
    """tiny-shakespeare for another architecture, which stands for the paper's RWKV-6."""
    model = linear_recurrent(RecurrentConfig(vocabulary=512, layers=4, width=config.width, heads=8))
    ids = base.encode(load_text("wikitext")[0])
    params = pretrained(key, model, ids, config, log, "recurrent-base")
    own = dataclasses.replace(base, model=model, params=params)
    return _language_task(own, _plays(base, config), RECURRENT)


def _plays(base: Base, config: Config) -> tuple[Rows, Rows, Rows]:
    train, test = (text_rows(rows_of(base.encode(text), config.length)) for text in load_text("shakespeare"))
    fitted, held_out = _first(train, config.train_rows), _last(train, config.validation_rows)
    return fitted, held_out, _first(test, config.test_rows)


def _language_task(
    base: Base,
    parts: tuple[Rows, Rows, Rows],
    pattern: str,
    model: Model | None = None,
    read: Callable[[list[int]], Any] = tuple,
) -> Task:
    apply = _apply_of(base.model)

    def score(adapter: Adapter, states: AdapterState, rows: Any) -> np.ndarray:
        return held_out_loss(apply, base.params, adapter, states, rows)

    train, validation, test = parts
    nats = "nats per token"
    return Task(apply, base.params, token_loss, train, validation, test, score, pattern, nats, model, read)


def _apply_of(model: Model) -> Apply:
    return lambda params, tokens: model.apply({"params": params}, tokens)


def _split(rows: Rows, config: Config) -> tuple[Rows, Rows, Rows]:
    """Rows in the order training, validation, test."""
    rest = _last(rows, config.validation_rows + config.test_rows)
    return _first(rows, config.train_rows), _first(rest, config.validation_rows), _last(rows, config.test_rows)


def _first(rows: Rows, n: int) -> Rows:
    return jax.tree.map(lambda x: x[:n], rows)


def _last(rows: Rows, n: int) -> Rows:
    return jax.tree.map(lambda x: x[-n:], rows)
