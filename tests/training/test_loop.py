"""Training against a loop written by hand, cut into any segments, on any devices, in any number of lanes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mechlab.core.sharding import make_mesh
from mechlab.models.transformer import LOGICAL_AXES, gpt2, transformer
from mechlab.training.batches import Batches, generated, shuffled
from mechlab.training.checkpoints import Checkpoints
from mechlab.training.loop import Fit, Job, NonFiniteLoss, fit, fit_many
from tests.models.tiny import SIZES
from tests.training import problem
from tests.training.problem import STEPS, Log

OPTIMISERS: dict[str, optax.GradientTransformation] = {
    "adam": optax.adam(1e-2),
    "momentum": optax.sgd(1e-1, momentum=0.9, nesterov=True),
    "adamw on a schedule": optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 10), weight_decay=0.1),
    "masked": optax.masked(optax.adam(1e-2), {"layer_0": True, "layer_1": {"bias": False, "kernel": True}}),
    "every third step": optax.MultiSteps(optax.adam(1e-2), 3).gradient_transformation(),
    "clipped chain": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5)),
}


def key() -> jax.Array:
    return jax.random.key(problem.KEY_SEED)


def train(optimiser: optax.GradientTransformation = OPTIMISERS["adam"], **options: Any) -> Fit:
    options = {"steps": STEPS, "segment": 4} | options
    return fit(key(), problem.loss, problem.params(), optimiser, problem.batches(), **options)


def by_hand(optimiser: optax.GradientTransformation, batches: Batches, steps: int) -> Fit:
    params = problem.params()
    opt_state = optimiser.init(params)
    gradient = jax.jit(jax.value_and_grad(problem.loss, has_aux=True))
    update = jax.jit(optimiser.update)
    losses, right = [], []
    for step in range(steps):
        batch = batches.fetch(jax.tree.map(lambda leaf: leaf[0], batches.plan(key(), step, 1)))
        (loss, aux), grads = gradient(params, batch)
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
        right.append(aux["right"])
    return Fit(params, opt_state, np.stack(losses), {"right": np.stack(right)}, None)


def assert_close(a: Any, b: Any, **tolerance: float) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **({"rtol": 1e-5, "atol": 1e-6} | tolerance)), a, b)


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_fit_equals_a_loop_written_by_hand(name: str) -> None:
    fitted = train(OPTIMISERS[name])
    wanted = by_hand(OPTIMISERS[name], problem.batches(), STEPS)
    assert_close(fitted.params, wanted.params)
    assert_close(fitted.opt_state, wanted.opt_state)
    assert_close(fitted.losses, wanted.losses)
    np.testing.assert_array_equal(fitted.aux["right"], wanted.aux["right"])
    assert fitted.aux["right"].dtype == jnp.int32
    assert fitted.aux["logits"].shape == (STEPS, 3)
    assert fitted.losses.shape == (STEPS,) and fitted.records is None


def test_fit_learns() -> None:
    fitted = train(OPTIMISERS["adam"], steps=200, segment=50)
    assert fitted.losses[-20:].mean() < 0.5 * fitted.losses[:5].mean()


@pytest.mark.parametrize("segment", [1, 5, 100, None])
def test_segments_change_no_bit(segment: int | None) -> None:
    whole = train(segment=STEPS)
    cut = train(segment=segment, record=problem.record)
    assert_same(cut[:4], whole[:4])
    size = STEPS if segment is None or segment > STEPS else segment
    size = 1 if segment is None else size
    marks = -(-STEPS // size) + 1
    assert cut.records["norm"].shape == (marks,)
    assert cut.records["bias"].shape == (marks, 3)


def test_records_are_measured_before_training_and_after_every_segment() -> None:
    fitted = train(segment=4, record=problem.record)
    at_ends = [problem.params(), *(train(segment=4, steps=steps).params for steps in (4, 8, STEPS))]
    for i, params in enumerate(at_ends):
        assert_close(jax.tree.map(lambda x, i=i: x[i], fitted.records), problem.record(params))


def test_fit_does_not_change_its_arguments_and_is_deterministic() -> None:
    params = problem.params()
    before = jax.tree.map(np.array, params)
    runs = [fit(key(), problem.loss, params, optax.adam(0.1), problem.batches(), steps=3) for _ in range(2)]
    assert_same(params, before)
    assert_same(runs[0], runs[1])
    other = fit(jax.random.key(99), problem.loss, params, optax.adam(0.1), problem.batches(), steps=3)
    assert not np.array_equal(other.losses, runs[0].losses)


def test_a_loss_without_aux_and_generated_batches() -> None:
    target = jnp.asarray([1.0, -2.0])
    with jax.debug_key_reuse(False):
        fitted = fit_generated(target)
    np.testing.assert_allclose(fitted.params, target, atol=0.05)
    assert fitted.aux == {}
    assert len(np.unique(fitted.losses)) == 200


def test_generated_batches_pass_the_check_for_reused_keys() -> None:
    with jax.debug_key_reuse(True):
        fit_generated(jnp.asarray([1.0, -2.0]))


def fit_generated(target: jax.Array) -> Fit:
    batches = generated(lambda key: jax.random.normal(key, (16, 2)))
    return fit(
        key(),
        lambda w, x: jnp.square(x @ (w - target)).mean(),
        jnp.zeros(2),
        optax.adam(0.1),
        batches,
        steps=200,
    )


def test_segments_of_any_length_are_one_program() -> None:
    traces: list[int] = []

    def loss(params: Any, batch: Any) -> Any:
        traces.append(1)
        return problem.loss(params, batch)

    fit(key(), loss, problem.params(), optax.adam(0.1), problem.batches(), steps=2, segment=2)
    few = len(traces)
    traces.clear()
    fit(key(), loss, problem.params(), optax.adam(0.1), problem.batches(), steps=11, segment=2)
    assert len(traces) == few


def test_progress_is_shown_after_every_segment() -> None:
    log = Log(None)
    train(log=log)
    assert log.seen == [4, 8, 11]


RATES = jnp.asarray([1e-3, 1e-2, 3e-2, 1e-1])


@pytest.fixture(scope="module")
def many() -> Fit:
    keys = jax.random.split(key(), 4)
    return fit_many(keys, RATES, problem.lane, steps=STEPS, segment=4, record=problem.record)


def test_every_lane_equals_its_own_fit(many: Fit) -> None:
    keys = jax.random.split(key(), 4)
    for i in range(4):
        alone = fit(keys[i], *problem.lane(RATES[i]), steps=STEPS, segment=4, record=problem.record)
        assert_close(jax.tree.map(lambda x, i=i: x[i], many), alone, rtol=1e-5, atol=1e-5)
    assert many.losses.shape == (4, STEPS)
    assert many.records["bias"].shape == (4, 4, 3)
    assert len(np.unique(many.losses[:, -1])) == 4


def test_lanes_spread_over_devices_equal_one_device(many: Fit) -> None:
    mesh = make_mesh(data=4, model=2)
    keys = jax.random.split(key(), 4)
    spread = fit_many(keys, RATES, problem.lane, steps=STEPS, segment=4, record=problem.record, mesh=mesh)
    assert_close(spread, many, rtol=1e-5, atol=1e-5)
    kernel = spread.params["layer_0"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 4, 8)}


def test_lanes_may_choose_their_own_parameters_and_examples() -> None:
    data = problem.data()
    lanes = {"seed": jnp.arange(3), "rows": jnp.asarray([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])}

    def build(lane: Any) -> Job:
        batches = shuffled(data, 2, lane["rows"])
        return Job(problem.loss, problem.params(lane["seed"]), optax.sgd(0.1), batches)

    keys = jax.random.split(key(), 3)
    fitted = fit_many(keys, lanes, build, steps=5)
    for i in range(3):
        alone = fit(keys[i], *build(jax.tree.map(lambda x, i=i: x[i], lanes)), steps=5)
        assert_close(jax.tree.map(lambda x, i=i: x[i], fitted), alone, rtol=1e-5, atol=1e-5)


def test_fit_of_a_decoder_on_a_mesh_equals_one_device() -> None:
    model = transformer(gpt2(**SIZES | {"layers": 2}))
    params = model.init(jax.random.key(0))
    texts = jnp.asarray(np.random.default_rng(0).integers(0, 11, (32, 6)))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    def train(**options: Any) -> Fit:
        return fit(key(), loss, params, optax.adam(1e-3), shuffled(texts, 8), steps=4, **options)

    alone, spread = train(), train(mesh=make_mesh(data=2, model=2), axes=LOGICAL_AXES)
    assert_close(spread.losses, alone.losses, rtol=1e-5, atol=1e-5)
    # Adam's first steps are g / |g|: where g is rounding noise its sign is too. Twice the way is the bound.
    moved = jax.tree.map(lambda a, b: np.abs(a - b), spread.params, alone.params)
    assert max(x.max() for x in jax.tree.leaves(moved)) <= 8.1e-3
    assert np.mean(np.concatenate([x.ravel() for x in jax.tree.leaves(moved)]) > 1e-5) < 0.02
    up = spread.params["blocks"]["mlp"]["up"]["kernel"]
    assert len(up.sharding.device_set) == 4
    assert up.addressable_shards[0].data.shape == (2, 16, 12)


def explode(step: int) -> Batches:
    """Batches that are 1 until ``step`` and 0 from there on."""
    return Batches(lambda key, first, count: first + jnp.arange(count), lambda i: jnp.where(i < step, 1.0, 0.0))


def test_a_loss_that_is_not_finite_stops_with_the_step() -> None:
    for step in (0, 1, 6, 10):
        with pytest.raises(NonFiniteLoss, match=f"run: the loss is not finite at step {step}; there is no checkpoint"):
            fit(
                key(),
                lambda p, x: jnp.log(x) + p * 0,
                jnp.float32(1),
                optax.sgd(0.1),
                explode(step),
                steps=STEPS,
                segment=4,
                name="run",
            )


def test_a_loss_that_is_not_finite_names_the_lanes_and_the_first_step() -> None:
    def build(step: jax.Array) -> Job:
        return Job(lambda p, x: jnp.log(x) + p * 0, jnp.float32(1), optax.sgd(0.1), explode(step))

    keys = jax.random.split(key(), 4)
    with pytest.raises(NonFiniteLoss, match=r"at step 5 in lanes \[1, 2\]") as caught:
        fit_many(keys, jnp.asarray([99, 7, 5, 99]), build, steps=STEPS, segment=4)
    assert caught.value.step == 5 and caught.value.lanes == [1, 2]


def square_root(params: jax.Array, batch: Any) -> jax.Array:
    """Finite at 0, its gradient is not."""
    return jnp.sqrt(params).sum()


@pytest.mark.parametrize("segment", [1, 3])
def test_parameters_that_are_not_finite_after_the_last_step_stop_too(segment: int) -> None:
    with pytest.raises(NonFiniteLoss, match="the updated parameters are not finite at step 0"):
        fit(key(), square_root, jnp.zeros(2), optax.sgd(0.1), problem.batches(), steps=1, segment=segment)


def test_parameters_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechlab.training.loop.CHECKPOINT_SECONDS", -1.0)

    def loss(params: jax.Array, x: jax.Array) -> jax.Array:
        # 1 and then 0, always finite; the gradient at 0 is not, and 0 times infinity is NaN.
        return jnp.sqrt(x + params.sum())

    with pytest.raises(NonFiniteLoss, match=r"updated parameters .* step 3; the last good .* step 2") as caught:
        fit(
            key(),
            loss,
            jnp.zeros(2),
            optax.sgd(0.0),
            explode(3),
            steps=8,
            segment=2,
            log=Log(tmp_path),
            name="run",
        )
    assert caught.value.step == 3
    store = Checkpoints(tmp_path / "run")
    assert store.latest() == 2
    store.close()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"segment": 0}, "segment must be at least 1, got 0"),
        ({"segment": -3}, "got -3"),
    ],
)
def test_bad_numbers_of_steps_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(**options)
    with pytest.raises(ValueError, match=message):
        fit_many(jax.random.split(key(), 4), RATES, problem.lane, **({"steps": 3} | options))


def test_lanes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one common leading axis"):
        fit_many(jax.random.split(key(), 3), RATES, problem.lane, steps=2)
    with pytest.raises(ValueError, match="one common leading axis"):
        fit_many(key(), jnp.float32(1), problem.lane, steps=2)
    with pytest.raises(ValueError, match="3 lanes do not divide over 2 devices"):
        fit_many(jax.random.split(key(), 3), RATES[:3], problem.lane, steps=2, mesh=make_mesh(data=2))


def test_a_batch_that_does_not_divide_over_the_mesh_still_gives_the_same_result() -> None:
    assert_close(train(mesh=make_mesh(data=3)), train(), rtol=1e-5, atol=1e-5)


def test_legacy_keys_are_refused() -> None:
    with pytest.raises(TypeError, match="typed key"):
        fit(
            jnp.zeros(2, jnp.uint32),
            problem.loss,
            problem.params(),
            optax.adam(0.1),
            problem.batches(),
            steps=1,
        )


def test_seeds_alone_may_be_the_lanes() -> None:
    fitted = fit_many(jax.random.split(key(), 2), {}, lambda lane: problem.lane(0.1), steps=2)
    assert fitted.losses.shape == (2, 2)
