"""Factors moved from the input of linear maps into what makes that input: the function stays, the kernels change.

Every kernel of a decoder's block reads one of four sites, and each site has a maker::

    site        read by         made by
    attn_in     q, k, v         norm_attn: scale (and bias)
    attn_z      o               v: its outputs, head by head; without grouped queries only
    mlp_in      up, gate        norm_mlp: scale (and bias)
    mlp_act     down            up: its outputs; of a plain MLP only with ReLU, where f(a x) = a f(x)

``scale_inputs`` divides the site by s and multiplies the rows of its readers by s. AWQ, SmoothQuant and OutlierTune are
choices of s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from mechlab.core.errors import unknown
from mechlab.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from jax.typing import ArrayLike

READERS: dict[str, tuple[str, ...]] = {
    "attn_in": ("attn/q", "attn/k", "attn/v"),
    "attn_z": ("attn/o",),
    "mlp_in": ("mlp/up", "mlp/gate"),
    "mlp_act": ("mlp/down",),
}
"""The linear maps that read each site; a plain MLP has no gate."""


def readers(config: TransformerConfig, site: str) -> tuple[str, ...]:
    """The linear maps of a block that read a site, such as "attn/q".

    Raises:
      KeyError: another site.
      ValueError: a block without an MLP of the usual kind.
    """
    if site not in READERS:
        raise unknown("site that linear maps read", site, READERS)
    if site.startswith("mlp") and (config.hidden is None or config.mlp is not None):
        raise ValueError(f"{site}: this model's blocks have no MLP of linear maps.")
    return tuple(name for name in READERS[site] if config.gated or name != "mlp/gate")


def scalable(config: TransformerConfig, site: str) -> bool:
    """Whether what makes a site can take up a factor of each channel."""
    readers(config, site)
    if site == "attn_z":
        return config.n_kv_heads == config.heads
    if site == "mlp_act":
        return config.gated or config.activation == "relu"
    return config.norm_order != "post"


def scale_inputs(config: TransformerConfig, params: Any, site: str, s: ArrayLike) -> Any:
    """The same function with a site divided by s and the kernels that read it multiplied by s.

    Args:
      config: of the model.
      params: of the model.
      site: one of ``READERS``.
      s: positive, (L, D), (L, H, K) for attn_z, or (L, F).

    Returns:
      Parameters; embeddings and unembedding are not touched.

    Raises:
      KeyError, ValueError: as ``readers``; a site whose maker cannot take the factor up, or factors of a wrong shape.
    """
    if not scalable(config, site):
        raise ValueError(f"{site}: what makes it cannot take up a factor per channel in this model.")
    shape = {"attn_z": (config.heads, config.d_head), "mlp_act": (config.hidden,)}.get(site, (config.width,))
    if np.shape(s) != (config.layers, *shape):
        raise ValueError(f"{site}: wanted factors ({config.layers}, {', '.join(map(str, shape))}), got {np.shape(s)}.")
    s = jnp.asarray(s)
    blocks = {name: dict(part) for name, part in params["blocks"].items()}
    for name in readers(config, site):
        of, part = name.split("/")
        kernel = blocks[of][part]["kernel"]
        blocks[of][part] = {**blocks[of][part], "kernel": kernel * s.reshape(*s.shape, *[1] * (kernel.ndim - s.ndim))}
    if site in ("attn_in", "mlp_in"):
        name = "norm_attn" if site == "attn_in" else "norm_mlp"
        norm = blocks[name]
        one = 1.0 if config.norm == "rms_plus_one" else 0.0
        divided = {"scale": (one + norm["scale"]) / s - one}
        if "bias" in norm:
            divided["bias"] = norm["bias"] / s
        blocks[name] = divided
    else:
        of, part = ("attn", "v") if site == "attn_z" else ("mlp", "up")
        blocks[of][part] = {leaf: value / _behind(value, s) for leaf, value in blocks[of][part].items()}
    return {**params, "blocks": blocks}


def _behind(value: Any, s: Any) -> Any:
    """s against a kernel (L, in, *out) or a bias (L, *out)."""
    return s[:, None] if value.ndim > s.ndim else s
