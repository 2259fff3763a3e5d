"""The packed product: its layout, every kernel against float64, and lowered for what is not here."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlab.kernels.w4a16 import Packed4, choose, gpu, pack, pack_int4, tpu, unpack_int4, w4a16_matmul
from mechlab.kernels.w4a16.cost import cost
from mechlab.methods.compression.rounding import quantise
from tests.kernels.lowering import lowered

SHAPES = {
    "one_row": (1, 256, 128, 64),
    "groups_of_32_share_a_block": (5, 256, 256, 32),
    "many_blocks_of_inputs": (16, 2048, 128, 128),
    "rows_are_padded": (37, 128, 384, 64),
}


def draw(m, k, n, group, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(m + k + n), 2)
    x = jax.random.normal(keys[0], (m, k)).astype(dtype)
    return x, pack(quantise(jax.random.normal(keys[1], (k, n)), bits=4, group=group))


def exact(x, kernel):
    codes = np.asarray(unpack_int4(kernel.bytes, kernel.block), np.float64)
    scales, zeros = (np.repeat(np.asarray(a, np.float64), kernel.group, 0) for a in (kernel.scales, kernel.zeros))
    return np.asarray(x, np.float64) @ ((codes - zeros) * scales)


def test_the_layout_and_the_product_are_those_of_the_vectors(vectors):
    v = vectors("awq")
    block = 2 * v["pack_bytes"].shape[0] // v["mm_scale"].shape[0]
    np.testing.assert_array_equal(pack_int4(v["pack_q"], block), v["pack_bytes"])
    np.testing.assert_array_equal(unpack_int4(v["pack_bytes"], block), v["pack_q"])
    kernel = Packed4(
        *(jnp.asarray(v[name]) for name in ("pack_bytes", "mm_scale", "mm_zero")), block=block, shape=v["pack_q"].shape
    )
    np.testing.assert_allclose(
        w4a16_matmul(jnp.asarray(v["mm_x"], jnp.float32), kernel), v["mm_y"], rtol=1e-4, atol=1e-5
    )


@settings(max_examples=10)
@given(block=st.sampled_from([2, 4, 8]), blocks=st.integers(1, 4), columns=st.integers(1, 5), seed=st.integers(0, 9))
def test_packing_loses_nothing(block, blocks, columns, seed):
    codes = np.random.default_rng(seed).integers(0, 16, (2, block * blocks, columns))
    packed = pack_int4(codes, block)
    assert packed.shape == (2, block * blocks // 2, columns) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack_int4(packed, block), codes)


def test_a_packed_kernel_is_the_quantised_one():
    q = quantise(jax.random.normal(jax.random.key(0), (2, 64, 4, 8)), bits=4, group=32, inputs=2)
    packed = pack(q)
    assert packed.block == 64 and packed.group == 32 and packed.bytes.size * 2 == q.codes.size
    np.testing.assert_array_equal(packed.dequantise(), q.dequantise())
    stacked = jax.vmap(functools.partial(quantise, bits=4, group=16))(jax.random.normal(jax.random.key(1), (3, 32, 8)))
    np.testing.assert_array_equal(pack(stacked).dequantise(), stacked.dequantise())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_equals_the_product_in_float64(shape):
    x, kernel = draw(*SHAPES[shape])
    got = w4a16_matmul(x, kernel, impl="tpu", interpret=True)
    wanted = exact(x, kernel)
    tolerance = 1e-5 * np.sqrt(x.shape[1])
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    np.testing.assert_allclose(w4a16_matmul(x, kernel), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def test_bfloat16_codes_are_exact_and_the_sum_is_rounded_once():
    x, kernel = draw(8, 256, 128, 64, jnp.bfloat16)
    got = w4a16_matmul(x, kernel, impl="tpu", interpret=True)
    assert got.dtype == jnp.bfloat16
    wanted = exact(x.astype(jnp.float32), kernel)
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, rtol=2**-8 + 1e-5, atol=1e-4 * np.abs(wanted).max())


def test_leading_axes_and_vmap():
    x, kernel = draw(12, 128, 128, 64)
    wanted = w4a16_matmul(x, kernel)
    np.testing.assert_array_equal(w4a16_matmul(x.reshape(3, 4, 128), kernel).reshape(12, 128), wanted)
    run = functools.partial(w4a16_matmul, kernel=kernel, impl="tpu", interpret=True)
    np.testing.assert_allclose(jax.vmap(run)(x.reshape(3, 4, 128)).reshape(12, 128), wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("sizes", "programs"), [((3, 256, 128, 32), 264), ((2, 640, 128, 64), 1), ((64, 256, 128, 128), 1)]
)
def test_the_gpu_kernel_equals_the_product_in_float64(monkeypatch, sizes, programs):
    # The inputs are split among programs, or, where fewer programs do, walked by one.
    monkeypatch.setattr(gpu, "PROGRAMS", programs)
    x, kernel = draw(*sizes, jnp.bfloat16)
    got = gpu.matmul(x, kernel.bytes, kernel.scales, kernel.zeros, block=kernel.block, interpret=True)
    wanted = exact(x.astype(jnp.float32), kernel)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.sqrt(x.shape[1]) * np.abs(wanted).max())


@pytest.mark.parametrize("sizes", [(1, 4096, 4096, 128), (16, 4096, 11008, 32), (64, 1024, 1152, 64)])
@pytest.mark.parametrize(
    ("impl", "dtype", "call"),
    [
        ("tpu", jnp.bfloat16, "tpu_custom_call"),
        ("tpu", jnp.float32, "tpu_custom_call"),
        ("gpu", jnp.bfloat16, "mosaic_gpu"),
    ],
)
def test_the_kernels_lower_for_their_platform_without_it(sizes, impl, dtype, call):
    m, k, n, group = sizes
    block = max(64, group)
    shapes = [
        ((m, k), dtype),
        ((k // 2, n), jnp.uint8),
        ((k // group, n), jnp.bfloat16),
        ((k // group, n), jnp.bfloat16),
    ]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    run = functools.partial({"tpu": tpu, "gpu": gpu}[impl].matmul, block=block)
    assert call in lowered(run, *arguments, impl=impl)


def test_the_kernels_are_differentiated_as_the_reference():
    x, kernel = draw(4, 128, 128, 64)

    def loss(x, kernel, impl):
        return (w4a16_matmul(x, kernel, impl=impl, interpret=impl != "jnp") * jnp.arange(128)).sum()

    got, wanted = (jax.grad(loss)(x, kernel, impl) for impl in ("tpu", "jnp"))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-3)


def test_the_floor_is_about_half_a_byte_a_weight():
    k, n = 4096, 11008
    assert cost(1, k, n, 128).bytes / (k * n) == pytest.approx(0.53, abs=0.01)
    assert cost(1, k, n, 32).bytes / (k * n) == pytest.approx(0.625, abs=0.01)


def test_what_the_kernel_does_not_take_is_said():
    x, kernel = draw(4, 192, 128, 96)
    assert choose(x, kernel).impl == "jnp" and "cpu" in choose(x, kernel).reason
    with pytest.raises(NotImplementedError, match="groups of 32, 64, 128"):
        w4a16_matmul(x, kernel, impl="tpu", interpret=True)
    with pytest.raises(NotImplementedError, match="this platform is cpu"):
        w4a16_matmul(x, kernel, impl="tpu")
    for dtype, message in ((jnp.float32, "bfloat16 and float16"), (jnp.bfloat16, "groups of 32, 64, 128 in blocks")):
        with pytest.raises(NotImplementedError, match=message):
            w4a16_matmul(x.astype(dtype), kernel, impl="gpu", interpret=True)
    wide, kernel = draw(80, 128, 128, 64)
    with pytest.raises(NotImplementedError, match="beyond 64 rows"):
        w4a16_matmul(wide, kernel, impl="tpu", interpret=True)
    np.testing.assert_allclose(w4a16_matmul(wide, kernel), exact(wide, kernel), atol=1e-2)


def test_bad_arguments_are_refused():
    x, kernel = draw(4, 128, 128, 64)
    for bad, message in ((x[:, :64], "must end in 128 inputs"), (x.astype(jnp.int32), "floating")):
        with pytest.raises((ValueError, TypeError), match=message):
            w4a16_matmul(bad, kernel)
    with pytest.raises(ValueError, match="impl must be one of"):
        w4a16_matmul(x, kernel, impl="triton")
    with pytest.raises(ValueError, match=r"0\.\.15, got 0\.\.16"):
        pack_int4(np.full((4, 1), 16) * np.asarray([[0], [1], [1], [1]]), 4)
    with pytest.raises(ValueError, match="even and divide"):
        pack_int4(np.zeros((6, 1)), 4)
    with pytest.raises(ValueError, match="asymmetric groups along the inputs"):
        pack(quantise(jnp.ones((8, 8)), bits=4, symmetric=True))
    with pytest.raises(ValueError, match="or twice that"):
        pack(quantise(jnp.ones((64, 8)), bits=4, group=16), block=64)
