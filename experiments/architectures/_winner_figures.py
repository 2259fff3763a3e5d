"""The figures of the WINNER experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import fft

from mechlab.reporting.canvas import PALETTE, house_style, note
from mechlab.reporting.figures import arm_bars, heat_map

NAMES = {
    "siren": "SIREN",
    "siren_scaled": "SIREN, ω₁ for the length",
    "siren_3000": "SIREN, ω₁ = 3000",
    "winner": "WINNER",
    "winner_scaled": "WINNER for the length",
    "finer": "FINER",
    "finerpp": "FINER++",
    "gauss": "Gauss",
    "wire": "WIRE",
    "relu": "ReLU + encoding",
    "rff": "SIREN + Fourier features",
}
TITLES = {
    "high": "band 0.2 to 0.5",
    "mid": "band 0.05 to 0.3",
    "low": "band 0 to 0.01",
    "band": "band-passed noise",
    "mnist": "handwritten digits",
}
COLOURS = dict(zip(NAMES, (*PALETTE[:6], "#000000", "#8C564B", "#7F7F7F", "#BCBD22", "#9467BD"), strict=True))
TARGET_INK = "#9a9a9a"
FLOOR = 1e-12


def all_figures(seen: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure for which there are numbers, by file name."""
    first = next(iter(seen["signals"]))[0]
    figures = {
        "bottleneck": bottleneck(seen["signals"], "high" if ("high", "siren") in seen["signals"] else first),
        "preactivation_spectra": preactivations(seen["preactivations"]),
        "psnr_over_epochs": psnr_over_epochs(seen["curves"]),
        "psnr_mean": mean_bars(seen["curves"]),
        "psnr_table": psnr_table(seen["curves"]),
        "error_over_epochs": error_over_epochs(seen["signals"]),
    }
    if "ntk" in seen:
        figures["tangent_kernel"] = tangent_kernel(seen["ntk"])
    if "grid" in seen:
        figures["noise_scales"] = noise_scales(**seen["grid"])
    if "pictures" in seen:
        figures["image_errors"] = image_errors(seen["pictures"])
    for name, panel in seen.get("denoise", {}).items():
        figures[f"denoising_{name}"] = denoising(name, panel)
    return figures


