"""The rest of a decoder's forward pass, from any layer and any position on.

A patch at layer l and position t leaves all layers below l and, because attention looks back only, all positions before
t as they were. So a patched run starts after layer l from the unpatched run's residual stream, and carries only the
positions ``start..stop-1``; attention reads the keys and values of earlier positions from the unpatched run. In the
last layer only the position that is read needs a query, an MLP and logits.

The functions below are the block of ``models/blocks.py`` once more, cut where patching cuts it and without sites; the
tests hold them to ``model.apply`` in every family. Letters: C cells (patched variants of the run), B prompts, T
positions, n = stop - start positions carried, G key-value heads with R query heads each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mechlab.core.model import Model
from mechlab.methods.circuits.reading import Metric
from mechlab.models.blocks import View, view_of, views
from mechlab.models.layers import ACTIVATIONS, MASKED, Norm, linear, rotate, softcap
from mechlab.models.transformer import TransformerConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

MEMORY = 2**27
"""Bytes of activations that the cells of one chunk may take together, by default."""


@struct.dataclass
class Run:
    """An unpatched run, from which patched ones are resumed.

    Attributes:
      config: the decoder's.
      stop: one more than the position whose logits are read; later positions cannot matter.
      params: the decoder's.
      acts: its activations by site, (L, B, T, ...); ``k`` and ``v`` at least.
    """

    config: TransformerConfig = struct.field(pytree_node=False)
    stop: int = struct.field(pytree_node=False)
    params: Any
    acts: Mapping[str, jax.Array]

    def layer(self, index: jax.Array | int) -> tuple[Any, dict[str, jax.Array]]:
        """Parameters and activations of one layer."""
        layers = self.params["blocks"], dict(self.acts)
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), layers)

    def view(self, index: jax.Array | int, start: int) -> View:
        """What the queries of positions ``start..stop-1`` see of all T keys in one layer."""
        view = view_of(self.config, views(self.config, jnp.arange(self.acts["k"].shape[2])), index)
        rows = slice(start, self.stop)
        turns = view.cos_sin and (view.cos_sin[0][:, rows], view.cos_sin[1][:, rows])
        return View(view.allowed[:, :, rows], turns)


def check_sources(
    model: Model, tokens: jax.Array, source: Mapping[str, jax.Array], positions: Sequence[int] | None
) -> list[int]:
    """The positions to patch, after checking that the sources fit the prompts.

    Raises:
      KeyError: a site that the model does not have.
      ValueError: naming the argument, what came and what was wanted.
    """
    table = model.sites_for(tokens)
    for site, x in source.items():
        wanted = (table[site].layers, *table[site].value.shape)
        if jnp.shape(x) != wanted:
            letters = " ".join(("L", *table[site].context.axes))
            raise ValueError(
                f"source of {site} is {jnp.shape(x)}, but for these prompts ({letters}) = {wanted} is needed."
            )
    chosen = list(range(tokens.shape[1])) if positions is None else [int(position) for position in positions]
    if not chosen or sorted(set(chosen)) != chosen or chosen[0] < 0 or chosen[-1] >= tokens.shape[1]:
        raise ValueError(f"positions must be increasing and in 0..{tokens.shape[1] - 1}, got {chosen}.")
    return chosen


def start_run(model: Model, params: Any, tokens: Int[Array, "B T"], read: int, sites: set[str]) -> Run:
    """Run the model unpatched and keep what resuming needs, and the activations of ``sites``.

    Args:
      model: a causal decoder from ``models.transformer``.
      params: its parameters.
      tokens: prompts.
      read: position whose logits will be read; negative counts from the end.
      sites: more sites to keep.

    Raises:
      ValueError: for a model that sees later tokens or whose MLP is of another kind, or a position that the prompts do
        not have.
    """
    config, length = model.module.config, tokens.shape[1]
    if not config.causal:
        raise ValueError("resuming at a position needs causal attention; for this model use core.sweeps.sweep.")
    if config.mlp is not None:
        raise ValueError(f"resuming knows plain and gated MLPs only, not {config.mlp}; use core.sweeps.sweep.")
    if not -length <= read < length:
        raise ValueError(f"read must be in {-length}..{length - 1} for prompts of {length} tokens, got {read}.")
    names = sorted({"k", "v", "resid_post"} | sites)
    acts = model.capture({"params": params}, tokens, sites=names)[1]
    return Run(config, read % length + 1, params, acts)


def finish(run: Run, resid: Float[Array, "C B n D"], layer: jax.Array | int, start: int) -> Float[Array, "C B D"]:
    """The residual stream after the last layer, at the position that is read.

    Args:
      run: the unpatched run.
      resid: the stream that enters ``layer`` at positions ``start..stop-1``.
      layer: first layer to run, 0..L; may be traced, one program serves all.
      start: the first position carried.
    """
    config, last = run.config, run.config.layers - 1

    def attend(index: Any, x: jax.Array, queries: int) -> jax.Array:
        params, acts = run.layer(index)
        view = run.view(index, start)
        read = x if config.norm_order == "post" else norm(config, params["norm_attn"], x)
        q, k, v = project(config, params["attn"], read, queries, view)
        allowed = view.allowed[:, :, -queries:]
        # The earlier keys are the same for all cells, so they are not copied for each.
        before, after = (
            scores(config, q, keys, seen)
            for keys, seen in ((acts["k"][:, :start], allowed[..., :start]), (k, allowed[..., start : run.stop]))
        )
        pattern = jax.nn.softmax(jnp.concatenate([before, after], -1), -1).astype(v.dtype)
        z = mix(pattern[..., :start], acts["v"][:, :start]) + mix(pattern[..., start:], v)
        return leave_block(config, params, x[:, :, -queries:], attn_out(config, params["attn"], z))

    x = jax.lax.fori_loop(layer, last, lambda index, x: attend(index, x, resid.shape[2]), resid)
    # Without a second branch a patch after the last layer would run that layer again.
    return jax.lax.cond(layer > last, lambda x: x[:, :, -1:], lambda x: attend(last, x, 1), x)[:, :, 0]


def sweep_cells(
    run: Run,
    patched: Callable[..., jax.Array],
    cells: Any,
    start: int,
    metric: Metric,
    answers: jax.Array | None,
    batch: int | None,
    mesh: Mesh | None,
    entered: int = 1,
) -> jax.Array:
    """The metric of every layer and cell, (L, cells, E, ...), in chunks of cells of one layer.

    Args:
      patched: (layer, cell, start) -> (E, B, n, D), E variants of the stream that enters layer + ``entered``.
      cells: pytree of NumPy arrays (cells, ...).
      start: the first position carried.
    """
    (total,) = {len(leaf) for leaf in jax.tree.leaves(cells)}
    one_cell = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], jnp.result_type(x)), cells)
    one = jax.eval_shape(lambda cell: patched(0, cell, start), one_cell)
    if batch is None:
        batch = max(1, MEMORY // (one.shape[0] * _cell_bytes(run, one, answers)))
    chunks = -(-total // batch)
    size = -(-total // chunks)
    if mesh is not None:
        size = -(-size // mesh.shape["data"]) * mesh.shape["data"]
        chunks = -(-total // size)

    def step(number: jax.Array) -> jax.Array:
        layer = number // chunks
        # The last chunk repeats its last cell instead of having a shape, and a program, of its own.
        index = jnp.minimum(number % chunks * size + jnp.arange(size), total - 1)
        some = jax.tree.map(lambda x: _spread(jnp.asarray(x)[index], mesh), cells)
        states = jax.vmap(lambda cell: patched(layer, cell, start))(some)
        states = _spread(states.reshape(-1, *states.shape[2:]), mesh)
        logits = read_out(run, finish(run, states, layer + entered, start), answers)
        values = jax.vmap(metric)(logits)
        return values.reshape(size, -1, *values.shape[1:])

    values = jax.lax.map(step, jnp.arange(run.config.layers * chunks))
    return values.reshape(run.config.layers, chunks * size, *values.shape[2:])[:, :total]


def _cell_bytes(run: Run, states: Any, answers: jax.Array | None) -> int:
    """Bytes of the activations of one cell within one layer, about."""
    config = run.config
    _, prompts, carried, width = states.shape
    hidden = (3 if config.gated else 2) * (config.hidden or 0)
    per_position = 6 * width + 3 * config.heads * config.d_head + hidden + 2 * config.heads * run.stop
    logits = config.vocabulary if answers is None else len(answers)
    return 4 * prompts * (carried * per_position + 2 * logits)


def _spread(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("data")))


def read_out(run: Run, resid: Float[Array, "... D"], answers: Int[Array, " N"] | None) -> Float[Array, "... V"]:
    """Final norm and logits, of all tokens or of ``answers`` only."""
    config, params = run.config, run.params
    if config.norm_order != "post":
        resid = norm(config, params["final_norm"], resid)
    kernel = params["embed"]["tokens"].T if config.tied else params["unembed"]["kernel"]
    if answers is not None:
        kernel = kernel[:, answers]
    return softcap(resid.astype(jnp.float32) @ kernel.astype(jnp.float32), config.logit_softcap)


def norm(config: TransformerConfig, params: Any, x: jax.Array) -> jax.Array:
    """The norm with these parameters."""
    normed: Any = Norm(config.norm, config.norm_eps, config.has_bias("norm")).apply({"params": params}, x)
    return normed


def project(
    config: TransformerConfig, params: Any, x: Float[Array, "C B n D"], queries: int, view: View
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q of the last ``queries`` positions, (C, B, queries, G, R, K); k and v of all, (C, B, n, G, K)."""
    heads = {"q": x[:, :, -queries:], "k": x, "v": x}
    q, k, v = (linear(x, params[name]["kernel"], params[name].get("bias")) for name, x in heads.items())
    if config.qk_norm:
        q, k = norm(config, params["norm_q"], q), norm(config, params["norm_k"], k)
    if view.cos_sin is not None:
        cos, sin = view.cos_sin
        q, k = rotate(q, (cos[:, -queries:], sin[:, -queries:])), rotate(k, view.cos_sin)
    return grouped(config, q), k, v


