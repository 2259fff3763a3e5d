"""The statements of the LIFT paper and how each is judged. Target losses are of answers held out, lower is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from experiments.measures import of_seeds
from mechlab.reporting.results import Claim, Metric

Metrics = Mapping[str, Metric]
Verdict = tuple[bool | None, str]


def _not_worse(other: str) -> Callable[[Metrics], Verdict]:
    def judge(metrics: Metrics) -> Verdict:
        ours, theirs = metrics["target/lift"], metrics[f"target/{other}"]
        return ours.value <= theirs.value, f"lift {ours.value:.4f}, {other} {theirs.value:.4f} {ours.unit}"

    return judge


def _better_in_every_seed(other: str) -> Callable[[Metrics], Verdict]:
    def judge(metrics: Metrics) -> Verdict:
        ours, theirs = metrics["target/lift"], metrics[f"target/{other}"]
        holds = all(a < b for a, b in zip(ours.per_seed or (), theirs.per_seed or (), strict=True))
        return holds, f"lift {of_seeds(ours, '.4f')}; {other} {of_seeds(theirs, '.4f')} {ours.unit}"

    return judge


def _near_full(metrics: Metrics) -> Verdict:
    ours, full = metrics["target/lift"], metrics["target/full"]
    margin = 100 * (ours.value / full.value - 1)
    return margin <= 5, f"lift {ours.value:.4f}, full {full.value:.4f} {ours.unit}: {margin:+.1f} %"


def _retains(other: str) -> Callable[[Metrics], Verdict]:
    def judge(metrics: Metrics) -> Verdict:
        gap = metrics[f"retention_gap/{other}"]
        return gap.value > 0, f"{gap.value:+.2f} points in mean; seeds {of_seeds(gap, '+.2f')}"

    return judge


def _sensitive(metrics: Metrics) -> Verdict:
    ours, random = metrics["perturbation/lift"], metrics["perturbation/random"]
    holds = all(a > b for a, b in zip(ours.per_seed or (), random.per_seed or (), strict=True))
    return holds, f"loss rises by {of_seeds(ours, '.4f')} (lift), {of_seeds(random, '.4f')} (random) {ours.unit}"


def _more_than_magnitude(metrics: Metrics) -> Verdict:
    ours, theirs = metrics["perturbation/lift"], metrics["perturbation/weight_mag"]
    return (
        ours.value > theirs.value,
        f"loss rises by {ours.value:.4f} (lift), {theirs.value:.4f} (weight_mag) {ours.unit}",
    )


def _small_state(metrics: Metrics) -> Verdict:
    share, trained = metrics["state_share/lift"].value, metrics["density/lift"].value
    return share <= 8, f"{share:.2f} % of dense Adam's bytes for {trained:.2f} % of the kernels' numbers"


def _untouched(metrics: Metrics) -> Verdict:
    refreshed, once = metrics["outside/lift"].value, metrics["outside/lift_once"].value
    return refreshed == 0 and once == 0, f"{refreshed:.0f} (refreshed), {once:.0f} (chosen once) stray changes"


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="beats_magnitude",
        statement="Magnitude chooses better weights after rank reduction than without it.",
        source="abstract",
        criterion="target loss at each arm's best rate: lift at most weight_mag, in mean over seeds",
        judge=_not_worse("weight_mag"),
    ),
    Claim(
        id="beats_random",
        statement="Principal weights are better to train than random ones.",
        source="rule comparison",
        criterion="target loss at each arm's best rate: lift at most random, in mean over seeds",
        judge=_not_worse("random"),
    ),
    Claim(
        id="beats_smallest",
        statement="Principal weights are better to train than their opposite, the smallest after rank reduction.",
        source="our control; what the released scripts select",
        criterion="target loss at each arm's best rate: lift below smallest in every seed",
        judge=_better_in_every_seed("smallest"),
    ),
    Claim(
        id="near_full",
        statement="Five percent of the weights reach full fine-tuning (the paper: surpass it).",
        source="abstract; weakened here, where the paper's size is not reached",
        criterion="target loss at each arm's best rate: lift at most 5 % above full, in mean over seeds",
        judge=_near_full,
    ),
    Claim(
        id="retains_more_than_full",
        statement="LIFT forgets less of the source than full fine-tuning.",
        source="abstract: up to 20 % more retained",
        criterion="retention of the source score at equal target loss, interpolated along the rates: gap > 0 in mean",
        judge=_retains("full"),
    ),
    Claim(
        id="retains_more_than_lora",
        statement="LIFT forgets less of the source than LoRA.",
        source="abstract: up to 20 % more retained",
        criterion="retention of the source score at equal target loss, interpolated along the rates: gap > 0 in mean",
        judge=_retains("lora"),
    ),
    Claim(
        id="sensitive_random",
        statement="A model depends on its principal weights more than on as many random ones.",
        source="perturbation analysis",
        criterion="equal noise: rise of the source loss, averaged over noise levels, larger for lift in every seed",
        judge=_sensitive,
    ),
    Claim(
        id="sensitive_magnitude",
        statement="A model depends on its principal weights more than on its largest ones.",
        source="perturbation analysis",
        criterion="equal noise: rise of the source loss, averaged over noise levels, larger for lift, in mean",
        judge=_more_than_magnitude,
    ),
    Claim(
        id="small_state",
        statement="The optimiser's memory is that of the trained five percent.",
        source="abstract: about that of LoRA",
        criterion="two float32 moments and an int32 index per entry: at most 8 % of the bytes of dense Adam",
        judge=_small_state,
    ),
    Claim(
        id="untouched",
        statement="Only chosen weights change.",
        source="the method",
        criterion="no weight outside the union of all chosen entries differs from the base, with refresh and without",
        judge=_untouched,
    ),
)
