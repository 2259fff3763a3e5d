"""The convolutional classifier against SciPy, with and without an edit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from mechlab.core.edits import Gate, Scale, at
from mechlab.models.cnn import CNNConfig, cnn
from tests.models.tiny import scrambled

MODEL = cnn(CNNConfig(size=(8, 4), channels=(3, 2), classes=5))
PARAMS = scrambled(jax.eval_shape(MODEL.init, jax.random.key(0)))
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(2, 32)), jnp.float32)


def by_hand(image: np.ndarray, factor: float = 1.0) -> np.ndarray:
    """Logits of one image; the second convolution's activations are multiplied by ``factor``."""
    x = np.asarray(image, np.float64).reshape(8, 4, 1)
    for layer in range(2):
        p = {name: np.asarray(leaf, np.float64) for name, leaf in PARAMS[f"conv_{layer}"].items()}
        maps = [
            sum(scipy.signal.correlate2d(x[..., i], p["kernel"][..., i, o], "same") for i in range(x.shape[-1]))
            for o in range(p["kernel"].shape[-1])
        ]
        x = np.maximum(np.stack(maps, -1) + p["bias"], 0) * (factor if layer == 1 else 1.0)
        height, width, channels = x.shape
        x = x.reshape(height // 2, 2, width // 2, 2, channels).max((1, 3))
    head = {name: np.asarray(leaf, np.float64) for name, leaf in PARAMS["head"].items()}
    return x.reshape(-1) @ head["kernel"] + head["bias"]


@pytest.mark.parametrize("factor", [1.0, 0.5, 2.0])
def test_logits_equal_scipy(factor: float) -> None:
    edits = at(MODEL.sites, "conv_act", Scale(jnp.float32(factor)), layer=1) if factor != 1 else {}
    wanted = np.stack([by_hand(image, factor) for image in IMAGES])
    got = MODEL.apply({"params": PARAMS, "edits": edits}, IMAGES)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_gate_reads_the_pre_activation() -> None:
    gate = at(MODEL.sites, "conv_act", Gate(jnp.float32(0.3), jnp.float32(1.0), hard=True), layer=0)
    variables = {"params": PARAMS, "edits": gate}
    _, acts = MODEL.capture(variables, IMAGES, sites=("conv_pre", "conv_act.0"))
    z = np.asarray(acts["conv_pre.0"])
    np.testing.assert_allclose(acts["conv_act.0"], np.where(z > 0.3, z, 0), rtol=1e-6)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be halved 3 times"):
        CNNConfig(size=(4, 8), channels=(2, 2, 2))
    with pytest.raises(ValueError, match=r"inputs must be \(B, 32\), got \(2, 31\)"):
        MODEL.apply({"params": PARAMS}, IMAGES[:, :31])
