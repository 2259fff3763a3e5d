"""tales: train the three decoders that ship with mechlab, and measure what each of them can do.

    python -m experiments run tales                   # S, M, L: about an hour on two cores
    python -m experiments run tales --preset smoke    # S for a few steps
    python -m experiments run tales --preset accel    # S, M, L and XL, on an accelerator

All sizes see the same texts in the same order. Training has four parts. First lists only, until a model can copy what
followed before (an induction head); then lists and questions, whose answers stand in the text; then all texts. In these
three, tokens that do not follow from the text (which name comes next, which colour) hardly count: they are many,
nothing can predict them, and their noise hides the few that show who has what. The last part is the plain loss on long
rows, with the rate falling to zero, so that what ships is a language model like any other.

A study on a task that its model cannot do says nothing. The two-candidate items should be neither impossible nor
solved: 55 to 92 % for L. What steers this is the number of distractor sentences; the usual number of each kind of item
is chosen on the dev pool and recorded with the weights. Results are on docs/worlds/tales.md.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.measures import rate
from experiments.worlds import _tales_figures as draw
from experiments.worlds._tales_claims import CLAIMS
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.data.worlds import tales
from mechlab.models import hub
from mechlab.models.subjects import SHAPES
from mechlab.models.transformer import llama, transformer
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims
from mechlab.training.batches import generated
from mechlab.training.loop import fit

__all__ = ["CLAIMS", "PRESETS", "Config", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      sizes: of ``models.subjects.SHAPES``.
      list_steps, question_steps, focus_steps, plain_steps: updates in the four parts of training.
      rows: of a batch of texts, each of 64 tokens in the first two parts, 96 in the third; a quarter as many of 256 in
        the last.
      focus: weight of the tokens that do not follow from the text, in the first three parts.
      rate: Muon's learning rate, for the matrices; ``embed_rate`` is Adam's, for embeddings and norms.
      distractors: how many further sentences stand between what an item tells and what it asks; a kind of item that
        has no room for so many is left out.
      items: of every kind and number of distractors.
    """

    sizes: tuple[str, ...] = ("L", "M", "S")
    list_steps: int = 1200
    question_steps: int = 4500
    focus_steps: int = 1600
    plain_steps: int = 800
    rows: int = 16
    focus: float = 0.02
    rate: float = 0.006
    embed_rate: float = 3e-3
    distractors: tuple[int, ...] = (0, 1, 2, 4, 6, 8, 10, 12, 14, 16)
    items: int = 1000

    def __post_init__(self) -> None:
        unknown = [size for size in self.sizes if size not in SHAPES]
        if unknown or not self.sizes:
            raise ValueError(f"unknown sizes {unknown}; known: {', '.join(SHAPES)}")
        if not self.distractors:
            raise ValueError("distractors must name at least one number")
        steps = (self.list_steps, self.question_steps, self.focus_steps, self.plain_steps)
        if min(*steps, self.items) < 1 or self.rows < 4:
            raise ValueError("steps and items must be at least 1, rows at least 4")


WATCHED = 1
"""Distractors in the items of the learning curves."""

NOT_TOO_GOOD = 90.0
"""Percent of items answered, at most, with the usual number of distractors."""

PRESETS: dict[str, Config] = {
    "smoke": Config(
        sizes=("S",),
        list_steps=5,
        question_steps=5,
        focus_steps=5,
        plain_steps=5,
        rows=4,
        distractors=(1,),
        items=64,
    ),
    "cpu": Config(),
    "accel": Config(sizes=("XL", "L", "M", "S"), question_steps=12_000, focus_steps=12_000, plain_steps=4000, rows=64),
    "paper": Config(),
}


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """Train every size, measure it, and write its weights as a checkpoint folder beside the training checkpoints."""
    metrics: dict[str, Metric] = {}
    curves: dict[str, Any] = {}
    for size in config.sizes:
        model = decoder(size)
        params, curves[size] = train(key, model, config, log, size)
        measured = measure(stream(key, "measure"), model, params, config)
        measured |= usual_numbers(stream(key, "usual"), model, params, config)
        metrics |= {f"{size}/{name}": metric for name, metric in measured.items()}
        if log.directory is not None:
            folder = log.directory / "weights" / f"tales-{size}"
            write_weights(folder, model, params, measured, int(curves[size]["tokens"][-1]), config)
    return Result(
        metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=draw.all_figures(metrics, curves, config)
    )


