"""Reading one position: equals indexing the full logits, with and without edits, and refuses what does not fit."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core.edits import Scale, at, combine
from mechlab.methods.circuits.reading import at_read, logit_difference, logits_at
from tests.models.tiny import TOKENS, decoder


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("read", [-1, 2, jnp.asarray([1, 4])])
def test_the_logits_read_are_rows_of_the_models_logits(kind, read):
    model, params = decoder(kind)
    edits = combine(
        at(model.sites, "mlp_out", Scale(jnp.asarray(0.5)), layer=1),
        at(model.sites, "logits", Scale(jnp.asarray(3.0)), position=[1, 2]),
    )
    variables = {"params": params, "edits": edits}
    full = model.apply(variables, TOKENS)
    wanted = full[np.arange(2), np.broadcast_to(read, 2)]
    np.testing.assert_allclose(logits_at(model, variables, TOKENS, read), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("read", [5, -6, jnp.asarray([0, 5]), jnp.asarray([-1, 0]), jnp.asarray([1]), 1.0])
def test_positions_that_do_not_exist_are_refused(read):
    with pytest.raises(ValueError, match="read: wanted"):
        at_read(jnp.zeros((2, 5, 3)), read)


def test_logit_difference_has_answers_per_prompt_or_for_all():
    logits = jnp.asarray([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    assert logit_difference(np.asarray([[2, 0], [0, 1]]))(logits).tolist() == [3.0, -8.0]
    assert logit_difference(np.asarray([1, 0]))(logits).tolist() == [1.0, 8.0]
    with pytest.raises(ValueError, match="answers"):
        logit_difference(jnp.asarray([1, 2, 3]))
