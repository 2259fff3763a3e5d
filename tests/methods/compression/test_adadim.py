"""AdaDim's choice, planted outliers, and what is measured of a quantised decoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core import select
from mechlab.core.kernel_forms import QTensor
from mechlab.methods.compression.adadim import adadim, channel_sensitivity, choose_dim
from mechlab.methods.compression.decoders import calibrate, dequantise_blocks, kernel_of, places, quantise_blocks
from mechlab.methods.compression.outliers import plant_outliers
from mechlab.methods.compression.quality import quality
from mechlab.methods.compression.rounding import quantise
from mechlab.models.transformer import llama, transformer

MODEL = transformer(llama(vocabulary=40, layers=2, width=32, heads=2, hidden=64, context=32, init_std=None))
CONFIG = MODEL.module.config
PARAMS = MODEL.init(jax.random.key(0))
TOKENS = jax.random.randint(jax.random.key(1), (6, 24), 0, 40)


@pytest.fixture(scope="module")
def planted():
    return plant_outliers(jax.random.key(2), CONFIG, PARAMS, factor=32.0, share=0.05)


def test_planted_outliers_change_the_activations_and_not_the_function(planted):
    found = quality(MODEL, PARAMS, planted, TOKENS)
    assert float(jnp.abs(found.kl).max()) < 1e-5 and not found.flips.any()
    before, after = (calibrate(MODEL, params, TOKENS)["attn_in"] for params in (PARAMS, planted))
    ratio = np.asarray(jnp.abs(after).mean((1, 2)) / jnp.abs(before).mean((1, 2)))
    np.testing.assert_allclose(np.sort(ratio, 1)[:, -2:], 32, rtol=1e-3)
    np.testing.assert_allclose(np.sort(ratio, 1)[:, :-2], 1, rtol=1e-3)
    assert ratio[0].argmax() != ratio[1].argmax()


def test_large_inputs_want_steps_of_their_own(planted):
    acts = calibrate(MODEL, planted, TOKENS)
    chosen = choose_dim(MODEL, planted, acts, bits=3, group=16)
    assert set(chosen) == {place.name for place in places(CONFIG)}
    for name in ("attn/k", "mlp/up", "mlp/gate"):
        assert chosen[name].axis.tolist() == ["ic", "ic"]
        assert (chosen[name].losses[:, 1] < 0.5 * chosen[name].losses[:, 0]).all()

    def kl(**options):
        return float(
            quality(MODEL, planted, adadim(MODEL, planted, TOKENS, bits=3, group=16, **options)[0], TOKENS).kl.mean()
        )

    by_axis = {axis: kl(axis=axis) for axis in ("oc", "ic")}
    assert by_axis["ic"] < by_axis["oc"]
    assert kl() < by_axis["oc"]


def test_the_loss_is_that_of_the_inspected_module():
    acts = calibrate(MODEL, PARAMS, TOKENS)
    found = choose_dim(MODEL, PARAMS, acts, bits=3, group=16)["mlp/down"].losses
    kernel = PARAMS["blocks"]["mlp"]["down"]["kernel"][1]
    for i, axis in enumerate(("oc", "ic")):
        error = quantise(kernel, bits=3, group=16, axis=axis).dequantise() - kernel
        np.testing.assert_allclose(found[1, i], jnp.square(acts["mlp_act"][1] @ error).mean(), rtol=1e-4)


def test_gptq_along_the_chosen_direction_is_better_than_rounding():
    error = {}
    for method in ("rtn", "gptq"):
        params, chosen = adadim(MODEL, PARAMS, TOKENS, bits=3, group=16, method=method)
        error[method] = float(quality(MODEL, PARAMS, params, TOKENS).kl.mean())
        for place in places(CONFIG):
            same = len(set(chosen[place.name].axis.tolist())) == 1
            assert isinstance(kernel_of(params, place), QTensor) == same
    assert error["gptq"] < error["rtn"]


def test_quality_counts_what_it_says():
    zero = select.map_at(PARAMS, "**/embed/tokens", jnp.zeros_like)
    found = quality(MODEL, PARAMS, zero, TOKENS, batch=4)
    np.testing.assert_allclose(found.loss, np.log(40), rtol=1e-5)
    np.testing.assert_allclose(found.perplexity, 40, rtol=1e-4)
    log_p = jax.nn.log_softmax(MODEL.apply({"params": PARAMS}, TOKENS)[:, :-1])
    np.testing.assert_allclose(found.kl, np.log(40) + (jnp.exp(log_p) * log_p).sum(-1).mean(1), atol=1e-4)
    assert found.kl.shape == (6,) and float(found.base_perplexity) != 40
    same = quality(MODEL, PARAMS, PARAMS, TOKENS)
    assert not np.asarray(same.kl).any() and not same.flips.any()


def test_rounding_all_kernels_touches_nothing_else():
    rounded = quantise_blocks(CONFIG, PARAMS, bits=8, group=16)
    assert all(isinstance(kernel_of(rounded, place), QTensor) for place in places(CONFIG))
    plain = dequantise_blocks(rounded)
    changed = [
        path
        for path, a, b in zip(select.paths(PARAMS), jax.tree.leaves(PARAMS), jax.tree.leaves(plain), strict=True)
        if (a != b).any()
    ]
    assert len(changed) == 7 and all(path.endswith("/kernel") and "/blocks/" in f"/{path}" for path in changed)
    found = quality(MODEL, PARAMS, rounded, TOKENS)
    assert 0 < float(found.kl.mean()) < 1e-2


def test_sensitive_channels_are_found():
    kernel = jax.random.normal(jax.random.key(3), (16, 8))
    gradient = jnp.ones((16, 8)).at[5].set(10).at[:, 2].set(20)
    by_input, by_output = channel_sensitivity(kernel, gradient, bits=3, group=8, axis="oc")
    assert by_input.shape == (16,) and by_output.argmax() == 2
    np.testing.assert_allclose(by_input.sum(), by_output.sum(), rtol=1e-5)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"attn/q: group must divide the 32 inputs"):
        adadim(MODEL, PARAMS, TOKENS, bits=3, group=48)
    with pytest.raises(ValueError, match=r"attn/q: group must divide"):
        quantise_blocks(CONFIG, PARAMS, bits=3, group=48)
    with pytest.raises(ValueError, match="rtn"):
        adadim(MODEL, PARAMS, TOKENS, bits=3, group=16, method="awq")
    with pytest.raises(ValueError, match="share"):
        plant_outliers(jax.random.key(0), CONFIG, PARAMS, factor=8.0, share=0.0)
    with pytest.raises(ValueError, match="two tokens"):
        quality(MODEL, PARAMS, PARAMS, TOKENS[:, :1])
