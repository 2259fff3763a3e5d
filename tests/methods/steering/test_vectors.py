"""Steering vectors: read at true last tokens, refused where they do not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.methods.steering import vectors
from mechlab.methods.steering.vectors import Texts, last_states, steer, steering_vector
from mechlab.models.generate import generate
from mechlab.models.transformer import llama, transformer

SIZES = {"vocabulary": 20, "layers": 3, "width": 16, "heads": 4, "hidden": 24, "context": 16}
MODEL = transformer(llama(**SIZES, init_std=None))
PARAMS = MODEL.init(jax.random.key(0))
TEXTS = vectors.pad([[1, 4, 2], [3, 3, 9, 7, 5], [6]])


class Spelling:
    """One token a letter."""

    def encode(self, text):
        return [1 + ord(letter) % 19 for letter in text]

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


def vector(**changes):
    values = jax.random.normal(jax.random.key(5), (SIZES["layers"], SIZES["width"]))
    return vectors.SteeringVector(**{"values": values, "model": vectors.describe(MODEL)} | changes)


def test_states_are_those_of_each_text_alone():
    states = last_states(MODEL, {"params": PARAMS}, TEXTS, batch=2)
    for row, length in enumerate(TEXTS.lengths):
        alone = MODEL.capture({"params": PARAMS}, TEXTS.tokens[row : row + 1, :length], sites=("resid_post",))[1]
        np.testing.assert_allclose(states[row], alone["resid_post"][:, 0, -1], rtol=1e-5, atol=1e-6)


def test_sites_are_read_together_as_alone():
    sites = ("attn_z", "resid_post")
    together = vectors.read_states(MODEL, {"params": PARAMS}, TEXTS, sites, batch=2)
    for site in sites:
        alone = last_states(MODEL, {"params": PARAMS}, TEXTS, site=site, batch=2)
        np.testing.assert_allclose(together[site], alone, rtol=1e-6, atol=1e-7)


def test_heads_keep_their_axes():
    assert last_states(MODEL, {"params": PARAMS}, TEXTS, site="attn_z").shape == (3, 3, 4, 4)


def test_the_vector_is_the_difference_of_means_or_the_component_of_pairs():
    texts = vectors.contrast(Spelling(), ["abc", "de", "fgh"], ["xy", "z", "uvw"])
    high, low = (last_states(MODEL, {"params": PARAMS}, side) for side in texts)
    mean = steering_vector(MODEL, {"params": PARAMS}, texts)
    np.testing.assert_allclose(mean.values, high.mean(0) - low.mean(0), rtol=1e-4, atol=1e-5)
    component = steering_vector(MODEL, {"params": PARAMS}, texts, principal=True)
    lengths = [np.linalg.norm(x.values, axis=-1) for x in (mean, component)]
    np.testing.assert_allclose(*lengths, rtol=1e-4)
    assert ((mean.values * component.values).sum(-1) >= 0).all()
    assert np.abs(mean.values - component.values).max() > 1e-2


def test_strength_zero_is_the_model_and_signs_mirror():
    plain = MODEL.apply({"params": PARAMS}, TEXTS.tokens)
    still = steer(MODEL, vector(), layer=1, strength=0.0)
    np.testing.assert_array_equal(MODEL.apply({"params": PARAMS, "edits": still}, TEXTS.tokens), plain)
    mirrored = steer(MODEL, vector(values=-vector().values), layer=1, strength=2.0)
    direct = steer(MODEL, vector(), layer=1, strength=-2.0)
    pushed = [MODEL.apply({"params": PARAMS, "edits": edits}, TEXTS.tokens) for edits in (mirrored, direct)]
    np.testing.assert_array_equal(*pushed)
    assert np.abs(pushed[0] - plain).max() > 1e-2


def test_renormed_tokens_keep_their_length():
    edits = steer(MODEL, vector(), layer=1, strength=3.0, renorm=True)
    states = [
        MODEL.capture({"params": PARAMS, **more}, TEXTS.tokens, sites=("resid_post",))[1]["resid_post"][1]
        for more in ({}, {"edits": edits})
    ]
    lengths = [np.linalg.norm(x, axis=-1) for x in states]
    np.testing.assert_allclose(*lengths, rtol=1e-5)
    assert np.abs(states[0] - states[1]).max() > 1e-2


def test_generation_is_steered_in_prompt_and_steps():
    edits = steer(MODEL, vector(), layer=1, strength=4.0)
    variables = {"params": PARAMS, "edits": edits}
    written = generate(MODEL, variables, TEXTS.tokens[1:2], steps=4).tokens
    for t in range(5, 9):
        assert int(MODEL.apply(variables, written[:, :t])[0, -1].argmax()) == int(written[0, t])


def test_random_controls_have_the_length_of_the_vector_and_other_directions():
    controls = vectors.random_vectors(jax.random.key(2), vector(), 10)
    lengths = np.linalg.norm(controls.values, axis=-1)
    np.testing.assert_allclose(lengths, np.tile(np.linalg.norm(vector().values, axis=-1), (10, 1)), rtol=1e-5)
    cosines = (controls.values * vector().values).sum(-1) / lengths**2
    assert np.abs(cosines).max() < 0.9


def test_a_saved_vector_comes_back_with_its_card_and_is_not_overwritten(tmp_path):
    path = tmp_path / "happy.safetensors"
    vectors.save_vector(path, vector(), name="small", layer=1, note="for a test")
    back, card = vectors.load_vector(path, MODEL, name="small")
    np.testing.assert_array_equal(back.values, vector().values)
    assert (card["model"], card["site"], card["layer"], card["note"]) == ("small", "resid_post", "1", "for a test")
    assert len(card["norm by layer"].split(",")) == 3
    with pytest.raises(FileExistsError):
        vectors.save_vector(path, vector(), name="small")


def test_another_model_is_refused(tmp_path):
    path = tmp_path / "happy.safetensors"
    vectors.save_vector(path, vector(), name="small")
    wider = transformer(llama(**SIZES | {"width": 32}))
    with pytest.raises(ValueError, match=r"width 16.*this one has .*width 32"):
        vectors.load_vector(path, wider)
    with pytest.raises(ValueError, match='read from "small", not from "large"'):
        vectors.load_vector(path, MODEL, name="large")
    with pytest.raises(ValueError, match=r"wanted \(layers, width\) = \(3, 32\)"):
        steer(wider, vector(model=""), layer=0, strength=1.0)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one text in each list"):
        vectors.contrast(Spelling(), ["a"], [])
    with pytest.raises(ValueError, match="at least one token"):
        vectors.contrast(Spelling(), ["a"], [""])
    with pytest.raises(ValueError, match=r"lengths must be in 1\.\.5"):
        last_states(MODEL, {"params": PARAMS}, Texts(TEXTS.tokens, jnp.asarray([0, 1, 2])))
    with pytest.raises(ValueError, match="wanted pairs"):
        steering_vector(MODEL, {"params": PARAMS}, vectors.contrast(Spelling(), ["a", "b"], ["c"]), principal=True)
    with pytest.raises(ValueError, match="strength must be finite"):
        steer(MODEL, vector(), layer=0, strength=float("nan"))
    broken = jax.tree.map(lambda x: x, PARAMS)
    broken["blocks"]["mlp"]["down"]["kernel"] = broken["blocks"]["mlp"]["down"]["kernel"].at[1].set(jnp.inf)
    with pytest.raises(ValueError, match="not finite in layer 1"):
        last_states(MODEL, {"params": broken}, TEXTS)
