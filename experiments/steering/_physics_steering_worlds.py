"""The simulations of the experiment: for training, for tests, and the pairs that directions are read from.

All worlds share the fields ``FIELDS``, absent ones are zero and masked; with a base state speed is U in [0.8, 1.1] or
|c| in [0.4, 1.05], so that 0.6 and 1.5 times as much are still inside what the surrogate was trained on.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
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


def fill(shown: Any, family: str, families: tuple[str, ...]) -> np.ndarray:
    """A simulation's frames (..., f, X, Y) in the channels of all families, (..., F, X, Y)."""
    shown, names = np.asarray(shown), SLOTS[family]
    zero = np.zeros_like(shown[..., 0, :, :])
    return np.stack([shown[..., names.index(f), :, :] if f in names else zero for f in fields_of(families)], -3)


class Runs(NamedTuple):
    """Simulations of one family: frames (n, T, F, X, Y), velocity (n, 2) ((1, 0) but for advect), nu and D (n,)."""

    frames: np.ndarray
    velocity: np.ndarray
    nu: np.ndarray
    diffusivity: np.ndarray

    def rows(self, keep: Any) -> Runs:
        """Some of the runs."""
        return Runs(*(x[keep] for x in self))


def simulate(
    key: jax.Array, family: str, n: int, frames: int, config: Any, *, base: bool = False, **fixed: float
) -> Runs:
    """Runs with parameters drawn over the range of training or, with ``base``, of base states; ``fixed`` sets some.

    ``fixed``: ``diffusivity`` (also nu), ``amplitude``, and ``speed`` as a factor.
    """
    # Seven uniform numbers a run, turned into parameters by NumPy: nothing of that need be compiled.
    drawn = np.asarray(jax.random.uniform(stream(key, "parameters"), (7, n)))

    def uniform(i: int, low: float, high: float) -> np.ndarray:
        return (low + (high - low) * drawn[i]).astype(np.float32)

    def log_uniform(i: int, low: float, high: float) -> np.ndarray:
        return np.exp(uniform(i, np.log(low), np.log(high)))

    nu, d, amplitude = log_uniform(0, 2e-3, 5e-2), log_uniform(1, 2e-3, 5e-2), log_uniform(2, 3e-3, 1.0)
    if "diffusivity" in fixed:
        nu = d = np.full(n, fixed["diffusivity"], np.float32)
    if "amplitude" in fixed:
        amplitude = np.full(n, fixed["amplitude"], np.float32)
    ahead = np.tile(np.asarray([1, 0], np.float32), (n, 1))
    state, sizes = stream(key, "state"), {"frames": frames, "grid": config.grid}
    if family == "shear":
        speed = fixed.get("speed", 1.0) * uniform(3, *((0.8, 1.1) if base else (0.6, 1.6)))
        shown = flows.simulate_shear(state, n, nu=nu, diffusivity=d, amplitude=amplitude, speed=speed, **sizes)
    elif family == "advect":
        speed = fixed.get("speed", 1.0) * uniform(3, *((0.4, 1.05) if base else (0.2, 1.6)))
        angle = uniform(4, 0, 2 * np.pi)
        ahead = speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
        shown = flows.simulate_advect(state, n, velocity=ahead, diffusivity=d, **sizes)
    elif family == "gray_scott":
        feed, kill = uniform(5, 0.014, 0.05), uniform(6, 0.05, 0.063)
        shown = flows.simulate_gray_scott(state, n, feed=feed, kill=kill, **sizes)
    elif family == "wave":
        shown = flows.simulate_wave(state, n, speed=uniform(3, 0.5, 1.5), **sizes)
    else:
        shown = flows.simulate_burgers(state, n, nu=log_uniform(0, 0.03, 0.2), **sizes)
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
    frames: np.ndarray
    mask: np.ndarray
    velocity: np.ndarray
    truth: Any = None
    other: Any = None

    def rows(self, keep: Any) -> States:
        """Some of the states."""
        return States(
            self.family[keep],
            self.frames[keep],
            self.mask[keep],
            self.velocity[keep],
            None if self.truth is None else self.truth[keep],
            None if self.other is None else self.other[:, keep],
        )


