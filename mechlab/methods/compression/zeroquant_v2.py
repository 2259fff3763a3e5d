"""ZeroQuant-V2: what post-training quantisation costs a decoder, and what repairs it (Yao et al. 2023, 2303.08302).

Kernels W (in, out), what they read, or both are put on grids of few bits, per output or per group of its inputs
(``rounding``, ``activations``). The rounded kernel W_q comes from one of four methods::

    RTN         the nearest points of the grid                                     ``decoders.quantise_blocks``
    GPTQ        one input after another, block after block                         ``gptq_blocks``
    ZQ-Local    trained, every kernel alone                                        ``reconstruction.local_blocks``
    ZQ-Global   trained, all kernels of a block together                           ``reconstruction.global_blocks``

and LoRC adds to any of them what is left, to rank m, beside the quantised kernel (``compensate_blocks``)::

    W - W_q = U S V^T,    A = U_m S_m^(1/2),    B = S_m^(1/2) V_m^T,    x W ~ x W_q + (x A) B

Everything inside the blocks is quantised; embeddings, unembedding, norms and the softmax are not::

    grid = {"bits": 4, "group": 32, "include_zero": True}                # the paper's asymmetric grid has 0 on it
    quantised = quantise_blocks(config, params, **grid)                  # or gptq_blocks(model, params, tokens, ...)
    repaired = compensate_blocks(config, params, quantised, rank=8)
    edits = round_inputs(model, (Scheme(bits=8),))                       # W4A8
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.kernel_forms import LowRank
from mechlab.core.model import Model
from mechlab.methods.compression.decoders import Place, kernel_of, places, sites_of, with_kernels
from mechlab.methods.compression.gptq import gptq, hessian
from mechlab.methods.compression.low_rank import compensate
from mechlab.methods.compression.rounding import quantise, require_bits, require_matrix
from mechlab.models.blocks import one_block
from mechlab.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int

THRESHOLDS = (0.1, 0.5)
"""Largest increases of perplexity in class 1 and class 2 (section 3)."""

PAPER_PERPLEXITY = 11.90
"""OPT-6.7B's, over WikiText-2, PTB and C4: thresholds as shares of it suit a model of another perplexity."""


