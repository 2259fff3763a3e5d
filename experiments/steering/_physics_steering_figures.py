"""The figures of the experiment: films and strips, dose curves, read-outs by direction, layers, training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.steering import _physics_steering_measures as measures
from experiments.steering import _physics_steering_worlds as worlds
from mechlab.data.worlds.flows import INTERVAL, vorticity
from mechlab.methods.steering.physics_steering import cross_stream_energy
from mechlab.reporting.canvas import MARKERS, PALETTE, canvas, house_style, label_axes, legend, note
from mechlab.reporting.figures import arm_bars, curve_band, heat_map
from mechlab.reporting.films import Film, film, strip
from mechlab.reporting.results import Metric

ALPHA = "strength α = |patch| / |state|"
NAMES = {
    "shear_vorticity": "vorticity (shear)",
    "shear_speed": "speed (shear)",
    "shear_diffusion": "diffusion (shear)",
    "advect_speed": "speed (advect)",
    "advect_diffusion": "diffusion (advect)",
    "shear_diffusion@alone": "diffusion (shear) without speed",
    "advect_diffusion@alone": "diffusion (advect) without speed",
}
READOUTS = {
    "ev": "log E_v",
    "enstrophy": "log enstrophy",
    "rough": "log roughness",
    "c_eff": "speed c_eff",
    "d_eff": "diffusivity D_eff",
}


def all_figures(config: Any, metrics: Mapping[str, Metric], drawn: Mapping[str, Any]) -> dict[str, Figure | Film]:
    """Every figure by file name."""
    seen: measures.Outcomes = drawn["seen"]
    figures: dict[str, Figure | Film] = {
        "dose_energy": dose(seen, "ev", "E_v at the end, relative to α = 0"),
        "dose_speed": dose(seen, "c_eff", "c_eff, relative to α = 0"),
    }
    if not config.controls:
        return figures
    if "advect_diffusion@alone" in seen.outcome:
        names = ["advect_diffusion", "advect_diffusion@alone", "shear_diffusion"]
        figures["dose_diffusion"] = dose(seen, "d_eff", "D_eff, relative to α = 0", names)
    figures["matrix"] = matrix(metrics)
    figures["controls"] = controls(metrics)
    figures["layers"] = layers(config, metrics)
    figures["training"] = training(config, metrics, drawn["times"])
    return figures | moving(config, drawn["films"])


@house_style
def dose(seen: measures.Outcomes, what: str, ylabel: str, names: Sequence[str] | None = None) -> Figure:
    """A read-out against alpha: every draw, their mean, and the range of the random directions."""
    figure, axes = canvas(title="")
    label_axes(axes, xlabel=ALPHA, ylabel=ylabel)
    if "random" in seen.outcome:
        alphas, random = seen.alphas("random"), seen.curve("random", what)
        random = random / random[:, [alphas.index(0.0)]]
        axes.fill_between(alphas, random.min(0), random.max(0), color="0.6", alpha=0.35, linewidth=0)
        axes.plot([], [], color="0.6", linewidth=8, alpha=0.5, label=f"{len(random)} random directions")
    for index, name in enumerate(names or [name for name in NAMES if name in seen.outcome and "@" not in name]):
        alphas, curve = seen.alphas(name), seen.curve(name, what)
        curve = curve / curve[:, [alphas.index(0.0)]]
        colour = PALETTE[index % len(PALETTE)]
        axes.plot(alphas, curve.T, color=colour, alpha=0.3, linewidth=1)
        axes.plot(
            alphas, curve.mean(0), color=colour, marker=MARKERS[index % len(MARKERS)], markersize=5, label=NAMES[name]
        )
    if what in measures.POSITIVE:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.margins(x=0.02)
    legend(axes)
    note(figure, "thick: mean of draws; thin: one draw; grey: range of random directions")
    return figure


def matrix(metrics: Mapping[str, Metric]) -> Figure:
    """Concept by read-out: the relative change per unit of alpha, and the largest of the random directions."""
    names = [name for name in NAMES if f"ev/slope/{name}" in metrics]
    table = [[_value(metrics, f"{what}/slope/{name}") for what in READOUTS] for name in names]
    random = [metrics.get(f"{what}/slope/random") for what in READOUTS]
    table.append([np.nan if one is None else max(map(abs, one.per_seed or (one.value,))) for one in random])
    return heat_map(
        np.round(table, 1) + 0.0,
        xlabel="read-out",
        ylabel="direction",
        colour_label="relative change per unit of α",
        diverging=True,
        row_labels=[*(NAMES[name] for name in names), "largest |random|"],
        column_labels=list(READOUTS.values()),
        annotate=True,
    )


def controls(metrics: Mapping[str, Metric]) -> Figure:
    """The logarithm of E_v(+0.2) / E_v(-0.2) of each direction beside its controls."""
    arms: dict[str, Any] = {}
    for name in ("shear_vorticity", "shear_speed", "advect_speed"):
        for label, suffix in (
            ("", ""),
            (", unmatched pairs", "@unmatched"),
            (", pad", "@pad"),
            (", shuffled labels", "@shuffled"),
            (", output space", "@output"),
            (", untrained", "@0"),
        ):
            metric = metrics.get(f"ev/ratio/{name}{suffix}")
            if metric is not None and metric.per_seed is not None:
                arms[NAMES[name] + label] = np.log(metric.per_seed)
    if "ev/ratio/random" in metrics:
        arms["random directions"] = np.log(metrics["ev/ratio/random"].per_seed or (1.0,))
    return arm_bars(arms, ylabel="log E_v(+0.2) / E_v(-0.2)")


def layers(config: Any, metrics: Mapping[str, Metric]) -> Figure:
    """The slope of log E_v by the layer that is steered."""
    order = sorted({config.layer, *config.other_layers})
    curves = {}
    for name in ("shear_vorticity", "shear_speed", "advect_speed"):
        found = [
            metrics.get(f"ev/slope/{name}" + ("" if layer == config.layer else f"@layer{layer}")) for layer in order
        ]
        if all(one is not None for one in found):
            curves[NAMES[name]] = [[one.value for one in found if one is not None]]
    figure = curve_band(order, curves, xlabel="layer that is steered", ylabel="slope of log E_v at α = 0")
    figure.axes[0].set_xticks(order)
    note(figure, f"layer {config.layer}: mean of all draws; other layers: first draw")
    return figure


@house_style
def training(config: Any, metrics: Mapping[str, Metric], times: Sequence[int]) -> Figure:
    """The slope of log E_v and the gate over training, first draw."""
    figure, axes = canvas(title="")
    label_axes(axes, xlabel="training steps", ylabel="slope of log E_v at α = 0")
    for index, name in enumerate(("shear_vorticity", "shear_speed", "advect_speed")):
        keys = [f"ev/slope/{name}@{time}" for time in times[:-1]] + [f"ev/slope/{name}"]
        shown = [(time, metrics[key].per_seed) for time, key in zip(times, keys, strict=True) if key in metrics]
        if shown:
            slopes = [(per_seed or (np.nan,))[0] for _, per_seed in shown]
            axes.plot([t for t, _ in shown], slopes, color=PALETTE[index], marker=MARKERS[index], label=NAMES[name])
    axes.axhline(0, color="black", linewidth=0.8)
    errors = [_value(metrics, f"gate_at/{time}/one/shear") for time in times[:-1]] + [_value(metrics, "gate/one/shear")]
    right = axes.twinx()
    right.plot(times, errors, color="0.4", linestyle=":", marker="x")
    right.set(yscale="log", ylabel="error / persistence (dotted)")
    right.grid(visible=False)
    legend(axes)
    note(figure, "first draw of direction data; dotted: one step, shear flow")
    return figure


def moving(config: Any, films: Mapping[str, Any]) -> dict[str, Figure | Film]:
    """Strips and films of one state each, and energies over time of all."""
    fields = worlds.fields_of(config.families)
    figures: dict[str, Figure | Film] = {}
    views = {
        "shear_vorticity on shear": "vorticity",
        "shear_speed on shear": "vorticity",
        "shear_speed on advect": "tracer s",
        "shear_vorticity on gray_scott": "V (scaled)",
    }
    for name, label in views.items():
        if name not in films:
            continue
        made, states = films[name]
        which = typical(states, fields)
        rows = {f"α = {alpha:g}": made[a, which] for a, alpha in enumerate((-0.2, 0.0, 0.2))}
        if states.truth is not None:
            frames = np.concatenate([states.frames[which, -1:], states.truth[which]])[: made.shape[2]]
            rows["simulation"] = frames
        shown = {key: view(frames, fields, label) for key, frames in rows.items()}
        times = [f"t = {INTERVAL * i:g}" for i in range(made.shape[2])]
        every = max(1, (len(times) - 1) // 6)
        slug = name.replace(" ", "_")
        figures[f"strip_{slug}"] = strip(
            {key: frames[::every] for key, frames in shown.items()}, times=times[::every], colour_label=label
        )
        if name in ("shear_vorticity on shear", "shear_speed on advect"):
            figures[f"film_{slug}"] = film(shown, times=times, colour_label=label)
    if "shear_diffusion on shear" in films:
        figures["fields_diffusion"] = all_fields(films["shear_diffusion on shear"], fields, config.horizon)
    for name in ("shear_speed on shear", "shear_vorticity on shear"):
        if name in films:
            figures[f"energy_{name.replace(' ', '_')}"] = energies(films[name], fields)
    return figures


def typical(states: worlds.States, fields: tuple[str, ...]) -> int:
    """The state whose E_v in the simulation is the median; the first in other families."""
    if states.family[0] != "shear":
        return 0
    ends = np.asarray(cross_stream_energy(states.truth[:, -1, fields.index("v")]))
    return int(np.argsort(ends)[len(ends) // 2])


def view(frames: Any, fields: tuple[str, ...], label: str) -> np.ndarray:
    """(T, X, Y) of what ``label`` says."""
    if label == "vorticity":
        return np.asarray(vorticity(frames[:, fields.index("u")], frames[:, fields.index("v")]))
    return np.asarray(frames[:, fields.index("s" if label == "tracer s" else "V")])


def all_fields(shown: tuple[np.ndarray, worlds.States], fields: tuple[str, ...], step: int) -> Figure:
    """u, v, vorticity and tracer of one state under three strengths, after ``step`` steps."""
    made, states = shown
    which = typical(states, fields)
    ends = made[:, which, step]
    rows = {name: ends[:, fields.index(name)] for name in ("u", "v", "s")}
    rows["vorticity"] = view(ends, fields, "vorticity")
    columns = [f"α = {alpha:g}" for alpha in (-0.2, 0.0, 0.2)]
    return strip(rows, times=columns, colour_label="each row has its own scale, white is 0", shared=False)


def energies(shown: tuple[np.ndarray, worlds.States], fields: tuple[str, ...]) -> Figure:
    """Growth of E_v over time, steered and in the simulation."""
    made, states = shown
    v = fields.index("v")
    runs = {f"α = {alpha:g}": made[a, :, :, v] for a, alpha in enumerate((-0.2, 0.0, 0.2))}
    runs["simulation"] = np.concatenate([states.frames[:, -1:, v], states.truth[:, :, v]], 1)[:, : made.shape[2]]
    # States differ by orders of magnitude in where they start.
    curves = {name: np.log10(np.asarray(cross_stream_energy(jnp.asarray(x)))) for name, x in runs.items()}
    curves = {name: x - x[:, :1] for name, x in curves.items()}
    times = INTERVAL * np.arange(made.shape[2])
    figure = curve_band(times, curves, xlabel="time", ylabel="log10 of E_v / E_v(0)")
    note(
        figure,
        f"line: mean of {len(made[0])} states; band: 95 % (mean ± 1.96 s.e.), below 3 states smallest to largest",
    )
    return figure


def _value(metrics: Mapping[str, Metric], name: str) -> float:
    return metrics[name].value if name in metrics else np.nan
