"""The kernels: each operation against what XLA makes of it, in the same run, and the bytes that must move as the floor.

    python -m experiments bench kernels

``w8a8``, ``w4a16``, ``norm_int8``, ``fake_quant`` and ``sparse_matvec``, at widths of a decoder. A program runs over
distinct layers, more of them than a cache holds; times are per layer. On a CPU there is no kernel: ours is the
reference, and its time says nothing about kernels. Interpretation is never timed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.bench._kernel_cases import OURS, Case, cases
from experiments.bench._timing import describe, interleave, ratio
from mechlab.reporting.results import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured.

    Attributes:
      rows: M of the products.
      inputs, outputs: K and N.
      matrix: what norms and fake quantisers work on.
      densities: of the sparse product.
      layers: distinct ones in a program.
      dtype: of activations, and of weights that are not codes.
      repeats: of every timing.
    """

    rows: tuple[int, ...]
    inputs: int
    outputs: int
    matrix: tuple[int, int]
    densities: tuple[float, ...]
    layers: int
    dtype: str = "float32"
    repeats: int = 10


SIZES = {
    "smoke": Size(rows=(2,), inputs=128, outputs=256, matrix=(4, 256), densities=(0.5,), layers=2, repeats=2),
    "cpu": Size(rows=(1, 16), inputs=1024, outputs=1024, matrix=(512, 1024), densities=(0.5, 0.25), layers=4),
    "accel": Size(
        rows=(1, 16, 64, 256, 2048),
        inputs=4096,
        outputs=4096,
        matrix=(2048, 4096),
        densities=(0.5, 0.25),
        layers=8,
        dtype="bfloat16",
        repeats=20,
    ),
}


def bench(preset: str, out: Path) -> dict[str, Any]:
    """Measure, print a table, write ``kernels.json``; see the module's docstring."""
    size = SIZES[preset]
    found = {case.name: measure(case, size) for case in cases(size)}
    record = {
        "size": dataclasses.asdict(size),
        "device": jax.devices()[0].device_kind,
        "kernels are measured": all(x["backend"]["impl"] != "jnp" for x in found.values()),
        "cases": found,
    }
    write_json(out / "kernels.json", record)
    _print(record)
    return record


def measure(case: Case, size: Size) -> dict[str, Any]:
    """One operation at one shape: microseconds a layer of every way, and what that is of the floor."""
    programs: dict[str, Callable[[], Any]] = {}
    for name, (function, stack) in case.ways.items():
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(size.layers)]
        programs[name] = functools.partial(jax.jit(functools.partial(_layers, function)), case.x, layers)
    results = {name: programs[name]() for name in (OURS, *case.same)}
    seconds = interleave(programs, repeats=size.repeats)
    per_layer = {name: float(np.median(times)) / size.layers for name, times in seconds.items()}
    return {
        "backend": case.choice._asdict(),
        "floor (bytes)": case.cost.bytes,
        "microseconds": {name: 1e6 * time for name, time in per_layer.items()},
        "floor per second (GB)": {name: case.cost.bytes / time / 1e9 for name, time in per_layer.items()},
        "over ours": {name: ratio(times, seconds[OURS]) for name, times in seconds.items() if name != OURS},
        "largest difference, relative": {name: _apart(results[OURS], results[name]) for name in case.same},
    }


def _layers(function: Callable[[jax.Array, Any], Any], x: jax.Array, layers: list[Any]) -> list[Any]:
    """All layers, one after another. No scan, which would copy every layer out of the stack for a kernel."""
    results = []
    for layer in layers:
        # What is found from x alone, such as a mask, is found for every layer, as in a decoder.
        x, y = jax.lax.optimization_barrier((x, function(x, layer)))
        results.append(y)
    return results


def _apart(ours: Any, other: Any) -> float:
    def largest(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.abs(a - b).max() / jnp.abs(b).max()

    return max(map(float, jax.tree.leaves(jax.tree.map(largest, ours, other))))


def _print(record: dict[str, Any]) -> None:
    console = Console()
    table = Table("operation", "way", "us", "GB/s of the floor", "over ours", title=f"kernels on {record['device']}")
    for name, found in record["cases"].items():
        for way, time in found["microseconds"].items():
            over = describe(found["over ours"][way]) if way in found["over ours"] else found["backend"]["impl"]
            table.add_row(name, way, f"{time:.1f}", f"{found['floor per second (GB)'][way]:.1f}", over)
            name = ""
    console.print(table)
    for reason in sorted({x["backend"]["reason"] for x in record["cases"].values() if x["backend"]["impl"] == "jnp"}):
        console.print(f"Not a kernel but the reference, whose time says nothing about kernels: {reason}.")
