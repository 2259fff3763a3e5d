"""Grids, GPTQ and LoRC against reference outputs (12, 23, 26), limiting cases and invariants."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlab.methods.compression.gptq import gptq, hessian
from mechlab.methods.compression.low_rank import compensate, lorc
from mechlab.methods.compression.rounding import find_grid, nearest, quantise, quantise_activations
from mechlab.models.layers import linear

KERNEL = jax.random.normal(jax.random.key(0), (24, 20)) * jnp.linspace(0.1, 3, 24)[:, None]
X = jax.random.normal(jax.random.key(1), (200, 24)) @ (jnp.eye(24) + 0.3 * jnp.ones((24, 24)))


def ours(array):
    """Stored matrices are (out, in)."""
    return jnp.asarray(np.asarray(array).T, jnp.float32)


def of(quantised):
    return np.asarray(quantised.dequantise()).T


def mse(stored, quantised, x):
    error = np.asarray(x) @ (np.asarray(stored).T - np.asarray(quantised.dequantise()))
    return float((error**2).mean())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["sym", "asym"])
@pytest.mark.parametrize("per", ["row", "fgq"])
def test_grids_of_weights_are_those_of_the_vectors(vectors, bits, kind, per):
    v = vectors("zeroquant_v2")
    options = {"symmetric": True} if kind == "sym" else {"include_zero": True}
    got = quantise(ours(v["w"]), bits=bits, group=int(v["group"]) if per == "fgq" else None, **options)
    np.testing.assert_allclose(of(got), v[f"rtn_{kind}_{per}_b{bits}"], atol=2e-6)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_plain_asymmetric_grid_is_awq_s(vectors, bits):
    v = vectors("awq")
    got = quantise(ours(v["w_down_proj"]), bits=bits, group=int(v["group"]))
    np.testing.assert_allclose(of(got), v[f"rtn_b{bits}"], atol=2e-6)
    np.testing.assert_allclose(np.asarray(got.scales).T, v[f"rtn_scale_b{bits}"], rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(got.zeros).T, v[f"rtn_zero_b{bits}"])


@pytest.mark.parametrize("bits", [3, 4])
def test_groups_along_either_axis_are_adadim_s(vectors, bits):
    v = vectors("adadim")
    for axis in ("oc", "ic"):
        got = quantise(ours(v["w"]), bits=bits, group=int(v["group"]), axis=axis)
        np.testing.assert_allclose(of(got), v[f"rtn_{axis}_b{bits}"], atol=2e-6)
        np.testing.assert_allclose(mse(v["w"], got, v["x"]), v[f"mse_rtn_{axis}_b{bits}"], rtol=1e-4)


def test_a_group_of_one_sign_tells_the_grids_apart():
    w = jnp.asarray([[1.0], [1.1], [1.2], [1.3]])
    plain, with_zero = (quantise(w, bits=3, include_zero=zero) for zero in (False, True))
    # The plain grid's zero is clipped, and its largest number is far below the smallest weight.
    assert float(plain.dequantise().max()) < 0.31
    assert float(jnp.abs(with_zero.dequantise() - w).max()) <= float(with_zero.scales.max()) / 2 + 1e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_are_rounded_as_in_the_vectors(vectors, bits):
    v = vectors("zeroquant_v2")
    for name, options in (
        ("token_sym", {}),
        ("token_asym", {"symmetric": False}),
        ("block_asym", {"symmetric": False, "mode": "group", "group": int(v["group"])}),
    ):
        got = quantise_activations(v["x"].astype(np.float32), bits=bits, **options)
        np.testing.assert_allclose(got, v[f"act_{name}_b{bits}"], atol=5e-6)


def test_activations_of_tokens_do_not_see_each_other():
    x = jax.random.normal(jax.random.key(2), (5, 16)) * jnp.asarray([1, 10, 0.1, 3, 0])[:, None]
    got = quantise_activations(x, bits=8)
    np.testing.assert_array_equal(got[::-1], quantise_activations(x[::-1], bits=8))
    assert not np.asarray(got[4]).any()
    np.testing.assert_array_equal(quantise_activations(x, bits=16), x)
    assert float(jnp.abs(quantise_activations(x, bits=8, mode="tensor")[2] - x[2]).max()) > float(
        jnp.abs(got[2] - x[2]).max()
    )


@given(scale=st.floats(0.01, 50), seed=st.integers(0, 9))
def test_an_input_with_steps_of_its_own_does_not_mind_its_size(scale, seed):
    w = jax.random.normal(jax.random.key(seed), (6, 8))
    sizes = jnp.asarray([1, scale, 1, 1, 1, 1.0])[:, None]
    got, scaled = (quantise(x, bits=4, axis="ic").dequantise() for x in (w, w * sizes))
    np.testing.assert_allclose(scaled, got * sizes, rtol=2e-4, atol=1e-6)
    transposed = quantise(w.T, bits=4, axis="ic", group=3)
    np.testing.assert_array_equal(transposed.dequantise().T, quantise(w, bits=4, axis="oc", group=3).dequantise())


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("axis", ["oc", "ic"])
@pytest.mark.parametrize("order", ["noact", "act"])
def test_gptq_is_adadim_s(vectors, bits, axis, order):
    v = vectors("adadim")
    options = {"static_groups": True} if axis == "oc" else {}
    got = gptq(
        ours(v["w"]), v["hessian"], bits=bits, group=int(v["group"]), axis=axis, act_order=order == "act", **options
    )
    wanted = v[f"gptq_{axis}_{order}_b{bits}"]
    assert (np.abs(of(got) - wanted) < 1e-3).mean() >= 0.995
    np.testing.assert_allclose(mse(v["w"], got, v["x"]), v[f"mse_gptq_{axis}_{order}_b{bits}"], rtol=0.01)


@pytest.mark.parametrize("per", ["row", "fgq"])
def test_gptq_with_groups_that_follow_is_zeroquant_s(vectors, per):
    v = vectors("zeroquant_v2")
    found = hessian(v["x"].astype(np.float32))
    np.testing.assert_allclose(found, v["hessian"], rtol=1e-4, atol=1e-5)
    got = gptq(ours(v["w"]), v["hessian"], bits=4, group=int(v["group"]) if per == "fgq" else None)
    assert (np.abs(of(got) - v[f"gptq_asym_{per}_b4"]) < 1e-3).mean() >= 0.995
    np.testing.assert_allclose(mse(v["w"], got, v["x"]), v[f"mse_gptq_asym_{per}_b4"], rtol=0.01)


@pytest.mark.parametrize(
    "options", [{}, {"group": 8}, {"group": 8, "static_groups": True}, {"axis": "ic", "group": 10}]
)
def test_gptq_without_correlations_is_rounding(options):
    got = gptq(KERNEL, jnp.diag(jnp.linspace(1, 2, 24)), bits=4, include_zero=True, **options)
    plain = {name: value for name, value in options.items() if name != "static_groups"}
    np.testing.assert_allclose(
        got.dequantise(), quantise(KERNEL, bits=4, include_zero=True, **plain).dequantise(), atol=1e-5
    )


@pytest.mark.parametrize(
    "options", [{}, {"group": 8}, {"axis": "ic", "group": 10}, {"static_groups": True, "act_order": True}]
)
def test_gptq_lowers_the_error_of_the_output(options):
    got = gptq(KERNEL, hessian(X), bits=3, **options)
    plain = {name: value for name, value in options.items() if name in ("group", "axis")}
    error = [float(jnp.square(X @ (KERNEL - q.dequantise())).mean()) for q in (got, quantise(KERNEL, bits=3, **plain))]
    assert error[0] < error[1]


def test_many_blocks_give_what_one_gives(monkeypatch):
    import mechlab.methods.compression.gptq as module

    wanted = gptq(KERNEL, hessian(X), bits=4)
    monkeypatch.setattr(module, "BLOCK", 5)
    np.testing.assert_array_equal(gptq(KERNEL, hessian(X), bits=4).codes, wanted.codes)


def test_an_input_that_is_never_active_gets_no_weight():
    h = np.array(hessian(X.at[:, 3].set(0)))
    got = gptq(KERNEL, h, bits=4).dequantise()
    assert not np.asarray(got[3]).any() and np.isfinite(np.asarray(got)).all()


@pytest.mark.parametrize("base", ["rtn_asym_row_b4", "gptq_asym_fgq_b4"])
def test_what_lorc_adds_is_that_of_the_vectors(vectors, base):
    v = vectors("zeroquant_v2")
    error = ours(v["w"]) - ours(v[base])
    values = v[f"lorc_sv_{base}"]
    for rank in (1, 4, 8):
        a, b = lorc(error, rank)
        np.testing.assert_allclose(np.asarray(a @ b).T, v[f"lorc_m{rank}_{base}"], atol=1e-5)
        left = float(jnp.square(error - a @ b).sum())
        np.testing.assert_allclose(left, (values[rank:] ** 2).sum(), rtol=1e-3)


def test_a_weighted_factor_is_better_for_the_outputs_and_worse_for_the_weights():
    q = quantise(KERNEL, bits=3)
    error = KERNEL - q.dequantise()
    left = [error - a @ b for a, b in (lorc(error, 4), lorc(error, 4, hessian(X)))]
    assert float(jnp.square(left[0]).sum()) < float(jnp.square(left[1]).sum())
    assert float(jnp.square(X @ left[0]).sum()) > float(jnp.square(X @ left[1]).sum())


def test_a_compensated_kernel_runs_like_the_sum():
    kernel = jax.random.normal(jax.random.key(5), (4, 6, 10))
    q = quantise(kernel, bits=3, inputs=2)
    both = compensate(kernel, q, 3)
    x = jax.random.normal(jax.random.key(6), (2, 4, 6))
    a, b = lorc((kernel - q.dequantise()).reshape(24, 10), 3)
    wanted = x.reshape(2, 24) @ (q.dequantise().reshape(24, 10) + a @ b)
    np.testing.assert_allclose(linear(x, both, None, inputs=2), wanted, atol=1e-4)
    full = compensate(kernel, q, 10)
    np.testing.assert_allclose(linear(x, full, None, inputs=2), x.reshape(2, 24) @ kernel.reshape(24, 10), atol=1e-3)


@pytest.mark.parametrize(
    "options", [{"group": 8}, {"axis": "ic", "group": 10}, {"symmetric": True}, {"include_zero": True}]
)
def test_the_nearest_numbers_are_those_of_the_codes(options):
    kernel = KERNEL.reshape(4, 6, 20)
    both = nearest(kernel, bits=4, inputs=2, **options), quantise(kernel, bits=4, inputs=2, **options).dequantise()
    np.testing.assert_array_equal(*both)


def test_sixteen_levels_are_used_and_none_besides():
    codes = np.asarray(quantise(KERNEL, bits=4).codes)
    assert codes.min() == 0 and codes.max() == 15 and codes.dtype == np.uint8
    around = np.asarray(quantise(KERNEL, bits=4, symmetric=True).codes)
    assert around.dtype == np.int8 and np.abs(around).max() == 7
    assert find_grid(jnp.zeros((2, 3)), bits=4, symmetric=True).step.ravel().tolist() == [1, 1]


def test_what_makes_no_sense_is_refused():
    cases = [
        ({"bits": 9}, "between 2 and 8"),
        ({"bits": 4, "group": 5}, "24 inputs"),
        ({"bits": 4, "group": 6, "axis": "ic"}, "20 outputs"),
        ({"bits": 4, "axis": "row"}, '"oc" or "ic"'),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            quantise(KERNEL, **options)
        with pytest.raises(ValueError, match=message):
            gptq(KERNEL, jnp.eye(24), **options)
    with pytest.raises(TypeError, match="floating"):
        quantise(jnp.ones((2, 2), jnp.int32), bits=4)
    with pytest.raises(ValueError, match="not finite"):
        quantise(KERNEL.at[0, 0].set(jnp.nan), bits=4)
    with pytest.raises(ValueError, match="needs static_groups"):
        gptq(KERNEL, jnp.eye(24), bits=4, group=6, act_order=True)
    with pytest.raises(ValueError, match=r"wanted a Hessian \(24, 24\)"):
        gptq(KERNEL, jnp.eye(20), bits=4)
    with pytest.raises(ValueError, match="not symmetric"):
        gptq(KERNEL, jnp.triu(jnp.ones((24, 24))), bits=4)
    with pytest.raises(ValueError, match="take a larger one"):
        gptq(KERNEL, -jnp.ones((24, 24)), bits=4, damp=0.0)
    with pytest.raises(ValueError, match="token, group or tensor"):
        quantise_activations(X, bits=8, mode="row")
    with pytest.raises(ValueError, match="24 channels"):
        quantise_activations(X, bits=8, mode="group", group=7)
    with pytest.raises(ValueError, match=r"0\.\.20"):
        lorc(KERNEL, 21)
