"""Reasoning by representation engineering (arXiv 2504.19483): does the mean state of right answers, added back, help?

    python -m experiments run repe_reasoning
    python -m experiments run repe_reasoning --preset smoke   # one task, seconds

Vectors of three types are read from texts that end in the right answer, and added in one layer at strength alpha.
Type, layer and alpha (never 0) are chosen on dev items; names and things of train, dev and test are disjoint. Beside
the chosen vector stand: no vector; constant offsets of the answers tuned on dev; random vectors of the same length,
each with its own dev choice of layer and alpha; vectors of shuffled pairs, of wrongly answered items, of text that asks
nothing, of another task; and one solved example in the prompt. The level of difficulty is set on dev before any vector
is read.

The paper's gains are on Pythia and Mistral and are not quoted. Ours are on docs/papers/repe_reasoning.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.steering import _repe_reasoning_figures as draw
from experiments.steering import _repe_reasoning_lab as lab
from experiments.steering._repe_reasoning_claims import CLAIMS
from experiments.steering._repe_reasoning_measures import summarise
from mechlab.analysis.margins import candidate_scores, list_correct, log_odds, tune_offsets
from mechlab.analysis.metrics import auroc, spearman
from mechlab.core.rng import stream
from mechlab.methods.steering import repe_reasoning as repe
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "run"]

ALL_TASKS = (*lab.TALES, "deduce", "arith", *lab.STORIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      tasks: ioi, recall, mood on a model of tales; deduce, arith on decoders trained here; stories_mood, stories_recall
        on stories260K.
      seeds: decoders, each with its own texts and items.
      tales_seeds: draws of texts and items for the models that are not trained here.
      tales: size of the model of tales.
      tales_layers: where it is steered; empty for all layers.
      layers, width, steps, batch, rate: of the decoders and of Adam.
      hops: of deduction; 2 puts the rules into the text.
      facts, people: levels of difficulty of deduce and arith.
      texts: N, from which a vector is read.
      dev, test: numbers of items.
      alphas: the grid; contains 0.
      randoms: random vectors of the length of the chosen type.
      extras: also the families of IOI, few-shot prompts, and the slope at alpha = 0.
    """

    tasks: tuple[str, ...] = ALL_TASKS
    seeds: int = 3
    tales_seeds: int = 1
    tales: Literal["S", "M", "L"] = "L"
    tales_layers: tuple[int, ...] = (3,)
    layers: int = 3
    width: int = 64
    steps: int = 500
    batch: int = 64
    rate: float = 3e-3
    hops: int = 1
    facts: tuple[int, ...] = (3, 4, 5, 6)
    people: tuple[int, ...] = (1, 2)
    texts: int = 200
    dev: int = 40
    test: int = 80
    alphas: tuple[float, ...] = (-1.0, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0)
    randoms: int = 10
    extras: bool = True

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in ALL_TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks: unknown {unknown}; known: {', '.join(ALL_TASKS)}")
        if 0.0 not in self.alphas or len(set(self.alphas)) < 2 or not np.isfinite(self.alphas).all():
            raise ValueError(f"alphas: wanted finite numbers with 0 and another one among them, got {self.alphas}")
        if tuple(sorted(self.alphas)) != self.alphas:
            raise ValueError(f"alphas: wanted rising numbers, got {self.alphas}")
        if (
            min(self.seeds, self.tales_seeds, self.steps, self.batch, self.randoms) < 1
            or min(self.texts, self.dev, self.test) < 2
        ):
            raise ValueError("seeds, steps, batch and randoms must be at least 1; texts, dev and test at least 2")
        if self.width % 16:
            raise ValueError(f"width: wanted a multiple of 16, the width of a head, got {self.width}")


_FINE = tuple(round(-1 + 0.05 * i, 2) for i in range(41))