@house_style
def bottleneck(runs: Mapping[tuple[str, str], Mapping[str, Any]], target: str) -> Figure:
    """Target and output, a stretch of the waveform on the left and the whole spectrum on the right, an arm a row."""
    arms = [arm for arm in ("siren", "siren_scaled", "winner") if (target, arm) in runs]
    figure = Figure(figsize=(9.6, 2.1 * len(arms) + 0.9), dpi=150, layout="constrained")
    grid = figure.subplots(len(arms), 2, sharex="col", sharey="col", squeeze=False, width_ratios=(1.25, 1))
    for row, arm in zip(grid, arms, strict=True):
        y, output = runs[target, arm]["y"], runs[target, arm]["output"]
        middle = slice(len(y) // 2, len(y) // 2 + 80)
        size = 100 * np.sqrt(np.square(output).mean() / np.square(y).mean())
        shown = ((y[middle], output[middle]), (amplitude(y), amplitude(output)))
        for axes, (wanted, found) in zip(row, shown, strict=True):
            axes.plot(wanted, color=TARGET_INK, linewidth=3.2, label="target")
            axes.plot(found, color=COLOURS[arm], linewidth=1.4, label="output")
        row[0].set_title(f"{NAMES[arm]}: output {size:.3g} % of target", loc="left", fontsize=12)
        row[0].set_ylabel("amplitude")
        row[1].set_ylabel("|spectrum| (smoothed)")
        row[1].legend(loc="upper left")
    _frequency_ticks(grid[-1][1], len(amplitude(y)))
    grid[-1][0].set_xlabel("sample, from the middle of the signal")
    note(figure, "after training, seed 0")
    return figure


@house_style
def preactivations(seen: Mapping[str, Any]) -> Figure:
    """Power of the units of every layer by frequency, before training, with the target's."""
    figure = Figure(figsize=(9.6, 4.4), dpi=150, layout="constrained")
    for axes, arm in zip(figure.subplots(1, 2, sharey=True), ("siren", "winner"), strict=True):
        target = smooth(np.abs(fft.rfft(seen["y"])) ** 2)
        axes.fill_between(range(len(target)), FLOOR, target / target.max() * 10, color="#dcdcdc", label="target")
        layers = seen[arm][:-1]
        for i, power in enumerate(layers):
            axes.plot(smooth(power), color=PALETTE[i % len(PALETTE)], linewidth=1.6, label=f"layer {i + 1}")
        axes.set(yscale="log", ylim=(FLOOR, 1e4))
        axes.set_title(NAMES[arm], loc="left")
        _frequency_ticks(axes, len(target))
        if arm == "siren":
            axes.set_ylabel("power of ωz, mean over units (rad²)")
        else:
            axes.legend(loc="upper right", ncols=2)
    title = TITLES.get(seen["target"], seen["target"])
    note(figure, f"before training, seed 0; target ({title}) scaled to fit")
    return figure


@house_style
def psnr_over_epochs(curves: Mapping[tuple[str, str], np.ndarray]) -> Figure:
    """PSNR against epochs, a panel a signal, a colour an arm; the band runs from the lowest to the highest seed."""
    targets, arms = _cells(curves)
    columns = min(2, len(targets))
    rows = -(-len(targets) // columns)
    figure = Figure(figsize=(5.2 * columns + 1.2, 3.0 * rows + 1.4), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for axes in grid.flat[len(targets) :]:
        axes.set_visible(False)
    for axes, target in zip(grid.flat, targets, strict=False):
        for arm in arms:
            curve = curves[target, arm]
            epochs = range(curve.shape[1])
            axes.plot(epochs, curve.mean(0), color=COLOURS[arm], label=NAMES[arm], linewidth=1.8)
            axes.fill_between(epochs, curve.min(0), curve.max(0), color=COLOURS[arm], alpha=0.18, linewidth=0)
        axes.set_title(TITLES.get(target, target), loc="left")
        axes.margins(x=0.01)
    for axes in grid[:, 0]:
        axes.set_ylabel("PSNR (dB)")
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    note(figure, f"line: mean of {len(curve)} seeds; band: smallest to largest")
    return figure


def mean_bars(curves: Mapping[tuple[str, str], np.ndarray]) -> Figure:
    """Peak PSNR of every arm, mean over signals."""
    targets, arms = _cells(curves)
    means = {NAMES[arm]: np.mean([curves[target, arm].max(1) for target in targets], axis=0) for arm in arms}
    return arm_bars(means, ylabel=f"peak PSNR, mean over {len(targets)} signals (dB)")


def psnr_table(curves: Mapping[tuple[str, str], np.ndarray]) -> Figure:
    """Peak PSNR by signal and arm, mean over seeds."""
    targets, arms = _cells(curves)
    table = [[curves[target, arm].max(1).mean() for target in targets] for arm in arms]
    return heat_map(
        table,
        xlabel="signal",
        ylabel="network",
        colour_label="peak PSNR (dB)",
        row_labels=[NAMES[arm] for arm in arms],
        column_labels=[TITLES.get(target, target) for target in targets],
        annotate=True,
    )


@house_style
def error_over_epochs(runs: Mapping[tuple[str, str], Mapping[str, Any]]) -> Figure:
    """Which frequencies are learnt when: error in each band relative to the target's power there, seed 0."""
    targets = list(dict.fromkeys(target for target, _ in runs))
    target = "pink" if "pink" in targets else targets[0]
    figure = Figure(figsize=(9.6, 4.0), dpi=150, layout="constrained")
    arms = ("siren", "winner")
    grid = figure.subplots(1, 2, sharey=True)
    for axes, arm in zip(grid, arms, strict=True):
        decibels = 10 * np.log10(np.maximum(runs[target, arm]["bands"], FLOOR))
        extent = (0, len(decibels), 0, 0.5)
        image = axes.imshow(decibels.T, origin="lower", aspect="auto", extent=extent, cmap="RdBu_r", vmin=-40, vmax=40)
        axes.grid(visible=False)
        axes.set_title(NAMES[arm], loc="left")
        axes.set_xlabel("epoch")
    grid[0].set_ylabel("frequency (cycles per sample)")
    figure.colorbar(image, ax=grid, label="error over target (dB)")
    note(figure, f"{TITLES.get(target, target)}, seed 0; white: error as large as the target")
    return figure


@house_style
def tangent_kernel(seen: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Eigenvalues, frequencies of the eigenvectors, and the target's energy in them, over s_0 and over s_1."""
    figure = Figure(figsize=(12.6, 7.4), dpi=150, layout="constrained")
    grid = figure.subplots(2, 3, sharex=True)
    for row, scale in zip(grid, ("s0", "s1"), strict=True):
        names = ["siren", *(name for name in seen if name.startswith(scale)), "winner"]
        symbol = {"s0": "s₀", "s1": "s₁"}[scale]
        other = {"s0": "s₁", "s1": "s₀"}[scale]
        for i, name in enumerate(names):
            one = seen[name]
            label = NAMES.get(name, f"{symbol} = {name[3:]}, {other} of the rule")
            style: dict[str, Any] = {"color": PALETTE[i % len(PALETTE)], "label": label, "linewidth": 1.8}
            share = (np.arange(len(one["eigenvalues"])) + 1) / len(one["eigenvalues"])
            row[0].plot(share, np.maximum(one["eigenvalues"] / one["eigenvalues"][0], 1e-9), **style)
            row[1].plot(share, smooth(one["centroids"], 5), **style)
            row[2].plot(share, 100 * one["energy"], **style)
        row[0].set(yscale="log", ylabel="eigenvalue / largest")
        row[1].set(ylabel="centroid of the eigenvector", ylim=(0, 1))
        row[2].set(ylabel="target energy so far (%)", ylim=(0, 102))
        row[2].legend(loc="lower right" if scale == "s0" else "upper left", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("eigenvectors, by eigenvalue (share)")
    note(figure, "before training, seed 0; centroid 1 is the highest frequency")
    return figure


def noise_scales(table: np.ndarray, rule: list[float], config: Any) -> Figure:
    """Peak PSNR over both noise scales."""
    return heat_map(
        table,
        xlabel="s₁",
        ylabel="s₀",
        colour_label="peak PSNR (dB)",
        row_labels=[f"{x:g}" for x in config.grid_s0],
        column_labels=[f"{x:g}" for x in config.grid_s1],
        title=f"{TITLES.get(config.grid_signal, config.grid_signal)}; the rule: ({rule[0]:.0f}, {rule[1]:.1f})",
        annotate=True,
    )


@house_style
def image_errors(seen: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Target, outputs, and the spectrum of the errors of SIREN and WINNER; an image a row."""
    figure = Figure(figsize=(11.6, 2.5 * len(seen) + 0.7), dpi=150, layout="constrained")
    grid = figure.subplots(len(seen), 5, squeeze=False)
    for row, (name, one) in zip(grid, seen.items(), strict=True):
        errors = {arm: np.abs(fft.fftshift(fft.fft2(one[arm] - one["y"]))) for arm in ("siren", "winner")}
        high = float(np.log10(np.maximum(errors["siren"], FLOOR)).max())
        shown = {"target": one["y"], "SIREN": one["siren"], "WINNER": one["winner"]}
        for axes, (title, image) in zip(row, shown.items(), strict=False):
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(title, fontsize=12)
        for axes, arm in zip(row[3:], errors, strict=True):
            decades = np.log10(np.maximum(errors[arm], FLOOR))
            extent = (-0.5, 0.5, -0.5, 0.5)
            heat = axes.imshow(decades, cmap="viridis", vmin=high - 3, vmax=high, extent=extent)
            axes.set_title(f"error of {NAMES[arm]}", fontsize=12)
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
        row[0].set_ylabel(TITLES.get(name, name))
        figure.colorbar(heat, ax=row[3:], label="log10 |spectrum|", shrink=0.9)
    note(figure, "after training, seed 0; errors by frequency, zero in the middle")
    return figure


@house_style
def denoising(name: str, seen: Mapping[str, Any]) -> Figure:
    """Clean, noisy and denoised, and PSNR to the clean target over epochs with the time of stopping."""
    arms = [arm for arm in NAMES if arm in seen]
    flat = len(seen["shape"]) == 1
    figure = Figure(figsize=(11.0, 6.4), dpi=150, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    upper, lower = parts
    shown = {"clean": seen["clean"], "noisy": seen["noisy"]}
    shown |= {NAMES[arm]: seen[arm]["output"] for arm in ("siren", "winner") if arm in seen}
    for axes, (title, values) in zip(upper.subplots(1, len(shown), sharey=flat), shown.items(), strict=True):
        if flat:
            loudest = int(np.argmax(np.convolve(seen["clean"] ** 2, np.ones(100), "valid")))
            axes.plot(seen["clean"][loudest : loudest + 100], color=TARGET_INK, linewidth=2.6)
            if title != "clean":
                axes.plot(values[loudest : loudest + 100], color="#000000", linewidth=1.2)
            axes.set_xlabel("sample")
        else:
            axes.imshow(values.reshape(seen["shape"]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
        axes.set_title(title, fontsize=12)
    axes = lower.subplots()
    for arm in arms:
        curve = seen[arm]["curve"]
        axes.plot(curve.mean(0), color=COLOURS[arm], label=NAMES[arm])
        epochs = range(curve.shape[1])
        axes.fill_between(epochs, curve.min(0), curve.max(0), color=COLOURS[arm], alpha=0.18, linewidth=0)
        axes.plot(seen[arm]["stop"], curve[0, seen[arm]["stop"]], "o", color=COLOURS[arm], markeredgecolor="white")
    noise = float(np.square(seen["noisy"] - seen["clean"]).mean())
    level = 10 * np.log10((2.0 if flat else 1.0) ** 2 / noise)
    axes.axhline(level, color="black", linestyle="--", linewidth=1.4, label="the noisy target")
    axes.set(xlabel="epoch", ylabel="PSNR to the clean target (dB)")
    axes.margins(x=0.01)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    seeds = len(curve)
    band = f"line: mean of {seeds} seeds; band: smallest to largest"
    note(lower, f"{name}; {band}; dot: stopped by held-out samples, seed 0, as above")
    return figure


def amplitude(y: np.ndarray) -> np.ndarray:
    """|rFFT| scaled to amplitudes, smoothed."""
    return smooth(np.abs(fft.rfft(y)) * 2 / len(y))


def smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """A running mean, shorter at the ends."""
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _frequency_ticks(axes: Axes, count: int) -> None:
    axes.set_xticks(np.linspace(0, count - 1, 6), [f"{f:g}" for f in np.linspace(0, 0.5, 6).round(1)])
    axes.set_xlabel("frequency (cycles per sample)")


def _cells(curves: Mapping[tuple[str, str], Any]) -> tuple[list[str], list[str]]:
    """Targets in their order, arms in the order of ``NAMES``."""
    return list(dict.fromkeys(t for t, _ in curves)), [arm for arm in NAMES if any(a == arm for _, a in curves)]
