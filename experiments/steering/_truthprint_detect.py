"""The detectors of the TruthPrInt experiment: trained for all seeds at once, tested, and carried to other targets."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

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
from mechlab.analysis.intervals import resampled_auroc
from mechlab.analysis.metrics import auroc, tpr_at_fpr
from mechlab.core.rng import stream
from mechlab.methods.steering import truthprint as tp
from mechlab.reporting.results import Metric

if TYPE_CHECKING:
    from experiments.steering.truthprint import Config

RELATED = ("cross_data", "cross_lineage", "cross_both")
"""Targets for which the paper says that the detector transfers."""


def fit_lanes(key: jax.Array, x: Any, y: Any, dev_x: Any, dev_y: Any, config: Config) -> tp.Detector:
    """A detector of every seed, in one program: x (S, N, D); or after every block too, x (S, N, L, D)."""
    keys = jax.vmap(lambda seed: stream(key, seed))(jnp.arange(len(x)))

    def fit(key: jax.Array, x: jax.Array, y: jax.Array, dev_x: jax.Array, dev_y: jax.Array) -> tp.Detector:
        return tp.fit_detector(key, x, y, dev_x, dev_y, hidden=config.hidden, epochs=config.epochs)

    every = jax.vmap(fit, in_axes=(None, 1, None, 1, None)) if np.ndim(x) == 4 else fit
    return jax.vmap(every)(keys, *map(jnp.asarray, (x, y, dev_x, dev_y)))


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
    every = fit_lanes(stream(key, "fit"), x, y, dev.states, dev.false, config)
    logits = np.asarray(jax.vmap(jax.vmap(tp.detector_logit, in_axes=(0, 1)))(every, jnp.asarray(test.states)))
    scores = logits[:, lab.layer]
    area = jax.vmap(auroc)

    def note(name: str, values: Any, unit: str = "") -> None:
        metrics[name] = per_seed(values, unit)

    note("detector/auroc", area(scores, test.false))
    for fpr in (1, 5, 10):
        note(f"detector/tpr_{fpr}", jax.vmap(partial(tpr_at_fpr, fpr=fpr / 100))(scores, test.false))
    prior = np.stack(
        [word_prior(*one)[words] for *one, words in zip(train.words, train.false, test.words, strict=True)]
    )
    note("detector/auroc_confidence", area(-test.confidence, test.false))
    note("detector/auroc_word", area(prior, test.false))
    depth = np.asarray(jax.vmap(area, in_axes=(1, None), out_axes=1)(logits, test.false))
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
    here = jax.tree.map(lambda leaf: leaf[:, lab.layer], every)
    return here, {"scores": scores, "labels": test.false, "depth": depth, "pmc": pmc}


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
    targets = {n: (o.mentions.states[:, :size, block], o.mentions.false[:, :size]) for n, o in others.items()}
    plain = {
        name: np.asarray(jax.vmap(tp.detector_logit)(detectors, jnp.asarray(x))) for name, (x, _) in targets.items()
    }
    scores = {"plain": plain}
    best = tp.choose_k(source[0])
    for k in (best, *config.ks):
        maps = [tp.comnhallu(x, x, k) for x in source]
        z = np.stack([np.asarray(one.source(jnp.asarray(x))) for one, x in zip(maps, source, strict=True)])
        dev_z = np.stack([np.asarray(one.source(jnp.asarray(x))) for one, x in zip(maps, dev_x, strict=True)])
        fitted = fit_lanes(
            stream(key, "aligned", k), taken(z, rows), taken(train.false, rows), dev_z, dev.false, config
        )
        scores["aligned" if k == best else f"k_{k}"] = {
            name: np.stack(
                [
                    _aligned(jax.tree.map(lambda leaf, s=s: leaf[s], fitted), source[s], x[s], k)
                    for s in range(config.seeds)
                ]
            )
            for name, (x, _) in targets.items()
        }
    areas = {
        (way, name): np.asarray(jax.vmap(auroc)(values, targets[name][1]))
        for way, of_targets in scores.items()
        for name, values in of_targets.items()
    }
    metrics |= {f"transfer/{way}/{name}": per_seed(area, "AUROC") for (way, name), area in areas.items()}
    metrics["transfer/k"] = Metric(value=best, unit="directions")
    # Mentions drawn again, in every pair and seed apart; both ways see the same draw.
    draws = [
        resampled_auroc(
            stream(key, "bootstrap", name, s),
            np.stack([scores[way][name][s] for way in ("aligned", "plain")]),
            targets[name][1][s],
            resamples=500,
        )
        for name in RELATED
        for s in range(config.seeds)
    ]
    low, high = np.quantile(np.mean([one[0] - one[1] for one in draws], 0), [0.025, 0.975])
    gains = np.mean([areas["aligned", name] - areas["plain", name] for name in RELATED], 0)
    metrics["transfer/gain"] = Metric(
        value=gains.mean(), ci95=(low, high), n=len(draws), unit="AUROC", per_seed=tuple(gains)
    )
    x, y = targets["cross_lineage"][0][0], targets["cross_lineage"][1][0]
    seen["spaces"] = pair_rows(tp.comnhallu(source[0], x, best), source[0], train.false[0], x, y)


@partial(jax.jit, static_argnames="k")
def _aligned(detector: tp.Detector, x_s: jax.Array, x_t: jax.Array, k: int) -> jax.Array:
    """Logits of target states by a detector of aligned ones."""
    return tp.detector_logit(detector, tp.comnhallu(x_s, x_t, k).target(x_t))