PRESETS: dict[str, Config] = {
    "smoke": Config(
        tasks=("deduce",),
        seeds=1,
        layers=2,
        width=48,
        steps=150,
        facts=(2,),
        texts=64,
        dev=32,
        test=64,
        alphas=(-1.0, 0.0, 1.0),
        randoms=2,
        extras=False,
    ),
    "cpu": Config(),
    "accel": Config(
        seeds=5,
        tales_seeds=5,
        tales_layers=(),
        layers=8,
        width=256,
        steps=4000,
        rate=1e-3,
        hops=2,
        facts=(3, 4, 5, 6, 7, 8),
        people=(1, 2, 3, 4),
        dev=150,
        test=500,
        alphas=_FINE,
    ),
    # The paper's grid and more items on our subjects; its own models, Pythia and Mistral, are not wired up.
    "paper": Config(
        tales_layers=(),
        seeds=5,
        tales_seeds=5,
        steps=4000,
        facts=(3, 4, 5, 6, 7, 8),
        people=(1, 2, 3, 4),
        dev=150,
        test=500,
        alphas=_FINE,
    ),
}


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """The whole experiment: subjects, levels, vectors, grids, what is chosen, claims and figures."""
    metrics: dict[str, Metric] = {}
    curves: dict[str, dict[str, Any]] = {}
    boot = stream(key, "bootstrap")
    for subject in lab.make_subjects(key, config, log).values():
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
                    keys[name], subject, seed, task, levels[name], config.texts, 0 if name == "ioi" else None
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
            curves[name] = {"runs": of_seeds, "layers": subject.layers}
    figures = draw.all_figures(config.alphas, curves)
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
    """Grid, dev choices and test outcomes of one task and seed: hits, margins, masses (N,) by arm, and curves (A,)."""
    task = subject.tasks[name]
    grid = lab.measure(key, subject, seed, task, level, vectors, config)
    alphas = np.asarray(config.alphas)
    zero, moved = int((alphas == 0).argmax()), np.flatnonzero(alphas != 0)
    dev_hits, dev_margins = lab.scores(grid.dev_logits, grid.dev)
    hits, margins = lab.scores(grid.test_logits, grid.test)
    cells = best_cells(grid, dev_hits, dev_margins, moved)
    chosen = max(lab.TYPES, key=lambda arm: worth(dev_hits, dev_margins)[cells[arm]])
    cells |= {"zero": (0, 0, zero), "chosen": cells[chosen]}
    randoms = lab.random_like(stream(key, "random"), vectors[chosen], config.randoms)
    random_grid = lab.measure(key, subject, seed, task, level, randoms, config)
    random_hits, random_margins = lab.scores(random_grid.test_logits, grid.test)
    random_cells = best_cells(random_grid, *lab.scores(random_grid.dev_logits, grid.dev), moved)

    found: dict[str, Any] = {
        "hits": {arm: hits[at] for arm, at in cells.items()},
        "margins": {arm: margins[at] for arm, at in cells.items()},
        "choice": {
            "type": chosen,
            "layer": subject.layers[cells["chosen"][1]],
            "alpha": float(alphas[cells["chosen"][2]]),
        },
        "random_margins": np.asarray([random_margins[at].mean() for at in random_cells.values()]),
        "random_hits": np.asarray([random_hits[at].mean() for at in random_cells.values()]),
    }
    listed = [candidate_scores(jnp.asarray(x[0, 0, zero]), i.answers) for x, i in
              ((grid.dev_logits, grid.dev), (grid.test_logits, grid.test))]  # fmt: skip
    offsets = tune_offsets(listed[0], grid.dev.right)
    found["hits"]["offset"] = np.asarray(list_correct(listed[1], grid.test.right, offsets))
    found["margins"]["offset"] = np.asarray(log_odds(listed[1] + offsets, grid.test.right))
    at = cells["chosen"]
    logits = jnp.asarray(grid.test_logits[at[0], at[1]])
    correct, wrong = repe.answer_mass(logits, grid.test.answers, grid.test.gold)
    found["masses"] = {"zero": np.asarray(correct[zero]), "chosen": np.asarray(correct[at[2]])}
    kl = np.asarray(repe.kl_divergence(logits[zero], logits))
    found["curves"] = {
        "accuracy": hits[at[0], at[1]].mean(-1),
        "random": random_hits[:, at[1]].mean(-1),
        "margin": margins[at[0], at[1]].mean(-1),
        "kl": kl.mean(-1),
        "kl_sd": kl.std(-1),
        "entropy": np.asarray(repe.entropy_bits(logits)).mean(-1),
        "correct": np.asarray(correct).mean(-1),
        "incorrect": np.asarray(wrong).mean(-1),
        "dev": dev_hits[at[0]].mean(-1),
    }
    if len(np.unique(grid.test.right)) == 2:
        pair = [candidate_scores(logits[i], grid.test.answers)[:, :2] for i in (zero, at[2])]
        first = np.asarray(grid.test.right) == 0
        found["auroc"] = {
            n: float(auroc(x[:, 0] - x[:, 1], first)) for n, x in zip(("zero", "chosen"), pair, strict=True)
        }
    found["control"] = control(grid, subject, seed, chosen, vectors, dev_margins, margins, random_margins, config)
    if config.extras:
        found["hits"]["few_shot"] = lab.ask_with_example(stream(key, "examples"), subject, seed, task, level, grid.test)
        if name == "ioi":
            found["families"] = families(stream(key, "families"), subject, seed, level, vectors[chosen], found, config)
    v = vectors[chosen]
    row = int(np.flatnonzero(found["hits"]["chosen"] != found["hits"]["zero"])[:1].sum())
    prompt, before, after = lab.continuation(
        subject, seed, grid.test, row, v, found["choice"]["layer"], found["choice"]["alpha"]
    )
    log.say(f"{name}, seed {seed}: {found['choice']}\n  {prompt}\n  alpha 0: {before}\n  steered: {after}")
    return found


