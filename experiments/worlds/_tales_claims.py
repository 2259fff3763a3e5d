"""What the models of tales should be like, and how that is judged; accuracies in percent on items of the test pool."""

from __future__ import annotations

from collections.abc import Mapping

from mechlab.data.worlds import tales
from mechlab.reporting.results import Claim, Metric

Metrics = Mapping[str, Metric]
Verdict = tuple[bool | None, str]

WINDOW = (55.0, 92.0)
USUAL = 1


def _competent(metrics: Metrics) -> Verdict:
    found = {kind: metrics[f"L/{kind}/{USUAL}"].value for kind in tales.ITEM_KINDS}
    inside = [kind for kind, value in found.items() if WINDOW[0] <= value <= WINDOW[1]]
    return len(inside) >= 3, ", ".join(f"{kind} {value:.1f} %" for kind, value in found.items())


def _above_chance(metrics: Metrics) -> Verdict:
    found = {kind: metrics[f"L/{kind}/0"] for kind in tales.ITEM_KINDS}
    lows = {kind: metric.ci95[0] for kind, metric in found.items() if metric.ci95 is not None}
    told = ", ".join(f"{kind} {metric.value:.1f} %" for kind, metric in found.items())
    return all(low > 50 for low in lows.values()), told


def _copies(metrics: Metrics) -> Verdict:
    value = metrics["L/copying"].value
    return value >= 90, f"{value:.1f} %"


def _scale(metrics: Metrics) -> Verdict:
    means = {
        size: sum(metrics[f"{size}/{kind}/{USUAL}"].value for kind in tales.ITEM_KINDS) / len(tales.ITEM_KINDS)
        for size in ("S", "M", "L")
    }
    return means["S"] < means["M"] < means["L"], ", ".join(f"{size} {value:.1f} %" for size, value in means.items())


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="competent",
        statement="L can do the items, and not perfectly.",
        source="data/worlds/tales",
        criterion=f"accuracy of L in {WINDOW[0]:.0f}-{WINDOW[1]:.0f} % on three of four kinds, {USUAL} distractor",
        judge=_competent,
    ),
    Claim(
        id="above_chance",
        statement="L answers every kind of item better than chance.",
        source="data/worlds/tales",
        criterion="without distractors, lower end of every 95 % interval above 50 %",
        judge=_above_chance,
    ),
    Claim(
        id="copies",
        statement="L copies lists: it has induction heads.",
        source="data/worlds/tales",
        criterion="from the third round of a list on, at least 90 % of its words predicted",
        judge=_copies,
    ),
    Claim(
        id="scale",
        statement="Larger models do better.",
        source="data/worlds/tales",
        criterion=f"mean accuracy over kinds, {USUAL} distractor: S < M < L",
        judge=_scale,
    ),
)
