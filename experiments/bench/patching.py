"""Exact activation patching against its peers: TransformerLens, nnsight, PyTorch batched by hand and compiled.

    python -m experiments bench patching
    MECHLAB_PEERS=/path/to/python:/path/to/other/python python -m experiments bench patching

The flagship is TransformerLens' own indirect-object sweep on GPT-2-small's shape: five kinds of head activations x 144
heads x 15 positions = 10,800 patches of 8 prompts. The prompts are random tokens; in the set "demo" clean and corrupted
ones differ in one token (position 10) as in its demo, in the set "everywhere" in all of them. Peers are looked for in
the interpreters that ``MECHLAB_PEERS`` names and run in processes of their own, on the same weights, prompts, metric
and cores, interleaved with ours; they run a stated subset of the cells, which costs them per cell what the whole does.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench._patching_table import print_record
from experiments.bench._peers import Peer, machine, running
from experiments.bench._timing import compile_seconds, matmul_peak, ratio
from mechlab.core.edits import Replace, at
from mechlab.core.model import Model
from mechlab.core.sweeps import sweep
from mechlab.methods.circuits import patching
from mechlab.methods.circuits.patching import patch_heads, patch_heads_by_position, patch_residual
from mechlab.models import hub
from mechlab.models.transformer import gpt2, transformer
from mechlab.reporting.results import write_json

SITES = ("attn_z", "q", "k", "v", "attn_pattern")
PEERS = ("transformer_lens", "nnsight", "torch", "torch.compile")
IN_MAPS = ("transformer_lens", "torch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured.

    Attributes:
      layers, width, heads, hidden, vocabulary: the decoder.
      prompts, length, first: of the flagship; ``first`` is where the demo's prompts differ.
      lengths: prompt lengths of the layer x position and layer x head maps, one prompt.
      probed: layers whose cells the peers run; their mean is the mean layer, so that the mean cost is that of all.
      spread: positions that stand for all of the flagship where the prompts differ everywhere.
      most: positions of a map at most; of longer prompts an even subset.
      repeats: timed runs after the first.
      depths: layers of the compiled decoders.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    hidden: int = 3072
    vocabulary: int = 50257
    prompts: int = 8
    length: int = 15
    first: int = 10
    lengths: tuple[int, ...] = (15, 64, 256)
    probed: tuple[int, ...] = (2, 9)
    spread: int = 3
    most: int = 64
    repeats: int = 3
    depths: tuple[int, ...] = (8, 32)


SIZES = {
    "smoke": Size(
        layers=2,
        width=32,
        heads=2,
        hidden=64,
        vocabulary=101,
        prompts=2,
        length=4,
        first=3,
        lengths=(4,),
        probed=(0, 1),
        spread=1,
        most=1,
        repeats=2,
        depths=(2,),
    ),
    "cpu": Size(most=12, repeats=2),
    "accel": Size(lengths=(15, 256), most=64, repeats=5),
}


def bench(preset: str, out: Path) -> dict[str, Any]:
    """Measure, print a table, write ``patching.json``; see the module's docstring."""
    size = SIZES[preset]
    model = _decoder(size, size.layers)
    params = _weights(model)
    # An accelerator's default of shorter products would be compared with float32.
    with jax.default_matmul_precision("highest"), tempfile.TemporaryDirectory() as folder:
        prompts = _prompts(size)
        hub.export(folder, model, params, family="gpt2")
        for name, arrays in prompts.items():
            whole: dict[str, Any] = {key: np.asarray(x) for key, x in arrays.items()}
            np.savez(Path(folder) / f"prompts-{name}.npz", **whole)
        with running(Path(__file__).with_name("_patching_peers.py"), PEERS, Path(folder)) as peers:
            record = {"size": dataclasses.asdict(size), "machine": machine(peers)}
            parts: dict[str, Callable[[], Any]] = {
                "flagship": lambda: flagship(model, params, size, prompts, peers),
                "chunks": lambda: chunks(model, params, size, prompts["everywhere"]),
                "maps": lambda: {str(n): maps(model, params, size, prompts, peers, n) for n in size.lengths},
                "compile": lambda: compile_time(size),
            }
            for name, measure in parts.items():
                record[name] = measure()
                # What was measured survives if a later part is stopped.
                write_json(out / "patching.json", record)
    print_record(record)
    return record


def flagship(
    model: Model, params: Any, size: Size, prompts: dict[str, Any], peers: dict[str, Peer]
) -> dict[str, Any]:
    """The five kinds x heads x positions, both sets of prompts."""
    total = len(SITES) * size.layers * size.heads * size.length
    # Of the demo we run every cell that can differ; elsewhere a subset of the positions stands for all.
    run_by_us = {"demo": list(range(size.first, size.length)), "everywhere": _spaced(size.length, size.spread)}
    ours, first, found = {}, {}, {}
    for name, positions in run_by_us.items():
        source = _source(model, params, prompts[name], SITES)
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


