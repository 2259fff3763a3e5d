"""The statements of the paper and how each is judged, written before any number was known."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.measures import lower_bound, with_interval
from experiments.steering._austeer_lab import SITES
from experiments.steering._austeer_measures import RIVALS
from mechlab.reporting.results import Claim, Metric

Metrics = Mapping[str, Metric]
Verdict = tuple[bool | None, str]


def _tasks(metrics: Metrics) -> list[str]:
    """The tasks that were measured; the planted one is a check of the method and not one of them."""
    names = [name.removeprefix("over_random/") for name in metrics if name.startswith("over_random/")]
    return [name for name in names if name != "planted"]


def _ranking(metrics: Metrics) -> Verdict:
    found, signs, gain = metrics["planted/found"], metrics["planted/signs"], metrics["gain/planted/austeer"]
    holds = min(found.value, signs.value) == 8 and lower_bound(gain) > 0
    return holds, (
        f"{found.value:.0f} of 8 planted units chosen, {signs.value:.0f} with the right sign (least of "
        f"{found.n} seeds); accuracy {with_interval(gain, '+.1f')} points"
    )


def _units(metrics: Metrics) -> Verdict:
    scanned = {name.split("/")[1] for name in metrics if name.startswith("scan/")} - {"planted"}
    if not scanned:
        return None, "no trained model was scanned at this preset"
    (task,) = scanned
    parts, holds = [], True
    for site in SITES:
        lead, helpful, harmful = (metrics[f"scan/{task}/{site}/{part}"] for part in ("lead", "helpful", "harmful"))
        best, block = metrics[f"scan/{task}/{site}/best_unit"], metrics[f"scan/{task}/{site}/block"]
        holds &= lead.value > 0 and helpful.value > 0 and harmful.value > 0
        parts.append(
            f"{site}: layer {metrics[f'scan/{task}/{site}/layer'].value:.0f}, best unit {best.value:+.3f}, block "
            f"{block.value:+.3f}; {helpful.value:.0f} units help and {harmful.value:.0f} harm, of {helpful.n}"
        )
    return holds, "; ".join(parts) + f"; band {metrics[f'scan/{task}/band'].value:.3f} AUROC"


def _selection(metrics: Metrics) -> Verdict:
    tasks = _tasks(metrics)
    if not tasks:
        return None, "no task but the planted one at this preset"
    above = [task for task in tasks if metrics[f"over_random/{task}"].value > 0]
    better = [task for task in tasks if lower_bound(metrics[f"auroc_gain/{task}/austeer"]) > 0]
    numbers = "; ".join(
        f"{task} over random {with_interval(metrics[f'over_random/{task}'], '+.3f')}, over none "
        f"{with_interval(metrics[f'auroc_gain/{task}/austeer'], '+.3f')}"
        for task in tasks
    )
    holds = 3 * len(above) >= 2 * len(tasks) and bool(better)
    return holds, f"above random on {len(above)} of {len(tasks)}, above none on {len(better)}: {numbers}"


def _no_loss(metrics: Metrics) -> Verdict:
    tasks = _tasks(metrics)
    if not tasks:
        return None, "no task but the planted one at this preset"
    gains = {task: metrics[f"gain/{task}/austeer"] for task in tasks}
    return all(gain.value >= -1 for gain in gains.values()), "points: " + "; ".join(
        f"{task} {with_interval(gain, '+.1f')}" for task, gain in gains.items()
    )


def _over_offset(metrics: Metrics) -> Verdict:
    tasks = _tasks(metrics)
    found = "; ".join(f"{task} {with_interval(metrics[f'over_offset/{task}'], '+.1f')}" for task in tasks)
    return None, f"points: {found}" if tasks else "no task but the planted one at this preset"


def _rivals(metrics: Metrics) -> Verdict:
    if not _tasks(metrics):
        return None, "no task but the planted one at this preset"
    over = {rival: metrics[f"versus/all/{rival}"] for rival in RIVALS}
    return all(lower_bound(x) > 0 for x in over.values()), "points, mean over tasks: " + "; ".join(
        f"over {rival.upper()} {with_interval(x, '+.1f')}" for rival, x in over.items()
    )


CLAIMS = (
    Claim(
        id="ranking",
        statement="The score finds the units that carry the behaviour, with their signs, and steering them helps.",
        source="method; on a behaviour planted by hand",
        criterion="in every seed all 8 planted units among the 8 chosen, all signs right, and the lower end of the "
        "accuracy gain's interval above 0",
        judge=_ranking,
    ),
    Claim(
        id="unit_beats_block",
        statement="One single dimension can beat steering its whole block; dimensions of a block help and harm.",
        source="the paper's analysis of heterogeneity",
        criterion="in a trained model, at both sites, at one alpha: for some layer the best unit's dev AUROC gain "
        "above the block's, and units on both sides of the simultaneous 95 % bootstrap band of no effect",
        judge=_units,
    ),
    Claim(
        id="selection_matters",
        statement="Which units are steered matters.",
        source="the paper's method; our control",
        criterion="at the dev-chosen site, k and alpha: test AUROC above the median of as strong random units on at "
        "least two thirds of the tasks, and above no steering (95 % interval) on at least one",
        judge=_selection,
    ),
    Claim(
        id="no_loss",
        statement="Steering by the dev-chosen setting does not cost accuracy.",
        source="the paper's tables",
        criterion="test accuracy at least that without steering, less one point, on every task",
        judge=_no_loss,
    ),
    Claim(
        id="over_offset",
        statement="What AUSteer gains over a constant added to one answer's logit.",
        source="our control",
        criterion="reported: test accuracy minus that with the dev-tuned constant",
        judge=_over_offset,
    ),
    Claim(
        id="beats_baselines",
        statement="AUSteer is more accurate than CAA, ITI and SADI.",
        source="the paper's main tables",
        criterion="with about as many dev evaluations each: mean test accuracy over tasks above that of every one of "
        "the three (lower ends of 95 % intervals above 0)",
        judge=_rivals,
    ),
)
