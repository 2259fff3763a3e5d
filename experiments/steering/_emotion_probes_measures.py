"""From what was measured to metrics: geometry, the peak over depth, sizes, stages of the corpus, persistence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measures import per_seed, percent, points
from experiments.steering._emotion_probes_lab import Persistence, Reading
from experiments.steering._emotion_probes_subjects import Subject, Tales
from mechlab.core.rng import stream
from mechlab.data.worlds.emotion_corpus import STAGES
from mechlab.methods.steering import emotion_probes as emo
from mechlab.reporting.results import Metric

LATER = 100
"""Tokens behind a text at which persistence is judged, or the last offset before."""


def standardised(subject: Subject, x: jax.Array) -> jax.Array:
    """(L + 1, M, D) features of tested texts, by the mean and deviation of fold 0's training texts."""
    seen = x[subject.folds.train[0]]
    return jnp.moveaxis(emo.standardise(x[subject.folds.test], seen.mean(0), seen.std(0)), 1, 0)


def geometry_of(subject: Subject, x: jax.Array) -> emo.Geometry:
    """Of tested texts at every depth."""
    return _geometry(standardised(subject, x), subject.labels[subject.folds.test], len(subject.names))


_geometry = jax.jit(emo.geometry, static_argnums=2)


def peak(key: jax.Array, hits: np.ndarray, resamples: int = 1000) -> Metric:
    """The relative depth (0 to 1) with the most hits (S, L + 1, M); the interval is a bootstrap over texts."""
    means = jnp.asarray(hits.mean(0), jnp.float32)
    drawn = jax.random.randint(key, (resamples, means.shape[1]), 0, means.shape[1])
    best = np.asarray(jax.lax.map(lambda rows: means[:, rows].mean(1).argmax(), drawn)) / (len(means) - 1)
    low, high = np.quantile(best, [0.025, 0.975])
    value = float(means.mean(1).argmax()) / (len(means) - 1)
    # Where depths are nearly equal the largest may lie outside of the quantiles of its draws.
    return Metric(value=value, ci95=(min(low, value), max(high, value)), n=means.shape[1], unit="of the layers")


def measure_scale(
    size: str, reading: Reading, shape: emo.Geometry, metrics: dict[str, Metric], scale: dict[str, Any]
) -> None:
    """Accuracy of every probe seed, and the geometry, at this size's depth."""
    metrics[f"scale/accuracy/{size}"] = per_seed(100 * reading.at_depth.mean(1), "%")
    for name in ("fisher", "silhouette"):
        value = float(getattr(shape, name)[reading.depth])
        metrics[f"scale/{name}/{size}"] = Metric(value=value)
        scale[name].append(value)
    metrics[f"scale/depth/{size}"] = Metric(value=reading.depth, unit="depth")
    scale["accuracy"].append(100 * reading.at_depth.mean(1))


def stages(reading: Reading, subject: Subject, corpus: Tales, metrics: dict[str, Metric]) -> None:
    """Accuracy on the texts of each stage of the corpus: what was found, rewritten and made up."""
    of_test = corpus.stages[subject.folds.test]
    for index, stage in enumerate(STAGES):
        metrics[f"stage/{stage}"] = per_seed(100 * reading.at_depth[:, of_test == index].mean(1), "%")


def report(key: jax.Array, name: str, found: Persistence, classes: int, metrics: dict[str, Metric]) -> None:
    """Curves at every offset, half-lives, and the comparison with shuffled pairs about 100 tokens later."""
    at = max(p for p, offset in enumerate(found.offsets) if offset <= LATER)
    metrics[f"{name}/offset"] = Metric(value=found.offsets[at], unit="tokens")
    kinds = {"early_probe": (found.early, found.shuffled)}
    if found.late is not None and found.late_shuffled is not None:
        kinds["late_probe"] = (found.late, found.late_shuffled)
    for kind, (hits, others) in kinds.items():
        metrics[f"{name}/{kind}"] = percent(stream(key, kind), hits[:, at])
        metrics[f"{name}/{kind}_over_shuffled"] = points(stream(key, kind, "over"), hits[:, at], others[:, at])
        for p, offset in enumerate(found.offsets):
            metrics[f"{name}/{kind}/{offset}"] = per_seed(100 * hits[:, p].mean(1), "%")
    half = emo.half_life(found.early.mean((0, 2)), found.offsets, classes)
    if np.isfinite(half):
        metrics[f"{name}/half_life"] = Metric(value=half, unit="tokens")
    if "late_probe" in kinds:
        metrics[f"{name}/over_shuffled"] = metrics[f"{name}/late_probe_over_shuffled"]
    if found.words is not None:
        metrics[f"{name}/words"] = percent(stream(key, "words"), found.words[None])
