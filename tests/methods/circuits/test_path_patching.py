"""Path patching against three forwards of a float64 NumPy decoder for each path, and what no path reaches."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.methods.circuits.path_patching import paths_to_heads, paths_to_logits, paths_to_mlp
from mechlab.methods.circuits.reading import logit_difference
from tests.models import reference
from tests.models.tiny import CONFIGS, TOKENS, decoder

SOURCE = jnp.asarray([[3, 1, 7, 1, 5], [9, 2, 0, 5, 3]])
METRIC = logit_difference(jnp.asarray([[7, 1], [0, 3]]))
READ = jnp.asarray([3, 4])


def slow(kind, params, layer, head, receiver=None, to=(), freeze_mlps=False):
    """The metric for one sender, forward after forward; ``to`` has (layer, head or ...) of the receivers."""
    config = CONFIGS[kind]
    base = reference.forward(params, TOKENS, config)[1]
    sent = reference.forward(params, SOURCE, config)[1]["attn_z"]
    change = {}
    for i in range(config.layers):
        z = base["attn_z"][i].copy()
        if i == layer:
            z[:, :, head] = sent[layer, :, :, head]
        change["attn_z", i] = lambda _, z=z: z
        if freeze_mlps:
            change["mlp_out", i] = lambda _, out=base["mlp_out"][i]: out
    logits, acts = reference.forward(params, TOKENS, config, change)
    if receiver is not None:

        def hear(x, i):
            x = x.copy()
            for part in (head for to_layer, head in to if to_layer == i):
                x[:, :, part] = acts[receiver][i][:, :, part]
            return x

        told = {(receiver, i): lambda x, i=i: hear(x, i) for i, _ in to}
        logits, _ = reference.forward(params, TOKENS, config, told)
    return np.asarray(METRIC(logits[np.arange(2), READ]))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("freeze_mlps", [False, True])
def test_every_path_to_the_logits_equals_the_slow_one(kind, freeze_mlps):
    model, params = decoder(kind)
    found = paths_to_logits(model, params, TOKENS, SOURCE, METRIC, read=READ, freeze_mlps=freeze_mlps)
    for layer in range(3):
        for head in range(4):
            wanted = slow(kind, params, layer, head, freeze_mlps=freeze_mlps)
            np.testing.assert_allclose(found[layer, head], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "via", "heads", "freeze_mlps"),
    [
        ("gpt2", "q", [(2, 1)], False),
        ("gpt2", "v", [(2, 2), (2, 0)], True),
        ("llama", "k", [(1, 0), (2, 1)], False),
    ],
)
def test_every_path_to_heads_equals_the_slow_one(kind, via, heads, freeze_mlps):
    model, params = decoder(kind)
    found = paths_to_heads(
        model, params, TOKENS, SOURCE, METRIC, via, heads, read=READ, freeze_mlps=freeze_mlps, batch=5
    )
    assert found.shape == (3, 4, 2)
    for layer in range(3):
        for sender in range(4):
            wanted = slow(kind, params, layer, sender, via, heads, freeze_mlps)
            np.testing.assert_allclose(found[layer, sender], wanted, rtol=1e-3, atol=1e-3)


def test_every_path_to_an_mlp_equals_the_slow_one():
    model, params = decoder("gpt2")
    found = paths_to_mlp(model, params, TOKENS, SOURCE, METRIC, 1, read=READ)
    for layer in range(3):
        for sender in range(4):
            wanted = slow("gpt2", params, layer, sender, "mlp_in", [(1, ...)])
            np.testing.assert_allclose(found[layer, sender], wanted, rtol=1e-3, atol=1e-3)


def test_senders_that_cannot_reach_the_receiver_change_nothing():
    model, params = decoder("gpt2")
    base = METRIC(model.apply({"params": params}, TOKENS)[:, -1])
    found = paths_to_heads(model, params, TOKENS, SOURCE, METRIC, "q", [(1, 0)])
    np.testing.assert_allclose(found[1:], np.broadcast_to(base, (2, 4, 2)), rtol=1e-5, atol=1e-5)
    assert np.abs(found[0] - base).max() > 1e-3


def test_bad_input_is_refused():
    model, params = decoder("gpt2")
    with pytest.raises(ValueError, match="one shape"):
        paths_to_logits(model, params, TOKENS, SOURCE[:1], METRIC)
    with pytest.raises(KeyError, match="via must be"):
        paths_to_heads(model, params, TOKENS, SOURCE, METRIC, "z", [(0, 0)])
    with pytest.raises(ValueError, match="out of range"):
        paths_to_heads(model, params, TOKENS, SOURCE, METRIC, "q", [(1, 4)])
    with pytest.raises(ValueError, match="at least one"):
        paths_to_heads(model, params, TOKENS, SOURCE, METRIC, "q", [])
    with pytest.raises(ValueError, match="layer 3 is out of range"):
        paths_to_mlp(model, params, TOKENS, SOURCE, METRIC, 3)