def worth(hits: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """What a cell is chosen by, (..., N) to (...): accuracy; the mean margin decides between equal ones."""
    return hits.mean(-1) + 1e-3 * np.tanh(margins.mean(-1))


def best_cells(
    grid: lab.Grid, hits: np.ndarray, margins: np.ndarray, moved: np.ndarray
) -> dict[str, tuple[int, int, int]]:
    """The best (vector, layer, alpha) of every vector on dev, alpha among the places ``moved``."""
    cells = {}
    for s, of_vector in enumerate(worth(hits, margins)[..., moved]):
        k, a = np.unravel_index(of_vector.argmax(), of_vector.shape)
        cells[grid.names[s]] = s, int(k), int(moved[a])
    return cells


def control(
    grid: lab.Grid,
    subject: lab.Subject,
    seed: int,
    chosen: str,
    vectors: dict[str, jax.Array],
    dev_margins: np.ndarray,
    margins: np.ndarray,
    random_margins: np.ndarray,
    config: Config,
) -> dict[str, float] | None:
    """How the margin follows alpha in [-0.5, 0.5], for the type and layer that move it most on dev.

    None where the grid of alphas is too coarse. The random vectors have the length of the type that was chosen: R's, or
    that of R-C and PCA-C, which are equally long; so only types of this length are looked at.
    """
    alphas = np.asarray(config.alphas)
    places = {round(float(alpha), 3): i for i, alpha in enumerate(alphas)}
    if not config.extras or not {-0.5, -0.1, 0.0, 0.1, 0.5} <= set(places):
        return None
    low, high = places[-0.5], places[0.5]
    types = [grid.names.index(kind) for kind in lab.TYPES if (kind == "reading") == (chosen == "reading")]
    moves = dev_margins[types].mean(-1)
    s, k = np.unravel_index(np.abs(moves[..., high] - moves[..., low]).argmax(), moves.shape[:2])
    s = types[s]
    means = margins.mean(-1)
    curve = means[s, k]
    randoms = random_margins.mean(-1)[:, k]
    _, slope = repe.margin_slopes(
        subject.model,
        subject.params[seed],
        vectors[grid.names[s]][None],
        np.asarray([subject.layers[k]]),
        grid.test.texts,
        grid.test.answers,
        grid.test.right,
    )
    inside = slice(low, high + 1)
    return {
        "rank": float(spearman(alphas[inside], curve[inside])),
        "up": float(curve[places[0.1]] - curve[places[0.0]]),
        "down": float(curve[places[-0.1]] - curve[places[0.0]]),
        "slope": float(slope.mean()),
        "moved": float(abs(curve[high] - curve[low])),
        "random_moved": float(np.abs(randoms[:, high] - randoms[:, low]).max()),
    }


def families(
    key: jax.Array, subject: lab.Subject, seed: int, level: int, v: jax.Array, found: dict[str, Any], config: Config
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Hits without and with the chosen vector on the four families of IOI: both orders of names, short and long.

    A and B have half as many distractors as the level, AL and BL as many as the level.
    """
    outcome = {}
    for length, distractors in (("", level // 2), ("L", level)):
        items = subject.tasks["ioi"].draw(stream(key, "family" + length), config.test, "test", distractors)
        alphas = np.asarray([0.0, found["choice"]["alpha"]])
        logits = repe.alpha_sweep(subject.model, subject.params[seed], items.texts, v, found["choice"]["layer"], alphas)
        hits = lab.scores(logits, items)[0]
        for family, order in (("A", 0), ("B", 1)):
            rows = np.asarray(items.right) == order
            outcome[family + length] = hits[0, rows], hits[1, rows]
    return outcome
