"""From outcomes to metrics: refusal of every arm, what the controllers say, uniform steering at equal refusal."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from experiments.measures import per_seed, percent, points
from experiments.steering._guiding_giants_lab import PLACES, Outcome, Panel, layers_of
from mechlab.analysis.intervals import bootstrap_mean
from mechlab.analysis.metrics import auroc
from mechlab.core.rng import stream
from mechlab.data.worlds import requests as world
from mechlab.methods.steering import guiding_giants as giants
from mechlab.reporting.results import Metric


def scores_of(outcome: Outcome, panel: Panel) -> np.ndarray:
    """(K,) refusal of the target minus refusal of others, in [-1, 1]."""
    return outcome.refused[:, panel.target].mean(1) - outcome.refused[:, ~panel.target].mean(1)


def describe(outcome: Outcome, panel: Panel) -> str:
    """One line on an outcome."""
    refused = 100 * outcome.refused.mean(0)
    plain, wrapped = (refused[panel.target & (panel.wrapped == w)].mean() for w in (False, True))
    return f"refuses target {plain:.1f} %, wrapped {wrapped:.1f} %, others {refused[~panel.target].mean():.1f} %"


def refusals(key: jax.Array, outcomes: dict[str, Outcome], panel: Panel) -> dict[str, Metric]:
    """Refusal, over-refusal, exactness, KL and scores of every arm, and differences to no steering and to CAST."""
    metrics: dict[str, Metric] = {}
    groups = {
        "refusal_plain": panel.target & ~panel.wrapped,
        "refusal_wrapped": panel.target & panel.wrapped,
        "over_plain": ~panel.target & ~panel.wrapped,
        "over": ~panel.target,
    }
    helpful = np.asarray(panel.helpful)
    for arm, outcome in outcomes.items():
        own = stream(key, arm)
        for group, rows in groups.items():
            metrics[f"{group}/{arm}"] = percent(stream(own, group), outcome.refused[:, rows])
        exact = (outcome.answers == helpful).all(-1)[:, ~panel.target]
        metrics[f"exact/{arm}"] = percent(stream(own, "exact"), exact)
        metrics[f"kl/{arm}"] = per_seed(outcome.kl[:, ~panel.target].mean(1), "nats a token")
        metrics[f"score/{arm}"] = per_seed(100 * scores_of(outcome, panel), "points")
    for name, group in (("gain", "refusal_plain"), ("over_gain", "over_plain")):
        moved, still = (outcomes[arm].refused[:, groups[group]] for arm in ("main", "none"))
        metrics[f"{name}/main"] = points(stream(key, name), moved, still)
    # In a score a target prompt counts for refusal and another one against it: one signed number a prompt.
    sign = 200.0 * np.where(panel.target, 1, -1)
    for arm in ("main", "end_early"):
        if arm in outcomes:
            signed = sign * (outcomes[arm].refused.mean(0) - outcomes["cast"].refused.mean(0))
            mean, low, high = map(float, bootstrap_mean(stream(key, "cast", arm), signed))
            metrics[f"over_cast/{arm}"] = Metric(value=mean, ci95=(low, high), n=len(signed), unit="points")
    pairs = [(arm, arm.replace("end_", "released_")) for arm in outcomes if arm.startswith("end_")]
    if pairs:
        gains = [scores_of(outcomes[end], panel) - scores_of(outcomes[released], panel) for end, released in pairs]
        metrics["end_over_released"] = per_seed(100 * np.mean(gains, 0), "points")
    return metrics


def look_inside(bench: Any, controllers: dict[str, Any], metrics: dict[str, Metric]) -> dict[str, Any]:
    """AUROC of s, layer weights and sizes of patches, by controller; adds metrics, returns what figures show."""
    config, panel = bench.config, bench.test
    weights: dict[str, np.ndarray] = {}
    scalars: dict[str, np.ndarray] = {}
    groups = {"target": panel.target & ~panel.wrapped, "others": ~panel.target & ~panel.wrapped}
    for name, controller in controllers.items():
        place = name.split("_", 1)[1] if name.split("_", 1)[1] in PLACES else "early"
        layers = layers_of(place, config.layers)
        x = giants.controller_inputs(panel.states, layers)
        said = jax.vmap(lambda c, x=x: giants.controller_apply(c, x))(controller)
        s, w = np.asarray(said.scalar[..., 0]), np.asarray(jax.nn.sigmoid(said.weight_logits))
        for kind, rows in (("plain", ~panel.wrapped), ("wrapped", panel.wrapped)):
            metrics[f"auroc/{name}/{kind}"] = per_seed(auroc(s[:, rows], panel.target[rows]), "")
        mean = w[:, panel.target].mean(1)
        metrics[f"weight_offset/{name}"] = per_seed(np.abs(mean - 0.5).max(1), "")
        metrics[f"weight_spread/{name}"] = per_seed(mean.max(1) - mean.min(1), "")
        for kind, rows in groups.items():
            metrics[f"s/{name}/{kind}"] = per_seed(s[:, rows].mean(1), "logit")
        metrics[f"negative_s/{name}"] = per_seed(100 * (s[:, ~panel.target] < 0).mean(1), "% of other prompts")
        if name in ("released_early", "released_last", "end_early", "end_two_pass", "end_last"):
            # What the causal rule lets pass; in the two-pass mode every layer.
            mode = "two_pass" if name == "end_two_pass" else "causal"
            reached = np.asarray(giants.reach(config.layers, layers, mode)) > 0
            length = np.linalg.norm(panel.states, axis=-1)[None]
            c = np.asarray(metrics[f"strength/{name}"].per_seed) * np.asarray(bench.units)
            ratio = (c[:, None, None] * np.abs(s)[..., None] * w / length)[..., reached].mean(-1)
            for kind, rows in (("target", panel.target), ("others", ~panel.target)):
                metrics[f"patch_ratio/{name}/{kind}"] = per_seed(ratio[:, rows].mean(1), "of |h|")
        label = name.replace("released_", "released, ").replace("end_", "end to end, ").replace("_", " ")
        if name not in ("target_only", "released_mixed"):
            weights |= {f"{label}, {kind}": w[:, rows].mean((0, 1)) for kind, rows in groups.items()}
        if name in ("released_early", "released_mixed"):
            order = "" if name == "released_early" else ", mixed batches"
            scalars |= {f"{kind}{order}": s[:, rows].reshape(-1) for kind, rows in groups.items()}
    return {"weights": weights, "scalar": scalars}


def match(wanted: float, curve: dict[str, np.ndarray]) -> dict[str, float]:
    """A curve (C,) at the first strength whose refusal reaches ``wanted``, linearly between strengths, from none on.

    Where it is never reached, the strength with the highest refusal stands in.
    """
    full = {k: np.concatenate([[0.0], x]) for k, x in curve.items()}
    reached = np.flatnonzero(full["refusal"] >= wanted)
    if not len(reached):
        return {k: float(x[full["refusal"].argmax()]) for k, x in full.items()}
    j = int(reached[0])
    if j == 0:
        return {k: float(x[0]) for k, x in full.items()}
    low, high = full["refusal"][j - 1 : j + 1]
    share = (wanted - low) / (high - low)
    return {k: float(x[j - 1] + share * (x[j] - x[j - 1])) for k, x in full.items()}


def table(bench: Any, outcomes: dict[str, Outcome]) -> list[str]:
    """Two prompts of each group of seed 0 with their greedy answers, as rows of a Markdown table."""
    panel, words = bench.test, world.tokenizer
    lines = ["| prompt | no steering | controller | uniform |", "|---|---|---|---|"]
    for target in (True, False):
        for wrapped in (False, True):
            for row in np.flatnonzero((panel.target == target) & (panel.wrapped == wrapped))[:2]:
                prompt = words.decode(np.asarray(panel.tokens[row][: int(panel.lengths[row])]))
                said = [words.decode(outcomes[arm].answers[0, row]) for arm in ("none", "main", "uniform")]
                lines.append(f"| {' | '.join([prompt, *said])} |")
    return lines
