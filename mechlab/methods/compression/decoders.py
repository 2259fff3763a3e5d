"""The kernels of a decoder's blocks, by name: what quantisers are mapped over, and how a block is inspected::

    for place in places(config):                      # attn/q, attn/k, attn/v, attn/o, mlp/up, mlp/gate, mlp/down
        kernel = kernel_of(params, place)              # all layers, (L, in, out)
    params = with_kernels(params, {"attn/q": ...})     # arrays, or QTensors

Embeddings, norms, biases and the unembedding are never touched: quantising them by accident changes every number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.kernel_forms import LowRank, QTensor, Quantised
from mechlab.core.model import Model
from mechlab.kernels.w4a16 import pack
from mechlab.methods.compression.rounding import quantise
from mechlab.models.blocks import run_attention, run_mlp
from mechlab.models.fold import READERS, readers
from mechlab.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Int


class Place(NamedTuple):
    """A kernel of the blocks.

    Attributes:
      name: such as "attn/q".
      site: what it reads.
      inputs: number of its input axes.
    """

    name: str
    site: str
    inputs: int


def sites_of(config: TransformerConfig) -> tuple[str, ...]:
    """The sites that kernels of this model's blocks read."""
    has_mlp = config.hidden is not None and config.mlp is None
    return tuple(site for site in READERS if has_mlp or not site.startswith("mlp"))


def places(config: TransformerConfig, site: str | None = None) -> tuple[Place, ...]:
    """Every kernel of the blocks, or those that read one site, in the order of a forward."""
    wanted = sites_of(config) if site is None else (site,)
    return tuple(Place(name, at, 2 if at == "attn_z" else 1) for at in wanted for name in readers(config, at))


def kernel_of(params: Any, place: Place) -> Any:
    """The kernel, all layers."""
    of, part = place.name.split("/")
    return params["blocks"][of][part]["kernel"]


def with_kernels(params: Any, kernels: Mapping[str, Any]) -> Any:
    """The parameters with some kernels replaced, by name; all else is shared."""
    blocks = {name: dict(part) for name, part in params["blocks"].items()}
    for name, kernel in kernels.items():
        of, part = name.split("/")
        blocks[of][part] = {**blocks[of][part], "kernel": kernel}
    return {**params, "blocks": blocks}


def quantise_blocks(config: TransformerConfig, params: Any, **grid: Any) -> Any:
    """Every kernel of the blocks rounded to nearest (RTN), layer by layer; ``grid`` as for ``rounding.quantise``.

    Raises:
      ValueError: a group that does not divide a kernel, named.
    """

    def rounded(place: Place) -> QTensor:
        try:
            one: Callable[..., QTensor] = functools.partial(quantise, inputs=place.inputs, **grid)
            return jax.vmap(one)(kernel_of(params, place))
        except ValueError as error:
            raise ValueError(f"{place.name}: {error}") from error

    return with_kernels(params, {place.name: rounded(place) for place in places(config)})


def dequantise_blocks(params: Any) -> Any:
    """The parameters with plain arrays for quantised and low-rank kernels, for what needs kernels to compute with.

    Many variants of one decoder then share a compiled program.
    """

    def whole(x: Any) -> Any:
        if isinstance(x, LowRank):
            # One layer's product of factors; the layers are in front.
            return whole(x.kernel) + jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(x.a, x.b)
        return x.dequantise() if isinstance(x, Quantised) else x

    return jax.tree.map(whole, params, is_leaf=lambda x: isinstance(x, Quantised | LowRank))


def pack_blocks(params: Any) -> Any:
    """The parameters with every ``QTensor`` at two codes a byte (``kernels.w4a16.Packed4``); any model runs them.

    Raises:
      ValueError: as ``kernels.w4a16.pack``: only asymmetric grids of 4 bits with an even group along the inputs.
    """

    def packed(x: Any) -> Any:
        return pack(x) if isinstance(x, QTensor) else x

    return jax.tree.map(packed, params, is_leaf=lambda x: isinstance(x, QTensor))


def calibrate(
    model: Model, params: Any, tokens: Int[ArrayLike, "B T"], *, also: tuple[str, ...] = ()
) -> dict[str, jax.Array]:
    """What every kernel of the blocks reads on calibration texts, all layers in one pass: (L, B, T, ...) by site.

    Args:
      model: a decoder from ``models.transformer``.
      params: its parameters.
      tokens: texts without padding.
      also: further sites to keep, such as "resid_pre", what each block reads.

    Raises:
      ValueError: no texts, or activations that are not finite, naming the site and the layer.
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"calibrate: wanted texts (B, T), got shape {tokens.shape}.")
    acts = _inputs(model, params, tokens, (*sites_of(model.module.config), *also))
    for site, x in acts.items():
        finite = np.isfinite(np.asarray(x)).reshape(len(x), -1).all(1)
        if not finite.all():
            raise ValueError(f'calibrate: site "{site}" is not finite in layer {int(np.argmin(finite))}.')
    return acts


@functools.partial(jax.jit, static_argnames=("model", "sites"))
def _inputs(model: Model, params: Any, tokens: jax.Array, sites: tuple[str, ...]) -> dict[str, jax.Array]:
    return model.capture({"params": params}, tokens, sites=sites)[1]


def inspect(
    config: TransformerConfig, site: str, params: Any, x: jax.Array, layer: jax.Array | int
) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """The module whose output a search looks at, as a function of some kernels that read the site (AWQ, AdaDim).

    All of attention for q, k and v, so that the softmax counts; all of the MLP for up and gate; o and down alone.

    Args:
      config: of the model.
      site: one of ``sites_of``.
      params: ``blocks/attn`` or ``blocks/mlp`` of one layer.
      x: the site on calibration texts, (B, T, ...).
      layer: its number; may be traced.

    Returns:
      ``{name without "attn/": kernel} -> output``; kernels that are not given stay.
    """

    def output(kernels: dict[str, jax.Array]) -> jax.Array:
        own = {**params, **{name: {**params[name], "kernel": kernel} for name, kernel in kernels.items()}}
        if site == "attn_in":
            return run_attention(config, own, x, layer)
        if site == "mlp_in":
            return run_mlp(config, own, x)
        (kernel,) = kernels.values()
        return jnp.tensordot(x, kernel, axes=x.ndim - 2)

    return output
