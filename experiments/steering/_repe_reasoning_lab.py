"""Subjects, vectors and grids of the experiment: what is measured, before it becomes a metric."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.steering._repe_reasoning_tasks import Task, arith_task, deduce_task, few_shot, negatives
from experiments.steering._repe_reasoning_texts import reader_tasks
from experiments.steering._tales_tasks import STORIES, Draw, Items, cells_at_once, load_stories, story_task, tales_task
from mechlab.analysis.margins import candidate_scores, list_correct, log_odds
from mechlab.core import select
from mechlab.core.errors import UserError
from mechlab.core.model import Model
from mechlab.core.rng import stream, streams
from mechlab.data.worlds import reasoning
from mechlab.methods.steering import repe_reasoning as repe
from mechlab.methods.steering.baselines import caa_edits
from mechlab.methods.steering.doses import dose_cells, dose_grid
from mechlab.methods.steering.vectors import (
    SteeringVector,
    Texts,
    last_states,
    random_vectors,
    steered_logits,
)
from mechlab.models import hub
from mechlab.models.generate import generate
from mechlab.models.subjects import load_tales
from mechlab.models.transformer import llama, transformer
from mechlab.reporting.log import Log
from mechlab.training.batches import generated
from mechlab.training.loop import Job, fit_many

TYPES = ("reading", "contrast", "pca_contrast")
TALES = {"ioi": (8, 10, 12), "recall": (11, 12, 13), "mood": (6,)}
EASY_ENOUGH = 0.9
ORACLE_TEXTS = 60
CONV_STD = 0.5


class Subject(NamedTuple):
    """A model, its parameters for every seed, its tokenizer, and the tasks it is asked.

    Attributes:
      end: the token of a full stop.
      layers: where vectors are added.
    """

    model: Model
    params: list[Any]
    tokenizer: Any
    tasks: dict[str, Task]
    end: int
    layers: tuple[int, ...]


class Reading(NamedTuple):
    """What was read from the texts of one task and seed.

    Attributes:
      vectors: (L, D) by name: the types, "shuffled", "incorrect", "unrelated", "oracle".
      cosine: (L,) between PCA-C's component and the mean difference.
      solved: how many texts of N the model answered, and the vectors were read from.
    """

    vectors: dict[str, jax.Array]
    cosine: np.ndarray
    solved: int


class Grid(NamedTuple):
    """Every vector by name, every layer and alpha, on N items: logits (S, K, A, N, C) of their answer lists."""

    names: list[str]
    items: Items
    listed: jax.Array

    @property
    def hits(self) -> np.ndarray:
        """(S, K, A, N) whether each item is right within its list."""
        return np.asarray(list_correct(self.listed, self.items.right))

    @property
    def margins(self) -> np.ndarray:
        """(S, K, A, N) log-odds margin of the right answer, nats."""
        return np.asarray(log_odds(self.listed, self.items.right))


def make_subjects(key: jax.Array, config: Any, log: Log) -> dict[str, Subject]:
    """The models with their tasks; ``stories260K`` is left out, and said so, where it is not on this machine."""
    found: dict[str, Subject] = {}
    # IOI is asked for twice as many texts, of which one order of the names is kept.
    most = max(config.dev, config.test, 2 * config.texts)
    if kinds := [task for task in config.tasks if task in TALES]:
        model, params, tokenizer = load_tales(config.tales)
        tasks = {
            kind: Task({n: at_once(tales_task(kind, n), most) for n in TALES[kind]}, scrambled=kind != "mood")
            for kind in kinds
        }
        layers = steered_layers(model, config)
        found["tales"] = Subject(model, [params] * config.tales_seeds, tokenizer, tasks, tokenizer.ids["."], layers)
    own = {
        "deduce": Task({n: at_once(deduce_task(config.hops, n), most) for n in config.facts}),
        "arith": Task({n: at_once(arith_task(n), most) for n in config.people}),
    }
    if tasks := {name: task for name, task in own.items() if name in config.tasks}:
        model, params = train_decoders(stream(key, "decoders"), config, tuple(tasks), log)
        tokenizer = reasoning.question_tokenizer
        found["own"] = Subject(model, params, tokenizer, tasks, tokenizer.ids["."], tuple(range(config.layers)))
    if config.reader:
        model, params, tokenizer = hub.load(config.reader)
        if tokenizer is None:
            raise UserError(f"{config.reader} has no tokenizer: it cannot be asked.")
        end, layers = int(tokenizer.encode("x.")[-1]), steered_layers(model, config)
        tasks = reader_tasks(tokenizer)
        found["reader"] = Subject(model, [params] * config.tales_seeds, tokenizer, tasks, end, layers)
    names = [task for task in config.tasks if task in STORIES]
    if names and (stories := load_stories(log)):
        model, weights, vocabulary = stories
        tasks = {name: Task({0: story_task(name, vocabulary)}) for name in names}
        end = int(vocabulary.encode("x.")[-1])
        layers = steered_layers(model, config)
        found["stories260K"] = Subject(model, [weights] * config.tales_seeds, vocabulary, tasks, end, layers)
    return found


def steered_layers(model: Model, config: Any) -> tuple[int, ...]:
    """Where a model that is not trained here is steered: the middle layer, as in the paper, or all."""
    layers = model.module.config.layers
    return tuple(range(layers)) if config.all_layers else (layers // 2,)


def at_once(draw: Draw, most: int) -> Draw:
    """The same task, of which ``most`` items are drawn and the first n kept: one program for every n."""

    def first(key: jax.Array, n: int, pool: str) -> Items:
        return jax.tree.map(np.asarray, draw(key, max(n, most), pool)).take(np.arange(n))

    return first


def train_decoders(key: jax.Array, config: Any, tasks: tuple[str, ...], log: Log) -> tuple[Model, list[Any]]:
    """One decoder per seed on questions with their answers, all seeds in one program.

    The loss is that of the answer, plus a tenth of the mean over all other tokens: it must write text, but names and
    facts cannot be predicted and would hide the answer.
    """
    context = 128
    vocabulary = len(reasoning.question_tokenizer)
    sizes = {"vocabulary": vocabulary, "layers": config.layers, "width": config.width, "heads": config.width // 16}
    model = transformer(
        llama(**sizes, hidden=3 * config.width, context=context, rope_theta=100.0, embed_conv=3, init_std=None)
    )
    end = reasoning.question_tokenizer.ids["."]
    share = config.batch // len(tasks)

    def sample(key: jax.Array) -> dict[str, jax.Array]:
        drawn = {
            "deduce": functools.partial(
                reasoning.deduce, n=share, facts=(1, config.trained_facts), hops=config.hops, pool="all"
            ),
            "arith": functools.partial(reasoning.arith, n=share, people=(1, config.trained_people), pool="all"),
        }
        batches = [drawn[task](stream(key, task)) for task in tasks]
        width = max(batch.tokens.shape[1] for batch in batches) + 2
        tokens = [jnp.pad(b.tokens, ((0, 0), (0, width - b.tokens.shape[1]))) for b in batches]
        lengths = jnp.concatenate([b.lengths for b in batches])
        answers = jnp.concatenate([b.answers for b in batches])
        rows = jnp.arange(len(lengths))
        text = jnp.concatenate(tokens).at[rows, lengths].set(answers).at[rows, lengths + 1].set(end)
        return {"tokens": text, "lengths": lengths}

    def loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        tokens, lengths = batch["tokens"], batch["lengths"][:, None]
        logits = model.apply({"params": params}, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        at_tokens = jnp.arange(losses.shape[1])
        is_answer, other = at_tokens == lengths - 1, (at_tokens <= lengths) & (at_tokens != lengths - 1)
        return (losses * is_answer).sum() / len(tokens) + 0.1 * (losses * other).sum() / other.sum()

    schedule = optax.warmup_cosine_decay_schedule(0.0, config.rate, config.steps // 10, config.steps, config.rate / 10)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def build(lane: jax.Array) -> Job:
        start = model.init(stream(jax.random.fold_in(key, lane), "init"))
        # At its usual 0.02 a token would hardly know its neighbours, and so no name would be found for long.
        start = select.map_at(start, "embed/conv", lambda kernel: CONV_STD / 0.02 * kernel)
        return Job(loss, start, optimiser, generated(sample))

    lanes = jnp.arange(config.seeds)
    keys = jax.vmap(lambda lane: stream(jax.random.fold_in(key, lane), "batches"))(lanes)
    trained = fit_many(keys, lanes, build, steps=config.steps, log=log, name="decoders").params
    return model, [jax.tree.map(lambda leaf, i=i: leaf[i], trained) for i in range(config.seeds)]


@functools.partial(jax.jit, static_argnames="model")
def logits_of(model: Model, params: Any, texts: Texts) -> jax.Array:
    """(N, V) after the last token of each text."""
    return steered_logits(model, params, {}, texts)


def right_of(logits: jax.Array, items: Items) -> np.ndarray:
    """(N,) whether each item is answered rightly, within its list."""
    return np.asarray(list_correct(candidate_scores(logits, items.answers), items.right))


def choose_level(key: jax.Array, subject: Subject, task: Task, n: int) -> tuple[int, float]:
    """The first level that the unsteered first model answers at most 90 % of, on dev items; and its accuracy."""
    accuracy = 0.0
    for level, draw in task.levels.items():
        items = draw(stream(key, level), n, "dev")
        accuracy = float(right_of(logits_of(subject.model, subject.params[0], items.texts), items).mean())
        if accuracy <= EASY_ENOUGH:
            break
    return level, accuracy


def read(key: jax.Array, subject: Subject, seed: int, task: Task, level: int, n: int, family: int | None) -> Reading:
    """Vectors of every type from N texts that the model answers, and those of the controls.

    Args:
      key: typed key.
      subject, seed, task, level: whom to ask what.
      n: N, before what is not answered is left out.
      family: of IOI, the order of names that texts are of; items are asked for until there are N of it.

    Returns:
      The vectors; "incorrect" only where at least two texts are answered wrongly. "oracle" is no method: the gradient
      of the mean margin of the right answer by what is added in a layer, over texts of all families, as long as R-C.
    """
    draw, mixed, swap, other = streams(key, "items negatives shuffled unrelated")
    model, variables = subject.model, {"params": subject.params[seed]}
    items = task.levels[level](draw, n if family is None else 2 * n, "train")
    of_all = items.take(np.arange(min(n, ORACLE_TEXTS)))
    if family is not None:
        rows = np.flatnonzero(np.asarray(items.right) == family)[:n]
        items = items.take(rows)
    hits = right_of(logits_of(model, subject.params[seed], items.texts), items)
    vocabulary = model.module.config.vocabulary
    wrong = negatives(mixed, items, vocabulary, task.scrambled)
    high = last_states(model, variables, items.solved, batch=len(hits))
    low = last_states(model, variables, wrong, batch=len(hits))
    found, cosine = _vectors(swap, repe.only_correct(high, hits), repe.only_correct(low, hits))
    length = jnp.linalg.norm(found["contrast"], axis=-1, keepdims=True)
    found["oracle"] = _as_long(steepest(model, subject.params[seed], of_all), length)
    if (~hits).sum() >= 2:
        found["incorrect"] = repe.contrast_vector(repe.only_correct(high, ~hits), repe.only_correct(low, ~hits))
    # What all texts of the model share: a reading vector of text that asks nothing.
    found["unrelated"] = repe.reading_vector(
        last_states(model, variables, negatives(other, items, vocabulary, False), batch=len(hits))
    )
    return Reading(found, np.asarray(cosine), int(hits.sum()))


@jax.jit
def _vectors(key: jax.Array, high: jax.Array, low: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    """Every type and "shuffled", and the cosine of PCA-C's component, from states (N, L, D) of pairs."""
    found = {kind: repe.control_vector(kind, high, low) for kind in TYPES}
    # Pairs that point either way at random have no mean but noise; it is made as long as the true one.
    signs = jax.random.rademacher(key, (len(high), 1, 1))
    length = jnp.linalg.norm(found["contrast"], axis=-1, keepdims=True)
    found["shuffled"] = _as_long((signs * (high - low)).mean(0), length)
    return found, repe.component_cosine(high, low)


