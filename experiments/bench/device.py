"""Is the device right? The same functions on the accelerator and in float64 or on the CPU, with the largest difference.

    python -m experiments bench device --preset accel

Checks, each with its tolerance: the edited decoder against the CPU, a vmapped sweep against single calls, a resumed
training against an uninterrupted one (bit for bit), and parameters sharded over all devices against one device. On a
machine without an accelerator the device is the CPU itself; the preset "smoke" does that in the tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from mechlab.core.edits import Add, Replace, at, combine
from mechlab.core.sharding import make_mesh, shard, shard_batch
from mechlab.core.sweeps import grid, sweep
from mechlab.models.transformer import LOGICAL_AXES, gpt2, llama, transformer
from mechlab.reporting.results import write_json
from mechlab.training import loop
from mechlab.training.batches import shuffled
from mechlab.training.loop import fit

SHAPES = {
    "smoke": {"layers": 3, "width": 16, "heads": 4, "hidden": 32, "vocabulary": 50, "context": 32},
    "cpu": {"layers": 4, "width": 128, "heads": 8, "hidden": 256, "vocabulary": 512, "context": 64},
    "accel": {"layers": 4, "width": 512, "heads": 8, "hidden": 1024, "vocabulary": 4096, "context": 64},
}


def bench(preset: str, out: Path) -> dict[str, Any]:
    """Run every check, print a table, write ``device.json``; ``"passed"`` says whether all hold."""
    shape = SHAPES[preset]
    checks: dict[str, Callable[[], tuple[float, float]]] = {
        "gpt2 forward against CPU": lambda: _forward(gpt2(**shape)),
        "llama forward against CPU": lambda: _forward(llama(**shape, kv_heads=2)),
        "llama bfloat16 against CPU float32": lambda: _forward(llama(**shape, kv_heads=2), "bfloat16", 0.05),
        "sweep against single calls": lambda: _sweep(gpt2(**shape)),
        "resume against uninterrupted": lambda: _resume(gpt2(**shape)),
        f"sharded over {jax.device_count()} against one device": lambda: _sharded(gpt2(**shape)),
    }
    found: dict[str, Any] = {}
    with jax.default_matmul_precision("highest"):
        for name, check in checks.items():
            start = time.perf_counter()
            difference, tolerance = check()
            found[name] = {
                "difference": difference,
                "tolerance": tolerance,
                "passed": bool(difference <= tolerance),
                "seconds": time.perf_counter() - start,
            }
    device = jax.devices()[0]
    record = {"device": device.device_kind, "passed": all(x["passed"] for x in found.values()), "checks": found}
    write_json(out / "device.json", record)
    table = Table("check", "largest difference", "tolerance", "", title=f"correctness on {device.device_kind}")
    for name, x in found.items():
        table.add_row(name, f"{x['difference']:.1e}", f"{x['tolerance']:.0e}", "passed" if x["passed"] else "FAILED")
    Console().print(table)
    return record


def _setup(config: Any) -> tuple[Any, Any, jax.Array]:
    model = transformer(config)
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, config.vocabulary)
    return model, jax.jit(model.init)(jax.random.key(0)), tokens


def _relative(x: Any, reference: Any) -> float:
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def _forward(config: Any, dtype: str = "float32", tolerance: float = 1e-4) -> tuple[float, float]:
    model, params, tokens = _setup(config)
    edits = combine(
        at(model.sites, "resid_post", Add(jnp.ones(config.width)), layer=1, position=3),
        at(model.sites, "attn_pattern", Replace(jnp.full((), 0.1)), layer=2, head=0),
    )
    on_device = transformer(dataclasses.replace(config, dtype=dtype))
    got = jax.jit(on_device.apply)({"params": params, "edits": edits}, tokens)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        host = jax.tree.map(np.asarray, (params, edits, tokens))
        reference = jax.jit(model.apply)({"params": host[0], "edits": host[1]}, jnp.asarray(host[2]))
    return _relative(got, reference), tolerance


def _sweep(config: Any) -> tuple[float, float]:
    model, params, tokens = _setup(config)
    cells = grid(layer=jnp.arange(config.layers), position=jnp.arange(8))

    def effect(cell: Any, params: Any) -> jax.Array:
        patch = at(model.sites, "mlp_out", Add(jnp.ones(config.width)), layer=cell["layer"], position=cell["position"])
        return model.apply({"params": params, "edits": patch}, tokens)[:, -1, 0]

    together = sweep(effect, cells, params, batch=5)
    single = jax.jit(effect)
    alone = [single(jax.tree.map(lambda x, i=i: x[i], cells), params) for i in range(8 * config.layers)]
    return _relative(together, np.stack([np.asarray(x) for x in alone])), 1e-5


class _Log:
    """Keeps checkpoints in a folder and stops training after some updates."""

    def __init__(self, directory: Path, stop_after: int | None) -> None:
        self.directory: Path | None = directory
        self._left = stop_after

    @contextlib.contextmanager
    def track(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        def update(done: int, **numbers: float) -> None:
            if self._left is not None and done >= self._left:
                raise KeyboardInterrupt

        yield update


def _train(config: Any, log: Any = None, mesh: Any = None) -> Any:
    model, params, tokens = _setup(config)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, batch)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    text = jnp.tile(tokens, (4, 1))
    result = fit(
        jax.random.key(2),
        loss,
        params,
        optax.adam(1e-3),
        shuffled(text, 16),
        steps=12,
        segment=4,
        log=log,
        mesh=mesh,
        axes=LOGICAL_AXES,
    )
    return result.params


def _resume(config: Any) -> tuple[float, float]:
    whole = _train(config)
    saved = loop.CHECKPOINT_SECONDS
    with tempfile.TemporaryDirectory() as folder:
        try:
            loop.CHECKPOINT_SECONDS = 0.0
            with contextlib.suppress(KeyboardInterrupt):
                _train(config, _Log(Path(folder), stop_after=4))
        finally:
            loop.CHECKPOINT_SECONDS = saved
        resumed = _train(config, _Log(Path(folder), stop_after=None))
    pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True)
    return float(max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs)), 0.0


def _sharded(config: Any) -> tuple[float, float]:
    model, params, tokens = _setup(config)
    devices = jax.device_count()
    mesh = make_mesh(model=2 if devices % 2 == 0 else 1)
    one = model.apply({"params": params}, tokens)
    spread = jax.jit(model.apply)({"params": shard(params, mesh, LOGICAL_AXES)}, shard_batch(tokens, mesh))
    trained = zip(jax.tree.leaves(_train(config)), jax.tree.leaves(_train(config, mesh=mesh)), strict=True)
    # Adam divides by the root of tiny second moments, so rounding in a gradient shows in the parameters.
    return max(_relative(spread, one), *(_relative(b, a) for a, b in trained if np.abs(a).max() > 0.01)), 1e-3
