"""What the LIFT experiment fine-tunes: a small decoder that can add and is to learn to subtract, a planted MLP, or a
checkpoint that is to learn the answers of GSM8K.

A subject has something to forget (the source, which its base was trained on) and something to learn (the target).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.finetuning import Rows, answer_rows, text_rows, token_loss
from mechlab.core.rng import stream, streams
from mechlab.data.text import load_problems
from mechlab.methods.adaptation.lift import LINEAR
from mechlab.models import hub
from mechlab.models.generate import generate
from mechlab.models.mlp import MLPConfig, mlp
from mechlab.models.subjects import load_stories260k
from mechlab.models.transformer import llama, transformer
from mechlab.reporting.log import Log
from mechlab.training.batches import generated, shuffled
from mechlab.training.loop import Job, fit_many

if TYPE_CHECKING:
    from experiments.adaptation.lift import Config

PAD, DIGIT, PLUS, MINUS, EQUALS, STOP, LETTER = 0, 1, 11, 12, 13, 14, 15
"""Token ids; DIGIT and LETTER are the first of ten digits and sixteen letters."""
LETTERS = 16
LENGTH = 20
"""Tokens of a row: two additions, one chain of subtractions, or a string."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A base per seed and its two tasks.

    Attributes:
      bases: parameters, leaves (S, ...).
      pattern: the kernels that sparse methods and LoRA train.
      loss: ``loss(params, batch)``, of the target's training.
      train: data of the target, with a common leading axis; the same for every seed.
      held_out: ``held_out(params)``: numbers by name. "validation" and "target" are losses on target data; "score",
        "source_score" (higher is better, in %) and "source" (a loss) are further test numbers.
      unit: of the losses.
    """

    bases: Any
    pattern: str
    loss: Callable[[Any, Any], jax.Array]
    train: Any
    held_out: Callable[[Any], dict[str, jax.Array]]
    unit: str


def additions(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Tokens (n, 20) of two sums each, ``aa+bb=ccc.``, units first, and where the sums stand, (n, 20) bool."""
    a, b = jax.random.randint(key, (2, 2 * n), 0, 100)
    parts = [_digits(a, 2), _sign(PLUS, a), _digits(b, 2), _sign(EQUALS, a), _digits(a + b, 3), _sign(STOP, a)]
    answered = jnp.arange(10) >= 6
    return jnp.concatenate(parts, -1).reshape(n, LENGTH), jnp.broadcast_to(jnp.tile(answered, 2), (n, LENGTH))