def grouped(config: TransformerConfig, q: Float[Array, "... H K"]) -> Float[Array, "... G R K"]:
    """Query heads, or anything per query head, by the key-value head that they read."""
    return q.reshape(*q.shape[:-2], config.n_kv_heads, -1, q.shape[-1])


def scores(
    config: TransformerConfig,
    q: Float[Array, "... n G R K"],
    k: Float[Array, "... S G K"],
    allowed: Float[Array, "1 1 n S"],
) -> Float[Array, "... G R n S"]:
    """Masked attention scores, float32."""
    scale = config.d_head**-0.5 if config.attn_scale is None else config.attn_scale
    found = jnp.einsum("...tgrk,...sgk->...grts", q, k, preferred_element_type=jnp.float32) * scale
    return jnp.where(allowed[:, :, None], softcap(found, config.attn_softcap), MASKED)


def mix(pattern: Float[Array, "... G R n S"], v: Float[Array, "... S G K"]) -> Float[Array, "... n G R K"]:
    """Values weighted by the pattern: z."""
    return jnp.einsum("...grts,...sgk->...tgrk", pattern, v)


def attn_out(config: TransformerConfig, params: Any, z: Float[Array, "... G R K"]) -> Float[Array, "... D"]:
    """What attention adds to the stream."""
    z = z.reshape(*z.shape[:-3], config.heads, config.d_head)
    out = linear(z, params["o"]["kernel"], params["o"].get("bias"), inputs=2)
    return norm(config, params["norm_out"], out) if config.norm_order == "sandwich" else out