def decoder(size: str) -> Model:
    """The untrained model of one size: Llama's kind of block over the vocabulary of tales."""
    return transformer(llama(vocabulary=len(tales.VOCABULARY), init_std=None, **SHAPES[size]))


def train(key: jax.Array, model: Model, config: Config, log: Log, name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """Train one size; its parameters, and what was measured on the way, with the tokens seen at each point."""
    everything = tuple(tales.GENRES)
    # Name, steps, genres, rows, tokens a row, weight of what does not follow, rate at the end over rate at the start.
    parts = (
        ("lists", config.list_steps, ("list",), config.rows, 64, config.focus, 0.5),
        ("questions", config.question_steps, ("list", "question"), config.rows, 64, config.focus, 0.4),
        ("focus", config.focus_steps, everything, config.rows, 96, config.focus, 0.3),
        ("plain", config.plain_steps, everything, config.rows // 4, tales.CONTEXT, 1.0, 0.0),
    )
    params = model.init(stream(key, "parameters"))
    watch = abilities(stream(key, "watch"), model, config)
    tokens, history = 0, []
    for part, steps, genres, rows, length, weight, end in parts:
        texts = functools.partial(tales.sample_batch, batch=rows, length=length, genres=genres)
        result = fit(
            stream(key, part),
            functools.partial(loss, model, weight),
            params,
            optimiser(params, config, steps, end),
            generated(texts),
            steps=steps,
            record=watch,
            log=log,
            name=f"{name}-{part}",
        )
        params, points = result.params, len(jax.tree.leaves(result.records)[0])
        at = tokens + np.linspace(0, steps, points) * rows * length
        tokens = int(at[-1])
        history.append({"tokens": at} | {name: np.asarray(values) for name, values in result.records.items()})
    return params, {name: np.concatenate([part[name] for part in history]) for name in history[0]}


def loss(model: Model, other: float, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean cross-entropy in nats, tokens that do not follow from the text weighted with ``other``."""
    nats = token_losses(model, params, batch["tokens"])
    weight = jnp.where(batch["fixed"], 1.0, other) * batch["mask"]
    return (nats * weight).sum() / weight.sum()


def token_losses(model: Model, params: Any, tokens: jax.Array) -> jax.Array:
    """Cross-entropy (B, T) of the token after each; the last column belongs to no token."""
    scores = jax.nn.log_softmax(model.apply({"params": params}, tokens))
    return -jnp.take_along_axis(scores, jnp.roll(tokens, -1, axis=1)[..., None], -1)[..., 0]


def optimiser(params: Any, config: Config, steps: int, end: float) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, each layer's on its own, Adam for the rest; linear warm-up and decay."""
    spec = optax.contrib.MuonDimensionNumbers
    # Axis 0 is the layer's; (inputs), (outputs).
    axes = {"q": spec((1,), (2, 3)), "k": spec((1,), (2, 3)), "v": spec((1,), (2, 3)), "o": spec((1, 2), (3,))}
    axes |= dict.fromkeys(("up", "gate", "down"), spec((1,), (2,)))

    def dimensions(path: Any, leaf: Any) -> Any:
        names = [entry.key for entry in path]
        return axes.get(names[-2]) if names[0] == "blocks" else None

    def schedule(rate: float) -> optax.Schedule:
        warm = min(100, max(1, steps // 10))
        rise = optax.linear_schedule(0.0, rate, warm)
        return optax.join_schedules([rise, optax.linear_schedule(rate, end * rate, steps - warm)], [warm])

    return optax.contrib.muon(
        schedule(config.rate),
        adam_learning_rate=schedule(config.embed_rate),
        muon_weight_dimension_numbers=jax.tree.map_with_path(dimensions, params),
    )


def abilities(key: jax.Array, model: Model, config: Config) -> Any:
    """A function of the parameters: loss on held-out texts, and accuracy on items of each kind, for curves."""
    texts = tales.sample_batch(stream(key, "texts"), 32, length=128)
    items = {
        kind: tales.items(stream(key, kind), kind, min(128, config.items), distractors=WATCHED)
        for kind in tales.ITEM_KINDS
    }

    def measured(params: Any) -> dict[str, jax.Array]:
        nats = token_losses(model, params, texts["tokens"])
        followed = texts["fixed"] & texts["mask"]
        return {
            "loss": (nats * texts["mask"]).sum() / texts["mask"].sum(),
            "loss of what follows": (nats * followed).sum() / followed.sum(),
            **{kind: right(model, params, each).mean() for kind, each in items.items()},
        }

    return measured


def right(model: Model, params: Any, items: tales.Items) -> jax.Array:
    """Which items (N,) are answered: the right candidate's logit is above the wrong one's."""
    logits = model.apply({"params": params}, items.tokens, None, None, None, items.lengths - 1)[:, 0]
    pair = jnp.take_along_axis(logits, items.candidates, axis=1)
    return pair[:, 0] > pair[:, 1]


def measure(key: jax.Array, model: Model, params: Any, config: Config) -> dict[str, Metric]:
    """Losses by genre, copying in lists, and accuracy on items of the test pool by kind and number of distractors."""
    metrics: dict[str, Metric] = {}
    losses = jax.jit(functools.partial(token_losses, model))
    for genre in tales.GENRES:
        texts = tales.sample_batch(stream(key, genre), 32, genres=(genre,))
        nats = np.asarray(losses(params, texts["tokens"]))[np.asarray(texts["mask"])]
        metrics[f"loss/{genre}"] = Metric(value=float(nats.mean()), n=nats.size, unit="nats a token")
    metrics["copying"] = rate(copied(stream(key, "lists"), model, params))
    answered = jax.jit(functools.partial(right, model))
    for kind in tales.ITEM_KINDS:
        for count in counts(config, kind):
            items = tales.items(stream(key, kind), kind, config.items, distractors=count, pool="test")
            metrics[f"{kind}/{count}"] = rate(np.asarray(answered(params, items)))
    return metrics


def counts(config: Config, kind: str) -> list[int]:
    """The numbers of distractors that a kind of item has room for, increasing."""
    return [count for count in sorted(config.distractors) if count <= tales.MAX_DISTRACTORS[kind]]


def usual_numbers(key: jax.Array, model: Model, params: Any, config: Config) -> dict[str, Metric]:
    """For every kind of item the fewest distractors with which a model is not too good, on items of the dev pool."""
    found = {}
    answered = jax.jit(functools.partial(right, model))
    for kind in tales.ITEM_KINDS:
        for count in counts(config, kind):
            items = tales.items(stream(key, kind), kind, config.items, distractors=count, pool="dev")
            if 100 * np.asarray(answered(params, items)).mean() <= NOT_TOO_GOOD:
                break
        found[f"usual/{kind}"] = Metric(value=count, n=config.items, unit="distractors")
    return found


def copied(key: jax.Array, model: Model, params: Any) -> np.ndarray:
    """In lists that go round, from the end of the second round on: whether the likeliest next word is the right one."""
    lists = tales.documents(key, 128, genre="list")
    logits = model.apply({"params": params}, lists.tokens)
    hit = np.asarray(logits.argmax(-1)[:, :-1] == lists.tokens[:, 1:])
    at = np.arange(1, lists.tokens.shape[1])
    begin, end = np.asarray(lists.spans["period"]).T[..., None]
    # The last four tokens of a list are "and so on."
    counted = (begin >= 0) & (at >= begin + 2 * (end - begin)) & (at < np.asarray(lists.lengths)[:, None] - 4)
    return hit[counted]


def write_weights(
    folder: Path, model: Model, params: Any, measured: dict[str, Metric], tokens: int, config: Config
) -> None:
    """Config, weights in float32, and a card with what is known of them; ``ship_tales`` puts them into the package."""
    hub.export(folder, model, params, family="llama")
    card = {
        "digest": tales.DIGEST,
        "tokens": tokens,
        "accuracy": {name: round(metric.value, 1) for name, metric in measured.items() if metric.unit == "%"},
        "usual": {kind: int(measured[f"usual/{kind}"].value) for kind in tales.ITEM_KINDS},
        "config": dataclasses.asdict(config),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
