"""AWQ against the official searches (vectors 26), its exact promises, and on whole decoders."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlab.core import select
from mechlab.core.kernel_forms import QTensor
from mechlab.methods.compression.awq import awq, awq_clip, awq_scale, mixed_salient, salient, scaled_salient
from mechlab.methods.compression.decoders import calibrate, quantise_blocks
from mechlab.methods.compression.rounding import quantise
from mechlab.models.fold import scale_inputs
from mechlab.models.transformer import gpt2, llama, transformer

MODEL = transformer(llama(vocabulary=40, layers=2, width=32, heads=2, hidden=64, context=32, init_std=None))
PARAMS = MODEL.init(jax.random.key(0))
# Some channels of the normed inputs are large, as in trained models.
PARAMS = select.map_at(PARAMS, "blocks/norm_*/scale", lambda scale: scale.at[:, ::8].set(12.0))
TOKENS = jax.random.randint(jax.random.key(1), (6, 24), 0, 40)


def ours(array):
    return jnp.asarray(np.asarray(array).T, jnp.float32)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_scale_search_is_the_official_one(vectors, bits):
    v = vectors("awq")
    x, group = jnp.asarray(v["x_mlp"], jnp.float32), int(v["group"])
    gate, up, down = (ours(v[f"w_{name}_proj"]) for name in ("gate", "up", "down"))

    def mlp(kernels):
        return (jax.nn.silu(x @ kernels["gate"]) * (x @ kernels["up"])) @ down

    found = awq_scale(mlp, {"gate": gate, "up": up}, jnp.abs(x).mean(0), bits=bits, group=group)
    np.testing.assert_allclose(found.s, v[f"scale_mlp_b{bits}"], rtol=1e-4)
    x_down = jnp.asarray(v["x_down"], jnp.float32)
    found = awq_scale(lambda k: x_down @ k["down"], {"down": down}, jnp.abs(x_down).mean(0), bits=bits, group=group)
    np.testing.assert_allclose(found.losses, v[f"down_curve_b{bits}"], rtol=2e-3)
    np.testing.assert_allclose(found.s, v[f"scale_down_b{bits}"], rtol=1e-4)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_clip_search_is_the_official_one(vectors, bits):
    v = vectors("awq")
    x, w, group = np.asarray(v["x_down"]), np.asarray(v["w_down_proj"]).T, int(v["group"])
    with jax.enable_x64(True):
        got = np.asarray(awq_clip(jnp.asarray(w), jnp.asarray(x), bits=bits, group=group))
    wanted = v[f"clip_max_b{bits}"].T
    # A group that is clipped on both sides has its zero half way between two codes, where the last bit decides.
    assert (np.abs(got - wanted) < 1e-6 * wanted).mean() > 0.9

    def error(most):
        clipped = np.clip(w.reshape(-1, group, w.shape[1]), -most[:, None], most[:, None])
        step = (clipped.max(1) - clipped.min(1))[:, None] / (2**bits - 1)
        zero = np.clip(-np.round(clipped.min(1)[:, None] / step), 0, 2**bits - 1)
        rounded = (np.clip(np.round(clipped / step) + zero, 0, 2**bits - 1) - zero) * step
        return np.square(
            np.einsum("nbg,bgo->nbo", x.reshape(len(x), -1, group), rounded - w.reshape(clipped.shape))
        ).mean()

    np.testing.assert_allclose(error(got), error(wanted), rtol=0.02)


def test_a_search_never_does_worse_than_rounding_and_does_not_mind_the_size_of_inputs():
    x = jax.random.normal(jax.random.key(2), (40, 16)) * jnp.exp(jax.random.normal(jax.random.key(3), (16,)))
    kernel = {"k": jax.random.normal(jax.random.key(4), (16, 8))}
    found = awq_scale(lambda k: x @ k["k"], kernel, jnp.abs(x).mean(0), bits=3, group=8)
    plain = jnp.square(x @ (quantise(kernel["k"], bits=3, group=8).dequantise() - kernel["k"])).mean()
    np.testing.assert_allclose(found.losses[0], plain, rtol=1e-4)
    assert found.losses.min() <= found.losses[0]
    again = awq_scale(lambda k: 5 * x @ k["k"], kernel, 5 * jnp.abs(x).mean(0), bits=3, group=8)
    np.testing.assert_allclose(again.s, found.s, rtol=1e-4)


def test_a_decoder_keeps_its_function_until_it_is_rounded_and_is_better_than_plain_rounding():
    params, report = jax.device_get(awq(MODEL, PARAMS, TOKENS, bits=3, group=16))
    wanted = jax.nn.log_softmax(MODEL.apply({"params": PARAMS}, TOKENS))
    folded = PARAMS
    for site, search in report.searches.items():
        folded = scale_inputs(MODEL.module.config, folded, site, search.s)
        assert (search.losses.min(1) <= search.losses[:, 0]).all() and search.losses.shape == (2, 20)
    np.testing.assert_allclose(jax.nn.log_softmax(MODEL.apply({"params": folded}, TOKENS)), wanted, atol=1e-4)

    def kl(tree):
        log_q = jax.nn.log_softmax(MODEL.apply({"params": tree}, TOKENS))
        return float((jnp.exp(wanted) * (wanted - log_q)).sum(-1).mean())

    plain = quantise_blocks(MODEL.module.config, PARAMS, bits=3, group=16)
    assert 0 < kl(params) < 0.9 * kl(plain)
    kernels = [leaf for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QTensor))]
    assert sum(isinstance(leaf, QTensor) for leaf in kernels) == 7
    np.testing.assert_array_equal(params["embed"]["tokens"], PARAMS["embed"]["tokens"])


def test_a_model_whose_makers_cannot_take_factors_up_is_searched_where_it_can():
    model = transformer(gpt2(vocabulary=40, layers=2, width=32, heads=2, hidden=64, context=32, activation="gelu"))
    _, report = awq(model, model.init(jax.random.key(0)), TOKENS, bits=4, group=16, clip=False)
    assert set(report.searches) == {"attn_in", "attn_z", "mlp_in"}


def test_bad_calibrations_and_groups_are_refused():
    with pytest.raises(ValueError, match="group 48 does not divide the 32 inputs of attn/q"):
        awq(MODEL, PARAMS, TOKENS, bits=4, group=48)
    with pytest.raises(ValueError, match="wanted texts"):
        calibrate(MODEL, PARAMS, TOKENS[:0])
    broken = select.map_at(PARAMS, "blocks/mlp/up/kernel", lambda kernel: kernel.at[1].set(jnp.nan))
    with pytest.raises(ValueError, match=r'"mlp_act" is not finite in layer 1'):
        calibrate(MODEL, broken, TOKENS)


def test_salient_inputs_are_chosen_by_what_was_asked():
    kernel = jnp.diag(jnp.asarray([1.0, 5.0, 2.0, 4.0]))
    size = jnp.asarray([3.0, 1.0, 9.0, 2.0])
    assert salient(kernel, size, 0.25, "act").tolist() == [False, False, True, False]
    assert salient(kernel, size, 0.5, "weight").tolist() == [False, True, False, True]
    assert salient(kernel, size, 0.01, "act").sum() == 1
    picks = jnp.stack([salient(kernel, size, 0.25, "random", key) for key in jax.random.split(jax.random.key(0), 20)])
    assert (picks.sum(1) == 1).all() and (picks.sum(0) > 0).all()
    for by, share, key in (("size", 0.1, None), ("act", 0.0, None), ("act", 1.5, None), ("random", 0.1, None)):
        with pytest.raises(ValueError, match="wanted act, weight, or random with a key"):
            salient(kernel, size, share, by, key)


def test_kept_inputs_are_untouched_and_the_others_rounded():
    kernel = jax.random.normal(jax.random.key(5), (2, 8, 6))
    kept = jnp.arange(16) % 5 == 0
    got = mixed_salient(kernel, kept, bits=3, group=8, inputs=2)
    rounded = quantise(kernel, bits=3, group=8, inputs=2).dequantise()
    assert got.shape == kernel.shape
    np.testing.assert_array_equal(got.reshape(16, 6)[kept], kernel.reshape(16, 6)[kept])
    np.testing.assert_array_equal(got.reshape(16, 6)[~kept], rounded.reshape(16, 6)[~kept])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), factor=st.sampled_from([1.0, 2.0, 8.0]), share=st.sampled_from([0.0, 0.1, 1.0]))
def test_scaling_some_inputs(seed, factor, share):
    keys = jax.random.split(jax.random.key(seed), 2)
    kernel, scaled = jax.random.normal(keys[0], (16, 6)), jax.random.uniform(keys[1], (16,)) < share
    got, steps = scaled_salient(kernel, scaled, factor, bits=4, group=8)
    plain = quantise(kernel, bits=4, group=8)
    if factor == 1 or bool(scaled.all()) or not scaled.any():
        # A common factor is taken up by the step, and for powers of two no rounding differs.
        np.testing.assert_array_equal(got, plain.dequantise())
    holds = np.asarray(scaled).reshape(2, 8).any(1)
    np.testing.assert_array_equal(np.asarray(steps)[~holds], 1)
    assert (np.asarray(steps) >= 1 - 1e-6).all() and (np.asarray(steps) <= factor + 1e-5).all()
    # The error of a scaled weight is at most a step of its group over s: one half by rounding, one by the zero.
    bound = np.asarray(plain.scales * steps).repeat(8, 0) / np.where(np.asarray(scaled), factor, 1)[:, None]
    assert (np.abs(got - kernel) <= bound + 1e-6).all()


def test_one_group_of_all_inputs():
    params, report = awq(MODEL, PARAMS, TOKENS, bits=4, group=None)
    assert params["blocks"]["mlp"]["down"]["kernel"].scales.shape == (2, 1, 32)
    assert params["blocks"]["attn"]["o"]["kernel"].scales.shape == (2, 1, 32)
    assert all((search.losses.min(1) <= search.losses[:, 0]).all() for search in report.searches.values())
