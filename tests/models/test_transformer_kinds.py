"""Every switch of the configuration against the float64 reference, every activation of it; bad configurations."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core.edits import Add, at
from mechlab.core.sites import list_sites
from mechlab.models.transformer import TransformerConfig, gpt2, llama, run_layers, transformer, unembed
from mechlab.models.transformer_config import LinearRope, Llama3Rope, LongRope
from tests.models.reference import forward
from tests.models.tiny import SIZES, scrambled

TOKENS = np.random.default_rng(0).integers(0, 11, (2, 7)).astype(np.int32)
POSITIONS = np.asarray([[-1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, -1]], np.int32)

KINDS: dict[str, TransformerConfig] = {
    "neox": gpt2(
        **SIZES, parallel=True, positions="rotary", rope_width=2, tied=False, bias_qkv=False, activation="gelu"
    ),
    "mistral": llama(**SIZES, window=3, kv_heads=2, bias_qkv=True),
    "gemma2": llama(
        **SIZES,
        norm="rms_plus_one",
        norm_order="sandwich",
        window=2,
        local_layers=(0, 2),
        attn_scale=0.7,
        attn_softcap=0.5,
        logit_softcap=2.0,
        embed_scale=4.0,
    ),
    "gemma3": llama(
        **SIZES,
        norm="rms_plus_one",
        qk_norm=True,
        window=3,
        local_layers=(1,),
        rope_local_theta=10.0,
        rope_theta=100.0,
        rope_scaling=LinearRope(factor=4.0),
    ),
    "llama3": llama(
        **SIZES | {"head_width": 12},
        rope_theta=50.0,
        rope_scaling=Llama3Rope(factor=4.0, low=1.0, high=3.0, original=24),
    ),
    "longrope": llama(**SIZES, rope_scaling=LongRope(factors=(1.5, 4.0), amplitude=1.2), bias_mlp=True),
    "bert": gpt2(
        **SIZES,
        norm_order="post",
        norm_eps=1e-12,
        embed_norm=True,
        token_types=2,
        causal=False,
        unembed=False,
        bias_o=False,
    ),
    "attention-only": gpt2(**SIZES | {"hidden": None}, embed_conv=2, bias_norm=False, activation="quick_gelu"),
    "parallel-sandwich": gpt2(**SIZES, parallel=True, norm_order="sandwich", activation="quick_gelu"),
}


def build(kind: str) -> Any:
    model = transformer(KINDS[kind])
    return model, scrambled(jax.eval_shape(model.init, jax.random.key(0)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_activation_equals_the_reference_with_and_without_padding(kind: str) -> None:
    model, params = build(kind)
    names = tuple(list_sites(model.module, TOKENS))

    @jax.jit
    def everything(positions: jax.Array) -> Any:
        return model.capture({"params": params}, TOKENS, positions, sites=names)

    fused = jax.jit(lambda positions: model.apply({"params": params}, TOKENS, positions))
    for positions in (np.broadcast_to(np.arange(7, dtype=np.int32), TOKENS.shape), POSITIONS):
        wanted, wanted_acts = forward(params, TOKENS, KINDS[kind], positions=positions)
        out, acts = everything(positions)
        real = positions >= 0
        assert set(acts) == set(wanted_acts) == set(names)
        np.testing.assert_allclose(out[real], wanted[real], atol=1e-4, rtol=0)
        np.testing.assert_allclose(fused(positions)[real], wanted[real], atol=1e-4, rtol=0)
        for name in ("resid_post", "attn_out", "q", "attn_z", "mlp_act"):
            if name in acts:
                np.testing.assert_allclose(acts[name][:, real], wanted_acts[name][:, real], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", ["gemma3", "bert", "attention-only"])
def test_running_from_a_middle_layer_equals_the_whole_model(kind: str) -> None:
    model, params = build(kind)
    edits = at(list_sites(model.module, TOKENS), "attn_out", Add(jnp.ones(16)), layer=2)
    variables = {"params": params, "edits": edits}
    out, acts = model.capture(variables, TOKENS, POSITIONS, sites=("resid_pre", "resid_post"))
    final = run_layers(model, variables, acts["resid_pre"][1], 1, POSITIONS)
    np.testing.assert_allclose(final, acts["resid_post"][-1], atol=1e-5)
    np.testing.assert_allclose(unembed(model, variables, final), out, atol=1e-5)


def test_token_types_reach_the_output_and_are_zero_by_default() -> None:
    model, params = build("bert")
    types = np.asarray([[0, 0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0, 1]])
    wanted, _ = forward(params, TOKENS, KINDS["bert"], types=types)
    np.testing.assert_allclose(model.apply({"params": params}, TOKENS, None, types), wanted, atol=1e-4)
    plain, _ = forward(params, TOKENS, KINDS["bert"])
    assert np.abs(plain - wanted).max() > 0.1


def test_a_window_as_long_as_the_text_and_no_local_layers_change_nothing() -> None:
    model, params = build("mistral")
    free = transformer(dataclasses.replace(KINDS["mistral"], window=None))
    whole = transformer(dataclasses.replace(KINDS["mistral"], window=7))
    none = transformer(dataclasses.replace(KINDS["mistral"], local_layers=()))
    wanted = free.apply({"params": params}, TOKENS)
    assert np.abs(model.apply({"params": params}, TOKENS) - wanted).max() > 0.1
    for other in (whole, none):
        np.testing.assert_allclose(other.apply({"params": params}, TOKENS), wanted, atol=1e-5)


def test_alternating_layers_trace_to_a_program_that_does_not_grow_with_depth() -> None:
    def lines(layers: int) -> int:
        config = dataclasses.replace(KINDS["gemma3"], layers=layers, local_layers=tuple(range(0, layers, 2)))
        model = transformer(config)
        params = jax.eval_shape(model.init, jax.random.key(0))
        return len(jax.jit(model.apply).lower({"params": params}, TOKENS).as_text().splitlines())

    assert lines(2) == lines(16)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"width": 0}, ["width must be at least 1"]),
        ({"hidden": 0}, ["hidden must be at least 1 or None"]),
        ({"heads": 3}, ["heads=3 does not divide width=16"]),
        ({"kv_heads": 3}, ["kv_heads=3 does not divide heads=4"]),
        ({"norm": "batch", "norm_order": "mid"}, ["norm must be one of", "norm_order must be one of"]),
        ({"positions": "sinusoidal", "parallel": True, "hidden": None}, ["positions must be", "parallel blocks need"]),
        ({"positions": "rotary", "rope_width": 3}, ["even width of 2..4", "rope_width=3"]),
        ({"positions": "rotary", "rope_scaling": LongRope(factors=(1.0,), amplitude=1.0)}, ["2 factors", "got 1"]),
        (
            {"positions": "rotary", "rope_scaling": Llama3Rope(factor=2.0, low=4.0, high=1.0, original=8)},
            ["low < high"],
        ),
        ({"positions": "rotary", "rope_local_theta": 10.0}, ["rope_local_theta without a window"]),
        ({"local_layers": (0,)}, ["local_layers without a window"]),
        ({"window": 2, "local_layers": (2, 1)}, ["increasing layers of 0..2"]),
        ({"window": 2, "local_layers": (3,)}, ["increasing layers of 0..2"]),
        ({"window": 2, "causal": False}, ["a window needs causal attention"]),
        ({"attn_softcap": 0.0, "logit_softcap": -1.0}, ["attn_softcap must be positive", "logit_softcap must be"]),
        ({"activation": "geru"}, ['Did you mean "gelu"']),
    ],
)
def test_bad_configurations_are_refused_with_all_their_problems(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((ValueError, KeyError)) as error:
        gpt2(**SIZES | change)
    for word in words:
        assert word in str(error.value)


def test_bad_inputs_are_refused() -> None:
    model, params = build("neox")
    variables = {"params": params}
    for inputs, word in (
        ((TOKENS.astype(float),), "tokens must be integers"),
        ((TOKENS + 11,), "tokens must be in 0..10"),
        ((np.zeros((1, 13), int),), "longer than the model's context of 12"),
        ((TOKENS, POSITIONS + 10), "positions must be in -1..11"),
        ((TOKENS, None, TOKENS), "the model has none"),
    ):
        with pytest.raises(ValueError, match=word):
            model.apply(variables, *inputs)
    model, params = build("bert")
    with pytest.raises(ValueError, match=r"token types must be in 0\.\.1"):
        model.apply({"params": params}, TOKENS, None, TOKENS)
