"""Exact activation patching against its peers: TransformerLens, nnsight, PyTorch batched by hand and compiled.

    python -m experiments bench patching
    MECHLAB_PEERS=/path/to/python:/path/to/other/python python -m experiments bench patching

The flagship is TransformerLens' own indirect-object sweep on GPT-2-small's shape: five kinds of head activations x 144
heads x 15 positions = 10,800 patches of 8 prompts. The prompts are random tokens; in the set "demo" clean and corrupted
ones differ in one token (position 10) as in its demo, in the set "everywhere" in all of them. See
``_patching_setup.py`` for how peers take part, and ``patching_maps.py`` for layer maps of longer prompts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench._patching_setup import (
    Bench,
    Size,
    answer_metric,
    captured,
    decoder,
    make_prompts,
    ready,
    source_of,
    spaced,
)
from experiments.bench._patching_table import print_record
from experiments.bench._peers import Peer, machine
from experiments.bench._timing import compile_seconds, matmul_peak, ratio
from mechlab.core.edits import Replace, at
from mechlab.core.model import Model
from mechlab.core.sweeps import sweep
from mechlab.methods.circuits import patching
from mechlab.methods.circuits.patching import patch_heads_by_position
from mechlab.reporting.results import write_json

SITES = ("attn_z", "q", "k", "v", "attn_pattern")


def bench(preset: str, out: Path) -> dict[str, Any]:
    """Measure, print a table, write ``patching.json``; see the module's docstring."""
    with ready(preset) as made:
        record = {"size": dataclasses.asdict(made.size), "machine": machine(made.peers)}
        parts: dict[str, Callable[[], Any]] = {
            "flagship": lambda: flagship(made),
            "chunks": lambda: chunks(made.model, made.params, made.size, made.prompts["everywhere"]),
            "compile": lambda: compile_time(made.size),
        }
        for name, measure in parts.items():
            record[name] = measure()
            # What was measured survives if a later part is stopped.
            write_json(out / "patching.json", record)
    print_record(record)
    return record


