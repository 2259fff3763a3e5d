"""The product of integers: stored vectors, exact sums, every kernel, and lowered for what is not here."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.kernels.w8a8 import choose, gpu, tpu, w8a8_matmul
from mechlab.kernels.w8a8.cost import cost
from tests.kernels.lowering import lowered

SHAPES = {
    "one_row": (1, 256, 128),
    "inputs_that_no_large_block_divides": (5, 1152, 128),
    "blocks_of_rows_and_outputs": (300, 128, 384),
    "several_blocks_of_inputs": (33, 2048, 256),
}
OLD = jax.__version_info__ < (0, 12)


def draw(m, k, n):
    keys = jax.random.split(jax.random.key(m + k + n), 5)
    x, w = (
        jax.random.randint(key, size, -128, 128, jnp.int8) for key, size in zip(keys, ((m, k), (k, n)), strict=False)
    )
    w_scale, x_scale = (
        jax.random.uniform(key, (size,), minval=0.1) for key, size in zip(keys[2:4], (n, m), strict=True)
    )
    return x, w, w_scale, x_scale, jax.random.normal(keys[4], (n,))


def exact(x, w):
    return np.asarray(x, np.int64) @ np.asarray(w, np.int64)


@pytest.mark.parametrize("bits", [8, 6])
def test_the_product_is_that_of_the_vectors(vectors, bits):
    v = vectors("outliertune")
    x, w = jnp.asarray(v[f"x_int_b{bits}"]), jnp.asarray(v[f"w_int_sym_b{bits}"]).T
    y = w8a8_matmul(x, w, jnp.asarray(v[f"w_scale_sym_b{bits}"]), bias=jnp.asarray(v["b_sym"]))
    assert y.shape == v[f"y_q_sym_b{bits}"].shape
    np.testing.assert_allclose(y, v[f"y_q_sym_b{bits}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", ["jnp", "tpu"])
def test_the_integer_part_is_exact_and_the_rest_one_rounding_each(impl, shape):
    x, w, w_scale, x_scale, bias = draw(*SHAPES[shape])
    run = functools.partial(w8a8_matmul, impl=impl, interpret=impl != "jnp")
    np.testing.assert_array_equal(run(x, w, jnp.ones(w.shape[1])), exact(x, w).astype(np.float32))
    wide = exact(x, w) * np.asarray(w_scale, np.float64) * np.asarray(x_scale, np.float64)[:, None]
    # Three roundings of half of 2^-23 each; the last one is of the sum.
    tolerance = 2 * 2.0**-23 * (np.abs(wide) + np.abs(np.asarray(bias)))
    got = run(x, w, w_scale, x_scale=x_scale, bias=bias)
    assert (np.abs(np.asarray(got, np.float64) - wide - np.asarray(bias)) <= tolerance).all()


@pytest.mark.parametrize("impl", ["jnp", "tpu"])
def test_the_largest_sums_do_not_overflow(impl):
    k = 131_072 if impl == "jnp" else 2048
    x = jnp.full((1, k), -128, jnp.int8)
    run = functools.partial(w8a8_matmul, impl=impl, interpret=impl != "jnp", w_scale=jnp.ones(128))
    assert (run(x, jnp.full((k, 128), 127, jnp.int8)) == -128.0 * 127 * k).all()
    if impl == "jnp":
        with pytest.raises(ValueError, match="more than 131072 products"):
            run(jnp.zeros((1, k + 1), jnp.int8), jnp.zeros((k + 1, 128), jnp.int8))


def test_narrow_outputs_are_rounded_once():
    x, w, w_scale, x_scale, bias = draw(7, 256, 128)
    run = functools.partial(w8a8_matmul, x, w, w_scale, x_scale=x_scale, bias=bias, impl="tpu", interpret=True)
    got = run(out_dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, run().astype(jnp.bfloat16))


@pytest.mark.skipif(OLD, reason="before jax 0.12 its interpreter of Mosaic GPU reads no transposed tile")
@pytest.mark.parametrize(("shape", "programs"), [((1, 256, 128), 264), ((70, 640, 128), 1)])
def test_the_gpu_kernel_gives_the_same_bits_as_the_reference(monkeypatch, shape, programs):
    # The inputs are split among programs, or, where fewer programs do, walked by one that scales its own sum.
    monkeypatch.setattr(gpu, "PROGRAMS", programs)
    x, w, w_scale, x_scale, bias = draw(*shape)
    run = jax.jit(
        lambda *arrays, impl: w8a8_matmul(
            *arrays[:3], x_scale=arrays[3], bias=arrays[4], impl=impl, interpret=impl == "gpu"
        ),
        static_argnames="impl",
    )
    np.testing.assert_array_equal(*(run(x, w, w_scale, x_scale, bias, impl=impl) for impl in ("gpu", "jnp")))


def test_leading_axes_vmap_and_gradients_of_the_scales():
    x, w, w_scale, x_scale, bias = draw(12, 128, 128)

    def run(x, w_scale, x_scale, bias, impl="jnp"):
        return w8a8_matmul(x, w, w_scale, x_scale=x_scale, bias=bias, impl=impl, interpret=impl != "jnp")

    flat = run(x, w_scale, x_scale, bias)
    np.testing.assert_array_equal(
        run(x.reshape(3, 4, 128), w_scale, x_scale.reshape(3, 4), bias).reshape(12, 128), flat
    )
    mapped = jax.vmap(functools.partial(run, impl="tpu"), (0, None, 0, None))
    stacked = mapped(x.reshape(3, 4, 128), w_scale, x_scale.reshape(3, 4), bias)
    np.testing.assert_allclose(stacked.reshape(12, 128), flat, rtol=1e-6, atol=1e-4)

    def loss(w_scale, x_scale, bias, impl):
        return (run(x, w_scale, x_scale, bias, impl) * jnp.arange(128)).sum()

    gradients = [jax.grad(loss, (0, 1, 2))(w_scale, x_scale, bias, impl) for impl in ("jnp", "tpu")]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    wanted = (exact(x, w) * np.asarray(x_scale)[:, None]).sum(0) * np.arange(128)
    np.testing.assert_allclose(gradients[0][0], wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("sizes", [(1, 4096, 4096), (300, 1152, 11008 // 128 * 128), (2048, 4096, 1024)])
@pytest.mark.parametrize(("impl", "call"), [("tpu", "tpu_custom_call"), ("gpu", "mosaic_gpu")])
def test_kernels_lower_for_their_platform_without_it(impl, call, sizes):
    m, k, n = sizes
    shapes = [((m, k), jnp.int8), ((k, n), jnp.int8), *(((size), jnp.float32) for size in ((1, n), (m, 1), (1, n)))]
    run = functools.partial({"tpu": tpu, "gpu": gpu}[impl].matmul, out_dtype=jnp.dtype("bfloat16"))
    assert call in lowered(run, *(jax.ShapeDtypeStruct(*shape) for shape in shapes), impl=impl)


def test_what_the_kernels_do_not_take_is_said():
    x, w, w_scale, *_ = draw(4, 96, 128)
    assert choose(x, w).impl == "jnp" and "cpu" in choose(x, w).reason
    for impl in ("tpu", "gpu"):
        with pytest.raises(NotImplementedError, match="multiples of 128 inputs"):
            w8a8_matmul(x, w, w_scale, impl=impl, interpret=True)
    with pytest.raises(NotImplementedError, match="writes float32 and bfloat16, not float16"):
        w8a8_matmul(x, w, w_scale, impl="tpu", interpret=True, out_dtype=jnp.float16)
    assert w8a8_matmul(x[:0], w, w_scale).shape == (0, 128)


def test_bad_arguments_are_refused():
    x, w, w_scale, x_scale, _ = draw(4, 128, 128)
    for arguments, error, message in (
        ((x.astype(jnp.int32), w, w_scale), TypeError, "x must be int8, got int32"),
        ((x, w.astype(jnp.uint8), w_scale), TypeError, "w must be int8, got uint8"),
        ((x, w, w_scale.astype(int)), TypeError, "w_scale must be floating"),
        ((x[:, :64], w, w_scale), ValueError, r"x must end in the inputs of w"),
        ((x, w, w_scale[:-1]), ValueError, r"w_scale must be \(128,\), got \(127,\)"),
        ((x, w, w_scale.at[3].set(0)), ValueError, "w_scale must be positive and finite"),
        ((x, w, w_scale.at[3].set(jnp.nan)), ValueError, "w_scale must be positive and finite"),
    ):
        with pytest.raises(error, match=message):
            w8a8_matmul(*arguments)
    with pytest.raises(ValueError, match=r"x_scale must be \(4,\), got \(3,\); bias must be"):
        w8a8_matmul(x, w, w_scale, x_scale=x_scale[:3], bias=w_scale[:3])
    with pytest.raises(TypeError, match="out_dtype must be floating, got int32"):
        w8a8_matmul(x, w, w_scale, out_dtype=jnp.int32)
    with pytest.raises(ValueError, match="impl must be one of"):
        w8a8_matmul(x, w, w_scale, impl="triton")


def test_the_floor_is_half_that_of_bfloat16_at_one_row():
    assert cost(1, 4096, 4096).bytes / (2 * 4096**2) == pytest.approx(0.5, abs=0.001)
