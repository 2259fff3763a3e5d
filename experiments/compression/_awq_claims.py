"""The statements of the AWQ paper and how each is judged: KL from the unquantised model, nats per token."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from experiments.measures import of_seeds
from mechlab.reporting.results import Claim, Metric

Metrics = Mapping[str, Metric]
Verdict = tuple[bool | None, str]


def _pairs(metrics: Metrics, ours: str, other: str) -> list[tuple[float, float]]:
    return list(zip(metrics[ours].per_seed or (), metrics[other].per_seed or (), strict=True))


def _salient(metrics: Metrics) -> Verdict:
    kinds = {by: f"kl/3/kept_{by}_low" for by in ("act", "weight", "random")}
    holds = all(a < b for by in ("weight", "random") for a, b in _pairs(metrics, kinds["act"], kinds[by]))
    return holds, "; ".join(f"{by} {of_seeds(metrics[name], '.4f')}" for by, name in kinds.items())


def _scaling(metrics: Metrics) -> Verdict:
    plain = metrics["sweep_kl/1"].value
    sweep = {name.rpartition("/")[2]: metrics[name].value for name in metrics if name.startswith("sweep_kl/")}
    holds = min(value for s, value in sweep.items() if float(s) > 1) < plain
    return holds, ", ".join(f"s = {s}: {value:.4f}" for s, value in sweep.items())


def _beats_rtn(metrics: Metrics) -> Verdict:
    three, four = (
        all(a <= factor * b for a, b in _pairs(metrics, f"kl/{bits}/awq", f"kl/{bits}/rtn"))
        for bits, factor in ((3, 0.9), (4, 1.0))
    )
    parts = [
        f"{b} bits: {of_seeds(metrics[f'kl/{b}/awq'], '.4f')} against {metrics[f'kl/{b}/rtn'].value:.4f}"
        for b in (3, 4)
    ]
    return three and four, "; ".join(parts)


def _clip(metrics: Metrics) -> Verdict:
    both, scale = metrics["kl/3/awq"], metrics["kl/3/awq_scale"]
    return both.value <= scale.value, f"with clipping {both.value:.4f}, scales alone {scale.value:.4f}"


def _never_worse(metrics: Metrics) -> Verdict:
    worst = metrics["search/worst_ratio"].value
    return worst <= 1, f"largest ratio of losses {worst:.3f}, mean {metrics['search/mean_ratio'].value:.3f}"


def _shift(metrics: Metrics) -> Verdict:
    rise = {name: metrics[f"shift_rise/{name}"] for name in ("awq", "gptq")}
    text = "; ".join(f"{name} {metric.value:+.1f} % ({of_seeds(metric, '+.1f')})" for name, metric in rise.items())
    return rise["awq"].value < rise["gptq"].value, f"KL calibrated on another domain over that on its own: {text}"


def _claim(id: str, statement: str, source: str, criterion: str, judge: Callable[[Metrics], Verdict]) -> Claim:
    return Claim(id=id, statement=statement, source=source, criterion=criterion, judge=judge)


CLAIMS: tuple[Claim, ...] = (
    _claim(
        "salient_by_activation",
        "The channels to protect are found by the activations, not by the weights.",
        "table 1",
        "3 bits, one input channel in a hundred of a kernel left unrounded: lower KL when chosen by mean |x| than by "
        "the length of its weights or at random, in every seed",
        _salient,
    ),
    _claim(
        "scaling_protects",
        "Scaling these channels up before rounding protects them, without mixed precision.",
        "table 2",
        "3 bits, one in a hundred: the mean KL is lower at some s > 1 than at s = 1",
        _scaling,
    ),
    _claim(
        "beats_rounding",
        "AWQ loses less than rounding to nearest.",
        "main tables",
        "KL at least 10 % lower at 3 bits and not higher at 4 bits, in every calibration seed",
        _beats_rtn,
    ),
    _claim(
        "clipping_helps",
        "Clipping the largest weights helps further.",
        "the released code; clip search",
        "3 bits: mean KL with both searches at most that of the scales alone",
        _clip,
    ),
    _claim(
        "search_is_safe",
        "The scale search is never worse than rounding on its calibration texts.",
        "alpha = 0 is in the grid",
        "loss of the chosen alpha at most that of alpha = 0, for every unit, layer and seed",
        _never_worse,
    ),
    _claim(
        "less_overfitting",
        "AWQ depends less on the calibration domain than GPTQ, since it fits no regression.",
        "figure on calibration sets",
        "3 bits: the rise of KL when calibrated on another domain is smaller than GPTQ's, in mean",
        _shift,
    ),
)