def flagship(made: Bench) -> dict[str, Any]:
    """The five kinds x heads x positions, both sets of prompts."""
    size, model, params, prompts, peers = made
    total = len(SITES) * size.layers * size.heads * size.length
    # Of the demo we run every cell that can differ; elsewhere a subset of the positions stands for all.
    run_by_us = {"demo": list(range(size.first, size.length)), "everywhere": spaced(size.length, size.spread)}
    ours, first, found = {}, {}, {}
    for name, positions in run_by_us.items():
        source = source_of(model, params, prompts[name], SITES)
        program = jax.jit(_heat_maps(model, prompts[name], positions))
        start = time.perf_counter()
        found[name] = jax.device_get(program(params, source))
        first[name] = time.perf_counter() - start
        ours[name] = _call(program, params, source)
    share = {"demo": 1.0, "everywhere": size.length / len(run_by_us["everywhere"])}

    probes = [
        (site, layer, head, run_by_us["everywhere"][-1])
        for site in SITES
        for layer in size.probed
        for head in range(size.heads)
    ]
    cells = {label: _cells_for(peer, probes) for label, peer in peers.items()}
    replies = {label: {"everywhere": peer.ask("everywhere", cells[label])} for label, peer in peers.items()}
    first |= {label: reply["everywhere"]["seconds"] for label, reply in replies.items()}
    seconds: dict[str, list[float]] = {name: [] for name in (*ours, *peers)}
    for _ in range(size.repeats):
        for name, run in ours.items():
            start = time.perf_counter()
            run()
            seconds[name].append(share[name] * (time.perf_counter() - start))
        for label, peer in peers.items():
            replies[label]["demo"] = reply = peer.ask("demo", cells[label])
            seconds[label].append(reply["seconds"] / len(cells[label]) * total)

    apart = {
        label: max(_apart(found[name], cells[label], reply["values"]) for name, reply in both.items())
        for label, both in replies.items()
    }
    edited = [cell for cell in probes if cell[2] % 6 == 0]
    apart["edited forwards"] = _against_edits(model, params, prompts["everywhere"], found["everywhere"], edited)
    peak = matmul_peak(size.width, size.hidden)
    return {
        "cells": total,
        "cells run": {
            **{name: total // size.length * len(positions) for name, positions in run_by_us.items()},
            **{label: len(some) for label, some in cells.items()},
        },
        "largest effect": {name: max(float(np.ptp(x)) for x in maps.values()) for name, maps in found.items()},
        "largest difference": apart,
        "first call, seconds for the cells run": first,
        "seconds for all cells": seconds,
        "over ours": {name: {label: ratio(seconds[label], seconds[name]) for label in peers} for name in ours},
        "arithmetic": {
            name: _arithmetic(size, positions, float(np.median(seconds[name])) / share[name], peak)
            for name, positions in run_by_us.items()
        },
        "matmul peak, GFLOP/s": peak / 1e9,
    }


def chunks(model: Model, params: Any, size: Size, prompt: dict[str, Any]) -> dict[str, Any]:
    """Seconds per cell and memory by the number of cells that run together, all kinds at the middle position."""
    source = source_of(model, params, prompt, SITES)
    found = {}
    for heads in sorted({1, max(1, size.heads // 4), size.heads}):
        function = _heat_maps(model, prompt, [size.length // 2], batch=heads)
        program = jax.jit(function).lower(params, source).compile()
        jax.block_until_ready(program(params, source))
        start = time.perf_counter()
        jax.block_until_ready(program(params, source))
        seconds = (time.perf_counter() - start) / (len(SITES) * size.layers * size.heads)
        memory: Any = program.memory_analysis()
        found[str(len(SITES) * heads)] = {
            "seconds per cell": seconds,
            "temporary": int(memory.temp_size_in_bytes),
        }
    return found


def compile_time(size: Size) -> dict[str, float]:
    """Seconds to compile all kinds at two positions (two programs), by depth."""
    prompt = make_prompts(size)["everywhere"]
    found = {}
    for depth in size.depths:
        model = decoder(size, depth)
        params = jax.eval_shape(model.init, jax.random.key(0))
        source = jax.eval_shape(lambda params, model=model: captured(model, params, prompt, SITES), params)
        found[str(depth)] = compile_seconds(_heat_maps(model, prompt, [1, size.length // 2]), params, source)
    return found


def _heat_maps(model: Model, prompt: dict[str, Any], positions: Any, batch: int | None = None) -> Callable[..., Any]:
    """All kinds by position; positions left out hold the unpatched metric, as they must where nothing differs."""
    answers, metric = answer_metric(prompt)
    length = prompt["tokens"].shape[1]

    def run(params: Any, source: Any) -> Any:
        found = patch_heads_by_position(
            model, params, prompt["tokens"], source, metric, positions=positions, answers=answers, batch=batch
        )
        unpatched = metric(model.apply({"params": params}, prompt["tokens"])[:, -1, answers])
        return {
            site: jnp.full((*x.shape[:2], length), unpatched).at[:, :, jnp.asarray(positions)].set(x)
            for site, x in found.items()
        }

    return run


def _cells_for(peer: Peer, probes: list[Any]) -> list[Any]:
    """The cells that a peer runs: two heads of each layer where every cell is a forward of its own."""
    if peer.name == "nnsight":
        # Fused attention has no pattern to patch.
        return [cell for cell in probes if cell[0] != "attn_pattern"]
    return [cell for cell in probes if cell[2] % 6 == 0] if peer.name == "transformer_lens" else probes


def _against_edits(model: Model, params: Any, prompt: dict[str, Any], found: Any, cells: list[Any]) -> float:
    """The largest difference from forwards with an edit, the definition of a patch."""
    answers, metric = answer_metric(prompt)
    apart = 0.0
    for site in SITES:
        value = source_of(model, params, prompt, (site,))[site]

        def effect(cell: Any, params: Any, value: jax.Array, site: str = site) -> jax.Array:
            edits = at(model.sites, site, Replace(value), layer=cell[0], head=cell[1], position=cell[2], stacked=True)
            return metric(model.apply({"params": params, "edits": edits}, prompt["tokens"])[:, -1, answers])

        some = [cell for cell in cells if cell[0] == site]
        values = sweep(effect, jnp.asarray([cell[1:] for cell in some]), params, value, batch=2)
        apart = max(apart, _apart(found, some, values))
    return apart


def _apart(found: dict[str, np.ndarray], cells: list[Any], values: Any) -> float:
    ours = [found[site][layer, head, position] for site, layer, head, position in cells]
    return float(np.abs(np.asarray(ours) - np.asarray(values)).max())


def _arithmetic(size: Size, positions: list[int], seconds: float, peak: float) -> dict[str, float]:
    """Products in the matrices that our program runs, in FLOP, and their share of what matmul alone reaches."""
    attention, mlp = 8 * size.width**2, 4 * size.width * size.hidden
    flop = 0.0
    for group in np.array_split(np.asarray(positions), patching.PROGRAMS):
        if len(group):
            carried = size.length - int(group[0])
            for layer in range(size.layers):
                whole = max(0, size.layers - 2 - layer) * carried * (attention + mlp)
                # The last layer: keys and values of all carried positions, the rest at one.
                last = (carried * attention // 2 + attention // 2 + mlp) * (layer < size.layers - 1)
                # In the patched layer z, q and pattern change one position, k and v all that follow.
                patched = (3 * 1 + 2 * carried) * (attention // 4 + mlp) / 5
                flop += len(group) * len(SITES) * size.heads * size.prompts * (whole + last + patched)
    return {"GFLOP": flop / 1e9, "GFLOP/s": flop / 1e9 / seconds, "share of matmul peak": flop / seconds / peak}


def _call(function: Callable[..., Any], *inputs: Any) -> Callable[[], Any]:
    # With the transfer to the host, as the peers do.
    return lambda: jax.device_get(function(*inputs))
