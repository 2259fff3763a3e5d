"""Implicit neural representations: a signal or image as a function of place, y = f(x), x in [-1, 1]^d.

SIREN (Sitzmann et al. 2020, arXiv 2006.09661) and the networks it is compared with. All have one signature,
``NAME_init(key, widths) -> params`` and ``NAME_apply(params, x) -> y`` with widths (d, hidden ..., C), and differ in
the activation of z_l = h_{l-1} W_l + b_l, l = 1..n; the output layer is linear::

    SIREN     sin(omega_1 z_1), sin(omega_0 z_l)
    FINER     sin(omega (|z| + 1) z), the factor not differentiated     (arXiv 2312.02434)
    FINER++   FINER with first biases ~ U(-5, 5)                        (arXiv 2407.19434)
    Gauss     exp(-(30 z)²)                                             (arXiv 2111.15135)
    WIRE      exp(i omega z - |sigma z|²), complex; real part out       (arXiv 2301.05187)
    ReLU+PE   ReLU on sin and cos of 2^i pi x                           (arXiv 2003.08934)
    RFF       SIREN on random Fourier features of x                     (arXiv 2006.10739)

Parameters: ``layer_l/kernel`` (in, out) and ``layer_l/bias`` (out,), l = 0..n, the output layer last. WIRE has an
imaginary part beside each; RFF keeps its frequencies, which are not trained, under ``features/frequencies``.

Layer 1 of the equations is ``layer_0`` here. Arguments of the sine reach 1e4: matrix products are asked for in full
float32, since bfloat16 would destroy the phase.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.rng import stream

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Params = dict[str, dict[str, jax.Array]]
Activation = Callable[[int, jax.Array], jax.Array]


def coordinates(shape: Sequence[int]) -> Float[Array, "N d"]:
    """The places of a grid: inclusive linspace(-1, 1) along each axis, row-major.

    Args:
      shape: samples along each of d axes, each at least 2.

    Returns:
      (N, d) float32, N the product of the shape.

    >>> coordinates((2, 3)).tolist()[:3]
    [[-1.0, -1.0], [-1.0, 0.0], [-1.0, 1.0]]
    """
    if not shape or min(shape) < 2:
        raise ValueError(f"coordinates: wanted at least 2 samples along each axis, got {tuple(shape)}.")
    axes = [jnp.linspace(-1, 1, n) for n in shape]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(shape))


def siren_init(key: jax.Array, widths: Sequence[int], *, omega0: float = 30.0) -> Params:
    """SIREN's initialisation: W_1 ~ U(±1/d), W_l ~ U(±sqrt(6/H)/omega_0), the output layer included.

    Args:
      key: typed key.
      widths: (d, hidden ..., C), at least two hidden layers.
      omega0: omega_0 > 0 of the layers after the first.

    Returns:
      Parameters. Biases are U(±1/sqrt(in)), the default of the released code's framework.

    Raises:
      ValueError: too few layers, a width below 1, or omega0 not positive.
    """
    _require_widths(widths)
    _require_positive(omega0=omega0)
    limits = [1 / widths[0], *(math.sqrt(6 / fan_in) / omega0 for fan_in in widths[1:-1])]
    return _init(key, widths, limits)


def siren_preactivations(
    params: Params, x: Float[Array, "N d"], *, omega_first: float | jax.Array = 30.0, omega0: float = 30.0
) -> tuple[Float[Array, "N H"], ...]:
    """What the sines are applied to, omega z, layer by layer, and the output last.

    Args:
      params: from ``siren_init``.
      x: (N, d) places in [-1, 1].
      omega_first: omega_1 > 0 of the first layer; may be traced (a sweep).
      omega0: omega_0 > 0 of the others.

    Returns:
      n arrays (N, H) in radians, then the output (N, C).
    """
    _require_positive(omega_first=omega_first, omega0=omega0)
    _require_places(x)
    omegas = [omega_first] + [omega0] * (len(params) - 2)
    phases, h = [], x
    for layer, omega in enumerate(omegas):
        phases.append(omega * _dense(params[f"layer_{layer}"], h))
        h = jnp.sin(phases[-1])
    return *phases, _dense(params[f"layer_{len(omegas)}"], h)


def siren_apply(
    params: Params, x: Float[Array, "N d"], *, omega_first: float | jax.Array = 30.0, omega0: float = 30.0
) -> Float[Array, "N C"]:
    """SIREN: h_1 = sin(omega_1 z_1), h_l = sin(omega_0 z_l), y = h_n W + b. Arguments as ``siren_preactivations``."""
    return siren_preactivations(params, x, omega_first=omega_first, omega0=omega0)[-1]


def finer_init(key: jax.Array, widths: Sequence[int], *, omega: float = 30.0) -> Params:
    """FINER starts as SIREN does."""
    return siren_init(key, widths, omega0=omega)


def finerpp_init(key: jax.Array, widths: Sequence[int], *, omega: float = 30.0, spread: float = 5.0) -> Params:
    """FINER++: as FINER, with the first layer's biases ~ U(±spread)."""
    params = finer_init(key, widths, omega=omega)
    bias = params["layer_0"]["bias"]
    wide = jax.random.uniform(stream(key, "spread"), bias.shape, bias.dtype, -spread, spread)
    return params | {"layer_0": params["layer_0"] | {"bias": wide}}