def states(key: jax.Array, family: str, n: int, horizon: int, config: Any) -> States:
    """Base states and, for the controls, the ``horizon`` frames after them, at their own and both other speeds."""
    h = config.history
    runs = simulate(key, family, n, h + config.branch, config, base=True)
    frames = runs.frames[:, -h:]
    mask = np.tile(mask_of(family, config.families), (n, 1))
    names = np.full(n, family)
    if family not in ("shear", "advect") or not config.controls:
        return States(names, frames, mask, runs.velocity)
    factors = np.repeat(np.asarray([1, FAST, SLOW], np.float32), n)
    last, nu, d = (np.concatenate([x] * 3) for x in (frames[:, -1], runs.nu, runs.diffusivity))
    after = go_on(last, factors, nu, d, family, config.families, horizon + 1)[:, 1:]
    after = after.reshape(3, n, *after.shape[1:])
    return States(names, frames, mask, runs.velocity, after[0], after[1:])


def go_on(
    last: np.ndarray,
    factor: np.ndarray,
    nu: np.ndarray,
    diffusivity: np.ndarray,
    family: str,
    families: tuple[str, ...],
    frames: int,
) -> np.ndarray:
    """From one frame (n, F, X, Y) on, its velocity times ``factor`` (n,): (n, frames, F, X, Y), the first at time 0."""
    u, v, s = (last[:, fields_of(families).index(name)] for name in SLOTS[family])
    if family == "advect":
        c = factor[:, None] * np.stack([u, v], 1).mean((2, 3))
        shown = _advect(s, c, diffusivity, frames)
    else:
        shown = _shear(u, v, s, factor, nu, diffusivity, frames)
    return fill(shown, family, families)


@functools.partial(jax.jit, static_argnums=3)
def _advect(s: Any, c: Any, diffusivity: Any, frames: int) -> jax.Array:
    return flows.evolve_advect(s, c, diffusivity=diffusivity, frames=frames)


@functools.partial(jax.jit, static_argnums=6)
def _shear(u: Any, v: Any, s: Any, factor: Any, nu: Any, diffusivity: Any, frames: int) -> jax.Array:
    omega = factor[:, None, None] * flows.vorticity(u, v)
    return flows.evolve_shear(omega, s, nu=nu, diffusivity=diffusivity, frames=frames)


class Pair(NamedTuple):
    """Windows that show a feature and windows that do not, (draws, files, H, F, X, Y) each."""

    feature: np.ndarray
    control: np.ndarray


def matched_pairs(key: jax.Array, family: str, config: Any) -> dict[str, Pair]:
    """The directions' data: the same states in both sets, one parameter changed, the first H frames after that.

    Speed and diffusion branch off base runs at a random frame; vorticity is another amplitude at the start.
    """
    h, n = config.history, config.draws * config.pairs
    runs = simulate(stream(key, "base"), family, n, config.latest + 1, config, base=True)
    at = np.asarray(jax.random.randint(stream(key, "branch"), (n,), 0, config.latest + 1))
    last, same = runs.frames[np.arange(n), at], np.ones(n, np.float32)
    changes = {
        f"{family}_speed": [(last, x * same, runs.nu, runs.diffusivity) for x in (FAST, SLOW)],
        f"{family}_diffusion": [(last, same, x * same, x * same) for x in (THICK, THIN)],
    }
    wanted = [name for name in changes if name in config.directions]
    given = [np.concatenate(column) for column in zip(*(one for name in wanted for one in changes[name]), strict=True)]
    found: dict[str, Pair] = {}
    if wanted:
        after = go_on(given[0], given[1], given[2], given[3], family, config.families, h)
        sets = after.reshape(len(wanted), 2, config.draws, config.pairs, *after.shape[1:])
        found = {name: Pair(*both) for name, both in zip(wanted, sets, strict=True)}
    if f"{family}_vorticity" in config.directions:
        start = stream(key, "vorticity")
        found["shear_vorticity"] = Pair(
            *(
                _by_draw(simulate(start, family, n, h, config, base=True, amplitude=a).frames, config)
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

    def windows(key: jax.Array, what: str, value: float) -> np.ndarray:
        runs = simulate(key, family, n, UNMATCHED_FRAMES, config, base=True, **{what: value})
        start = np.asarray(jax.random.randint(stream(key, "start"), (n, 1), 0, UNMATCHED_FRAMES - h + 1))
        return _by_draw(runs.frames[np.arange(n)[:, None], start + np.arange(h)], config)

    return {
        name: Pair(windows(stream(key, name, "F"), what, high), windows(stream(key, name, "G"), what, low))
        for name, (what, high, low) in regimes.items()
        if name in config.directions
    }


def _by_draw(frames: np.ndarray, config: Any) -> np.ndarray:
    return frames.reshape(config.draws, config.pairs, *frames.shape[1:])
