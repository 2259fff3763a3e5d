"""The detectors of the TruthPrInt experiment: trained for all seeds at once, tested, and carried to other targets."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measures import per_seed
from experiments.steering._truthprint_lab import Lab
from experiments.steering._truthprint_measures import (
    Told,
    pair_rows,
    preceding_minimum,
    within_word,
    word_prior,
)
from mechlab.analysis.metrics import auroc, tpr_at_fpr
from mechlab.core.rng import stream
from mechlab.methods.steering import truthprint as tp
from mechlab.reporting.results import Metric

FPRS = (0.01, 0.05, 0.1)

RELATED = ("cross_data", "cross_lineage", "cross_both")
"""Targets for which the paper says that the detector transfers."""


@partial(jax.jit, static_argnames=("hidden", "epochs"))
def fit_lanes(
    keys: jax.Array, x: Any, y: Any, dev_x: Any, dev_y: Any, *, hidden: tuple[int, ...], epochs: int
) -> tp.Detector:
    """A detector of every seed, x (S, N, D)."""
    return jax.vmap(partial(tp.fit_detector, hidden=hidden, epochs=epochs))(keys, x, y, dev_x, dev_y)


def balanced_rows(key: jax.Array, told: Told) -> np.ndarray:
    """(S, M) mentions of every seed with as many of either class, in all seeds equally many."""
    false = told.mentions.false
    each = int(min(false.sum(1).min(), (~false).sum(1).min()))
    return np.stack([tp.balanced(stream(key, "balance", seed), labels, each) for seed, labels in enumerate(false)])


def taken(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows (S, M) of every seed's values (S, N, ...)."""
    return np.stack([one[mine] for one, mine in zip(values, rows, strict=True)])


def detect(
    key: jax.Array, lab: Lab, sets: dict[str, Told], metrics: dict[str, Metric]
) -> tuple[tp.Detector, dict[str, Any]]:
    """The detectors of all seeds (leaves lead with S) at the block that is read; every block; what else could tell."""
    config = lab.config
    train, dev, test = (sets[use].mentions for use in ("detect", "dev", "test"))
    rows = balanced_rows(key, sets["detect"])
    x, y = taken(train.states, rows), taken(train.false, rows)
    keys = jnp.stack([stream(key, "fit", seed) for seed in range(config.seeds)])
    every = [
        fit_lanes(
            keys,
            x[:, :, block],
            y,
            dev.states[:, :, block],
            dev.false,
            hidden=config.hidden,
            epochs=config.epochs,
        )
        for block in range(config.text_layers)
    ]
    logits = [np.asarray(_logits(one, test.states[:, :, block])) for block, one in enumerate(every)]
    scores = logits[lab.layer]
    prior = np.stack(
        [word_prior(*one)[words] for *one, words in zip(train.words, train.false, test.words, strict=True)]
    )
    areas, tprs = _quality(np.stack([*logits, -test.confidence, prior]), test.false)
    depth = np.asarray(areas[: config.text_layers]).T

    def note(name: str, values: Any, unit: str = "") -> None:
        metrics[name] = per_seed(values, unit)

    note("detector/auroc", depth[:, lab.layer])
    for fpr, values in zip(FPRS, tprs[lab.layer].T, strict=True):
        note(f"detector/tpr_{100 * fpr:g}", values)
    note("detector/auroc_confidence", areas[-2])
    note("detector/auroc_word", areas[-1])
    for block in range(config.text_layers):
        note(f"depth/{block + 1}", depth[:, block], "AUROC")
    inside = [within_word(*one) for one in zip(scores, test.false, test.words, strict=True)]
    if None not in inside:
        note("detector/auroc_within_word", inside)
    note("detector/hallucinated", 100 * train.false.mean(1), "% of first mentions")
    note("detector/training", [rows.shape[1]] * config.seeds, "mentions")
    least = preceding_minimum(sets["test"].captions, test)
    groups = {"hallucinated": test.false, "truthful": ~test.false}
    for name, chosen in groups.items():
        note(f"pmc/{name}", np.nanmean(np.where(chosen, least, np.nan), 1), "probability")
    kept = np.isfinite(least)
    pmc = {name: least[chosen & kept] for name, chosen in groups.items()}
    return every[lab.layer], {"scores": scores, "labels": test.false, "depth": depth, "pmc": pmc}


