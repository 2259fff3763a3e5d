"""Sparse fine-tuning: training some entries of a model's kernels, at the memory of those entries.

Which entries is anybody's choice, an array of flat indices per kernel: LIFT's (``lift.py``), whole hidden channels, or
random ones. Here are the optimiser that trains them and what can be asked of a set of entries. Per trained entry, with
its gradient g and t = 1, 2 ...::

    m ← β1 m + (1 − β1) g,   v ← β2 v + (1 − β2) g²
    w ← w − η √(1 − β2^t) / (1 − β1^t) · m / (√v + ε)

ε stands beside the uncorrected root, as in the AdamW of older transformers that LIFT's released code follows
(Liu et al. 2025, arXiv 2506.00772); in optax it stands beside the corrected one.

Layouts of kernels are those of ``matrices.py``; each layer is a matrix of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mechlab.core import select
from mechlab.core.rng import stream
from mechlab.methods.adaptation.matrices import get_matrices

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

Params = Any
Entries = Mapping[str, jax.Array]
"""``{path: (..., k) int32}``: flat indices into each matrix (in, out), row-major and increasing; layers lead."""


class SparseState(NamedTuple):
    """State of the sparse Adam: two numbers and an index per trained entry.

    Attributes:
      steps: made so far.
      idx: entries, (..., k) int32 by path.
      m, v: moments of these entries, (..., k) float32 by path.
      age: steps since an entry was chosen, (..., k) int32 by path; empty without ``per_entry_bias_correction``.
      evidence: dense, by path, for rules that read gradients; else empty.
    """

    steps: Int[Array, ""]
    idx: dict[str, jax.Array]
    m: dict[str, jax.Array]
    v: dict[str, jax.Array]
    age: dict[str, jax.Array]
    evidence: dict[str, jax.Array]


def sparse_adam(
    learning_rate: optax.ScalarOrSchedule,
    entries: Entries,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    per_entry_bias_correction: bool = False,
) -> optax.GradientTransformation:
    """Adam on the given entries only; every other number in the parameters gets the update 0.

    Args:
      learning_rate: η, or a schedule of the step from 0; may be traced.
      entries: from ``choose``, or any other increasing indices; may differ per run under ``vmap``.
      b1, b2, eps: of Adam; eps > 0 is added to the uncorrected root of v.
      weight_decay: decoupled, on the trained entries.
      per_entry_bias_correction: count t per entry since it was chosen. By default t is the kernel's, as released: an
        entry chosen late then makes a first step of (1 - b1) / sqrt(1 - b2) = 3.2 learning rates.

    Returns:
      A transformation with state ``SparseState``. Its ``update`` raises ValueError without ``params``.
    """

    def init(params: Params) -> SparseState:
        kernels = get_matrices(params, "|".join(entries))

        def zeros(dtype: Any = None) -> dict[str, jax.Array]:
            wide = {path: dtype or jnp.promote_types(stack.dtype, jnp.float32) for path, stack in kernels.items()}
            return {path: jnp.zeros(idx.shape, wide[path]) for path, idx in entries.items()}

        for path, idx in entries.items():
            if path not in kernels or idx.shape[:-1] != kernels[path].shape[:-2]:
                shapes = {path: stack.shape for path, stack in kernels.items()}
                raise ValueError(f'sparse_adam: entries of "{path}" {idx.shape} do not fit the kernels {shapes}.')
        age = zeros(jnp.int32) if per_entry_bias_correction else {}
        return SparseState(jnp.zeros((), jnp.int32), dict(entries), zeros(), zeros(), age, {})

    def update(updates: Any, state: SparseState, params: Params | None = None) -> tuple[Any, SparseState]:
        if params is None:
            raise ValueError("sparse_adam: update needs params, as in update(gradients, state, params).")
        rate = learning_rate(state.steps) if callable(learning_rate) else learning_rate
        paths = "|".join(state.idx)
        kernels, gradients = select.get(params, paths), select.get(updates, paths)
        m, v, changes = {}, {}, {}
        age = {path: own + 1 for path, own in state.age.items()}
        for path, idx in state.idx.items():
            g = _gather(gradients[path], idx).astype(state.m[path].dtype)
            m[path] = b1 * state.m[path] + (1 - b1) * g
            v[path] = b2 * state.v[path] + (1 - b2) * jnp.square(g)
            t = age.get(path, state.steps + 1).astype(g.dtype)
            scale = jnp.sqrt(1 - b2**t) / (1 - b1**t)
            change = -rate * scale * m[path] / (jnp.sqrt(v[path]) + eps)
            if weight_decay:
                change = change - rate * weight_decay * _gather(kernels[path], idx)
            changes[path] = _scatter(change.astype(kernels[path].dtype), idx, kernels[path])
        sparse = select.put(jax.tree.map(jnp.zeros_like, params), changes)
        return sparse, state._replace(steps=optax.safe_increment(state.steps), m=m, v=v, age=age)

    return optax.GradientTransformation(init, update)


def carry(state: SparseState, chosen: Entries) -> SparseState:
    """The state after a refresh: entries that stay keep their moments (and age), those that enter start from 0.

    Both index sets are sorted, so no dense buffer is needed: where does each new index stand among the old ones?
    """

    carried = jnp.vectorize(_carried, signature="(j),(k),(j)->(k)")

    def moved(path: str, values: jax.Array) -> jax.Array:
        return carried(state.idx[path], chosen[path], values)

    m, v, age = ({path: moved(path, x) for path, x in part.items()} for part in (state.m, state.v, state.age))
    return state._replace(idx=dict(chosen), m=m, v=v, age=age)


def entry_mask(params: Params, entries: Entries) -> Params:
    """A tree of booleans shaped like the parameters: which of them are trained."""
    marked = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), bool), params)
    kernels = select.get(params, "|".join(entries))
    on = {path: _scatter(jnp.ones(idx.shape, bool), idx, kernels[path]) for path, idx in entries.items()}
    return select.put(marked, on)


def density(params: Params, entries: Entries) -> float:
    """The share of the kernels' numbers that is trained, in (0, 1]."""
    return sum(idx.size for idx in entries.values()) / select.count(params, "|".join(entries))


