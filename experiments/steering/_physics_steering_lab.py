"""Training the surrogate, reading directions from it, and steered roll-outs: what is measured, before it is a metric.

Roll-outs are rows of (direction, layer, alpha, state). One compiled program makes a chunk of rows, whatever they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.steering import _physics_steering_worlds as worlds
from mechlab.core.edits import AddRelative, at
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.data.worlds.flows import INTERVAL
from mechlab.methods.steering import physics_steering as ps
from mechlab.models.surrogate import SurrogateConfig, surrogate
from mechlab.reporting.log import Log
from mechlab.training.batches import generated, numbered
from mechlab.training.loop import Job, fit_many

WARM_UP = 50
FLOOR = 1e-4
CHUNK = 16


def train(key: jax.Array, kind: str, data: Mapping[str, worlds.Runs], config: Any, log: Log) -> tuple[Model, Any]:
    """One surrogate of ``kind`` for all families, ``config.models`` seeds of it.

    Loss: squared error over increment energy + 1e-4, by field and sample. From the share ``config.second`` of training
    on, half of the same on a second predicted step is added.

    Returns:
      The model, and the parameters at ``config.checkpoints`` + 1 times, the first untrained, leaves (S, R + 1, ...).
    """
    frames = np.concatenate([runs.frames for runs in data.values()])
    mask = np.concatenate(
        [np.tile(worlds.mask_of(family, config.families), (len(runs.frames), 1)) for family, runs in data.items()]
    )
    # Absent fields are zero in all frames.
    energy = np.square(np.diff(frames, axis=1)).sum((0, 1, 3, 4))
    count = mask.sum(0) * (frames.shape[1] - 1) * config.grid**2
    scales = tuple(float(x) for x in np.round(np.sqrt(energy / count), 4))
    model = surrogate(
        SurrogateConfig(
            scales=scales,
            grid=config.grid,
            frames=config.history,
            layers=config.layers,
            width=config.width,
            modes=config.modes,
            heads=config.heads,
            kind=kind,  # type: ignore[arg-type]
        )
    )
    h, length = config.history, config.history + 2
    two_from = int(config.steps * config.second)

    def error(predicted: jax.Array, last: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
        size = jnp.square(target - last).mean((2, 3)) + FLOOR
        return (jnp.square(predicted - target).mean((2, 3)) / size * mask).sum() / mask.sum()

    def loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        true, mask = batch["frames"], batch["mask"]
        first = model.apply({"params": params}, true[:, :h], mask)
        found = error(first, true[:, h - 1], true[:, h], mask)
        if two_from >= config.steps:
            return found

        def second(_: None) -> jax.Array:
            window = jnp.concatenate([true[:, 1:h], first[:, None]], 1)
            return 0.5 * error(model.apply({"params": params}, window, mask), true[:, h], true[:, h + 1], mask)

        return found + jax.lax.cond(batch["step"] >= two_from, second, lambda _: jnp.zeros(()), None)

    def build(lane: Any) -> Job:
        def sample(key: jax.Array) -> dict[str, jax.Array]:
            runs, starts, shifts = (stream(key, name) for name in ("run", "start", "shift"))
            i = jax.random.randint(runs, (config.batch,), 0, len(lane["frames"]))
            start = jax.random.randint(starts, (config.batch, 1), 0, lane["frames"].shape[1] - length + 1)
            x, y = jax.random.randint(shifts, (2, config.batch, 1, 1), 0, config.grid)
            points = jnp.arange(config.grid)
            windows = lane["frames"][i[:, None], start + jnp.arange(length)]
            # A shift along both axes as one gather: the worlds look the same from everywhere.
            rolled = jax.vmap(lambda w, a, b: w[..., a, b])(
                windows, (points[:, None] + x) % config.grid, (points + y) % config.grid
            )
            return {"frames": rolled, "mask": lane["mask"][i]}

        schedule = optax.warmup_cosine_decay_schedule(
            0.0, config.rate, min(WARM_UP, config.steps // 2), config.steps, config.rate / 100
        )
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
        return Job(loss, lane["params"], optimiser, numbered(generated(sample)))

    keys = jax.vmap(lambda i: stream(key, i))(jnp.arange(config.models))
    # Data are a lane, not a constant: a program that holds them would take minutes to compile.
    lanes = {
        "params": jax.vmap(lambda k: model.init(stream(k, "init")))(keys),
        "frames": jnp.asarray(np.broadcast_to(frames, (config.models, *frames.shape))),
        "mask": jnp.asarray(np.broadcast_to(mask, (config.models, *mask.shape))),
    }
    trained = fit_many(
        jax.vmap(lambda k: stream(k, "batches"))(keys),
        lanes,
        build,
        steps=config.steps,
        segment=-(-config.steps // config.checkpoints),
        record=lambda params: params,
        log=log,
        name=kind,
    )
    return model, trained.records


class Read(NamedTuple):
    """What two sets of windows differ in: activations of every layer, the same with shuffled labels, and increments."""

    delta: jax.Array
    shuffled: jax.Array
    output: jax.Array


@functools.partial(jax.jit, static_argnames="model")
def read_directions(
    model: Model, params: Any, key: jax.Array, feature: jax.Array, control: jax.Array, mask: jax.Array
) -> Read:
    """Directions (L, 1, 1, C, X, Y, 1) from windows (files, H, F, X, Y) of one family, mask (F,)."""
    files = len(feature)
    frames = jnp.concatenate([feature, control])
    masks = jnp.broadcast_to(mask, (2 * files, len(mask)))
    acts = jnp.moveaxis(ps.record(model, params, frames, masks), 2, 1)[:, :, :, None]  # (L, files, T, 1, C, X, Y, 1)
    f, g = acts[:, :files], acts[:, files:]
    delta = jax.vmap(ps.concept_delta)(f, g)
    shuffled = jax.vmap(lambda a, b: ps.shuffled_delta(key, a, b))(f, g)
    increments = model.apply({"params": params}, frames, masks) - frames[:, -1]
    return Read(delta, shuffled, increments[:files].mean(0) - increments[files:].mean(0))


class Patch(NamedTuple):
    """A way to steer, to be tried at some strengths.

    Attributes:
      name, draw: what it is called, and which draw of direction data it comes from.
      delta: [1, 1, C, x, y, 1].
      layer, alphas: where and how strongly.
      fit: ``ps.fit_spatial``'s mode.
    """

    name: str
    draw: int
    delta: jax.Array
    layer: int
    alphas: Sequence[float]
    fit: ps.Mode = "drop"


Outcome = dict[str, dict[float, dict[str, np.ndarray]]]
"""By name, alpha and read-out: (draws, states)."""


def measure(
    model: Model, params: Any, patches: Sequence[Patch], start: worlds.States, config: Any, log: Log, name: str
) -> Outcome:
    """Roll out every patch at every strength from every state, ``config.horizon`` steps, and read the frames.

    Returns:
      For each patch's name and alpha the read-outs of ``read``, arrays (draws, states, ...), draws in order.
    """
    rows = [(p, alpha, s) for p, patch in enumerate(patches) for alpha in patch.alphas for s in range(len(start.mask))]
    values = np.stack([fitted(model, patch) for patch in patches])
    frames, mask, velocity = start.frames, start.mask, start.velocity
    found: list[dict[str, np.ndarray]] = []
    with log.track(name, len(rows)) as update:
        for first in range(0, len(rows), CHUNK):
            chunk = rows[first : first + CHUNK]
            full = chunk + [chunk[0]] * (CHUNK - len(chunk))  # one shape, one program
            p, strength, s = (np.asarray(column) for column in zip(*full, strict=True))
            layer, strength = np.asarray([patches[i].layer for i in p]), strength.astype(np.float32)
            out = roll(model, params, values[p], layer, strength, frames[s], mask[s], config.horizon)
            seen = read(frames[s, -1], out, velocity[s], worlds.fields_of(config.families))
            found.append({what: np.asarray(x)[: len(chunk)] for what, x in seen.items()})
            update(first + len(chunk))
    whole = {what: np.concatenate([one[what] for one in found]) for what in found[0]}
    outcome: Outcome = {}
    places = iter(np.split(np.arange(len(rows)), len(rows) // len(start.mask)))
    for patch in patches:
        for alpha in patch.alphas:
            at_rows = next(places)
            cell = outcome.setdefault(patch.name, {}).setdefault(alpha, {})
            for what, x in whole.items():
                new = x[at_rows][None]
                cell[what] = np.concatenate([cell[what], new]) if what in cell else new
    return outcome


def fitted(model: Model, patch: Patch) -> jax.Array:
    """The patch's direction in the spatial shape of the activations, [1, 1, C, X, Y, 1]."""
    _, _, *shape = site_shape(model)
    # Not the shape of one state: for T = B = 1 the official rule keeps space, whatever the mode.
    return ps.fit_spatial(patch.delta, (2, 2, *shape), patch.fit)


