"""The rational function of KAT: each pass against what XLA makes of the plain formula, and against GELU.

    python -m experiments bench rational

At the shapes of a ViT-B (width 768, MLP 3,072, 197 tokens): time, memory traffic as a share of a copy's in the same run
(the floor is reading the inputs and writing the outputs once), and what is kept from the forward for the backward pass.
"Autodiff" is the plain formula under ``jax.vjp``; "rational" is ``kernels.rational``: on an accelerator its kernel, on
a CPU the reference with the same gradient rule. The record says which backend it was, and why.
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

from experiments.bench._timing import describe, interleave, ratio
from mechlab.kernels.rational import choose, rational, reference
from mechlab.kernels.rational.cost import backward_cost, forward_cost
from mechlab.methods.architectures.kat import SWISH
from mechlab.reporting.results import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Rows and channels, G, the type of x, and how often a timing is repeated."""

    shapes: tuple[tuple[int, int], ...]
    groups: int = 8
    dtype: str = "float32"
    repeats: int = 20


SIZES = {
    "smoke": Size(shapes=((6, 64),), repeats=2),
    "cpu": Size(shapes=((8 * 197, 768), (8 * 197, 3072))),
    "accel": Size(shapes=((64 * 197, 768), (64 * 197, 3072)), dtype="bfloat16", repeats=100),
}


def bench(preset: str, out: Path) -> dict[str, Any]:
    """Measure, print a table, write ``rational.json``; see the module's docstring."""
    size = SIZES[preset]
    record = {
        "size": dataclasses.asdict(size),
        "device": jax.devices()[0].device_kind,
        "shapes": {f"{n} x {width}": measure(size, n, width) for n, width in size.shapes},
    }
    write_json(out / "rational.json", record)
    _print(record)
    return record


def measure(size: Size, n: int, width: int) -> dict[str, Any]:
    """One shape."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, upstream = (jax.random.normal(key, (n, width)).astype(size.dtype) for key in keys)
    a, b = SWISH.arrays(size.groups)
    functions: dict[str, Callable[..., jax.Array]] = {
        "rational": functools.partial(rational, groups=size.groups),
        "autodiff": reference.forward,
        "gelu": lambda x, a, b: jax.nn.gelu(x, approximate=False),
    }

    def pull(function: Callable[..., jax.Array]) -> Callable[..., Any]:
        return lambda x, a, b: jax.vjp(function, x, a, b)

    passes: dict[str, Callable[[], Any]] = {}
    results: dict[str, Any] = {}
    kept: dict[str, int] = {}
    for name, function in functions.items():
        forward, train = jax.jit(function), jax.jit(pull(function))
        # The two passes as a network has them: apart, with what the first keeps for the second in memory.
        backward = jax.jit(lambda pulled, upstream: pulled(upstream))
        y, pulled = train(x, a, b)
        kept[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(pulled))
        results[name] = (y, *backward(pulled, upstream))
        passes[f"forward/{name}"] = functools.partial(forward, x, a, b)
        passes[f"forward in training/{name}"] = functools.partial(train, x, a, b)
        passes[f"backward/{name}"] = functools.partial(backward, pulled, upstream)
    passes["copy"] = functools.partial(jax.jit(lambda x: -x), x)

    seconds = interleave(passes, repeats=size.repeats)
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    bandwidth = 2 * x.nbytes / median["copy"]
    costs = {step: cost(x.size, x.dtype.itemsize, size.groups) for step, cost in _COSTS.items()}
    return {
        "backend": choose(x, a, b, groups=size.groups)._asdict(),
        "seconds": median,
        "copy (bytes per second)": bandwidth,
        "percent of a copy's bandwidth": {
            f"{step}/{name}": 100 * cost.floor(bandwidth) / median[f"{step}/{name}"]
            for step, cost in costs.items()
            for name in functions
        },
        "autodiff / rational": {
            step: ratio(seconds[f"{step}/autodiff"], seconds[f"{step}/rational"]) for step in (*costs, _TRAINING)
        },
        "rational / gelu": {step: ratio(seconds[f"{step}/rational"], seconds[f"{step}/gelu"]) for step in costs},
        "kept for the backward pass (bytes)": kept,
        "largest difference, relative": {
            part: _apart(one, other)
            for part, one, other in zip(("y", "dx", "da", "db"), results["rational"], results["autodiff"], strict=True)
        },
    }


_COSTS = {"forward": forward_cost, "backward": backward_cost}
_TRAINING = "forward in training"


def _apart(one: jax.Array, other: jax.Array) -> float:
    one, other = one.astype(jnp.float32), other.astype(jnp.float32)
    return float(jnp.abs(one - other).max() / jnp.abs(other).max())


def _print(record: dict[str, Any]) -> None:
    for shape, found in record["shapes"].items():
        table = Table("measured", "value", title=f"rational, {shape} {record['size']['dtype']} on {record['device']}")
        table.add_row("backend", "{impl}: {reason}".format(**found["backend"]))
        for step in _COSTS:
            for name in ("rational", "autodiff", "gelu"):
                percent = found["percent of a copy's bandwidth"][f"{step}/{name}"]
                table.add_row(
                    f"{step}, {name}", f"{1e6 * found['seconds'][f'{step}/{name}']:.0f} us, {percent:.0f} % of a copy"
                )
        for step, measured in found["autodiff / rational"].items():
            table.add_row(f"{step}: autodiff over rational", describe(measured))
        for step, measured in found["rational / gelu"].items():
            table.add_row(f"{step}: rational over gelu", describe(measured))
        for name, size in found["kept for the backward pass (bytes)"].items():
            table.add_row(f"kept for the backward pass, {name}", f"{size / 2**20:.1f} MiB")
        for part, apart in found["largest difference, relative"].items():
            table.add_row(f"largest difference of {part} to autodiff", f"{apart:.1e}")
        Console().print(table)
