"""What one task's seeds measured, and the metrics made of it. Intervals are paired bootstraps over test items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measures import per_seed, percent, points
from experiments.steering._austeer_lab import TUNED
from mechlab.analysis.intervals import resampled_auroc
from mechlab.core.rng import stream
from mechlab.reporting.results import Metric

RIVALS = ("caa", "iti", "sadi")


class Outcome(NamedTuple):
    """One task: S seeds, A arms, N test items.

    Attributes:
      arms: names of the A arms; "none" first, "random 0" and so on last.
      margins: (S, A, N) logit of candidate 1 minus that of candidate 2.
      areas: (S, A) their AUROC.
      hits: (S, A, N) whether the right one is larger.
      first: (S, N) whether the right one is candidate 1.
      corrected: (S, N) hits of the unsteered and every tuned arm by name, after a constant of its own, tuned on dev.
      choices: the settings of each tuned method, (S,) each.
      ties: (S,) units that share the score of the last chosen one.
      dev_auroc, dev_hits: (S, sites, k, alpha) of AUSteer's grid.
      ranks: (S,) chosen units as a list of (layer, place in the order) by seed.
    """

    arms: list[str]
    margins: np.ndarray
    areas: np.ndarray
    hits: np.ndarray
    first: np.ndarray
    corrected: dict[str, np.ndarray]
    choices: dict[str, dict[str, np.ndarray]]
    ties: np.ndarray
    dev_auroc: np.ndarray
    dev_hits: np.ndarray
    ranks: list[np.ndarray]


def summarise(key: jax.Array, task: str, found: Outcome) -> dict[str, Metric]:
    """All metrics of one task."""
    metrics: dict[str, Metric] = {}
    place = {arm: i for i, arm in enumerate(found.arms)}
    seeds, items = found.first.shape
    areas = found.areas
    draws = np.mean(
        [resampled_auroc(stream(key, "auroc", seed), found.margins[seed], found.first[seed]) for seed in range(seeds)],
        axis=0,
    )

    def area(values: np.ndarray, drawn: np.ndarray) -> Metric:
        low, high = np.quantile(drawn, (0.025, 0.975))
        return Metric(value=values.mean(), ci95=(low, high), n=items, unit="AUROC", per_seed=tuple(values))

    shown = [arm for arm in found.arms if not arm.startswith("random")]
    randoms = [i for arm, i in place.items() if arm.startswith("random")]
    none, ours = place["none"], place["austeer"]
    for arm in shown:
        i = place[arm]
        metrics[f"accuracy/{task}/{arm}"] = percent(stream(key, arm, "accuracy"), found.hits[:, i])
        metrics[f"auroc/{task}/{arm}"] = area(areas[:, i], draws[i])
        if arm != "none":
            metrics[f"gain/{task}/{arm}"] = points(stream(key, arm, "gain"), found.hits[:, i], found.hits[:, none])
            metrics[f"auroc_gain/{task}/{arm}"] = area(areas[:, i] - areas[:, none], draws[i] - draws[none])
    metrics[f"accuracy/{task}/offset"] = percent(stream(key, "offset"), found.corrected["none"])
    metrics[f"over_offset/{task}"] = points(stream(key, "over offset"), found.hits[:, ours], found.corrected["none"])
    for arm, hits in found.corrected.items():
        metrics[f"corrected/{task}/{arm}"] = percent(stream(key, arm, "corrected"), hits)
    middle, drawn = np.median(areas[:, randoms], 1), np.median(draws[randoms], 0)
    metrics[f"auroc/{task}/random"] = per_seed(middle, "AUROC")
    metrics[f"random_low/{task}"] = per_seed(areas[:, randoms].min(1), "AUROC")
    metrics[f"random_high/{task}"] = per_seed(areas[:, randoms].max(1), "AUROC")
    metrics[f"accuracy/{task}/random"] = per_seed(100 * np.median(found.hits[:, randoms].mean(-1), 1), "%")
    metrics[f"over_random/{task}"] = area(areas[:, ours] - middle, draws[ours] - drawn)
    for rival in RIVALS:
        i = place[rival]
        metrics[f"versus/{task}/{rival}"] = points(stream(key, rival, "versus"), found.hits[:, ours], found.hits[:, i])
        metrics[f"auroc_versus/{task}/{rival}"] = area(areas[:, ours] - areas[:, i], draws[ours] - draws[i])
    for method in TUNED:
        for setting, values in found.choices[method].items():
            unit = "0 attn, 1 ffn" if setting == "site" else ""
            metrics[f"choice/{task}/{method}/{setting}"] = per_seed(values, unit)
    metrics[f"ties/{task}"] = per_seed(found.ties, "units")
    return metrics


def pooled(key: jax.Array, outcomes: Mapping[str, Outcome], resamples: int = 2000) -> dict[str, Metric]:
    """AUSteer's accuracy minus that of CAA, ITI and SADI, mean over tasks; items of each task are drawn again."""
    metrics = {}
    for rival in RIVALS:
        means, draws = [], []
        for task, found in outcomes.items():
            difference = (
                found.hits[:, found.arms.index("austeer")].astype(float) - found.hits[:, found.arms.index(rival)]
            )
            of_items = jnp.asarray(difference.mean(0))
            rows = jax.random.randint(stream(key, rival, task), (resamples, len(of_items)), 0, len(of_items))
            means.append(100 * float(of_items.mean()))
            draws.append(100 * np.asarray(of_items[rows].mean(1)))
        low, high = np.quantile(np.mean(draws, 0), (0.025, 0.975))
        metrics[f"versus/all/{rival}"] = Metric(
            value=float(np.mean(means)), ci95=(low, high), n=len(means), unit="points", per_seed=tuple(means)
        )
    return metrics
