"""The statements of the paper and how each is judged. Intervals are paired bootstraps over test items, seeds pooled."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from experiments.measures import lower_bound, with_interval
from experiments.steering._repe_reasoning_lab import TALES
from experiments.steering._tales_tasks import STORIES
from mechlab.reporting.results import Claim, Metric

Metrics = Mapping[str, Metric]
Verdict = tuple[bool | None, str]
TASKS = (*TALES, "deduce", "arith", *STORIES)


def _improves(task: str) -> Callable[[Metrics], Verdict]:
    def judge(metrics: Metrics) -> Verdict:
        gain, margin = metrics[f"gain/{task}/chosen"], metrics[f"margin_gain/{task}/chosen"]
        random, margin_random = metrics[f"over_random/{task}"], metrics[f"margin_over_random/{task}"]
        holds = lower_bound(gain) > 0 and lower_bound(margin) > 0 and random.value > 0 and margin_random.value > 0
        offset = metrics[f"gain/{task}/offset"].value
        return holds, (
            f"accuracy {with_interval(gain, '+.2f')} {gain.unit}, margin {with_interval(margin, '+.2f')} nats; over "
            f"the best random vector {random.value:+.2f} points and {margin_random.value:+.2f} nats; "
            f"offsets alone {offset:+.2f} points"
        )

    return judge


def _controls(metrics: Metrics) -> Verdict:
    judged = {task: metrics[f"control/{task}/rank"] for task in TASKS if f"control/{task}/rank" in metrics}
    if not judged:
        return None, "alphas of this preset are too coarse, or extras are off"
    passed = [task for task in judged if _controlled(metrics, task)]
    ranks = ", ".join(
        f"{task} rank {rank.value:+.2f}, {metrics[f'control/{task}/moved'].value:.2f} nats against "
        f"{metrics[f'control/{task}/random_moved'].value:.2f}"
        for task, rank in judged.items()
    )
    return bool(passed), f"{', '.join(passed) or 'no task'} passes; {ranks}"


def _controlled(metrics: Metrics, task: str) -> bool:
    """In every seed: monotone, differences on opposite sides and as the slope says, beyond random vectors."""
    parts = ("rank", "up", "down", "slope", "moved", "random_moved")
    by_seed = zip(*(metrics[f"control/{task}/{part}"].per_seed or () for part in parts), strict=True)
    return all(
        abs(rank) >= 0.9 and up * down < 0 and up * slope > 0 and moved > random
        for rank, up, down, slope, moved, random in by_seed
    )


def _diverges(metrics: Metrics) -> Verdict:
    ranks = {task: metrics[f"kl_rank/{task}"].value for task in TASKS if f"kl_rank/{task}" in metrics}
    if not ranks:
        return None, "too few alphas at this preset"
    largest = max(max(metrics[f"kl_zero/{task}"].per_seed or (0,)) for task in ranks)
    spelled = ", ".join(f"{task} {rank:.2f}" for task, rank in ranks.items())
    return min(
        ranks.values()
    ) >= 0.95 and largest <= 1e-6, f"rank correlations {spelled}; KL(0) at most {largest:.0e} nats"


def _from_correct(metrics: Metrics) -> Verdict:
    found = [
        f"{task} {with_interval(metrics[f'correct_over_incorrect/{task}'], '+.2f')} points"
        for task in TASKS
        if f"correct_over_incorrect/{task}" in metrics
    ]
    return None, "; ".join(found) or "too few items are answered wrongly"


def _types(metrics: Metrics) -> Verdict:
    found = [
        f"{task}: " + ", ".join(f"{label} {metrics[f'gain/{task}/{arm}'].value:+.1f}" for arm, label in LABELS.items())
        for task in TASKS
        if f"gain/{task}/contrast" in metrics
    ]
    return None, "points over no vector; " + "; ".join(found)


LABELS = {"reading": "R", "contrast": "R-C", "pca_contrast": "PCA-C"}

CLAIMS = (
    *(
        Claim(
            id=f"improves_{task}",
            statement=f"A control vector improves the model on {task}.",
            source="the paper's claim, on one of our tasks",
            criterion="accuracy and margin of the dev-chosen vector above alpha = 0 (95 % intervals above 0), and both "
            "above the best of the dev-selected random vectors, in mean over seeds",
            judge=_improves(task),
        )
        for task in TASKS
    ),
    Claim(
        id="control_exists",
        statement="A vector controls the margin of the right answer.",
        source="what alpha does; our reading",
        criterion="on one task or more, in every seed: |Spearman(alpha, margin)| >= 0.9 over [-0.5, 0.5], changes at "
        "+-0.1 of opposite signs and as the slope at 0 says, and moved by more than by any random vector",
        judge=_controls,
    ),
    Claim(
        id="kl_grows",
        statement="The output distribution moves away with the strength of the vector.",
        source="KL divergence against alpha",
        criterion="on every task Spearman(|alpha|, mean KL) >= 0.95, and KL at alpha = 0 at most 1e-6 nats",
        judge=_diverges,
    ),
    Claim(
        id="only_correct",
        statement="Vectors work if they are read from items that the model answers correctly.",
        source="abstract",
        criterion="reported: R-C from right items minus R-C from wrong items, points of test accuracy",
        judge=_from_correct,
    ),
    Claim(
        id="types",
        statement="R, R-C and PCA-C compared.",
        source="the paper's three vectors",
        criterion="reported; no order is required",
        judge=_types,
    ),
)
