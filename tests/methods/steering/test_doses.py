"""Grids of doses: every cell is a forward with the edit, chosen cells are those of the grid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.methods.steering import vectors
from mechlab.methods.steering.doses import dose_cells, dose_grid
from mechlab.methods.steering.vectors import steer
from mechlab.models.transformer import gpt2, llama, transformer

SIZES = {"vocabulary": 20, "layers": 3, "width": 16, "heads": 4, "hidden": 24, "context": 16}
MODEL = transformer(llama(**SIZES, init_std=None))
PARAMS = MODEL.init(jax.random.key(0))
TEXTS = vectors.pad([[1, 4, 2], [3, 3, 9, 7, 5], [6]])
VALUES = jax.random.normal(jax.random.key(5), (3, 16))


@pytest.mark.parametrize("renorm", [False, True])
def test_every_cell_of_the_grid_is_a_forward_with_the_edit(renorm):
    model = transformer(gpt2(**SIZES))
    params = model.init(jax.random.key(1))
    both = jnp.stack([VALUES, -VALUES])
    strengths = jnp.asarray([-1.0, 0.0, 0.5])
    found = dose_grid(model, params, both, TEXTS, layers=[2, 0], strengths=strengths, renorm=renorm, batch=5)
    assert found.shape == (2, 2, 3, 3, 20)
    last = TEXTS.lengths - 1
    inside = jnp.arange(5) < TEXTS.lengths[:, None]
    positions = jnp.where(inside, jnp.arange(5), -1)
    for s, values in enumerate(both):
        for k, layer in enumerate((2, 0)):
            for a, strength in enumerate(strengths):
                one = vectors.SteeringVector(values, model=vectors.describe(model))
                edits = steer(model, one, layer=layer, strength=strength, renorm=renorm)
                logits = model.apply({"params": params, "edits": edits}, TEXTS.tokens, positions)
                np.testing.assert_allclose(found[s, k, a], logits[jnp.arange(3), last], rtol=1e-4, atol=1e-4)


def test_kept_tokens_are_those_of_the_whole_grid():
    whole = dose_grid(MODEL, PARAMS, VALUES[None], TEXTS, layers=[1], strengths=[0.5])
    some = dose_grid(MODEL, PARAMS, VALUES[None], TEXTS, layers=[1], strengths=[0.5], tokens=[7, 3])
    np.testing.assert_array_equal(some, whole[..., [7, 3]])


def test_chosen_cells_are_those_of_the_grid():
    both = jnp.stack([VALUES, -VALUES])
    grid = dose_grid(MODEL, PARAMS, both, TEXTS, layers=[0, 2], strengths=[0.5, 2.0], tokens=[7, 3])
    cells = dose_cells(MODEL, PARAMS, both, TEXTS, layers=[2, 0], strengths=[0.5, 2.0], tokens=[7, 3])
    np.testing.assert_allclose(cells, np.stack([grid[0, 1, 0], grid[1, 0, 1]]), rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(grid[0, 1, 0] - grid[0, 0, 0]).max()) > 1e-3
    with pytest.raises(ValueError, match="one layer and strength a vector"):
        dose_cells(MODEL, PARAMS, both, TEXTS, layers=[2], strengths=[0.5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [3]}, "layers: wanted"),
        ({"layers": []}, "layers: wanted"),
        ({"strengths": [float("nan")]}, "strengths: wanted finite"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"vectors": VALUES}, r"wanted \(S, 3, 16\)"),
    ],
)
def test_grids_that_make_no_sense_are_refused(changes, message):
    given = {"vectors": VALUES[None], "layers": [0], "strengths": [1.0]} | changes
    with pytest.raises(ValueError, match=message):
        dose_grid(MODEL, PARAMS, given.pop("vectors"), TEXTS, **given)
