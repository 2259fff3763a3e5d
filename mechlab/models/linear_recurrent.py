"""A language model without attention: linear recurrence with a decay that depends on the input, after RWKV-6.

A minimal form of Eagle (Peng et al. 2024, arXiv 2404.05892), for experiments that need a second architecture. Per
layer, with x the normed stream and a separate mixing weight mu for each use::

    x'  = x_t + mu (x_{t-1} - x_t)                                    token shift
    r, k, v, g = x' R, x' K, x' V, x' G;   w_t = exp(-exp(w_0 + tanh(x' A_w) B_w))
    S_t = diag(w_t) S_{t-1} + k_t^T v_t                               per head, (K, K)
    y_t = r_t (S_{t-1} + diag(u) k_t^T v_t)
    stream += (norm(y) silu(g)) O                                     norm per head
    stream += sigmoid(x' R_c) (relu(x' K_c)^2 V_c)                    channel mix

Sites (scanned ones have a leading axis L)::

    embed, resid_pre, resid_mid, resid_post   (B, T, D)
    hidden                                    (B, T, H, K)   y, what the recurrence reads out
    mlp_act                                   (B, T, F)      relu(x' K_c)^2
    final_norm, logits                        (B, T, D), (B, T, V)

Parameters: kernels (L, in, out) under ``blocks/mix`` (r, k, v, g, o) and ``blocks/channels`` (r, k, v). The recurrence
is a ``lax.scan`` over positions in float32: sequential, without the chunked form that makes such models fast.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from mechlab.core.model import Model
from mechlab.core.sites import LAYER_AXES, site
from mechlab.models.layers import Linear, Norm

_EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    """Shape of the model.

    Attributes:
      vocabulary: V.
      layers: L.
      width: D.
      heads: H, divides D; K = D / H.
      hidden: F of the channel mix; 3 D by default.
      decay_rank: width of the decay's bottleneck.
    """

    vocabulary: int
    layers: int
    width: int
    heads: int
    hidden: int | None = None
    decay_rank: int = 8

    def __post_init__(self) -> None:
        sizes = (self.vocabulary, self.layers, self.width, self.heads, self.decay_rank, self.hidden or 1)
        if min(sizes) < 1:
            raise ValueError(f"RecurrentConfig: all sizes must be at least 1, got {self}.")
        if self.width % self.heads:
            raise ValueError(f"RecurrentConfig: heads={self.heads} does not divide width={self.width}.")


def linear_recurrent(config: RecurrentConfig) -> Model:
    """The model; inputs are tokens (B, T) int, the output is float32 logits (B, T, V)."""
    return Model(_Recurrent(config), (jax.ShapeDtypeStruct((1, 2), jnp.int32),))


def recurrence(r: jax.Array, k: jax.Array, v: jax.Array, w: jax.Array, u: jax.Array) -> jax.Array:
    """y_t = r_t (S_{t-1} + diag(u) k_t^T v_t), S_t = diag(w_t) S_{t-1} + k_t^T v_t, S_{-1} = 0.

    Args:
      r, k, v, w: (B, T, H, K); w in (0, 1).
      u: (H, K), the weight of the token itself.

    Returns:
      (B, T, H, K) float32.
    """
    r, k, v, w = (x.astype(jnp.float32).swapaxes(0, 1) for x in (r, k, v, w))

    def step(state: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        r, k, v, w = now
        written = k[..., :, None] * v[..., None, :]
        y = jnp.einsum("bhk,bhkv->bhv", r, state + u[:, :, None] * written)
        return w[..., None] * state + written, y

    return jax.lax.scan(step, jnp.zeros((*r.shape[1:], r.shape[-1])), (r, k, v, w))[1].swapaxes(0, 1)


class _Recurrent(nn.Module):
    config: RecurrentConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        config = self.config
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers of shape (B, T), got {tokens.dtype}{tokens.shape}.")
        positions = jnp.arange(tokens.shape[1])
        table = self.param("embed", nn.initializers.normal(0.02), (config.vocabulary, config.width))
        x = site(self, "embed", table[tokens], "B T D", positions=positions)
        layers = nn.scan(
            _Block,
            variable_axes={**LAYER_AXES},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.layers,
        )
        x, _ = layers(config, name="blocks")(x, positions)
        x = site(self, "final_norm", Norm("layer", _EPS, name="norm")(x), "B T D", positions=positions)
        logits = Linear((config.vocabulary,), use_bias=False, name="unembed")(x.astype(jnp.float32))
        return site(self, "logits", logits, "B T V", positions=positions)


class _Block(nn.Module):
    config: RecurrentConfig

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, None]:
        x = site(self, "resid_pre", x, "B T D", positions=positions)
        x = x + _TimeMix(self.config, name="mix")(Norm("layer", _EPS, name="norm_mix")(x), positions)
        x = site(self, "resid_mid", x, "B T D", positions=positions)
        x = x + _ChannelMix(self.config, name="channels")(Norm("layer", _EPS, name="norm_channels")(x), positions)
        return site(self, "resid_post", x, "B T D", positions=positions), None


class _TimeMix(nn.Module):
    config: RecurrentConfig

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        config = self.config
        width, heads = config.width, config.heads
        shifted = _shift(x)
        mixed = self.param("mu", nn.initializers.constant(0.5), (5, width))

        def at(use: int) -> jax.Array:
            return x + mixed[use] * (shifted - x)

        r, k, v, g = (
            Linear((width,), use_bias=False, init_std=None, name=name)(at(i)) for i, name in enumerate("rkvg")
        )
        # Channels forget at different speeds from the start: w between exp(-exp(-5)), far, and exp(-exp(1)), near.
        base = self.param("decay", lambda _, shape: jnp.linspace(-5.0, 1.0, *shape), (width,))
        narrow = self.param("decay_in", nn.initializers.normal(width**-0.5), (width, config.decay_rank))
        wide = self.param("decay_out", nn.initializers.zeros, (config.decay_rank, width))
        w = jnp.exp(-jnp.exp(base + jnp.tanh(at(4) @ narrow) @ wide))
        u = self.param("bonus", nn.initializers.constant(0.5), (heads, width // heads))

        def split(z: jax.Array) -> jax.Array:
            return z.reshape(*z.shape[:-1], heads, width // heads)

        y = site(self, "hidden", recurrence(*map(split, (r, k, v, w)), u), "B T H K", positions=positions)
        y = Norm("layer", _EPS, name="norm")(y).reshape(x.shape).astype(x.dtype)
        return Linear((width,), use_bias=False, init_std=None, name="o")(y * jax.nn.silu(g))


class _ChannelMix(nn.Module):
    config: RecurrentConfig

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        config = self.config
        mixed = self.param("mu", nn.initializers.constant(0.5), (2, config.width))
        first, second = (x + mixed[use] * (_shift(x) - x) for use in range(2))
        hidden = config.hidden or 3 * config.width
        act = jnp.square(jax.nn.relu(Linear((hidden,), use_bias=False, init_std=None, name="k")(first)))
        act = site(self, "mlp_act", act, "B T F", positions=positions)
        gate = jax.nn.sigmoid(Linear((config.width,), use_bias=False, init_std=None, name="r")(second))
        return gate * Linear((config.width,), use_bias=False, init_std=None, name="v")(act)


def _shift(x: jax.Array) -> jax.Array:
    """x of the token before, zeros in front of the first."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
