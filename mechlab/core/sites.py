"""Sites: the named places in a model where an activation can be read or edited.

Inside a Flax module a site is one line: ``x = site(self, "resid_post", x, "B T D", positions=positions)``. It

1. applies the edit stored under its name in the variable collection ``edits``, if there is one,
2. stores the (edited) value in the collection ``acts``, if it was asked for there.

Both questions are about the *structure* of the variables, so they are answered while tracing: a site that nobody edits
or reads leaves nothing in the compiled program. Users do not write these collections; they call
``Model.apply`` and ``Model.capture`` with flat dictionaries from site name to edit (``core/model.py``).

Axis letters, the same everywhere: B batch, T position (of the query), S position of the key, D residual width, H head,
K head width, F hidden width, V vocabulary. Layers of a scanned model add a leading axis L.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import struct

from mechlab.core.errors import unknown

VOCABULARY = (
    *("embed", "resid_pre", "attn_in", "q_in", "k_in", "v_in", "q", "k", "v", "attn_scores", "attn_pattern", "attn_z"),
    *("attn_out", "resid_mid", "mlp_in", "mlp_up", "mlp_pre", "mlp_act", "mlp_out", "resid_post", "preact", "hidden"),
    *("final_norm", "logits"),
)
"""The names of sites over all models, in the order of a forward pass; tables list them in this order."""

LAYER_AXES: dict[Any, Any] = {"params": 0, "edits": 0, "acts": 0, "site_table": 0}
"""``variable_axes`` for ``nn.scan``: parameters, edits and acts are all sliced along the same leading layer axis."""


# Flax nests collections by module name, and a module ("q") may share its name with a site in its parent.
_MARK = "@"


@struct.dataclass
class Context:
    """What a site tells an edit besides the value.

    Attributes:
      axes: letters of the value's axes, e.g. ``("B", "T", "D")``; static.
      positions: absolute positions of the tokens, (T,) or (B, T) int, or None where the model has no positions.
      pre: the pre-activation of the same units, shaped like the value, at sites after a non-linearity; else None.
    """

    axes: tuple[str, ...] = struct.field(pytree_node=False)
    positions: jax.Array | None = None
    pre: jax.Array | None = None

    def spread(self, array: jax.Array, letters: str) -> jax.Array:
        """Reshape ``array``, whose axes are ``letters`` (e.g. ``"BT"``), so that it broadcasts against the value."""
        sizes = dict(zip(letters, array.shape, strict=True))
        return array.reshape([sizes.get(axis, 1) for axis in self.axes])


@struct.dataclass
class _Record:
    value: jax.Array
    context: Context


def site(
    module: nn.Module,
    name: str,
    value: jax.Array,
    axes: str,
    *,
    positions: jax.Array | None = None,
    pre: jax.Array | None = None,
) -> jax.Array:
    """Declare a site in a Flax module: edit the value if an edit is stored here, keep it if it was asked for.

    Args:
      module: the Flax module that calls (``self``).
      name: the site's name, unique in the model.
      value: the activation; its shape is ``axes``.
      axes: blank-separated axis letters, e.g. ``"B T H K"``.
      positions: absolute positions (T,) or (B, T), for edits limited to some positions.
      pre: pre-activation of the same units, for edits that gate on it.

    Returns:
      The value, edited or not, in its own dtype: a float32 edit can steer a bfloat16 model.

    Raises:
      ValueError: if the edit returns another shape.
    """
    context = Context(tuple(axes.split()), positions, pre)
    if len(context.axes) != value.ndim:
        raise ValueError(f'site "{name}" is declared as ({axes}), but its value has shape {value.shape}.')
    key = _key(name)
    if module.has_variable("edits", key):
        value = apply_edit(name, module.get_variable("edits", key), value, context)
    if module.has_variable("acts", key):
        module.put_variable("acts", key, value)
    if module.is_mutable_collection("site_table") and not module.is_initializing():
        module.put_variable("site_table", key, _Record(value, context))
    return value


def in_use(module: nn.Module, *names: str) -> bool:
    """Whether one of the named sites of this module is edited, captured or being listed.

    A model asks this to choose between a fused implementation that never forms an activation (flash attention) and the
    plain one that does.
    """
    if module.is_mutable_collection("site_table") and not module.is_initializing():
        return True
    return any(module.has_variable(collection, _key(name)) for collection in ("edits", "acts") for name in names)


def apply_edit(name: str, edit: Any, value: jax.Array, context: Context) -> jax.Array:
    """``edit(value, context)``, cast to the value's dtype, refused if it does not fit the site called ``name``."""
    try:
        edited = edit(value, context)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'the edit at site "{name}" does not fit its value ({" ".join(context.axes)}) = {value.shape}: '
            f"{str(error).splitlines()[0]} Edit: {edit}."
        ) from error
    if edited.shape != value.shape:
        raise ValueError(
            f'the edit at site "{name}" returns shape {edited.shape}; the site holds '
            f"({' '.join(context.axes)}) = {value.shape}. Edit: {edit}."
        )
    return edited.astype(value.dtype)


