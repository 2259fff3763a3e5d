"""The statements of the paper on emotion probes, and how each is judged. Differences are in points of accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from experiments.measures import with_interval
from mechlab.data.worlds.tales.moods import MOODS
from mechlab.reporting.results import Claim, Metric

Metrics = Mapping[str, Metric]
Verdict = tuple[bool | None, str]


def _scenarios(metrics: Metrics) -> Verdict:
    probe, embed = metrics["accuracy/emotions/probe"], metrics["over_embed/emotions"]
    random, words = metrics["over_random/emotions"], metrics["accuracy/emotions/words"]
    holds = probe.value >= 42 and embed.value >= 15 and random.value >= 10
    return holds, (
        f"{with_interval(probe)} %; {with_interval(embed)} points over the embedding, "
        f"{with_interval(random)} over random weights; "
        f"TF-IDF of words {words.value:.1f} %"
    )


def _depth(subject: str) -> Callable[[Metrics], Verdict]:
    def judge(metrics: Metrics) -> Verdict:
        depth, layers, peak = (metrics[f"{name}/{subject}"] for name in ("depth", "layers", "peak"))
        holds = depth.value > 0
        return holds, (
            f"chosen on dev: {depth.value:.0f} of {layers.value:.0f}; largest on test at {peak.value:.2f} of the depth "
            f"[{peak.ci95[0]:.2f}, {peak.ci95[1]:.2f}]"  # type: ignore[index]
        )

    return judge


def _middle(metrics: Metrics) -> Verdict:
    peaks = {name: metrics[f"peak/{name}"] for name in ("emotions", "tales")}
    holds = all(peak.ci95 is not None and peak.ci95[1] < 1 for peak in peaks.values())
    return holds, "; ".join(
        f"{name}: {peak.value:.2f} [{peak.ci95[0]:.2f}, {peak.ci95[1]:.2f}]"  # type: ignore[index]
        for name, peak in peaks.items()
    )


def _asked(subject: str) -> Callable[[Metrics], Verdict]:
    def judge(metrics: Metrics) -> Verdict:
        plain, calibrated = (metrics[f"over_{name}/{subject}"] for name in ("zero_shot", "calibrated"))
        few = metrics[f"accuracy/{subject}/few_shot"]
        holds = plain.value >= 10 and calibrated.value >= 10
        return (
            holds,
            f"{with_interval(plain)} over plain, {with_interval(calibrated)} over calibrated; "
            f"few-shot {few.value:.1f} %",
        )

    return judge


def _scale(metrics: Metrics) -> Verdict:
    sizes = [size for size in ("S", "M", "L") if f"scale/accuracy/{size}" in metrics]
    if len(sizes) < 2:
        return None, "one size only"
    accuracy, fisher = ([metrics[f"scale/{name}/{size}"].value for size in sizes] for name in ("accuracy", "fisher"))
    holds = accuracy[-1] > accuracy[0] and fisher[-1] > fisher[0]
    return holds, "; ".join(
        f"{size}: {a:.1f} %, Fisher ratio {f:.3f}" for size, a, f in zip(sizes, accuracy, fisher, strict=True)
    )


def _malleable(metrics: Metrics) -> Verdict:
    shifts = {mood: metrics[f"shift/tales/{mood}"].value for mood in MOODS if mood != "neutral"}
    return sum(x > 0 for x in shifts.values()) >= 5, ", ".join(f"{mood} {x:+.3f}" for mood, x in shifts.items())


def _persistent(metrics: Metrics) -> Verdict:
    late, early = metrics["persistence/tales/over_shuffled"], metrics["persistence/tales/early_probe"]
    assert late.ci95 is not None
    return late.ci95[0] > 0, (
        f"{with_interval(late)} points over shuffled pairs "
        f"after {metrics['persistence/tales/offset'].value:.0f} tokens; "
        f"the probe of p = 0 there: {early.value:.1f} %"
    )


def _selective(metrics: Metrics) -> Verdict:
    found = {name: metrics[f"selectivity/{name}"] for name in ("emotions", "tales") if f"selectivity/{name}" in metrics}
    if len(found) < 2:
        return None, "needs both subjects"
    mixed, mixed_control = (metrics[f"accuracy/tales/{name}"].value for name in ("ungrouped", "ungrouped_control"))
    return all(metric.value >= 10 for metric in found.values()), (
        "; ".join(f"{name} {with_interval(metric)}" for name, metric in found.items())
        + f"; tales, cues in both parts: {mixed:.1f} %, control {mixed_control:.1f} %"
    )


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="scenarios",
        statement="Probes read emotions in real text from the states of a small trained model.",
        source="abstract; section on layer-wise probing",
        criterion="stories260K, last token, depth chosen on dev: at least 42 %, 15 points over the embedding, 10 over "
        "random weights",
        judge=_scenarios,
    ),
    Claim(
        id="not_in_the_embedding",
        statement="The emotion is made by the network (emotions, stories260K).",
        source="layer figure",
        criterion="the best depth on dev texts is not the embedding",
        judge=_depth("emotions"),
    ),
    Claim(
        id="not_in_the_embedding_tales",
        statement="The emotion is made by the network (tales).",
        source="layer figure",
        criterion="the best depth on dev texts is not the embedding",
        judge=_depth("tales"),
    ),
    Claim(
        id="peaks_before_the_end",
        statement="The signal peaks mid-network, not at the last layer.",
        source="abstract; layer figure",
        criterion="on both subjects, the bootstrap interval of the best depth on test texts ends before the last layer",
        judge=_middle,
    ),
    Claim(
        id="beats_prompting",
        statement="Probes clearly beat zero-shot prompting of the same model (emotions, stories260K).",
        source="comparison with prompting",
        criterion="at least 10 points over the plain and over the calibrated prompt",
        judge=_asked("emotions"),
    ),
    Claim(
        id="beats_prompting_tales",
        statement="Probes clearly beat zero-shot prompting of the same model (tales).",
        source="comparison with prompting",
        criterion="at least 10 points over the plain and over the calibrated prompt",
        judge=_asked("tales"),
    ),
    Claim(
        id="scale",
        statement="The geometry of emotions sharpens with the size of the model.",
        source="scale figure",
        criterion="at the depths chosen on dev, mean over probe seeds: accuracy and Fisher ratio of the largest model "
        "are above those of the smallest",
        judge=_scale,
    ),
    Claim(
        id="malleable",
        statement="A system prompt moves the emotion that is read in neutral text.",
        source="system-prompt figure",
        criterion="behind at least 5 of 6 instructions of tales, the mean probability of the mood asked for rises "
        "against no instruction",
        judge=_malleable,
    ),
    Claim(
        id="persistent",
        statement="The initial tone stays detectable for hundreds of tokens.",
        source="persistence figure",
        criterion="tales, about 100 tokens of neutral filler later, a probe trained on such places: the 95 % interval "
        "of its accuracy less that on shuffled pairs lies above 0",
        judge=_persistent,
    ),
    Claim(
        id="selective",
        statement="The probe reads emotion, not whatever can be learned from the states.",
        source="our control; Hewitt and Liang 2019",
        criterion="accuracy less that of the control task is at least 10 points on both subjects, texts grouped by cue",
        judge=_selective,
    ),
)
