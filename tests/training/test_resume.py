"""Runs that were stopped and resumed end as they would have ended, to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mechlab.core.sharding import make_mesh
from mechlab.training.checkpoints import Checkpoints
from mechlab.training.loop import Fit, NonFiniteLoss, fit, fit_many
from tests.training import problem
from tests.training.problem import STEPS, Log
from tests.training.test_loop import OPTIMISERS, assert_same

# After a refused checkpoint orbax may close its event loop before its last reader has answered.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _a_checkpoint_after_every_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechlab.training.loop.CHECKPOINT_SECONDS", -1.0)


def train(log: Any = None, optimiser: Any = None, seed: int = problem.KEY_SEED, **options: Any) -> Fit:
    options = {"steps": STEPS, "segment": 2, "record": problem.record} | options
    optimiser = optimiser or optax.adam(1e-2)
    return fit(jax.random.key(seed), problem.loss, problem.params(), optimiser, problem.batches(), log=log, **options)


def stop_at(step: int) -> Callable[[int], None]:
    def stop(done: int) -> None:
        if done >= step:
            raise KeyboardInterrupt

    return stop


@pytest.fixture(scope="module")
def uninterrupted() -> Fit:
    return train()


def test_a_killed_process_resumes_to_the_same_bits(tmp_path: Path, uninterrupted: Fit) -> None:
    command = [sys.executable, "-m", "tests.training.killed", str(tmp_path), "5"]
    died = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    log = Log(tmp_path)
    assert_same(train(log), uninterrupted)
    assert log.seen[0] == 6  # where the killed run had got to
    assert log.seen[-1] == STEPS


@pytest.mark.parametrize("step", [1, 4, 11])
def test_an_interrupted_run_resumes_to_the_same_bits(step: int, tmp_path: Path, uninterrupted: Fit) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(Log(tmp_path, stop_at(step)))
    log = Log(tmp_path)
    assert_same(train(log), uninterrupted)
    assert log.seen[0] == min(STEPS, step + step % 2)


def test_a_run_stopped_many_times_ends_the_same(tmp_path: Path, uninterrupted: Fit) -> None:
    for step in (4, 8):
        with pytest.raises(KeyboardInterrupt):
            train(Log(tmp_path, lambda done, step=step: stop_at(step)(done) if done > step - 2 else None))
    assert_same(train(Log(tmp_path)), uninterrupted)


def test_a_finished_run_is_read_not_repeated(tmp_path: Path, uninterrupted: Fit) -> None:
    assert_same(train(Log(tmp_path)), uninterrupted)
    log = Log(tmp_path)
    assert_same(train(log), uninterrupted)
    assert log.seen == [STEPS]


@pytest.mark.parametrize("name", ["adamw on a schedule", "masked", "every third step"])
def test_any_optimiser_resumes(name: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(Log(tmp_path, stop_at(6)), OPTIMISERS[name], record=None)
    assert_same(train(Log(tmp_path), OPTIMISERS[name], record=None), train(None, OPTIMISERS[name], record=None))


def test_many_lanes_resume_to_the_same_bits(tmp_path: Path) -> None:
    rates = jnp.asarray([1e-3, 1e-2])

    def many(log: Any = None, **options: Any) -> Fit:
        keys = jax.random.split(jax.random.key(1), 2)
        return fit_many(keys, rates, problem.lane, steps=7, segment=2, record=problem.record, log=log, **options)

    with pytest.raises(KeyboardInterrupt):
        many(Log(tmp_path, stop_at(3)))
    log = Log(tmp_path)
    assert_same(many(log), many())
    assert log.seen == [4, 6, 7]


def test_a_run_on_a_mesh_resumes_to_the_same_bits_and_shardings(tmp_path: Path) -> None:
    mesh = make_mesh(data=4, model=2)
    axes = {"**/layer_0/kernel": (None, "hidden")}
    options = {"mesh": mesh, "axes": axes}
    with pytest.raises(KeyboardInterrupt):
        train(Log(tmp_path, stop_at(4)), **options)
    whole, resumed = train(**options), train(Log(tmp_path), **options)
    assert_same(resumed, whole)
    assert resumed.params["layer_0"]["kernel"].sharding == whole.params["layer_0"]["kernel"].sharding


def test_a_checkpoint_of_another_key_is_refused(tmp_path: Path) -> None:
    train(Log(tmp_path), steps=2)
    with pytest.raises(ValueError, match="another key"):
        train(Log(tmp_path), steps=2, seed=123)


@pytest.mark.parametrize("change", [{"optimiser": optax.sgd(0.1)}, {"record": None}], ids=["optimiser", "record"])
def test_a_checkpoint_of_another_structure_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    train(Log(tmp_path))
    with pytest.raises(ValueError, match="another configuration"):
        train(Log(tmp_path), **change)


@pytest.mark.parametrize("steps", [4, 16])
def test_a_checkpoint_of_another_number_of_steps_is_refused_or_continued(steps: int, tmp_path: Path) -> None:
    train(Log(tmp_path), steps=8, record=None)
    try:
        fitted = train(Log(tmp_path), steps=steps, record=None)
    except ValueError as error:
        assert "another configuration" in str(error)
        return
    assert_same(fitted, train(steps=steps, record=None))


def test_a_checkpoint_of_another_segment_is_refused_or_continued(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(Log(tmp_path, stop_at(6)), segment=2)
    try:
        fitted = train(Log(tmp_path), segment=3)
    except ValueError as error:
        assert "another configuration" in str(error)
        return
    assert_same(fitted, train(segment=3))


def test_without_records_another_segment_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(Log(tmp_path, stop_at(4)), segment=2, record=None)
    assert_same(train(Log(tmp_path), segment=3, record=None), train(record=None))


def test_a_run_that_meets_nan_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        # Grows by itself until the square of its exponential overflows.
        return jnp.square(jnp.exp(params))

    def run() -> Fit:
        return fit(
            jax.random.key(0),
            loss,
            jnp.float32(1.0),
            optax.sgd(-0.05),
            problem.batches(),
            steps=40,
            segment=1,
            log=Log(tmp_path),
            name="grow",
        )

    with pytest.raises(NonFiniteLoss, match=r"grow: .* not finite at step \d+; the last good .* of step") as e:
        run()
    store = Checkpoints(tmp_path / "grow")
    kept = store.latest()
    store.close()
    assert kept == e.value.step or kept == e.value.step - 1
    with pytest.raises(NonFiniteLoss) as again:
        run()
    assert again.value.step == e.value.step


def test_names_keep_the_runs_of_one_folder_apart(tmp_path: Path) -> None:
    first = train(Log(tmp_path), name="a")
    second = train(Log(tmp_path), optax.adam(1e-3), name="b")
    assert not np.array_equal(first.losses, second.losses)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
