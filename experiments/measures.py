"""Metrics from what was measured: values per seed, percentages, paired differences, intervals; and their words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mechlab.analysis.intervals import bootstrap_mean, paired_bootstrap, wilson
from mechlab.reporting.results import Metric


def per_seed(values: Any, unit: str) -> Metric:
    """The mean of one value per seed, (S,), with every value kept and no interval."""
    values = np.asarray(values, float)
    return Metric(value=float(values.mean()), n=len(values), unit=unit, per_seed=tuple(values))


def percent(key: jax.Array, hits: np.ndarray) -> Metric:
    """Percent of hits (S, N) over S seeds and N items; the interval is a bootstrap over items."""
    mean, low, high = (100 * float(x) for x in bootstrap_mean(key, hits.mean(0)))
    return Metric(value=mean, ci95=(low, high), n=hits.shape[1], unit="%", per_seed=tuple(100 * hits.mean(1)))


def points(key: jax.Array, hits: np.ndarray, baseline: np.ndarray) -> Metric:
    """Percentage points by which hits (S, N) exceed the baseline's on the same items; a paired bootstrap over items."""
    mean, low, high = (100 * float(x) for x in paired_bootstrap(key, hits, baseline))
    per_seed = tuple(100 * (hits.mean(1) - baseline.mean(1)))
    return Metric(value=mean, ci95=(low, high), n=hits.shape[1], unit="points", per_seed=per_seed)


def rate(hits: np.ndarray) -> Metric:
    """Percent of hits (N,) of one model, with Wilson's interval."""
    value, low, high = (100 * float(x) for x in wilson(hits.sum(), hits.size))
    return Metric(value=value, ci95=(low, high), n=hits.size, unit="%")


def of_seeds(metric: Metric, form: str = ".2f") -> str:
    """Its value in every seed, or its only value."""
    return ", ".join(format(value, form) for value in metric.per_seed or (metric.value,))


def by_seed(metric: Metric) -> np.ndarray:
    """Its value in every seed, (S,)."""
    return np.asarray(metric.per_seed)


def every_seed(metric: Metric, wanted: Callable[[float], bool]) -> bool:
    """Whether every seed's value is as wanted."""
    return all(wanted(value) for value in metric.per_seed or (metric.value,))


def with_interval(metric: Metric, form: str = ".1f") -> str:
    """Its value, and its interval where it has one: "1.2 [0.3, 2.1]"."""
    shown = format(metric.value, form)
    return shown if metric.ci95 is None else f"{shown} [{format(metric.ci95[0], form)}, {format(metric.ci95[1], form)}]"


def lower_bound(metric: Metric) -> float:
    """Of its interval; its value where it has none."""
    return metric.value if metric.ci95 is None else metric.ci95[0]