def leave_block(
    config: TransformerConfig, params: Any, x: Float[Array, "... D"], out: Float[Array, "... D"]
) -> Float[Array, "... D"]:
    """``resid_post`` from ``resid_pre`` and ``attn_out``."""
    mid = after_attention(config, params, x, out)
    if config.hidden is None:
        return mid
    read = x if config.parallel else mid
    return after_mlp(config, params, mid, mlp_out(config, params["mlp"], mlp_act(config, params, read)))


def after_attention(config: TransformerConfig, params: Any, x: jax.Array, out: jax.Array) -> jax.Array:
    """The stream with ``attn_out`` in it."""
    return norm(config, params["norm_attn"], x + out) if config.norm_order == "post" else x + out


def mlp_act(config: TransformerConfig, params: Any, x: jax.Array) -> jax.Array:
    """The hidden units of the MLP, from the stream that it reads."""
    mlp = params["mlp"]
    x = x if config.norm_order == "post" else norm(config, params["norm_mlp"], x)
    up = linear(x, mlp["up"]["kernel"], mlp["up"].get("bias"))
    if not config.gated:
        return ACTIVATIONS[config.activation](up)
    return ACTIVATIONS[config.activation](linear(x, mlp["gate"]["kernel"], mlp["gate"].get("bias"))) * up


def mlp_out(config: TransformerConfig, params: Any, act: jax.Array) -> jax.Array:
    """What the MLP adds to the stream."""
    out = linear(act, params["down"]["kernel"], params["down"].get("bias"))
    return norm(config, params["norm_out"], out) if config.norm_order == "sandwich" else out


def after_mlp(config: TransformerConfig, params: Any, mid: jax.Array, out: jax.Array) -> jax.Array:
    """``resid_post`` from the stream after attention and ``mlp_out``."""
    return norm(config, params["norm_mlp"], mid + out) if config.norm_order == "post" else mid + out
