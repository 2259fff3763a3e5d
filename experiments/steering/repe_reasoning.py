"""Reasoning by representation engineering (arXiv 2504.19483): does the mean state of right answers, added back, help?

    python -m experiments run repe_reasoning
    python -m experiments run repe_reasoning --preset smoke   # one task, seconds

Vectors of three types are read from texts that end in the right answer, and added in one layer at strength alpha.
Type, layer and alpha (never 0) are chosen on dev items; names and things of train, dev and test are disjoint. Beside
the chosen vector stand: no vector; constant offsets of the answers tuned on dev; random vectors of the same length,
each with its own dev choice of layer and alpha; vectors of shuffled pairs, of wrongly answered items, of text that asks
nothing, of another task; the gradient of the right answer's margin, which no method has; and one solved example in the
prompt. The level of difficulty is set on dev before any vector is read.

The paper's gains are on Pythia and Mistral and are not quoted. Ours are on docs/papers/repe_reasoning.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.steering import _repe_reasoning_figures as draw
from experiments.steering import _repe_reasoning_lab as lab
from experiments.steering._repe_reasoning_claims import CLAIMS
from experiments.steering._repe_reasoning_measures import summarise
from experiments.steering._repe_reasoning_reader import gsm8k
from experiments.steering._tales_tasks import STORIES, Items, tales_task
from mechlab.analysis.margins import candidate_scores, list_correct, log_odds, tune_offsets
from mechlab.analysis.metrics import auroc, kl_divergence, spearman
from mechlab.core.errors import UserError
from mechlab.core.rng import stream
from mechlab.methods.steering import repe_reasoning as repe
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "run"]

ALL_TASKS = (*lab.TALES, "deduce", "arith", *STORIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      tasks: ioi, recall, mood on a model of tales; deduce, arith on decoders trained here; stories_mood, stories_recall
        on stories260K.
      seeds: decoders, each with its own texts and items.
      tales_seeds: draws of texts and items for the models that are not trained here.
      tales: size of the model of tales.
      all_layers: steer models that are not trained here in every layer, not in the middle one alone.
      layers, width, steps, batch, rate: of the decoders and of Adam.
      hops: of deduction; 2 puts the rules into the text.
      facts, people: levels of difficulty of deduce and arith, the first at most 90 % right on dev is taken.
      trained_facts, trained_people: the most that the decoders see in training.
      texts: N, from which a vector is read.
      dev, test: numbers of items.
      alphas: the grid; contains 0.
      randoms: random vectors of the length of the chosen type.
      reader: a decoder of the hub, or a folder, that is asked IOI, deduction and GSM8K as text, steered in its middle
        layer; "" leaves it out.
      solution: tokens that it may write per problem of GSM8K.
      solution_alphas: the grid there, where every cell is a text.
      extras: also the families of IOI, few-shot prompts, the slope at alpha = 0, and texts before and after.
    """

    tasks: tuple[str, ...] = (*lab.TALES, "deduce", "arith")
    seeds: int = 1
    tales_seeds: int = 1
    tales: Literal["S", "M", "L"] = "L"
    all_layers: bool = False
    layers: int = 3
    width: int = 64
    steps: int = 1000
    batch: int = 64
    rate: float = 3e-3
    hops: int = 1
    facts: tuple[int, ...] = (3, 4, 5, 6)
    people: tuple[int, ...] = (2, 3, 4)
    trained_facts: int = 4
    trained_people: int = 2
    texts: int = 96
    dev: int = 48
    test: int = 64
    alphas: tuple[float, ...] = (-1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0)
    randoms: int = 10
    reader: str = ""
    solution: int = 256
    solution_alphas: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    extras: bool = True

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in ALL_TASKS]
        if unknown or not (self.tasks or self.reader):
            raise ValueError(f"tasks: unknown {unknown}; known: {', '.join(ALL_TASKS)}")
        if 0.0 not in self.alphas or len(set(self.alphas)) < 2 or not np.isfinite(self.alphas).all():
            raise ValueError(f"alphas: wanted finite numbers with 0 and another one among them, got {self.alphas}")
        if tuple(sorted(self.alphas)) != self.alphas:
            raise ValueError(f"alphas: wanted rising numbers, got {self.alphas}")
        if (
            min(self.seeds, self.tales_seeds, self.steps, self.batch, self.randoms, self.solution) < 1
            or min(self.trained_facts, self.trained_people) < 1
            or min(self.texts, self.dev, self.test) < 2
        ):
            raise ValueError(
                "seeds, steps, batch, randoms, solution, trained_* must be at least 1; texts, dev and test at least 2"
            )
        if self.width % 16:
            raise ValueError(f"width: wanted a multiple of 16, the width of a head, got {self.width}")


