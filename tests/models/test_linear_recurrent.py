"""The linear recurrent model: its recurrence step by step in NumPy, causality, edits, and what it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core.edits import Add, at
from mechlab.models.linear_recurrent import RecurrentConfig, linear_recurrent, recurrence

CONFIG = RecurrentConfig(vocabulary=7, layers=2, width=8, heads=2, hidden=12, decay_rank=2)
MODEL = linear_recurrent(CONFIG)


@pytest.fixture(scope="module")
def params():
    made = MODEL.init(jax.random.key(0))
    numbers = np.random.default_rng(0)
    # What starts at zero or at a constant would hide a missing term.
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1 * numbers.normal(size=leaf.shape), leaf.dtype), made)


def test_recurrence_is_the_formula():
    numbers = np.random.default_rng(0)
    r, k, v = (numbers.normal(size=(1, 5, 2, 3)).astype(np.float32) for _ in range(3))
    w, u = numbers.uniform(size=(1, 5, 2, 3)).astype(np.float32), numbers.normal(size=(2, 3)).astype(np.float32)
    state, wanted = np.zeros((2, 3, 3)), []
    for t in range(5):
        written = k[0, t][:, :, None] * v[0, t][:, None, :]
        wanted.append(np.einsum("hk,hkv->hv", r[0, t], state + u[:, :, None] * written))
        state = w[0, t][:, :, None] * state + written
    np.testing.assert_allclose(recurrence(*map(jnp.asarray, (r, k, v, w, u)))[0], wanted, rtol=1e-4, atol=1e-5)


def test_the_first_layer_is_the_docstring_s(params):
    """Layer 0 of one token after another, in NumPy."""
    tokens = jnp.asarray([[3, 1, 4, 1]])
    _, acts = MODEL.capture({"params": params}, tokens, sites=("resid_pre", "resid_mid", "resid_post", "hidden"))
    block = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), params["blocks"])
    mix, channels = block["mix"], block["channels"]

    def norm(x, at):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * at["scale"] + at["bias"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    stream = np.asarray(params["embed"], np.float64)[np.asarray(tokens[0])]
    np.testing.assert_allclose(acts["resid_pre"][0, 0], stream, rtol=1e-6)
    x = norm(stream, block["norm_mix"])
    before = np.concatenate([np.zeros((1, 8)), x[:-1]])
    uses = [x + mu * (before - x) for mu in mix["mu"]]
    r, k, v, g = (use @ mix[name]["kernel"] for use, name in zip(uses[:4], "rkvg", strict=True))
    w = np.exp(-np.exp(mix["decay"] + np.tanh(uses[4] @ mix["decay_in"]) @ mix["decay_out"]))
    heads = [jnp.asarray(z.reshape(1, 4, 2, 4), jnp.float32) for z in (r, k, v, w)]
    y = np.asarray(recurrence(*heads, jnp.asarray(mix["bonus"], jnp.float32)))[0]
    np.testing.assert_allclose(acts["hidden"][0, 0], y, rtol=1e-3, atol=1e-5)
    stream = stream + (norm(y, mix["norm"]).reshape(4, 8) * g * sigmoid(g)) @ mix["o"]["kernel"]
    np.testing.assert_allclose(acts["resid_mid"][0, 0], stream, rtol=1e-3, atol=1e-4)
    x = norm(stream, block["norm_channels"])
    before = np.concatenate([np.zeros((1, 8)), x[:-1]])
    first, second = (x + mu * (before - x) for mu in channels["mu"])
    hidden = np.maximum(first @ channels["k"]["kernel"], 0) ** 2
    stream = stream + sigmoid(second @ channels["r"]["kernel"]) * (hidden @ channels["v"]["kernel"])
    np.testing.assert_allclose(acts["resid_post"][0, 0], stream, rtol=1e-3, atol=1e-4)


def test_later_tokens_change_nothing_before_them(params):
    first, second = jnp.asarray([[1, 2, 3, 4]]), jnp.asarray([[1, 2, 6, 5]])
    logits = [MODEL.apply({"params": params}, tokens) for tokens in (first, second)]
    np.testing.assert_array_equal(logits[0][:, :2], logits[1][:, :2])
    assert float(jnp.abs(logits[0][:, 2:] - logits[1][:, 2:]).max()) > 1e-3
    assert logits[0].shape == (1, 4, 7) and logits[0].dtype == jnp.float32


def test_edits_act_at_its_sites(params):
    edits = at(MODEL.sites, "resid_post", Add(jnp.arange(8.0)), layer=0)
    tokens = jnp.asarray([[1, 2]])
    assert not np.allclose(
        MODEL.apply({"params": params, "edits": edits}, tokens), MODEL.apply({"params": params}, tokens)
    )


def test_bad_input_is_refused(params):
    with pytest.raises(ValueError, match="heads=3 does not divide width=8"):
        RecurrentConfig(vocabulary=7, layers=1, width=8, heads=3)
    with pytest.raises(ValueError, match="all sizes must be at least 1"):
        RecurrentConfig(vocabulary=0, layers=1, width=8, heads=2)
    with pytest.raises(ValueError, match=r"tokens must be integers of shape \(B, T\)"):
        MODEL.apply({"params": params}, jnp.zeros((1, 2)))
