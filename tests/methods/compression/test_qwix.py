"""Our grids against qwix where it has the same: asymmetric with 0 on the grid, in groups of inputs or of outputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.methods.compression.rounding import quantise, quantise_activations

qwix = pytest.importorskip("qwix")

pytestmark = pytest.mark.oracle

KERNEL = jax.random.normal(jax.random.key(0), (64, 48)) * jnp.exp(jax.random.normal(jax.random.key(1), (64, 1)))
TYPES = {4: jnp.int4, 8: jnp.int8}


@pytest.mark.parametrize("bits", TYPES)
@pytest.mark.parametrize(("axis", "group"), [("oc", 16), ("oc", 64), ("ic", 12), ("ic", 48)])
def test_groups_of_inputs_and_of_outputs(bits, axis, group):
    along = 0 if axis == "oc" else 1
    theirs = qwix.quantize(
        KERNEL, TYPES[bits], channelwise_axes=(1 - along,), tiled_axes={along: group}, calibration_method="minmax"
    )
    ours = quantise(KERNEL, bits=bits, group=group, axis=axis, include_zero=True)
    np.testing.assert_array_equal(ours.scales, theirs.scale)
    # Their codes begin at -2^(b-1), ours at 0.
    np.testing.assert_array_equal(ours.codes, theirs.qvalue.astype(jnp.int32) + 2 ** (bits - 1))
    np.testing.assert_allclose(ours.dequantise(), qwix.dequantize(theirs), rtol=1e-6)


def test_activations_per_token():
    x = 3 * KERNEL[:, :32] + 1
    theirs = qwix.quantize(x, jnp.int8, channelwise_axes=(0,), calibration_method="minmax")
    np.testing.assert_allclose(
        quantise_activations(x, bits=8, symmetric=False), qwix.dequantize(theirs), rtol=1e-5, atol=1e-6
    )
