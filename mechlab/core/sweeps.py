"""Sweeps: one function over a grid of edits, in chunks that fit memory, compiled once.

The cells may be indices that ``at`` takes, or stacked edits::

    def effect(cell, params, clean):
        patch = at(model.sites, "resid_post", Replace(clean), layer=cell["layer"], position=cell["position"])
        return metric(model.apply({"params": params, "edits": patch}, tokens))

    cells = grid(layer=jnp.arange(12), position=jnp.arange(15))
    heat_map = sweep(effect, cells, params, clean).reshape(12, 15)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mechlab.core.edits import Add
from mechlab.core.sites import SiteTable

GIB = 2**30


def grid(**axes: jax.Array) -> dict[str, jax.Array]:
    """All combinations of the given axes, the last one fastest: a pytree of arrays (N,).

    >>> {name: values.tolist() for name, values in grid(layer=jnp.arange(2), head=jnp.arange(2)).items()}
    {'layer': [0, 0, 1, 1], 'head': [0, 1, 0, 1]}
    """
    combined = jnp.meshgrid(*axes.values(), indexing="ij")
    return {name: values.reshape(-1) for name, values in zip(axes, combined, strict=True)}


def sweep(
    function: Callable[..., Any],
    cells: Any,
    *shared: Any,
    batch: int | None = None,
    memory: float = 2 * GIB,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """``function`` of every cell: ``vmap`` over chunks of cells, one compiled program for all chunks.

    Args:
      function: pure, ``function(cell, *shared)``; returns a pytree of arrays.
      cells: pytree of arrays (N, ...): a grid of indices, or stacked edits themselves.
      *shared: arguments that are the same for every cell. Pass large arrays (parameters, activations) here: what
        ``function`` closes over is baked into the compiled program.
      batch: cells per chunk. By default as many as ``memory`` allows by ``peak_bytes``.
      memory: bytes that the intermediate values of one chunk may take; used when ``batch`` is not given.
      mesh: spread each chunk over the mesh's "data" axis.
      progress: called as ``progress(done, total)`` after each chunk.

    Returns:
      The results on the host, NumPy arrays (N, ...), so that they do not add to the device's memory.

    Raises:
      ValueError: no cells, axes of different lengths, or ``batch`` < 1.
    """
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(cells)}
    if len(sizes) != 1 or sizes == {()} or sizes == {(0,)}:
        raise ValueError(f"sweep: cells must share one leading axis of at least one cell, got leading axes {sizes}.")
    (total,) = next(iter(sizes))
    one_cell = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], jnp.result_type(x)), cells)
    if batch is None:
        batch = max(1, int(memory // max(1, peak_bytes(function, one_cell, *shared))))
    if batch < 1:
        raise ValueError(f"sweep: batch must be at least 1, got {batch}.")
    chunks = -(-total // min(batch, total))
    size = -(-total // chunks)
    if mesh is not None:
        size = -(-size // mesh.shape["data"]) * mesh.shape["data"]

    run = jax.jit(jax.vmap(function, in_axes=(0, *(None for _ in shared))))
    results = []
    for start in range(0, total, size):
        # The last chunk repeats its last cell instead of changing shape, which would compile a second program.
        index = np.minimum(np.arange(start, start + size), total - 1)
        chunk = jax.tree.map(lambda x, index=index: x[index], cells)
        if mesh is not None:
            chunk = jax.device_put(chunk, NamedSharding(mesh, PartitionSpec("data")))
        kept = min(size, total - start)
        results.append(jax.tree.map(lambda x, kept=kept: np.asarray(x)[:kept], run(chunk, *shared)))
        if progress is not None:
            progress(start + kept, total)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def zero_probes(sites: SiteTable, *names: str) -> dict[str, Add]:
    """Edits that add 0 of the full shape of each site: the gradient with respect to one is the activation's gradient.

    ``sum(gradient * (clean - corrupted))`` is attribution patching.

    Args:
      sites: the table for the inputs at hand: ``model.sites_for(tokens)``.
      *names: the sites.

    Returns:
      Site name to ``Add`` of zeros, (L, ...) at scanned sites.
    """
    entries = [entry for name in names for entry in sites.named(name)]
    shapes = {e.name: (() if e.layers is None else (e.layers,)) + e.value.shape for e in entries}
    return {name: Add(jnp.zeros(shape, jnp.float32)) for name, shape in shapes.items()}


def peak_bytes(function: Callable[..., Any], *inputs: Any) -> int:
    """Upper estimate of the bytes of intermediate values that are alive at once, from the jaxpr, without compiling.

    XLA fuses, so the truth is usually lower. Constants (the model's parameters) are not counted: ``vmap`` shares them.

    Args:
      function: any traceable function.
      *inputs: arrays or ``jax.ShapeDtypeStruct``.
    """
    return _peak(jax.make_jaxpr(function)(*inputs).jaxpr)


def _peak(jaxpr: Any) -> int:
    last_use = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if _is_var(var)}
    last_use |= {var: len(jaxpr.eqns) for var in jaxpr.outvars if _is_var(var)}
    made: set[Any] = set()
    alive = peak = 0
    for i, eqn in enumerate(jaxpr.eqns):
        inner = max((_peak(sub) for sub in _inner_jaxprs(eqn.params)), default=0)
        made |= set(eqn.outvars)
        alive += sum(_bytes(var) for var in eqn.outvars)
        peak = max(peak, alive + inner)
        freed = {var for var in (*eqn.invars, *eqn.outvars) if _is_var(var) and var in made}
        alive -= sum(_bytes(var) for var in freed if last_use.get(var, i) <= i)
    return peak


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    candidates = [x for value in params.values() for x in (value if isinstance(value, tuple | list) else (value,))]
    return [getattr(x, "jaxpr", x) for x in candidates if hasattr(getattr(x, "jaxpr", x), "eqns")]


def _is_var(var: Any) -> bool:
    return not isinstance(var, jax.extend.core.Literal)


def _bytes(var: Any) -> int:
    shape, dtype = getattr(var.aval, "shape", ()), getattr(var.aval, "dtype", None)
    return int(np.prod(shape)) * getattr(dtype, "itemsize", 8)
