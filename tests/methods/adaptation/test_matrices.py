"""Kernels as matrices and back, in every layout."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.methods.adaptation.matrices import add_to_matrices, get_matrices, put_matrices

PARAMS = {
    "attn": {
        "q": {"kernel": jnp.arange(2 * 6 * 2 * 3.0).reshape(2, 6, 2, 3)},
        "o": {"kernel": jnp.arange(2 * 2 * 3 * 6.0).reshape(2, 2, 3, 6)},
    },
    "up": {"kernel": jnp.ones((2, 6, 4))},
    "head": {"kernel": jnp.ones((6, 5), jnp.bfloat16)},
}


def test_heads_are_outputs_of_q_and_inputs_of_o():
    found = get_matrices(PARAMS, "**/kernel")
    assert {path: x.shape for path, x in found.items()} == {
        "attn/q/kernel": (2, 6, 6),
        "attn/o/kernel": (2, 6, 6),
        "up/kernel": (2, 6, 4),
        "head/kernel": (6, 5),
    }
    np.testing.assert_array_equal(found["attn/q/kernel"][1, 2, 4], PARAMS["attn"]["q"]["kernel"][1, 2, 1, 1])
    np.testing.assert_array_equal(found["attn/o/kernel"][1, 4, 2], PARAMS["attn"]["o"]["kernel"][1, 1, 1, 2])


def test_putting_back_restores_place_shape_and_dtype():
    matrices = get_matrices(PARAMS, "**/kernel")
    back = put_matrices(PARAMS, {path: x.astype(jnp.float32) for path, x in matrices.items()})
    assert back["head"]["kernel"].dtype == jnp.bfloat16
    for name in "qo":
        np.testing.assert_array_equal(back["attn"][name]["kernel"], PARAMS["attn"][name]["kernel"])
    moved = add_to_matrices(PARAMS, {"attn/o/kernel": jnp.ones((2, 6, 6))})
    np.testing.assert_array_equal(moved["attn"]["o"]["kernel"], PARAMS["attn"]["o"]["kernel"] + 1)
    assert moved["up"]["kernel"] is PARAMS["up"]["kernel"]


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r'"bias" must be a kernel.*got shape \(3,\)'):
        get_matrices({"bias": jnp.ones(3)}, "bias")
    with pytest.raises(KeyError, match="kernel"):
        get_matrices(PARAMS, "**/weights")