_FINE = tuple(round(-1 + 0.05 * i, 2) for i in range(41))

PRESETS: dict[str, Config] = {
    "smoke": Config(
        tasks=("deduce",),
        seeds=1,
        layers=2,
        width=48,
        steps=60,
        batch=32,
        facts=(2,),
        trained_facts=2,
        texts=64,
        dev=64,
        test=64,
        alphas=(-1.0, 0.0, 1.0),
        randoms=2,
        extras=False,
    ),
    "cpu": Config(),
    "accel": Config(
        tasks=ALL_TASKS,
        seeds=5,
        tales_seeds=5,
        all_layers=True,
        layers=8,
        width=256,
        steps=4000,
        rate=1e-3,
        hops=2,
        facts=(3, 4, 5, 6, 7, 8),
        people=(1, 2, 3, 4),
        trained_facts=8,
        trained_people=4,
        texts=200,
        dev=150,
        test=500,
        alphas=_FINE,
    ),
    # One of the paper's models; the others by --set reader=EleutherAI/pythia-1.4b.
    "paper": Config(
        tasks=(),
        reader="mistralai/Mistral-7B-Instruct-v0.1",
        solution=512,
        texts=200,
        dev=150,
        test=500,
        alphas=_FINE,
    ),
}


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """The whole experiment: subjects, levels, vectors, grids, what is chosen, claims and figures."""
    metrics: dict[str, Metric] = {}
    drawn: dict[str, dict[str, Any]] = {}
    boot = stream(key, "bootstrap")
    subjects = lab.make_subjects(key, config, log)
    for subject in subjects.values():
        levels = {}
        for name, task in subject.tasks.items():
            levels[name], found = lab.choose_level(stream(key, name, "level"), subject, task, config.dev)
            metrics[f"level/{name}"] = Metric(value=levels[name], unit="distractors, facts or people")
            metrics[f"level_accuracy/{name}"] = Metric(value=100 * found, unit="% of dev", n=config.dev)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in subject.tasks}
        for seed in range(len(subject.params)):
            keys = {name: stream(jax.random.fold_in(key, seed), name) for name in subject.tasks}
            readings = {
                name: lab.read(
                    keys[name], subject, seed, task, levels[name], config.texts, 0 if name.endswith("ioi") else None
                )
                for name, task in subject.tasks.items()
            }
            for name in subject.tasks:
                log.say(f"{name}, seed {seed}: level {levels[name]}, {readings[name].solved} texts of {config.texts}")
                others = [other for other in subject.tasks if other != name]
                vectors = dict(readings[name].vectors)
                if others:
                    vectors["transfer"] = readings[others[0]].vectors["contrast"]
                runs[name].append(one_seed(keys[name], subject, seed, name, levels[name], vectors, config, log))
                runs[name][-1]["cosine"] = readings[name].cosine
                runs[name][-1]["norms"] = {
                    kind: np.linalg.norm(readings[name].vectors[kind], axis=-1) for kind in lab.TYPES
                }
        for name, of_seeds in runs.items():
            metrics |= summarise(stream(boot, name), name, of_seeds, config.alphas)
            drawn[name] = {"runs": of_seeds, "layers": subject.layers}
    if config.reader:
        reader = subjects["reader"]
        try:
            metrics |= gsm8k(stream(key, "gsm8k"), reader.model, reader.params[0], reader.tokenizer, config, log)
        except UserError as error:
            log.say(f"gsm8k is left out: {error}")  # the other tasks took their time and stay
    figures = draw.all_figures(config.alphas, drawn)
    return Result(metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=figures)


