"""AWQ: activation-aware weight quantisation (Lin et al. 2023, MLSys 2024, arXiv 2306.00978).

Inputs of a linear map that are large on average matter most. Their weights are scaled up before they are rounded, and
what makes the input is scaled down, so that the function stays and their rounding error falls by s. With a_i the mean
|x_i| over calibration tokens, for every group of maps that read the same input::

    s = max(a^alpha, 1e-4),   s <- s / sqrt(max s min s),   alpha in {0, 1/20, ..., 19/20}            (scale search)
    loss(alpha) = mean (F(x; W) - F(x; Q(W diag s) diag(s)^-1))^2

where F is the *inspected module*: all of attention for q, k, v; all of the MLP for up and gate; the map itself for o
and down. alpha = 0 is plain rounding, so that the best alpha is never worse on calibration tokens. Then, for every map
but q and k, the largest weights of each group are clipped::

    m = max |w| (1 - t / 20), t = 0..9:  the m with the smallest mean (x_g Q(clip(w_g, +-m)) - x_g w_g)^2  (clip search)

    params, report = awq(model, params, tokens, bits=4, group=32)      # kernels become QTensors; embeddings stay

Inputs are those of the unquantised model, which scaling does not change: one pass serves the search of all layers.

The observations that lead there are ``mixed_salient`` (a few inputs kept unrounded, the paper's Table 1) and
``scaled_salient`` (the same inputs scaled by one s instead, Table 2): with Delta the step of a group, the error of a
scaled weight changes by (Delta' / Delta) (1 / s), and Delta' stays Delta until s makes a scaled weight the largest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.model import Model
from mechlab.core.select import as_matrix
from mechlab.methods.compression.decoders import calibrate, inspect, kernel_of, places, quantise_blocks, with_kernels
from mechlab.methods.compression.rounding import find_grid, in_groups, quantise, require_group
from mechlab.models.fold import scalable, scale_inputs
from mechlab.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Int

RATIOS = tuple(i / 20 for i in range(20))
SHRINK = tuple(1 - t / 20 for t in range(10))
CLIP_TOKENS = 512
"""At most so many tokens, evenly spaced, are looked at in the clip search, as in the released code."""


class Search(NamedTuple):
    """A scale search, leaves with a leading axis L where layers are searched together.

    Attributes:
      s: the factors, shaped like one input.
      losses: (20,), of every ratio.
    """

    s: jax.Array
    losses: jax.Array


class Report(NamedTuple):
    """What AWQ chose.

    Attributes:
      searches: by site, leaves (L, ...).
      folded: parameters of the same function, scaled and clipped but not rounded.
    """

    searches: dict[str, Search]
    folded: Any


def awq_scale(
    inspect: Callable[[dict[str, jax.Array]], jax.Array],
    kernels: dict[str, jax.Array],
    magnitude: Float[ArrayLike, "*C"],
    *,
    bits: int,
    group: int | None,
    ratios: tuple[float, ...] = RATIOS,
) -> Search:
    """The factors of one input, for the kernels that read it.

    Args:
      inspect: F of the kernels, with the calibration input inside.
      kernels: input axes first, each.
      magnitude: a, the mean |x_i| of every input.
      bits, group: of the grid, plain asymmetric; None for one group of all inputs, here and below.
      ratios: alpha.

    Returns:
      The factors with the smallest loss, the first of equal ones.
    """
    a = jnp.asarray(magnitude)
    wanted = inspect(kernels)

    def scaled(alpha: jax.Array) -> jax.Array:
        s = jnp.maximum(a**alpha, 1e-4)
        return s / jnp.sqrt(s.max() * s.min())

    def loss(alpha: jax.Array) -> jax.Array:
        s = scaled(alpha)

        def rounded(kernel: jax.Array) -> jax.Array:
            wide = s.reshape(*s.shape, *[1] * (kernel.ndim - s.ndim))
            return quantise(kernel * wide, bits=bits, group=group, inputs=s.ndim).dequantise() / wide

        return jnp.square(inspect(jax.tree.map(rounded, kernels)) - wanted).mean()

    losses = jax.lax.map(loss, jnp.asarray(ratios))
    return Search(scaled(jnp.asarray(ratios)[losses.argmin()]), losses)


def awq_clip(
    kernel: Float[Array, "I O"], x: Float[Array, "N I"], *, bits: int, group: int | None
) -> Float[Array, "I/G O"]:
    """The largest |w| to keep, for each group of G inputs of each output.

    Args:
      kernel: (in, out), after folding.
      x: inputs, after folding; at most 512 of them, evenly spaced, are used.
      bits, group: of the grid.

    Raises:
      ValueError: as ``rounding.quantise``.
    """
    group = require_group(kernel.shape, group, "oc")
    rows = np.linspace(0, len(x) - 1, min(len(x), CLIP_TOKENS)).round().astype(int)
    seen = jnp.moveaxis(x[rows].reshape(len(rows), -1, group), 1, 0)
    cut, _ = in_groups(kernel, group, "oc")
    most = jnp.abs(cut).max(1)
    wanted = jnp.einsum("bng,bgo->bno", seen, cut)

    def error(shrink: jax.Array) -> jax.Array:
        clipped = jnp.clip(cut, -shrink * most[:, None], shrink * most[:, None])
        rounded = find_grid(clipped, bits=bits, axis=1).nearest(clipped)
        return jnp.square(jnp.einsum("bng,bgo->bno", seen, rounded) - wanted).mean(1)

    best = jax.lax.map(error, jnp.asarray(SHRINK)).argmin(0)
    return most * jnp.asarray(SHRINK)[best]


def salient(
    kernel: Float[Array, "I O"], magnitude: Float[Array, " I"], share: float, by: str, key: jax.Array | None = None
) -> Bool[Array, " I"]:
    """The inputs to protect, at least one: by mean |x| ("act"), by the length of their weights ("weight"), "random".

    Raises:
      ValueError: another rule, a share outside (0, 1], or no key for "random".
    """
    if by not in ("act", "weight", "random") or not 0 < share <= 1 or (by == "random" and key is None):
        raise ValueError(
            f'salient: wanted act, weight, or random with a key, and a share in (0, 1], got "{by}", {share}.'
        )
    scores = {"act": lambda: magnitude, "weight": lambda: jnp.square(kernel).sum(1)}
    order = jax.random.permutation(key, len(kernel)) if key is not None and by == "random" else scores[by]()
    return jnp.argsort(jnp.argsort(-order)) < max(1, round(share * len(kernel)))


def mixed_salient(
    kernel: jax.Array, kept: Bool[Array, " I"], *, bits: int, group: int | None, inputs: int = 1
) -> jax.Array:
    """The kernel rounded to nearest but for some inputs, whose weights stay as they are; shaped like the kernel."""
    rounded = quantise(kernel, bits=bits, group=group, inputs=inputs).dequantise().reshape(len(kept), -1)
    return jnp.where(kept[:, None], as_matrix(kernel, inputs=inputs), rounded).reshape(kernel.shape)


def scaled_salient(
    kernel: jax.Array,
    kept: Bool[Array, " I"],
    factor: float | jax.Array,
    *,
    bits: int,
    group: int | None,
    inputs: int = 1,
) -> tuple[jax.Array, Float[Array, "I/G O"]]:
    """The kernel rounded with some inputs scaled by a factor, taken back afterwards; and Delta' / Delta by group."""
    matrix = as_matrix(kernel, inputs=inputs)
    s = jnp.where(kept, factor, 1.0)[:, None]
    plain, scaled = (quantise(w, bits=bits, group=group) for w in (matrix, matrix * s))
    return (scaled.dequantise() / s).reshape(kernel.shape), scaled.scales / plain.scales


