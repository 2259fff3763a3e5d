"""The decoder's configuration, initialisation and layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core import select
from mechlab.models.layers import ACTIVATIONS, linear, rotate, rotation
from mechlab.models.transformer import TransformerConfig, gpt2, llama, transformer
from tests.models import reference
from tests.models.tiny import CONFIGS, SIZES, TOKENS, decoder


def shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    params = jax.eval_shape(transformer(config).init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in select.get(params, "**").items()}


def test_parameter_shapes_of_a_gpt2() -> None:
    norms = {f"blocks/norm_{n}/{leaf}": (3, 16) for n in ("attn", "mlp") for leaf in ("scale", "bias")}
    projections = {f"blocks/attn/{n}/kernel": (3, 16, 4, 4) for n in "qkv"}
    biases = {f"blocks/attn/{n}/bias": (3, 4, 4) for n in "qkv"}
    assert shapes(CONFIGS["gpt2"]) == norms | projections | biases | {
        "embed/tokens": (11, 16),
        "embed/positions": (12, 16),
        "blocks/attn/o/kernel": (3, 4, 4, 16),
        "blocks/attn/o/bias": (3, 16),
        "blocks/mlp/up/kernel": (3, 16, 24),
        "blocks/mlp/up/bias": (3, 24),
        "blocks/mlp/down/kernel": (3, 24, 16),
        "blocks/mlp/down/bias": (3, 16),
        "final_norm/scale": (16,),
        "final_norm/bias": (16,),
    }


def test_parameter_shapes_of_a_llama() -> None:
    assert shapes(CONFIGS["llama"]) == {
        "embed/tokens": (11, 16),
        "unembed/kernel": (16, 11),
        "final_norm/scale": (16,),
        "blocks/norm_attn/scale": (3, 16),
        "blocks/norm_mlp/scale": (3, 16),
        "blocks/attn/q/kernel": (3, 16, 4, 4),
        "blocks/attn/k/kernel": (3, 16, 2, 4),
        "blocks/attn/v/kernel": (3, 16, 2, 4),
        "blocks/attn/o/kernel": (3, 4, 4, 16),
        "blocks/mlp/gate/kernel": (3, 16, 24),
        "blocks/mlp/up/kernel": (3, 16, 24),
        "blocks/mlp/down/kernel": (3, 24, 16),
    }


def test_published_sizes_without_allocating_them() -> None:
    def count(config: TransformerConfig) -> int:
        return sum(int(np.prod(shape)) for shape in shapes(config).values())

    assert count(gpt2()) == 124_439_808
    assert count(llama()) == 15_191_712


def test_initialisation_is_normal_and_differs_between_layers_and_keys() -> None:
    model = transformer(gpt2(vocabulary=50, layers=3, width=64, heads=4, hidden=128, context=32))
    params = model.init(jax.random.key(0))
    for path, leaf in select.get(params, "**").items():
        if path.endswith(("kernel", "tokens", "positions")):
            assert abs(leaf.std() / 0.02 - 1) < 0.1, path
        else:
            np.testing.assert_array_equal(leaf, float(path.endswith("scale")))
        assert leaf.dtype == jnp.float32
    kernel = params["blocks"]["attn"]["q"]["kernel"]
    assert not np.isclose(kernel[0], kernel[1]).all()
    assert not np.array_equal(kernel, params["blocks"]["attn"]["k"]["kernel"])
    again, other = model.init(jax.random.key(0)), model.init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert not np.array_equal(other["embed"]["tokens"], params["embed"]["tokens"])


def test_parameters_stay_float32_in_a_bfloat16_model() -> None:
    model = transformer(dataclasses.replace(CONFIGS["llama"], dtype="bfloat16"))
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def make(**change: Any) -> TransformerConfig:
    return TransformerConfig(**(SIZES | change))


def test_all_problems_of_a_configuration_are_listed_together() -> None:
    with pytest.raises(ValueError) as caught:
        make(width=18, heads=4, kv_heads=3, norm="batch", positions="alibi")
    message = str(caught.value)
    for part in (
        "heads=4 does not divide width=18",
        "kv_heads=3 does not divide heads=4",
        '"batch"',
        '"alibi"',
    ):
        assert part in message


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 20, "heads": 4, "positions": "rotary"}, "even width of 2..5, got head width 5"),
        ({"heads": 3}, "heads=3 does not divide width=16; give head_width"),
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"norm": "none"}, 'norm must be one of layer, rms, rms_plus_one, got "none"'),
        ({"positions": "none"}, "positions must be"),
    ],
)
def test_bad_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_an_unknown_activation_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r'"gelu_than".*Did you mean "gelu_tanh"'):
        make(activation="gelu_than")


def test_a_head_width_of_ones_own_is_allowed() -> None:
    assert shapes(make(heads=3, head_width=6))["blocks/attn/q/kernel"] == (3, 16, 3, 6)


@pytest.mark.parametrize(
    "change",
    [{"heads": 0}, {"layers": 0}, {"width": 0}, {"vocabulary": -1}, {"hidden": 0}, {"dtype": "float23"}],
    ids=str,
)
def test_sizes_below_one_and_unknown_dtypes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        make(**change)


def test_an_unknown_activation_is_listed_with_the_other_problems() -> None:
    with pytest.raises((ValueError, KeyError), match="activation") as caught:
        make(activation="nope", norm="none")
    assert "norm" in str(caught.value)


def test_a_context_of_one_token_is_possible() -> None:
    model = transformer(gpt2(**SIZES | {"context": 1}))
    assert model.apply({"params": model.init(jax.random.key(0))}, TOKENS[:, :1]).shape == (2, 1, 11)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_their_formulas(name: str) -> None:
    x = jnp.linspace(-6, 6, 101)
    np.testing.assert_allclose(ACTIVATIONS[name](x), reference.ACTIVATIONS[name](np.asarray(x)), rtol=1e-5, atol=1e-6)


def test_linear_contracts_the_last_input_axes() -> None:
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.normal(size=(2, 5, 3, 4)), rng.normal(size=(3, 4, 6, 7)), rng.normal(size=(6, 7))
    wanted = np.einsum("bthk,hkuv->btuv", x, kernel)
    args = (jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    np.testing.assert_allclose(linear(*args, None, inputs=2), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        linear(*args, jnp.asarray(bias, jnp.float32), inputs=2), wanted + bias, rtol=1e-4, atol=1e-4
    )
    assert linear(args[0].astype(jnp.bfloat16), args[1], None, inputs=2).dtype == jnp.bfloat16


def turned(x: jax.Array, position: int) -> jax.Array:
    """x (1, 1, H, K) rotated as at one position, wavelengths of base 10,000."""
    frequencies = 10_000.0 ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    return rotate(x, rotation(jnp.asarray([position]), frequencies))


def test_rotation_keeps_lengths_and_makes_scores_depend_on_the_distance() -> None:
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 2, 8)) for i in range(2))

    def score(t: int, s: int) -> jax.Array:
        both = (turned(x, p) for x, p in ((q, t), (k, s)))
        return jnp.einsum("bthk,bthk->h", *both)

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-4)
    assert not np.allclose(score(7, 3), score(7, 4), atol=1e-3)
    np.testing.assert_array_equal(turned(q, 0), q)
    far = turned(q, 1_000_003)
    np.testing.assert_allclose(jnp.linalg.norm(far, axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-4)


def test_rotary_angles_are_exact_in_bfloat16_beyond_position_256() -> None:
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    at_256, at_257 = (turned(x, p) for p in (256, 257))
    assert at_256.dtype == jnp.bfloat16
    assert not np.array_equal(at_256, at_257)


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_token_sees_a_later_one(kind: str) -> None:
    model, params = decoder(kind)
    run = jax.jit(model.apply)
    plain = run({"params": params}, TOKENS)
    changed = run({"params": params}, TOKENS.at[:, 3].add(1))
    np.testing.assert_array_equal(changed[:, :3], plain[:, :3])
    assert not np.allclose(changed[:, 3:], plain[:, 3:], atol=1e-3)