@functools.partial(jax.jit, static_argnames="model")
def steepest(model: Model, params: Any, items: Items) -> jax.Array:
    """(L, D): the gradient of the mean margin of the right answer by a vector added after each block, at all tokens."""

    def margin(v: jax.Array) -> jax.Array:
        logits = steered_logits(model, params, caa_edits(model, v), items.texts)
        return log_odds(candidate_scores(logits, items.answers), items.right).mean()

    config = model.module.config
    return jax.grad(margin)(jnp.zeros((config.layers, config.width)))


def _as_long(v: jax.Array, length: jax.Array) -> jax.Array:
    return v * length / jnp.linalg.norm(v, axis=-1, keepdims=True)


def on_grid(
    subject: Subject,
    seed: int,
    items: Items,
    vectors: dict[str, jax.Array],
    layers: Sequence[int],
    alphas: Sequence[float],
) -> Grid:
    """Every vector at every layer and alpha."""
    found = dose_grid(
        subject.model,
        subject.params[seed],
        jnp.stack(list(vectors.values())),
        items.texts,
        layers=np.asarray(layers),
        strengths=np.asarray(alphas),
        tokens=items.answers,
        batch=cells_at_once(subject.model, *items.texts.tokens.shape),
    )
    return Grid(list(vectors), items, found)


