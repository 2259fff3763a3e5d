"""Quantising one MLP of a decoder: rounding, AWQ's two searches and GPTQ, against the same by hand in PyTorch.

    MECHLAB_PEERS=/path/to/python python -m experiments bench quantise

Kernels gate, up (I, H) and down (H, I), N calibration tokens; both sides start from the same numbers, run on the same
cores, interleaved, and what they find is compared. Seconds are those of a call once it is compiled; memory is, for
ours, what the compiled program allocates beyond its arguments (GPTQ is more than one program, and left out), and for
PyTorch by how much its process grew in its first call.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.bench._peers import machine, running
from experiments.bench._timing import describe, ratio, temporary_bytes
from mechlab.methods.compression.awq import awq_clip, awq_scale
from mechlab.methods.compression.gptq import gptq, hessian
from mechlab.methods.compression.rounding import nearest
from mechlab.reporting.results import write_json

PEERS = ("torch",)

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured.

    Attributes:
      width, hidden: I and H.
      tokens: N.
      bits, group: of the grid.
      repeats: timings.
    """

    width: int
    hidden: int
    tokens: int
    bits: int = 4
    group: int = 128
    repeats: int = 5


SIZES = {
    "smoke": Size(width=32, hidden=64, tokens=48, group=16, repeats=2),
    "cpu": Size(width=1024, hidden=2816, tokens=512),
    "accel": Size(width=4096, hidden=11_008, tokens=2048),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to do.

    Attributes:
      weights: how many it quantises.
      run: some numbers of its result, as the peer gives them.
      program: what of it is compiled, with its arguments, for the memory; None where it is several programs.
    """

    weights: int
    run: Callable[[], jax.Array]
    program: tuple[Callable[..., Any], tuple[Any, ...]] | None


def bench(preset: str, out: Path) -> dict[str, Any]:
    """Measure, print a table, write ``quantise.json``; see the module's docstring."""
    size = SIZES[preset]
    arrays = _arrays(jax.random.key(0), size)
    with jax.default_matmul_precision("highest"), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stored: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
        np.savez(folder / "arrays.npz", **stored)
        (folder / "size.json").write_text(json.dumps(dataclasses.asdict(size)))
        with running(Path(__file__).with_name("_quantise_peers.py"), PEERS, folder) as peers:
            record: dict[str, Any] = {"size": dataclasses.asdict(size), "machine": machine(peers), "cases": {}}
            for label, case in _cases(arrays, size).items():
                record["cases"][label] = _measure(label, case, size, peers)
                # What was measured survives if a later case is stopped.
                write_json(out / "quantise.json", record)
    _print(record)
    return record


def _arrays(key: jax.Array, size: Size) -> Arrays:
    keys = iter(jax.random.split(key, 5))
    i, h = size.width, size.hidden
    # A few active inputs, as decoders have.
    scale = jnp.exp(jax.random.normal(next(keys), (i,)))
    return {
        "x": scale * jax.random.normal(next(keys), (size.tokens, i)),
        "gate": jax.random.normal(next(keys), (i, h)) / i**0.5,
        "up": jax.random.normal(next(keys), (i, h)) / i**0.5,
        "down": jax.random.normal(next(keys), (h, i)) / h**0.5,
    }


def _cases(arrays: Arrays, size: Size) -> dict[str, Case]:
    x, gate = arrays["x"], arrays["gate"]
    grid: dict[str, Any] = {"bits": size.bits, "group": size.group}
    mlp = size.width * size.hidden

    def rounding(arrays: Arrays) -> jax.Array:
        return jnp.stack([jnp.square(nearest(arrays[name], **grid)).mean() for name in ("gate", "up", "down")])

    def scales(arrays: Arrays) -> jax.Array:
        def inspect(kernels: Arrays) -> jax.Array:
            x = arrays["x"]
            return (jax.nn.silu(x @ kernels["gate"]) * (x @ kernels["up"])) @ arrays["down"]

        pair = {name: arrays[name] for name in ("gate", "up")}
        return awq_scale(inspect, pair, jnp.abs(arrays["x"]).mean(0), **grid).losses

    def clip(x: jax.Array, gate: jax.Array) -> jax.Array:
        most = jnp.abs(gate.reshape(-1, size.group, size.hidden)).max(1)
        return (awq_clip(gate, x, **grid) / most).mean()[None]

    def solve() -> jax.Array:
        error = x @ (gptq(gate, hessian(x), **grid).dequantise() - gate)
        return jnp.square(error).mean()[None]

    fast = {"rounding": jax.jit(rounding), "AWQ scales": jax.jit(scales), "AWQ clip": jax.jit(clip)}
    return {
        "rounding": Case(3 * mlp, lambda: fast["rounding"](arrays), (rounding, (arrays,))),
        "AWQ scales": Case(2 * mlp, lambda: fast["AWQ scales"](arrays), (scales, (arrays,))),
        "AWQ clip": Case(mlp, lambda: fast["AWQ clip"](x, gate), (clip, (x, gate))),
        # Its Hessian is factored on the host, between two programs.
        "GPTQ": Case(mlp, solve, None),
    }


def _measure(label: str, case: Case, size: Size, peers: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    found = np.asarray(case.run())
    first = time.perf_counter() - start
    replies = {name: peer.ask(label, [1]) for name, peer in peers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    for _ in range(size.repeats):
        start = time.perf_counter()
        jax.block_until_ready(case.run())
        seconds["ours"].append(time.perf_counter() - start)
        for name, peer in peers.items():
            seconds[name].append(peer.ask(label, [1])["seconds"])
    held = {name: reply["bytes"] for name, reply in replies.items()}
    if case.program is not None:
        held["ours"] = sum(temporary_bytes(case.program[0], *case.program[1]).values())
    billion = 1e9 / case.weights
    return {
        "seconds": seconds,
        "first call, seconds": first,
        "seconds per billion weights": {name: billion * float(np.median(x)) for name, x in seconds.items()},
        "bytes": held,
        "largest difference, relative": {
            name: float(np.abs(np.asarray(reply["values"]) / found - 1).max()) for name, reply in replies.items()
        },
        "over ours": {name: ratio(x, seconds["ours"]) for name, x in seconds.items() if name != "ours"},
    }


def _print(record: dict[str, Any]) -> None:
    peers = list(record["machine"]["peers"])
    columns = (f"{name} over ours" for name in peers)
    table = Table("what", "ours (s per billion weights)", *columns, "memory (MB): ours", *peers, "difference")
    for label, found in record["cases"].items():
        table.add_row(
            label,
            f"{found['seconds per billion weights']['ours']:.3g}",
            *(describe(found["over ours"][name]) for name in peers),
            *(f"{found['bytes'][name] / 1e6:.0f}" if name in found["bytes"] else "" for name in ("ours", *peers)),
            ", ".join(f"{x:.0e}" for x in found["largest difference, relative"].values()),
        )
    Console().print(table)