def site_shape(model: Model) -> tuple[int, ...]:
    """[1, 1, C, X, Y, 1] of an activation."""
    x, y, channels = model.sites[ps.SITE].value.shape[-3:]
    return (1, 1, channels, x, y, 1)


@functools.partial(jax.jit, static_argnames=("model", "steps"))
def roll(
    model: Model,
    params: Any,
    values: jax.Array,
    layer: jax.Array,
    alpha: jax.Array,
    frames: jax.Array,
    mask: jax.Array,
    steps: int,
) -> jax.Array:
    """Steered roll-outs of rows, (R, steps, F, X, Y): row r has a direction, layer, strength and state of its own."""

    def one(value: jax.Array, layer: jax.Array, alpha: jax.Array, frames: jax.Array, mask: jax.Array) -> jax.Array:
        sites = model.sites_for(frames[None], mask[None])
        edits = ps.relative_edits(sites, value, layer=layer, alpha=alpha, mode="none")
        return ps.rollout(model, params, frames[None], mask[None], steps, edits)[:, 0]

    return jax.vmap(one)(values, layer, alpha, frames, mask)


@functools.partial(jax.jit, static_argnames=("model", "steps"))
def roll_output(
    model: Model, params: Any, patch: jax.Array, alpha: jax.Array, frames: jax.Array, mask: jax.Array, steps: int
) -> jax.Array:
    """The control in output space: a patch (F, X, Y) on the predicted increment, alpha times its length."""
    sites = model.sites_for(frames, mask)
    edits = at(sites, "increment", AddRelative(jnp.moveaxis(patch, 0, -1), alpha))
    return jnp.moveaxis(ps.rollout(model, params, frames, mask, steps, edits), 0, 1)


