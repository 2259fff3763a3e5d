"""Grids of steering vectors, layers and strengths, in one compiled program.

logits = dose_grid(model, params, vectors, texts, layers=range(6), strengths=[-1, 0, 1])      # every combination
logits = dose_cells(model, params, vectors, texts, layers=chosen, strengths=best)             # a list of cells
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.edits import Add, AddRenormed
from mechlab.core.model import Model
from mechlab.core.sweeps import GIB, peak_bytes
from mechlab.methods.steering.vectors import SITE, Texts
from mechlab.models.transformer import run_layers, unembed

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int


def dose_grid(
    model: Model,
    params: Any,
    vectors: Float[ArrayLike, "S L D"],
    texts: Texts,
    *,
    layers: Int[ArrayLike, " K"],
    strengths: Float[ArrayLike, " A"],
    renorm: bool = False,
    tokens: Int[ArrayLike, "... C"] | None = None,
    batch: int | None = None,
) -> Float[Array, "S K A N C"]:
    """Logits after the last token for every vector, layer and strength, in one compiled program.

    The residual stream up to the steered layer does not depend on the cell: it is computed once, and each cell runs
    only the layers above it. The result is that of a forward with ``steer`` at all positions.

    Args:
      model, params: a decoder from ``models.transformer`` with its parameters.
      vectors: (S, L, D), one per seed or control; ``vector.values[None]`` for a single one. They are added to
        ``resid_post``.
      texts: N prompts.
      layers: (K,) in 0..L - 1.
      strengths: (A,).
      renorm: as in ``steer``.
      tokens: (C,) or (N, C), whose logits are kept; all V by default.
      batch: cells of one layer at once; by default as many as fit in 2 GiB.

    Returns:
      (S, K, A, N, C) float32.

    Raises:
      ValueError: vectors that do not fit, layers out of range, strengths that are not finite, or ``batch`` < 1.
    """
    known, doses, kept = _checked(model, vectors, texts, layers, strengths, tokens)
    if batch is not None and batch < 1:
        raise ValueError(f"dose_grid: batch must be at least 1, got {batch}.")
    return _dose_grid(model, params, jnp.asarray(vectors), texts, known, doses, kept, renorm, batch)


def dose_cells(
    model: Model,
    params: Any,
    vectors: Float[ArrayLike, "S L D"],
    texts: Texts,
    *,
    layers: Int[ArrayLike, " S"],
    strengths: Float[ArrayLike, " S"],
    renorm: bool = False,
    tokens: Int[ArrayLike, "... C"] | None = None,
) -> Float[Array, "S N C"]:
    """Some cells of a grid: vector s at its own layer and strength, as chosen on other texts.

    Args:
      model, params, vectors, texts, renorm, tokens: as in ``dose_grid``.
      layers, strengths: (S,), those of each vector.

    Returns:
      (S, N, C) float32.

    Raises:
      ValueError: as ``dose_grid``, or numbers of vectors, layers and strengths that differ.
    """
    known, doses, kept = _checked(model, vectors, texts, layers, strengths, tokens)
    if not len(known) == len(doses) == len(np.asarray(vectors)):
        raise ValueError(
            f"dose_cells: wanted one layer and strength a vector, got {len(np.asarray(vectors))} vectors, "
            f"{len(known)} layers and {len(doses)} strengths."
        )
    return _dose_cells(model, params, jnp.asarray(vectors), texts, known, doses, kept, renorm)


def _checked(
    model: Model, vectors: Any, texts: Texts, layers: Any, strengths: Any, tokens: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Layers, strengths, and tokens (N, C) whose logits are kept, if what is asked for makes sense."""
    config = model.module.config
    if np.ndim(vectors) != 3 or np.shape(vectors)[1:] != (config.layers, config.width):
        raise ValueError(f"vectors: wanted (S, {config.layers}, {config.width}), got {np.shape(vectors)}.")
    known = np.asarray(layers)
    if known.ndim != 1 or not known.size or known.min() < 0 or known.max() >= config.layers:
        raise ValueError(f"layers: wanted a list of 0..{config.layers - 1}, got {layers}.")
    doses = np.asarray(strengths, np.float32)
    if doses.ndim != 1 or not doses.size or not np.isfinite(doses).all():
        raise ValueError(f"strengths: wanted finite numbers, got {strengths}.")
    kept = None if tokens is None else jnp.broadcast_to(jnp.asarray(tokens), (len(texts.tokens), np.shape(tokens)[-1]))
    return jnp.asarray(known), jnp.asarray(doses), kept


_Cell = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _cell(model: Model, params: Any, texts: Texts, kept: jax.Array | None, renorm: bool) -> _Cell:
    """Logits (N, C) of (vector (L, D), strength, layer), from an unsteered run that all cells share."""
    variables = {"params": params}
    last = texts.lengths - 1
    positions = texts.positions
    clean = model.capture(variables, texts.tokens, positions, sites=(SITE,))[1][SITE]

    def cell(vector: jax.Array, strength: jax.Array, layer: jax.Array) -> jax.Array:
        edit: Any = (AddRenormed if renorm else Add)(strength * vector[layer])
        steered = edit(clean[layer].astype(jnp.float32), None).astype(clean.dtype)
        resid = run_layers(model, variables, steered, layer + 1, positions)
        read = jnp.take_along_axis(resid, last[:, None, None], axis=1)
        logits = unembed(model, variables, read, last[:, None])[:, 0]
        return logits if kept is None else jnp.take_along_axis(logits, kept, -1)

    return cell


@functools.partial(jax.jit, static_argnames=("model", "renorm"))
def _dose_cells(
    model: Model,
    params: Any,
    vectors: jax.Array,
    texts: Texts,
    layers: jax.Array,
    strengths: jax.Array,
    kept: jax.Array | None,
    renorm: bool,
) -> jax.Array:
    cell = _cell(model, params, texts, kept, renorm)
    return jax.lax.map(lambda one: cell(*one), (vectors, strengths, layers))


@functools.partial(jax.jit, static_argnames=("model", "renorm", "batch"))
def _dose_grid(
    model: Model,
    params: Any,
    vectors: jax.Array,
    texts: Texts,
    layers: jax.Array,
    strengths: jax.Array,
    kept: jax.Array | None,
    renorm: bool,
    batch: int | None,
) -> jax.Array:
    cell = _cell(model, params, texts, kept, renorm)
    total = len(vectors) * len(strengths)
    one = (jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (vectors, strengths, layers))
    chunk = batch or max(1, int(2 * GIB // peak_bytes(cell, *one)))
    chunks = -(-total // min(chunk, total))
    # Chunks of one size; what is left over in the last repeats its last cell.
    index = jnp.minimum(jnp.arange(chunks * -(-total // chunks)), total - 1).reshape(chunks, -1)

    def of_layer(layer: jax.Array) -> jax.Array:
        # One layer at a time, because cells that start together run no layer for each other's sake.
        def together(cells: jax.Array) -> jax.Array:
            v, a = jnp.divmod(cells, len(strengths))
            return jax.vmap(cell, (0, 0, None))(vectors[v], strengths[a], layer)

        found = jax.lax.map(together, index)
        return found.reshape(-1, *found.shape[2:])[:total]

    found = jax.lax.map(of_layer, layers)
    return found.reshape(len(layers), len(vectors), len(strengths), *found.shape[2:]).swapaxes(0, 1)
