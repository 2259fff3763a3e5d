"""The simulations of the experiment: for training, for tests, and the pairs that directions are read from.

All worlds share the fields ``FIELDS``, absent ones are zero and masked; with a base state speed is U in [0.8, 1.1] or
|c| in [0.4, 1.05], so that 0.6 and 1.5 times as much are still inside what the surrogate was trained on.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.rng import stream
from mechlab.data.worlds import flows

SLOTS = {
    "shear": ("u", "v", "s"),
    "advect": ("u", "v", "s"),
    "gray_scott": ("U", "V"),
    "wave": ("p", "p_t"),
    "burgers": ("u", "v"),
}
DIRECTIONS = ("shear_vorticity", "shear_speed", "shear_diffusion", "advect_speed", "advect_diffusion")
MAIN = ("shear_vorticity", "shear_speed", "advect_speed")
"""Those that all controls are made for."""
FAST, SLOW = 1.5, 0.6
THICK, THIN = 0.05, 0.003
WAVY, LAMINAR = 1.0, 0.003
UNMATCHED_FRAMES = 16


def fields_of(families: tuple[str, ...]) -> tuple[str, ...]:
    """The fields of all families together, each once; their places are the channels."""
    return tuple(dict.fromkeys(name for family in families for name in SLOTS[family]))


def mask_of(family: str, families: tuple[str, ...]) -> np.ndarray:
    """(F,) 1 where the family has the field."""
    return np.asarray([float(name in SLOTS[family]) for name in fields_of(families)], np.float32)


def fill(shown: Any, family: str, families: tuple[str, ...]) -> jax.Array:
    """A simulation's frames (..., f, X, Y) in the channels of all families, (..., F, X, Y)."""
    shown = jnp.asarray(shown)
    names = SLOTS[family]
    zero = jnp.zeros_like(shown[..., 0, :, :])
    return jnp.stack([shown[..., names.index(f), :, :] if f in names else zero for f in fields_of(families)], -3)


class Runs(NamedTuple):
    """Simulations of one family: frames (n, T, F, X, Y), velocity (n, 2) ((1, 0) but for advect), nu and D (n,)."""

    frames: jax.Array
    velocity: jax.Array
    nu: jax.Array
    diffusivity: jax.Array


def simulate(
    key: jax.Array, family: str, n: int, frames: int, config: Any, *, base: bool = False, **fixed: Any
) -> Runs:
    """Runs with parameters drawn over the range of training or, with ``base``, of base states; ``fixed`` sets some.

    ``fixed``: ``diffusivity`` (also nu), ``amplitude``, ``speed`` as a factor, each a number.
    """
    nu, d, a = (_log_uniform(stream(key, name), n, low, high) for name, low, high in _RANGES)
    if "diffusivity" in fixed:
        nu = d = jnp.full(n, fixed["diffusivity"])
    a = jnp.full(n, fixed["amplitude"]) if "amplitude" in fixed else a
    factor = fixed.get("speed", 1.0)
    ahead = jnp.broadcast_to(jnp.asarray([1.0, 0.0]), (n, 2))
    state, grid = stream(key, "state"), config.grid
    if family == "shear":
        speed = _uniform(stream(key, "speed"), n, *((0.8, 1.1) if base else (0.6, 1.6)))
        shown = flows.simulate_shear(
            state, n, nu=nu, diffusivity=d, amplitude=a, speed=factor * speed, frames=frames, grid=grid
        )
    elif family == "advect":
        speed = _uniform(stream(key, "speed"), n, *((0.4, 1.05) if base else (0.2, 1.6)))
        angle = _uniform(stream(key, "angle"), n, 0, 2 * np.pi)
        ahead = factor * speed[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)
        shown = flows.simulate_advect(state, n, velocity=ahead, diffusivity=d, frames=frames, grid=grid)
    elif family == "gray_scott":
        feed = _uniform(stream(key, "feed"), n, 0.014, 0.05)
        kill = _uniform(stream(key, "kill"), n, 0.05, 0.063)
        shown = flows.simulate_gray_scott(state, n, feed=feed, kill=kill, frames=frames, grid=grid)
    elif family == "wave":
        speed = _uniform(stream(key, "speed"), n, 0.5, 1.5)
        shown = flows.simulate_wave(state, n, speed=speed, frames=frames, grid=grid)
    else:
        thick = _log_uniform(stream(key, "thick"), n, 0.03, 0.2)
        shown = flows.simulate_burgers(state, n, nu=thick, frames=frames, grid=grid)
    return Runs(fill(shown, family, config.families), ahead, nu, d)


class States(NamedTuple):
    """States that a roll-out starts from: the last H true frames of some runs.

    Attributes:
      family: of each, (n,) str.
      frames, mask: (n, H, F, X, Y) and (n, F).
      velocity: (n, 2).
      truth: how the simulation goes on, (n, T, F, X, Y), where it was asked for.
      other: the same from the same last frame at FAST and at SLOW times the speed, (2, n, T, F, X, Y).
    """

    family: np.ndarray
    frames: jax.Array
    mask: jax.Array
    velocity: jax.Array
    truth: Any = None
    other: Any = None

    def rows(self, keep: Any) -> States:
        """Some of the states."""
        return States(
            self.family[keep],
            *(x[keep] for x in (self.frames, self.mask, self.velocity)),
            None if self.truth is None else self.truth[keep],
            None if self.other is None else self.other[:, keep],
        )


