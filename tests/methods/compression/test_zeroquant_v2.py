"""ZeroQuant-V2: rounded activations, reconstruction, GPTQ and LoRC over whole decoders; DeepSpeed's grids."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core.kernel_forms import LowRank
from mechlab.methods.compression.activations import RoundInputs, Scheme, round_inputs, static_grids
from mechlab.methods.compression.decoders import (
    calibrate,
    dequantise_blocks,
    kernel_of,
    places,
    quantise_blocks,
    sites_of,
    with_kernels,
)
from mechlab.methods.compression.gptq import gptq, hessian
from mechlab.methods.compression.quality import qualities, quality
from mechlab.methods.compression.reconstruction import global_blocks, local_blocks, zq_global, zq_local
from mechlab.methods.compression.rounding import quantise, quantise_activations
from mechlab.methods.compression.zeroquant_v2 import (
    compensate_blocks,
    deepspeed_round,
    gptq_blocks,
    sensitivity_class,
)
from mechlab.models.blocks import one_block
from mechlab.models.transformer import gpt2, llama, run_layers, transformer

MODEL = transformer(llama(vocabulary=40, layers=2, width=16, heads=2, hidden=32, context=32, init_std=None))
CONFIG = MODEL.module.config
PARAMS = MODEL.init(jax.random.key(0))
TOKENS = jax.random.randint(jax.random.key(1), (6, 12), 0, 40)
GRID = {"bits": 4, "include_zero": True}
A8 = (Scheme(), Scheme(bits=8))
TRAIN = {"steps": 20, "rates": (0.003, 0.01)}
NAMES = [place.name for place in places(CONFIG)]


@functools.cache
def acts():
    return calibrate(MODEL, PARAMS, TOKENS, also=("resid_pre",))


@jax.jit
def run(params, edits):
    return MODEL.apply({"params": params, "edits": edits}, TOKENS)


def logits(params, edits=None):
    return run(params, edits or {})


@functools.partial(jax.jit, static_argnames="bits")
def rtn(bits):
    return quantise_blocks(CONFIG, PARAMS, bits=bits, include_zero=True)


whole = jax.jit(dequantise_blocks)


# Activations


def test_the_scheme_that_acts_is_data_and_the_rounding_is_that_of_the_grids():
    x = jax.random.normal(jax.random.key(2), (2, 3, 16))
    schemes = (
        Scheme(),
        Scheme(bits=8, symmetric=True),
        Scheme(bits=4, mode="group", group=8),
        Scheme(4, mode="tensor"),
    )
    run = jax.jit(lambda which: RoundInputs(which, None, schemes)(x))
    for i, scheme in enumerate(schemes):
        np.testing.assert_allclose(run(jnp.asarray(i)), quantise_activations(x, **scheme._asdict()), atol=1e-6)
    np.testing.assert_array_equal(run(jnp.asarray(0)), x)
    lanes = jax.vmap(lambda which: RoundInputs(which, None, schemes)(x))(jnp.arange(4))
    np.testing.assert_allclose(lanes[2], run(jnp.asarray(2)), atol=1e-6)


def test_a_token_has_one_grid_over_its_heads_and_gradients_pass():
    x = jax.random.normal(jax.random.key(3), (2, 3, 4, 5)) * jnp.asarray([1, 9, 1, 1.0])[:, None]
    edit = RoundInputs(jnp.asarray(0), None, (Scheme(bits=4),))
    flat = quantise_activations(x.reshape(2, 3, 20), bits=4, symmetric=False)
    np.testing.assert_allclose(edit(x), flat.reshape(x.shape), atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: (3 * edit(x)).sum())(x), 3 * jnp.ones_like(x))


def test_a_static_grid_is_the_same_for_every_text_and_clips():
    x = jax.random.normal(jax.random.key(4), (2, 1, 3, 16))
    grids = static_grids({"mlp_in": x}, bits=8)
    edit = RoundInputs(jnp.asarray(0), jax.tree.map(lambda leaf: leaf[1], grids["mlp_in"]), (Scheme(8, mode="static"),))
    half = (float(x[1].max()) - float(x[1].min())) / 255 / 2
    assert float(jnp.abs(edit(x[1]) - x[1]).max()) <= half * 1.001
    assert float(edit(100 * x[1]).max()) <= float(x[1].max()) + 2 * half
    with pytest.raises(ValueError, match="needs the grid"):
        RoundInputs(jnp.asarray(0), None, (Scheme(8, mode="static"),))(x[1])


def test_edits_round_every_input_of_the_blocks_and_nothing_else():
    edits = round_inputs(MODEL, A8, 1)
    assert set(edits) == set(sites_of(CONFIG))
    np.testing.assert_array_equal(logits(PARAMS, round_inputs(MODEL, A8)), logits(PARAMS))
    _, seen = MODEL.capture({"params": PARAMS, "edits": edits}, TOKENS, sites=("attn_in", "resid_pre"))
    first = acts()["attn_in"][0]
    np.testing.assert_allclose(seen["attn_in"][0], quantise_activations(first, bits=8, symmetric=False), atol=1e-5)
    np.testing.assert_array_equal(seen["resid_pre"][0], acts()["resid_pre"][0])
    assert 0 < float(jnp.abs(logits(PARAMS, edits) - logits(PARAMS)).max()) < 1
    with pytest.raises(ValueError, match="one of the 2 schemes"):
        round_inputs(MODEL, A8, 2)
    with pytest.raises(ValueError, match="between 2 and 8"):
        logits(PARAMS, round_inputs(MODEL, (Scheme(bits=9),)))
    with pytest.raises(ValueError, match="16 channels"):
        logits(PARAMS, round_inputs(MODEL, (Scheme(8, mode="group", group=5),)))


# One block


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_block_alone_is_the_block_of_the_model(kind):
    model = MODEL if kind == "llama" else transformer(gpt2(vocabulary=40, layers=2, width=16, heads=2, hidden=32))
    params = PARAMS if kind == "llama" else model.init(jax.random.key(5))
    sites = ("resid_pre", "resid_post", "mlp_act")
    _, seen = model.capture({"params": params}, TOKENS, sites=sites)
    for layer in range(2):
        own = {"block": jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"])}
        block = one_block(model.module.config)
        out, mine = block.capture({"params": own}, seen["resid_pre"][layer], jnp.asarray(layer), sites=("mlp_act",))
        np.testing.assert_allclose(out, seen["resid_post"][layer], atol=1e-5)
        np.testing.assert_allclose(mine["mlp_act"], seen["mlp_act"][layer], atol=1e-5)
    np.testing.assert_allclose(run_layers(model, {"params": params}, seen["resid_pre"][0]), out, atol=1e-5)


# Reconstruction


def linear(seed=0):
    w = jax.random.normal(jax.random.key(seed), (12, 7))
    x = jax.random.normal(jax.random.key(seed + 1), (40, 12)) @ (jnp.eye(12) + 0.4)
    return w, x


def test_the_loss_without_texts_is_the_mean_squared_error_of_the_outputs():
    w, x = linear()
    seen = quantise_activations(x, bits=3, symmetric=False)
    found = zq_local(w, x, seen, steps=0, **GRID)
    by_hand = jnp.square(x @ w - seen @ quantise(w, **GRID).dequantise()).mean()
    np.testing.assert_allclose(found.loss[0], by_hand, rtol=1e-4)


def test_no_steps_are_plain_rounding():
    w, x = linear()
    found = zq_local(w, x, x, steps=0, rates=(0.1, 0.01), **GRID)
    np.testing.assert_array_equal(found.kernels, w)
    np.testing.assert_allclose(found.loss, found.loss[0].repeat(3), rtol=1e-6)
    layer = jax.tree.map(lambda leaf: leaf[0], PARAMS["blocks"])
    stream = acts()["resid_pre"][0]
    found = jax.jit(lambda x: zq_global(jax.random.key(0), CONFIG, layer, x, steps=0, rates=(0.1,), **GRID))(stream)
    np.testing.assert_array_equal(found.kernels["attn/q"], PARAMS["blocks"]["attn"]["q"]["kernel"][0])
    np.testing.assert_allclose(found.loss[0], found.loss[1], rtol=1e-6)


def test_local_training_lowers_the_error_of_the_outputs():
    w, x = linear()
    found = jax.jit(lambda w, x: zq_local(w, x, x, steps=40, rates=(0.01, 0.05), **GRID))(w, x)
    q = quantise(found.kernels, **GRID).dequantise()
    np.testing.assert_allclose(jnp.square(x @ (w - q)).mean(), found.loss.min(), rtol=1e-3)
    assert float(found.loss.min()) < 0.9 * float(found.loss[0])


@pytest.fixture(scope="module")
def trained():
    """ZQ-Local and ZQ-Global of a decoder with inputs as they are and of 8 bits, mapped over; and in turn."""
    options = {"schemes": A8} | TRAIN | GRID
    lanes = jnp.arange(2)
    streams = acts()["resid_pre"]
    key = jax.random.key(3)

    @jax.jit
    def run(lanes):
        local = jax.vmap(lambda which: local_blocks(CONFIG, PARAMS, acts(), which=which, **options))(lanes)
        both = jax.vmap(lambda which: global_blocks(key, CONFIG, PARAMS, streams, which=which, **options))(lanes)
        in_turn = global_blocks(key, CONFIG, PARAMS, streams, in_turn=True, which=1, **options)
        return local, both, in_turn

    return run(lanes)


def test_reconstruction_of_a_decoder_lowers_its_losses(trained):
    local, both, _ = trained
    assert set(local.kernels) == set(both.kernels) == set(NAMES)
    for name in NAMES:
        assert local.kernels[name].shape == (2, *kernel_of(PARAMS, places(CONFIG)[NAMES.index(name)]).shape)
        assert (local.loss[name].min(-1) <= local.loss[name][..., 0]).all(), name
    assert both.loss.shape == (2, 2, 3) and (both.loss.min(-1) < both.loss[..., 0]).all()
    # A kernel is trained alone, whatever shares its program.
    x = acts()["attn_z"][1].reshape(6, 12, 16)
    alone = zq_local(PARAMS["blocks"]["attn"]["o"]["kernel"][1].reshape(16, 16), x, x, **TRAIN, **GRID)
    np.testing.assert_allclose(local.loss["attn/o"][0, 1], alone.loss, rtol=1e-3)
    # Rounded inputs make another problem.
    assert (both.loss[1, :, 0] != both.loss[0, :, 0]).all()


def test_the_loss_of_a_block_is_that_of_the_quantised_model(trained):
    _, both, _ = trained
    layer = jax.tree.map(lambda leaf: leaf[:1], PARAMS["blocks"])

    @jax.jit
    def by_hand(kernels, x):
        q = quantise_blocks(CONFIG, with_kernels({"blocks": layer}, kernels), **GRID)
        one = jax.tree.map(lambda leaf: leaf[0], dequantise_blocks(q)["blocks"])
        edits = {site: RoundInputs(jnp.asarray(1), None, A8) for site in sites_of(CONFIG)}
        out = one_block(CONFIG).apply({"params": {"block": one}, "edits": edits}, x, jnp.asarray(0))
        return jnp.square(out - acts()["resid_pre"][1]).mean()

    first = jax.tree.map(lambda leaf: leaf[1, :1], both.kernels)
    np.testing.assert_allclose(by_hand(first, acts()["resid_pre"][0]), both.loss[1, 0].min(), rtol=1e-3)


def test_blocks_in_turn_read_what_quantised_blocks_give(trained):
    _, both, in_turn = trained
    np.testing.assert_allclose(in_turn.kernels["mlp/up"][0], both.kernels["mlp/up"][1, 0], atol=1e-5)
    assert float(jnp.abs(in_turn.kernels["mlp/up"][1] - both.kernels["mlp/up"][1, 1]).max()) > 1e-4


# GPTQ and LoRC over decoders


def test_gptq_of_the_second_block_is_calibrated_on_what_the_first_gives():
    got = gptq_blocks(MODEL, PARAMS, TOKENS, bits=3)
    by_hand = gptq(kernel_of(PARAMS, places(CONFIG)[0])[0], hessian(acts()["attn_in"][0]), bits=3)
    np.testing.assert_array_equal(got["blocks"]["attn"]["q"]["kernel"].codes[0], by_hand.codes)
    rounded = whole(got)
    _, seen = MODEL.capture({"params": rounded}, TOKENS, sites=("attn_in",))
    by_hand = gptq(kernel_of(PARAMS, places(CONFIG)[0])[1], hessian(seen["attn_in"][1]), bits=3)
    same = got["blocks"]["attn"]["q"]["kernel"].codes[1] == by_hand.codes
    assert same.mean() > 0.98
    cost = qualities(MODEL, PARAMS, {"rtn": (whole(rtn(3)), {}), "gptq": (rounded, {})}, TOKENS)
    assert float(cost["gptq"].kl.mean()) < float(cost["rtn"].kl.mean())


def lost(params):
    """The size of what quantisation changed, by kernel."""
    arrays = dequantise_blocks(params)
    return jnp.stack([jnp.linalg.norm(kernel_of(arrays, at) - kernel_of(PARAMS, at)) for at in places(CONFIG)])


@jax.jit
def repair(params, q):
    """By rank and bits of the factors: logits, logits of the sum, and the errors."""
    ranks = {"none": (0, 16), "two": (2, 16), "two of 8 bits": (2, 8), "all": (16, 16)}
    repaired = {name: compensate_blocks(CONFIG, params, q, m, factor_bits=bits) for name, (m, bits) in ranks.items()}
    assert isinstance(repaired["two"]["blocks"]["attn"]["o"]["kernel"], LowRank)
    beside = {name: MODEL.apply({"params": one}, TOKENS) for name, one in repaired.items()}
    return beside, dequantise_blocks(repaired["two"]), {name: lost(one) for name, one in repaired.items()}


def test_a_compensated_decoder_runs_like_the_sum_and_full_rank_is_no_change():
    beside, added, errors = repair(PARAMS, rtn(3))
    np.testing.assert_allclose(beside["two"], logits(added), atol=1e-4)
    np.testing.assert_allclose(beside["all"], logits(PARAMS), atol=1e-3)
    np.testing.assert_allclose(beside["none"], logits(whole(rtn(3))), atol=1e-4)
    assert (errors["all"] < 1e-3 * errors["none"]).all() and (errors["two"] < errors["none"]).all()
    np.testing.assert_allclose(errors["two"], errors["two of 8 bits"], rtol=0.05)
    assert not np.allclose(errors["two"], errors["two of 8 bits"], rtol=1e-6)


def test_a_weighted_lorc_serves_the_outputs():
    x = {site: value.reshape(2, 72, -1) for site, value in acts().items() if site != "resid_pre"}
    hessians = jax.jit(lambda x: {site: jax.vmap(hessian)(value) for site, value in x.items()})(x)
    weighted = compensate_blocks(CONFIG, PARAMS, rtn(3), 2, hessians=hessians)

    @jax.jit
    def errors(params):
        """Of the kernels and of their outputs."""
        arrays = dequantise_blocks(params)
        left = {at: kernel_of(PARAMS, at) - kernel_of(arrays, at) for at in places(CONFIG)}
        flat = {at: e.reshape(2, x[at.site].shape[-1], -1) for at, e in left.items()}
        of_outputs = [jnp.linalg.norm(x[at.site] @ e) for at, e in flat.items()]
        return jnp.stack([jnp.linalg.norm(e) for e in flat.values()]), jnp.stack(of_outputs)

    plain, ours = errors(jax.jit(lambda q: compensate_blocks(CONFIG, PARAMS, q, 2))(rtn(3))), errors(weighted)
    assert (plain[0] <= ours[0]).all() and (plain[1] >= ours[1]).all()


# Small parts


def test_quality_of_many_is_that_of_each():
    variants = {"rtn": (whole(rtn(3)), round_inputs(MODEL, A8)), "a8": (PARAMS, round_inputs(MODEL, A8, 1))}
    many = qualities(MODEL, PARAMS, variants, TOKENS, batch=3)
    for name, (params, edits) in variants.items():
        one = quality(MODEL, PARAMS, params, TOKENS, edits=edits, batch=3)
        np.testing.assert_allclose(many[name].kl, one.kl, rtol=1e-4, atol=1e-7)
    assert many["rtn"].kl.shape == (6,) and float(many["rtn"].kl.mean()) > float(many["a8"].kl.mean()) > 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_deepspeed_s_quantisers_are_those_of_the_vectors(vectors, bits, kind):
    v = vectors("zeroquant_v2")
    got = deepspeed_round(v["w"].T.astype(np.float32), bits=bits, symmetric=kind == "sym")
    np.testing.assert_allclose(np.asarray(got).T, v[f"ds_{kind}_row_b{bits}"], atol=2e-6)


def test_classes_of_the_paper_and_relative_ones():
    assert sensitivity_class([0.1, 0.11, 0.5, 0.51]).tolist() == [1, 2, 2, 3]
    assert sensitivity_class([0.1, 0.11, 0.5, 0.51], base=11.9).tolist() == [1, 2, 2, 3]
    assert sensitivity_class(0.05, base=3.0) == 2


def test_what_makes_no_sense_is_refused():
    w, x = linear()
    local = functools.partial(zq_local, w)
    bad = [
        (lambda: local(x, x, steps=-1, **GRID), "steps >= 0"),
        (lambda: local(x, x, steps=1, rates=(), **GRID), "positive rates"),
        (lambda: local(x, x, steps=1, rates=(0.0,), **GRID), "positive rates"),
        (lambda: local(x[:, :5], x[:, :5], steps=1, **GRID), "wanted calibration inputs"),
        (lambda: local(x[:0], x[:0], steps=1, **GRID), "wanted calibration inputs"),
        (lambda: local(x, x, steps=1, bits=9), "between 2 and 8"),
        (lambda: local(x, x, steps=1, bits=4, group=5), "12 inputs"),
        (lambda: zq_global(jax.random.key(0), CONFIG, {}, x, steps=1, **GRID), r"stream \(B, T, D\)"),
        (lambda: gptq_blocks(MODEL, PARAMS, TOKENS[:0], bits=4), "texts"),
        (lambda: gptq_blocks(MODEL, PARAMS, TOKENS, bits=4, group=5), "attn/q, layer 0: .*16 inputs"),
        (lambda: compensate_blocks(CONFIG, PARAMS, quantise_blocks(CONFIG, PARAMS, bits=4), 17), r"0\.\.16"),
        (lambda: compensate_blocks(CONFIG, PARAMS, quantise_blocks(CONFIG, PARAMS, bits=4), -1), r"0\.\.16"),
        (lambda: compensate_blocks(CONFIG, PARAMS, PARAMS, 1, factor_bits=1), "between 2 and 8"),
        (lambda: deepspeed_round(w, bits=1, symmetric=True), "between 2 and 8"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="floating"):
        zq_local(jnp.ones((12, 7), jnp.int32), x, x, steps=1, **GRID)
