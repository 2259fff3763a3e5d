"""The statements of the WINNER paper and how each is judged. PSNR is the peak over training, in dB."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from mechlab.reporting.results import Claim, Metric

Metrics = Mapping[str, Metric]
Verdict = tuple[bool | None, str]

SIRENS = {"siren": "SIREN", "siren_scaled": "SIREN with ω_1 for the length"}
RIVALS = ("siren", "siren_scaled", "siren_3000", "finer", "finerpp", "gauss", "wire", "relu", "rff")


def _margins(metrics: Metrics, part: str, name: str, arm: str, against: str) -> np.ndarray:
    """Peak PSNR of one arm over another's, seed by seed."""
    ours, theirs = (metrics[f"{part}/{name}/peak/{x}"].per_seed or () for x in (arm, against))
    return np.subtract(ours, theirs)


def _listed(values: Sequence[float] | np.ndarray) -> str:
    return ", ".join(f"{value:+.1f}" for value in values)


def _bottleneck(metrics: Metrics) -> Verdict:
    zero = np.asarray(metrics["signals/high/zero"].per_seed or ())
    observed, stuck = [], True
    for arm, words in SIRENS.items():
        size = metrics[f"signals/high/output/{arm}"]
        over_zero = np.subtract(metrics[f"signals/high/peak/{arm}"].per_seed or (), zero)
        stuck &= max(size.per_seed or ()) < 5 and float(over_zero.max()) <= 0.3
        observed.append(f"{words}: output {size.value:.2f} % of the target, {over_zero.mean():.2f} dB over zero")
    gain = np.min([_margins(metrics, "signals", "high", "winner", arm) for arm in SIRENS], axis=0)
    observed.append(f"WINNER {_listed(gain)} dB over the better SIREN")
    return bool(stuck and gain.min() >= 20), "; ".join(observed)


def _mid_and_pink(metrics: Metrics) -> Verdict:
    observed, holds = [], True
    for name in ("mid", "pink"):
        gain = np.min([_margins(metrics, "signals", name, "winner", arm) for arm in SIRENS], axis=0)
        holds &= bool(gain.min() > 0 and gain.mean() >= 5)
        observed.append(f"{name}: {_listed(gain)} dB")
    return holds, "; ".join(observed)


def _best_in_mean(metrics: Metrics) -> Verdict:
    ours = metrics["signals/mean/peak/winner"].value
    metrics["signals/mean/peak/finerpp"], metrics["signals/mean/peak/rff"]
    theirs = {arm: metrics[f"signals/mean/peak/{arm}"].value for arm in RIVALS if f"signals/mean/peak/{arm}" in metrics}
    best = max(theirs, key=lambda arm: theirs[arm])
    return ours > theirs[best], f"WINNER {ours:.1f} dB; " + ", ".join(f"{a} {x:.1f}" for a, x in theirs.items())


def _low(metrics: Metrics) -> Verdict:
    loss = _margins(metrics, "signals", "low", "siren", "winner")
    return bool(loss.mean() <= 5), f"WINNER {_listed(-loss)} dB against SIREN"


def _ntk(metrics: Metrics) -> Verdict:
    pairs = {x: [metrics[f"ntk/{x}/{arm}"] for arm in ("siren", "winner")] for x in ("energy", "modes")}
    holds = all(
        a < b
        for siren, winner in pairs.values()
        for a, b in zip(siren.per_seed or (), winner.per_seed or (), strict=True)
    )
    (e0, e1), (m0, m1) = (tuple(metric.value for metric in pair) for pair in pairs.values())
    return holds, f"energy in the top tenth {e0:.1f} to {e1:.1f} %; effective modes {m0:.1f} to {m1:.1f}"


def _ntk_monotone(metrics: Metrics) -> Verdict:
    order = ("s0=0", "s0=10", "s0=100", "winner")
    rows = {x: [metrics[f"ntk/{x}/{name}"].value for name in order] for x in ("energy", "modes")}
    holds = all(a <= b for row in rows.values() for a, b in itertools.pairwise(row))
    return holds, "; ".join(f"{x} {', '.join(f'{v:.1f}' for v in row)}" for x, row in rows.items())


