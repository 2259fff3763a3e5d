"""KAT: released coefficients, fits, gains, the way from a vision transformer, sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from mechlab.core import select
from mechlab.kernels.rational import rational
from mechlab.methods.architectures import kat
from mechlab.models.kan import Coefficients, RationalMLP, SplineMLP
from mechlab.models.vit import ViTConfig, vit

WIDTHS: dict[str, Any] = {"layers": 3, "width": 64, "heads": 4, "hidden": 256}
SHAPE: dict[str, Any] = {"image": (8, 8), "patch": 4, "channels": 1} | WIDTHS
GRID = np.linspace(-3, 3, 2001)


def swish(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def values(start: Coefficients, x: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True):
        a, b = (jnp.asarray(part, jnp.float64)[None] for part in (start.a, start.b))
        return np.asarray(rational(jnp.asarray(x)[:, None], a, b, groups=1, form=start.form))[:, 0]


@pytest.mark.parametrize(
    ("name", "form", "function", "error"),
    [
        ("identity", "A", lambda x: x, 0),
        ("identity", "B", lambda x: x, 0),
        ("swish", "A", swish, 1.3e-6),
        ("gelu", "B", gelu, 3.5e-3),
        ("gelu_old", "A", gelu, 4.5e-3),
    ],
)
def test_released_coefficients_are_their_activations(name, form, function, error):
    assert np.abs(values(kat.rational_init(name, form), GRID) - function(GRID)).max() <= error


def test_the_released_gelu_is_wrong_in_the_form_of_the_kernels():
    start = dataclasses.replace(kat.rational_init("gelu", "B"), form="A")
    assert np.abs(values(start, GRID) - gelu(GRID)).max() == pytest.approx(1.46, abs=0.01)
    with pytest.raises(ValueError, match=r'"gelu" was fitted in form B .* use "gelu_old", or fit_rational'):
        kat.rational_init("gelu", "A")
    with pytest.raises(ValueError, match=r'unknown name "swich"\. Did you mean "swish"'):
        kat.rational_init("swich")


@pytest.mark.parametrize(
    ("function", "form", "error"),
    [(swish, "A", 2e-6), (swish, "B", 2e-6), (gelu, "B", 1e-3), (np.tanh, "A", 1e-4), (np.tanh, "B", 1e-4)],
)
def test_fits_are_as_good_as_they_say(function, form, error):
    start, largest = kat.fit_rational(function, form)
    assert start.form == form
    assert largest <= error
    assert np.abs(values(start, GRID) - function(GRID)).max() <= 1.1 * largest + 1e-12


def test_a_wider_fit_of_swish_is_better_far_out():
    x = np.linspace(-6, 6, 501)
    wide, _ = kat.fit_rational(swish, low=-6, high=6)
    apart = [np.abs(values(start, x) - swish(x)).max() for start in (wide, kat.SWISH)]
    assert apart[0] < 1e-3 < apart[1]


def test_a_function_that_is_not_finite_is_not_fitted():
    with pytest.raises(ValueError, match=r"must be finite, shaped like its input, on \[-3.0, 3.0\]"):
        kat.fit_rational(lambda x: np.where(x > 0, np.nan, x))
    with pytest.raises(ValueError, match="must be finite"):
        kat.fit_rational(swish, low=1, high=1)


def test_gains_equal_the_papers():
    wanted = {("identity", "A"): 1.0, ("swish", "A"): 2.8108, ("gelu_old", "A"): 2.3517, ("gelu", "B"): 2.3517}
    for (name, form), gain in wanted.items():
        assert kat.rational_gain(kat.rational_init(name, form)) == pytest.approx(gain, rel=1e-3)
    x = np.asarray(jax.random.normal(jax.random.key(0), (200_000,)), np.float64)
    measured = 1 / np.square(values(kat.SWISH, x)).mean()
    assert kat.rational_gain(kat.SWISH) == pytest.approx(measured, rel=0.02)


def test_variance_is_kept_with_s3_and_lost_without():
    def branch_variance(**options: Any) -> np.ndarray:
        model = vit(kat.kat(ViTConfig(**SHAPE), **options))
        params = model.init(jax.random.key(0))
        pixels = jax.random.normal(jax.random.key(1), (32, 8, 8, 1))
        acts = model.capture({"params": params}, pixels, sites=("mlp_out",))[1]["mlp_out"]
        return np.asarray(acts.var((1, 2, 3)))

    kept, lost = branch_variance(), branch_variance(variance_preserving=False)
    assert ((kept > 0.5) & (kept < 2)).all()
    assert (lost < 0.05).all()


def test_a_layer_is_its_definition(vectors):
    v = vectors("kat")
    x, a, b = (jnp.asarray(v[name], jnp.float32) for name in ("x", "numer", "denom"))
    kernel, bias = jax.random.normal(jax.random.key(0), (24, 5)), jnp.arange(5.0)
    wanted = np.einsum("btd,do->bto", v["y"], kernel) + bias
    np.testing.assert_allclose(kat.gr_kan(x, a, b, kernel, bias), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [8, None])
def test_a_kat_started_from_a_vision_transformer_is_that_transformer(groups):
    plain = ViTConfig(**SHAPE, classes=5, activation="silu")
    config = kat.kat(plain, groups=groups, share_numerator=groups is not None)
    params = vit(plain).init(jax.random.key(0))
    started = kat.vit_to_kat(params, config)
    shapes = jax.tree.map(jnp.shape, (started, jax.eval_shape(vit(config).init, jax.random.key(0))))
    assert shapes[0] == shapes[1]
    assert "first" not in params["blocks"]["mlp"]
    pixels = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    logits = [vit(c).apply({"params": p}, pixels) for c, p in ((plain, params), (config, started))]
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_only_plain_transformers_can_be_the_start():
    plain = ViTConfig(**SHAPE)
    with pytest.raises(ValueError, match="config must be of a KAT"):
        kat.vit_to_kat({}, plain)
    spline = vit(dataclasses.replace(plain, mlp=SplineMLP())).init(jax.random.key(0))
    with pytest.raises(KeyError, match="blocks/mlp/up/kernel"):
        kat.vit_to_kat(spline, kat.kat(plain))


def test_parameters_are_counted_as_in_the_paper():
    plain = ViTConfig(**SHAPE)
    for mlp, layers in (
        (kat.kat(plain).mlp, kat.layer_parameters(64, 256) + kat.layer_parameters(256, 64)),
        (SplineMLP(), kat.spline_parameters(64, 256) + kat.spline_parameters(256, 64)),
    ):
        params = jax.eval_shape(vit(dataclasses.replace(plain, mlp=mlp)).init, jax.random.key(0))
        assert select.count(params, "blocks/mlp/**") == 3 * layers


@pytest.mark.parametrize(("size", "millions"), [("tiny", 5.7), ("small", 22.1), ("base", 86.6)])
def test_the_papers_sizes(size, millions):
    params = jax.eval_shape(vit(kat.imagenet(size)).init, jax.random.key(0))
    assert select.count(params) / 1e6 == pytest.approx(millions, abs=0.06)


def test_decay_leaves_coefficients_biases_and_norms_alone():
    params = vit(kat.kat(ViTConfig(**SHAPE, classes=5))).init(jax.random.key(0))
    decayed = {path for path, yes in select.get(kat.decayed(params), "**").items() if yes}
    assert decayed == {path for path in select.paths(params) if path.endswith("/kernel")}
    assert not any("numerator" in path or "denominator" in path for path in decayed)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="groups=7 must divide width=64"):
        kat.kat(ViTConfig(**SHAPE), groups=7)
    assert isinstance(kat.kat(ViTConfig(**SHAPE)).mlp, RationalMLP)