def awq(
    model: Model, params: Any, tokens: Int[ArrayLike, "B T"], *, bits: int, group: int | None, clip: bool = True
) -> tuple[Any, Report]:
    """A decoder whose blocks' kernels are quantised by AWQ; embeddings, norms and unembedding stay.

    Args:
      model: a decoder from ``models.transformer`` with unpadded pre-norm blocks.
      params: its parameters.
      tokens: calibration texts (B, T), without padding.
      bits: 2..8.
      group: inputs that share a step; it must divide the inputs of every kernel. None for all of them.
      clip: also search for clipping.

    Returns:
      Parameters in which ``QTensor`` stand where the kernels stood, and what was chosen.

    Raises:
      ValueError: as ``calibrate`` and ``rounding.quantise``, naming the kernel.
    """
    config = model.module.config
    for place in places(config):
        inputs = int(np.prod(kernel_of(params, place).shape[1 : 1 + place.inputs]))
        if group is not None and (group < 1 or inputs % group):
            raise ValueError(f"awq: group {group} does not divide the {inputs} inputs of {place.name}.")
    acts = calibrate(model, params, tokens)
    found: dict[str, Search] = {}
    folded = params
    for site, x in acts.items():
        if scalable(config, site):
            found[site] = _search(config, params["blocks"], site, x, bits=bits, group=group)
            folded = scale_inputs(config, folded, site, found[site].s)
    if clip:
        scaled = {site: x / found[site].s[:, None, None] if site in found else x for site, x in acts.items()}
        clipped = {
            place.name: _clip(kernel_of(folded, place), scaled[place.site], bits=bits, group=group, inputs=place.inputs)
            for place in places(config)
            if place.name not in ("attn/q", "attn/k")
        }
        folded = with_kernels(folded, clipped)
    return quantise_blocks(config, folded, bits=bits, group=group), Report(found, folded)


@functools.partial(jax.jit, static_argnames=("config", "site", "bits", "group"))
def _search(config: TransformerConfig, blocks: Any, site: str, x: jax.Array, *, bits: int, group: int | None) -> Search:
    """The search of every layer, in one program."""
    of = "attn" if site.startswith("attn") else "mlp"
    names = [place.name.split("/")[1] for place in places(config, site)]

    def one(params: Any, x: jax.Array, layer: jax.Array) -> Search:
        kernels = {name: params[name]["kernel"] for name in names}
        output = inspect(config, site, params, x, layer)
        return awq_scale(output, kernels, jnp.abs(x).mean((0, 1)), bits=bits, group=group)

    return jax.lax.map(lambda args: one(*args), (blocks[of], x, jnp.arange(config.layers)))


@functools.partial(jax.jit, static_argnames=("bits", "group", "inputs"))
def _clip(kernel: jax.Array, x: jax.Array, *, bits: int, group: int | None, inputs: int) -> jax.Array:
    def one(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        kernel, x = args
        matrix = as_matrix(kernel, inputs=inputs)
        by_group = awq_clip(matrix, x.reshape(-1, len(matrix)), bits=bits, group=group)
        most = by_group.repeat(len(matrix) // len(by_group), 0)
        return jnp.clip(matrix, -most, most).reshape(kernel.shape)

    return jax.lax.map(one, (kernel, x))
