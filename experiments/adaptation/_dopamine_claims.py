"""The statements of the Dopamine paper and how each is judged. Differences are in points of test accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from experiments.measures import every_seed, of_seeds
from mechlab.reporting.results import Claim, Metric

Metrics = Mapping[str, Metric]
Verdict = tuple[bool | None, str]


def _beats_frozen(name: str) -> Callable[[Metrics], Verdict]:
    def judge(metrics: Metrics) -> Verdict:
        gain = metrics[f"gain/mixed/{name}"]
        holds = every_seed(gain, lambda x: x > 0) and gain.value >= 0.8
        return holds, f"{gain.value:+.2f} points; seeds {of_seeds(gain, '+.2f')}"

    return judge


def _lora_wins(metrics: Metrics) -> Verdict:
    own = metrics["trainable/taugate"].value
    compared = [
        (rank, metrics[f"over_taugate/mixed/lora_{rank}"]) for rank in (4, 8) if rank == 4 or _has_rank_8(metrics)
    ]
    ratios = {rank: metrics[f"trainable/lora_{rank}"].value / own for rank, _ in compared}
    holds = any(margin.value >= 0 and ratios[rank] >= 5 for rank, margin in compared)
    return holds, "; ".join(f"r={rank}: {m.value:+.2f} points, {ratios[rank]:.1f}x parameters" for rank, m in compared)


def _has_rank_8(metrics: Metrics) -> bool:
    return "over_taugate/mixed/lora_8" in metrics


def _hardens(metrics: Metrics) -> Verdict:
    loss = metrics["hardening/mixed/taugate"]
    return loss.value <= 1.0, f"{loss.value:.2f} points lost; seeds {of_seeds(loss, '+.2f')}"


def _counts(metrics: Metrics) -> Verdict:
    trained, units = metrics["trainable/taugate"].value, metrics["gate_units"].value
    changed = metrics["base_changed"].value
    return (
        trained == 2 * units and changed == 0,
        f"{trained:.0f} trained, {units:.0f} units, {changed:.0f} weights changed",
    )


def _minority(metrics: Metrics) -> Verdict:
    half, strong, relu = (metrics[f"activity/taugate/{x}"].value for x in ("pairs_half", "pairs_strong", "relu"))
    return half < 50, f"g > 0.5: {half:.1f} %, g > 0.9: {strong:.1f} %, ReLU alone: {relu:.1f} % of pairs"


def _sparse(metrics: Metrics) -> Verdict:
    strong = metrics["activity/sparse/pairs_strong"]
    better, gain = _beats_frozen("sparse")(metrics)
    return bool(strong.value < 45 and better), f"g > 0.9: {strong.value:.1f} % of pairs; against frozen {gain}"


def _limitation(metrics: Metrics) -> Verdict:
    mixed, upright = (metrics[f"over_taugate/{base}/lora_8"] for base in ("mixed", "upright"))
    pairs = list(zip(mixed.per_seed or (), upright.per_seed or (), strict=True))
    return all(b > a for a, b in pairs), f"gap {mixed.value:.2f} on the mixed base, {upright.value:.2f} on upright only"


def _forgets_less(metrics: Metrics) -> Verdict:
    gate, lora = metrics["forgetting/mixed/taugate"], metrics["forgetting/mixed/lora_4"]
    return gate.value < lora.value, f"TauGate {gate.value:.2f}, LoRA r=4 {lora.value:.2f} points lost upright"


def _causal(metrics: Metrics) -> Verdict:
    top, random = metrics["closing/attributed"], metrics["closing/random"]
    pairs = zip(top.per_seed or (), random.per_seed or (), strict=True)
    return all(a > b for a, b in pairs), f"logit falls by {top.value:.2f} (attributed), {random.value:.2f} (random)"


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="beats_frozen",
        statement="TauGate is more accurate on the rotated mode than the frozen foundation, across seeds.",
        source="abstract",
        criterion="every seed above the frozen base, and a mean margin of at least 0.8 points",
        judge=_beats_frozen("taugate"),
    ),
    Claim(
        id="lora_more_accurate",
        statement="LoRA is more accurate, TauGate has far fewer parameters.",
        source="abstract",
        criterion="LoRA of rank 4 or 8 at least as accurate in mean, with at least 5 times the parameters",
        judge=_lora_wins,
    ),
    Claim(
        id="hardening",
        statement="Gates trained soft can be used hard.",
        source="method (soft gate in training, hard gate at inference)",
        criterion="hard gates lose at most 1.0 point in mean",
        judge=_hardens,
    ),
    Claim(
        id="few_parameters",
        statement="Only a threshold and a gain per hidden unit are trained.",
        source="abstract",
        criterion="exactly 2 numbers per hidden unit, and no weight of the base changed by a bit",
        judge=_counts,
    ),
    Claim(
        id="minority_active",
        statement="Only a minority of units is strongly active.",
        source="abstract",
        criterion="without a penalty, fewer than half of all (sample, unit) pairs have g > 0.5",
        judge=_minority,
    ),
    Claim(
        id="sparse_minority",
        statement="With a gate penalty of 0.2 a minority of units is strongly active and the gain stays.",
        source="our reading of the sparsity claim, with a penalty",
        criterion="fewer than 45 % of pairs with g > 0.9, while beats_frozen holds for the sparse gates",
        judge=_sparse,
    ),
    Claim(
        id="limitation",
        statement="TauGate does not catch up where the frozen base lacks the features of the target mode.",
        source="abstract",
        criterion="in every seed, LoRA r=8 leads TauGate by more on the upright-only base than on the mixed base",
        judge=_limitation,
    ),
    Claim(
        id="forgetting",
        statement="TauGate disturbs the mode it came from less than LoRA does.",
        source="our check of the frozen base's purpose",
        criterion="smaller loss of upright accuracy than LoRA r=4, in mean",
        judge=_forgets_less,
    ),
    Claim(
        id="causal_attribution",
        statement="The units attributed to a prediction carry it.",
        source="attribution by unit, checked causally",
        criterion="in every seed, closing the top units lowers the predicted logit more than closing random open ones",
        judge=_causal,
    ),
)