def one_seed(
    key: jax.Array,
    subject: lab.Subject,
    seed: int,
    name: str,
    level: int,
    vectors: dict[str, jax.Array],
    config: Config,
    log: Log,
) -> dict[str, Any]:
    """Choices on dev and outcomes on test of one task and seed: hits, margins, masses (N,) by arm, and curves (A,)."""
    task = subject.tasks[name]
    draw_items = task.levels[level]
    dev, test = (draw_items(stream(key, pool), n, pool) for pool, n in (("dev", config.dev), ("test", config.test)))
    grid = lab.on_grid(subject, seed, dev, vectors, subject.layers, config.alphas)
    places, worths = best_places(grid, config.alphas, subject.layers)
    chosen = max(lab.TYPES, key=lambda kind: worths[kind])
    v, (layer, alpha) = vectors[chosen], places[chosen]
    randoms = lab.random_like(stream(key, "random"), v, config.randoms)
    on_dev = lab.on_grid(subject, seed, dev, randoms, subject.layers, config.alphas)
    random_places, _ = best_places(on_dev, config.alphas, subject.layers)

    cells = {arm: (vectors[arm], *place) for arm, place in places.items()}
    cells |= {"zero": (v, layer, 0.0), "chosen": cells[chosen]}
    cells |= {arm: (randoms[arm], *place) for arm, place in random_places.items()}
    listed = lab.on_cells(subject, seed, test, cells)
    hits = {arm: np.asarray(list_correct(x, test.right)) for arm, x in listed.items()}
    margins = {arm: np.asarray(log_odds(x, test.right)) for arm, x in listed.items()}
    offsets = tune_offsets(grid.listed[0, 0, config.alphas.index(0.0)], dev.right)
    hits["offset"] = np.asarray(list_correct(listed["zero"], test.right, offsets))
    margins["offset"] = np.asarray(log_odds(listed["zero"] + offsets, test.right))
    if config.extras:
        with_example = lab.ask_with_example(stream(key, "examples"), subject, seed, task, level, test)
        hits |= {} if with_example is None else {"few_shot": with_example}

    found: dict[str, Any] = {
        "hits": {arm: x for arm, x in hits.items() if arm not in randoms},
        "margins": {arm: x for arm, x in margins.items() if arm not in randoms},
        "choice": {"type": chosen, "layer": layer, "alpha": alpha},
        "random_hits": np.asarray([hits[arm].mean() for arm in randoms]),
        "random_margins": np.asarray([margins[arm].mean() for arm in randoms]),
    }
    on_test: dict[int, lab.Grid] = {}

    def band(layer: int) -> lab.Grid:
        """Every type, then the random vectors, on test items in one layer."""
        if layer not in on_test:
            shown = {kind: vectors[kind] for kind in lab.TYPES} | randoms
            on_test[layer] = lab.on_grid(subject, seed, test, shown, [layer], config.alphas)
        return on_test[layer]

    found["control"] = control(subject, seed, test, grid, vectors, chosen, band, config)
    found["curves"] = curves(subject, seed, test, v, layer, band(layer), chosen, config)
    found["curves"]["dev"] = grid.hits[grid.names.index(chosen)].mean(-1)
    at_zero, at_alpha = config.alphas.index(0.0), config.alphas.index(alpha)
    found["masses"] = {arm: found["curves"]["correct"][i] for arm, i in (("zero", at_zero), ("chosen", at_alpha))}
    found["auroc"] = {arm: list_auroc(listed[arm], test.right) for arm in ("zero", "chosen", "oracle")}
    if config.extras and name == "ioi":
        found["families"] = families(stream(key, "families"), subject, seed, level, v, found, config)
    log.say(f"{name}, seed {seed}: {found['choice']}")
    if config.extras:
        changed = np.flatnonzero(hits["chosen"] != hits["zero"])
        prompt, before, after = lab.continuation(subject, seed, test, int(changed[:1].sum()), v, layer, alpha)
        log.say(f"  {prompt}\n  alpha 0: {before}\n  steered: {after}")
    return found


def best_places(
    grid: lab.Grid, alphas: Sequence[float], layers: Sequence[int]
) -> tuple[dict[str, tuple[int, float]], dict[str, float]]:
    """The best (layer, alpha not 0) of every vector on dev, and its worth: accuracy, ties by the margin."""
    moved = np.flatnonzero(np.asarray(alphas) != 0)
    worth = (grid.hits.mean(-1) + 1e-3 * np.tanh(grid.margins.mean(-1)))[..., moved]
    places, worths = {}, {}
    for name, of_vector in zip(grid.names, worth, strict=True):
        k, a = np.unravel_index(of_vector.argmax(), of_vector.shape)
        places[name] = layers[int(k)], alphas[int(moved[a])]
        worths[name] = float(of_vector[k, a])
    return places, worths


