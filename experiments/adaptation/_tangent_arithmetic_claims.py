"""The statements of the tangent-arithmetic paper and how each is judged, at the first learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mechlab.reporting.results import Claim, Metric

Metrics = Mapping[str, Metric]
Verdict = tuple[bool | None, str]


def _seeds(metric: Metric) -> tuple[float, ...]:
    return metric.per_seed or ()


def _adds_better(mode: str, words: str) -> Callable[[Metrics], Verdict]:
    def judge(metrics: Metrics) -> Verdict:
        ours, theirs = (metrics[f"addition/{name}/normalised"] for name in (mode, "standard"))
        margins = [a - b for a, b in zip(_seeds(ours), _seeds(theirs), strict=True)]
        listed = ", ".join(f"{x:+.1f}" for x in margins)
        numbers = f"{words} {ours.value:.1f} %, standard {theirs.value:.1f} %; seeds {listed} points"
        return ours.value >= theirs.value + 1, numbers

    return judge


def _paper_order(metrics: Metrics) -> Verdict:
    linear, posthoc = (metrics[f"addition/{name}/normalised"].value for name in ("linear", "posthoc"))
    return linear > posthoc, f"linear {linear:.1f} %, post-hoc {posthoc:.1f} %"


def _absolute(metrics: Metrics) -> Verdict:
    modes = {name: metrics[f"addition/{name}/absolute"].value for name in ("standard", "posthoc", "linear")}
    return modes["linear"] > modes["standard"], ", ".join(f"{name} {value:.1f} %" for name, value in modes.items())


def _negation(metrics: Metrics) -> Verdict:
    ours, theirs = (_seeds(metrics[f"negation/{name}/target"]) for name in ("linear", "standard"))
    wins = sum(a < b for a, b in zip(ours, theirs, strict=True))
    described = "; ".join(
        f"{name}: target {metrics[f'negation/{name}/target'].value:.1f} %, "
        f"control {metrics[f'negation/{name}/control'].value:.1f} %"
        for name in ("before", "standard", "posthoc", "linear")
    )
    return 3 * wins >= 2 * len(ours), f"lower in {wins} of {len(ours)} seeds; {described}"


def _disentangled(prefix: str) -> Callable[[Metrics], Verdict]:
    def judge(metrics: Metrics) -> Verdict:
        linear, standard = (metrics[f"{prefix}/{name}"].value for name in ("linear", "standard"))
        posthoc = f"{prefix}/posthoc"
        third = f", post-hoc {metrics[posthoc].value:.3f}" if posthoc in metrics else ""
        return linear < standard, f"linear {linear:.3f}, standard {standard:.3f}{third}"

    return judge


def _advantage(metrics: Metrics) -> Verdict:
    gain = metrics["advantage"]
    return gain.value >= 0, f"{gain.value:+.2f} points; seeds {', '.join(f'{x:+.2f}' for x in _seeds(gain))}"


def _not_linear(metrics: Metrics) -> Verdict:
    drops = {name.split("/")[1]: metric.value for name, metric in metrics.items() if name.startswith("posthoc_drop/")}
    if not drops:
        return None, "no single tasks were measured"
    return max(drops.values()) >= 5, ", ".join(f"{name} {value:+.1f}" for name, value in drops.items()) + " points"


def _pretraining(metrics: Metrics) -> Verdict:
    before, after = (metrics[f"{prefix}/standard/normalised"].value for prefix in ("random", "addition"))
    return after - before >= 15, f"pre-trained {after:.1f} %, random {before:.1f} %: {after - before:+.1f} points"


def _localised(metrics: Metrics) -> Verdict:
    trained, random = (metrics[f"ntk/{kind}/ratio"].value for kind in ("pretrained", "random"))
    return trained > 1 and trained > random, f"inside over outside: pre-trained {trained:.2f}, random {random:.2f}"


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="posthoc_adds",
        statement="Linearising after fine-tuning makes task vectors add better.",
        source="table 1, normalised accuracy",
        criterion="normalised accuracy at least 1 point above standard, in mean over seeds",
        judge=_adds_better("posthoc", "post-hoc"),
    ),
    Claim(
        id="linear_adds",
        statement="Fine-tuning the linearised model makes task vectors add better.",
        source="table 1, normalised accuracy",
        criterion="normalised accuracy at least 1 point above standard, in mean over seeds",
        judge=_adds_better("linear", "linear"),
    ),
    Claim(
        id="linear_over_posthoc",
        statement="Linear fine-tuning adds better than linearising afterwards.",
        source="table 1, normalised accuracy",
        criterion="larger normalised accuracy, in mean over seeds",
        judge=_paper_order,
    ),
    Claim(
        id="absolute",
        statement="The sum of linear task vectors is also more accurate in absolute terms.",
        source="table 1, absolute accuracy",
        criterion="larger absolute accuracy than standard, in mean over seeds",
        judge=_absolute,
    ),
    Claim(
        id="negation",
        statement="Linear task vectors take a task away more thoroughly at the same cost to a control task.",
        source="table 2",
        criterion="lower target accuracy than standard in at least two thirds of the seeds, both at 95 % of the "
        "pre-trained control accuracy on validation images",
        judge=_negation,
    ),
    Claim(
        id="disentangled",
        statement="Linear fine-tuning disentangles weights.",
        source="figures 2 and 4",
        criterion="smaller mean xi over [-1, 1]² without axes than standard, in mean over seeds and pairs",
        judge=_disentangled("xi"),
    ),
    Claim(
        id="disentangled_matched",
        statement="It does so where both do the single tasks equally well.",
        source="our check: the better mode's vectors shortened to the other's accuracy",
        criterion="smaller mean xi over [-1, 1]² without axes than standard, in mean over seeds and pairs",
        judge=_disentangled("xi_matched"),
    ),
    Claim(
        id="advantage",
        statement="The gain is not due to better single tasks: fine-tuning f is at least as accurate as f_lin.",
        source="section 4, non-linear advantage",
        criterion="mean non-linear advantage over tasks and seeds >= 0",
        judge=_advantage,
    ),
    Claim(
        id="not_linear_regime",
        statement="Fine-tuning does not happen in the linear regime.",
        source="section 3, standard against post-hoc single tasks",
        criterion="post-hoc at least 5 points below standard on at least one task, in mean over seeds",
        judge=_not_linear,
    ),
    Claim(
        id="pretraining",
        statement="Task arithmetic comes from pre-training.",
        source="section 5, random initialisation",
        criterion="normalised accuracy of standard at least 15 points lower from a random trunk, in mean over seeds",
        judge=_pretraining,
    ),
    Claim(
        id="localised",
        statement="The eigenfunctions that carry a task live on its data, and pre-training makes them.",
        source="section 5, figure 6",
        criterion="local energy inside over outside the task above 1, and above that of the random trunk, in mean over "
        "seeds and pairs",
        judge=_localised,
    ),
)