def gptq_blocks(
    model: Model, params: Any, tokens: Int[ArrayLike, "B T"], *, bits: int, group: int | None = None, **options: Any
) -> Any:
    """GPTQ for every kernel of a decoder's blocks: block l is calibrated on what the quantised blocks before it give.

    Within a block all kernels are calibrated on the block as it was.

    Args:
      model, params: a decoder.
      tokens: calibration texts without padding.
      bits, group: of the grid, groups from the rows as they are by then.
      **options: of ``gptq.gptq``.

    Returns:
      Parameters with ``QTensor`` in place of kernels.

    Raises:
      ValueError: no calibration texts; otherwise as ``gptq.gptq``, naming the kernel and the layer.
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"gptq_blocks: wanted texts (B, T), got shape {tokens.shape}.")
    config = model.module.config
    stream = _first_stream(model, params, tokens)
    layers = []
    for layer in range(config.layers):
        own = {"blocks": jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"])}
        _, hessians = _run_and_measure(config, own["blocks"], stream, jnp.asarray(layer))
        done = {}
        for place in places(config):
            try:
                done[place.name] = gptq(
                    kernel_of(own, place), hessians[place.site], bits=bits, group=group, inputs=place.inputs, **options
                )
            except ValueError as error:
                raise ValueError(f"{place.name}, layer {layer}: {error}") from error
        layers.append(done)
        rounded = with_kernels(own, {name: kernel.dequantise() for name, kernel in done.items()})
        stream, _ = _run_and_measure(config, rounded["blocks"], stream, jnp.asarray(layer))
    return with_kernels(params, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))


def compensate_blocks(
    config: TransformerConfig,
    params: Any,
    quantised: Any,
    rank: int,
    *,
    factor_bits: int = 16,
    hessians: Mapping[str, Float[ArrayLike, "L I I"]] | None = None,
) -> Any:
    """LoRC for every kernel of a decoder's blocks: factors of rank m beside the quantised kernels, never added up.

    Args:
      config: of the decoder.
      params: as it was.
      quantised: what it became, with ``QTensor``.
      rank: m.
      factor_bits: 2..8 puts columns of A and rows of B on symmetric grids; 16 leaves them.
      hessians: by site, to weight the error by (ours); known values.

    Returns:
      Parameters with ``LowRank`` in place of kernels.

    Raises:
      ValueError: a rank that a kernel does not have, bits out of range; otherwise as ``low_rank.compensate``.
    """
    if factor_bits != 16:
        require_bits(factor_bits)

    def one(place: Place) -> LowRank:
        kernel, q = kernel_of(params, place), kernel_of(quantised, place)
        if hessians is None:
            both = jax.vmap(lambda w, q: compensate(w, q, rank))(kernel, q)
        else:
            # The weighting is host algebra in float64, layer by layer.
            h = np.asarray(hessians[place.site])
            layers = [
                compensate(kernel[i], jax.tree.map(lambda leaf, i=i: leaf[i], q), rank, h[i])
                for i in range(config.layers)
            ]
            both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        if factor_bits == 16 or rank == 0:
            return both
        a = jax.vmap(lambda a: _symmetric(a, factor_bits, "oc", place.inputs))(both.a)
        return LowRank(both.kernel, a, jax.vmap(lambda b: _symmetric(b, factor_bits, "ic", 1))(both.b))

    return with_kernels(quantised, {place.name: one(place) for place in places(config)})


def sensitivity_class(increase: ArrayLike, base: ArrayLike | None = None) -> np.ndarray:
    """1 for an increase of perplexity of at most 0.1, 2 for at most 0.5, 3 for more (section 3).

    Args:
      increase: over the model's own perplexity.
      base: the model's own; given, thresholds are the same shares of it as the paper's are of OPT-6.7B's 11.90 (ours).

    >>> sensitivity_class([-0.01, 0.1, 0.3, 9.0]).tolist(), sensitivity_class(0.1, base=2.0).tolist()
    ([1, 1, 2, 3], 3)
    """
    share = 1.0 if base is None else np.asarray(base) / PAPER_PERPLEXITY
    return np.asarray(1 + sum((np.asarray(increase) > limit * share).astype(int) for limit in THRESHOLDS))


def deepspeed_round(kernel: Float[ArrayLike, "I O"], *, bits: int, symmetric: bool) -> Float[Array, "I O"]:
    """Per output as DeepSpeed's quantisers do it: 2^b steps instead of 2^b - 1, and no zero on the grid.

    Symmetric: step 2 max |w| / 2^b, codes -2^(b-1)..2^(b-1) - 1. Asymmetric: step (max w - min w) / 2^b, codes
    0..2^b - 1 from round(min w / step) step.

    Raises:
      ValueError: bits out of range.
    """
    require_bits(bits)
    w = require_matrix(jnp.asarray(kernel), 1)
    if symmetric:
        step = 2 * jnp.abs(w).max(0) / 2**bits
        return jnp.clip(jnp.round(w / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
    low = w.min(0)
    step = (w.max(0) - low) / 2**bits
    zero = jnp.round(low / step) * step
    return jnp.clip(jnp.round((w - zero) / step), 0, 2**bits - 1) * step + zero


@functools.partial(jax.jit, static_argnames="model")
def _first_stream(model: Model, params: Any, tokens: jax.Array) -> jax.Array:
    return model.capture({"params": params}, tokens, sites=("resid_pre",))[1]["resid_pre"][0]


@functools.partial(jax.jit, static_argnames="config")
def _run_and_measure(
    config: TransformerConfig, params: Any, x: jax.Array, layer: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The stream after a block, and the Hessian of what its kernels read."""
    out, acts = one_block(config).capture({"params": {"block": params}}, x, layer, sites=sites_of(config))
    return out, {site: hessian(value.reshape(*value.shape[:2], -1)) for site, value in acts.items()}


def _symmetric(factor: jax.Array, bits: int, axis: str, inputs: int) -> jax.Array:
    return quantise(factor, bits=bits, axis=axis, symmetric=True, inputs=inputs).dequantise()
