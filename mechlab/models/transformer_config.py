"""The configuration of a transformer: one dataclass for all families, GPT-2's choices by default."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, Protocol

import numpy as np

from mechlab.core.errors import did_you_mean
from mechlab.models.layers import ACTIVATIONS, NORMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope:
    """Positions divided by ``factor``: every rotary frequency becomes frequency / factor."""

    factor: float
    amplitude: float = dataclasses.field(default=1.0, init=False)

    def scale(self, frequency: np.ndarray) -> np.ndarray:
        """The scaled frequencies, shaped like ``frequency``."""
        return frequency / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1's scaling: low frequencies divided by ``factor``, high ones kept, a linear blend between.

    A frequency that turns n times within ``original`` tokens is divided by ``factor`` for n < low, kept for n > high.

    Attributes:
      factor: the divisor.
      low, high: turns within the original context, low < high.
      original: context of the model before it was extended.
    """

    factor: float
    low: float
    high: float
    original: int
    amplitude: float = dataclasses.field(default=1.0, init=False)

    def scale(self, frequency: np.ndarray) -> np.ndarray:
        """The scaled frequencies, shaped like ``frequency``."""
        turns = self.original * frequency / (2 * math.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): every frequency has its own divisor, and queries and keys are scaled.

    Attributes:
      factors: a divisor for each frequency.
      amplitude: factor on rotated queries and on rotated keys.
    """

    factors: tuple[float, ...]
    amplitude: float

    def scale(self, frequency: np.ndarray) -> np.ndarray:
        """The scaled frequencies, shaped like ``frequency``."""
        return frequency / np.asarray(self.factors)


class MLPKind(Protocol):
    """Another MLP than the block's own: a frozen dataclass of its settings, such as ``models.kan.RationalMLP``."""

    def problems(self, width: int, hidden: int) -> list[str]:
        """What does not fit a block of this width D and hidden width F, in words."""
        ...

    def module(self, config: TransformerConfig, name: str) -> Any:
        """The Flax module of that name, ``(x (B, T, D), positions) -> (B, T, D)``, with the sites of the MLP."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a transformer over tokens.

    Attributes:
      vocabulary, layers, width, heads, hidden, context: V, L, D, H, F and the longest text. ``hidden=None``: blocks of
        attention only.
      kv_heads: G, number of key-value heads; H by default.
      head_width: K; D / H by default.
      norm: "layer", "rms", or "rms_plus_one" (RMS norm whose scale is 1 + the parameter).
      norm_eps: added to the variance.
      norm_order: "pre", x + f(norm(x)); "post", norm(x + f(x)), without a final norm; "sandwich", x + norm(f(norm(x))).
      parallel: attention and MLP both read the stream that enters the block, x + attention(...) + mlp(...).
      positions: "learned" or "rotary".
      rope_theta: base of the rotary wavelengths.
      rope_width: channels of each head that are rotated, the first ones; all by default.
      rope_scaling: ``LinearRope``, ``Llama3Rope`` or ``LongRope``.
      window: local layers see this many tokens, themselves included; None sees all.
      local_layers: the layers with a window, increasing; all by default.
      rope_local_theta: base of the wavelengths in local layers, never scaled; ``rope_theta`` by default.
      causal: tokens see earlier tokens only; otherwise all tokens.
      qk_norm: norm of queries and keys per head, before the rotation.
      attn_scale: factor on the scores; 1 / sqrt(K) by default.
      attn_softcap, logit_softcap: c tanh(x / c) of scores (before the mask), of logits.
      gated: gated MLP (SwiGLU) instead of the plain one.
      activation: of the MLP, one of ``models.layers.ACTIVATIONS``.
      mlp: an MLP of another kind, which replaces the plain or gated one.
      bias: biases on all linear maps but the unembedding, and on layer norms.
      bias_qkv, bias_o, bias_mlp, bias_norm: the same for one kind; as ``bias`` by default.
      embed_scale: factor on token embeddings.
      embed_norm: norm after the embeddings are summed.
      token_types: number of token type embeddings; 0 for none.
      embed_conv: earlier tokens that a causal depthwise convolution adds to each embedding; 0 for none.
      unembed: put out logits; otherwise the final hidden states.
      tied: unembed with the transposed token embedding.
      init_std: standard deviation of kernels when they are made; None means 1 / sqrt(number of inputs), which small
        models need: 0.02 is that of about 2,000 inputs, and attention of narrower ones starts too even to learn from.
      dtype: compute dtype; norms, softmax and logits are computed in float32.
    """

    vocabulary: int
    layers: int
    width: int
    heads: int
    hidden: int | None
    context: int
    kv_heads: int | None = None
    head_width: int | None = None
    norm: Literal["layer", "rms", "rms_plus_one"] = "layer"
    norm_eps: float = 1e-5
    norm_order: Literal["pre", "post", "sandwich"] = "pre"
    parallel: bool = False
    positions: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10_000.0
    rope_width: int | None = None
    rope_scaling: LinearRope | Llama3Rope | LongRope | None = None
    window: int | None = None
    local_layers: tuple[int, ...] | None = None
    rope_local_theta: float | None = None
    causal: bool = True
    qk_norm: bool = False
    attn_scale: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    gated: bool = False
    activation: str = "gelu_tanh"
    mlp: MLPKind | None = None
    bias: bool = True
    bias_qkv: bool | None = None
    bias_o: bool | None = None
    bias_mlp: bool | None = None
    bias_norm: bool | None = None
    embed_scale: float = 1.0
    embed_norm: bool = False
    token_types: int = 0
    embed_conv: int = 0
    unembed: bool = True
    tied: bool = True
    init_std: float | None = 0.02
    dtype: str = "float32"

    def __post_init__(self) -> None:
        problems = _size_problems(self) or [*_head_problems(self), *_kind_problems(self), *_rotary_problems(self)]
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

    @property
    def d_rotary(self) -> int:
        """Channels of each head that are rotated."""
        return self.d_head if self.rope_width is None else self.rope_width

    @property
    def windowed(self) -> tuple[int, ...]:
        """The layers that have a window."""
        if self.window is None:
            return ()
        return tuple(range(self.layers)) if self.local_layers is None else self.local_layers

    def has_bias(self, kind: Literal["qkv", "o", "mlp", "norm"]) -> bool:
        """Whether the maps of this kind have biases."""
        chosen: bool | None = getattr(self, f"bias_{kind}")
        return self.bias if chosen is None else chosen

    def explicit(self) -> TransformerConfig:
        """The same shape with every default that depends on another field written out, for comparing two configs."""
        return dataclasses.replace(
            self,
            kv_heads=self.n_kv_heads,
            head_width=self.d_head,
            rope_width=self.d_rotary if self.positions == "rotary" else None,
            local_layers=self.windowed or None,
            window=self.window if self.windowed else None,
            rope_local_theta=(self.rope_local_theta or self.rope_theta) if self.windowed else None,
            attn_scale=self.d_head**-0.5 if self.attn_scale is None else self.attn_scale,
            bias=False,
            bias_qkv=self.has_bias("qkv"),
            bias_o=self.has_bias("o"),
            bias_mlp=self.has_bias("mlp"),
            bias_norm=self.norm == "layer" and self.has_bias("norm"),
        )

    def frequencies(self, *, local: bool = False) -> np.ndarray:
        """Rotary frequencies, theta^(-2i / R) and then scaled, in radians per token: (R / 2,) float64.

        Args:
          local: those of the layers with a window.
        """
        theta = self.rope_local_theta if local and self.rope_local_theta is not None else self.rope_theta
        frequency = theta ** (-np.arange(0, self.d_rotary, 2) / self.d_rotary)
        scaling = self._scaling(local)
        return frequency if scaling is None else scaling.scale(frequency)

    def amplitude(self, *, local: bool = False) -> float:
        """Factor on rotated queries and keys."""
        scaling = self._scaling(local)
        return 1.0 if scaling is None else scaling.amplitude

    def _scaling(self, local: bool) -> LinearRope | Llama3Rope | LongRope | None:
        return None if local and self.rope_local_theta is not None else self.rope_scaling


