"""Training: a compiled loop over steps, mapped over runs, that stops on NaN and resumes exactly::

    result = fit(key, loss, params, optax.adam(1e-3), shuffled({"x": x, "y": y}, 128), steps=1000)

``fit_many`` trains many runs at once, one per *lane*: seeds, learning rates, data subsets, anything that ``build``
makes of a lane. Both are driven from Python in segments of steps. The length of a segment is data, not part of the
program: it changes neither what is compiled nor a single bit of the result, so a run that was killed and resumed ends
as it would have ended.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mechlab.core.rng import require_typed
from mechlab.core.sharding import LogicalAxes, shardings
from mechlab.training.batches import Batches
from mechlab.training.checkpoints import Checkpoints

Loss = Callable[[Any, Any], Any]

CHECKPOINT_SECONDS = 15.0
"""A checkpoint is written at the first end of a segment after this time, and at the end of training."""


class Job(NamedTuple):
    """One training run.

    Attributes:
      loss: ``loss(params, batch)``, a scalar, or a scalar and a dictionary of numbers to keep for every step.
      params: pytree to train.
      optimiser: any optax transformation.
      batches: see ``training/batches.py``.
    """

    loss: Loss
    params: Any
    optimiser: optax.GradientTransformation
    batches: Batches


class Fit(NamedTuple):
    """The outcome of training; with ``fit_many`` every array has a leading axis of lanes.

    Attributes:
      params: trained parameters.
      opt_state: the optimiser's state.
      losses: (steps,) training loss before each update.
      aux: what the loss returned beside its value, (steps, ...).
      records: what ``record(params)`` gave before training and after every segment, (segments + 1, ...), or None.
    """

    params: Any
    opt_state: Any
    losses: jax.Array
    aux: Any
    records: Any


class Progress(Protocol):
    """What ``fit`` needs of a log (``reporting.Log``): a folder for checkpoints or None, and a way to show progress."""

    directory: Path | None

    def track(self, name: str, total: int) -> contextlib.AbstractContextManager[Callable[..., None]]:
        """A context manager that gives ``update(done, **numbers)``."""
        ...


class NonFiniteLoss(FloatingPointError):
    """Training met a NaN or infinity, in the loss or in the updated parameters.

    Attributes:
      step: the first step with such a loss; if every loss is finite, the last step of the segment.
      lanes: the runs concerned, with ``fit_many``.
    """

    def __init__(self, name: str, what: str, step: int, lanes: list[int], kept: int | None) -> None:
        where = f" in lanes {lanes}" if lanes else ""
        last = f"the last good checkpoint is of step {kept}" if kept is not None else "there is no checkpoint yet"
        super().__init__(f"{name}: {what} not finite at step {step}{where}; {last}.")
        self.step, self.lanes = step, lanes


def fit(
    key: jax.Array,
    loss: Loss,
    params: Any,
    optimiser: optax.GradientTransformation,
    batches: Batches,
    *,
    steps: int,
    segment: int | None = None,
    record: Callable[[Any], Any] | None = None,
    log: Progress | None = None,
    name: str = "fit",
    mesh: Mesh | None = None,
    axes: LogicalAxes | None = None,
) -> Fit:
    """Train one run.

    Args:
      key: typed key; decides the batches.
      loss, params, optimiser, batches: see ``Job``. ``params`` is not changed.
      steps: number of updates.
      segment: steps between two looks at the loss (progress, NaN, checkpoint, record); about 1/20 of steps by default.
      record: measured on the parameters before training and after every segment, inside the compiled program.
      log: shows progress; if it has a directory, checkpoints go to ``directory/name`` and training resumes from there.
      name: of this training in the log.
      mesh: split every batch over "data" and the parameters by ``axes``.
      axes: logical axes of the parameters (``LOGICAL_AXES`` of the model); replicated by default.

    Returns:
      The trained parameters and the history.

    Raises:
      NonFiniteLoss: NaN or infinity; the last good checkpoint is kept.
      ValueError: ``steps`` < 1, or a checkpoint of another configuration.
    """
    require_typed(key)
    job = Job(loss, params, optimiser, batches)
    start = _initial_state(job)
    placement = None
    if mesh is not None:
        placement = shardings(start, mesh, axes or {})
        start = jax.device_put(start, placement)
        split = NamedSharding(mesh, PartitionSpec("data"))
        fetch = batches.fetch
        job = job._replace(batches=batches._replace(fetch=lambda x: jax.lax.with_sharding_constraint(fetch(x), split)))
    segment = _segment_length(steps, segment)
    run = jax.jit(lambda key, state, first, count: _segment(key, state, first, count, job, segment, record))
    return _drive(key, start, run, steps, segment, log, name, many=False, record=record and jax.jit(record))


def fit_many(
    keys: jax.Array,
    lanes: Any,
    build: Callable[[Any], Job],
    *,
    steps: int,
    segment: int | None = None,
    record: Callable[[Any], Any] | None = None,
    log: Progress | None = None,
    name: str = "fit",
    mesh: Mesh | None = None,
) -> Fit:
    """Train one run per lane, all in one program.

    Args:
      keys: (S,) typed keys, one per lane.
      lanes: pytree of arrays (S, ...); ``build`` gets one slice.
      build: ``build(lane) -> Job``; pure, called while tracing. Learning rates may come from the lane.
      steps, segment, record, log, name: as in ``fit``.
      mesh: spread the lanes over "data".

    Returns:
      As ``fit``, every array with a leading axis S.

    Raises:
      As ``fit``; also ValueError if keys and lanes differ in length, or S does not divide over the mesh.
    """
    require_typed(keys)
    lengths = {np.shape(leaf)[:1] for leaf in (keys, *jax.tree.leaves(lanes))}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(f"fit_many: keys and lanes must have one common leading axis, got {lengths}.")
    if mesh is not None:
        if keys.shape[0] % mesh.shape["data"]:
            raise ValueError(f"fit_many: {keys.shape[0]} lanes do not divide over {mesh.shape['data']} devices.")
        keys, lanes = jax.device_put((keys, lanes), NamedSharding(mesh, PartitionSpec("data")))
    # The key is mapped along because lanes may hold no array at all: then only the seed differs.
    start = jax.jit(jax.vmap(lambda key, lane: _initial_state(build(lane)), axis_size=len(keys)))(keys, lanes)
    segment = _segment_length(steps, segment)

    def one(key: jax.Array, lane: Any, state: _State, first: jax.Array, count: jax.Array) -> Any:
        return _segment(key, state, first, count, build(lane), segment, record)

    many = jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None, None)))
    measure = record and jax.jit(jax.vmap(record))

    def run(keys: jax.Array, state: _State, first: int, count: int) -> Any:
        return many(keys, lanes, state, first, count)

    return _drive(keys, start, run, steps, segment, log, name, many=True, record=measure)


class _State(NamedTuple):
    params: Any
    opt_state: Any


def _initial_state(job: Job) -> _State:
    return _State(job.params, job.optimiser.init(job.params))


def _segment_length(steps: int, segment: int | None) -> int:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    if segment is not None and segment < 1:
        raise ValueError(f"segment must be at least 1, got {segment}.")
    return min(steps, segment or max(1, -(-steps // 20)))


def _segment(
    key: jax.Array, state: _State, first: Any, count: Any, job: Job, size: int, record: Callable[[Any], Any] | None
) -> tuple[_State, Any, jax.Array, Any]:
    """Up to ``size`` steps; ``count`` of them are made. A loop of traced length compiles once for all segments."""
    plan = job.batches.plan(key, first, size)
    gradient = jax.value_and_grad(lambda params, batch: _with_aux(job.loss(params, batch)), has_aux=True)

    def step(params: Any, opt_state: Any, x: Any) -> tuple[_State, Any]:
        (_, history), grads = gradient(params, job.batches.fetch(x))
        updates, opt_state = job.optimiser.update(grads, opt_state, params)
        return _State(optax.apply_updates(params, updates), opt_state), history

    def body(i: jax.Array, carry: Any) -> Any:
        state, history = carry
        state, new = step(state.params, state.opt_state, jax.tree.map(lambda leaf: leaf[i], plan))
        return state, jax.tree.map(lambda all_steps, x: all_steps.at[i].set(x), history, new)

    one = jax.tree.map(lambda leaf: leaf[0], plan)
    shapes = jax.eval_shape(lambda: step(state.params, state.opt_state, one)[1])
    history = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), shapes)
    state, history = jax.lax.fori_loop(0, count, body, (state, history))
    finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(state.params) if jnp.issubdtype(x.dtype, jnp.inexact)]
    measured = record(state.params) if record is not None else None
    return state, history, jnp.stack(finite).all() if finite else jnp.asarray(True), measured


def _with_aux(output: Any) -> tuple[jax.Array, Any]:
    value, aux = output if isinstance(output, tuple) else (output, {})
    return value, (value, aux)


def _drive(
    key: jax.Array,
    start: _State,
    run: Callable[..., Any],
    steps: int,
    segment: int,
    log: Progress | None,
    name: str,
    *,
    many: bool,
    record: Callable[[Any], Any] | None,
) -> Fit:
    axis = 1 if many else 0
    folder = log.directory / name if log is not None and log.directory is not None else None
    store = Checkpoints(folder) if folder is not None else None
    shapes = jax.eval_shape(run, key, start, 0, segment)
    histories = [jax.tree.map(lambda x: np.zeros(_resized(x.shape, axis, steps), x.dtype), shapes[1])]
    history = histories[0]
    records = None
    if record is not None:
        slots = -(-steps // segment) + 1
        records = jax.tree.map(lambda x: np.zeros((*x.shape[:axis], slots, *x.shape[axis:]), x.dtype), shapes[3])
        _write(records, record(start.params), axis, 0)
    state, done = start, 0
    try:
        if store is not None and (latest := store.latest()) is not None:
            saved = store.restore(latest, _to_save(key, state, history, records))
            if not np.array_equal(saved["key"], _key_data(key)):
                raise ValueError(f"the checkpoint in {folder} is of another key; use another folder, or remove it.")
            state, done = _State(*saved["state"]), latest
            history, records = saved["history"], saved["records"]
        with log.track(name, steps) if log is not None else contextlib.nullcontext() as update:
            saved_at = time.monotonic()
            if update is not None and done:
                update(done)
            while done < steps:
                count = min(segment, steps - done)
                state, new, finite, measured = run(key, state, done, count)
                new = jax.tree.map(lambda x, n=count: np.take(np.asarray(x), np.arange(n), axis), new)
                kept = store.latest() if store is not None else None
                _refuse_non_finite(name, new[0], np.atleast_1d(finite), done, many, kept)
                _write(history, new, axis, slice(done, done + count))
                if record is not None:
                    _write(records, measured, axis, done // segment + 1)
                done += count
                if store is not None and (done == steps or time.monotonic() - saved_at > CHECKPOINT_SECONDS):
                    store.save(done, _to_save(key, state, history, records))
                    saved_at = time.monotonic()
                if update is not None:
                    update(done, loss=float(new[0].mean()))
    finally:
        if store is not None:
            store.close()
    losses, aux = history
    return Fit(*state, losses, aux, records)


def _to_save(key: jax.Array, state: _State, history: Any, records: Any) -> dict[str, Any]:
    return {"key": _key_data(key), "state": state, "history": history, "records": records}


def _key_data(key: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(key))


def _resized(shape: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    return (*shape[:axis], length, *shape[axis + 1 :])


def _write(tree: Any, new: Any, axis: int, where: Any) -> None:
    """Write into NumPy arrays at ``where`` along ``axis``."""
    for target, x in zip(jax.tree.leaves(tree), jax.tree.leaves(new), strict=True):
        target[(slice(None),) * axis + (where,)] = np.asarray(x)


def _refuse_non_finite(
    name: str, losses: np.ndarray, finite: np.ndarray, first: int, many: bool, kept: int | None
) -> None:
    bad = np.atleast_2d(~np.isfinite(losses))
    if not bad.any() and finite.all():
        return
    lanes = [int(i) for i in np.flatnonzero(bad.any(1) | ~finite)] if many else []
    if bad.any():
        raise NonFiniteLoss(name, "the loss is", first + int(np.argmax(bad.any(0))), lanes, kept)
    raise NonFiniteLoss(name, "the updated parameters are", first + bad.shape[1] - 1, lanes, kept)