def carry_over(
    key: jax.Array,
    lab: Lab,
    sets: dict[str, Told],
    others: dict[str, Told],
    detectors: tp.Detector,
    metrics: dict[str, Metric],
    seen: dict[str, Any],
) -> None:
    """AUROC of a's detectors on other pictures and other captioners, with and without ComnHallu, and its rank."""
    config, block = lab.config, lab.layer
    train, dev = sets["detect"].mentions, sets["dev"].mentions
    rows = balanced_rows(key, sets["detect"])
    source, dev_x = train.states[:, :, block], dev.states[:, :, block]
    # As many mentions of every target: one program for all.
    size = min(other.mentions.false.shape[1] for other in others.values())
    states = {name: other.mentions.states[:, :size, block] for name, other in others.items()}
    false = {name: other.mentions.false[:, :size] for name, other in others.items()}
    whole = min(source.shape[1] - 1, size - 1, config.width)
    maps = {
        name: [jax.tree.map(np.asarray, _align(*pair, whole)) for pair in zip(source, x, strict=True)]
        for name, x in states.items()
    }
    own = maps["cross_data"]
    best = tp.choose_k(own[0].source_variance)
    keys = jnp.stack([stream(key, "fit", seed) for seed in range(config.seeds)])
    scores = {("plain", name): _logits(detectors, x) for name, x in states.items()}
    for k in (best, *config.ks):

        def coordinates(way: str, of: list[tp.Alignment], x: np.ndarray, k: int = k) -> np.ndarray:
            """(S, n, D), zeros behind the k coordinates: detectors of all ranks are trained by one program."""
            z = np.stack([getattr(one.leading(k), way)(mine) for one, mine in zip(of, x, strict=True)])
            return np.pad(z, ((0, 0), (0, 0), (0, config.width - k))).astype(np.float32)

        fitted = fit_lanes(
            keys,
            taken(coordinates("source", own, source), rows),
            taken(train.false, rows),
            coordinates("source", own, dev_x),
            dev.false,
            hidden=config.hidden,
            epochs=config.epochs,
        )
        way = "aligned" if k == best else f"k_{k}"
        scores |= {(way, name): _logits(fitted, coordinates("target", maps[name], x)) for name, x in states.items()}
    areas = {cell: np.asarray(_areas(values, false[cell[1]])) for cell, values in scores.items()}
    metrics |= {f"transfer/{way}/{name}": per_seed(area, "AUROC") for (way, name), area in areas.items()}
    metrics["transfer/k"] = Metric(value=best, unit="directions")

    # The interval draws mentions again, in every target and seed apart, the same for both ways.
    def gain(values: dict[tuple[str, str], np.ndarray]) -> np.ndarray:
        return np.mean([values["aligned", name] - values["plain", name] for name in RELATED], 0)

    draws = {
        (way, name): np.stack(
            [
                _drawn_areas(stream(key, "bootstrap", name, seed), np.asarray(scores[way, name][seed]), labels)
                for seed, labels in enumerate(false[name])
            ]
        )
        for way in ("aligned", "plain")
        for name in RELATED
    }
    low, high = np.quantile(gain(draws).mean(0), [0.025, 0.975])
    gains = gain(areas)
    metrics["transfer/gain"] = Metric(value=gains.mean(), ci95=(low, high), n=size, unit="AUROC", per_seed=tuple(gains))
    x, labels = states["cross_lineage"][0], false["cross_lineage"][0]
    shown = maps["cross_lineage"][0].leading(best)
    seen["spaces"] = pair_rows(shown, source[0], train.false[0], x, labels)


_logits = jax.jit(jax.vmap(tp.detector_logit))
_areas = jax.jit(jax.vmap(auroc))
_align = jax.jit(tp.comnhallu, static_argnums=2)


@jax.jit
def _quality(scores: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """AUROC (K, S) and TPR at every FPR (K, S, F) of K scores (K, S, n), labels (S, n)."""

    def one(scores: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        return auroc(scores, labels), jnp.stack([tpr_at_fpr(scores, labels, fpr) for fpr in FPRS])

    return jax.vmap(jax.vmap(one), in_axes=(0, None))(scores, labels)


def _drawn_areas(key: jax.Array, scores: np.ndarray, labels: np.ndarray, resamples: int = 500) -> np.ndarray:
    """(R,) AUROC of mentions drawn again within each class. NumPy: every number of mentions would be a program."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    high, low = scores[labels], scores[~labels]
    wins = (high[:, None] > low) + 0.5 * (high[:, None] == low)
    times = [rng.multinomial(len(side), np.full(len(side), 1 / len(side)), resamples) for side in (high, low)]
    return ((times[0] @ wins) * times[1]).sum(1) / wins.size
