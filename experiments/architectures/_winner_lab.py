"""The WINNER experiment's workshop: targets, the networks that are compared, and how they are trained."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mechlab.analysis.spectra import band_power
from mechlab.core.rng import stream
from mechlab.data import pictures, signals
from mechlab.data.images import load_images
from mechlab.data.sources import MissingData
from mechlab.methods.architectures import winner
from mechlab.models import implicit
from mechlab.reporting.log import Log
from mechlab.training.batches import shuffled, whole
from mechlab.training.loop import Job, fit_many

if TYPE_CHECKING:
    from experiments.architectures.winner import Config

SIGNALS: Mapping[str, Callable[[jax.Array, int], jax.Array]] = {
    "high": functools.partial(signals.band, low=0.2, high=0.5),
    "mid": functools.partial(signals.band, low=0.05, high=0.3),
    "low": functools.partial(signals.band, low=0.0, high=0.01),
    "pink": signals.pink,
    "white": signals.white,
    "chirp": signals.chirp,
    "impulses": signals.impulses,
    "recording": signals.recording,
}
PICTURES = ("noise", "band", "rings", "mnist", "photograph")
SIREN_OMEGA, PAPER_AUDIO_OMEGA = 30.0, 3000.0
EDGES = tuple(np.linspace(0, 0.5, 17).tolist())
"""Bands in which the error of a signal is followed over training."""
BATCH_LIMIT = 65_536
"""Largest batch of the networks in ``BATCHED`` (the paper's), above it they see random parts."""
BATCHED = ("gauss", "wire", "relu")
DECAY_EVERY, SIGNAL_DECAY, PICTURE_DECAY = 20, 0.99, 0.998
"""The learning rate is multiplied by the decay every 20 steps (the released scripts)."""


class Target(NamedTuple):
    """What is fitted, one draw per seed: y (S, N, C) at the places of a grid."""

    shape: tuple[int, ...]
    y: jax.Array
    value_range: float


class Arm(NamedTuple):
    """A network with its start. Arms with the same ``apply`` are trained in one program."""

    init: Callable[[jax.Array, jax.Array], Any]  # (key, target (*spatial, C)) -> params
    apply: Callable[[Any, jax.Array, Any], jax.Array]  # (params, x, omega of the first layer) -> y
    omega: float = SIREN_OMEGA


class Trained(NamedTuple):
    """Training of one arm on one target; arrays are (S, ...), or (lanes, ...) where lanes are not yet told apart.

    Attributes:
      losses: (S, steps) MSE before every update.
      output: (S, N, C) after the last.
      params: after the last.
      kept: what the judge kept of every step, (S, steps, ...).
    """

    losses: np.ndarray
    output: np.ndarray
    params: Any
    kept: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Lab:
    """What all trainings share."""

    config: Config
    log: Log
    keys: jax.Array  # (S,)
    first: jax.Array  # of the first seed; the checker of key reuse lets a key be cut out of an array only once


def make_signals(lab: Lab, names: Iterable[str], samples: int) -> dict[str, Target]:
    """Signals by name, a new draw for every seed."""
    return {
        name: Target((samples,), jax.vmap(lambda k, n=name: SIGNALS[n](stream(k, "target", n), samples))(lab.keys), 2.0)
        for name in names
    }


def make_sounds(lab: Lab, folder: Path, samples: int) -> dict[str, Target]:
    """Every .wav file of a folder as a signal, the same for every seed, by the file's stem."""
    read = {path.stem: signals.read_sound(path, samples) for path in sorted(folder.glob("*.wav"))}
    return {name: Target((samples,), jnp.stack([y] * len(lab.keys)), 2.0) for name, y in read.items()}


def make_pictures(lab: Lab, names: Iterable[str], size: int) -> dict[str, Target]:
    """Pictures by name; a real one is the same for every seed, and is left out, with a word, where it is not here."""
    drawn: dict[str, Callable[[jax.Array], jax.Array]] = {
        "noise": lambda k: pictures.white_picture(k, size),
        "band": lambda k: pictures.band_picture(k, size, 0.1, 0.35),
        "rings": lambda k: pictures.zone_plate(size),
        "mnist": lambda k: pictures.mosaic(load_images("auto").train_x, size),
        "photograph": lambda k: pictures.photograph("china", size),
    }
    targets = {}
    for name in names:
        try:
            every = [drawn[name](stream(k, "target", name)) for k in lab.keys]
        except MissingData as missing:
            lab.log.say(f"left out: {missing}")
            continue
        targets[name] = Target((size, size), jnp.stack(every).reshape(len(every), -1, 1), 1.0)
    return targets


def make_arms(hidden: tuple[int, ...], shape: tuple[int, ...]) -> dict[str, Arm]:
    """Every network for targets of a shape. The SIRENs and WINNERs of one seed share their start, but for the noise."""
    widths = (len(shape), *hidden, 1)
    samples = max(shape)

    def siren(key: jax.Array, target: jax.Array) -> Any:
        return implicit.siren_init(stream(key, "siren"), widths)

    def scaled(key: jax.Array, target: jax.Array) -> Any:
        rule = winner.AUDIO.for_length(samples)
        scales = winner.winner_scales(winner.spectral_centroid(target), 1, rule)
        return winner.winner_init(key, widths, target, scales=scales)

    def plain(init: Callable[..., Any], apply: Callable[..., jax.Array], **options: Any) -> Arm:
        return Arm(lambda key, target: init(key, widths, **options), lambda params, x, omega: apply(params, x))

    scaled_omega = PAPER_AUDIO_OMEGA * samples / winner.AUDIO_SAMPLES
    return {
        "siren": Arm(siren, siren_with_omega),
        "siren_scaled": Arm(siren, siren_with_omega, scaled_omega),
        "siren_3000": Arm(siren, siren_with_omega, PAPER_AUDIO_OMEGA),
        "winner": Arm(lambda key, target: winner.winner_init(key, widths, target), siren_with_omega),
        "winner_scaled": Arm(scaled, siren_with_omega),
        "finer": plain(implicit.finer_init, implicit.finer_apply),
        "finerpp": plain(implicit.finerpp_init, implicit.finer_apply),
        "gauss": plain(implicit.gauss_init, implicit.gauss_apply),
        "wire": plain(implicit.wire_init, implicit.wire_apply),
        "relu": plain(implicit.relu_init, implicit.relu_apply, octaves=implicit.octaves(samples)),
        "rff": plain(implicit.rff_init, implicit.rff_apply),
    }


def siren_with_omega(params: Any, x: jax.Array, omega: Any) -> jax.Array:
    """SIREN with the omega of its first layer as an argument of its own, so that it can differ from lane to lane."""
    return implicit.siren_apply(params, x, omega_first=omega)


Judge = Callable[[jax.Array, dict[str, jax.Array]], tuple[jax.Array, dict[str, jax.Array]]]
"""``judge(output, batch) -> (loss, numbers to keep of every step)``."""


def fit_error(output: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean squared error."""
    return jnp.square(output - batch["y"]).mean(), {}


def banded_error(output: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The same, keeping the error's power in every band of ``EDGES``."""
    error = output - batch["y"]
    return jnp.square(error).mean(), {"bands": band_power(error[:, 0], EDGES)}


def noisy_error(output: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean squared error over samples that are not held out, keeping the whole output of every step."""
    kept = ~batch["held"]
    return (jnp.square(output - batch["y"])[:, 0] * kept).sum() / kept.sum(), {"output": output[:, 0]}


def train(
    lab: Lab,
    name: str,
    arms: Mapping[str, Arm],
    targets: Mapping[str, Target],
    *,
    steps: int,
    decay: float,
    judge: Judge = fit_error,
    extra: Mapping[str, jax.Array] | None = None,
) -> dict[tuple[str, str], Trained]:
    """Train every arm on every target, all seeds: one program per kind of network.

    Args:
      lab: configuration, log and keys.
      name: of this training in the log.
      arms: by name.
      targets: by name, all of one shape.
      steps: updates, each of all samples.
      decay: the learning rate is multiplied by this every 20 updates.
      judge: the loss.
      extra: (S, N, ...) by name: what else the judge needs in its batch.

    Returns:
      By (target, arm).
    """
    shape = next(iter(targets.values())).shape
    x = implicit.coordinates(shape)
    programs: dict[Any, list[tuple[str, str]]] = {}
    for target in targets:
        for arm in arms:
            programs.setdefault(arms[arm].apply, []).append((target, arm))
    results: dict[tuple[str, str], Trained] = {}
    for apply, cells in programs.items():
        lanes = [lanes_of(lab, arms[arm], targets[target], extra or {}) for target, arm in cells]
        stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *lanes)
        kind = cells[0][1]
        in_parts = kind in BATCHED and len(x) > BATCH_LIMIT
        # The spectrum of an error needs all samples in order.
        its_judge, limit = (fit_error, BATCH_LIMIT) if in_parts else (judge, None)
        every = train_lanes(lab, f"{name}-{kind}", apply, stacked, x, steps, decay, its_judge, limit)
        for i, cell in enumerate(cells):
            part = slice(i * len(lab.keys), (i + 1) * len(lab.keys))
            results[cell] = jax.tree.map(lambda leaf, part=part: leaf[part], every)
    return results


def lanes_of(lab: Lab, arm: Arm, target: Target, extra: Mapping[str, jax.Array]) -> dict[str, Any]:
    """One lane per seed: the start, omega, and what is fitted."""

    def start(key: jax.Array, y: jax.Array) -> Any:
        return arm.init(stream(key, "start"), y.reshape(*target.shape, -1))

    params = jax.jit(jax.vmap(start))(lab.keys, target.y)
    omega = jnp.full(len(lab.keys), arm.omega)
    return {"params": params, "omega": omega, "data": {"y": target.y, **extra}}


def train_lanes(
    lab: Lab,
    name: str,
    apply: Callable[..., jax.Array],
    lanes: dict[str, Any],
    x: jax.Array,
    steps: int,
    decay: float,
    judge: Judge = fit_error,
    limit: int | None = None,
) -> Trained:
    """Train lanes in one program, at most ``config.lanes_at_once`` of them together; every array is (lanes, ...)."""
    rate = optax.exponential_decay(lab.config.rate, DECAY_EVERY, decay, staircase=True)

    def build(lane: Any) -> Job:
        def loss(params: Any, batch: Any) -> Any:
            return judge(apply(params, batch["x"], lane["omega"]), batch)

        data = {"x": x, **lane["data"]}
        batches = whole(data) if limit is None else shuffled(data, limit)
        return Job(loss, lane["params"], optax.adam(rate), batches)

    outputs = jax.jit(jax.vmap(lambda params, omega: apply(params, x, omega)))
    count = len(lanes["omega"])
    order = jax.vmap(lambda i: stream(lab.first, name, i))(jnp.arange(count))
    parts = []
    for first in range(0, count, lab.config.lanes_at_once):
        part = slice(first, first + lab.config.lanes_at_once)
        some = jax.tree.map(lambda leaf, part=part: leaf[part], lanes)
        fit = fit_many(order[part], some, build, steps=steps, log=lab.log, name=f"{name}-{first}")
        output = outputs(fit.params, some["omega"])
        parts.append(Trained(*jax.device_get((fit.losses, output, fit.params, fit.aux))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
