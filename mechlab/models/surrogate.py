"""A surrogate of physics: from the last frames of some fields on a periodic grid to the next frame, with named sites.

One model for several worlds: fields sit in fixed channels, absent ones are zero and masked. The output is

    next = last + mask * s * decoder(h),   s one number per field

not an extrapolation: a decoder of accelerations would answer to steering with inverted sign. Two kinds of block:

    spectral    h += W_2 gelu(W_1 gelu(K z + conv3(z))),  z = norm(h)
                K: one complex matrix per kept Fourier mode (Fourier neural operator, Li et al. 2021, arXiv 2010.08895)
    attention   tokens are patches of 4 x 4 points of every frame; h += causal attention over time, h += attention over
                space, h += MLP, each of norm(h): the layout of Walrus

Sites (scanned ones have a leading axis L)::

    embed, resid_post   (B, X, Y, D) spectral; (B, T, X / 4, Y / 4, D) attention, T = frames
    increment           (B, X, Y, F)   what is added to the last frame

Parameters: everything of the blocks under ``blocks`` with a leading axis L. Norms are over all points and channels of a
sample (spectral) or over the channels of a token (attention). The 3 x 3 convolution is shifted copies and one
matrix: inside a compiled loop on a CPU that is an order of magnitude faster than a convolution.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mechlab.core.model import Model
from mechlab.core.sites import LAYER_AXES, site
from mechlab.models.layers import Linear, Norm

PATCH = 4
_EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SurrogateConfig:
    """Shape of the model.

    Attributes:
      scales: s, one number per field: the usual size of a field's increment. Their number is F.
      grid: X = Y.
      frames: H, how many past frames are seen, >= 2.
      layers, width: L and D.
      modes: Fourier modes kept per axis, at most grid / 2 (spectral).
      heads: divide the width (attention).
      kind: of the blocks.
      periodic: the only kind of wall there is; data from a world with walls is refused here, not wrapped around.
    """

    scales: tuple[float, ...]
    grid: int = 32
    frames: int = 3
    layers: int = 4
    width: int = 28
    modes: int = 10
    heads: int = 4
    kind: Literal["spectral", "attention"] = "spectral"
    periodic: bool = True

    def __post_init__(self) -> None:
        if not self.periodic:
            raise ValueError("SurrogateConfig: only periodic grids are modelled, got periodic=False.")
        if min(self.grid, self.layers, self.width, self.modes, self.heads) < 1 or self.frames < 2 or not self.scales:
            raise ValueError(f"SurrogateConfig: sizes must be at least 1, frames at least 2; got {self}.")
        if self.kind == "spectral" and self.modes > self.grid // 2:
            raise ValueError(f"SurrogateConfig: modes={self.modes} is more than half of grid={self.grid}.")
        if self.kind == "attention" and (self.grid % PATCH or self.width % self.heads):
            raise ValueError(f"SurrogateConfig: grid must be a multiple of {PATCH}, width of heads; got {self}.")


def surrogate(config: SurrogateConfig) -> Model:
    """The model; inputs are frames (B, H, F, X, Y) and mask (B, F), the output is the next frame (B, F, X, Y)."""
    shape = (1, config.frames, len(config.scales), config.grid, config.grid)
    frames = jax.ShapeDtypeStruct(shape, jnp.float32)
    return Model(_Surrogate(config), (frames, jax.ShapeDtypeStruct((1, len(config.scales)), jnp.float32)))


class _Surrogate(nn.Module):
    config: SurrogateConfig

    @nn.compact
    def __call__(self, frames: jax.Array, mask: jax.Array) -> jax.Array:
        config = self.config
        wanted = (config.frames, len(config.scales), config.grid, config.grid)
        if frames.ndim != 5 or frames.shape[1:] != wanted or mask.shape != (len(frames), len(config.scales)):
            raise ValueError(f"inputs must be (B, {wanted}) and (B, {wanted[1]}), got {frames.shape} and {mask.shape}.")
        attention = config.kind == "attention"
        x = jnp.moveaxis(frames, 2, -1)  # (B, H, X, Y, F)
        changes = jnp.diff(x, axis=1)
        axes = "B T X Y D" if attention else "B X Y D"
        if attention:
            x = jnp.concatenate([x, jnp.pad(changes, ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))], -1)
            h = Linear((config.width,), init_std=None, name="encoder")(_patches(x))
            h = h + self.param("time", nn.initializers.normal(0.02), (config.frames, 1, 1, config.width))
            h = h + self.param("place", nn.initializers.normal(0.02), h.shape[2:])
        else:
            # Changes are about a tenth of the values: at ten times their size both are read with equal ease.
            x = jnp.concatenate([x, 10 * changes], 1)
            h = _Conv3(config.width, name="encoder")(jnp.moveaxis(x, 1, -2).reshape(*x.shape[:1], *x.shape[2:4], -1))
        h = site(self, "embed", h, axes)
        layers = nn.scan(
            _AttentionBlock if attention else _SpectralBlock,
            variable_axes={**LAYER_AXES},
            split_rngs={"params": True},
            length=config.layers,
        )
        h, _ = layers(config, name="blocks")(h, None)
        if attention:
            h = Norm("layer", _EPS, name="norm")(h[:, -1])
            out = Linear((PATCH * PATCH * len(config.scales),), name="decoder_out")(h)
            out = _pixels(out, len(config.scales))
        else:
            h = jax.nn.gelu(Linear((config.width,), init_std=None, name="decoder_in")(_GroupNorm(name="norm")(h)))
            out = Linear((len(config.scales),), name="decoder_out")(h)
        out = out * jnp.asarray(config.scales, out.dtype) * mask[:, None, None, :]
        out = site(self, "increment", out, "B X Y F")
        return frames[:, -1] + jnp.moveaxis(out, -1, 1)


class _SpectralBlock(nn.Module):
    config: SurrogateConfig

    @nn.compact
    def __call__(self, h: jax.Array, _: None) -> tuple[jax.Array, None]:
        width = self.config.width
        z = _GroupNorm(name="norm")(h)
        z = jax.nn.gelu(_Spectral(width, self.config.modes, name="spectral")(z) + _Conv3(width, name="local")(z))
        z = jax.nn.gelu(Linear((2 * width,), init_std=None, name="mlp_in")(z))
        h = h + Linear((width,), init_std=None, name="mlp_out")(z)
        return site(self, "resid_post", h, "B X Y D"), None


class _AttentionBlock(nn.Module):
    config: SurrogateConfig

    @nn.compact
    def __call__(self, h: jax.Array, _: None) -> tuple[jax.Array, None]:
        batch, time, x, y, width = h.shape
        z = jnp.moveaxis(Norm("layer", _EPS, name="norm_time")(h), 1, 3).reshape(batch * x * y, time, width)
        z = _Attention(self.config.heads, causal=True, name="over_time")(z)
        h = h + jnp.moveaxis(z.reshape(batch, x, y, time, width), 3, 1)
        z = Norm("layer", _EPS, name="norm_space")(h).reshape(batch * time, x * y, width)
        h = h + _Attention(self.config.heads, causal=False, name="over_space")(z).reshape(h.shape)
        z = Linear((4 * width,), init_std=None, name="mlp_in")(Norm("layer", _EPS, name="norm_mlp")(h))
        h = h + Linear((width,), init_std=None, name="mlp_out")(jax.nn.gelu(z))
        return site(self, "resid_post", h, "B T X Y D"), None


class _Attention(nn.Module):
    heads: int
    causal: bool

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        width = z.shape[-1]
        qkv = Linear((3, self.heads, width // self.heads), init_std=None, name="qkv")(z)
        mixed = jax.nn.dot_product_attention(
            qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :], is_causal=self.causal
        )
        return Linear((width,), inputs=2, init_std=None, name="o")(mixed)


class _Spectral(nn.Module):
    """Complex matrices on the Fourier modes |k_x| < modes (and -modes), 0 <= k_y < modes; all others become zero."""

    width: int
    modes: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        m, (x, y) = self.modes, z.shape[1:3]
        shape = (2 * m, m, self.width, self.width)
        # Nearly nothing, as in the code of that paper: random turns of every mode would first have to be unlearned.
        start = nn.initializers.normal(self.width**-2.0)
        real, imaginary = self.param("real", start, shape), self.param("imaginary", start, shape)
        along_x, along_y = _kept_waves(x, m)
        f = jnp.einsum("yk,bxyc->bxkc", along_y, z).reshape(len(z), x, 2, m, -1)
        f = jnp.einsum("xpjq,bxpkc->bjkqc", along_x, f)
        # One real product for the complex one: (a + ib)(R + iI) = aR - bI + i(aI + bR).
        turn = jnp.concatenate([jnp.concatenate([real, imaginary], -1), jnp.concatenate([-imaginary, real], -1)], -2)
        g = jnp.einsum("bjkc,jkcd->bjkd", f.reshape(*f.shape[:3], -1), turn).reshape(f.shape)
        g = jnp.einsum("xpjq,bjkqc->bxpkc", along_x, g).reshape(len(z), x, 2 * m, -1)
        # A real field has every wave with k_y > 0 twice.
        twice = jnp.tile(jnp.where(jnp.arange(m) > 0, 2.0, 1.0), 2) / (x * y)
        return jnp.einsum("yk,bxkc->bxyc", twice * along_y, g)


def _kept_waves(points: int, modes: int) -> tuple[jax.Array, jax.Array]:
    """The kept part of a real Fourier transform as matrices; on a CPU that is twice as fast as all of it.

    Returns:
      (X, 2, 2 m, 2): from the parts p of a field at x to the parts q of exp(-i k_x x) times it, k_x = 0 .. m - 1 and
      -m .. -1. The same matrix, read backwards, is the inverse.
      (Y, 2 m): cos(k_y y) and -sin(k_y y), the parts of exp(-i k_y y), k_y = 0 .. m - 1.
    """
    x = 2 * np.pi * np.arange(points) / points
    k = np.concatenate([np.arange(modes), np.arange(-modes, 0)])
    c, s = np.cos(np.outer(x, k)), np.sin(np.outer(x, k))
    along_x = np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], 1)
    k = np.arange(modes)
    along_y = np.concatenate([np.cos(np.outer(x, k)), -np.sin(np.outer(x, k))], 1)
    return jnp.asarray(along_x, jnp.float32), jnp.asarray(along_y, jnp.float32)


class _Conv3(nn.Module):
    """3 x 3 convolution on a periodic grid."""

    width: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        channels = z.shape[-1]
        start = nn.initializers.normal((9 * channels) ** -0.5)
        kernel = self.param("kernel", start, (3, 3, channels, self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        # Neighbours in x side by side, one matrix for all neighbours in y, whose parts are then shifted and summed.
        near = jnp.concatenate([jnp.roll(z, 1 - i, 1) for i in range(3)], -1)
        parts = jnp.tensordot(near, jnp.swapaxes(kernel, 1, 2).reshape(3 * channels, 3, self.width), 1)
        return sum((jnp.roll(parts[..., j, :], 1 - j, 2) for j in range(3)), bias)


class _GroupNorm(nn.Module):
    """Group norm with one group: mean 0, variance 1 over all points and channels of a sample, then per channel."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        wide = z.astype(jnp.float32)
        wide = wide - wide.mean((1, 2, 3), keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean((1, 2, 3), keepdims=True) + _EPS)
        wide = wide * self.param("scale", nn.initializers.ones, z.shape[-1:])
        return (wide + self.param("bias", nn.initializers.zeros, z.shape[-1:])).astype(z.dtype)


def _patches(x: jax.Array) -> jax.Array:
    """(B, T, X, Y, C) to (B, T, X / 4, Y / 4, 16 C)."""
    b, t, nx, ny, c = x.shape
    x = x.reshape(b, t, nx // PATCH, PATCH, ny // PATCH, PATCH, c)
    return jnp.swapaxes(x, 3, 4).reshape(b, t, nx // PATCH, ny // PATCH, -1)


def _pixels(x: jax.Array, fields: int) -> jax.Array:
    """The inverse, without the axis T: (B, X / 4, Y / 4, 16 F) to (B, X, Y, F)."""
    b, nx, ny, _ = x.shape
    x = x.reshape(b, nx, ny, PATCH, PATCH, fields)
    return jnp.swapaxes(x, 2, 3).reshape(b, nx * PATCH, ny * PATCH, fields)
