"""The statements of the Fast IBP paper and how each is judged. Errors are in percent of test images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

from mechlab.reporting.results import Claim, Metric

Metrics = Mapping[str, Metric]
Verdict = tuple[bool | None, str]

LAYERS = (1, 2, 3, 4, 5)
"""Hidden layers of the untrained networks, see ``_fast_ibp_lab.PROFILED``."""


def radii(metrics: Metrics, arm: str) -> list[str]:
    """The radii that an arm was measured at, as they stand in the names of metrics."""
    names = [name.split("/") for name in metrics]
    found = [parts[1] for parts in names if parts[0] == "verified" and parts[2] == arm]
    return found or [metrics[f"verified/*/{arm}"].unit]  # asks for a metric that is absent: not judged


def _seeds(metric: Metric) -> tuple[float, ...]:
    return metric.per_seed or ()


def _shown(values: tuple[float, ...], form: str = "{:.1f}") -> str:
    return ", ".join(map(form.format, values))


def _initial_growth(metrics: Metrics) -> Verdict:
    ibp = [value for layer in LAYERS for value in _seeds(metrics[f"initial/ibp/{layer}"])]
    xavier = [_seeds(metrics[f"initial/xavier/{layer}"]) for layer in LAYERS]
    growth = [b / a for before, after in pairwise(xavier) for a, b in zip(before, after, strict=True)]
    holds = all(1 <= value <= 4 for value in ibp) and min(growth) >= 4
    return holds, (
        f"IBP initialisation {min(ibp):.2f} to {max(ibp):.2f} in all layers; "
        f"Xavier grows {min(growth):.1f} to {max(growth):.1f} times per layer"
    )


def _batch_norm_explodes(metrics: Metrics) -> Verdict:
    found = {init: _seeds(metrics[f"initial/{init}_bn/{LAYERS[-1]}"]) for init in ("ibp", "xavier")}
    holds = all(value >= 100 for values in found.values() for value in values)
    return holds, "; ".join(f"{init} {_shown(values, '{:.3g}')}" for init, values in found.items())


def _lower(better: str, worse: str, by: float = 0.0) -> Callable[[Metrics], Verdict]:
    """Judge: at every radius and seed the verified error of ``better`` is lower, by ``by`` points or more."""

    def judge(metrics: Metrics) -> Verdict:
        holds, said = True, []
        for eps in radii(metrics, better):
            a, b = (_seeds(metrics[f"verified/{eps}/{arm}"]) for arm in (better, worse))
            gaps = tuple(y - x for x, y in zip(a, b, strict=True))
            holds &= all(gap >= by if by else gap > 0 for gap in gaps)
            said.append(f"ε = {eps}: {_shown(gaps, '{:+.1f}')} points")
        return holds, "; ".join(said)

    return judge


def _needs_both(metrics: Metrics) -> Verdict:
    judged = {arm: _lower("init_bn", arm)(metrics) for arm in ("init", "bn")}
    return all(holds for holds, _ in judged.values()), "; ".join(
        f"under {arm}: {said}" for arm, (_, said) in judged.items()
    )


def _balanced(metrics: Metrics) -> Verdict:
    holds, said = True, []
    for eps in radii(metrics, "full"):
        inactive, balance = (
            {arm: _seeds(metrics[f"{what}/{eps}/{arm}"]) for arm in ("full", "xavier")}
            for what in ("inactive", "balance")
        )
        holds &= all(a < b for a, b in zip(inactive["full"], inactive["xavier"], strict=True))
        holds &= all(a > b for a, b in zip(balance["full"], balance["xavier"], strict=True))
        said.append(
            f"ε = {eps}: inactive {_shown(inactive['full'])} % against {_shown(inactive['xavier'])} %, "
            f"min(α, 1/α) {_shown(balance['full'], '{:.2f}')} against {_shown(balance['xavier'], '{:.2f}')}"
        )
    return holds, "; ".join(said)


def _gap_shrinks(metrics: Metrics) -> Verdict:
    holds, said = True, []
    for eps in radii(metrics, "full_long"):
        gaps = []
        for suffix in ("", "_long"):
            full, xavier = (_seeds(metrics[f"verified/{eps}/{arm}{suffix}"]) for arm in ("full", "xavier"))
            gaps.append(tuple(b - a for a, b in zip(full, xavier, strict=True)))
        holds &= all(long < short for short, long in zip(*gaps, strict=True))
        said.append(f"ε = {eps}: {_shown(gaps[0])} short, {_shown(gaps[1])} long")
    return holds, "; ".join(said)


def _sound(metrics: Metrics) -> Verdict:
    broken, ordered = (
        metrics["soundness/certified_but_broken"].value,
        metrics["soundness/right_under_attack_only"].value,
    )
    networks = metrics["soundness/certified_but_broken"].n
    return broken == 0 and ordered == 0, (
        f"{networks} networks: {broken:.0f} certified images broken, {ordered:.0f} wrong images right under attack"
    )


def _crown(metrics: Metrics) -> Verdict:
    said = [
        f"ε = {eps}: CROWN-IBP {metrics[f'verified/{eps}/crown_full'].value:.1f} %, "
        f"IBP {metrics[f'verified/{eps}/full'].value:.1f} %"
        for eps in radii(metrics, "crown_full")
    ]
    return None, "; ".join(said)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="initial_bounds",
        statement="IBP initialisation keeps the size of the bounds over the layers; with Xavier's it grows in each.",
        source="IBP initialisation; first figure",
        criterion="width 128, five layers, no batch norm, every seed: E[δ_i]/E[δ_0] within 1 to 4 in all layers for "
        "IBP initialisation, and at least 4 times larger from each layer to the next for Xavier",
        judge=_initial_growth,
    ),
    Claim(
        id="batch_norm_loosens",
        statement="With batch norm the bounds explode again, whatever the weights: why tightness is regularised.",
        source="regularisation for tight bounds",
        criterion="every seed, both initialisations: E[δ_i]/E[δ_0] of the last hidden layer at least 100",
        judge=_batch_norm_explodes,
    ),
    Claim(
        id="short_warm_up",
        statement="With a short warm-up the three improvements lower the verified error of plain IBP training.",
        source="abstract; main results",
        criterion="at every radius, in every seed, full at least 10 points below Xavier without batch norm",
        judge=_lower("full", "xavier", by=10.0),
    ),
    Claim(
        id="init_and_bn",
        statement="Initialisation and batch norm are both needed.",
        source="ablation study",
        criterion="at every radius, in every seed, init+BN below init alone and below BN alone",
        judge=_needs_both,
    ),
    Claim(
        id="regularisers",
        statement="The warm-up regularisers lower the verified error further.",
        source="ablation study",
        criterion="at every radius, in every seed, full below init+BN",
        judge=_lower("full", "init_bn"),
    ),
    Claim(
        id="relu_states",
        statement="The improvements leave fewer ReLUs inactive, and active and inactive ones more balanced.",
        source="ReLU imbalance",
        criterion="at every radius, in every seed, means over layers at the end: smaller share of inactive ReLUs and "
        "larger min(α, 1/α) in full than in Xavier",
        judge=_balanced,
    ),
    Claim(
        id="long_warm_up",
        statement="A longer warm-up narrows the gap: it is what plain IBP training needed.",
        source="introduction; results by length of the schedule",
        criterion="at every radius, in every seed, Xavier minus full is smaller with the longer ramp",
        judge=_gap_shrinks,
    ),
    Claim(
        id="sound",
        statement="No certified image is broken: standard error ≤ error under attack ≤ verified error.",
        source="definition of the verified error",
        criterion="over all networks, no certified image is misclassified by PGD, no misclassified one right under it",
        judge=_sound,
    ),
    Claim(
        id="crown_ibp",
        statement="CROWN-IBP with the same three improvements, beside IBP.",
        source="main results",
        criterion="no direction is claimed: reported only",
        judge=_crown,
    ),
)
