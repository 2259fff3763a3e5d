"""What the models of tales should be like, and how that is judged; accuracies in percent on items of the test pool."""

from __future__ import annotations

from collections.abc import Mapping

from mechlab.data.worlds import tales
from mechlab.reporting.results import Claim, Metric

Metrics = Mapping[str, Metric]
Verdict = tuple[bool | None, str]

WINDOW = (55.0, 92.0)


def _usual(metrics: Metrics, size: str) -> dict[str, tuple[float, int]]:
    """Accuracy of a size on each kind of item with the number of distractors that is usual for L, and that number."""
    counts = {kind: int(metrics[f"L/usual/{kind}"].value) for kind in tales.ITEM_KINDS}
    return {kind: (metrics[f"{size}/{kind}/{count}"].value, count) for kind, count in counts.items()}


def _competent(metrics: Metrics) -> Verdict:
    found = _usual(metrics, "L")
    inside = [kind for kind, (value, _) in found.items() if WINDOW[0] <= value <= WINDOW[1]]
    return len(inside) >= 3, ", ".join(f"{kind} {value:.1f} % ({count})" for kind, (value, count) in found.items())


def _above_chance(metrics: Metrics) -> Verdict:
    found = {kind: metrics[f"L/{kind}/0"] for kind in tales.ITEM_KINDS}
    lows = {kind: metric.ci95[0] for kind, metric in found.items() if metric.ci95 is not None}
    told = ", ".join(f"{kind} {metric.value:.1f} %" for kind, metric in found.items())
    return all(low > 50 for low in lows.values()), told


def _copies(metrics: Metrics) -> Verdict:
    value = metrics["L/copying"].value
    return value >= 90, f"{value:.1f} %"


def _scale(metrics: Metrics) -> Verdict:
    found = {size: _usual(metrics, size) for size in ("S", "M", "L")}
    means = {size: sum(value for value, _ in of.values()) / len(of) for size, of in found.items()}
    return means["S"] < means["M"] < means["L"], ", ".join(f"{size} {value:.1f} %" for size, value in means.items())


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="competent",
        statement="L can do the items, and not perfectly.",
        source="data/worlds/tales",
        criterion=(
            f"accuracy of L in {WINDOW[0]:.0f}-{WINDOW[1]:.0f} % on three of four kinds, "
            "with the number of distractors chosen on the dev pool (in brackets)"
        ),
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
        criterion="mean accuracy over kinds, with L's usual numbers of distractors: S < M < L",
        judge=_scale,
    ),
)
