"""Splicing: exact when nothing changes, NumPy otherwise; features clamp alone and sweep in one program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core.edits import at
from mechlab.methods.circuits.splice import SparseAutoencoder, init_autoencoder, splice
from tests.models import reference
from tests.models.tiny import CONFIGS, TOKENS, decoder


def autoencoder(top_k=None):
    rng = np.random.default_rng(0)
    shapes = ((16, 40), (40,), (40, 16), (16,))
    return SparseAutoencoder(*(jnp.asarray(rng.normal(0, 0.3, shape)) for shape in shapes), top_k)


def slow_encode(sae, x):
    x, w, b, d = (np.asarray(a, np.float64) for a in (x, sae.encoder, sae.encoder_bias, sae.decoder_bias))
    f = np.maximum((x - d) @ w + b, 0)
    if sae.top_k is not None:
        for row in f.reshape(-1, f.shape[-1]):
            row[np.argsort(-row, kind="stable")[sae.top_k :]] = 0
    return f


@pytest.mark.parametrize("top_k", [None, 4])
def test_features_and_reconstruction_equal_numpy(top_k):
    sae, x = autoencoder(top_k), np.random.default_rng(1).normal(size=(3, 5, 16))
    f = slow_encode(sae, x)
    np.testing.assert_allclose(sae.encode(jnp.asarray(x)), f, atol=1e-5)
    if top_k is not None:
        assert ((np.asarray(sae.encode(jnp.asarray(x))) > 0).sum(-1) == top_k).all()
    wanted = f @ np.asarray(sae.decoder, np.float64) + np.asarray(sae.decoder_bias)
    np.testing.assert_allclose(sae.decode(sae.encode(jnp.asarray(x))), wanted, atol=1e-4)


@pytest.mark.parametrize("top_k", [None, 4])
def test_with_the_error_added_back_the_run_is_the_original_to_the_bit(top_k):
    model, params = decoder("gpt2")
    plain = model.apply({"params": params}, TOKENS)
    edits = at(model.sites, "resid_post", splice(autoencoder(top_k)), layer=1)
    assert (model.apply({"params": params, "edits": edits}, TOKENS) == plain).all()
    lossy = at(model.sites, "resid_post", splice(autoencoder(top_k), keep_error=False), layer=1)
    assert not np.allclose(model.apply({"params": params, "edits": lossy}, TOKENS), plain, atol=0.1)


@pytest.mark.parametrize("keep_error", [True, False])
def test_a_clamped_feature_equals_the_slow_decoder(keep_error):
    model, params = decoder("llama")
    sae = autoencoder(4)

    def change(x):
        f = slow_encode(sae, x)
        set_to = f.copy()
        set_to[..., 7] = 2.5
        error = x - f @ np.asarray(sae.decoder) - np.asarray(sae.decoder_bias) if keep_error else 0.0
        return set_to @ np.asarray(sae.decoder) + np.asarray(sae.decoder_bias) + error

    wanted, _ = reference.forward(params, TOKENS, CONFIGS["llama"], {("resid_post", 1): change})
    edits = at(model.sites, "resid_post", splice(sae, feature=7, value=2.5, keep_error=keep_error), layer=1)
    found = model.apply({"params": params, "edits": edits}, TOKENS)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_sweep_over_features_is_one_mapped_call():
    model, params = decoder("gpt2")
    sae = autoencoder()

    def run(feature):
        edits = at(model.sites, "mlp_out", splice(sae, feature=feature, value=1.0), layer=0)
        return model.apply({"params": params, "edits": edits}, TOKENS)

    found = jax.jit(jax.vmap(run))(jnp.asarray([3, 11]))
    for i, feature in enumerate((3, 11)):
        np.testing.assert_allclose(found[i], run(feature), rtol=1e-4, atol=1e-5)
    assert not np.allclose(found[0], found[1], atol=1e-3)


def test_a_fresh_autoencoder_has_unit_rows_and_tied_encoder():
    sae = init_autoencoder(jax.random.key(0), 6, 9, top_k=2)
    np.testing.assert_allclose(np.linalg.norm(sae.decoder, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(sae.encoder, sae.decoder.T)
    with pytest.raises(ValueError, match="top_k"):
        init_autoencoder(jax.random.key(0), 6, 9, top_k=10)
    with pytest.raises(ValueError, match="feature 9 is out of range"):
        splice(sae, feature=9)
