"""Figures of the AWQ experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from mechlab.methods.compression.awq import RATIOS
from mechlab.reporting.figures import arm_bars, curve_band, heat_map
from mechlab.reporting.results import Metric

if TYPE_CHECKING:
    from experiments.compression.awq import Config

KL = "KL (nats per token)"

METHODS = {"rtn": "rounding", "awq_scale": "AWQ, scales", "awq": "AWQ, scales and clip", "gptq": "GPTQ"}

CRITERIA = {"act": "by activations", "weight": "by weights", "random": "at random"}

SITES = {"attn_in": "q, k, v", "attn_z": "o", "mlp_in": "up, gate", "mlp_act": "down"}


def all_figures(metrics: Mapping[str, Metric], config: Config) -> dict[str, Figure]:
    """Every figure of the study by file name, but those of the scale search."""
    groups = "a group an output" if config.group is None else f"groups of {config.group}"
    figures: dict[str, Figure] = {}

    def seeds(name: str) -> tuple[float, ...]:
        return metrics[name].per_seed or ()

    for b in config.bits:
        arms = {label: seeds(f"kl/{b}/{arm}") for arm, label in METHODS.items()}
        figures[f"methods_{b}"] = arm_bars(arms, ylabel=KL, title=f"{b} bits, {groups}")
        shares = {"low": "1 %"} | {f"{share:g}": f"{100 * share:g} %" for share in config.shares}
        kept = {
            f"{share}, {criterion}": seeds(f"kl/{b}/kept_{by}_{label}")
            for label, share in shares.items()
            for by, criterion in CRITERIA.items()
        }
        none = {"none": seeds(f"kl/{b}/rtn")}
        figures[f"salient_{b}"] = arm_bars(none | kept, ylabel=KL, title=f"inputs left unrounded, {b} bits")

    def curves(kinds: Mapping[str, str], x: Sequence[float]) -> dict[str, np.ndarray]:
        return {label: np.asarray([seeds(f"{kind}/{at:g}") for at in x]).T for kind, label in kinds.items()}

    factor = "s, the factor of the most active input in a hundred"
    figures["sweep"] = curve_band(
        config.factors, curves({"sweep_kl": "3 bits"}, config.factors), xlabel=factor, ylabel=KL
    )
    figures["steps"] = curve_band(
        config.factors,
        curves({"steps_ratio": "step: Δ' / Δ", "steps_error": "error of a scaled weight: Δ' / (Δ s)"}, config.factors),
        xlabel=factor,
        ylabel="mean over groups with a scaled input",
    )
    if config.sizes:
        x = (*config.sizes, config.texts)
        by_size = {
            label: np.asarray(
                [seeds(f"texts_kl/{name}/{n}") if n < config.texts else seeds(f"kl/3/{name}") for n in x]
            ).T
            for name, label in (("awq", "AWQ"), ("gptq", "GPTQ"))
        }
        xlabel = f"calibration texts of {config.length} tokens (count)"
        figures["texts"] = curve_band(x, by_size, xlabel=xlabel, ylabel=KL, title="3 bits", logx=True)
    if "shift_kl/awq/same" in metrics:
        domains = {"same": "calibrated on its domain", "other": "on the other"}
        shift = {
            f"{label}, {words}": seeds(f"shift_kl/{name}/{kind}")
            for name, label in (("awq", "AWQ"), ("gptq", "GPTQ"))
            for kind, words in domains.items()
        }
        figures["shift"] = arm_bars(shift, ylabel=KL, title="shift of domain, 3 bits")
    return figures


def search_figures(losses: Mapping[int, Mapping[str, Sequence[np.ndarray]]]) -> dict[str, Figure]:
    """The loss of every alpha over that of alpha = 0: by what is scaled, and for every unit at the fewest bits."""
    ylabel, xlabel = "loss over that of α = 0", "α, exponent of the mean activation"
    figures = {
        f"search_{b}": curve_band(
            RATIOS,
            {SITES[site]: np.stack(of_seeds).mean(1) for site, of_seeds in sites.items()},
            xlabel=xlabel,
            ylabel=ylabel,
            title=f"{b} bits, mean over layers",
        )
        for b, sites in losses.items()
    }
    b = min(losses)
    units = {
        f"{SITES[site]}, layer {layer}": row
        for site, of_seeds in losses[b].items()
        for layer, row in enumerate(np.mean(of_seeds, 0))
    }
    figures["search_units"] = heat_map(
        np.log10(np.stack(list(units.values()))),
        xlabel=f"{xlabel} (steps of 1/20)",
        ylabel="what is scaled",
        colour_label=f"log10 of the {ylabel}, {b} bits",
        row_labels=list(units),
        diverging=True,
    )
    return figures
