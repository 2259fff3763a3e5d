"""The metrics of one task from what was measured in every seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.measures import per_seed, percent, points
from experiments.steering._repe_reasoning_lab import TYPES
from mechlab.analysis.intervals import paired_bootstrap
from mechlab.analysis.metrics import spearman
from mechlab.core.rng import stream
from mechlab.reporting.results import Metric


def summarise(key: jax.Array, name: str, runs: list[dict[str, Any]], alphas: Sequence[float]) -> dict[str, Metric]:
    """The metrics of one task from what its seeds measured."""
    metrics: dict[str, Metric] = {}
    arms = [arm for arm in runs[0]["hits"] if all(arm in one["hits"] for one in runs)]

    def stacked(what: str, arm: str) -> np.ndarray:
        return np.stack([one[what][arm] for one in runs])

    zero = stacked("hits", "zero")
    for arm in arms:
        hits = stacked("hits", arm)
        metrics[f"accuracy/{name}/{arm}"] = percent(stream(key, arm, "accuracy"), hits)
        if arm == "zero":
            continue
        metrics[f"gain/{name}/{arm}"] = points(stream(key, arm, "gain"), hits, zero)
        if all(arm in one["margins"] for one in runs):
            metrics[f"margin_gain/{name}/{arm}"] = _difference(
                stream(key, arm, "margin"), stacked("margins", arm), stacked("margins", "zero"), "nats"
            )
    metrics[f"mass_gain/{name}/chosen"] = _difference(
        stream(key, "mass"), stacked("masses", "chosen"), stacked("masses", "zero"), "probability"
    )
    for arm in ("zero", "chosen"):
        metrics[f"mass/{name}/{arm}"] = per_seed(stacked("masses", arm).mean(1), "probability")
    for arm in runs[0]["auroc"]:
        metrics[f"auroc/{name}/{arm}"] = per_seed([one["auroc"][arm] for one in runs], "AUROC")
    chosen = stacked("hits", "chosen").mean(1)
    best = np.asarray([one["random_hits"].max() for one in runs])
    metrics[f"over_random/{name}"] = per_seed(100 * (chosen - best), "points")
    margin = stacked("margins", "chosen").mean(1) - [one["random_margins"].max() for one in runs]
    metrics[f"margin_over_random/{name}"] = per_seed(margin, "nats")
    if "incorrect" in arms:
        metrics[f"correct_over_incorrect/{name}"] = points(
            stream(key, "incorrect"), stacked("hits", "contrast"), stacked("hits", "incorrect")
        )
    if all(one["control"] for one in runs):
        for part in runs[0]["control"]:
            unit = "" if part == "rank" else "nats"
            metrics[f"control/{name}/{part}"] = per_seed([one["control"][part] for one in runs], unit)
    kl = np.stack([one["curves"]["kl"] for one in runs])
    strengths = np.asarray(alphas)
    metrics[f"kl_zero/{name}"] = per_seed(np.abs(kl[:, strengths == 0]).max(1), "nats")
    # Alphas of both signs tie, which bounds the rank correlation: below 0.95 for fewer than seven alphas.
    if len(strengths) >= 7:
        metrics[f"kl_rank/{name}"] = Metric(value=float(spearman(np.abs(strengths), kl.mean(0))), n=len(runs))
    for part in ("alpha", "layer"):
        metrics[f"choice/{name}/{part}"] = per_seed([one["choice"][part] for one in runs], "")
    metrics[f"choice/{name}/type"] = per_seed(
        [TYPES.index(one["choice"]["type"]) for one in runs], "0 R, 1 R-C, 2 PCA-C"
    )
    metrics[f"cosine/{name}"] = per_seed([one["cosine"].mean() for one in runs], "")
    for family in runs[0].get("families", {}):
        before, after = (np.concatenate([one["families"][family][i] for one in runs]) for i in (0, 1))
        metrics[f"family/{family}"] = points(stream(key, family), after[None], before[None])
        metrics[f"family_zero/{family}"] = percent(stream(key, family, "zero"), before[None])
    return metrics


def _difference(key: jax.Array, a: np.ndarray, b: np.ndarray, unit: str) -> Metric:
    mean, low, high = map(float, paired_bootstrap(key, a, b))
    return Metric(value=mean, ci95=(low, high), n=a.shape[1], unit=unit, per_seed=tuple((a - b).mean(1)))
