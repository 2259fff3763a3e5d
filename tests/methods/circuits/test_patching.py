"""The patching sweep equals patching by an edit, cell by cell."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core.edits import Replace, at
from mechlab.methods.circuits.patching import patch_residual
from mechlab.models.transformer import gpt2, llama, transformer


def difference(logits):
    return logits[:, 1] - logits[:, 2]


@pytest.mark.parametrize("kind", [gpt2, llama])
@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("read", [-1, 2])
def test_every_cell_equals_an_edited_forward(kind, batch, read):
    model = transformer(kind(layers=3, width=16, heads=4, hidden=24, vocabulary=11, context=8))
    params = model.init(jax.random.key(0))
    tokens, clean = jax.random.randint(jax.random.key(1), (2, 2, 5), 0, 11)
    source = model.capture({"params": params}, clean, sites=("resid_post",))[1]["resid_post"]
    found = jax.jit(
        lambda params, source: patch_residual(model, params, tokens, source, difference, read=read, batch=batch)
    )(params, source)
    for layer in range(3):
        for position in range(5):
            patch = at(model.sites, "resid_post", Replace(source), layer=layer, position=position, stacked=True)
            logits = model.apply({"params": params, "edits": patch}, tokens)[:, read]
            np.testing.assert_allclose(found[layer, position], difference(logits), rtol=1e-4, atol=1e-6)


def test_a_source_of_other_prompts_is_refused():
    model = transformer(gpt2(layers=2, width=8, heads=2, hidden=8, vocabulary=5, context=8))
    with pytest.raises(ValueError, match="source is"):
        patch_residual(model, {}, jnp.zeros((1, 4), int), jnp.zeros((2, 1, 5, 8)), difference)
