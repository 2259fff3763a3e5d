"""The decoder transformer, layers scanned: GPT-2 and Llama shapes by configuration.

Sites (scanned ones have a leading axis L; S is the key's position; F is the hidden width)::

    embed                       (B, T, D)
    resid_pre, resid_mid, resid_post, attn_out, mlp_out   (B, T, D)
    attn_in, mlp_in             (B, T, D)      normed inputs; q_in, k_in, v_in: attn_in as each of its readers sees it
    q, attn_z                   (B, T, H, K)   q after rotary positions; z before the output projection
    k, v                        (B, T, G, K)   G key-value heads; k after rotary positions
    attn_scores, attn_pattern   (B, H, T, S)   before and after the softmax
    mlp_pre, mlp_act            (B, T, F)      before and after the activation; in a gated MLP the gate's, and the
                                               product that the down-projection reads
    mlp_up                      (B, T, F)      gated MLPs only
    final_norm, logits          (B, T, D), (B, T, V)

Parameters: kernels are (in, out), attention kernels q, k, v (L, D, H, K) and o (L, H, K, D).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mechlab.core.errors import did_you_mean
from mechlab.core.model import Model, Variables
from mechlab.core.sites import LAYER_AXES, site
from mechlab.models.layers import ACTIVATIONS, Linear, Norm, attention, rotate_positions

LOGICAL_AXES: dict[str, tuple[str | None, ...]] = {
    "**/embed/tokens": ("vocabulary", "residual"),
    "**/embed/positions": (None, "residual"),
    "**/blocks/attn/[qkv]/kernel": ("layer", "residual", "head", "width"),
    "**/blocks/attn/[qkv]/bias": ("layer", "head", "width"),
    "**/blocks/attn/o/kernel": ("layer", "head", "width", "residual"),
    "**/blocks/mlp/up/kernel|**/blocks/mlp/gate/kernel": ("layer", "residual", "hidden"),
    "**/blocks/mlp/up/bias": ("layer", "hidden"),
    "**/blocks/mlp/down/kernel": ("layer", "hidden", "residual"),
    "**/unembed/kernel": ("residual", "vocabulary"),
}
"""Logical axis names of the parameters, for ``core/sharding.py``; what is not named is replicated."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a decoder.

    Attributes:
      vocabulary, layers, width, heads, hidden, context: V, L, D, H, F and the longest text.
      kv_heads: G, number of key-value heads; H by default.
      head_width: K; D / H by default.
      norm: "layer" or "rms".
      norm_eps: added to the variance.
      positions: "learned" or "rotary".
      rope_theta: base of the rotary wavelengths.
      gated: gated MLP (SwiGLU) instead of the plain one.
      activation: of the MLP, one of ``models.layers.ACTIVATIONS``.
      bias: biases on all linear maps but the unembedding.
      tied: unembed with the transposed token embedding.
      dtype: compute dtype; parameters are float32; norms, softmax and logits are computed in float32.
    """

    vocabulary: int
    layers: int
    width: int
    heads: int
    hidden: int
    context: int
    kv_heads: int | None = None
    head_width: int | None = None
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    positions: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10_000.0
    gated: bool = False
    activation: str = "gelu_tanh"
    bias: bool = True
    tied: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value} must be at least 1"
            for name in ("vocabulary", "layers", "width", "heads", "hidden", "context", "kv_heads", "head_width")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if problems:
            raise ValueError(f"TransformerConfig: {'; '.join(problems)}.")
        if self.head_width is None and self.width % self.heads:
            problems.append(f"heads={self.heads} does not divide width={self.width}; give head_width")
        if self.heads % self.n_kv_heads:
            problems.append(f"kv_heads={self.n_kv_heads} does not divide heads={self.heads}")
        if self.positions == "rotary" and self.d_head % 2:
            problems.append(f"rotary positions need an even head width, got {self.d_head}")
        if self.norm not in ("layer", "rms"):
            problems.append(f'norm must be "layer" or "rms", got "{self.norm}"')
        if self.positions not in ("learned", "rotary"):
            problems.append(f'positions must be "learned" or "rotary", got "{self.positions}"')
        if self.activation not in ACTIVATIONS:
            problems.append(f'activation "{self.activation}" is unknown{did_you_mean(self.activation, ACTIVATIONS)}')
        if self.dtype not in ("float32", "bfloat16", "float16", "float64"):
            problems.append(f'dtype must be a floating-point type such as "bfloat16", got "{self.dtype}"')
        if problems:
            raise ValueError(f"TransformerConfig: {'; '.join(problems)}.")

    @property
    def n_kv_heads(self) -> int:
        """G."""
        return self.kv_heads or self.heads

    @property
    def d_head(self) -> int:
        """K."""
        return self.head_width or self.width // self.heads


def gpt2(**sizes: Any) -> TransformerConfig:
    """GPT-2's kind of decoder, GPT-2 small unless sizes are given: ``gpt2(layers=2, width=64, heads=4, hidden=99)``."""
    small: dict[str, Any] = {
        "vocabulary": 50257,
        "layers": 12,
        "width": 768,
        "heads": 12,
        "hidden": 3072,
        "context": 1024,
    }
    return TransformerConfig(**(small | sizes))