@functools.partial(jax.jit, static_argnames="fields")
def read(last: jax.Array, out: jax.Array, velocity: jax.Array, fields: tuple[str, ...]) -> dict[str, jax.Array]:
    """Read-outs of roll-outs (R, T, F, X, Y) from last frames (R, F, X, Y), each (R,) unless it says otherwise.

    ev, enstrophy, rough: of u, v and s at the end. d_eff, c_eff: mean over steps, of s. tracer: s at the end, (R,
    X, Y). rough_V: of V at the end, where there is one.
    """
    u, v, s = (fields.index(name) for name in ("u", "v", "s"))
    path = jnp.concatenate([last[:, None, s], out[:, :, s]], 1)
    found = {
        "ev": ps.cross_stream_energy(out[:, -1, v]),
        "enstrophy": ps.enstrophy(out[:, -1, u], out[:, -1, v]),
        "rough": ps.roughness(out[:, -1, s]),
        "d_eff": ps.effective_diffusivity(path[:, :-1], path[:, 1:], INTERVAL).mean(1),
        "c_eff": ps.effective_speed(path[:, :-1], path[:, 1:], velocity[:, None], INTERVAL).mean(1),
        "tracer": out[:, -1, s],
    }
    return found | ({"rough_V": ps.roughness(out[:, -1, fields.index("V")])} if "V" in fields else {})


def competence(
    model: Model, params: Any, runs: Mapping[str, worlds.Runs], config: Any, windows: int = 2 * CHUNK
) -> dict[str, float]:
    """Squared error over that of persistence on held-out windows, after one step and after six, by step and family."""
    found = {}
    h, steps = config.history, config.horizon
    values, zeros = np.ones((CHUNK, *site_shape(model)), np.float32), np.zeros(CHUNK, np.int32)
    for family, held in runs.items():
        # Windows from early, middle and late in a run.
        starts = np.linspace(0, held.frames.shape[1] - h - steps, windows).astype(int)
        which = np.arange(windows) % len(held.frames)
        true = held.frames[which[:, None], starts[:, None] + np.arange(h + steps)]
        mask = np.tile(worlds.mask_of(family, config.families), (CHUNK, 1))
        chunks = [true[first : first + CHUNK] for first in range(0, windows, CHUNK)]
        strength = np.zeros(CHUNK, np.float32)
        out = np.concatenate([roll(model, params, values, zeros, strength, x[:, :h], mask, steps) for x in chunks])
        for name, step in (("one", 0), ("six", min(5, steps - 1))):
            error, still = (np.square(x - true[:, h + step]).sum() for x in (out[:, step], true[:, h - 1]))
            found[f"{name}/{family}"] = float(error / still)
    return found


