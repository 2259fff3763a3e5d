"""Fake quantisation: stored vectors of the official code, invariants, every kernel forward and backward."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlab.kernels.fake_quant import choose, cost, gpu, lsq, round_groups, statsq, tpu
from mechlab.kernels.row_blocks import half_even
from mechlab.methods.compression.rounding import quantise
from tests.kernels.lowering import lowered

KERNELS = {"tpu": tpu, "gpu": gpu}
BITS = [2, 3, 4]


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def assert_near(got, wanted, step, share=1e-3):
    """Equal up to a few last bits, but for the few numbers that lie between two levels up to the last bits of a sum."""
    got, wanted = (np.asarray(array, np.float64) for array in (got, wanted))
    apart = np.abs(got - wanted)
    assert got.shape == wanted.shape and (apart <= 1.001 * step).all()
    assert (apart > 1e-5 * np.abs(wanted).max()).mean() <= share


def with_gradients(function, *arrays, upstream):
    y, pull = jax.vjp(function, *arrays)
    return (y, *pull(upstream.astype(y.dtype)))


@pytest.mark.parametrize("bits", BITS)
def test_weights_are_those_of_the_official_code(vectors, bits):
    v = vectors("ofq")
    w, upstream = (jnp.asarray(v[name], jnp.float32) for name in ("w", "upstream"))
    y, dw = with_gradients(functools.partial(statsq, bits=bits), w, upstream=upstream)
    np.testing.assert_allclose(y, v[f"statsq_b{bits}"], rtol=1e-5)
    np.testing.assert_allclose(dw, v[f"statsq_grad_b{bits}"], rtol=1e-6)
    np.testing.assert_allclose(statsq(w.T, bits=bits, axis=-2).T, v[f"statsq_b{bits}"], rtol=1e-5)

    s = jnp.asarray(v[f"lsq_init_s_b{bits}"], jnp.float32).reshape(-1)
    scale = 1 / np.sqrt((2 ** (bits - 1) - 1) * w.shape[1])
    y, dw, ds = with_gradients(functools.partial(lsq, bits=bits, gradient_scale=scale), w, s, upstream=upstream)
    np.testing.assert_allclose(y, v[f"lsq_b{bits}"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(dw, v[f"lsq_grad_w_b{bits}"], rtol=1e-6)
    np.testing.assert_allclose(ds, v[f"lsq_grad_s_b{bits}"].reshape(-1), rtol=1e-4, atol=1e-6)


def test_a_scale_per_position_is_that_of_the_official_code(vectors):
    v = vectors("ofq")
    x, s, upstream = (jnp.asarray(v[name], jnp.float32) for name in ("act_x", "act_init_s", "act_up"))
    scale = 1 / np.sqrt(1 * x.size / x.shape[1])
    run = functools.partial(lsq, bits=2, gradient_scale=scale)
    y, dx, ds = with_gradients(run, x, s.reshape(-1), upstream=upstream)
    np.testing.assert_allclose(y, v["act_y"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(dx, v["act_grad_x"], rtol=1e-6)
    np.testing.assert_allclose(ds, v["act_grad_s"].reshape(-1), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"s \(5,\) does not broadcast to \(3, 4\).*one length only"):
        run(x[:, :4], s.reshape(-1))


def test_stacked_rows_are_those_of_the_official_code(vectors):
    v = vectors("ofq")
    w = jnp.asarray(v["qkr_w"], jnp.float32)
    np.testing.assert_allclose(
        statsq(w.reshape(-1, w.shape[-1]), bits=2), v["qkr_statsq_b2"].reshape(-1, w.shape[-1]), rtol=1e-5
    )


@pytest.mark.parametrize("bits", [3, 4])
def test_groups_are_those_of_awq_and_of_rounding(vectors, bits):
    v = vectors("awq")
    w, group = jnp.asarray(v["w_down_proj"], jnp.float32), int(v["group"])
    assert_near(round_groups(w, bits=bits, group=group), v[f"rtn_b{bits}"], v[f"rtn_scale_b{bits}"].max())
    for symmetric in (False, True):
        q = quantise(w, bits=bits, group=group, axis="ic", symmetric=symmetric)
        got = round_groups(w, bits=bits, group=group, symmetric=symmetric)
        np.testing.assert_allclose(got, q.dequantise(), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(jax.grad(lambda w: (3 * round_groups(w, bits=bits)).sum())(w), jnp.full(w.shape, 3.0))


@settings(max_examples=10)
@given(bits=st.sampled_from([2, 5, 8]), seed=st.integers(0, 20), scale=st.floats(0.01, 100))
def test_statsq_has_few_levels_and_follows_its_scale(bits, seed, scale):
    w = normal(3, 40, seed=seed)
    y = np.asarray(statsq(w, bits=bits))
    assert all(len(np.unique(row)) <= 2**bits for row in y) and (y != 0).all()
    moved = statsq(scale * w, bits=bits)
    assert_near(moved, scale * y, scale * 2 * np.abs(y).max(), share=0.03)


def test_zero_goes_up_and_bfloat16_has_no_level_too_many():
    w = jnp.asarray([[0.0, 1.0, -1.0]])
    alpha = 4 / 3
    assert statsq(w, bits=2)[0, 0] == pytest.approx(alpha / 4)
    wide = 3 * normal(4, 256)
    narrow = statsq(wide.astype(jnp.bfloat16), bits=2)
    assert narrow.dtype == jnp.bfloat16
    assert all(len(np.unique(np.asarray(row, np.float32))) <= 4 for row in narrow)


def test_rounding_without_a_rounding_instruction_is_half_to_even():
    drawn = np.random.default_rng(0).normal(0, 100, 500)
    x = np.concatenate([np.arange(-300, 300) / 2, drawn, [-0.0, 1e6 + 0.5, -(2.0**22)]]).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(half_even)(x), np.round(x))


def test_the_gradients_of_lsq_are_those_written_down():
    x, g = jnp.asarray([[0.3, -0.2, 1.4, -5.0, 9.0, 0.9]]), jnp.arange(6.0)
    run = functools.partial(lsq, x, bits=3)
    _, pull = jax.vjp(lambda x, s: lsq(x, s, bits=3), x, jnp.ones(1))
    dx, ds = pull(g[None])
    np.testing.assert_array_equal(dx, [[0, 1, 2, 0, 0, 5]])
    slope = np.asarray([0 - 0.3, 0 + 0.2, 1 - 1.4, -4, 3, 1 - 0.9])
    np.testing.assert_allclose(ds, [(g * slope).sum()], rtol=1e-5)
    # Where numbers are clipped nothing is estimated: finite differences agree.
    numeric = (run(jnp.asarray([1.01])) - run(jnp.asarray([0.99]))) / 0.02
    np.testing.assert_allclose(numeric[0, 3:5], slope[3:5], rtol=1e-4)


@pytest.mark.parametrize(
    ("impl", "shape", "axis"),
    [
        ("tpu", (37, 96), -1),
        ("tpu", (96, 200), -2),
        ("tpu", (2, 24, 40), -2),
        ("gpu", (37, 96), -1),
        ("gpu", (5, 3, 130), -1),
    ],
)
def test_kernels_equal_the_reference(impl, shape, axis):
    w, upstream = normal(*shape), normal(*shape, seed=1)
    s = 0.2 + jax.random.uniform(jax.random.key(2), tuple(np.delete(shape, axis)))

    @functools.partial(jax.jit, static_argnums=0)
    def run(impl, w, s, upstream):
        how = {"impl": impl, "interpret": impl != "jnp", "axis": axis}
        return (
            with_gradients(functools.partial(statsq, bits=3, **how), w, upstream=upstream),
            with_gradients(functools.partial(lsq, bits=3, signed=False, **how), w, s, upstream=upstream),
        )

    (y, dw), (z, dx, ds) = run(impl, w, s, upstream)
    (y1, dw1), (z1, dx1, ds1) = run("jnp", w, s, upstream)
    np.testing.assert_array_equal(dw, dw1)
    assert_near(y, y1, 1.0)
    assert_near(z, z1, 1.2)
    np.testing.assert_array_equal(dx, dx1)
    np.testing.assert_allclose(ds, ds1, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_kernels_round_groups_as_the_reference(impl, symmetric):
    for dtype, group in ((jnp.float32, 32), (jnp.bfloat16, 48)):
        w = normal(7, 96, dtype=dtype).at[2].set(0.75)
        run = functools.partial(round_groups, w, bits=4, group=group, symmetric=symmetric)
        got = run(impl=impl, interpret=True)
        assert got.dtype == dtype
        assert_near(got, run(), 0.6)


@pytest.mark.parametrize("sizes", [(4096, 4096, jnp.bfloat16), (33, 288, jnp.float32)])
@pytest.mark.parametrize(("impl", "call"), [("tpu", "tpu_custom_call"), ("gpu", "triton")])
def test_kernels_lower_for_their_platform_without_it(impl, call, sizes):
    n, width, dtype = sizes
    x, s = jax.ShapeDtypeStruct((n, width), dtype), jax.ShapeDtypeStruct((n, 1), jnp.float32)
    module = KERNELS[impl]

    def every(x, s):
        return (
            module.statsq(x, bits=2, axis=1),
            module.round_groups(x, bits=4, symmetric=False),
            module.lsq(x, s, low=-2, high=1, axis=1),
            module.lsq_backward(x, s, x, low=-2, high=1, axis=1),
        )

    assert lowered(every, x, s, impl=impl).count(f"{call}") >= 4
    if impl == "tpu":
        down = jax.ShapeDtypeStruct((1, width), jnp.float32)
        assert call in lowered(functools.partial(module.statsq, bits=2, axis=0), x, impl=impl)
        assert call in lowered(lambda x, s: module.lsq_backward(x, s, x, low=0, high=3, axis=0), x, down, impl=impl)


def test_what_the_kernels_do_not_take_is_said():
    w = normal(4, 64)
    assert choose(w).impl == "jnp" and "cpu" in choose(w, axis=-2).reason
    with pytest.raises(NotImplementedError, match="takes float32 and bfloat16, not float16"):
        statsq(w.astype(jnp.float16), bits=2, impl="tpu", interpret=True)
    with pytest.raises(NotImplementedError, match="side by side in memory"):
        statsq(w, bits=3, axis=-2, impl="gpu", interpret=True)
    assert "at most 8192" in gpu.refusal((4, 10_000), jnp.dtype("float32"), 1)
    assert "whole rows" in tpu.refusal((4, 30_000), jnp.dtype("float32"), 1)
    assert "empty" in gpu.refusal((0, 4), jnp.dtype("float32"), 1)


def test_bad_arguments_are_refused():
    w = normal(4, 64)
    for call, error, message in (
        (lambda: statsq(w, bits=9), ValueError, "bits must be between 2 and 8, got 9"),
        (lambda: lsq(w, jnp.ones(4), bits=1), ValueError, "bits must be"),
        (lambda: statsq(w, bits=2, axis=0), ValueError, "axis must be -1 or -2, got 0"),
        (lambda: statsq(w[0], bits=2), ValueError, r"at least two axes, got \(64,\)"),
        (lambda: statsq(w.at[1, 2].set(jnp.inf), bits=2), ValueError, "not finite"),
        (lambda: statsq(w.at[2].set(0), bits=2), ValueError, r"row 2 of w \(4, 64\) is all zero"),
        (lambda: statsq(w.astype(int), bits=2), TypeError, "must be floating, got int32"),
        (lambda: round_groups(w, bits=4, group=48), ValueError, r"must divide the last axis of w \(4, 64\), got 48"),
        (lambda: lsq(w, jnp.ones(4, int), bits=2), TypeError, "s must be floating"),
        (lambda: lsq(w, jnp.zeros(4), bits=2), ValueError, "was it initialised"),
        (lambda: lsq(w, jnp.ones(4), bits=2, impl="triton"), ValueError, "impl must be one of"),
    ):
        with pytest.raises(error, match=message):
            call()
    dead = statsq(w.at[2].set(0), bits=2, allow_dead=True)
    assert 0 < dead[2, 0] < 1e-8 and (dead[0] == statsq(w, bits=2)[0]).all()


def test_the_floor_is_one_read_and_one_write():
    assert cost.forward_cost(10**6, 2).bytes == 4 * 10**6
    assert cost.backward_cost(10**6, 2, 1000).bytes == 6 * 10**6 + 8000