def _size_problems(config: TransformerConfig) -> list[str]:
    problems = []
    # The trunk of an image model has no vocabulary.
    for name in ("vocabulary", "layers", "width", "heads", "context")[not config.unembed :]:
        if getattr(config, name) < 1:
            problems.append(f"{name} must be at least 1, got {getattr(config, name)}")
    for name in ("vocabulary", "token_types", "embed_conv"):
        if getattr(config, name) < 0:
            problems.append(f"{name} cannot be negative, got {getattr(config, name)}")
    for name in ("hidden", "window", "kv_heads", "head_width"):
        size = getattr(config, name)
        if size is not None and size < 1:
            problems.append(f"{name} must be at least 1 or None, got {size}")
    return problems


def _head_problems(config: TransformerConfig) -> list[str]:
    problems = []
    if config.head_width is None and config.width % config.heads:
        problems.append(f"heads={config.heads} does not divide width={config.width}; give head_width")
    if config.heads % config.n_kv_heads:
        problems.append(f"kv_heads={config.n_kv_heads} does not divide heads={config.heads}")
    return problems


def _kind_problems(config: TransformerConfig) -> list[str]:
    problems = []
    for name, kinds in (
        ("norm", NORMS),
        ("norm_order", ("pre", "post", "sandwich")),
        ("positions", ("learned", "rotary")),
    ):
        if getattr(config, name) not in kinds:
            problems.append(f'{name} must be one of {", ".join(kinds)}, got "{getattr(config, name)}"')
    if config.activation not in ACTIVATIONS:
        problems.append(f'activation "{config.activation}" is unknown{did_you_mean(config.activation, ACTIVATIONS)}')
    if config.dtype not in ("float32", "bfloat16", "float16", "float64"):
        problems.append(f'dtype must be a floating-point type such as "bfloat16", got "{config.dtype}"')
    if config.parallel and (config.norm_order == "post" or config.hidden is None):
        problems.append('parallel blocks need an MLP and norm_order "pre" or "sandwich"')
    if config.mlp is not None:
        if config.hidden is None or config.gated:
            problems.append("mlp needs hidden, and gated=False: it replaces the block's own MLP")
        else:
            problems += config.mlp.problems(config.width, config.hidden)
    if config.window is not None and not config.causal:
        problems.append("a window needs causal attention")
    if config.local_layers is not None:
        if config.window is None:
            problems.append("local_layers without a window")
        allowed = set(range(config.layers))
        if not set(config.local_layers) <= allowed or sorted(set(config.local_layers)) != list(config.local_layers):
            problems.append(
                f"local_layers must be increasing layers of 0..{config.layers - 1}, got {config.local_layers}"
            )
    for name in ("attn_softcap", "logit_softcap", "attn_scale", "init_std"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            problems.append(f"{name} must be positive or None, got {value}")
    return problems


def _rotary_problems(config: TransformerConfig) -> list[str]:
    if config.positions != "rotary":
        return []
    problems = []
    if config.d_rotary % 2 or not 0 < config.d_rotary <= config.d_head:
        width = f"head width {config.d_head}" if config.rope_width is None else f"rope_width={config.rope_width}"
        problems.append(f"rotary positions need an even width of 2..{config.d_head}, got {width}")
    elif isinstance(config.rope_scaling, LongRope) and len(config.rope_scaling.factors) != config.d_rotary // 2:
        problems.append(
            f"LongRope needs {config.d_rotary // 2} factors, one per frequency, got {len(config.rope_scaling.factors)}"
        )
    if isinstance(config.rope_scaling, Llama3Rope) and config.rope_scaling.low >= config.rope_scaling.high:
        problems.append(f"Llama3Rope needs low < high, got {config.rope_scaling}")
    if config.rope_local_theta is not None and config.window is None:
        problems.append("rope_local_theta without a window")
    return problems
