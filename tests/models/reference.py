"""The decoder once more, slowly: float64 NumPy, a plain loop over layers, heads and nothing from mechlab.

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
}


def forward(
    params: Any, tokens: Array, config: Any, change: Change | None = None, positions: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """Logits (B, T, V), and every activation by site name, those of the layers stacked (L, ...)."""
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

    x = p["embed"]["tokens"][tokens]
    if config.positions == "learned":
        x = x + p["embed"]["positions"][np.maximum(positions, 0)]
    x = site("embed", x)
    for layer in range(config.layers):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])

        def here(name: str, value: Array, layer: int = layer) -> Array:
            return site(name, value, layer)

        x = here("resid_pre", x)
        x = here(
            "resid_mid",
            x + _attention(one["attn"], _norm(one["norm_attn"], x, config), positions, config, here),
        )
        x = here("resid_post", x + _mlp(one["mlp"], _norm(one["norm_mlp"], x, config), config, here))
    x = site("final_norm", _norm(p["final_norm"], x, config))
    table = p["embed"]["tokens"].T if config.tied else p["unembed"]["kernel"]
    logits = site("logits", x @ table)
    if change:
        raise KeyError(f"no such site and layer: {list(change)}")
    return logits, {name: np.stack(a) if isinstance(a, list) else a for name, a in acts.items()}


def _norm(p: Any, x: Array, config: Any) -> Array:
    if config.norm == "rms":
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps) * p["scale"]
    normed = (x - np.mean(x, -1, keepdims=True)) / np.sqrt(np.var(x, -1, keepdims=True) + config.norm_eps)
    return normed * p["scale"] + p.get("bias", 0.0)


def _heads(p: Any, x: Array) -> Array:
    return np.einsum("btd,dhk->bthk", x, p["kernel"]) + p.get("bias", 0.0)


def _rotate(x: Array, positions: Array, theta: float) -> Array:
    # Channels i and i + K/2 are the real and imaginary part of a number that turns with the position.
    half = x.shape[-1] // 2
    angle = positions[:, :, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, :, None, :]
    return np.concatenate([turned.real, turned.imag], -1)


def _attention(p: Any, x: Array, positions: Array, config: Any, site: Callable[[str, Array], Array]) -> Array:
    x = site("attn_in", x)
    q, k, v = (_heads(p[name], site(f"{name}_in", x)) for name in "qkv")
    if config.positions == "rotary":
        q, k = _rotate(q, positions, config.rope_theta), _rotate(k, positions, config.rope_theta)
    q, k, v = site("q", q), site("k", k), site("v", v)
    batch, length, heads, width = q.shape
    group = heads // k.shape[2]
    scores = np.full((batch, heads, length, length), -1e30)
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                for s in range(length):
                    if 0 <= positions[b, s] <= positions[b, t]:
                        scores[b, h, t, s] = q[b, t, h] @ k[b, s, h // group] / np.sqrt(width)
    pattern = site("attn_pattern", scipy.special.softmax(site("attn_scores", scores), -1))
    z = np.stack([np.einsum("bts,bsk->btk", pattern[:, h], v[:, :, h // group]) for h in range(heads)], 2)
    z = site("attn_z", z)
    return site("attn_out", np.einsum("bthk,hkd->btd", z, p["o"]["kernel"]) + p["o"].get("bias", 0.0))


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
    return site("mlp_out", plain(p["down"], site("mlp_act", act)))
