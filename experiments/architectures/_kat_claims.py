"""The statements of the KAT paper and how each is judged. Differences are in points of test accuracy."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.measures import of_seeds, with_interval
from mechlab.reporting.results import Claim, Metric

Metrics = Mapping[str, Metric]
Verdict = tuple[bool | None, str]


def _beats_the_mlp(metrics: Metrics) -> Verdict:
    margin = metrics["kat_over/vit"]
    parameters = metrics["parameters/kat"].value / metrics["parameters/vit"].value
    said = f"{with_interval(margin, '+.2f')} points; seeds {of_seeds(margin, '+.2f')}; {parameters:.4f} x parameters"
    return margin.value >= 0 and abs(parameters - 1) <= 0.01, said


def _splines_cost_more(metrics: Metrics) -> Verdict:
    slower, margin = metrics["slowdown/spline"], metrics["kat_over/spline"]
    parameters = metrics["parameters/spline"].value / metrics["parameters/vit"].value
    said = (
        f"{slower.value:.2f} x the MLP's time per step (KAT: {metrics['slowdown/kat'].value:.2f} x); "
        f"KAT is {with_interval(margin, '+.2f')} points better; {parameters:.4f} x parameters"
    )
    return slower.value >= 3 and margin.value >= 0, said


def _variance_is_kept(metrics: Metrics) -> Verdict:
    low, high = (metrics[f"variance/kat/{end}"].value for end in ("min", "max"))
    out_low, out_high = (metrics[f"variance/no_s3/{end}"].value for end in ("min", "max"))
    said = f"with S3 {low:.2f} to {high:.2f}; without {out_low:.2g} to {out_high:.2g}"
    return low >= 0.5 and high <= 2 and (out_low < 0.5 or out_high > 2), said


def _start_trains_better(metrics: Metrics) -> Verdict:
    gap = metrics["loss_over_no_s3/kat"]
    return gap.value <= 0, f"mean training loss {gap.value:+.3f}; seeds {of_seeds(gap, '+.2f')}"


def _groups_suffice(metrics: Metrics) -> Verdict:
    margin = metrics["kat_over/channel"]
    few, many = (metrics[f"coefficients/{arm}"].value for arm in ("kat", "channel"))
    said = f"{with_interval(margin, '+.2f')} points with {few:.0f} for {many:.0f} coefficients"
    return margin.value >= -0.3 and few < many, said


def _start_is_the_vit(metrics: Metrics) -> Verdict:
    apart = metrics["from_vit/apart"]
    said = f"logits differ by at most {apart.value:.1e}; mean {metrics['from_vit/mean_apart'].value:.1e}"
    if "from_vit/apart_wide" in metrics:
        said += f"; with a fit on [-8, 8], {metrics['from_vit/apart_wide'].value:.1e}"
    return apart.value <= 1e-4, said


def _fine_tuning_helps(metrics: Metrics) -> Verdict:
    margin = metrics["from_vit/over_vit"]
    return margin.value >= 0, f"{with_interval(margin, '+.2f')} points; seeds {of_seeds(margin, '+.2f')}"


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="beats_the_mlp",
        statement="At equal size a KAT is more accurate than a vision transformer with GELU MLPs.",
        source="table 3 (1.4 to 2.4 points on ImageNet)",
        criterion="at least as accurate in mean over seeds, with parameters within 1 %",
        judge=_beats_the_mlp,
    ),
    Claim(
        id="splines_cost_more",
        statement="A KAN with B-splines in the MLP's place is much slower at equal size, and no better than a KAT.",
        source="sections 1 and 3",
        criterion="at least 3 times the MLP's time per training step, and KAT at least as accurate in mean",
        judge=_splines_cost_more,
    ),
    Claim(
        id="variance_is_kept",
        statement="Variance-preserving initialisation (S3) keeps activations of the same size through the depth.",
        source="section 4.3",
        criterion="variance of every layer's branch output in [0.5, 2] with S3, and outside it somewhere without",
        judge=_variance_is_kept,
    ),
    Claim(
        id="s3_trains_no_worse",
        statement="Training from S3 goes at least as well as from N(0, 0.02^2).",
        source="section 4.3",
        criterion="mean training loss over all steps not higher, in mean over seeds",
        judge=_start_trains_better,
    ),
    Claim(
        id="groups_suffice",
        statement="Functions shared by groups of channels do as well as one per channel, with fewer coefficients.",
        source="section 4.2",
        criterion="at most 0.3 points below one function per channel, in mean",
        judge=_groups_suffice,
    ),
    Claim(
        id="starts_as_the_vit",
        statement="A KAT started from a trained vision transformer computes what that transformer computes.",
        source="section 4.3",
        criterion="with Swish, all logits of the test images within 1e-4 before training",
        judge=_start_is_the_vit,
    ),
    Claim(
        id="fine_tuning_helps",
        statement="From there, training makes the KAT at least as accurate as training the transformer on.",
        source="table 3 (started from ViT weights)",
        criterion="at least as accurate in mean, after equally many more steps at the same rate",
        judge=_fine_tuning_helps,
    ),
)
