"""The norm that emits integers: stored vectors, its place before the product, every kernel."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.kernels.norm_int8 import choose, gpu, norm_int8, tpu
from mechlab.kernels.w8a8 import w8a8_matmul
from tests.kernels.lowering import lowered

SHAPES = [(1, 32), (37, 96), (70, 1500)]


def draw(n, width, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(n + width), 3)
    x = (3 * jax.random.normal(keys[0], (n, width)) + 1).astype(dtype)
    return x, 40 * jax.random.uniform(keys[1], (width,)), 5 * jax.random.normal(keys[2], (width,))


def assert_same_codes(got, wanted):
    """Equal, but for a few that lie between two codes up to the last bits of a sum."""
    apart = np.abs(np.asarray(got, int) - np.asarray(wanted, int))
    assert got.shape == wanted.shape and got.dtype == jnp.int8
    assert apart.max(initial=0) <= 1 and (apart > 0).mean() < 1e-3


@pytest.mark.parametrize("bits", [8, 6])
def test_codes_and_products_are_those_of_the_vectors(vectors, bits):
    v = vectors("outliertune")
    step = v[f"s_x_b{bits}"]
    codes = norm_int8(
        *(jnp.asarray(a) for a in (v["h"], v["gamma"] / step, v["beta_sym"] / step)), centred=True, bits=bits
    )
    assert_same_codes(codes, v[f"x_int_b{bits}"])
    w, w_scale = jnp.asarray(v[f"w_int_sym_b{bits}"]).T, jnp.asarray(v[f"w_scale_sym_b{bits}"])
    y = w8a8_matmul(codes, w, w_scale, bias=jnp.asarray(v["b_sym"]))
    # One code off is at most one step of one weight, and at 6 bits the product is within some percent of the exact one.
    assert np.abs(y - v[f"y_q_sym_b{bits}"]).max() <= float((w_scale * jnp.abs(w.astype(int)).max(0)).max()) + 1e-4
    assert np.abs(y - v["y_sym"]).mean() < {8: 0.01, 6: 0.05}[bits] * np.abs(v["y_sym"]).max()


@pytest.mark.parametrize("centred", [True, False])
def test_it_is_the_norm_in_float64(centred):
    x, gain, bias = draw(20, 64)
    z = np.asarray(x, np.float64)
    z = z - z.mean(-1, keepdims=True) if centred else z
    z = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5)
    for bits in (8, 6, 3):
        wanted = np.clip(np.round(z * np.asarray(gain) + np.asarray(bias)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert_same_codes(norm_int8(x, gain, bias, centred=centred, bits=bits), wanted)
    assert_same_codes(norm_int8(x, gain, centred=centred), np.clip(np.round(z * np.asarray(gain)), -128, 127))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("impl", ["tpu", "gpu"])
def test_kernels_equal_the_reference(impl, centred, shape):
    for dtype in (jnp.float32, jnp.bfloat16):
        run = functools.partial(norm_int8, *draw(*shape, dtype), centred=centred, bits=6)
        assert_same_codes(run(impl=impl, interpret=True), run())


def test_leading_axes_vmap_and_nothing_at_all():
    x, gain, bias = draw(12, 64)
    run = functools.partial(norm_int8, centred=True)
    codes = run(x, gain, bias)
    np.testing.assert_array_equal(run(x.reshape(3, 4, 64), gain, bias).reshape(12, 64), codes)
    mapped = jax.vmap(lambda x: run(x, gain, bias, impl="tpu", interpret=True))(x.reshape(3, 4, 64))
    assert_same_codes(mapped.reshape(12, 64), codes)
    assert run(x[:0], gain, bias).shape == (0, 64)


@pytest.mark.parametrize("sizes", [(1, 4096, jnp.bfloat16), (2048, 4096, jnp.bfloat16), (33, 288, jnp.float32)])
@pytest.mark.parametrize(("impl", "call"), [("tpu", "tpu_custom_call"), ("gpu", "triton")])
def test_kernels_lower_for_their_platform_without_it(impl, call, sizes):
    n, width, dtype = sizes
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in (((n, width), dtype), *[((width,), jnp.float32)] * 2)]
    run = functools.partial({"tpu": tpu, "gpu": gpu}[impl].norm, bits=8, centred=True, eps=1e-5)
    assert call in lowered(run, *arguments, impl=impl)


def test_what_the_kernels_do_not_take_is_said():
    x, gain, bias = draw(4, 64)
    assert choose(x).impl == "jnp" and "cpu" in choose(x).reason
    with pytest.raises(NotImplementedError, match="takes float32 and bfloat16, not float16"):
        norm_int8(x.astype(jnp.float16), gain, bias, centred=True, impl="tpu", interpret=True)
    assert "at most 8192 numbers" in gpu.refusal(1, 10_000, jnp.dtype("float32"))
    assert "2^31" in gpu.refusal(2**20, 4096, jnp.dtype("float32"))
    assert "whole rows" in tpu.refusal(1, 30_000, jnp.dtype("float32"))


def test_bad_arguments_are_refused():
    x, gain, bias = draw(4, 64)
    with pytest.raises(ValueError, match=r"gain must be \(64,\) for x \(4, 64\), got \(63,\); bits must be between"):
        norm_int8(x, gain[:-1], bias, centred=True, bits=9)
    with pytest.raises(TypeError, match="x must be floating, got int32"):
        norm_int8(x.astype(int), gain, bias, centred=True)
    with pytest.raises(ValueError, match="bias must be"):
        norm_int8(jnp.float32(1), gain, bias, centred=False)
