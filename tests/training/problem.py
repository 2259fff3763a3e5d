"""A small classification problem to train on, the same in every process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mechlab.core.model import Model
from mechlab.models.mlp import MLPConfig, mlp
from mechlab.training.batches import Batches, shuffled
from mechlab.training.loop import Job

KEY_SEED = 5
STEPS = 11
MODEL: Model = mlp(MLPConfig(widths=(4, 8, 3)))


def data() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 4)).astype(np.float32)
    return {"x": jnp.asarray(x), "y": jnp.asarray((x @ rng.normal(size=(4, 3))).argmax(1))}


def params(seed: int = 0) -> Any:
    return MODEL.init(jax.random.key(seed))


def loss(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    logits = MODEL.apply({"params": params}, batch["x"])
    value = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    return value, {"right": (logits.argmax(-1) == batch["y"]).sum(), "logits": logits[0]}


def record(params: Any) -> dict[str, jax.Array]:
    return {
        "norm": sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params)),
        "bias": params["layer_1"]["bias"],
    }


def batches(batch: int = 8) -> Batches:
    return shuffled(data(), batch)


def lane(rate: Any) -> Job:
    return Job(loss, params(), optax.adam(rate), batches())


class Log:
    """A log with a folder that counts, and that stops the run where it is told to."""

    def __init__(self, directory: Path | None, stop: Callable[[int], None] = lambda done: None) -> None:
        self.directory, self.stop = directory, stop
        self.seen: list[int] = []

    @contextlib.contextmanager
    def track(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        def update(done: int, **numbers: float) -> None:
            self.seen.append(done)
            self.stop(done)

        yield update
