"""The fine-tuning scaffold: its loss counts answers only, its lanes are runs of their own, its scores are exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.finetuning import (
    answer_rows,
    exact_match,
    finetune,
    held_out_loss,
    text_rows,
    token_loss,
    whole,
)
from mechlab.core.transforms import AdapterState, tune
from mechlab.models.generate import generate
from mechlab.models.transformer import llama, transformer

PARAMS = {"next": jnp.asarray(np.random.default_rng(1).normal(size=(11, 11)), jnp.float32)}


def apply(params, tokens):
    """The logits depend on the last token only."""
    return params["next"][tokens]


@pytest.fixture
def rows():
    numbers = np.random.default_rng(0)
    prompts = [numbers.integers(3, 11, n) for n in (1, 2, 3, 4, 2, 3)]
    return answer_rows(prompts, [[*numbers.integers(3, 11, n), 2] for n in (1, 2, 3, 1, 2, 3)], 8)


def test_rows_mark_the_answer_and_nothing_else():
    rows = answer_rows([[1, 5], [1]], [[6, 7], [8]], 5)
    assert rows.tokens.tolist() == [[1, 5, 6, 7, 0], [1, 8, 0, 0, 0]]
    assert rows.mask.tolist() == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]]
    assert rows.prompts.tolist() == [2, 1]
    assert text_rows([[4, 5, 6]]).mask.tolist() == [[0, 1, 1]]


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at most 3 together"):
        answer_rows([[1, 5]], [[6, 7]], 3)
    with pytest.raises(ValueError, match="must have a token"):
        answer_rows([[1]], [[]], 3)
    with pytest.raises(ValueError):
        answer_rows([[1], [1]], [[2]], 3)


def test_the_loss_is_that_of_answer_tokens(rows):
    log_p = np.asarray(jax.nn.log_softmax(apply(PARAMS, rows.tokens)))
    by_hand = [
        -log_p[n, t - 1, rows.tokens[n, t]]
        for n in range(6)
        for t in range(int(rows.prompts[n]), int(rows.prompts[n] + rows.mask[n].sum()))
    ]
    assert float(token_loss(apply, PARAMS, rows)) == pytest.approx(np.mean(by_hand), rel=1e-5)
    base = AdapterState(jax.tree.map(lambda x: x[None], PARAMS))
    assert held_out_loss(apply, PARAMS, whole, base, rows, chunk=4)[0] == pytest.approx(np.mean(by_hand), rel=1e-5)


def test_lanes_are_trainings_of_their_own(rows):
    first, second = (jax.vmap(jax.random.key)(jnp.asarray(seeds)) for seeds in ((3, 3, 4), (3,)))
    rates = np.asarray([1e-2, 3e-3, 1e-2])
    many = finetune(first, rates, apply, PARAMS, tune("**"), rows, steps=6, batch=3)
    one = finetune(second, rates[1:2], apply, PARAMS, tune("**"), rows, steps=6, batch=3)
    assert many.losses.shape == (3, 6)
    np.testing.assert_allclose(many.losses[1], one.losses[0], rtol=1e-5)
    assert many.losses[0, 0] == many.losses[1, 0] != many.losses[2, 0]


def test_whole_parameters_with_an_optimiser_of_ones_own(rows):
    """The change of the parameters, and the parameters themselves, take the same steps under plain descent."""
    keys = jax.random.split(jax.random.key(0), 1)
    settings = {"steps": 4, "batch": 6, "optimiser": optax.sgd}
    change = finetune(keys, [0.1], apply, PARAMS, tune("**"), rows, **settings)
    itself = finetune(keys, [0.1], apply, PARAMS, whole, rows, **settings)
    np.testing.assert_allclose(change.losses, itself.losses, rtol=1e-5)
    assert itself.losses[0, -1] < itself.losses[0, 0]
    assert jax.tree.structure(itself.states.train) == jax.tree.structure(PARAMS)


def test_exact_match_is_of_what_the_model_writes(rows):
    model = transformer(llama(vocabulary=11, layers=1, width=8, heads=2, hidden=12, context=16))
    params = model.init(jax.random.key(0))
    written = generate(model, {"params": params}, rows.tokens[:, :4], rows.prompts, steps=4).tokens
    answers = [row[p : p + 3].tolist() for row, p in zip(np.asarray(written), rows.prompts, strict=True)]
    answers[1][0] = (answers[1][0] + 1) % 11
    answers[2] = answers[2][:1]
    prompts = [row[:p] for row, p in zip(np.asarray(rows.tokens), rows.prompts, strict=True)]
    asked = answer_rows(prompts, answers, 8)
    both = jax.tree.map(lambda x: jnp.stack([x, jnp.roll(x, 1, -1)]), params)
    hits = exact_match(model, params, whole, AdapterState(both), asked)
    assert hits.shape == (2, 6)
    assert hits[0].tolist() == [True, False, True, True, True, True]
    assert not hits[1].all()
    assert exact_match(model, params, whole, AdapterState(both), asked, read=len).all()