def on_cells(
    subject: Subject, seed: int, items: Items, cells: dict[str, tuple[jax.Array, int, float]]
) -> dict[str, jax.Array]:
    """Logits (N, C) of the answer lists for each arm's own vector, layer and alpha."""
    vectors, layers, alphas = zip(*cells.values(), strict=True)
    found = dose_cells(
        subject.model,
        subject.params[seed],
        jnp.stack(vectors),
        items.texts,
        layers=np.asarray(layers),
        strengths=np.asarray(alphas),
        tokens=items.answers,
    )
    return dict(zip(cells, found, strict=True))


def random_like(key: jax.Array, v: jax.Array, n: int) -> dict[str, jax.Array]:
    """Random vectors (L, D) of the length of ``v`` in every layer, by name."""
    return {f"random {i}": x for i, x in enumerate(random_vectors(key, SteeringVector(v), n).values)}


def ask_with_example(
    key: jax.Array, subject: Subject, seed: int, task: Task, level: int, test: Items
) -> np.ndarray | None:
    """Whether test items are answered rightly behind one solved example: the upper reference, without a vector.

    None where prompts with an example are longer than the model's context.
    """
    examples = task.levels[level](key, len(test.right), "train")
    texts = few_shot(test, examples, subject.end)
    texts = texts._replace(tokens=texts.tokens[:, : int(texts.lengths.max())])
    if texts.tokens.shape[1] > subject.model.module.config.context:
        return None
    return right_of(logits_of(subject.model, subject.params[seed], texts), test)


def continuation(
    subject: Subject, seed: int, items: Items, row: int, v: jax.Array, layer: int, alpha: float, steps: int = 4
) -> tuple[str, str, str]:
    """A prompt and its greedy continuations without and with the vector, as text."""
    length = int(items.texts.lengths[row])
    prompt = items.texts.tokens[row : row + 1]
    outputs = []
    for strength in (0.0, alpha):
        edits = repe.control_edits(subject.model, v, layer, strength)
        variables = {"params": subject.params[seed], "edits": edits}
        done = generate(subject.model, variables, prompt, jnp.asarray([length]), steps=steps)
        outputs.append(subject.tokenizer.decode(np.asarray(done.tokens[0, length : length + steps]).tolist()))
    return subject.tokenizer.decode(np.asarray(prompt[0, :length]).tolist()), outputs[0], outputs[1]
