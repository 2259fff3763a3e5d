"""One of several processes that train together: ``python -m ... ADDRESS COUNT RANK OUT``.

Each process has the devices that ``XLA_FLAGS`` forces; the first writes what came out.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mechlab.core.select import matching
from mechlab.core.sharding import make_mesh, shard, shard_batch
from mechlab.training.loop import fit
from tests.training import problem

AXES = {"**/layer_0/kernel": ("residual", "hidden"), "**/layer_0/bias": ("hidden",)}


def one_step(params: Any, batch: Any) -> tuple[jax.Array, Any]:
    (value, _), gradient = jax.value_and_grad(problem.loss, has_aux=True)(params, batch)
    return value, jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)


def train(mesh: Any = None) -> dict[str, Any]:
    """A step by hand on a batch of which each process holds a part, and a training by ``fit``."""
    params, batch = jax.tree.map(np.asarray, (problem.params(), problem.data()))
    options: dict[str, Any] = {}
    if mesh is None:
        value, stepped = jax.jit(one_step)(params, batch)
    else:
        mine = jax.tree.map(lambda x: np.split(x, jax.process_count())[jax.process_index()], batch)
        value, stepped = jax.jit(one_step)(shard(params, mesh, AXES), shard_batch(mine, mesh))
        options = {"mesh": mesh, "axes": AXES}
    fitted = fit(
        jax.random.key(1),
        problem.loss,
        params,
        optax.sgd(0.5),
        problem.batches(),
        steps=problem.STEPS,
        segment=4,
        record=problem.record,
        **options,
    )
    return {"value": value, "stepped": stepped, "fitted": fitted._asdict()}


def as_arrays(outcome: dict[str, Any], mesh: Any = None) -> dict[str, np.ndarray]:
    """By path, and whole: what is spread over the processes is replicated first."""
    if mesh is not None:
        outcome = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))(outcome)
    return {path: np.asarray(leaf) for path, leaf in matching(outcome, "**").items()}


if __name__ == "__main__":
    address, count, rank, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    jax.distributed.initialize(address, num_processes=count, process_id=rank)
    mesh = make_mesh(model=2)
    arrays = as_arrays(train(mesh), mesh)
    if rank == 0:
        np.savez(out, devices=jax.device_count(), mesh=mesh.devices.shape, **arrays)
