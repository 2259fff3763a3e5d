"""Lenses against a float64 NumPy decoder, their limits, and the training of translators on a planted rotation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from mechlab.core.edits import Add, at
from mechlab.methods.circuits.lens import (
    TunedLens,
    identity_lens,
    logit_lens,
    residual_depths,
    translate,
    tuned_lens_loss,
)
from mechlab.training.batches import shuffled
from mechlab.training.loop import fit
from tests.models import reference
from tests.models.tiny import CONFIGS, TOKENS, decoder


def slow_lens(kind, params):
    """Depth by depth in float64: the stream, the final norm once, the unembedding."""
    config = CONFIGS[kind]
    _, acts = reference.forward(params, TOKENS, config)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    columns = p["embed"]["tokens"].T if config.tied else p["unembed"]["kernel"]
    stream = [acts["embed"], *acts["resid_post"]]
    return np.stack([reference._norm(p["final_norm"], x, config) @ columns for x in stream])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_depth_equals_the_slow_lens_and_the_last_is_the_model(kind):
    model, params = decoder(kind)
    found = jax.jit(lambda params: logit_lens(model, {"params": params}, TOKENS))(params)
    assert found.shape == (4, 2, 5, 11)
    np.testing.assert_allclose(found, slow_lens(kind, params), rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(found[-1], model.apply({"params": params}, TOKENS), rtol=1e-5, atol=1e-5)


def test_read_and_answers_choose_positions_and_tokens():
    model, params = decoder("gpt2")
    full = logit_lens(model, {"params": params}, TOKENS)
    read, answers = jnp.asarray([2, 4]), jnp.asarray([[7, 1], [0, 3]])
    rows = np.stack([full[:, 0, 2], full[:, 1, 4]], 1)
    np.testing.assert_allclose(logit_lens(model, {"params": params}, TOKENS, read=read), rows, rtol=1e-5, atol=1e-5)
    wanted = np.stack([rows[:, 0, [7, 1]], rows[:, 1, [0, 3]]], 1)
    found = logit_lens(model, {"params": params}, TOKENS, read=read, answers=answers)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    every = logit_lens(model, {"params": params}, TOKENS, answers=jnp.asarray([5]))
    np.testing.assert_allclose(every, full[..., 5:6], rtol=1e-5, atol=1e-5)


def test_an_edit_is_seen_from_its_depth_on():
    model, params = decoder("llama")
    edits = at(model.sites, "resid_post", Add(jnp.ones((2, 5, 16)).at[:, :, 3].set(-2.0)), layer=1)
    plain = logit_lens(model, {"params": params}, TOKENS, read=3)
    edited = logit_lens(model, {"params": params, "edits": edits}, TOKENS, read=3)
    changed = np.abs(plain - edited).max((1, 2)) > 1e-4
    assert changed.tolist() == [False, False, True, True]


def test_the_identity_lens_is_the_logit_lens():
    model, params = decoder("gpt2")
    lens = identity_lens(3, 16)
    plain = logit_lens(model, {"params": params}, TOKENS)
    assert (logit_lens(model, {"params": params}, TOKENS, lens=lens) == plain).all()


def test_translate_is_affine_and_leaves_the_last_depth():
    rng = np.random.default_rng(0)
    lens = TunedLens(jnp.asarray(rng.normal(size=(2, 3, 3))), jnp.asarray(rng.normal(size=(2, 3))))
    stream = rng.normal(size=(3, 1, 2, 3))
    found = translate(lens, jnp.asarray(stream))
    for depth in range(2):
        wanted = stream[depth] + stream[depth] @ np.asarray(lens.kernel)[depth] + np.asarray(lens.bias)[depth]
        np.testing.assert_allclose(found[depth], wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[2], stream[2], rtol=1e-6)


def test_the_loss_is_the_divergence_at_masked_tokens():
    model, params = decoder("gpt2")
    mask = jnp.asarray([[1, 1, 0, 0, 0], [1, 1, 1, 0, 1]])
    loss, aux = tuned_lens_loss(model, params)(identity_lens(3, 16), {"tokens": TOKENS, "mask": mask})
    log_p = scipy.special.log_softmax(slow_lens("gpt2", params), -1)
    kl = (np.exp(log_p[-1]) * (log_p[-1] - log_p[:-1])).sum(-1)
    wanted = kl[:, np.asarray(mask) == 1].mean(1)
    np.testing.assert_allclose(aux["kl"], wanted, rtol=1e-3)
    np.testing.assert_allclose(loss, wanted.mean(), rtol=1e-3)


def test_training_brings_every_depth_closer_to_the_output():
    model, params = decoder("gpt2")
    tokens = jax.random.randint(jax.random.key(1), (64, 6), 0, 11)
    loss = tuned_lens_loss(model, params)
    start = identity_lens(3, 16)
    trained = fit(jax.random.key(2), loss, start, optax.adam(1e-2), shuffled({"tokens": tokens}, 32), steps=150)
    fresh = {"tokens": jax.random.randint(jax.random.key(3), (32, 6), 0, 11)}
    before, after = loss(start, fresh)[1]["kl"], loss(trained.params, fresh)[1]["kl"]
    assert (after < 0.6 * before).all(), (before, after)
    # The last layer's stream needs no translator, so the deepest one that is trained must be the best.
    assert after[-1] == after.min()


def test_wrong_sizes_are_refused():
    model, params = decoder("gpt2")
    with pytest.raises(ValueError, match="the lens is for"):
        logit_lens(model, {"params": params}, TOKENS, lens=identity_lens(2, 16))
    with pytest.raises(ValueError, match="answers"):
        logit_lens(model, {"params": params}, TOKENS, answers=jnp.zeros((3, 1), int))
    with pytest.raises(ValueError, match="at least 1"):
        identity_lens(0, 4)
    assert residual_depths(model, {"params": params}, TOKENS).shape == (4, 2, 5, 16)