def strings(key: jax.Array, transitions: jax.Array, n: int) -> jax.Array:
    """Markov strings (n, 20) over the letters and the minus sign, which the base so has met; logits (17, 17)."""
    first, steps = streams(key, "first steps")
    start = jax.random.randint(first, (n,), 0, LETTERS + 1)

    # Gumbel noise added to logits makes their largest a sample.
    noise = jax.random.gumbel(steps, (LENGTH, n, LETTERS + 1))

    def step(state: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (transitions[state] + noise).argmax(-1), state

    states = jax.lax.scan(step, start, noise)[1].T
    return jnp.where(states == LETTERS, MINUS, LETTER + states)


def subtractions(key: jax.Array, n: int) -> Rows:
    """n different chains ``aa-bb-cc=`` with the answer ``dd-cc=ee.``: d = a - b is the worked step, e = d - c."""
    u = np.asarray(jax.random.uniform(key, (3, 4 * n)))
    a = np.floor(100 * u[0])
    b = np.floor(u[1] * (a + 1))
    c = np.floor(u[2] * (a - b + 1))
    # By the order of their first appearance, so that parts of the rows are random samples.
    chains, first = np.unique(np.stack([a, b, c], 1).astype(int), axis=0, return_index=True)
    a, b, c = (jnp.asarray(x) for x in chains[np.argsort(first)[:n]].T)
    prompts = [_digits(a, 2), _sign(MINUS, a), _digits(b, 2), _sign(MINUS, a), _digits(c, 2), _sign(EQUALS, a)]
    d = a - b
    answers = [_digits(d, 2), _sign(MINUS, a), _digits(c, 2), _sign(EQUALS, a), _digits(d - c, 2), _sign(STOP, a)]
    before, after = (list(np.asarray(jnp.concatenate(parts, -1))) for parts in (prompts, answers))
    return answer_rows(before, after, LENGTH)


def decoder(key: jax.Array, config: Config, log: Log) -> Subject:
    """Two layers of width 96, trained on strings and sums; the target are 400 chains of subtractions."""
    sizes = {"width": config.width, "hidden": config.hidden, "heads": 4, "layers": config.layers}
    model = transformer(llama(vocabulary=32, context=LENGTH, init_std=None, **sizes))
    world, target, test, seeds = streams(key, "world target test seeds")
    transitions = 3 * jax.random.normal(world, (LETTERS + 1, LETTERS + 1))

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        logits: jax.Array = model.apply({"params": params}, tokens)
        return logits

    def mixed(key: jax.Array) -> Rows:
        sums, texts = streams(key, "sums texts")
        spelled = config.source_batch // 4
        tokens, answered = additions(sums, config.source_batch - spelled)
        return _stacked(_rows(tokens, answered), text_rows(strings(texts, transitions, spelled)))

    def build(key: jax.Array) -> Job:
        rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, config.source_steps // 20, config.source_steps)
        start = model.init(jax.random.wrap_key_data(key))
        return Job(lambda params, rows: token_loss(apply, params, rows), start, optax.adam(rate), generated(mixed))

    inits = jax.vmap(lambda s: jax.random.key_data(stream(seeds, "init", s)))(jnp.arange(config.bases))
    keys = jax.vmap(lambda s: stream(seeds, "batches", s))(jnp.arange(config.bases))
    found = fit_many(keys, inits, build, steps=config.source_steps, log=log, name="base").params
    bases = jax.tree.map(lambda leaf: leaf[jnp.arange(config.seeds) % config.bases], found)

    held = config.held_out
    rows = subtractions(target, config.examples + 2 * held)
    train, validation, chains = _three(rows, config.examples, held)
    sums, texts = streams(test, "sums texts")
    tokens, answered = additions(sums, held // 2)
    sums_rows, texts_rows = _rows(tokens, answered), text_rows(strings(texts, transitions, held // 2))

    def held_out(params: Any) -> dict[str, jax.Array]:
        return {
            "validation": token_loss(apply, params, validation),
            "target": token_loss(apply, params, chains),
            "score": 100 * _right(apply, params, chains, 1),
            "source_score": 100 * _right(apply, params, sums_rows, 2),
            "source": token_loss(apply, params, _stacked(sums_rows, texts_rows)),
        }

    return Subject(bases, LINEAR, lambda params, batch: token_loss(apply, params, batch), train, held_out, "nats")


def planted(key: jax.Array, config: Config, log: Log) -> Subject:
    """A two-layer MLP, weights of rank 4 plus noise; the target is the same map with other right singular vectors.

    Its source is its own function. Nothing is trained beforehand: the structure that pre-training is thought to leave
    is planted.
    """
    inside, outside, rank = config.width, config.hidden, 4
    model = mlp(MLPConfig(widths=(inside, outside, 8)))

    def one(key: jax.Array) -> tuple[Any, Any]:
        left, right, noise, moved, last = streams(key, "left right noise moved last")
        u, v = jax.random.normal(left, (inside, rank)), jax.random.normal(right, (rank, outside))
        w = u @ v / np.sqrt(inside * rank) + 0.3 * jax.random.normal(noise, (inside, outside)) / np.sqrt(inside)
        turned = u @ (v + 0.7 * jax.random.normal(moved, v.shape)) / np.sqrt(inside * rank)
        head = {"kernel": jax.random.normal(last, (outside, 8)) / np.sqrt(outside), "bias": jnp.zeros(8)}
        base = {"layer_0": {"kernel": w, "bias": jnp.zeros(outside)}, "layer_1": head}
        return base, base | {"layer_0": base["layer_0"] | {"kernel": turned}}

    bases, teachers = jax.jit(jax.vmap(lambda s: one(stream(key, "planted", s))))(jnp.arange(config.seeds))

    def data(name: str, n: int) -> dict[str, jax.Array]:
        return {"x": jax.random.normal(stream(key, name), (n, inside))}

    parts = {name: data(name, config.held_out) for name in ("validation", "target")}
    # The teacher of a seed travels beside its base, so that one loss serves all seeds.
    both = {"base": bases, "teacher": teachers, "source": bases}

    def error(params: Any, teacher: str, x: jax.Array) -> jax.Array:
        wanted = model.apply({"params": jax.lax.stop_gradient(params[teacher])}, x)
        return jnp.square(model.apply({"params": params["base"]}, x) - wanted).mean()

    def share(params: Any, teacher: str) -> jax.Array:
        x = parts["target"]["x"]
        variance = jnp.var(model.apply({"params": params[teacher]}, x), axis=0).mean()
        return 100 * (1 - error(params, teacher, x) / variance)

    def held_out(params: Any) -> dict[str, jax.Array]:
        return {
            "validation": error(params, "teacher", parts["validation"]["x"]),
            "target": error(params, "teacher", parts["target"]["x"]),
            "score": share(params, "teacher"),
            "source_score": share(params, "source"),
            "source": error(params, "source", parts["target"]["x"]),
        }

    def loss(params: Any, batch: Any) -> jax.Array:
        return error(params, "teacher", batch["x"])

    return Subject(both, "base/*/kernel", loss, data("train", config.examples), held_out, "squared error")


def checkpoint(key: jax.Array, config: Config, log: Log) -> Subject:
    """stories260K or a model of the hub; the target are answers of GSM8K, the source is text that the base writes.

    Questions are cut to their last tokens and answers to what fits. The scores are shares of tokens that are likeliest.
    """
    model: Any
    if config.subject == "stories260k":
        model, params, vocabulary = load_stories260k()
        encode = functools.partial(vocabulary.encode, begin=False)
    else:
        model, params, tokenizer = hub.load(config.subject, dtype="bfloat16")
        encode = tokenizer.encode

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        logits: jax.Array = model.apply({"params": params}, tokens)
        return logits

    held, length = config.held_out, config.length
    train, test = load_problems()
    pairs = train[: config.examples + held] + test[:held]
    prompts = [np.asarray(encode(question + "\n"))[-(length // 2) :] for question, _ in pairs]
    room = [length - len(prompt) for prompt in prompts]
    answers = [np.asarray(encode(answer))[:space] for (_, answer), space in zip(pairs, room, strict=True)]
    rows = answer_rows(prompts, answers, length)
    first, validation, answered = _three(rows, config.examples, held)

    start = jnp.tile(jnp.asarray(list(encode("Once upon a time"))), (held, 1))
    texts = generate(model, {"params": params}, start, key=key, steps=length - start.shape[1]).tokens
    own = text_rows(texts)

    def likeliest(params: Any, rows: Rows) -> jax.Array:
        right = apply(params, rows.tokens)[:, :-1].argmax(-1) == rows.tokens[:, 1:]
        return 100 * (right * rows.mask[:, 1:]).sum() / rows.mask[:, 1:].sum()

    def held_out(params: Any) -> dict[str, jax.Array]:
        return {
            "validation": token_loss(apply, params, validation),
            "target": token_loss(apply, params, answered),
            "score": likeliest(params, answered),
            "source_score": likeliest(params, own),
            "source": token_loss(apply, params, own),
        }

    log.say(f"{config.subject}: {len(first.tokens)} problems of {length} tokens to train on")
    bases = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (config.seeds, *leaf.shape)), params)
    return Subject(bases, LINEAR, lambda params, batch: token_loss(apply, params, batch), first, held_out, "nats")


def batches(subject: Subject, batch: int) -> Any:
    """Shuffled batches of the target's training data."""
    return shuffled(subject.train, batch)


def _right(apply: Callable[..., jax.Array], params: Any, rows: Rows, answers: int) -> jax.Array:
    """The share of answers that greedy decoding writes without a mistake: every token likeliest, given those before."""
    likeliest = apply(params, rows.tokens)[:, :-1].argmax(-1)
    fine = (likeliest == rows.tokens[:, 1:]) | (rows.mask[:, 1:] == 0)
    # With several answers in a row, each in its own part of it.
    fine = jnp.pad(fine, ((0, 0), (1, 0)), constant_values=True).reshape(-1, LENGTH // answers)
    return fine.all(-1).mean()


def _rows(tokens: jax.Array, mask: jax.Array) -> Rows:
    return Rows(tokens, mask.astype(jnp.float32), jnp.ones(len(tokens), jnp.int32))


def _three(rows: Rows, train: int, held: int) -> list[Rows]:
    """The first rows to train on, then two held-out parts of equal size."""
    cuts = itertools.pairwise((0, train, train + held, train + 2 * held))
    return [jax.tree.map(lambda x, a=a, b=b: x[a:b], rows) for a, b in cuts]


def _stacked(a: Rows, b: Rows) -> Rows:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)


def _digits(number: jax.Array, places: int) -> jax.Array:
    """Tokens (n, places), units first: a carry then comes from what is already written."""
    return DIGIT + (number[:, None] // 10 ** jnp.arange(places)) % 10


def _sign(token: int, like: jax.Array) -> jax.Array:
    return jnp.full((len(like), 1), token)