def states(key: jax.Array, family: str, n: int, horizon: int, config: Any) -> States:
    """Base states, and how they go on for ``horizon`` frames, at their own and at both other speeds."""
    h = config.history
    runs = simulate(key, family, n, h + config.branch, config, base=True)
    frames = runs.frames[:, -h:]
    mask = jnp.broadcast_to(jnp.asarray(mask_of(family, config.families)), (n, frames.shape[2]))
    names = np.full(n, family)
    if family not in ("shear", "advect"):
        return States(names, frames, mask, runs.velocity)
    factors = jnp.repeat(jnp.asarray([1.0, FAST, SLOW]), n)
    last, nu, d = (jnp.concatenate([x] * 3) for x in (frames[:, -1], runs.nu, runs.diffusivity))
    after = go_on(last, factors, nu, d, family, config.families, horizon + 1)[:, 1:]
    after = after.reshape(3, n, *after.shape[1:])
    return States(names, frames, mask, runs.velocity, after[0], after[1:])


@functools.partial(jax.jit, static_argnames=("family", "families", "frames"))
def go_on(
    last: jax.Array,
    factor: jax.Array,
    nu: jax.Array,
    diffusivity: jax.Array,
    family: str,
    families: tuple[str, ...],
    frames: int,
) -> jax.Array:
    """From one frame (n, F, X, Y) on, its velocity times ``factor`` (n,): (n, frames, F, X, Y), the first at time 0."""
    places = [fields_of(families).index(name) for name in SLOTS[family]]
    u, v, s = (last[:, place] for place in places)
    if family == "advect":
        c = factor[:, None] * jnp.stack([u, v], 1).mean((2, 3))
        shown = flows.evolve_advect(s, c, diffusivity=diffusivity, frames=frames)
    else:
        omega = factor[:, None, None] * flows.vorticity(u, v)
        shown = flows.evolve_shear(omega, s, nu=nu, diffusivity=diffusivity, frames=frames)
    return fill(shown, family, families)


class Pair(NamedTuple):
    """Windows that show a feature and windows that do not, (draws, files, H, F, X, Y) each."""

    feature: jax.Array
    control: jax.Array


def matched_pairs(key: jax.Array, family: str, config: Any) -> dict[str, Pair]:
    """The directions' data: the same states in both sets, one parameter changed, the first H frames after that.

    Speed and diffusion branch off base runs at a random frame; vorticity is another amplitude at the start.
    """
    h, n = config.history, config.draws * config.pairs
    runs = simulate(stream(key, "base"), family, n, config.latest + 1, config, base=True)
    at = jax.random.randint(stream(key, "branch"), (n,), 0, config.latest + 1)
    last = jnp.concatenate([runs.frames[jnp.arange(n), at]] * 4)
    nu, d = (jnp.concatenate([x, x, *(jnp.full(n, y) for y in (THICK, THIN))]) for x in (runs.nu, runs.diffusivity))
    factor = jnp.repeat(jnp.asarray([FAST, SLOW, 1.0, 1.0]), n)
    after = go_on(last, factor, nu, d, family, config.families, h)
    fast, slow, thick, thin = after.reshape(4, config.draws, config.pairs, *after.shape[1:])
    found = {f"{family}_speed": Pair(fast, slow), f"{family}_diffusion": Pair(thick, thin)}
    if family == "shear":
        same = stream(key, "vorticity")
        found["shear_vorticity"] = Pair(
            *(
                _by_draw(simulate(same, family, n, h, config, base=True, amplitude=a).frames, config)
                for a in (WAVY, LAMINAR)
            )
        )
    return found


def unmatched_pairs(key: jax.Array, family: str, config: Any) -> dict[str, Pair]:
    """As the paper does: windows of whole simulations of two regimes, from states of their own."""
    regimes: dict[str, tuple[str, float, float]] = {
        f"{family}_speed": ("speed", FAST, SLOW),
        f"{family}_diffusion": ("diffusivity", THICK, THIN),
    }
    if family == "shear":
        regimes["shear_vorticity"] = ("amplitude", WAVY, LAMINAR)
    h, n = config.history, config.draws * config.pairs

    def windows(key: jax.Array, what: str, value: float) -> jax.Array:
        runs = simulate(key, family, n, UNMATCHED_FRAMES, config, base=True, **{what: value})
        start = jax.random.randint(stream(key, "start"), (n, 1), 0, UNMATCHED_FRAMES - h + 1)
        return _by_draw(runs.frames[jnp.arange(n)[:, None], start + jnp.arange(h)], config)

    return {
        name: Pair(windows(stream(key, name, "F"), what, high), windows(stream(key, name, "G"), what, low))
        for name, (what, high, low) in regimes.items()
    }


def _by_draw(frames: jax.Array, config: Any) -> jax.Array:
    return frames.reshape(config.draws, config.pairs, *frames.shape[1:])


_RANGES = (("nu", 2e-3, 5e-2), ("diffusivity", 2e-3, 5e-2), ("amplitude", 3e-3, 1.0))


def _uniform(key: jax.Array, n: int, low: float, high: float) -> jax.Array:
    return jax.random.uniform(key, (n,), minval=low, maxval=high)


def _log_uniform(key: jax.Array, n: int, low: float, high: float) -> jax.Array:
    return jnp.exp(_uniform(key, n, float(np.log(low)), float(np.log(high))))
