"""Flows: small worlds of physics on a periodic square, simulated from a key.

The square is [0, 2 pi)^2 with X x Y points; axis X is x, axis Y is y. Frames are ``INTERVAL`` = 0.25 apart::

    shear        w_t + u.grad w = nu lap w,  s_t + u.grad s = D lap s          fields u, v, s
    advect       s_t + c.grad s = D lap s, c constant: exact in Fourier space  fields c_x, c_y, s
    gray_scott   U_t = 0.16 kappa lap U - U V^2 + F (1 - U)
                 V_t = 0.08 kappa lap V + U V^2 - (F + k) V, on grid units     fields U, V
    wave         p_tt = c^2 lap p: exact in Fourier space                      fields p, p_t
    burgers      u_t + u.grad u = nu lap u                                     fields u, v

``evolve_*`` are pure functions of an initial state, for ``jit`` and ``vmap``; ``simulate_*`` draw the state too and
refuse a run that blew up. Shear flow and Burgers' equation are pseudo-spectral: 2/3 de-aliasing, viscosity by an
integrating factor, midpoint rule, ``SUBSTEPS`` steps per frame.

The worlds are those of the reproduction of "Physics Steering" (arXiv 2511.20798), in place of The Well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.rng import stream, streams

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float

INTERVAL = 0.25
"""Time between two frames."""
SUBSTEPS = 10
REACTION_STEPS = 20
"""Time steps of length 1 between two frames of Gray-Scott."""
WARM_UP = 10
"""Frames of Gray-Scott before the first that is shown: by then there are patterns."""
SHIFT, SIZE = (0.7, 0.15), (0.25, 0.12)
"""U and V are shown as (U - shift) / size, so that all fields are of about the same size."""


def wavenumbers(grid: int) -> tuple[jax.Array, jax.Array]:
    """Wavenumbers (X, 1) and (1, Y / 2 + 1) of ``jnp.fft.rfft2`` on the square of side 2 pi."""
    return jnp.fft.fftfreq(grid, 1 / grid)[:, None], jnp.fft.rfftfreq(grid, 1 / grid)[None]


def vorticity(u: Float[Array, "... X Y"], v: Float[Array, "... X Y"]) -> Float[Array, "... X Y"]:
    """w = dv/dx - du/dy, by Fourier derivatives."""
    kx, ky = wavenumbers(u.shape[-1])
    return jnp.fft.irfft2(1j * kx * jnp.fft.rfft2(v) - 1j * ky * jnp.fft.rfft2(u), s=u.shape[-2:])


def shear_state(
    key: jax.Array, n: int, *, amplitude: Float[ArrayLike, "..."], speed: Float[ArrayLike, "..."], grid: int = 32
) -> tuple[Float[Array, "n X Y"], Float[Array, "n X Y"]]:
    """Vorticity and tracer of two opposite shear layers at y = pi/2 and 3 pi/2.

    u(y) = +-U [tanh((y - pi/2) / d) - tanh((y - 3 pi/2) / d) - 1], d in [0.35, 0.5], with a perturbation of the
    vorticity of a sum_{m=1..3} sin(m x + phi_m) / sqrt(m) inside each layer. The tracer marks the stream between them.

    Args:
      key: typed key.
      n: number of states.
      amplitude: a, (n,) or a number.
      speed: U, (n,) or a number.
      grid: X = Y.
    """
    widths, signs, phases = streams(key, "width sign phase")
    a, speed = (jnp.broadcast_to(jnp.asarray(z, jnp.float32), (n,))[:, None, None] for z in (amplitude, speed))
    d = jax.random.uniform(widths, (n, 1, 1), minval=0.35, maxval=0.5)
    sign = jax.random.rademacher(signs, (n, 1, 1), jnp.float32)
    x = jnp.arange(grid) * (2 * jnp.pi / grid)
    y = x[None, None]
    first, second = (y - jnp.pi / 2) / d, (y - 3 * jnp.pi / 2) / d
    profile = jnp.tanh(first) - jnp.tanh(second) - 1
    inside = jnp.stack([1 / jnp.cosh(first) ** 2, 1 / jnp.cosh(second) ** 2])
    base = -sign * speed * (inside[0] - inside[1]) / d
    phi = jax.random.uniform(phases, (2, 3, n, 1, 1), maxval=2 * jnp.pi)
    m = jnp.arange(1, 4).reshape(3, 1, 1, 1)
    waves = (jnp.sin(m * x[:, None] + phi) / jnp.sqrt(m)).sum(1)
    return base + a * (waves * inside).sum(0), jnp.broadcast_to(profile, (n, grid, grid))


def evolve_shear(
    omega: Float[Array, "n X Y"],
    tracer: Float[Array, "n X Y"],
    *,
    nu: Float[ArrayLike, "..."],
    diffusivity: Float[ArrayLike, "..."],
    frames: int,
) -> Float[Array, "n frames 3 X Y"]:
    """Incompressible Navier-Stokes in vorticity form with a passive tracer; the first frame is the state itself.

    Args:
      omega, tracer: (n, X, Y). Wavenumbers above X / 3 are cut off. The mean flow is zero.
      nu, diffusivity: (n,) or numbers, >= 0.
      frames: number of frames.
    """
    grid = omega.shape[-1]
    kx, ky = wavenumbers(grid)
    k2 = kx**2 + ky**2
    kept = _dealias(grid)
    inverse = jnp.where(k2 > 0, 1 / jnp.where(k2 > 0, k2, 1), 0)
    state = jnp.fft.rfft2(jnp.stack([omega, tracer], 1)) * kept
    rates = jnp.concatenate([_column(nu, len(omega)), _column(diffusivity, len(omega))], 1)

    def real(z: jax.Array) -> jax.Array:
        return jnp.fft.irfft2(z, s=(grid, grid))

    def velocity(state: jax.Array) -> tuple[jax.Array, jax.Array]:
        psi = state[:, :1] * inverse  # lap psi = -w
        return real(1j * ky * psi), real(-1j * kx * psi)

    def transport(state: jax.Array) -> jax.Array:
        u, v = velocity(state)
        return -jnp.fft.rfft2(u * real(1j * kx * state) + v * real(1j * ky * state)) * kept

    def show(state: jax.Array) -> jax.Array:
        return jnp.concatenate([*velocity(state), real(state[:, 1:])], 1)

    return _integrate(state, transport, rates[..., None, None] * k2, show, frames)


def simulate_shear(
    key: jax.Array,
    n: int,
    *,
    nu: Float[ArrayLike, "..."],
    diffusivity: Float[ArrayLike, "..."],
    amplitude: Float[ArrayLike, "..."],
    speed: Float[ArrayLike, "..."],
    frames: int = 24,
    grid: int = 32,
) -> Float[Array, "n frames 3 X Y"]:
    """Shear flows from ``shear_state``; fields u, v, s.

    Args:
      key, n, amplitude, speed, grid: see ``shear_state``.
      nu, diffusivity, frames: see ``evolve_shear``.

    Raises:
      ValueError: sizes below 1, or parameters that are not finite or negative.
      FloatingPointError: values that are not finite or a Courant number above 1, with the parameters.

    >>> simulate_shear(jax.random.key(0), 2, nu=0.01, diffusivity=0.01, amplitude=0.1, speed=1.0, frames=3).shape
    (2, 3, 3, 32, 32)
    """
    given = {"nu": nu, "diffusivity": diffusivity, "amplitude": amplitude, "speed": speed}
    _check("simulate_shear", n, frames, grid, given)
    shown = _shear(key, n, nu, diffusivity, amplitude, speed, frames, grid)
    return _sound("simulate_shear", shown, given, courant=INTERVAL / SUBSTEPS * grid / (2 * np.pi))


@functools.partial(jax.jit, static_argnums=(1, 6, 7))
def _shear(key: Any, n: int, nu: Any, diffusivity: Any, amplitude: Any, speed: Any, frames: int, grid: int) -> Any:
    state = shear_state(key, n, amplitude=amplitude, speed=speed, grid=grid)
    return evolve_shear(*state, nu=nu, diffusivity=diffusivity, frames=frames)


def blobs(key: jax.Array, n: int, *, grid: int = 32, count: int = 3) -> Float[Array, "n X Y"]:
    """Sums of ``count`` periodic Gaussian blobs of random place, width in [0.4, 0.8] and height in +-[0.5, 1.5]."""
    places, widths, heights, signs = streams(key, "place width height sign")
    x0 = jax.random.uniform(places, (2, n, count, 1, 1), maxval=2 * jnp.pi)
    width = jax.random.uniform(widths, (n, count, 1, 1), minval=0.4, maxval=0.8)
    height = jax.random.uniform(heights, (n, count, 1, 1), minval=0.5, maxval=1.5)
    height = height * jax.random.rademacher(signs, height.shape, jnp.float32)
    x = jnp.arange(grid) * (2 * jnp.pi / grid)
    distance = 2 - jnp.cos(x[:, None] - x0[0]) - jnp.cos(x - x0[1])
    return (height * jnp.exp(-distance / width**2)).sum(1)


def evolve_advect(
    tracer: Float[Array, "n X Y"],
    velocity: Float[Array, "n 2"],
    *,
    diffusivity: Float[ArrayLike, "..."],
    frames: int,
) -> Float[Array, "n frames 3 X Y"]:
    """Transport and diffusion at a constant velocity, exact: s_k(t) = s_k(0) exp(-(i k.c + D k^2) t)."""
    grid, n = tracer.shape[-1], len(tracer)
    kx, ky = wavenumbers(grid)
    cx, cy = velocity[:, 0, None, None], velocity[:, 1, None, None]
    rate = 1j * (kx * cx + ky * cy) + _column(diffusivity, n)[..., None] * (kx**2 + ky**2)
    t = INTERVAL * jnp.arange(frames)[:, None, None]
    # The Nyquist wavenumber has no phase of its own, so its transport is not defined; it is left out.
    inside = (jnp.abs(kx) < grid / 2) & (ky < grid / 2)
    s = jnp.fft.rfft2(tracer) * inside
    s = jnp.fft.irfft2(s[:, None] * jnp.exp(-rate[:, None] * t), s=(grid, grid))
    c = jnp.broadcast_to(velocity[:, None, :, None, None], (n, frames, 2, grid, grid))
    return jnp.concatenate([c, s[:, :, None]], 2)


def simulate_advect(
    key: jax.Array,
    n: int,
    *,
    velocity: Float[ArrayLike, "n 2"],
    diffusivity: Float[ArrayLike, "..."],
    frames: int = 24,
    grid: int = 32,
) -> Float[Array, "n frames 3 X Y"]:
    """Blobs in a constant flow; fields c_x, c_y, s.

    Args:
      key: typed key.
      n: number of runs.
      velocity: c, (n, 2).
      diffusivity: D, (n,) or a number, >= 0.
      frames, grid: sizes.

    Raises:
      ValueError, FloatingPointError: as ``simulate_shear``; velocities of another shape.
    """
    if np.shape(velocity) != (n, 2):
        raise ValueError(f"simulate_advect: velocity must be ({n}, 2), got {np.shape(velocity)}.")
    _check("simulate_advect", n, frames, grid, {"diffusivity": diffusivity})
    if not _traced(velocity) and not np.isfinite(np.asarray(velocity)).all():
        raise ValueError("simulate_advect: velocity must be finite.")
    shown = _advect(key, n, jnp.asarray(velocity, jnp.float32), diffusivity, frames, grid)
    return _sound("simulate_advect", shown, {"velocity": velocity, "diffusivity": diffusivity})


@functools.partial(jax.jit, static_argnums=(1, 4, 5))
def _advect(key: Any, n: int, velocity: Any, diffusivity: Any, frames: int, grid: int) -> Any:
    return evolve_advect(blobs(key, n, grid=grid), velocity, diffusivity=diffusivity, frames=frames)


def evolve_gray_scott(
    u: Float[Array, "n X Y"],
    v: Float[Array, "n X Y"],
    *,
    feed: Float[ArrayLike, "..."],
    kill: Float[ArrayLike, "..."],
    kappa: Float[ArrayLike, "..."] = 1.0,
    frames: int,
) -> Float[Array, "n frames 2 X Y"]:
    """Gray-Scott by Euler steps of length 1 on grid units; concentrations U and V, unscaled."""
    n = len(u)
    feed, kill, kappa = (_column(z, n)[..., None] for z in (feed, kill, kappa))

    def laplacian(z: jax.Array) -> jax.Array:
        return sum(jnp.roll(z, shift, axis) for shift in (-1, 1) for axis in (-2, -1)) - 4 * z

    def step(state: Any, _: None) -> Any:
        u, v = state
        made = u * v**2
        u_rate = 0.16 * kappa * laplacian(u) - made + feed * (1 - u)
        v_rate = 0.08 * kappa * laplacian(v) + made - (feed + kill) * v
        return (u + u_rate, v + v_rate), None

    def frame(state: Any, _: None) -> Any:
        return jax.lax.scan(step, state, None, length=REACTION_STEPS)[0], jnp.stack(state, 1)

    return jnp.moveaxis(jax.lax.scan(frame, (u, v), None, length=frames)[1], 0, 1)


def simulate_gray_scott(
    key: jax.Array,
    n: int,
    *,
    feed: Float[ArrayLike, "..."],
    kill: Float[ArrayLike, "..."],
    kappa: Float[ArrayLike, "..."] = 1.0,
    frames: int = 24,
    grid: int = 32,
) -> Float[Array, "n frames 2 X Y"]:
    """Patterns grown from random seeds; fields U and V, shifted and scaled by ``SHIFT`` and ``SIZE``.

    Args:
      key: typed key.
      n: number of runs.
      feed, kill, kappa: F, k, and a factor on both diffusivities; (n,) or numbers.
      frames, grid: sizes; ``WARM_UP`` frames go before the first.

    Raises:
      ValueError, FloatingPointError: as ``simulate_shear``.
    """
    given = {"feed": feed, "kill": kill, "kappa": kappa}
    _check("simulate_gray_scott", n, frames, grid, given)
    return _sound("simulate_gray_scott", _gray_scott(key, n, feed, kill, kappa, frames, grid), given)


@functools.partial(jax.jit, static_argnums=(1, 5, 6))
def _gray_scott(key: Any, n: int, feed: Any, kill: Any, kappa: Any, frames: int, grid: int) -> Any:
    seeds = jax.nn.sigmoid(8 * (jnp.abs(blobs(key, n, grid=grid, count=6)) - 0.5))
    parameters = {"feed": feed, "kill": kill, "kappa": kappa}
    grown = evolve_gray_scott(1 - seeds / 2, seeds / 4, **parameters, frames=WARM_UP + frames)[:, WARM_UP:]
    shift, size = (jnp.asarray(z)[:, None, None] for z in (SHIFT, SIZE))
    return (grown - shift) / size


def simulate_wave(
    key: jax.Array, n: int, *, speed: Float[ArrayLike, "..."], frames: int = 24, grid: int = 32
) -> Float[Array, "n frames 2 X Y"]:
    """Waves from blobs at rest, exact: p_k(t) = p_k(0) cos(c |k| t); fields p and p_t.

    ``speed`` is c, (n,) or a number; the rest, and what is raised, is as in ``simulate_shear``.
    """
    _check("simulate_wave", n, frames, grid, {"speed": speed})
    kx, ky = wavenumbers(grid)
    frequency = (_column(speed, n)[..., None] * jnp.sqrt(kx**2 + ky**2))[:, None]
    p = jnp.fft.rfft2(blobs(key, n, grid=grid))[:, None]
    phase = frequency * INTERVAL * jnp.arange(frames)[:, None, None]
    shown = jnp.fft.irfft2(jnp.stack([p * jnp.cos(phase), -frequency * p * jnp.sin(phase)], 2), s=(grid, grid))
    return _sound("simulate_wave", shown, {"speed": speed})


def simulate_burgers(
    key: jax.Array, n: int, *, nu: Float[ArrayLike, "..."], frames: int = 24, grid: int = 32
) -> Float[Array, "n frames 2 X Y"]:
    """Burgers' equation from blobs of velocity; fields u and v.

    ``nu`` is (n,) or a number; below about 0.02 shocks are thinner than a 32-point grid. The rest, and what is raised,
    is as in ``simulate_shear``.
    """
    _check("simulate_burgers", n, frames, grid, {"nu": nu})
    kx, ky = wavenumbers(grid)
    kept = _dealias(grid)
    start = jnp.stack([blobs(stream(key, name), n, grid=grid) for name in ("u", "v")], 1)

    def real(z: jax.Array) -> jax.Array:
        return jnp.fft.irfft2(z, s=(grid, grid))

    def transport(state: jax.Array) -> jax.Array:
        u, v = real(state)[:, :1], real(state)[:, 1:]
        return -jnp.fft.rfft2(u * real(1j * kx * state) + v * real(1j * ky * state)) * kept

    damping = (_column(nu, n) * jnp.ones((1, 2)))[..., None, None] * (kx**2 + ky**2)
    shown = _integrate(jnp.fft.rfft2(start) * kept, transport, damping, real, frames)
    return _sound("simulate_burgers", shown, {"nu": nu}, courant=INTERVAL / SUBSTEPS * grid / (2 * np.pi))


def _integrate(
    state: jax.Array,
    rate: Callable[[jax.Array], jax.Array],
    damping: jax.Array,
    show: Callable[[jax.Array], jax.Array],
    frames: int,
) -> jax.Array:
    """z_t = rate(z) - damping z by the midpoint rule with an integrating factor; shown every ``SUBSTEPS`` steps."""
    dt = INTERVAL / SUBSTEPS
    half = jnp.exp(-damping * dt / 2)

    def step(z: jax.Array, _: None) -> tuple[jax.Array, None]:
        middle = half * (z + dt / 2 * rate(z))
        return half**2 * z + dt * half * rate(middle), None

    def frame(z: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return jax.lax.scan(step, z, None, length=SUBSTEPS)[0], show(z)

    return jnp.moveaxis(jax.lax.scan(frame, state, None, length=frames)[1], 0, 1)


def _dealias(grid: int) -> jax.Array:
    kx, ky = wavenumbers(grid)
    return (jnp.abs(kx) < grid / 3) & (ky < grid / 3)


def _column(values: Any, n: int) -> jax.Array:
    """(n, 1) of one number or (n,)."""
    return jnp.broadcast_to(jnp.asarray(values, jnp.float32), (n,))[:, None]


def _traced(values: Any) -> bool:
    return isinstance(values, jax.core.Tracer)


def _check(name: str, n: int, frames: int, grid: int, given: dict[str, Any]) -> None:
    if min(n, frames) < 1 or grid < 4 or grid % 2:
        raise ValueError(f"{name}: n and frames must be at least 1, grid even and >= 4; got {n}, {frames}, {grid}.")
    for what, values in given.items():
        if np.shape(values) not in ((), (n,)):
            raise ValueError(f"{name}: {what} must be a number or ({n},), got shape {np.shape(values)}.")
        if not _traced(values) and not (np.isfinite(np.asarray(values)) & (np.asarray(values) >= 0)).all():
            raise ValueError(f"{name}: {what} must be finite and not negative, got {values}.")


def _sound(name: str, shown: jax.Array, given: dict[str, Any], courant: float = 0.0) -> jax.Array:
    """The frames, if they are finite and, with ``courant`` = dt / dx, no velocity (the first two fields) is too large.

    Raises:
      FloatingPointError: naming the first run that is not, with its parameters.
    """
    if _traced(shown):
        return shown
    largest = np.abs(np.asarray(shown)).max((1, 3, 4))
    bad = ~np.isfinite(largest).all(1) | (courant * largest[:, :2].max(1) > 1)
    if bad.any():
        first = int(np.argmax(bad))
        values = {what: np.broadcast_to(x, (len(bad), *np.shape(x)[1:]))[first].tolist() for what, x in given.items()}
        raise FloatingPointError(
            f"{name}: run {first} of {len(bad)} blew up (Courant number above 1, or NaN): {values}."
        )
    return shown
