"""KAT: Kolmogorov-Arnold Transformer (Yang and Wang 2024, arXiv 2409.10594): GR-KAN layers in place of the MLP.

A KAN learns a function on every edge. GR-KAN makes that affordable in three steps: rational functions instead of
splines (S1), one function per group of input channels instead of one per edge (S2), and kernels scaled so that variance
is kept (S3). A layer from d_in to d_out is an element-wise function and then a linear map::

    out_j = bias_j + sum_i W_ij F_q(i)(x_i),   q(i) = floor(i G / d_in)                  (GR-KAN, section 4.2)
    F(x)  = (a_0 + ... + a_5 x^5) / (1 + |b_1| |x| + ... + |b_4| |x|^4)                  (form A, kernels/rational)
    block: x + Linear(F_2(Linear(F_1(norm(x))))),  F_1 the identity and F_2 Swish at the start
    W ~ N(0, alpha / d_in),   alpha = 1 / E[F(x)^2],   x ~ N(0, 1)                       (S3, section 4.3)

Block and model are those of ``models/vit.py`` with ``mlp=RationalMLP(...)`` of ``models/kan.py``; here are the starts,
the gains, the way from a vision transformer's weights to a KAT's, and the configurations.

Differs from the paper: no dropout (the released configurations set it to 0); coefficients are left out of weight decay,
which would drive Q to 1 (our choice). Differs from the released code, and follows the paper: there, a branch of the
initialisation overwrites the variance-preserving kernels by a normal distribution of standard deviation 0.02, and its
constants for alpha are Monte-Carlo estimates (2.8178 and 2.3568 for 2.8108 and 2.3517).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np
from scipy.optimize import least_squares

from mechlab.core import select
from mechlab.core.errors import did_you_mean
from mechlab.kernels.rational import rational
from mechlab.models.kan import Coefficients, RationalMLP
from mechlab.models.layers import linear
from mechlab.models.vit import ViTConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Float

IDENTITY = Coefficients(a=(0, 1, 0, 0, 0, 0), b=(0, 0, 0, 0))

SWISH = Coefficients(
    a=(3.0549e-07, 0.5000007854, 0.2499978342, 0.0532662827, 0.0058030346, 0.0002751961),
    b=(-4.1116e-06, 0.1065289934, -1.2690e-06, 0.0005502331),
)

_GELU_B = Coefficients(
    a=(-0.00153969, 0.51692871, 0.44075827, 0.0972553, -0.00884418, -0.00378675),
    b=(-0.14171056, -0.06481231, -0.0444695, 0.01283776),
    form="B",
)

_GELU_A = Coefficients(
    a=(-0.00124236, 0.50804971, 0.41586363, 0.13022719, 0.0243559, 0.00290284),
    b=(-0.06675016, 0.17927646, 0.03746683, 1.6562e-10),
)

RELEASED = {
    "identity": {"A": IDENTITY, "B": dataclasses.replace(IDENTITY, form="B")},
    "swish": {"A": SWISH, "B": dataclasses.replace(SWISH, form="B")},
    "gelu": {"B": _GELU_B},
    "gelu_old": {"A": _GELU_A},
}
"""Starts of the released code by name and form."""


def rational_init(name: str, form: Literal["A", "B"] = "A") -> Coefficients:
    """Coefficients of the released code, fitted to an activation on [-3, 3].

    Args:
      name: "identity", "swish", "gelu" or "gelu_old". The released kernels are of form A and their "gelu" was fitted in
        form B, so it is wrong there by up to 1.46; "gelu_old" is the fit in form A. Errors: swish 1e-6, gelu 3e-3,
        gelu_old 4e-3; ``fit_rational`` does better.
      form: of the denominator.

    Returns:
      The coefficients, for ``RationalMLP`` or, by ``arrays(groups)``, for ``kernels.rational``.

    Raises:
      ValueError: an unknown name, or a name that has no fit in this form.

    >>> rational_init("swish").form
    'A'
    """
    if name not in RELEASED:
        raise ValueError(
            f'rational_init: unknown name "{name}".{did_you_mean(name, RELEASED)} Known: {", ".join(RELEASED)}.'
        )
    if form not in RELEASED[name]:
        other = "gelu_old" if name == "gelu" else "gelu"
        raise ValueError(
            f'rational_init: "{name}" was fitted in form {"".join(RELEASED[name])} and is another function in form '
            f'"{form}"; use "{other}", or fit_rational.'
        )
    return RELEASED[name][form]


def fit_rational(
    function: Callable[[np.ndarray], Any],
    form: Literal["A", "B"] = "A",
    *,
    low: float = -3.0,
    high: float = 3.0,
    points: int = 1000,
) -> tuple[Coefficients, float]:
    """The rational function nearest to ``function`` in squares, on points evenly spread over [low, high].

    For given b the best a is a linear problem, so the search starts from a few b with their best a; in form A, where
    only |b| matters, it keeps to b >= 0. Runs on the host, in float64, by SciPy.

    Args:
      function: element-wise, (points,) to (points,); a jax function will do, in float32.
      form: of the denominator.
      low, high, points: where the two are compared. Outside nothing holds: F grows linearly with slope a_5 / b_4.

    Returns:
      The coefficients, and the largest error on the points.

    Raises:
      ValueError: a function that is not finite on the points, or an empty interval.

    >>> fit_rational(np.tanh)[1] < 1e-3
    True
    """
    x = np.linspace(low, high, points)
    wanted = np.asarray(function(x), np.float64)
    if low >= high or wanted.shape != x.shape or not np.isfinite(wanted).all():
        raise ValueError(f"fit_rational: the function must be finite, shaped like its input, on [{low}, {high}].")
    powers = np.stack([x**i for i in range(6)], 1)

    def denominator(b: np.ndarray) -> np.ndarray:
        if form == "A":
            return 1 + np.abs(powers[:, 1:5]) @ np.abs(b)
        return 1 + np.abs(powers[:, 1:5] @ b)

    def residual(both: np.ndarray) -> np.ndarray:
        return powers @ both[:6] / denominator(both[6:]) - wanted

    def start(b: np.ndarray) -> np.ndarray:
        best = np.linalg.lstsq(powers / denominator(b)[:, None], wanted, rcond=None)[0]
        return np.concatenate([best, b])

    starts = np.asarray([[1e-3, 0.1, 1e-3, 1e-3], [0.1, 0.1, 0.1, 0.1], [1e-3, 0.5, 1e-3, 0.05], [0.5, 1.0, 0.1, 0.1]])
    floor = np.asarray([-np.inf] * 6 + [0.0 if form == "A" else -np.inf] * 4)
    fits = [least_squares(residual, start(b), bounds=(floor, np.inf), x_scale="jac", max_nfev=1000) for b in starts]
    best = min(fits, key=lambda fit: fit.cost).x
    a, b = (tuple(float(c) for c in part) for part in (best[:6], best[6:]))
    return Coefficients(a=a, b=b, form=form), float(np.abs(residual(best)).max())


def rational_gain(coefficients: Coefficients) -> float:
    """alpha = 1 / E[F(x)^2] for x ~ N(0, 1): the gain of S3, by quadrature on [-12, 12].

    >>> round(rational_gain(SWISH), 4)
    2.8108
    """
    x = np.linspace(-12, 12, 24_001)
    power = np.polynomial.polynomial.polyval(x, coefficients.a)
    b = np.asarray([0.0, *coefficients.b])
    if coefficients.form == "A":
        below = 1 + np.polynomial.polynomial.polyval(np.abs(x), np.abs(b))
    else:
        below = 1 + np.abs(np.polynomial.polynomial.polyval(x, b))
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    return float(1 / np.trapezoid((power / below) ** 2 * density, x))


def gr_kan(
    x: Float[Array, "... I"],
    a: Float[Array, "g 6"],
    b: Float[Array, "G 4"],
    kernel: Float[Array, "I O"],
    bias: Float[Array, " O"],
    *,
    form: Literal["A", "B"] = "A",
) -> Float[Array, "... O"]:
    """One GR-KAN layer as a function: the grouped rational, then the linear map.

    Args:
      x: (..., I).
      a, b: (1 or G, 6) and (G, 4), see ``kernels.rational.rational``.
      kernel, bias: (I, O) and (O,).
      form: of the denominator.

    Returns:
      (..., O).
    """
    return linear(rational(x, a, b, groups=b.shape[0], form=form), kernel, bias)


def kat(
    config: ViTConfig,
    *,
    second: Coefficients = SWISH,
    groups: int | None = 8,
    share_numerator: bool = True,
    variance_preserving: bool = True,
) -> ViTConfig:
    """The KAT of a vision transformer's shape: the same model with GR-KAN MLPs.

    Args:
      config: shape; its ``activation`` and ``mlp`` are replaced.
      second: F_2 at the start; F_1 is the identity, in the same form.
      groups: G, a divisor of width and hidden width; None for a function per channel.
      share_numerator: one numerator per F instead of one per group.
      variance_preserving: S3; else kernels are N(0, 0.02^2), as the released code makes them.

    Raises:
      ValueError: groups that do not divide the widths.
    """
    first = rational_init("identity", second.form)
    std = (0.02, 0.02)
    if variance_preserving:
        std = ((rational_gain(first) / config.width) ** 0.5, (rational_gain(second) / config.hidden) ** 0.5)
    mlp = RationalMLP(first=first, second=second, groups=groups, share_numerator=share_numerator, init_std=std)
    return dataclasses.replace(config, mlp=mlp)


def imagenet(size: Literal["tiny", "small", "base"]) -> ViTConfig:
    """KAT-T, -S or -B for ImageNet-1k: patch 16, 12 layers, width 192, 384 or 768 with heads of 64 channels.

    5.7, 22.1 and 86.6 million parameters; top-1 accuracy 74.6, 81.2 and 82.3 % in the paper.
    """
    width = {"tiny": 192, "small": 384, "base": 768}[size]
    shape: dict[str, Any] = {"image": (224, 224), "patch": 16, "layers": 12, "heads": width // 64, "classes": 1000}
    return kat(ViTConfig(**shape, width=width, hidden=4 * width))


def vit_to_kat(params: Any, config: ViTConfig) -> Any:
    """A KAT's parameters from a trained vision transformer's: its weights, and rational functions at their start.

    With F_1 the identity and F_2 fitted to the transformer's activation the outputs are the same up to the error of the
    fit, which is small on the interval of the fit only.

    Args:
      params: of ``vit(...)`` with plain MLPs. Not changed; weights are shared.
      config: of the KAT (``kat(...)``), of the same shape.

    Returns:
      Parameters of ``vit(config)``.

    Raises:
      ValueError: a config without rational MLPs.
      KeyError: parameters without a plain MLP.
    """
    kind = config.mlp
    if not isinstance(kind, RationalMLP):
        raise ValueError(f"vit_to_kat: config must be of a KAT, such as kat(config), got mlp={kind}.")
    select.get(params, "blocks/mlp/up/kernel")

    def stacked(start: Coefficients, width: int) -> dict[str, Array]:
        a, b = start.arrays(kind.groups or width, share_numerator=kind.share_numerator)
        return {name: jnp.tile(c, (config.layers, 1, 1)) for name, c in (("numerator", a), ("denominator", b))}

    rationals = {"first": stacked(kind.first, config.width), "second": stacked(kind.second, config.hidden)}
    return params | {"blocks": params["blocks"] | {"mlp": params["blocks"]["mlp"] | rationals}}


def decayed(params: Any) -> Any:
    """Which parameters take weight decay, as booleans for ``optax.adamw(..., mask=...)``: kernels and splines only."""
    return select.mask(params, "**/kernel|**/base|**/spline")


def layer_parameters(inputs: int, outputs: int, groups: int = 8) -> int:
    """Numbers of one GR-KAN layer with a shared numerator: d_in d_out + d_out + 6 + 4 G."""
    return inputs * outputs + outputs + 6 + 4 * groups


def spline_parameters(inputs: int, outputs: int, grid: int = 5, order: int = 3) -> int:
    """Numbers of one B-spline KAN layer of ``models/kan.py``: d_in d_out (g + K + 1) + d_out.

    Differs from the paper, which counts g + K + 3 per edge: the reference implementation also has a scale for each of
    the two branches, which the weights of a branch absorb.
    """
    return inputs * outputs * (grid + order + 1) + outputs
