"""Direct logit attribution: what each part of a decoder writes into the difference of two logits.

The last residual stream is a sum of what the embedding, every head, every bias and every MLP wrote into it. With the
scale of the final norm frozen at its value in this run, the logits are linear in the stream, so the logit difference is
the sum of the parts' own (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Wang et al. 2022,
arXiv 2211.00593, section 3.1)::

    logit[right] - logit[wrong] = sum over parts  N(part) . (u_right - u_wrong)  +  bias of the norm . (...)

N is the norm with its scale frozen: for LayerNorm minus the part's own mean, divided by the run's standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct

from mechlab.core.kernel_forms import as_array
from mechlab.core.model import Model
from mechlab.methods.circuits.reading import Read, at_read

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


@struct.dataclass
class Attribution:
    """Parts of a logit difference, in nats, per prompt.

    Attributes:
      embed: (B,) token and position embeddings.
      heads: (L, H, B) every attention head.
      attn_bias: (L, B) biases of the output projections (and of the second norm of a sandwich).
      mlps: (L, B) every MLP with its biases; zeros in a model of attention only.
      norm_bias: (B,) bias of the final norm.
    """

    embed: Float[Array, " B"]
    heads: Float[Array, "L H B"]
    attn_bias: Float[Array, "L B"]
    mlps: Float[Array, "L B"]
    norm_bias: Float[Array, " B"]

    def total(self) -> Float[Array, " B"]:
        """The sum of all parts: the logit difference, up to rounding."""
        layers = self.heads.sum((0, 1)) + self.attn_bias.sum(0) + self.mlps.sum(0)
        return self.embed + layers + self.norm_bias

    def by_depth(self) -> Float[Array, "L+1 B"]:
        """Embedding (with the norm's bias), then each layer's part; the cumulative sum is the frozen-norm lens."""
        layers = self.heads.sum(1) + self.attn_bias + self.mlps
        return jnp.concatenate([(self.embed + self.norm_bias)[None], layers])


def direct_attribution(
    model: Model, params: Any, tokens: Int[Array, "B T"], answers: Int[Array, "B 2"], *, read: Read = -1
) -> Attribution:
    """Split the difference of two logits into the parts that the model's components write directly.

    Cost: one forward. What a head does through later layers is not in its part; for that, patch or ablate it.

    Args:
      model: a decoder from ``models.transformer``, pre-norm or sandwich, with an unembedding.
      params: its parameters.
      tokens: (B, T).
      answers: (B, 2) or (2,) tokens, right and wrong.
      read: the position whose logits are explained, see ``reading.at_read``.

    Returns:
      The parts. They add up to the difference of the logits (where the model caps its logits: before the cap).

    Raises:
      ValueError: a post-norm model, a model without logits, or answers that are not pairs of tokens.
    """
    config = model.module.config
    if config.norm_order == "post" or not config.unembed:
        raise ValueError("direct_attribution needs a residual stream that is a plain sum, and logits at its end.")
    if answers.shape not in ((2,), (len(tokens), 2)) or not jnp.issubdtype(answers.dtype, jnp.integer):
        raise ValueError(f"answers: wanted tokens ({len(tokens)}, 2), got {answers.dtype}{answers.shape}.")
    outputs = ("attn_z",) if config.hidden is None else ("attn_z", "mlp_out")
    _, acts = model.capture({"params": params}, tokens, sites=("embed", "resid_post", *outputs))
    acts = {name: x.astype(jnp.float32) for name, x in acts.items()}
    over_layers = jax.vmap(lambda x: at_read(x, read))
    resid = at_read(acts["resid_post"][-1], read)

    columns = params["embed"]["tokens"].T if config.tied else params["unembed"]["kernel"]
    right, wrong = jnp.moveaxis(jnp.broadcast_to(answers, (len(tokens), 2)), -1, 0)
    direction = (columns[:, right] - columns[:, wrong]).T.astype(jnp.float32)
    final, norm_bias = _frozen_norm(config, params["final_norm"], resid)

    def part(x: jax.Array) -> jax.Array:
        return (final(x) * direction).sum(-1)

    heads, attn_bias = jax.vmap(lambda layer, z: _written(config, layer, z))(
        params["blocks"]["attn"], over_layers(acts["attn_z"])
    )
    mlps = jnp.zeros(attn_bias.shape) if config.hidden is None else over_layers(acts["mlp_out"])
    return Attribution(
        embed=part(at_read(acts["embed"], read)),
        heads=part(jnp.moveaxis(heads, 2, 1)),
        attn_bias=part(attn_bias),
        mlps=part(mlps),
        norm_bias=(norm_bias * direction).sum(-1),
    )


def _frozen_norm(config: Any, params: Any, at: jax.Array) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """The norm as a linear function, its scale frozen at that of ``at`` (..., D), and the bias that it adds (D,)."""
    centred = config.norm == "layer"

    def centre(x: jax.Array) -> jax.Array:
        return x - x.mean(-1, keepdims=True) if centred else x

    scale = params["scale"].astype(jnp.float32) + (config.norm == "rms_plus_one")
    factor = jax.lax.rsqrt(jnp.square(centre(at)).mean(-1, keepdims=True) + config.norm_eps) * scale
    return lambda x: centre(x) * factor, params.get("bias", jnp.zeros_like(scale))


def _written(config: Any, layer: Any, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the heads of one layer add to the stream, (B, H, D), and what its biases add, (B, D); z is (B, H, K)."""
    kernel = as_array(layer["o"]["kernel"], jnp.float32)
    heads = jnp.einsum("bhk,hkd->bhd", z, kernel)
    bias = jnp.broadcast_to(layer["o"].get("bias", jnp.zeros(kernel.shape[-1])), heads[:, 0].shape)
    if config.norm_order != "sandwich":
        return heads, bias
    out, norm_bias = _frozen_norm(config, layer["norm_out"], heads.sum(1) + bias)
    return jax.vmap(out, in_axes=1, out_axes=1)(heads), out(bias) + norm_bias
