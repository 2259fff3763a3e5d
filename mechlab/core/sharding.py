"""Devices: one mesh with the axes "data" and "model", logical names for array axes, one table from names to mesh axes.

Models name the axes of their parameters by path (``models/transformer.py: LOGICAL_AXES``) and know nothing of meshes::

    mesh = make_mesh(data=4, model=2)
    params = shard(params, mesh, LOGICAL_AXES)
    tokens = shard_batch(tokens, mesh)
    jax.jit(model.apply)({"params": params}, tokens)      # XLA inserts the communication

For several hosts call ``jax.distributed.initialize()`` first; the mesh then spans all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mechlab.core import select
from mechlab.core.errors import unknown

RULES: dict[str, str | None] = {
    "batch": "data",
    "layer": None,
    "residual": None,
    "head": "model",
    "width": None,
    "hidden": "model",
    "vocabulary": "model",
}
"""Logical axis -> mesh axis: tensor parallelism over heads, hidden units and vocabulary; batch over "data"."""

LogicalAxes = Mapping[str, tuple[str | None, ...]]


def make_mesh(data: int | None = None, model: int = 1) -> Mesh:
    """A mesh ("data", "model") over all devices of all hosts.

    Args:
      data: devices along "data"; by default all that "model" leaves.
      model: devices along "model".

    Raises:
      ValueError: if data x model is more than there are devices, or ``model`` does not divide their number.
    """
    if model < 1 or (data is not None and data < 1):
        raise ValueError(f"a mesh needs at least one device along each axis, got data={data}, model={model}.")
    available = jax.device_count()
    if data is None:
        if available % model:
            raise ValueError(f"model={model} does not divide the {available} devices.")
        data = available // model
    if data * model > available:
        raise ValueError(f"a mesh of data={data} x model={model} needs {data * model} devices, there are {available}.")
    devices = np.asarray(jax.devices()[: data * model]).reshape(data, model)
    return Mesh(devices, ("data", "model"))


def partition_spec(axes: tuple[str | None, ...], rules: Mapping[str, str | None] = RULES) -> PartitionSpec:
    """The mesh axes of an array whose logical axes are ``axes``.

    Raises:
      KeyError: a logical axis without a rule.
      ValueError: two axes of one array on the same mesh axis.

    >>> partition_spec(("layer", "residual", "hidden")) == PartitionSpec(None, None, "model")
    True
    """
    for axis in axes:
        if axis is not None and axis not in rules:
            raise unknown("logical axis", axis, rules)
    used = [rules[axis] if axis is not None else None for axis in axes]
    named = [axis for axis in used if axis is not None]
    if len(set(named)) != len(named):
        raise ValueError(f"logical axes {axes} would use a mesh axis twice: {used}.")
    return PartitionSpec(*used)


def shardings(tree: Any, mesh: Mesh, axes: LogicalAxes, rules: Mapping[str, str | None] = RULES) -> Any:
    """A tree of ``NamedSharding`` for ``tree``; an axis that its mesh axis does not divide stays whole.

    Args:
      tree: parameters, or anything whose paths end like theirs (the optimiser's moments).
      mesh: from ``make_mesh``.
      axes: glob over paths -> logical axes; the first match counts, an unmatched leaf is replicated.
      rules: logical axis -> mesh axis.

    Raises:
      ValueError: a leaf whose rank differs from its logical axes.
    """
    by_path: dict[str, tuple[str | None, ...]] = {}
    for pattern, names in axes.items():
        for path in select.matching(tree, pattern):
            by_path.setdefault(path, names)

    def one(path: str, leaf: Any) -> NamedSharding:
        names = by_path.get(path, (None,) * np.ndim(leaf))
        if len(names) != np.ndim(leaf):
            raise ValueError(f'"{path}" has shape {np.shape(leaf)}, but its logical axes are {names}.')
        spec = partition_spec(names, rules)
        whole = [
            axis and (axis if size % mesh.shape[axis] == 0 else None)
            for axis, size in zip(spec, np.shape(leaf), strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*whole))

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [one(p, x) for p, x in zip(select.paths(tree), leaves, strict=True)])


def shard(tree: Any, mesh: Mesh, axes: LogicalAxes, rules: Mapping[str, str | None] = RULES) -> Any:
    """``tree`` placed on the mesh, see ``shardings``."""
    return jax.device_put(tree, shardings(tree, mesh, axes, rules))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Every array of a batch split along its first axis over "data".

    On several hosts each process passes its own part of the batch, and the result is the global array.

    Raises:
      ValueError: if the first axis is not a multiple of the devices along "data".
    """
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    processes = jax.process_count()
    for leaf in jax.tree.leaves(batch):
        if np.shape(leaf)[0] * processes % mesh.shape["data"]:
            raise ValueError(f"a batch of {np.shape(leaf)[0]} does not divide over {mesh.shape['data']} devices.")
    if processes == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