@dataclasses.dataclass(frozen=True)
class Site:
    """One site of a model, for given input shapes.

    Attributes:
      name: what users call it; ``"mlp_act.1"`` is the site ``mlp_act`` of layer 1 of an unscanned model.
      path: where its edit sits in the nested Flax collection.
      value: shape and dtype of the value in one layer.
      context: the context that an edit gets there (axes; positions and pre as shapes).
      layers: number of layers stacked by ``nn.scan``, or None where the site occurs once.
    """

    name: str
    path: tuple[str, ...]
    value: jax.ShapeDtypeStruct
    context: Context
    layers: int | None


@dataclasses.dataclass(frozen=True)
class SiteTable(Mapping[str, Site]):
    """The sites of a model by name, with shapes, in the order of a forward pass. Prints as a table."""

    sites: tuple[Site, ...]

    def __getitem__(self, name: str) -> Site:
        for entry in self.sites:
            if entry.name == name:
                return entry
        raise unknown("site", name, list(self))

    def __contains__(self, name: object) -> bool:
        return any(entry.name == name for entry in self.sites)

    def __iter__(self) -> Iterator[str]:
        return (entry.name for entry in self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def named(self, name: str) -> tuple[Site, ...]:
        """The sites meant by ``name``: the site itself, or in an unscanned model its occurrence in every layer.

        Raises:
          KeyError: for a name that the model does not have, with the nearest one.
        """
        if name in self:
            return (self[name],)
        found = tuple(entry for entry in self.sites if _base(entry.name) == name)
        if not found:
            raise unknown("site", name, list(self))
        return found

    def __str__(self) -> str:
        width = max((len(name) for name in self), default=0)
        return "\n".join(f"{entry.name:<{width}}  {_describe(entry)}" for entry in self.sites)


def list_sites(module: nn.Module, *inputs: Any) -> SiteTable:
    """The sites of a Flax module with their shapes, found by abstract evaluation: nothing is computed or allocated.

    Args:
      module: the model.
      *inputs: what it is called with; arrays, tracers or ``jax.ShapeDtypeStruct``.

    Returns:
      The table.

    Raises:
      ValueError: if two modules declare a site of the same name.
    """
    leaves, structure = jax.tree.flatten(inputs)
    return _list_sites(module, structure, tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves))


