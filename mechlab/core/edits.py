"""Edits: interventions on activations, as data.

An edit is a pytree of arrays that can be called: ``edit(value, context) -> value``. Being data, it can be mapped
(``vmap`` over edits is a sweep), differentiated (attribution, learned steering vectors), scanned with the layers, saved
and sharded. To write a new one, write a ``flax.struct.dataclass`` with ``__call__``; to place any edit at a layer, at
positions, heads or units, call ``at``::

    @flax.struct.dataclass
    class Double:
        def __call__(self, value, context):
            return 2 * value

    edits = at(model.sites, "mlp_out", Double(), layer=3)
    model.apply({"params": params, "edits": edits}, tokens)

Arrays in an edit broadcast against the site's value from the right, as in NumPy: (D,) or (T, D) or (B, T, D) at a
residual site, (H, K) at ``attn_z``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mechlab.core import linalg, places
from mechlab.core.estimators import above, straight_through
from mechlab.core.sites import Context, SiteTable, require_edit

T = TypeVar("T")

Edit = Any
"""Anything callable as ``edit(value, context) -> value`` whose arrays form a pytree."""


def summarise(edit: Any) -> str:
    """One readable line: ``Placed(edit=Add(value=float32[768]), gate=[0. 0. 1.])`` instead of pages of numbers."""
    fields = ((f.name, getattr(edit, f.name)) for f in dataclasses.fields(edit))
    return f"{type(edit).__name__}({', '.join(f'{name}={_short(x)}' for name, x in fields if x is not None)})"


@dataclass_transform(frozen_default=True, field_specifiers=(struct.field,))
def edit(cls: type[T]) -> type[T]:
    """Class decorator: ``flax.struct.dataclass`` with the readable ``repr`` of ``summarise``."""
    cls.__repr__ = summarise  # type: ignore[method-assign]
    return struct.dataclass(cls, repr=False)


@edit
class Add:
    """``x + value``: a steering vector."""

    value: jax.Array

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        return x + self.value


@edit
class AddRenormed:
    """``x + value``, then every token scaled back to the length that it had: a turn without growth.

    A token that the sum makes zero stays zero.
    """

    value: jax.Array

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        moved = x + self.value
        before, after = (jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (x, moved))
        return moved * _ratio(before, after)


@edit
class AddRelative:
    """``x + alpha * v * |x| / |v|``: alpha is the length of the patch over that of the state.

    Both lengths are Euclidean, in float32, over all axes but B and T, and v is ``value`` broadcast to x. A zero value
    adds nothing (Fear et al. 2025, arXiv 2511.20798).

    Attributes:
      value: v, of any length.
      alpha: signed strength; scalar, or anything that broadcasts against x.
      renormalise: scale the sum back to |x|.
    """

    value: jax.Array
    alpha: jax.Array
    renormalise: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        over = tuple(i for i, axis in enumerate(context.axes) if axis not in "BT")

        def length(z: jax.Array) -> jax.Array:
            # float16 would overflow in the sum of squares, so that is made in float32.
            return jnp.sqrt(jnp.square(z.astype(jnp.float32)).sum(over, keepdims=True))

        v = jnp.broadcast_to(self.value, x.shape)
        moved = x + self.alpha * v * _ratio(length(x), length(v))
        return moved * _ratio(length(x), length(moved)) if self.renormalise else moved


@edit
class Scale:
    """``x * factor``."""

    factor: jax.Array

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        return x * self.factor


@edit
class Replace:
    """``value`` in place of x: activation patching; zero ablation with 0, mean ablation with a mean."""

    value: jax.Array

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        return jnp.broadcast_to(self.value, x.shape)


@edit
class Clamp:
    """x limited to [low, high]."""

    low: jax.Array
    high: jax.Array

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        return jnp.clip(x, self.low, self.high)


@edit
class Mask:
    """x where ``keep`` is true, ``fill`` elsewhere."""

    keep: jax.Array
    fill: jax.Array | float = 0.0

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        return jnp.where(self.keep, x, self.fill)


@edit
class Project:
    """``inside * P x + outside * (x - P x)`` with P the orthogonal projector on the columns of ``basis`` (D, R)."""

    basis: jax.Array
    inside: jax.Array | float
    outside: jax.Array | float

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        within = (x @ self.basis) @ jnp.swapaxes(self.basis, -1, -2)
        return self.inside * within + self.outside * (x - within)


def project_out(directions: jax.Array) -> Project:
    """Remove the span of ``directions``, (D,) or (D, R) columns of any length and angle."""
    return Project(linalg.orthonormal(directions), jnp.zeros(()), jnp.ones(()))


def project_in(directions: jax.Array) -> Project:
    """Keep only the span of ``directions``, (D,) or (D, R) columns of any length and angle."""
    return Project(linalg.orthonormal(directions), jnp.ones(()), jnp.zeros(()))


@edit
class Gate:
    """``gain * g * x`` where g says whether a unit takes part: its pre-activation z against a threshold.

    soft g = sigmoid(sharpness * (z - threshold)); hard g = 1[z > threshold], closed at equality. z is the site's
    pre-activation (``mlp_act`` passes it) or, at sites without one, x itself. With ``straight_through`` the hard gate
    is used forward and the soft one backward.

    Attributes:
      threshold, gain: broadcast against x.
      sharpness: slope of the soft gate, > 0.
    """

    threshold: jax.Array
    gain: jax.Array
    sharpness: jax.Array | float = 10.0
    hard: bool = struct.field(pytree_node=False, default=False)
    straight_through: bool = struct.field(pytree_node=False, default=False)

    def open(self, z: jax.Array) -> jax.Array:
        """How open the gate is for pre-activations z: in [0, 1], shaped like z."""
        soft = jax.nn.sigmoid(self.sharpness * (z - self.threshold))
        if self.straight_through:
            return straight_through(jnp.greater(z, self.threshold).astype(z.dtype), soft)
        return above(z, jnp.broadcast_to(self.threshold, z.shape)) if self.hard else soft

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        return self.gain * self.open(x if context.pre is None else context.pre) * x


@edit
class Noise:
    """``x + scale * n`` with standard normal n.

    Where the site has positions, the noise of a token depends on the key, the batch row and the absolute position only,
    so that a cached decoding step draws what the full forward drew there. At sites with an axis S every (query, key)
    pair has its own draw, keyed by the index of the key.
    """

    key: jax.Array
    scale: jax.Array

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        if context.positions is None:
            return x + self.scale * jax.random.normal(self.key, x.shape, jnp.float32)
        axes, rows = context.axes, x.shape[0]
        positions = jnp.broadcast_to(context.positions, (rows, x.shape[axes.index("T")]))
        per_token = tuple(size for axis, size in zip(axes, x.shape, strict=True) if axis not in "BTS")

        def draw(*numbers: jax.Array) -> jax.Array:
            key = functools.reduce(jax.random.fold_in, numbers, self.key)
            return jax.random.normal(key, per_token, jnp.float32)

        over_tokens = jax.vmap(jax.vmap(draw, (None, 0)))
        if "S" not in axes:
            noise = over_tokens(jnp.arange(rows), positions)
            return x + self.scale * jnp.moveaxis(noise, 1, axes.index("T"))
        keys = jnp.arange(x.shape[axes.index("S")])
        over_pairs = jax.vmap(jax.vmap(jax.vmap(draw, (None, None, 0)), (None, 0, None)), (0, 0, None))
        return x + self.scale * jnp.moveaxis(over_pairs(jnp.arange(rows), positions, keys), (1, 2), (-2, -1))


@edit
class Chain:
    """Several edits at one site, first to last."""

    edits: tuple[Edit, ...]

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        for step in self.edits:
            x = step(x, context)
        return x


@edit
class Placed:
    """An edit limited to some layers, positions, heads or units: ``w * edit(x) + (1 - w) * x``.

    w is the product of the fields that are present. At w = 0 and w = 1 the result is exactly x and exactly the edited
    value (for finite numbers); in between w is differentiable, so a gate can be learned.

    Attributes:
      edit: any edit.
      gate: strength, scalar; (L,) at a scanned site, where "only layer 7" is a one-hot gate.
      start, stop: half-open intervals of absolute positions, (P,) for all rows or (B, P) per row; a position in any of
        them counts.
      head: (H,) weights, at sites with an axis H.
      unit: weights along the value's last axis.
    """

    edit: Edit
    gate: jax.Array | None = None
    start: jax.Array | None = None
    stop: jax.Array | None = None
    head: jax.Array | None = None
    unit: jax.Array | None = None

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        weight = jnp.ones((1,) * x.ndim) if self.gate is None else jnp.reshape(self.gate, (1,) * x.ndim)
        if self.start is not None and self.stop is not None:
            weight = weight * _inside(self.start, self.stop, context)
        if self.head is not None:
            if "H" not in context.axes:
                raise ValueError("head= needs a site with an axis H (head).")
            weight = weight * context.spread(self.head, "H")
        if self.unit is not None:
            weight = weight * self.unit
        return weight * self.edit(x, context) + (1 - weight) * x


def at(
    sites: SiteTable,
    name: str,
    edit: Edit,
    *,
    layer: int | Sequence[int] | jax.Array | None = None,
    position: int | Sequence[int] | jax.Array | None = None,
    span: tuple[Any, Any] | None = None,
    head: int | Sequence[int] | jax.Array | None = None,
    unit: int | Sequence[int] | jax.Array | None = None,
    stacked: bool = False,
) -> dict[str, Edit]:
    """Place an edit: ``{site name: edit}`` for ``model.apply({"params": ..., "edits": ...}, ...)``.

    Every index may be a traced array, so ``jax.vmap(lambda l, p: run(at(sites, name, edit, layer=l, position=p)))`` is
    a layer x position sweep. Concrete indices are checked; a traced one that
    is out of range gives NaN.

    Args:
      sites: ``model.sites``.
      name: the site; in an unscanned model ``"mlp_act"`` means that site of every layer, or of ``layer``.
      edit: the edit for one layer. A typed key in it is split, one key per layer.
      layer: layer or layers; all of them by default. Negative counts from the last layer.
      position: absolute position or positions, >= 0; all by default.
      span: half-open interval (start, stop) of absolute positions; each a number or one per batch row (B,).
      head: head or heads, at sites with an axis H (key-value heads at ``k`` and ``v``).
      unit: index or indices along the last axis.
      stacked: the edit's arrays already carry the layer axis (L, ...), one value per layer.

    Returns:
      Site name to edit, one entry for a scanned site, one per layer otherwise. Join several with ``combine``.

    Raises:
      KeyError: unknown site.
      TypeError: not an edit, or an index that is not a whole number.
      ValueError: an index out of range, no index at all, an empty span, or ``layer`` where the site has no layers.
    """
    require_edit(name, edit)
    entries = sites.named(name)
    first = entries[0]
    limits: dict[str, Any] = places.intervals(position, span)
    if head is not None:
        if "H" not in first.context.axes:
            raise ValueError(f'site "{name}" ({" ".join(first.context.axes)}) has no heads.')
        limits["head"] = places.hot(head, first.value.shape[first.context.axes.index("H")], "head", name)
    if unit is not None:
        limits["unit"] = places.hot(unit, first.value.shape[-1], "unit", name)

    if first.layers is not None:
        if layer is not None:
            limits["gate"] = places.hot(layer, first.layers, "layer", name)
        inner = edit if stacked else _stack(edit, first.layers)
        over_layers = {field: x if field == "gate" else _stack(x, first.layers) for field, x in limits.items()}
        return {name: Placed(inner, **over_layers) if limits else inner}

    if stacked:
        raise ValueError(f'site "{name}" is not stacked over layers; place one edit per layer.')
    if layer is None:
        return {entry.name: Placed(edit, **limits) if limits else edit for entry in entries}
    if name in sites:
        raise ValueError(f'site "{name}" occurs once in the model; leave layer out.')
    if isinstance(layer, jax.core.Tracer):
        raise ValueError(f'site "{name}" is not stacked over layers, so its layer cannot be traced.')
    chosen = places.indices(layer, len(entries), "layer", name)
    return {entries[i].name: Placed(edit, **limits) if limits else edit for i in chosen}


def combine(*placed: Mapping[str, Edit]) -> dict[str, Edit]:
    """Join edits at different sites; two edits at one site are refused (use ``chain`` to give their order).

    Raises:
      ValueError: naming the site that is edited twice.
    """
    joined: dict[str, Edit] = {}
    for edits in placed:
        for name, one in edits.items():
            if name in joined:
                raise ValueError(f'site "{name}" is edited twice; write chain(first, second) to apply both in order.')
            joined[name] = one
    return joined


def chain(*placed: Mapping[str, Edit]) -> dict[str, Edit]:
    """Join edits; where several are at one site they are applied in the order given."""
    names = dict.fromkeys(name for edits in placed for name in edits)
    steps = {name: tuple(edits[name] for edits in placed if name in edits) for name in names}
    return {name: several[0] if len(several) == 1 else Chain(several) for name, several in steps.items()}


def _ratio(above: jax.Array, below: jax.Array) -> jax.Array:
    """above / below, and 0 where below is 0."""
    return jnp.where(below > 0, above / jnp.where(below > 0, below, 1), 0)


def _inside(start: jax.Array, stop: jax.Array, context: Context) -> jax.Array:
    if context.positions is None or "T" not in context.axes:
        raise ValueError("position= and span= need a site with positions (axis T).")
    start, stop = (bound[:, None, :] if bound.ndim == 2 else bound for bound in (start, stop))
    positions = context.positions[..., None]
    inside = ((positions >= start) & (positions < stop)).any(-1).astype(jnp.float32)
    return context.spread(inside, "BT"[-inside.ndim :])


def _stack(tree: Any, layers: int) -> Any:
    def repeat(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(leaf, layers)
        return jnp.broadcast_to(leaf, (layers, *leaf.shape))

    return jax.tree.map(repeat, tree)


def _short(x: Any) -> str:
    if isinstance(x, jax.Array | np.ndarray) and not isinstance(x, jax.core.Tracer):
        if x.size <= 16 and x.ndim <= 1 and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return np.array2string(np.asarray(x), precision=4, separator=" ")
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{x.dtype}{list(x.shape)}"
    return str(x)