def list_auroc(listed: jax.Array, right: jax.Array) -> float:
    """Of scores (N, C): for each answer that is ever right, its score minus the mean of the others, told from the rest.

    The mean over these answers; with two of them the AUROC of their difference. Constants of answers change nothing.
    """
    present = np.unique(right)
    scores = np.asarray(listed)[:, present].T
    others = (scores.sum(0) - scores) / (len(present) - 1)
    areas = jax.vmap(auroc)(scores - others, jnp.asarray(right) == present[:, None])
    return float(areas.mean())


def curves(
    subject: lab.Subject,
    seed: int,
    test: Items,
    v: jax.Array,
    layer: int,
    band: lab.Grid,
    chosen: str,
    config: Config,
) -> dict[str, np.ndarray]:
    """What alpha does to test items in the chosen layer, (A,); the probability mass by item, (A, N)."""
    accuracy, margin = band.hits[:, 0].mean(-1), band.margins[:, 0].mean(-1)
    ours = band.names.index(chosen)
    logits = repe.alpha_sweep(subject.model, subject.params[seed], test.texts, v, layer, np.asarray(config.alphas))
    correct, wrong = repe.answer_mass(logits, test.answers, test.gold)
    kl = np.asarray(kl_divergence(logits[config.alphas.index(0.0)], logits, eps=repe.EPSILON))
    return {
        "accuracy": accuracy[ours],
        "random": accuracy[len(lab.TYPES) :],
        "margin": margin[ours],
        "kl": kl.mean(-1),
        "kl_sd": kl.std(-1),
        "entropy": np.asarray(repe.entropy_bits(logits)).mean(-1),
        "correct": np.asarray(correct),
        "incorrect": np.asarray(wrong),
    }


def control(
    subject: lab.Subject,
    seed: int,
    test: Items,
    grid: lab.Grid,
    vectors: dict[str, jax.Array],
    chosen: str,
    band: Callable[[int], lab.Grid],
    config: Config,
) -> dict[str, float] | None:
    """How the margin follows alpha in [-0.5, 0.5], for the type and layer that move it most on dev.

    None where the grid of alphas is too coarse. The random vectors have the length of the type that was chosen: R's, or
    that of R-C and PCA-C, which are equally long; so only types of this length are looked at.
    """
    if not config.extras or not {-0.5, -0.1, 0.0, 0.1, 0.5} <= set(config.alphas):
        return None
    inside = [alpha for alpha in config.alphas if abs(alpha) <= 0.5]
    kinds = [kind for kind in lab.TYPES if (kind == "reading") == (chosen == "reading")]
    moves = grid.margins[[grid.names.index(kind) for kind in kinds]].mean(-1)
    moved = np.abs(moves[..., config.alphas.index(0.5)] - moves[..., config.alphas.index(-0.5)])
    s, k = np.unravel_index(moved.argmax(), moved.shape)
    v, layer = vectors[kinds[s]], subject.layers[k]
    places = [config.alphas.index(alpha) for alpha in inside]
    means = band(layer).margins[:, 0, places].mean(-1)
    ours, others = means[lab.TYPES.index(kinds[s])], means[len(lab.TYPES) :]
    _, slope = repe.margin_slopes(
        subject.model,
        subject.params[seed],
        v[None],
        np.asarray([layer]),
        test.texts,
        test.answers,
        test.right,
    )
    zero = ours[inside.index(0.0)]
    return {
        "rank": float(spearman(np.asarray(inside), ours)),
        "up": float(ours[inside.index(0.1)] - zero),
        "down": float(ours[inside.index(-0.1)] - zero),
        "slope": float(slope.mean()),
        "moved": float(abs(ours[-1] - ours[0])),
        "random_moved": float(np.abs(others[:, -1] - others[:, 0]).max()),
    }


def families(
    key: jax.Array, subject: lab.Subject, seed: int, level: int, v: jax.Array, found: dict[str, Any], config: Config
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Hits without and with the chosen vector on the four families of IOI: both orders of names, short and long.

    A and B have half as many distractors as the level, AL and BL as many as the level.
    """
    outcome = {}
    for length, distractors in (("", level // 2), ("L", level)):
        items = tales_task("ioi", distractors)(stream(key, "family" + length), config.test, "test")
        alphas = np.asarray([0.0, found["choice"]["alpha"]])
        logits = repe.alpha_sweep(subject.model, subject.params[seed], items.texts, v, found["choice"]["layer"], alphas)
        hits = np.asarray(list_correct(candidate_scores(logits, items.answers), items.right))
        for family, order in (("A", 0), ("B", 1)):
            rows = np.asarray(items.right) == order
            outcome[family + length] = hits[0, rows], hits[1, rows]
    return outcome
