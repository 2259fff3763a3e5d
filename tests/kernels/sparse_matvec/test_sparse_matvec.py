"""The sparse product: stored vectors, masks of every kind, every kernel, and lowered for what is not here."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.kernels.sparse_matvec import as_slabs, choose, gpu, sparse_matvec, tpu
from mechlab.kernels.sparse_matvec.cost import cost
from tests.kernels.lowering import lowered

LEVELS = ["0.25", "0.4", "0.5", "0.65"]


def draw(k, n, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(k + n), 2)
    return tuple(jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, ((k,), (k, n)), strict=True))


def exact(x, w, threshold):
    x, w = (np.asarray(array, np.float64) for array in (x, w))
    return np.where(np.abs(x) > np.asarray(threshold, np.float64), x, 0) @ w.reshape(len(w), -1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("method", ["wina", "teal"])
def test_errors_are_those_of_the_vectors_by_mask_and_by_threshold(vectors, method, level):
    v = vectors("wina")
    x, w = jnp.asarray(v["x"], jnp.float32)[1:], jnp.asarray(v["w_gate"], jnp.float32).T
    mask = v[f"mask_{method}_topk_s{level}"][1:].astype(bool)
    dense = np.asarray(v["x"][1:]) @ np.asarray(v["w_gate"]).T
    by_mask = sparse_matvec(jnp.where(mask, x, 0), w)
    np.testing.assert_allclose(
        np.linalg.norm(by_mask - dense, axis=1), v[f"err_{method}_s{level}"], rtol=1e-3, atol=1e-5
    )
    norm = np.asarray(v["col_norm_gate"]).reshape(-1) if method == "wina" else np.ones(len(w))
    for token in range(3):
        score = np.abs(np.asarray(v["x"])[1 + token]) * norm
        tau = (score[mask[token]].min() + score[~mask[token]].max()) / 2
        by_threshold = sparse_matvec(x[token], w, jnp.asarray(tau / norm, jnp.float32))
        np.testing.assert_allclose(by_threshold, by_mask[token], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("impl", "shape"), [("tpu", (40, 1024)), ("gpu", (100, 300))])
def test_kernels_equal_float64_whatever_is_on(impl, shape):
    x, w = draw(*shape)
    given = as_slabs(w) if impl == "tpu" else w
    run = jax.jit(functools.partial(sparse_matvec, impl=impl, interpret=True))
    one = jnp.full(len(x), jnp.inf).at[77 % len(x)].set(0)
    for threshold in (jnp.full(len(x), jnp.inf), jnp.zeros(len(x)), one, jnp.linspace(0, 2, len(x))):
        wanted = exact(x, w, threshold)
        for how in (run(x, given, threshold), sparse_matvec(x, w, threshold), sparse_matvec(x, given, threshold)):
            np.testing.assert_allclose(how, wanted, rtol=0, atol=1e-5 * np.sqrt(len(x)))


@pytest.mark.parametrize(("impl", "columns"), [("tpu", 2048), ("gpu", 130)])
def test_bfloat16_is_summed_in_float32_and_rounded_once(impl, columns):
    x, w = draw(24, columns, jnp.bfloat16)
    got = sparse_matvec(x, as_slabs(w) if impl == "tpu" else w, 0.5, impl=impl, interpret=True)
    assert got.dtype == jnp.bfloat16 and got.shape == (columns,)
    wanted = exact(x.astype(jnp.float32), w.astype(jnp.float32), 0.5)
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, rtol=2**-8 + 1e-5, atol=1e-4)


def test_signs_do_not_matter_and_leading_axes_do_not_mix():
    x, w = draw(64, 32)
    np.testing.assert_array_equal(sparse_matvec(-x, w, 0.7), -sparse_matvec(x, w, 0.7))
    both = jnp.stack([x, 2 * x])
    np.testing.assert_allclose(sparse_matvec(both, w, 0.7)[1], sparse_matvec(2 * x, w, 0.7), rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(lambda x: sparse_matvec(x, w, 0.7, impl="gpu", interpret=True))(both)
    np.testing.assert_allclose(mapped, sparse_matvec(both, w, 0.7), rtol=1e-5, atol=1e-5)


def test_the_gradient_takes_the_mask_for_a_constant():
    x, w = draw(16, 1024)

    def loss(x, w, impl):
        given = as_slabs(w) if impl == "tpu" else w
        return (sparse_matvec(x, given, 0.7, impl=impl, interpret=impl != "jnp") * jnp.arange(1024)).sum()

    on = np.abs(x) > 0.7
    wanted = np.where(on, np.asarray(w, np.float64) @ np.arange(1024), 0)
    outer = np.where(on, x, 0)[:, None] * np.arange(1024)
    for impl in ("jnp", "tpu", "gpu"):
        dx, dw = jax.grad(loss, (0, 1))(x, w, impl)
        np.testing.assert_allclose(dx, wanted, rtol=1e-4, atol=0.1)
        np.testing.assert_allclose(dw, outer, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(4096, 4096), (4096, 28672), (14336, 4096)])
def test_kernels_lower_for_their_platform_without_it(sizes):
    k, n = sizes
    x, t, w, slabs = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((1, k), jnp.bfloat16),
            ((k,), jnp.float32),
            ((k, n), jnp.bfloat16),
            ((k, n // 128, 128), jnp.bfloat16),
        )
    )
    assert "tpu_custom_call" in lowered(tpu.matvec, x, t, slabs, impl="tpu")
    assert "triton" in lowered(gpu.matvec, x, t, w, impl="gpu")


def test_what_the_kernels_do_not_take_is_said():
    x, w = draw(32, 256)
    assert choose(x, w).impl == "jnp" and "cpu" in choose(x, w).reason
    for impl, given, message in (
        ("tpu", (x, w), "takes w in slabs"),
        ("tpu", (x, as_slabs(w)), "N a multiple of 1024 in float32"),
        ("gpu", (jnp.stack([x, x]), w), "one vector, not 2"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            sparse_matvec(*given, impl=impl, interpret=True)
    assert "too long" in tpu.refusal(1, (4, 4096, 128), jnp.dtype("float32"))


def test_bad_arguments_are_refused():
    x, w = draw(32, 128)
    for arguments, error, message in (
        ((x.astype(int), w), TypeError, "x must be floating"),
        ((x, w.astype(jnp.bfloat16)), TypeError, "of one type, got float32 and bfloat16"),
        ((x[:9], w), ValueError, r"must end in the 32 inputs of w, got \(9,\)"),
        ((x, w[:, :, None]), ValueError, "w must be"),
        ((x, w, jnp.zeros(31)), ValueError, r"one number or \(32,\), got \(31,\)"),
        ((x, w, -1.0), ValueError, "must not be negative or NaN"),
        ((x, w, jnp.full(32, jnp.nan)), ValueError, "must not be negative or NaN"),
    ):
        with pytest.raises(error, match=message):
            sparse_matvec(*arguments)
    with pytest.raises(ValueError, match="multiple of 128 columns"):
        as_slabs(w[:, :100])


def test_the_floor_falls_with_the_density():
    assert cost(1024, 4096, 4096).bytes / cost(4096, 4096, 4096).bytes == pytest.approx(0.25, abs=0.01)
