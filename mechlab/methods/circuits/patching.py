"""Exact activation patching: which parts of a run carry a difference between two prompts.

Put an activation of a source run (say, the clean prompt) into another run (the corrupted prompt) at one layer and one
place, and see what the output does (Vig et al. 2020, arXiv 2004.12265; Meng et al. 2022, arXiv 2202.05262, the restored
states of causal tracing; Wang et al. 2022, arXiv 2211.00593, heads). All cells of a heat map run in one program::

    acts = model.capture({"params": params}, clean, sites=("attn_z", "q", "k", "v", "attn_pattern"))[1]
    sweep = jax.jit(lambda params, acts: patch_heads_by_position(model, params, corrupted, acts, metric))
    maps = sweep(params, acts)          # {"attn_z": (L, H, T), ..., "k": (L, G, T), ...}

Every value is what ``model.apply`` with a ``Replace`` at that place gives, to rounding. The work that cannot change
anything is left out: layers below the patched one; positions before it, because attention looks back only; in the last
layer all but the position that is read; all logits but those of ``answers``. Cells share the weights that they read, a
chunk of cells at a time. Call these functions under ``jax.jit``, or they compile anew each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mechlab.core.errors import unknown
from mechlab.core.model import Model
from mechlab.methods.circuits import resumed
from mechlab.methods.circuits.reading import Metric
from mechlab.methods.circuits.resumed import Run, sweep_cells

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

STREAM_SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
HEAD_SITES = ("q", "k", "v", "attn_pattern", "attn_z")

PROGRAMS = 8
"""Positions are patched in at most this many groups; each group is compiled for the positions that follow its first."""


def patch_residual(
    model: Model,
    params: Any,
    tokens: Int[Array, "B T"],
    source: Float[Array, "L B T D"],
    metric: Metric,
    *,
    site: str = "resid_post",
    positions: Sequence[int] | None = None,
    read: int = -1,
    answers: Int[Array, " N"] | None = None,
    batch: int | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "L P ..."]:
    """The metric after patching the residual stream, or what a sublayer adds to it, layer by position.

    Cost: about L T / 4 forwards of B prompts in all.

    Args:
      model: a causal decoder from ``models.transformer``.
      params: its parameters.
      tokens: prompts of the run that is patched, all of the same length.
      source: the site in the source run on prompts of the same shape, from ``model.capture``.
      metric: of the logits (B, V) at position ``read``; any array.
      site: one of ``STREAM_SITES``.
      positions: positions to patch, one at a time, increasing; all by default. Where both runs have the same tokens up
        to some position, those before it change nothing.
      read: position whose logits the metric sees; the last by default.
      answers: the metric sees the logits of these tokens only, (B, N); of the whole vocabulary by default.
      batch: cells at once; by default what fits ``resumed.MEMORY``.
      mesh: spread the cells over the mesh's "data" axis.

    Returns:
      (L, P, ...): the metric for each patched layer and position.

    Raises:
      KeyError: a site that is not in the residual stream, or that this model does not have.
      ValueError: positions that the prompts do not have, a source that does not fit them, a model that is not causal.
    """
    if site not in STREAM_SITES:
        raise unknown("site of the residual stream", site, STREAM_SITES)
    positions = resumed.check_sources(model, tokens, {site: source}, positions)
    run = resumed.start_run(model, params, tokens, read, {"resid_pre", "attn_out"})
    config = run.config

    def after(layer: jax.Array, position: jax.Array) -> jax.Array:
        """``resid_post`` at the patched position, (B, 1, D)."""
        params, acts = run.layer(layer)
        here = {name: _at(acts[name], position) for name in acts}
        new = _at(jax.lax.dynamic_index_in_dim(source, layer, keepdims=False), position).astype(config.dtype)
        if site == "attn_out":
            return resumed.leave_block(config, params, here["resid_pre"], new)
        if site == "mlp_out":
            # Parallel blocks have no resid_mid, but the same sum.
            mid = resumed.after_attention(config, params, here["resid_pre"], here["attn_out"])
            return resumed.after_mlp(config, params, mid, new)
        if site == "resid_mid":
            mlp = resumed.mlp_out(config, params["mlp"], resumed.mlp_act(config, params, new))
            return resumed.after_mlp(config, params, new, mlp)
        return new

    def patched(layer: jax.Array, position: jax.Array, start: int) -> jax.Array:
        carried = "resid_pre" if site == "resid_pre" else "resid_post"
        stream = run.layer(layer)[1][carried][:, start : run.stop]
        return _put(stream, after(layer, position), position - start)[None]

    def group(start: int, positions: np.ndarray) -> jax.Array:
        entered = 0 if site == "resid_pre" else 1
        return sweep_cells(run, patched, positions, start, metric, answers, batch, mesh, entered)[:, :, 0]

    return _by_position(run, group, positions, metric, answers)


def patch_heads(
    model: Model,
    params: Any,
    tokens: Int[Array, "B T"],
    source: Mapping[str, jax.Array],
    metric: Metric,
    *,
    positions: Sequence[int] | None = None,
    read: int = -1,
    answers: Int[Array, " N"] | None = None,
    batch: int | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Float[Array, "L H ..."]]:
    """The metric after patching one head at all positions, layer by head, for several kinds of activations at once.

    Cost: about L H / 2 forwards of B prompts for each kind.

    Args:
      source: {site: activation in the source run}, any of ``HEAD_SITES``, from ``model.capture``.
      positions: positions that are patched together; all by default. Of ``attn_pattern`` the queries' positions.
      model, params, tokens, metric, read, answers, batch, mesh: as for ``patch_residual``; ``batch`` counts key-value
        heads, each of which stands for the cells of all its kinds and query heads.

    Returns:
      {site: (L, H, ...)}; (L, G, ...) for ``k`` and ``v``, one key-value head at a time.

    Raises:
      KeyError: a site that is not in ``HEAD_SITES``.
      ValueError: as ``patch_residual``; also for no source at all.
    """
    positions = _checked_heads(model, tokens, source, positions)
    run = resumed.start_run(model, params, tokens, read, {"resid_pre", "q", "attn_z"})
    chosen = jnp.zeros(tokens.shape[1], bool).at[np.asarray(positions)].set(True)
    start = min(positions[0], run.stop - 1)

    def patched(layer: jax.Array, group: jax.Array, start: int) -> jax.Array:
        params, acts = run.layer(layer)
        z = _patched_z(run, source, tuple(source), layer, group, chosen, start)
        out = resumed.attn_out(run.config, params["attn"], z)
        x = jnp.broadcast_to(acts["resid_pre"][:, start : run.stop], out.shape)
        return resumed.leave_block(run.config, params, x, out)

    groups = np.arange(run.config.n_kv_heads)
    values = sweep_cells(run, patched, groups, start, metric, answers, batch, mesh)
    return _by_site(run, values, tuple(source))


def patch_heads_by_position(
    model: Model,
    params: Any,
    tokens: Int[Array, "B T"],
    source: Mapping[str, jax.Array],
    metric: Metric,
    *,
    positions: Sequence[int] | None = None,
    read: int = -1,
    answers: Int[Array, " N"] | None = None,
    batch: int | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Float[Array, "L H P ..."]]:
    """The metric after patching one head at one position, for several kinds of activations at once.

    Cost: about L H T / 4 forwards of B prompts for each kind.

    Args:
      source: {site: activation in the source run}, any of ``HEAD_SITES``, from ``model.capture``.
      positions: positions to patch, one at a time, increasing; all by default. Of ``attn_pattern`` the query's.
      model, params, tokens, metric, read, answers, batch, mesh: as for ``patch_heads``.

    Returns:
      {site: (L, H, P, ...)}; (L, G, P, ...) for ``k`` and ``v``, one key-value head at a time.

    Raises:
      As ``patch_heads``.
    """
    positions = _checked_heads(model, tokens, source, positions)
    run = resumed.start_run(model, params, tokens, read, {"resid_pre", "q", "attn_z"})
    config, groups = run.config, run.config.n_kv_heads
    # A key or value is read by all later queries; the others change z at their own position only.
    spreading = tuple(site for site in source if site in ("k", "v"))
    local = tuple(site for site in source if site not in spreading)

    def patched(layer: jax.Array, cell: dict[str, jax.Array], start: int) -> jax.Array:
        params, acts = run.layer(layer)
        position, rows = cell["position"], slice(start, run.stop)
        here = jnp.arange(tokens.shape[1]) == position

        def leave(x: jax.Array, z: jax.Array) -> jax.Array:
            out = resumed.attn_out(config, params["attn"], z)
            return resumed.leave_block(config, params, jnp.broadcast_to(x, out.shape), out)

        states = []
        if local:
            z = _patched_z(run, source, local, layer, cell["group"], here, start)
            new = leave(_at(acts["resid_pre"], position), _at(z, position - start, axis=2))
            states.append(jax.vmap(lambda new: _put(acts["resid_post"][:, rows], new, position - start))(new))
        if spreading:
            z = _patched_z(run, source, spreading, layer, cell["group"], here, start)
            states.append(leave(acts["resid_pre"][:, rows], z))
        return jnp.concatenate(states)

    def group(start: int, positions: np.ndarray) -> dict[str, jax.Array]:
        cells = {"position": np.repeat(positions, groups), "group": np.tile(np.arange(groups), len(positions))}
        values = sweep_cells(run, patched, cells, start, metric, answers, batch, mesh)
        values = values.reshape(values.shape[0], len(positions), groups, *values.shape[2:])
        return jax.vmap(lambda x: _by_site(run, x, (*local, *spreading)), 1, 1)(values)

    maps = _by_position(run, group, positions, metric, answers)
    return {site: jnp.swapaxes(maps[site], 1, 2) for site in source}


def patch_neurons(
    model: Model,
    params: Any,
    tokens: Int[Array, "B T"],
    source: Float[Array, "L B T F"],
    metric: Metric,
    *,
    neurons: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    read: int = -1,
    answers: Int[Array, " N"] | None = None,
    batch: int | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "L N ..."]:
    """The metric after patching one hidden unit of an MLP (``mlp_act``) at all positions, layer by unit.

    Cost: about L N / 2 forwards of B prompts.

    Args:
      source: ``mlp_act`` of the source run, from ``model.capture``.
      neurons: units to patch, one at a time; all F by default.
      positions: positions that are patched together; all by default.
      model, params, tokens, metric, read, answers, batch, mesh: as for ``patch_residual``.

    Returns:
      (L, N, ...).

    Raises:
      ValueError: as ``patch_residual``; also for units that the model does not have.
      KeyError: for a model without MLPs.
    """
    positions = resumed.check_sources(model, tokens, {"mlp_act": source}, positions)
    units = np.arange(source.shape[-1]) if neurons is None else np.asarray(neurons)
    if units.ndim != 1 or not units.size or units.min() < 0 or units.max() >= source.shape[-1]:
        raise ValueError(f"neurons must be a list of units in 0..{source.shape[-1] - 1}, got {neurons}.")
    run = resumed.start_run(model, params, tokens, read, {"resid_pre", "attn_out", "mlp_act"})
    chosen = jnp.zeros(tokens.shape[1], bool).at[np.asarray(positions)].set(True)
    start = min(positions[0], run.stop - 1)
    rows = slice(start, run.stop)

    def patched(layer: jax.Array, unit: jax.Array, start: int) -> jax.Array:
        params, acts = run.layer(layer)
        new = jax.lax.dynamic_index_in_dim(source, layer, keepdims=False).astype(run.config.dtype)
        here = chosen[rows, None] & (jnp.arange(source.shape[-1]) == unit)
        out = resumed.mlp_out(run.config, params["mlp"], jnp.where(here, new[:, rows], acts["mlp_act"][:, rows]))
        mid = resumed.after_attention(run.config, params, acts["resid_pre"][:, rows], acts["attn_out"][:, rows])
        return resumed.after_mlp(run.config, params, mid, out)[None]

    return sweep_cells(run, patched, units, start, metric, answers, batch, mesh)[:, :, 0]


def _patched_z(
    run: Run,
    source: Mapping[str, jax.Array],
    sites: tuple[str, ...],
    layer: jax.Array,
    group: jax.Array,
    here: jax.Array,
    start: int,
) -> jax.Array:
    """z of positions ``start..`` of all heads, (cells, B, n, G, R, K), a key-value head or one of its readers patched.

    Cells are in the order of ``sites``; ``k`` and ``v`` have one, the others one per query head of the group. ``here``
    says which positions are patched, (T,) bool.
    """
    config, rows = run.config, slice(start, run.stop)
    sources = {site: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for site, x in source.items()}
    base = _group_acts(run, run.layer(layer)[1], group)
    new = _group_acts(run, sources, group)
    seen = run.view(layer, start).allowed

    def z_of(site: str, member: jax.Array) -> jax.Array:
        """z of the group, (B, n, 1, R, K), with ``site`` patched in the query heads ``member``, (R,) bool."""

        def choose(mask: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.where(mask, new[site].astype(x.dtype), x)

        of_query = here[:, None, None, None] & member[:, None]
        if site == "attn_z":
            return choose(of_query, base["attn_z"])[:, rows]
        acts = dict(base)
        if site in ("k", "v"):
            acts[site] = choose(here[:, None, None], base[site])
        if site == "q":
            acts["q"] = choose(of_query, base["q"])
        pattern = jax.nn.softmax(resumed.scores(config, acts["q"][:, rows], acts["k"], seen), -1)
        if site == "attn_pattern":
            pattern = jnp.where(member[:, None, None] & here[rows, None], new[site][..., rows, :], pattern)
        return resumed.mix(pattern.astype(acts["v"].dtype), acts["v"])

    z = jnp.concatenate([jax.vmap(lambda member, site=site: z_of(site, member))(_members(run, site)) for site in sites])
    whole = resumed.grouped(config, run.layer(layer)[1]["attn_z"][:, rows])
    return jax.vmap(lambda z: jax.lax.dynamic_update_slice_in_dim(whole, z.astype(whole.dtype), group, axis=2))(z)


def _group_acts(run: Run, acts: Mapping[str, jax.Array], group: jax.Array) -> dict[str, jax.Array]:
    """The part of one key-value head: q and z (B, T, 1, R, K), k and v (B, T, 1, K), pattern (B, 1, R, T, S)."""
    found = {}
    for site in set(acts) & set(HEAD_SITES):
        x, axis = acts[site], 2
        if site == "attn_pattern":
            x, axis = x.reshape(x.shape[0], run.config.n_kv_heads, -1, *x.shape[2:]), 1
        elif site in ("q", "attn_z"):
            x = resumed.grouped(run.config, x)
        found[site] = jax.lax.dynamic_slice_in_dim(x, group, 1, axis)
    return found


def _members(run: Run, site: str) -> jax.Array:
    """Which query heads of a group each of its cells patches: (cells, R) bool."""
    readers = run.config.heads // run.config.n_kv_heads
    return jnp.ones((1, readers), bool) if site in ("k", "v") else jnp.eye(readers, dtype=bool)


def _by_site(run: Run, values: jax.Array, sites: tuple[str, ...]) -> dict[str, jax.Array]:
    """From (L, G, cells of a group, ...) to {site: (L, H or G, ...)}."""
    ends = np.cumsum([len(_members(run, site)) for site in sites])
    parts = jnp.split(values, ends[:-1], axis=2)
    return {
        site: x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]) for site, x in zip(sites, parts, strict=True)
    }


def _by_position(
    run: Run,
    group: Callable[[int, np.ndarray], Any],
    positions: Sequence[int],
    metric: Metric,
    answers: jax.Array | None,
) -> Any:
    """``group(start, positions) -> (L, P, ...)`` over a few groups of neighbouring positions, put together along P.

    A patch after the position that is read changes nothing: there the value is the metric of the unpatched run.
    """
    reached = np.asarray([position for position in positions if position < run.stop])
    parts = [group(int(some[0]), some) for some in np.array_split(reached, PROGRAMS) if len(some)]
    late = len(positions) - len(reached)
    if not late:
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *parts)
    value = metric(resumed.read_out(run, run.acts["resid_post"][-1, :, run.stop - 1], answers))
    if not parts:
        raise ValueError(f"all positions {list(positions)} lie after the position that is read, {run.stop - 1}.")

    def join(*parts: jax.Array) -> jax.Array:
        shape = (parts[0].shape[0], late, *parts[0].shape[2:])
        return jnp.concatenate([*parts, jnp.broadcast_to(value, shape)], 1)

    return jax.tree.map(join, *parts)


def _at(x: jax.Array, position: jax.Array, axis: int = 1) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, position, 1, axis)


def _put(stream: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """The stream (B, n, D) with ``new`` (B, 1, D) at one index."""
    return jax.lax.dynamic_update_slice_in_dim(stream, new.astype(stream.dtype), index, axis=1)


def _checked_heads(
    model: Model, tokens: jax.Array, source: Mapping[str, jax.Array], positions: Sequence[int] | None
) -> list[int]:
    if not source:
        raise ValueError(f"source must hold at least one of {', '.join(HEAD_SITES)}, got nothing.")
    for site in source:
        if site not in HEAD_SITES:
            raise unknown("site of a head", site, HEAD_SITES)
    return resumed.check_sources(model, tokens, source, positions)