def maps(
    model: Model, params: Any, size: Size, prompts: dict[str, Any], peers: dict[str, Peer], length: int
) -> dict[str, Any]:
    """Layer x position of the residual stream, and layer x head at all positions, of one prompt."""
    prompt = prompts[str(length)]
    answers, metric = _metric(prompt)
    positions = _spaced(length, size.most)
    source = _source(model, params, prompt, ("resid_pre", "attn_z"))

    def residual(params: Any, source: Any) -> Any:
        tokens, x = prompt["tokens"], source["resid_pre"]
        return patch_residual(
            model, params, tokens, x, metric, site="resid_pre", positions=positions, answers=answers
        )

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
        # Compilation would have to start again for each of these shapes.
        asked = {label: peer for label, peer in peers.items() if peer.name in IN_MAPS}
        replies = {label: peer.ask(str(length), cells) for label, peer in asked.items()}
        seconds: dict[str, list[float]] = {"ours": [], **{label: [] for label in asked}}
        for _ in range(2):
            start = time.perf_counter()
            jax.device_get(program(params, source))
            seconds["ours"].append((time.perf_counter() - start) / values.size)
            for label, peer in asked.items():
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
            "over ours": {label: ratio(seconds[label], seconds["ours"]) for label in asked},
        }
    return found


def chunks(model: Model, params: Any, size: Size, prompt: dict[str, Any]) -> dict[str, Any]:
    """Seconds per cell and memory by the number of cells that run together, all kinds at the middle position."""
    source = _source(model, params, prompt, SITES)
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
    prompt = _prompts(size)["everywhere"]
    found = {}
    for depth in size.depths:
        model = _decoder(size, depth)
        params = jax.eval_shape(model.init, jax.random.key(0))
        source = jax.eval_shape(lambda params, model=model: _captured(model, params, prompt, SITES), params)
        found[str(depth)] = compile_seconds(_heat_maps(model, prompt, [1, size.length // 2]), params, source)
    return found


def _decoder(size: Size, depth: int) -> Model:
    shape = {"width": size.width, "heads": size.heads, "hidden": size.hidden, "vocabulary": size.vocabulary}
    return transformer(gpt2(layers=depth, **shape))


def _weights(model: Model) -> Any:
    """Random weights, those of the blocks three times as large as usual, so that a patched head shows in the logits."""
    params = jax.jit(model.init)(jax.random.key(0))

    def larger(keys: Any, leaf: jax.Array) -> jax.Array:
        return 3 * leaf if keys[0].key == "blocks" and keys[-1].key == "kernel" else leaf

    return jax.tree.map_with_path(larger, params)


def _prompts(size: Size) -> dict[str, dict[str, jax.Array]]:
    """{set: tokens and clean (B, T), answers (B, 2)}."""
    found = {}
    for number, (name, rows, length) in enumerate(
        [("demo", size.prompts, size.length), ("everywhere", size.prompts, size.length)]
        + [(str(length), 1, length) for length in size.lengths]
    ):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), number), 3)
        tokens, clean = (jax.random.randint(key, (rows, length), 0, size.vocabulary) for key in keys[:2])
        if name == "demo":
            tokens = clean.at[:, size.first].set(tokens[:, size.first])
        # Different answers everywhere, so that the metric can read the logits of all of them.
        answers = jax.random.choice(keys[2], size.vocabulary, (rows, 2), replace=False)
        found[name] = {"tokens": tokens, "clean": clean, "answers": answers}
    return found


def _metric(prompt: dict[str, Any]) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """The answers' tokens, and the mean logit difference of logits at those, (B, 2 B)."""
    rows = jnp.arange(len(prompt["answers"]))
    return prompt["answers"].reshape(-1), lambda logits: (logits[rows, 2 * rows] - logits[rows, 2 * rows + 1]).mean()


def _heat_maps(model: Model, prompt: dict[str, Any], positions: Any, batch: int | None = None) -> Callable[..., Any]:
    """All kinds by position; positions left out hold the unpatched metric, as they must where nothing differs."""
    answers, metric = _metric(prompt)
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


def _captured(model: Model, params: Any, prompt: dict[str, Any], sites: tuple[str, ...]) -> dict[str, jax.Array]:
    return model.capture({"params": params}, prompt["clean"], sites=sites)[1]


def _source(model: Model, params: Any, prompt: dict[str, Any], sites: tuple[str, ...]) -> dict[str, jax.Array]:
    return jax.jit(lambda params: _captured(model, params, prompt, sites))(params)


def _spaced(length: int, count: int) -> list[int]:
    """Positions evenly spread, with the mean of all positions."""
    count = min(count, length)
    return [int((2 * i + 1) * length / (2 * count)) for i in range(count)]


def _cells_for(peer: Peer, probes: list[Any]) -> list[Any]:
    """The cells that a peer runs: two heads of each layer where every cell is a forward of its own."""
    if peer.name == "nnsight":
        # Fused attention has no pattern to patch.
        return [cell for cell in probes if cell[0] != "attn_pattern"]
    return [cell for cell in probes if cell[2] % 6 == 0] if peer.name == "transformer_lens" else probes


def _against_edits(model: Model, params: Any, prompt: dict[str, Any], found: Any, cells: list[Any]) -> float:
    """The largest difference from forwards with an edit, the definition of a patch."""
    answers, metric = _metric(prompt)
    apart = 0.0
    for site in SITES:
        value = _source(model, params, prompt, (site,))[site]

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
