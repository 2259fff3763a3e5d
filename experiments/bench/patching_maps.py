"""Layer maps by exact patching, ours against TransformerLens and PyTorch batched by hand, at growing prompt lengths.

    MECHLAB_PEERS=/path/to/python:/path/to/other/python python -m experiments bench patching_maps

One prompt of GPT-2-small's shape: the residual stream, layer by position, and z of a head at all positions, layer by
head. See ``_patching_setup.py`` for how peers take part.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.bench._patching_setup import Bench, answer_metric, ready, source_of, spaced
from experiments.bench._patching_table import print_maps
from experiments.bench._peers import machine
from experiments.bench._timing import ratio
from mechlab.methods.circuits.patching import patch_heads, patch_residual
from mechlab.reporting.results import write_json

IN_MAPS = ("transformer_lens", "torch")
"""Peers of the maps: compilation would have to start again for each of these shapes."""


def bench(preset: str, out: Path) -> dict[str, Any]:
    """Measure, print a table, write ``patching_maps.json``; see the module's docstring."""
    with ready(preset, IN_MAPS) as made:
        record: dict[str, Any] = {"size": dataclasses.asdict(made.size), "machine": machine(made.peers), "maps": {}}
        for length in made.size.lengths:
            record["maps"][str(length)] = maps(made, length)
            # What was measured survives if a longer prompt is stopped.
            write_json(out / "patching_maps.json", record)
    print_maps(record)
    return record


def maps(made: Bench, length: int) -> dict[str, Any]:
    """Layer x position of the residual stream, and layer x head at all positions, of one prompt."""
    size, model, params, _, peers = made
    prompt = made.prompts[str(length)]
    answers, metric = answer_metric(prompt)
    positions = spaced(length, size.most)
    source = source_of(model, params, prompt, ("resid_pre", "attn_z"))

    def residual(params: Any, source: Any) -> Any:
        tokens, x = prompt["tokens"], source["resid_pre"]
        return patch_residual(model, params, tokens, x, metric, site="resid_pre", positions=positions, answers=answers)

    def heads(params: Any, source: Any) -> Any:
        z = {"attn_z": source["attn_z"]}
        return patch_heads(model, params, prompt["tokens"], z, metric, answers=answers)["attn_z"]

    found = {}
    for name, function, site, places in (
        ("layer x position", residual, "resid_pre", positions),
        ("layer x head", heads, "attn_z", list(range(size.heads))),
    ):
        program = jax.jit(function)
        start = time.perf_counter()
        values = np.asarray(program(params, source))
        first = time.perf_counter() - start
        columns = list(range(len(places)))[:: max(1, len(places) // 3)][:3]
        at_cell = [(layer, column) for layer in size.probed for column in columns]
        cells = [
            (site, layer, -1, places[column]) if name == "layer x position" else (site, layer, column, -1)
            for layer, column in at_cell
        ]
        replies = {label: peer.ask(str(length), cells) for label, peer in peers.items()}
        seconds: dict[str, list[float]] = {"ours": [], **{label: [] for label in peers}}
        for _ in range(2):
            start = time.perf_counter()
            jax.device_get(program(params, source))
            seconds["ours"].append((time.perf_counter() - start) / values.size)
            for label, peer in peers.items():
                seconds[label].append(peer.ask(str(length), cells)["seconds"] / len(cells))
        wanted = np.asarray([values[cell] for cell in at_cell])
        found[name] = {
            "cells run": values.size,
            "cells run by a peer": len(cells),
            "first call, seconds": first,
            "seconds per cell": seconds,
            "largest difference": {
                label: float(np.abs(np.asarray(reply["values"]) - wanted).max()) for label, reply in replies.items()
            },
            "over ours": {label: ratio(seconds[label], seconds["ours"]) for label in peers},
        }
    return found