def llama(**sizes: Any) -> TransformerConfig:
    """Llama's kind of decoder; the 15 M parameter one of llama2.c unless sizes are given."""
    small: dict[str, Any] = {"vocabulary": 32000, "layers": 6, "width": 288, "heads": 6, "hidden": 768, "context": 256}
    kind = {"norm": "rms", "positions": "rotary", "gated": True, "activation": "silu", "bias": False}
    return TransformerConfig(**(small | kind | sizes))


def transformer(config: TransformerConfig) -> Model:
    """The model. Inputs: tokens (B, T) int, and optionally positions, (T,) or (B, T) int, 0, 1, 2 ... by default.

    A position of -1 marks padding: no token attends to it. Left and right padding give the same numbers at the real
    tokens. Output: logits (B, T, V) float32.
    """
    return Model(_Decoder(config), (jax.ShapeDtypeStruct((1, min(2, config.context)), jnp.int32),))


def run_layers(
    model: Model, variables: Variables, resid: jax.Array, start: jax.Array | int = 0, positions: jax.Array | None = None
) -> jax.Array:
    """The residual stream after the last layer, given the one that enters layer ``start``.

    A sweep that changes only ``resid_pre`` of layer l need not run the layers below: one program serves every l, since
    ``start`` may be traced. Not reverse-differentiable (a loop of traced length). Edits at ``embed`` are ignored here.

    Args:
      model: from ``transformer``.
      variables: params and edits, as for ``model.apply``.
      resid: (B, T, D).
      start: first layer to run, 0..L.
      positions: as for the model.

    Returns:
      (B, T, D); ``unembed`` turns it, or chosen positions of it, into logits.
    """
    config = model.module.config
    nested = model.nested(variables, jax.ShapeDtypeStruct(resid.shape[:2], jnp.int32))
    layers = {name: tree["blocks"] for name, tree in nested.items() if "blocks" in tree}
    positions, allowed = _visible(positions, resid.shape[1])

    def layer(index: jax.Array, x: jax.Array) -> jax.Array:
        one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), layers)
        return _Block(config).apply(one, x, positions, allowed)[0]

    return jax.lax.fori_loop(start, config.layers, layer, resid)


def unembed(model: Model, variables: Variables, resid: jax.Array, positions: jax.Array | None = None) -> jax.Array:
    """Final norm and logits of a residual stream, any positions of it; edits at these two sites apply.

    Args:
      model: from ``transformer``.
      variables: params and edits, as for ``model.apply``.
      resid: (B, T', D).
      positions: absolute positions of the T', needed by edits that are limited to positions.

    Returns:
      (B, T', V) float32.
    """
    nested = model.nested(variables, jax.ShapeDtypeStruct(resid.shape[:2], jnp.int32))
    logits: Any = model.module.apply(nested, resid, positions, method="read_out")
    return logits


