"""The training loop: steps per second of ``fit`` against a Python loop over one compiled step, same model and batches.

    python -m experiments bench training

Also many networks at once: ``fit_many`` against the loop, per network. Compilation is left out on both sides.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from experiments.bench._timing import Stopwatch, describe, ratio
from mechlab.models.mlp import MLPConfig, mlp
from mechlab.reporting.results import write_json
from mechlab.training.batches import shuffled
from mechlab.training.loop import Job, fit, fit_many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A perceptron, how long it is trained, and how many of them."""

    widths: tuple[int, ...] = (784, 256, 256, 10)
    examples: int = 8000
    batch: int = 128
    steps: int = 200
    seeds: int = 8
    repeats: int = 3


SIZES = {
    "smoke": Size(widths=(16, 16, 4), examples=64, batch=16, steps=20, seeds=2, repeats=2),
    "cpu": Size(),
    "accel": Size(steps=2000, seeds=64, repeats=5),
}


def _keys(size: Size, seed: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), size.seeds)


def bench(preset: str, out: Path) -> dict[str, Any]:
    """Measure, print a table, write ``training.json``; see the module's docstring."""
    size = SIZES[preset]
    model = mlp(MLPConfig(widths=size.widths))
    data = {
        "x": jax.random.normal(jax.random.key(1), (size.examples, size.widths[0])),
        "y": jax.random.randint(jax.random.key(2), (size.examples,), 0, size.widths[-1]),
    }
    start = jax.jit(jax.vmap(model.init))(_keys(size, 0))
    first = jax.tree.map(lambda x: x[0], start)
    optimiser, batches = optax.adam(1e-3), shuffled(data, size.batch)

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = model.apply({"params": params}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    @jax.jit
    def one_step(params: Any, state: Any, index: jax.Array) -> tuple[Any, Any]:
        updates, state = optimiser.update(jax.grad(loss)(params, batches.fetch(index)), state, params)
        return optax.apply_updates(params, updates), state

    plan = jax.jit(lambda key: batches.plan(key, jnp.asarray(0), size.steps))

    def python_loop(key: jax.Array, params: Any) -> tuple[Any, float]:
        state, indices = optimiser.init(params), plan(key)
        start = time.perf_counter()
        for step in range(size.steps):
            params, state = one_step(params, state, indices[step])
        jax.block_until_ready(params)
        return params, (time.perf_counter() - start) / size.steps

    def compiled(many: bool) -> tuple[Any, float]:
        watch = Stopwatch()
        options: dict[str, Any] = {"steps": size.steps, "segment": max(1, size.steps // 5), "log": watch}
        if many:
            result = fit_many(_keys(size, 3), start, lambda p: Job(loss, p, optimiser, batches), **options)
        else:
            result = fit(_keys(size, 3)[0], loss, first, optimiser, batches, **options)
        return result.params, watch.seconds_per_step()

    python_loop(_keys(size, 3)[0], first)  # compiles
    seconds: dict[str, list[float]] = {"fit": [], "loop": [], "fit_many": []}
    for _ in range(size.repeats):
        one, per_step = compiled(many=False)
        seconds["fit"].append(per_step)
        seconds["fit_many"].append(compiled(many=True)[1] / size.seeds)
        by_hand, per_step = python_loop(_keys(size, 3)[0], first)
        seconds["loop"].append(per_step)
    apart = max(
        float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(by_hand), strict=True)
    )
    record: dict[str, Any] = {
        "size": dataclasses.asdict(size),
        "largest difference in the trained parameters": apart,
        "seconds per network and step": {name: float(np.median(x)) for name, x in seconds.items()},
        "loop / fit": ratio(seconds["loop"], seconds["fit"]),
        "loop / fit_many": ratio(seconds["loop"], seconds["fit_many"]),
    }
    write_json(out / "training.json", record)
    table = Table("measured", "value", title=f"training on {jax.devices()[0].device_kind}")
    table.add_row("one network: a step of the Python loop over one of fit", describe(record["loop / fit"]))
    table.add_row(f"{size.seeds} networks: the same over fit_many, per network", describe(record["loop / fit_many"]))
    table.add_row("largest difference in the trained parameters", f"{apart:.1e}")
    Console().print(table)
    return record