def finer_apply(params: Params, x: Float[Array, "N d"], *, omega: float = 30.0) -> Float[Array, "N C"]:
    """FINER and FINER++: sin(omega (|z| + 1) z); the gradient takes the factor |z| + 1 for a constant."""
    _require_positive(omega=omega)
    return _run(params, x, lambda _, z: jnp.sin(omega * jax.lax.stop_gradient(jnp.abs(z) + 1) * z))


def gauss_init(key: jax.Array, widths: Sequence[int]) -> Params:
    """Weights and biases ~ U(±1/sqrt(in)), a plain linear layer's default."""
    _require_widths(widths)
    return _init(key, widths, [1 / math.sqrt(fan_in) for fan_in in widths[:-1]])


def gauss_apply(params: Params, x: Float[Array, "N d"], *, scale: float = 30.0) -> Float[Array, "N C"]:
    """Gaussian activations, exp(-(scale z)²)."""
    _require_positive(scale=scale)
    return _run(params, x, lambda _, z: jnp.exp(-jnp.square(scale * z)))


def wire_init(key: jax.Array, widths: Sequence[int]) -> Params:
    """WIRE with H/sqrt(2) complex units where ``widths`` has H: about as many numbers as the real networks.

    Real and imaginary parts ~ U(±1/sqrt(in)). They are separate real leaves, so that Adam treats them separately.
    """
    _require_widths(widths)
    narrow = [widths[0], *(max(1, round(width / math.sqrt(2))) for width in widths[1:-1]), widths[-1]]
    real, imaginary = (gauss_init(stream(key, part), narrow) for part in ("real", "imaginary"))
    return {
        name: layer | {f"{part}_imaginary": imaginary[name][part] for part in layer} for name, layer in real.items()
    }


def wire_apply(
    params: Params, x: Float[Array, "N d"], *, omega: float = 10.0, sigma: float = 10.0
) -> Float[Array, "N C"]:
    """Complex Gabor wavelets, exp(i omega z - |sigma z|²); the output is the real part."""
    _require_positive(omega=omega, sigma=sigma)
    whole = {
        name: {part: layer[part] + 1j * layer[f"{part}_imaginary"] for part in ("kernel", "bias")}
        for name, layer in params.items()
    }
    gabor = lambda _, z: jnp.exp(1j * omega * z - jnp.square(jnp.abs(sigma * z)))  # noqa: E731
    return _run(whole, x, gabor).real


def octaves(samples: int) -> int:
    """Octaves of the positional encoding for N samples per axis: floor(log2(N / 4)), at least 1."""
    return max(1, math.floor(math.log2(samples / 4)))


def relu_init(key: jax.Array, widths: Sequence[int], *, octaves: int) -> Params:
    """ReLU with positional encoding: weights and biases ~ U(±1/sqrt(in)), in = d (1 + 2 octaves).

    Raises:
      ValueError: fewer than one octave.
    """
    _require_widths(widths)
    if octaves < 1:
        raise ValueError(f"octaves must be at least 1, got {octaves}.")
    return gauss_init(key, [widths[0] * (1 + 2 * octaves), *widths[1:]])