class _Decoder(nn.Module):
    config: TransformerConfig

    def setup(self) -> None:
        config = self.config
        stacked = nn.scan(
            _Block,
            variable_axes={**LAYER_AXES},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.layers,
        )
        self.embed = _Embed(config)
        self.blocks = stacked(config)
        self.final_norm = Norm(config.norm, config.norm_eps, config.bias)
        self.unembed = None if config.tied else Linear((config.vocabulary,), use_bias=False)

    def __call__(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        _check_inputs(self.config, tokens, positions)
        positions, allowed = _visible(positions, tokens.shape[1])
        x = site(self, "embed", self.embed(tokens, positions), "B T D", positions=positions)
        x, _ = self.blocks(x, positions, allowed)
        return self.read_out(x, positions)

    def read_out(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        x = site(self, "final_norm", self.final_norm(x), "B T D", positions=positions).astype(jnp.float32)
        logits = self.embed.attend(x) if self.unembed is None else self.unembed(x)
        return site(self, "logits", logits, "B T V", positions=positions)


class _Embed(nn.Module):
    config: TransformerConfig

    def setup(self) -> None:
        normal = nn.initializers.normal(0.02)
        self.tokens = self.param("tokens", normal, (self.config.vocabulary, self.config.width))
        if self.config.positions == "learned":
            self.positions = self.param("positions", normal, (self.config.context, self.config.width))

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.tokens[tokens]
        if self.config.positions == "learned":
            x = x + self.positions[jnp.maximum(positions, 0)]
        return x.astype(self.config.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        return x @ self.tokens.T


class _Block(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, allowed: jax.Array) -> tuple[jax.Array, None]:
        config = self.config
        norm = Norm(config.norm, config.norm_eps, config.bias, name="norm_attn")
        x = site(self, "resid_pre", x, "B T D", positions=positions)
        x = x + _Attention(config, name="attn")(norm(x), positions, allowed)
        x = site(self, "resid_mid", x, "B T D", positions=positions)
        norm = Norm(config.norm, config.norm_eps, config.bias, name="norm_mlp")
        x = x + _MLP(config, name="mlp")(norm(x), positions)
        return site(self, "resid_post", x, "B T D", positions=positions), None


class _Attention(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, allowed: jax.Array) -> jax.Array:
        config = self.config
        x = site(self, "attn_in", x, "B T D", positions=positions)

        def project(name: str, heads: int) -> jax.Array:
            view = site(self, f"{name}_in", x, "B T D", positions=positions)
            return Linear((heads, config.d_head), use_bias=config.bias, name=name)(view)

        q, k, v = project("q", config.heads), project("k", config.n_kv_heads), project("v", config.n_kv_heads)
        if config.positions == "rotary":
            q, k = (rotate_positions(each, positions, config.rope_theta) for each in (q, k))
        q = site(self, "q", q, "B T H K", positions=positions)
        k = site(self, "k", k, "B T H K", positions=positions)
        v = site(self, "v", v, "B T H K", positions=positions)
        z = attention(self, q, k, v, allowed, positions)
        z = site(self, "attn_z", z, "B T H K", positions=positions)
        out = Linear((config.width,), inputs=2, use_bias=config.bias, name="o")(z)
        return site(self, "attn_out", out, "B T D", positions=positions)


class _MLP(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        config = self.config
        x = site(self, "mlp_in", x, "B T D", positions=positions)
        up = Linear((config.hidden,), use_bias=config.bias, name="up")(x)
        if config.gated:
            up = site(self, "mlp_up", up, "B T F", positions=positions)
            pre = Linear((config.hidden,), use_bias=config.bias, name="gate")(x)
        else:
            pre = up
        pre = site(self, "mlp_pre", pre, "B T F", positions=positions)
        act = ACTIVATIONS[config.activation](pre)
        act = site(self, "mlp_act", act * up if config.gated else act, "B T F", positions=positions, pre=pre)
        out = Linear((config.width,), use_bias=config.bias, name="down")(act)
        return site(self, "mlp_out", out, "B T D", positions=positions)


def _visible(positions: jax.Array | None, length: int) -> tuple[jax.Array, jax.Array]:
    """Positions, and which keys a query may see (B or 1, 1, T, S): itself and earlier ones that are not padding."""
    positions = jnp.arange(length) if positions is None else positions
    rows = jnp.atleast_2d(positions)
    query, key = rows[:, None, :, None], rows[:, None, None, :]
    return positions, (key <= query) & (key >= 0)


def _check_inputs(config: TransformerConfig, tokens: Any, positions: Any) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers of shape (B, T), got {tokens.dtype}{tokens.shape}.")
    if positions is None and tokens.shape[1] > config.context:
        raise ValueError(f"{tokens.shape[1]} tokens are longer than the model's context of {config.context}.")
    if positions is not None:
        if positions.shape not in (tokens.shape, tokens.shape[1:]) or not jnp.issubdtype(positions.dtype, jnp.integer):
            raise ValueError(
                f"positions must be integers of shape (T,) or (B, T) for tokens {tokens.shape}, got "
                f"{positions.dtype}{positions.shape}."
            )
        if not isinstance(positions, jax.core.Tracer):
            low, high = np.asarray(positions).min(), np.asarray(positions).max()
            if low < -1 or high >= config.context:
                raise ValueError(f"positions must be in -1..{config.context - 1}, the context, got {low}..{high}.")
    if not isinstance(tokens, jax.core.Tracer) and tokens.size:
        low, high = np.asarray(tokens).min(), np.asarray(tokens).max()
        if low < 0 or high >= config.vocabulary:
            raise ValueError(f"tokens must be in 0..{config.vocabulary - 1}, got {low}..{high}.")
