"""GSM8K with a model of the hub: the part of the experiment that is the paper's own.

A question is solved by writing, greedily, and judged by the number at the end. Positive texts are questions with the
model's own correct solutions; their pairs, of equal length, are random tokens. The vector acts in the middle layer, at
every token of the prompt and of what is written. Type and alpha are chosen on training problems that no vector was read
from, and so is the alpha of every random vector.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measures import percent, points
from experiments.steering._repe_reasoning_lab import TYPES
from mechlab.core.errors import UserError
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.data.text import load_problems
from mechlab.methods.steering import repe_reasoning as repe
from mechlab.methods.steering.vectors import SteeringVector, Texts, last_states, pad, random_vectors
from mechlab.models.generate import generate
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric

NEXT = "\nQuestion:"
"""Where a base model goes on to a question of its own; what it writes from there on does not count."""


class Reader(NamedTuple):
    """A model that solves problems by writing.

    Attributes:
      model, params, tokenizer: as ``models.hub.load`` gives them.
      steps: tokens that it may write.
      layer: where it is steered.
    """

    model: Model
    params: Any
    tokenizer: Any
    steps: int
    layer: int


Problem = tuple[str, float]


def gsm8k(key: jax.Array, model: Model, params: Any, tokenizer: Any, config: Any, log: Log) -> dict[str, Metric]:
    """The metrics ``gsm8k/...`` of a model.

    Raises:
      UserError: it solves fewer than two of the problems, so that no vector can be read.
      MissingData: GSM8K is not here and cannot be had.
    """
    reader = Reader(model, params, tokenizer, config.solution, model.module.config.layers // 2)
    train, test = ([(question, repe.final_number(answer)) for question, answer in part] for part in load_problems())
    return study(key, reader, draw_problems(key, train, test, (config.texts, config.dev, config.test)), config, log)


def draw_problems(
    key: jax.Array, train: Sequence[Any], test: Sequence[Any], counts: tuple[int, int, int]
) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """Problems to read vectors from and to choose by, both of the training part, and test problems; all at random."""
    of_train, of_test = (
        np.asarray(jax.random.permutation(stream(key, part), len(problems)))
        for part, problems in (("train", train), ("test", test))
    )
    texts, dev, last = counts
    return (
        [train[row] for row in of_train[:texts]],
        [train[row] for row in of_train[texts : texts + dev]],
        [test[row] for row in of_test[:last]],
    )


def study(
    key: jax.Array, reader: Reader, problems: tuple[list[Problem], list[Problem], list[Problem]], config: Any, log: Log
) -> dict[str, Metric]:
    """Vectors from the first problems, choices on the second, accuracy on the third.

    Args:
      key: typed key.
      reader: the model.
      problems: question and number, to read from, to choose by and to test on.
      config: ``solution_alphas`` and ``randoms``.
      log: told what was chosen.

    Raises:
      UserError: as ``gsm8k``.
    """
    texts, dev, test = problems
    vectors = read(key, reader, texts, log)
    alphas = [alpha for alpha in config.solution_alphas if alpha]
    worth = accuracy(reader, dev, [(v, alpha) for v in vectors.values() for alpha in alphas])
    worth = worth.reshape(len(vectors), len(alphas), -1).mean(-1)
    kind, best = np.unravel_index(worth.argmax(), worth.shape)
    chosen, alpha = list(vectors)[int(kind)], alphas[int(best)]
    log.say(f"gsm8k: {chosen}, alpha {alpha:+.2f}, {100 * worth.max():.1f} % of dev problems")
    randoms = list(random_vectors(stream(key, "random"), SteeringVector(vectors[chosen]), config.randoms).values)
    of_random = accuracy(reader, dev, [(v, dose) for v in randoms for dose in alphas])
    doses = of_random.reshape(len(randoms), len(alphas), -1).mean(-1).argmax(-1)

    cells = [(vectors[chosen], 0.0), (vectors[chosen], alpha)]
    cells += [(vectors[name], alphas[int(worth[i].argmax())]) for i, name in enumerate(vectors)]
    cells += [(v, alphas[int(dose)]) for v, dose in zip(randoms, doses, strict=True)]
    hits = accuracy(reader, test, cells)
    zero, steered = hits[:1], hits[1:2]
    of_type, of_random = hits[2 : 2 + len(vectors)], hits[2 + len(vectors) :]
    best_random = of_random[of_random.mean(1).argmax()][None]
    metrics = {
        "gsm8k/alpha": Metric(value=alpha),
        "gsm8k/layer": Metric(value=reader.layer),
        "gsm8k/accuracy/zero": percent(stream(key, "zero"), zero),
        "gsm8k/accuracy/chosen": percent(stream(key, "chosen"), steered),
        "gsm8k/accuracy/random": percent(stream(key, "best random"), best_random),
        "gsm8k/gain/chosen": points(stream(key, "gain"), steered, zero),
        "gsm8k/gain_over_random": points(stream(key, "over random"), steered, best_random),
    }
    for name, row in zip(vectors, of_type, strict=True):
        metrics[f"gsm8k/accuracy/{name}"] = percent(stream(key, name), row[None])
    return metrics


def read(key: jax.Array, reader: Reader, problems: list[Problem], log: Log) -> dict[str, jax.Array]:
    """(L, D) of each type, from the problems that the model solves, with its own solutions."""
    solutions = write(reader, problems, [(None, 0.0)])[0]
    right = [is_right(text, number) for text, (_, number) in zip(solutions, problems, strict=True)]
    log.say(f"gsm8k: {sum(right)} of {len(problems)} problems solved without a vector")
    if sum(right) < 2:
        raise UserError(
            f"the reader solves {sum(right)} of {len(problems)} problems of GSM8K in {reader.steps} tokens; vectors "
            "are read from at least two right solutions. Take a larger model, more texts or longer solutions."
        )
    solved = [
        [int(token) for token in reader.tokenizer.encode(prompt(question) + text.partition(NEXT)[0])]
        for (question, _), text, kept in zip(problems, solutions, right, strict=True)
        if kept
    ]
    rng = np.random.default_rng(np.asarray(jax.random.key_data(stream(key, "negatives"))))
    vocabulary = reader.model.module.config.vocabulary
    noise = [[row[0], *map(int, rng.integers(0, vocabulary, len(row) - 1))] for row in solved]
    high, low = (last_states(reader.model, {"params": reader.params}, pad(rows), batch=8) for rows in (solved, noise))
    return {kind: repe.control_vector(kind, high, low) for kind in TYPES}


def accuracy(reader: Reader, problems: list[Problem], cells: Sequence[tuple[jax.Array, float]]) -> np.ndarray:
    """(K, N) whether each problem is solved under each vector (L, D) and alpha."""
    written = write(reader, problems, cells)
    return np.asarray(
        [[is_right(text, number) for text, (_, number) in zip(texts, problems, strict=True)] for texts in written]
    )


def write(
    reader: Reader, problems: list[Problem], cells: Sequence[tuple[jax.Array | None, float]], batch: int = 8
) -> list[list[str]]:
    """What the model writes behind each problem, by cell; ``None`` is no vector.

    Raises:
      UserError: a prompt with its solution is longer than the model's context.
    """
    config = reader.model.module.config
    texts = pad([[int(token) for token in reader.tokenizer.encode(prompt(question))] for question, _ in problems])
    if texts.tokens.shape[1] + reader.steps > config.context:
        raise UserError(
            f"problems of {texts.tokens.shape[1]} tokens and solutions of {reader.steps} exceed the reader's context "
            f"of {config.context}: --set solution={max(1, config.context - texts.tokens.shape[1])} fits."
        )
    nothing = jnp.zeros((config.layers, config.width))
    vectors = jnp.stack([nothing if v is None else v for v, _ in cells])
    strengths = jnp.asarray([alpha for _, alpha in cells], jnp.float32)
    found: list[list[str]] = [[] for _ in cells]
    for start in range(0, len(problems), batch):
        # The last chunk repeats its last problem instead of changing shape, which would compile a second program.
        rows = np.minimum(np.arange(start, start + batch), len(problems) - 1)
        some = Texts(texts.tokens[rows], texts.lengths[rows])
        tokens = _write(reader.model, reader.params, vectors, strengths, reader.layer, some, reader.steps)
        for cell, of_cell in zip(found, np.asarray(tokens), strict=True):
            cell += [reader.tokenizer.decode(ids.tolist()) for ids in of_cell[: len(problems) - start]]
    return found


@functools.partial(jax.jit, static_argnames=("model", "layer", "steps"))
def _write(
    model: Model, params: Any, vectors: jax.Array, strengths: jax.Array, layer: int, texts: Texts, steps: int
) -> jax.Array:
    """(K, N, steps) tokens. One cell at a time: a cell is a batch of texts already, and memory stays that of one."""

    def of_cell(cell: tuple[jax.Array, jax.Array]) -> jax.Array:
        edits = repe.control_edits(model, cell[0], layer, cell[1])
        done = generate(model, {"params": params, "edits": edits}, texts.tokens, texts.lengths, steps=steps)
        return jnp.take_along_axis(done.tokens, texts.lengths[:, None] + jnp.arange(steps), 1)

    return jax.lax.map(of_cell, (vectors, strengths))


def prompt(question: str) -> str:
    """How a problem is asked."""
    return f"Question: {question}\nAnswer:"


def is_right(solution: str, number: float) -> bool:
    """Whether a solution ends in the number, up to 1e-6 (the official rule)."""
    found = repe.final_number(solution.partition(NEXT)[0])
    return found is not None and abs(found - number) < 1e-6
