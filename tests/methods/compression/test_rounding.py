"""Rounding to a symmetric grid, and models that run on what it gives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlab.core import select
from mechlab.core.kernel_forms import QTensor
from mechlab.methods.circuits.direct import direct_attribution
from mechlab.methods.circuits.patching import patch_residual
from mechlab.methods.compression.rounding import quantise
from mechlab.models.generate import generate
from tests.models.test_transformer_kinds import build

KERNEL = jax.random.normal(jax.random.key(0), (12, 4, 5))


def quantised(params: Any, bits: int = 8) -> Any:
    """Every kernel of the blocks rounded, layer by layer."""

    def rounded(inputs: int) -> Any:
        return jax.vmap(lambda kernel: quantise(kernel, bits=bits, symmetric=True, inputs=inputs))

    params = select.map_at(params, "blocks/attn/[qkv]/kernel|blocks/mlp/*/kernel", rounded(1))
    return select.map_at(params, "blocks/attn/o/kernel", rounded(2))


def dequantised(params: Any) -> Any:
    is_quantised = lambda x: isinstance(x, QTensor)  # noqa: E731
    return jax.tree.map(lambda x: x.dequantise() if is_quantised(x) else x, params, is_leaf=is_quantised)


@settings(max_examples=20, deadline=None)
@given(bits=st.integers(2, 8), group=st.sampled_from([1, 3, 12]), seed=st.integers(0, 9))
def test_no_weight_moves_by_more_than_half_a_step_and_the_grid_is_a_fixed_point(
    bits: int, group: int, seed: int
) -> None:
    kernel = jax.random.normal(jax.random.key(seed), (12, 4, 5))
    q = quantise(kernel, bits=bits, group=group, symmetric=True)
    assert q.scales.shape == (12 // group, 20)
    assert int(jnp.abs(q.codes).max()) <= 2 ** (bits - 1) - 1
    steps = np.repeat(q.scales, group, 0).reshape(kernel.shape)
    assert (np.abs(q.dequantise() - kernel) <= steps / 2 * (1 + 1e-5)).all()
    again = quantise(q.dequantise(), bits=bits, group=group, symmetric=True)
    np.testing.assert_array_equal(again.codes, q.codes)


def test_groups_along_either_axis_and_zeros() -> None:
    codes = jnp.arange(24, dtype=jnp.int8).reshape(4, 6)
    scales, zeros = jnp.asarray([[1.0, 2.0, 3.0]]), jnp.asarray([[0.0, 1.0, 2.0]])
    got = QTensor(codes, scales, zeros, shape=(4, 2, 3)).dequantise()
    wanted = (np.arange(24).reshape(4, 6) - [0, 0, 1, 1, 2, 2]) * [1, 1, 2, 2, 3, 3]
    np.testing.assert_array_equal(got, wanted.reshape(4, 2, 3))


def test_a_group_of_zeros_stays_zero() -> None:
    q = quantise(jnp.zeros((4, 2)), bits=4, symmetric=True)
    assert not np.asarray(q.dequantise()).any() and np.isfinite(q.scales).all()


@pytest.mark.parametrize("kind", ["neox", "mistral", "gemma2"])
def test_a_quantised_decoder_generates_like_one_with_the_rounded_kernels(kind: str) -> None:
    model, params = build(kind)
    prompts, lengths = np.asarray([[3, 1, 4, 1, 5], [9, 2, 7, 7, 7]], np.int32), np.asarray([5, 2])
    q = quantised(params)
    assert sum(isinstance(x, QTensor) for x in jax.tree.leaves(q, is_leaf=lambda x: isinstance(x, QTensor))) >= 4
    out = generate(model, {"params": q}, prompts, lengths, steps=6)
    plain = generate(model, {"params": dequantised(q)}, prompts, lengths, steps=6)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_allclose(out.logits, plain.logits, atol=1e-5)
    exact = generate(model, {"params": params}, prompts, lengths, steps=6)
    assert np.abs(out.logits - exact.logits).max() > 1e-4


def test_a_quantised_decoder_can_be_patched_and_attributed() -> None:
    model, params = build("mistral")
    q = quantised(params)
    tokens, other = jnp.asarray([[3, 1, 4, 1]]), jnp.asarray([[9, 1, 4, 1]])
    metric = lambda logits: logits[:, 2] - logits[:, 5]  # noqa: E731

    def both(params: Any) -> Any:
        _, acts = model.capture({"params": params}, other, sites=("resid_pre",))
        return (
            patch_residual(model, params, tokens, acts["resid_pre"], metric),
            direct_attribution(model, params, tokens, jnp.asarray([2, 5])).heads,
        )

    for got, wanted in zip(both(q), both(dequantised(q)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize(("options", "message"), [({"bits": 9}, "between 2 and 8"), ({"group": 5}, "12 inputs")])
def test_bad_grids_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantise(KERNEL, **{"bits": 8, "symmetric": True} | options)
    with pytest.raises(ValueError, match="do not make a kernel"):
        QTensor(jnp.zeros((4, 6), jnp.int8), jnp.ones((3, 6)), shape=(4, 6)).dequantise()
