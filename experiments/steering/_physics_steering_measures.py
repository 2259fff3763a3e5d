"""From roll-outs to numbers: read-outs over states, what two signs do to them, and who is closer to another speed.

A read-out belongs to one family of states. E_v, enstrophy and roughness are of very different size from state to state,
so that their mean is geometric; D_eff and c_eff have an ordinary mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.measures import per_seed
from experiments.steering import _physics_steering_lab as lab
from experiments.steering import _physics_steering_worlds as worlds
from mechlab.analysis.intervals import bootstrap_mean
from mechlab.analysis.metrics import spearman
from mechlab.methods.steering import physics_steering as ps
from mechlab.reporting.results import Metric

FAMILY = {
    "ev": "shear",
    "enstrophy": "shear",
    "rough": "shear",
    "c_eff": "advect",
    "d_eff": "advect",
    "rough_V": "gray_scott",
}
POSITIVE = ("ev", "enstrophy", "rough", "rough_V")
WEAK, STRONG = 0.1, 0.2
UNITS = {"ratio": "times", "low": "times", "high": "times", "rank": "rank correlation", "slope": "relative, per alpha"}


class Outcomes:
    """Read-outs of one surrogate, averaged over the states of their family."""

    def __init__(self, outcome: lab.Outcome, family: np.ndarray) -> None:
        self.outcome, self.family = outcome, family

    @property
    def names(self) -> list[str]:
        """All that was tried but "none"."""
        return [name for name in self.outcome if name != "none"]

    def alphas(self, name: str) -> list[float]:
        """The strengths that a direction was tried at, and 0."""
        return sorted({0.0, *self.outcome[name]})

    def mean(self, name: str, alpha: float, what: str) -> np.ndarray:
        """(draws,) a read-out over states."""
        cell = self.outcome["none"][0.0] if alpha == 0 else self.outcome[name][alpha]
        values = cell[what][:, self.family == FAMILY[what]].astype(float)
        return np.exp(np.log(values).mean(1)) if what in POSITIVE else values.mean(1)

    def curve(self, name: str, what: str) -> np.ndarray:
        """(draws, A) over ``alphas(name)``."""
        draws = len(next(iter(self.outcome[name].values()))[what])
        columns = [np.broadcast_to(self.mean(name, alpha, what), draws) for alpha in self.alphas(name)]
        return np.stack(columns, 1)

    def readouts(self) -> list[str]:
        """Those that there are states for."""
        present = self.outcome["none"][0.0]
        return [what for what, family in FAMILY.items() if family in self.family and what in present]


def summarise(seen: Outcomes) -> dict[str, np.ndarray]:
    """Every number of the claims that comes from steering, (draws,), by the names of ``_physics_steering_claims``."""
    found: dict[str, np.ndarray] = {}
    for name in seen.names:
        tried = seen.outcome[name]
        control = any(mark in name for mark in ("@shuffled", "@pad", "@interpol", "@layer", "@output"))
        for what in seen.readouts():
            if control and what not in ("ev", "c_eff"):
                continue
            zero = seen.mean(name, 0.0, what)
            if {STRONG, -STRONG} <= set(tried):
                up, down = (seen.mean(name, sign * STRONG, what) for sign in (1, -1))
                if what in POSITIVE:
                    found[f"{what}/ratio/{name}"] = up / down
                    if what == "ev":
                        found[f"ev/low/{name}"], found[f"ev/high/{name}"] = down / zero, up / zero
                    found[f"{what}/slope/{name}"] = np.log(up / down) / (2 * STRONG)
                else:
                    label = "speed" if what == "c_eff" else "diffusivity"
                    found[f"{label}/change/{name}"] = up - down
                    found[f"{what}/slope/{name}"] = (up - down) / (2 * STRONG * zero)
            if {2 * STRONG, -2 * STRONG} <= set(tried):
                inside = [i for i, alpha in enumerate(seen.alphas(name)) if abs(alpha) <= 2 * STRONG]
                alphas = np.asarray(seen.alphas(name))[inside]
                ranks = [float(spearman(alphas, curve[inside])) for curve in seen.curve(name, what)]
                found[f"{what}/rank/{name}"] = np.asarray(ranks)
            if {WEAK, -WEAK} <= set(tried):
                found[f"odd/{name} on {what}"] = oddness(*(seen.mean(name, a, what) for a in (WEAK, -WEAK, 0.0)))
    for old, new in (("d_eff/rank", "rank"), ("diffusivity/change", "change")):
        if f"{old}/advect_diffusion@alone" in found:
            found[f"diffusion/{new}"] = found[f"{old}/advect_diffusion@alone"]
    return found


def oddness(up: np.ndarray, down: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """|m(a) - m(-a)| - |m(a) + m(-a) - 2 m(0)| of the logarithms; NaN where one has none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        up, down, zero = np.log(up), np.log(down), np.log(zero)
        return np.abs(up - down) - np.abs(up + down - 2 * zero)