def film(
    model: Model, params: Any, delta: jax.Array, layer: int, alphas: Sequence[float], start: worlds.States, config: Any
) -> np.ndarray:
    """Long roll-outs with mode ``drop``, (A, n, 1 + film_steps, F, X, Y), the first frame being the last true one.

    Each is put together from roll-outs of ``config.horizon`` steps: the same program as the measurements.
    """
    n = len(start.mask)
    value = np.asarray(fitted(model, Patch("", 0, delta, layer, alphas)))
    values, layers = np.broadcast_to(value, (CHUNK, *value.shape)), np.full(CHUNK, layer)
    index = [(a, s) for a in range(len(alphas)) for s in range(n)]
    done = []
    for first in range(0, len(index), CHUNK):
        chunk = index[first : first + CHUNK]
        full = chunk + [chunk[0]] * (CHUNK - len(chunk))
        a, s = (np.asarray(column) for column in zip(*full, strict=True))
        window, shown = start.frames[s], [start.frames[s, -1:]]
        strength = np.asarray(alphas, np.float32)[a]
        for _ in range(-(-config.film_steps // config.horizon)):
            out = np.asarray(roll(model, params, values, layers, strength, window, start.mask[s], config.horizon))
            shown.append(out)
            window = np.concatenate([window, out], 1)[:, -config.history :]
        done.append(np.concatenate(shown, 1)[: len(chunk), : config.film_steps + 1])
    whole = np.concatenate(done)
    return whole.reshape(len(alphas), n, *whole.shape[1:])


def joined(parts: Sequence[worlds.States]) -> worlds.States:
    """States of several families behind one another, without how they go on."""
    arrays = [np.concatenate([getattr(part, name) for part in parts]) for name in ("frames", "mask", "velocity")]
    return worlds.States(np.concatenate([part.family for part in parts]), *arrays)


def at_checkpoint(records: Any, model: int, time: int) -> Any:
    """Parameters of one seed at one of the recorded times; -1 is trained, 0 untrained."""
    return jax.tree.map(lambda x: jnp.asarray(x[model, time]), records)


def checked(config: Any) -> None:
    """All that does not fit in a configuration, before anything is simulated."""
    known = set(worlds.SLOTS)
    problems = []
    if not {"shear", "advect"} <= set(config.families) or not set(config.families) <= known:
        problems.append(f"families: wanted shear, advect and others of {sorted(known)}, got {config.families}")
    if not set(config.kinds) <= {"spectral", "attention"} or not config.kinds:
        problems.append(f"kinds: wanted spectral or attention, got {config.kinds}")
    if not set(config.directions) <= set(worlds.DIRECTIONS) or not config.directions:
        problems.append(f"directions: wanted some of {worlds.DIRECTIONS}, got {config.directions}")
    if config.controls and not set(worlds.MAIN) <= set(config.directions):
        problems.append(f"directions: controls need {worlds.MAIN}, got {config.directions}")
    if not set(config.fits) <= set(ps.MODES) - {"none"} or "drop" not in config.fits:
        problems.append(f"fits: wanted drop and others of pad, interpol, got {config.fits}")
    if tuple(sorted(set(config.alphas))) != config.alphas or 0.0 not in config.alphas:
        problems.append(f"alphas: wanted rising numbers with 0 among them, got {config.alphas}")
    if not np.isfinite(config.alphas).all():
        problems.append(f"alphas: wanted finite numbers, got {config.alphas}")
    if not {0.2, -0.2} <= set(config.alphas):
        problems.append(f"alphas: wanted 0.2 and -0.2 among them, got {config.alphas}")
    if not 0 <= config.layer < config.layers or not all(0 <= x < config.layers for x in config.other_layers):
        problems.append(
            f"layer, other_layers: wanted 0..{config.layers - 1}, got {config.layer}, {config.other_layers}"
        )
    if config.frames < config.history + max(2, config.horizon):
        problems.append(f"frames: wanted at least history + horizon, got {config.frames}")
    small = [field.name for field in dataclasses.fields(config) if _small(field.name, getattr(config, field.name))]
    if small:
        problems.append(f"{', '.join(small)}: wanted at least 1")
    if problems:
        raise ValueError("; ".join(problems))


def _small(name: str, value: Any) -> bool:
    return name not in ("randoms", "layer", "latest") and type(value) is int and value < 1
