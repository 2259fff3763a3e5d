"""The statements of the Bone paper and how each is judged. "Final" is the mean training loss of the last tenth."""

from __future__ import annotations

from collections.abc import Mapping

from mechlab.reporting.results import Claim, Metric

Metrics = Mapping[str, Metric]
Verdict = tuple[bool | None, str]

VARIANTS = ("loraplus", "olora", "pissa", "lora_ga")
TIMED = ("pissa", "lora_ga")


def tasks_of(metrics: Metrics) -> list[str]:
    """The tasks that were run, by the metrics they left."""
    return [name.split("/")[1] for name in metrics if name.startswith("final/") and name.endswith("/bone_col")]


def _margin(metrics: Metrics, task: str, arm: str) -> Metric:
    return metrics[f"over_bone/{task}/{arm}"]


def _matched(metrics: Metrics) -> Verdict:
    adapters = ("lora", *VARIANTS, "miss", "guide_only")
    far, said = [], []
    for task in tasks_of(metrics):
        bone = metrics[f"trained/{task}/bone_col"].value
        counts = {arm: metrics[f"trained/{task}/{arm}"].value for arm in adapters if f"trained/{task}/{arm}" in metrics}
        far += [arm for arm, count in counts.items() if not 0.9 * bone <= count <= 1.1 * bone]
        said.append(f"{task}: Bone-col {bone:.0f}, LoRA {counts['lora']:.0f}")
    return not far, "; ".join(said) + (f"; beyond 10 %: {', '.join(far)}" if far else "")


def _beats_lora(metrics: Metrics) -> Verdict:
    margins = {task: _margin(metrics, task, "lora") for task in tasks_of(metrics)}
    holds = all(value > 0 for margin in margins.values() for value in margin.per_seed or ())
    said = (
        f"{t}: {m.value:+.4f} (seeds {', '.join(f'{x:+.4f}' for x in m.per_seed or ())})" for t, m in margins.items()
    )
    return holds, "LoRA over Bone-col, " + "; ".join(said)


def _beats_variants(metrics: Metrics) -> Verdict:
    margins = {(task, arm): _margin(metrics, task, arm) for task in tasks_of(metrics) for arm in VARIANTS}
    said = (f"{task} {arm} {margin.value:+.4f}" for (task, arm), margin in margins.items())
    return all(margin.value > 0 for margin in margins.values()), "over Bone-col: " + ", ".join(said)


def _fewer_steps(metrics: Metrics) -> Verdict:
    shares = {task: metrics[f"steps_to_lora/{task}"] for task in tasks_of(metrics)}
    said = (f"{task}: {share.value:.0f} %" for task, share in shares.items())
    return all(share.value <= 70 for share in shares.values()), "of LoRA's steps, " + "; ".join(said)


def _guide(metrics: Metrics) -> Verdict:
    tasks = tasks_of(metrics)
    finals = {t: [metrics[f"final/{t}/{a}"].value for a in ("bone_col", "miss", "guide_only")] for t in tasks}
    said = (f"{t}: Bone-col {x:.4f}, no guide {y:.4f}, guide only {z:.4f}" for t, (x, y, z) in finals.items())
    return all(x < min(y, z) for x, y, z in finals.values()), "; ".join(said)


def _exact_start(metrics: Metrics) -> Verdict:
    found = {name.split("/")[2]: metric.value for name, metric in metrics.items() if name.startswith("start/")}
    worst = max(found, key=lambda name: found[name])
    return found[worst] <= 1e-5, f"largest {found[worst]:.1e} ({worst}), of {len(found)} methods"


def _start_up(metrics: Metrics) -> Verdict:
    holds, said = True, []
    for task in tasks_of(metrics):
        bone, plain = (metrics[f"start_up/{task}/{arm}"].value for arm in ("bone_col", "lora"))
        slow = {arm: metrics[f"start_up/{task}/{arm}"].value for arm in TIMED if f"start_up/{task}/{arm}" in metrics}
        holds &= bone <= 1.5 * plain and all(bone < value for value in slow.values())
        times = {"Bone-col": bone, "LoRA": plain, **slow}
        said.append(f"{task}: " + ", ".join(f"{name} {value:.2f} ms" for name, value in times.items()))
    return holds, "; ".join(said)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="matched",
        statement="The comparison is at an equal number of trained numbers.",
        source="table 1 (87.0 M against 89.9 M)",
        criterion="every low-rank and block method within 10 % of Bone-col, on every task",
        judge=_matched,
    ),
    Claim(
        id="beats_lora",
        statement="Bone fits better than LoRA.",
        source="abstract; loss curves",
        criterion="lower final training loss in every seed, on every task, each method at its own best rate",
        judge=_beats_lora,
    ),
    Claim(
        id="beats_variants",
        statement="Bone fits better than LoRA's variants LoRA+, OLoRA, PiSSA and LoRA-GA.",
        source="abstract; table 1",
        criterion="lower final training loss in mean over seeds than each of the four, on every task",
        judge=_beats_variants,
    ),
    Claim(
        id="fewer_steps",
        statement="Bone converges faster than LoRA.",
        source="abstract; loss curves",
        criterion="reaches LoRA's final loss in at most 70 % of LoRA's steps, in mean over seeds, on every task",
        judge=_fewer_steps,
    ),
    Claim(
        id="guide_helps",
        statement="Guiding the trained matrix by the weight helps.",
        source="section on weight guide (the author's later versions drop it)",
        criterion="Bone-col has a lower final loss than both the unguided and the guide-only form, in mean over seeds",
        judge=_guide,
    ),
    Claim(
        id="exact_start",
        statement="Training starts exactly from the base model.",
        source="method (zero initialisation; residual weights of PiSSA, OLoRA, LoRA-GA)",
        criterion="outputs differ from the base's by at most 1e-5 before the first step, for every method",
        judge=_exact_start,
    ),
    Claim(
        id="start_up",
        statement="Bone needs no costly initialisation.",
        source="introduction (no SVD, no QR, no gradients)",
        criterion="median time to make the state at most 1.5 times LoRA's and below PiSSA's and LoRA-GA's",
        judge=_start_up,
    ),
)