def optimiser_bytes(state: Any) -> int:
    """Bytes of all arrays of an optimiser's state; shapes (``jax.eval_shape``) suffice."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def hidden_channels(key: jax.Array, params: Params, share: float, *, pattern: str = "**/mlp/down/kernel") -> Entries:
    """S2FT's choice (arXiv 2412.06289), a baseline: random hidden channels of the down-projection, all their outputs.

    Args:
      key: typed key; every layer draws its own channels.
      params: of a model with kernels (F, D) or (L, F, D).
      share: of the F channels, in (0, 1]; the paper's comparison takes 6 %.
      pattern: glob over parameter paths.

    Returns:
      Entries for ``sparse_adam``.

    Raises:
      ValueError: a share out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"hidden_channels: share must be in (0, 1], got {share}.")
    chosen = {}
    for path, stack in get_matrices(params, pattern).items():
        channels, outputs = stack.shape[-2:]
        scores = jax.random.uniform(stream(key, path), stack.shape[:-1])
        rows = jnp.sort(jax.lax.top_k(scores, math.ceil(share * channels - 1e-6))[1], -1)
        flat = rows[..., None] * outputs + jnp.arange(outputs)
        chosen[path] = flat.reshape(*rows.shape[:-1], -1).astype(jnp.int32)
    return chosen


def perturb_selected(key: jax.Array, params: Params, entries: Entries, sigma: float | jax.Array) -> Params:
    """The parameters with N(0, sigma²) added to the given entries: how much does the model depend on them?

    Args:
      key: typed key. The noise of an entry depends on its rank among the entries, so that rules share draws.
      params: of a model.
      entries: from ``choose``.
      sigma: standard deviation, in the unit of the weights; may be traced.
    """
    kernels = select.get(params, "|".join(entries))
    moved = {}
    for path, idx in entries.items():
        noise = sigma * jax.random.normal(stream(key, path), idx.shape, kernels[path].dtype)
        moved[path] = kernels[path] + _scatter(noise, idx, kernels[path])
    return select.put(params, moved)


def jaccard(a: Int[Array, "... k"], b: Int[Array, "... k"]) -> Float[Array, "..."]:
    """|A ∩ B| / |A ∪ B| of two sets of entries, each of distinct increasing indices: 1 if equal, 0 if disjoint."""
    found = jnp.vectorize(lambda old, new: _found(old, new)[1], signature="(j),(k)->(k)")(a, b).sum(-1)
    return found / (a.shape[-1] + b.shape[-1] - found)


def _found(old: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where each new index would stand among the old ones, and whether it is there."""
    place = jnp.minimum(jnp.searchsorted(old, new), old.shape[-1] - 1)
    return place, old[place] == new


def _carried(old: jax.Array, new: jax.Array, values: jax.Array) -> jax.Array:
    place, there = _found(old, new)
    return jnp.where(there, values[place], jnp.zeros((), values.dtype))


def _gather(kernel: jax.Array, idx: jax.Array) -> jax.Array:
    return jnp.take_along_axis(kernel.reshape(*idx.shape[:-1], -1), idx, -1)


def _scatter(values: jax.Array, idx: jax.Array, like: jax.Array) -> jax.Array:
    """Values at the entries of zeros shaped like a kernel: its row-major order is that of its matrix."""
    flat = jnp.zeros((*idx.shape[:-1], like.size // math.prod(idx.shape[:-1])), values.dtype)
    return jnp.put_along_axis(flat, idx, values, -1, inplace=False).reshape(like.shape)