def relu_apply(params: Params, x: Float[Array, "N d"]) -> Float[Array, "N C"]:
    """ReLU on (x, sin(2^i pi x), cos(2^i pi x)); the number of octaves follows from the first kernel.

    x itself is among the inputs, since all of the others agree at -1 and 1.
    """
    _require_places(x)
    count = (params["layer_0"]["kernel"].shape[0] // x.shape[-1] - 1) // 2
    angle = (jnp.pi * 2.0 ** jnp.arange(count) * x[..., None]).reshape(*x.shape[:-1], -1)
    encoded = jnp.concatenate([x, jnp.sin(angle), jnp.cos(angle)], -1)
    return _run(params, encoded, lambda _, z: jax.nn.relu(z), check=False)


def rff_init(key: jax.Array, widths: Sequence[int], *, spread: float = 30.0, omega0: float = 30.0) -> Params:
    """SIREN on H/2 random Fourier features: frequencies B ~ N(0, spread²) per unit of x, not trained."""
    _require_widths(widths)
    half = max(1, widths[1] // 2)
    frequencies = spread * jax.random.normal(stream(key, "frequencies"), (widths[0], half))
    network = siren_init(stream(key, "network"), [2 * half, *widths[1:]], omega0=omega0)
    return network | {"features": {"frequencies": frequencies}}


def rff_apply(
    params: Params, x: Float[Array, "N d"], *, omega_first: float | jax.Array = 30.0, omega0: float = 30.0
) -> Float[Array, "N C"]:
    """SIREN on (cos 2 pi B x, sin 2 pi B x)."""
    _require_places(x)
    frequencies = jax.lax.stop_gradient(params["features"]["frequencies"])
    angle = 2 * jnp.pi * jnp.matmul(x, frequencies, precision=jax.lax.Precision.HIGHEST)
    features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
    network = {name: layer for name, layer in params.items() if name != "features"}
    return siren_apply(network, features, omega_first=omega_first, omega0=omega0)


def _init(key: jax.Array, widths: Sequence[int], limits: Sequence[float]) -> Params:
    params = {}
    for layer, (fan_in, fan_out, limit) in enumerate(zip(widths[:-1], widths[1:], limits, strict=True)):
        name, bound = f"layer_{layer}", 1 / math.sqrt(fan_in)
        params[name] = {
            "kernel": jax.random.uniform(stream(key, name, "kernel"), (fan_in, fan_out), minval=-limit, maxval=limit),
            "bias": jax.random.uniform(stream(key, name, "bias"), (fan_out,), minval=-bound, maxval=bound),
        }
    return params


def _dense(layer: dict[str, jax.Array], h: jax.Array) -> jax.Array:
    return jnp.matmul(h, layer["kernel"], precision=jax.lax.Precision.HIGHEST) + layer["bias"]


def _run(params: Any, x: jax.Array, activation: Activation, *, check: bool = True) -> jax.Array:
    if check:
        _require_places(x)
    h = x
    for layer in range(len(params) - 1):
        h = activation(layer, _dense(params[f"layer_{layer}"], h))
    return _dense(params[f"layer_{len(params) - 1}"], h)


def _require_widths(widths: Sequence[int]) -> None:
    if len(widths) < 4 or min(widths) < 1:
        raise ValueError(f"widths: wanted (in, at least two hidden ..., out), all positive, got {tuple(widths)}.")


def _require_positive(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, jax.core.Tracer) and not np.all(np.asarray(value) > 0):
            raise ValueError(f"{name} must be positive, got {value}.")


def _require_places(x: jax.Array) -> None:
    """Places outside [-1, 1] are a unit mistake; rounding of a linspace is not."""
    if np.ndim(x) < 1 or jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        raise ValueError(f"x: wanted real places (N, d), got {jnp.result_type(x)} of shape {np.shape(x)}.")
    if not isinstance(x, jax.core.Tracer):
        largest = float(np.abs(np.asarray(x)).max(initial=0))
        if not largest <= 1 + 1e-5:
            raise ValueError(f"x: wanted places in [-1, 1], got {largest} in magnitude.")
