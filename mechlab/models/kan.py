"""MLPs with learned activations for the transformer's block: group rationals (GR-KAN) and B-splines (KAN).

Either is a value of ``TransformerConfig.mlp`` (or ``ViTConfig.mlp``) and takes the plain MLP's place, with its sites::

    mlp_in   (B, T, D)   the block's normed input
    mlp_pre  (B, T, F)   what the first layer puts out
    mlp_act  (B, T, F)   ``RationalMLP`` only: the second activation of it, which the second kernel reads
    mlp_out  (B, T, D)

Parameters of ``RationalMLP`` below ``mlp``: ``first`` and ``second``, each ``numerator`` (1 or G, 6) and
``denominator`` (G, 4); ``up`` and ``down`` as in the plain MLP. Of ``SplineMLP``: ``up`` and ``down``, each ``base``
(in, out), ``spline`` (in, g + K, out) and ``bias`` (out,). All are stacked over layers.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mechlab.core.sites import site
from mechlab.kernels.rational import rational
from mechlab.models.layers import Linear
from mechlab.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coefficients:
    """One rational function: F(x) = sum a_i x^i / Q(x), see ``kernels/rational``.

    Attributes:
      a: a_0 .. a_5.
      b: b_1 .. b_4.
      form: of the denominator; the same numbers are another function in the other form.
    """

    a: tuple[float, ...]
    b: tuple[float, ...]
    form: Literal["A", "B"] = "A"

    def __post_init__(self) -> None:
        if (len(self.a), len(self.b)) != (6, 4) or not np.isfinite([*self.a, *self.b]).all():
            raise ValueError(f"Coefficients: wanted 6 finite a and 4 finite b, got {self.a} and {self.b}.")
        if self.form not in ("A", "B"):
            raise ValueError(f'Coefficients: form must be "A" or "B", got "{self.form}".')

    def arrays(self, groups: int, *, share_numerator: bool = True) -> tuple[Array, Array]:
        """The same coefficients for every group: a (1 or G, 6) and b (G, 4), float32."""
        a, b = jnp.asarray(self.a, jnp.float32), jnp.asarray(self.b, jnp.float32)
        return jnp.tile(a, (1 if share_numerator else groups, 1)), jnp.tile(b, (groups, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RationalMLP:
    """GR-KAN MLP: F_1, linear D to F, F_2, linear F to D, with F_1 and F_2 group-wise rational and learned.

    Attributes:
      first, second: F_1 and F_2 at initialisation, in every group.
      groups: G of both, a divisor of D and F; None gives every channel a function of its own.
      share_numerator: one numerator for all groups.
      init_std: standard deviation of the two kernels at initialisation.
    """

    first: Coefficients
    second: Coefficients
    groups: int | None = 8
    share_numerator: bool = True
    init_std: tuple[float, float] = (0.02, 0.02)

    def problems(self, width: int, hidden: int) -> list[str]:
        """What does not fit a block of D = ``width`` and F = ``hidden``."""
        if self.groups is not None and (self.groups < 1 or width % self.groups or hidden % self.groups):
            return [f"groups={self.groups} must divide width={width} and hidden={hidden}"]
        return []

    def module(self, config: TransformerConfig, name: str) -> nn.Module:
        """The module, ``(x, positions) -> out``."""
        return _RationalMLP(self, config, name=name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplineMLP:
    """Two KAN layers (arXiv 2404.19756), D to F to D: a B-spline and a SiLU branch on every edge.

    Attributes:
      grid: g, intervals of the spline on [-1, 1], of equal length; outside, the spline fades to 0.
      order: K, degree of its pieces.
    """

    grid: int = 5
    order: int = 3

    def problems(self, width: int, hidden: int) -> list[str]:
        """What is wrong with grid and order."""
        if self.grid < 1 or self.order < 0:
            return [f"grid must be at least 1 and order at least 0, got {self.grid} and {self.order}"]
        return []

    def module(self, config: TransformerConfig, name: str) -> nn.Module:
        """The module, ``(x, positions) -> out``."""
        return _SplineMLP(self, config, name=name)


class GroupRational(nn.Module):
    """F(x) with the parameters ``numerator`` and ``denominator``; groups None is one a channel."""

    start: Coefficients
    groups: int | None = 8
    share_numerator: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        groups = x.shape[-1] if self.groups is None else self.groups
        a, b = self.start.arrays(groups, share_numerator=self.share_numerator)
        a, b = self.param("numerator", lambda key: a), self.param("denominator", lambda key: b)
        return rational(x, a, b, groups=groups, form=self.start.form)


class GRKAN(nn.Module):
    """One GR-KAN layer: out_j = bias_j + sum_i kernel_ij F_group(i)(x_i) (arXiv 2409.10594, section 4.2)."""

    out: int
    start: Coefficients
    groups: int = 8
    share_numerator: bool = True
    init_std: float | None = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = GroupRational(self.start, self.groups, self.share_numerator, name="rational")(x)
        return Linear((self.out,), init_std=self.init_std, name="linear")(x)


def spline_basis(x: Float[Array, "..."], grid: int, order: int) -> Float[Array, "... C"]:
    """The C = g + K B-splines of degree K over g equal intervals of [-1, 1], by the recursion of Cox and de Boor.

    Args:
      x: any shape.
      grid: g.
      order: K.

    Returns:
      (..., g + K), not negative; on [-1, 1) they sum to 1.

    >>> spline_basis(jnp.asarray(0.0), 2, 1).tolist()
    [0.0, 1.0, 0.0]
    """
    step = 2 / grid
    knots = -1 + step * np.arange(-order, grid + order + 1)
    x = x[..., None]
    basis = ((x >= knots[:-1]) & (x < knots[1:])).astype(x.dtype)
    for k in range(1, order + 1):
        rising = (x - knots[: -k - 1]) / (k * step)
        falling = (knots[k + 1 :] - x) / (k * step)
        basis = rising * basis[..., :-1] + falling * basis[..., 1:]
    return basis


class _RationalMLP(nn.Module):
    kind: RationalMLP
    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        kind, biased = self.kind, self.config.has_bias("mlp")

        def activation(start: Coefficients, name: str) -> nn.Module:
            return GroupRational(start, kind.groups, kind.share_numerator, name=name)

        def project(width: int, std: float, name: str) -> nn.Module:
            return Linear((width,), use_bias=biased, init_std=std, name=name)

        x = site(self, "mlp_in", x, "B T D", positions=positions)
        pre = project(self.config.hidden or 0, kind.init_std[0], "up")(activation(kind.first, "first")(x))
        pre = site(self, "mlp_pre", pre, "B T F", positions=positions)
        act = activation(kind.second, "second")(pre)
        act = site(self, "mlp_act", act, "B T F", positions=positions, pre=pre)
        out = project(self.config.width, kind.init_std[1], "down")(act)
        return site(self, "mlp_out", out, "B T D", positions=positions)


class _SplineMLP(nn.Module):
    kind: SplineMLP
    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        x = site(self, "mlp_in", x, "B T D", positions=positions)
        pre = _Spline(self.kind, self.config.hidden or 0, name="up")(x)
        pre = site(self, "mlp_pre", pre, "B T F", positions=positions)
        out = _Spline(self.kind, self.config.width, name="down")(pre)
        return site(self, "mlp_out", out, "B T D", positions=positions)


class _Spline(nn.Module):
    """out_j = bias_j + sum_i (base_ij silu(x_i) + sum_c spline_icj B_c(x_i))."""

    kind: SplineMLP
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, bases = x.shape[-1], self.kind.grid + self.kind.order
        base = self.param("base", nn.initializers.normal(inputs**-0.5), (inputs, self.out))
        # 0.1 of the base's size: the KAN paper starts from small splines.
        spline = self.param("spline", nn.initializers.normal(0.1 * inputs**-0.5), (inputs, bases, self.out))
        bias = self.param("bias", nn.initializers.zeros, (self.out,))
        basis = spline_basis(x, self.kind.grid, self.kind.order)
        through = jnp.einsum("...ic,ico->...o", basis, spline.astype(x.dtype))
        return jax.nn.silu(x) @ base.astype(x.dtype) + through + bias.astype(x.dtype)