def _noise_image(metrics: Metrics) -> Verdict:
    gain = _margins(metrics, "pictures", "noise", "winner", "siren")
    return bool(gain.mean() >= 3), f"{_listed(gain)} dB"


def _natural_image(metrics: Metrics) -> Verdict:
    gain = _margins(metrics, "pictures", "photograph", "winner", "siren")
    return bool(gain.mean() >= 0), f"{_listed(gain)} dB"


def _denoising(metrics: Metrics) -> Verdict:
    names = [x.split("/")[1] for x in metrics if x.startswith("denoise/") and x.endswith("/noisy")]
    if not names:
        return None, "nothing was denoised at this preset"

    def gains(when: str) -> list[float]:
        pairs = ([metrics[f"denoise/{name}/{when}/{arm}"].value for arm in ("winner", "siren")] for name in names)
        return [ours - theirs for ours, theirs in pairs]

    observed = ", ".join(f"{name} {gain:+.1f} dB" for name, gain in zip(names, gains("stopped"), strict=True))
    return bool(np.mean(gains("stopped")) >= 0), f"{observed}; without stopping {_listed(gains('last'))} dB"


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="bottleneck",
        statement="A SIREN collapses to output zero on a signal of high frequencies only, and WINNER fits it.",
        source="abstract; section on the spectral bottleneck",
        criterion="band 0.2 to 0.5, every seed, SIREN with ω_1 = 30 and with the paper's 3000 scaled to the length: "
        "last output below 5 % of the target's rms, peak within 0.3 dB of predicting zero; WINNER at least 20 dB above",
        judge=_bottleneck,
    ),
    Claim(
        id="mid_and_pink",
        statement="WINNER fits broadband audio better than SIREN.",
        source="abstract; table of audio fitting",
        criterion="band 0.05 to 0.3 and pink: above both of these SIRENs in every seed, and by at least 5 dB in mean",
        judge=_mid_and_pink,
    ),
    Claim(
        id="best_in_mean",
        statement="WINNER is the best of the networks at audio fitting.",
        source="abstract (state of the art in audio fitting)",
        criterion="highest mean over the signals, against every other network that ran",
        judge=_best_in_mean,
    ),
    Claim(
        id="low",
        statement="On a signal of low frequencies only little is lost.",
        source="our check: no gain is to be expected there",
        criterion="band 0 to 0.01: at most 5 dB below SIREN, in mean",
        judge=_low,
    ),
    Claim(
        id="ntk",
        statement="Noise moves the target's energy into leading eigenvectors of the tangent kernel, whose eigenvalues "
        "decay more slowly.",
        source="section on the tangent kernel",
        criterion="signal of high frequencies, every seed: more energy than SIREN in the top tenth of eigenvectors, "
        "and more effective modes (Σλ)²/Σλ²",
        judge=_ntk,
    ),
    Claim(
        id="ntk_monotone",
        statement="The noise scale controls the kernel: the stronger the noise, the more.",
        source="section on the tangent kernel",
        criterion="both numbers do not fall from s_0 = 0 over 10 and 100 to that of the rule, in mean; s_1 is that of "
        "the rule throughout",
        judge=_ntk_monotone,
    ),
    Claim(
        id="noise_image",
        statement="WINNER fits an image of noise better than SIREN.",
        source="table of image fitting (noise.png)",
        criterion="at least 3 dB in mean",
        judge=_noise_image,
    ),
    Claim(
        id="natural_image",
        statement="WINNER fits a natural image at least as well as SIREN.",
        source="table of image fitting (camera.png)",
        criterion="a photograph: not below SIREN in mean",
        judge=_natural_image,
    ),
    Claim(
        id="denoising",
        statement="WINNER denoises better than SIREN.",
        source="abstract; section on denoising",
        criterion="at 10 dB, both stopped by held-out samples: PSNR to the clean target not below SIREN's, in mean "
        "over targets",
        judge=_denoising,
    ),
)