def cosine(a: jax.Array, b: jax.Array) -> float:
    """Between the channel vectors of two directions."""
    v, w = (np.asarray(ps.channel_vector(x), float) for x in (a, b))
    return float(v @ w / np.linalg.norm(v) / np.linalg.norm(w))


def distance(outcome: Mapping[str, np.ndarray], other: Any) -> np.ndarray:
    """Mean squared difference of the tracer at the end from that of another simulation (n, X, Y): (draws, n)."""
    return np.square(outcome["tracer"] - np.asarray(other)).mean((2, 3))


def choose_strengths(outcome: lab.Outcome, name: str, others: Any) -> np.ndarray:
    """The strength (draws, targets), not 0, that comes closest on average; others (targets, n, X, Y)."""
    alphas = [alpha for alpha in outcome[name] if alpha != 0]
    errors = np.stack([[distance(outcome[name][a], other).mean(1) for other in others] for a in alphas])
    return np.asarray(alphas)[errors.argmin(0)].T


def closer(steered: lab.Outcome, names: Sequence[str], chosen: np.ndarray, others: Any) -> np.ndarray:
    """Whether the steered run is closer than the plain one, (draws, targets, n)."""
    plain = [distance(steered["none"][0.0], other)[0] for other in others]
    return np.stack(
        [
            [distance(steered[name][float(a)], other)[0] < p for a, other, p in zip(row, others, plain, strict=True)]
            for name, row in zip(names, chosen, strict=True)
        ]
    )


def share_closer(key: jax.Array, hits: np.ndarray) -> Metric:
    """Percent of states that got closer; hits (draws, targets, n), the interval is over states."""
    mean, low, high = (100 * float(x) for x in bootstrap_mean(key, hits.mean((0, 1))))
    return Metric(
        value=mean, ci95=(low, high), n=hits.shape[-1], unit="% of states", per_seed=tuple(100 * hits.mean((1, 2)))
    )


def as_metrics(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Metric]:
    """Metrics of the draws of all surrogates together; what is not finite was not measured."""
    metrics = {}
    for name in parts[0]:
        values = np.concatenate([np.atleast_1d(part[name]) for part in parts if name in part])
        if np.isfinite(values).all():
            kind = name.split("/")[1] if "/" in name else name
            metrics[name] = per_seed(values, UNITS.get(kind, ""))
    return metrics


def counterfactual(
    bench: Any, params: Any, family: str, deltas: Sequence[jax.Array], log: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Strengths for FAST and SLOW by dev states, (draws, 2), and whether test states got closer, (draws, 2, n)."""
    config, name = bench.config, f"{family}_speed"
    dev, test = bench.dev[family], bench.test[family]
    place, end = worlds.fields_of(config.families).index("s"), config.horizon - 1
    tracers = [states.other[:, :, end, place] for states in (dev, test)]
    none = lab.Patch("none", 0, deltas[0], config.layer, (0.0,))
    moved = [alpha for alpha in config.alphas if alpha != 0]
    tried = [lab.Patch(name, k, delta, config.layer, moved) for k, delta in enumerate(deltas)]
    on_dev = lab.measure(bench.model, params, tried, dev, config, log, f"{name} on dev")
    chosen = choose_strengths(on_dev, name, tracers[0])
    names = [f"{name}{k}" for k in range(len(deltas))]
    patches = [
        lab.Patch(one, 0, delta, config.layer, sorted(set(row.tolist())))
        for one, delta, row in zip(names, deltas, chosen, strict=True)
    ]
    on_test = lab.measure(bench.model, params, [none, *patches], test, config, log, f"{name} on test")
    return chosen, closer(on_test, names, chosen, tracers[1])
