"""The transformer once more, slowly: float64 NumPy, a plain loop over layers, heads and nothing from mechlab.

``change`` maps (site, layer) to a function of the activation; layer is None at ``embed``, ``final_norm`` and
``logits``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import scipy.special

Array = np.ndarray
Change = Mapping[tuple[str, int | None], Callable[[Array], Array]]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.where(x > 0, x, 0.0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + scipy.special.erf(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def forward(
    params: Any,
    tokens: Array,
    config: Any,
    change: Change | None = None,
    positions: Array | None = None,
    types: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Output (logits or hidden states), and every activation by site name, those of the layers stacked (L, ...)."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    tokens = np.asarray(tokens)
    batch, length = tokens.shape
    positions = np.arange(length) if positions is None else np.asarray(positions)
    positions = np.broadcast_to(positions, (batch, length))
    change = dict(change or {})
    acts: dict[str, Any] = {}

    def site(name: str, value: Array, layer: int | None = None) -> Array:
        value = change.pop((name, layer), lambda x: x)(value)
        if layer is None:
            acts[name] = value
        else:
            acts.setdefault(name, []).append(value)
        return value

    x = site("embed", _embed(p["embed"], tokens, positions, types, config))
    for layer in range(config.layers):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])

        def here(name: str, value: Array, layer: int = layer) -> Array:
            return site(name, value, layer)

        x = _block(one, here("resid_pre", x), positions, config, layer, here)
        x = here("resid_post", x)
    if config.norm_order != "post":
        x = site("final_norm", _norm(p["final_norm"], x, config))
    out = x
    if config.unembed:
        out = x @ (p["embed"]["tokens"].T if config.tied else p["unembed"]["kernel"])
        out = site("logits", _cap(out, config.logit_softcap))
    if change:
        raise KeyError(f"no such site and layer: {list(change)}")
    return out, {name: np.stack(a) if isinstance(a, list) else a for name, a in acts.items()}


def _embed(p: Any, tokens: Array, positions: Array, types: Array | None, config: Any) -> Array:
    x = p["tokens"][tokens] * config.embed_scale
    if config.positions == "learned":
        x = x + p["positions"][np.maximum(positions, 0)]
    if config.token_types:
        x = x + p["types"][np.zeros_like(tokens) if types is None else types]
    if config.embed_norm:
        x = _norm(p["norm"], x, config)
    before = x
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for back in range(1, config.embed_conv + 1):
                if t - back >= 0 and positions[b, t - back] >= 0:
                    x = x.copy()
                    x[b, t] += p["conv"][back - 1] * before[b, t - back]
    return x


def _block(p: Any, x: Array, positions: Array, config: Any, layer: int, site: Callable[[str, Array], Array]) -> Array:
    def attend(x: Array) -> Array:
        return _attention(p["attn"], x, positions, config, layer, site)

    def think(x: Array) -> Array:
        return _mlp(p["mlp"], x, config, site)

    if config.norm_order == "post":
        x = site("resid_mid", _norm(p["norm_attn"], x + attend(x), config))
        return _norm(p["norm_mlp"], x + think(x), config)
    if config.hidden is None:
        return x + attend(_norm(p["norm_attn"], x, config))
    if config.parallel:
        return x + attend(_norm(p["norm_attn"], x, config)) + think(_norm(p["norm_mlp"], x, config))
    x = site("resid_mid", x + attend(_norm(p["norm_attn"], x, config)))
    return x + think(_norm(p["norm_mlp"], x, config))


def _cap(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * np.tanh(x / cap)


def _norm(p: Any, x: Array, config: Any) -> Array:
    if config.norm != "layer":
        scale = p["scale"] + (config.norm == "rms_plus_one")
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps) * scale
    normed = (x - np.mean(x, -1, keepdims=True)) / np.sqrt(np.var(x, -1, keepdims=True) + config.norm_eps)
    return normed * p["scale"] + p.get("bias", 0.0)


def _heads(p: Any, x: Array) -> Array:
    return np.einsum("btd,dhk->bthk", x, p["kernel"]) + p.get("bias", 0.0)


def _rotate(x: Array, positions: Array, config: Any, local: bool) -> Array:
    # Channels i and i + R/2 are the real and imaginary part of a number that turns with the position.
    rotated = config.rope_width or x.shape[-1]
    half = rotated // 2
    unscaled = local and config.rope_local_theta is not None
    theta = config.rope_local_theta if unscaled else config.rope_theta
    angle = positions[:, :, None] * _scaled(
        theta ** (-np.arange(half) / half), None if unscaled else config.rope_scaling
    )
    turned = (x[..., :half] + 1j * x[..., half:rotated]) * np.exp(1j * angle)[:, :, None, :]
    if not unscaled and type(config.rope_scaling).__name__ == "LongRope":
        turned = turned * config.rope_scaling.amplitude
    return np.concatenate([turned.real, turned.imag, x[..., rotated:]], -1)


def _scaled(frequency: Array, rope: Any) -> Array:
    if rope is None:
        return frequency
    if type(rope).__name__ == "LinearRope":
        return frequency / rope.factor
    if type(rope).__name__ == "LongRope":
        return np.array([f / factor for f, factor in zip(frequency, rope.factors, strict=True)])
    out = []
    for f in frequency:
        length = 2 * np.pi / f
        if length < rope.original / rope.high:
            out.append(f)
        elif length > rope.original / rope.low:
            out.append(f / rope.factor)
        else:
            smooth = (rope.original / length - rope.low) / (rope.high - rope.low)
            out.append((1 - smooth) * f / rope.factor + smooth * f)
    return np.array(out)


def _sees(config: Any, local: bool, query: int, key: int) -> bool:
    if key < 0 or not config.causal:
        return key >= 0
    return key <= query and (not local or query - key < config.window)


def _attention(
    p: Any, x: Array, positions: Array, config: Any, layer: int, site: Callable[[str, Array], Array]
) -> Array:
    local = config.window is not None and (config.local_layers is None or layer in config.local_layers)
    x = site("attn_in", x)
    q, k, v = (_heads(p[name], site(f"{name}_in", x)) for name in "qkv")
    if config.qk_norm:
        q, k = _norm(p["norm_q"], q, config), _norm(p["norm_k"], k, config)
    if config.positions == "rotary":
        q, k = _rotate(q, positions, config, local), _rotate(k, positions, config, local)
    q, k, v = site("q", q), site("k", k), site("v", v)
    batch, length, heads, width = q.shape
    group = heads // k.shape[2]
    scale = 1 / np.sqrt(width) if config.attn_scale is None else config.attn_scale
    scores = np.full((batch, heads, length, length), -1e30)
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                for s in range(length):
                    if _sees(config, local, positions[b, t], positions[b, s]):
                        scores[b, h, t, s] = _cap(q[b, t, h] @ k[b, s, h // group] * scale, config.attn_softcap)
    pattern = site("attn_pattern", scipy.special.softmax(site("attn_scores", scores), -1))
    z = np.stack([np.einsum("bts,bsk->btk", pattern[:, h], v[:, :, h // group]) for h in range(heads)], 2)
    z = site("attn_z", z)
    out = np.einsum("bthk,hkd->btd", z, p["o"]["kernel"]) + p["o"].get("bias", 0.0)
    return site("attn_out", _norm(p["norm_out"], out, config) if config.norm_order == "sandwich" else out)


def _mlp(p: Any, x: Array, config: Any, site: Callable[[str, Array], Array]) -> Array:
    def plain(p: Any, x: Array) -> Array:
        return x @ p["kernel"] + p.get("bias", 0.0)

    x = site("mlp_in", x)
    activation = ACTIVATIONS[config.activation]
    if config.gated:
        up = site("mlp_up", plain(p["up"], x))
        act = activation(site("mlp_pre", plain(p["gate"], x))) * up
    else:
        act = activation(site("mlp_pre", plain(p["up"], x)))
    out = plain(p["down"], site("mlp_act", act))
    return site("mlp_out", _norm(p["norm_out"], out, config) if config.norm_order == "sandwich" else out)