@functools.lru_cache(maxsize=256)
def _list_sites(module: nn.Module, structure: Any, shapes: tuple[tuple[tuple[int, ...], Any], ...]) -> SiteTable:
    inputs = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*shape) for shape in shapes])

    def trace(key: jax.Array, *inputs: Any) -> Any:
        params = module.init(key, *inputs)["params"]
        return module.apply({"params": params}, *inputs, mutable=["site_table"])[1].get("site_table", {})

    nested = jax.eval_shape(trace, jax.eval_shape(lambda: jax.random.key(0)), *inputs)
    sites: dict[str, Site] = {}
    for keys, record in jax.tree.leaves_with_path(nested, is_leaf=lambda node: isinstance(node, _Record)):
        path = tuple(key.key for key in keys)
        name = path[-1].removeprefix(_MARK)
        stacked = record.value.ndim - len(record.context.axes)
        layers = record.value.shape[0] if stacked else None
        one = jax.tree.map(lambda x, n=stacked: jax.ShapeDtypeStruct(x.shape[n:], x.dtype), record)
        if name in sites:
            raise ValueError(f'two sites are called "{name}": {"/".join(sites[name].path)} and {"/".join(path)}.')
        sites[name] = Site(name, path, one.value, one.context, layers)
    order = {name: i for i, name in enumerate(VOCABULARY)}
    return SiteTable(tuple(sorted(sites.values(), key=lambda entry: order.get(_base(entry.name), len(order)))))


def check_edits(table: SiteTable, edits: Mapping[str, Any]) -> None:
    """Refuse edits that the model would ignore or fail on, before anything is traced.

    Args:
      table: the model's sites for the shapes at hand.
      edits: from site name to edit; at scanned sites every array of an edit has a leading axis L.

    Raises:
      KeyError: unknown site (Flax would silently ignore it).
      TypeError: an edit that is not callable.
      ValueError: a wrong layer axis, or an edit that does not fit the site's shape.
    """
    for name, edit in edits.items():
        entry = table[name]
        require_edit(name, edit)
        one_layer = edit
        if entry.layers is not None:
            for keys, leaf in jax.tree.leaves_with_path(edit):
                shape = jax.numpy.shape(leaf)
                if not shape or shape[0] != entry.layers:
                    raise ValueError(
                        f'the edit at site "{name}" needs a leading layer axis of {entry.layers} on every array, but '
                        f"{jax.tree_util.keystr(keys)} has shape {shape}. Use at(model.sites, ...) to place it."
                    )
            one_layer = jax.eval_shape(_first_layer, edit)
        jax.eval_shape(
            functools.partial(_shape_only, name, entry.context.axes), one_layer, entry.value, _arrays(entry.context)
        )


def require_edit(name: str, edit: Any) -> None:
    """Refuse what is not an edit: it must be callable, and a pytree of arrays.

    Raises:
      TypeError: naming the site and what came.
    """
    if not callable(edit):
        raise TypeError(f'the edit at site "{name}" must be callable as edit(value, context), got {type(edit)}.')
    for leaf in jax.tree.leaves(edit):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
            raise TypeError(
                f'the edit at site "{name}" must be a pytree of arrays (a flax.struct.dataclass with __call__), but it '
                f"holds a {type(leaf).__name__}."
            )


def nest(table: SiteTable, flat: Mapping[str, Any]) -> dict[str, Any]:
    """From ``{site name: x}`` to the nested dictionary that Flax collections use."""
    nested: dict[str, Any] = {}
    for name, leaf in flat.items():
        *modules, last = table[name].path
        node = nested
        for step in modules:
            node = node.setdefault(step, {})
        node[last] = leaf
    return nested


def flatten(table: SiteTable, nested: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The inverse of ``nest`` for the named sites."""
    return {name: functools.reduce(lambda node, step: node[step], table[name].path, nested) for name in names}


def _base(name: str) -> str:
    return name.partition(".")[0]


def _key(name: str) -> str:
    return _MARK + name


def _first_layer(edit: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], edit)


def _shape_only(name: str, axes: tuple[str, ...], edit: Any, value: Any, arrays: tuple[Any, Any]) -> jax.Array:
    return apply_edit(name, edit, value, Context(axes, *arrays))


def _arrays(context: Context) -> tuple[Any, Any]:
    return context.positions, context.pre


def _describe(entry: Site) -> str:
    # Batch and position sizes are those of the inputs that the table was made for, not of the model.
    axes = zip(entry.context.axes, entry.value.shape, strict=True)
    sizes = [axis if axis in "BTS" else f"{axis}={size}" for axis, size in axes]
    stacked = [f"L={entry.layers}"] if entry.layers is not None else []
    return f"({', '.join(stacked + sizes)}) {entry.value.dtype}"
