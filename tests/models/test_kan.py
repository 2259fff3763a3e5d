"""MLPs of the Kolmogorov-Arnold kind: against their definitions, in blocks of images and of text, with sites."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import BSpline

from mechlab.core import select
from mechlab.core.edits import Replace, Scale, at
from mechlab.kernels.rational import rational
from mechlab.methods.circuits.patching import patch_residual
from mechlab.models.kan import GRKAN, Coefficients, RationalMLP, SplineMLP, spline_basis
from mechlab.models.layers import ACTIVATIONS
from mechlab.models.transformer import gpt2, transformer
from mechlab.models.vit import ViTConfig, vit
from tests.models.tiny import SIZES, scrambled

ODD = Coefficients(a=(0.1, 0.9, 0.2, -0.1, 0.03, 0.01), b=(0.2, -0.4, 0.0, 0.1))
RATIONAL = RationalMLP(first=ODD, second=ODD, groups=4)
SHAPE: dict[str, Any] = {"image": (4, 4), "patch": 2, "layers": 2, "width": 8, "heads": 2, "hidden": 12, "channels": 1}
PIXELS = np.random.default_rng(0).normal(size=(3, 4, 4, 1)).astype(np.float32)


def model_of(mlp: Any, **changes: Any) -> tuple[Any, Any]:
    model = vit(ViTConfig(**SHAPE | changes, classes=5, mlp=mlp))
    return model, scrambled(jax.eval_shape(model.init, jax.random.key(0)))


def layer(params: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], params["blocks"]["mlp"])


@pytest.mark.parametrize("groups", [4, None])
def test_a_rational_mlp_is_two_grouped_functions_each_before_its_kernel(groups):
    model, params = model_of(dataclasses.replace(RATIONAL, groups=groups, share_numerator=groups is not None))
    sites = ("mlp_in", "mlp_pre", "mlp_act", "mlp_out")
    _, acts = model.capture({"params": params}, PIXELS, sites=sites)
    for index in range(2):
        p = layer(params, index)

        def function(name: str, x: jax.Array, p: Any = p) -> jax.Array:
            a, b = p[name]["numerator"], p[name]["denominator"]
            assert a.shape == ((1, 6) if groups else (x.shape[-1], 6))
            return rational(x, a, b, groups=b.shape[0])

        pre = function("first", acts["mlp_in"][index]) @ p["up"]["kernel"] + p["up"]["bias"]
        np.testing.assert_allclose(acts["mlp_pre"][index], pre, rtol=1e-4, atol=1e-5)
        act = function("second", acts["mlp_pre"][index])
        np.testing.assert_allclose(acts["mlp_act"][index], act, rtol=1e-4, atol=1e-5)
        out = acts["mlp_act"][index] @ p["down"]["kernel"] + p["down"]["bias"]
        np.testing.assert_allclose(acts["mlp_out"][index], out, rtol=1e-4, atol=1e-5)


def test_a_spline_mlp_is_two_layers_of_splines_on_edges():
    model, params = model_of(SplineMLP())
    _, acts = model.capture({"params": params}, PIXELS, sites=("mlp_in", "mlp_pre", "mlp_out"))
    for index in range(2):
        p = layer(params, index)
        for name, read, written in (("up", "mlp_in", "mlp_pre"), ("down", "mlp_pre", "mlp_out")):
            x = np.asarray(acts[read][index], np.float64)
            basis = by_scipy(x, 5, 3)
            out = p[name]["bias"] + np.asarray(ACTIVATIONS["silu"](x)) @ p[name]["base"]
            for i in range(x.shape[-1]):
                for c in range(8):
                    out = out + basis[..., i, c, None] * p[name]["spline"][i, c]
            np.testing.assert_allclose(acts[written][index], out, rtol=1e-4, atol=1e-4)


def by_scipy(x: np.ndarray, grid: int, order: int) -> np.ndarray:
    knots = -1 + 2 / grid * np.arange(-order, grid + order + 1)
    splines = [BSpline.basis_element(knots[c : c + order + 2], extrapolate=False) for c in range(grid + order)]
    return np.stack([np.nan_to_num(spline(x)) for spline in splines], -1)


@pytest.mark.parametrize(("grid", "order"), [(5, 3), (1, 2), (4, 0)])
def test_the_basis_equals_scipys_and_sums_to_one_inside(grid, order):
    x = np.linspace(-2.05, 2.05, 83) + 0.003  # on no knot, where order 0 jumps
    basis = spline_basis(jnp.asarray(x, jnp.float32), grid, order)
    np.testing.assert_allclose(basis, by_scipy(x, grid, order), atol=1e-5)
    np.testing.assert_allclose(basis.sum(-1)[np.abs(x) < 1], 1, atol=1e-5)


@pytest.mark.parametrize("mlp", [RATIONAL, SplineMLP()], ids=["rational", "spline"])
def test_other_mlps_serve_decoders_too_and_layers_are_stacked(mlp):
    config = gpt2(**SIZES | {"layers": 3}, mlp=mlp)
    model = transformer(config)
    params = jax.jit(model.init)(jax.random.key(0))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["blocks"]["mlp"])} == {3}
    tokens = jnp.asarray([[1, 2, 3]])
    logits, acts = model.capture({"params": params}, tokens, sites=("mlp_pre",))
    same = at(model.sites_for(tokens), "mlp_pre", Replace(acts["mlp_pre"]), stacked=True)
    np.testing.assert_allclose(model.apply({"params": params, "edits": same}, tokens), logits, rtol=1e-6)
    off = at(model.sites, "mlp_out", Scale(jnp.asarray(0.0)))
    assert not np.allclose(model.apply({"params": params, "edits": off}, tokens), logits)
    with pytest.raises(ValueError, match="resuming knows plain and gated MLPs only"):
        patch_residual(model, params, tokens, acts["mlp_pre"][:, :, :, : config.width], lambda logits: logits[:, 0])


def test_every_coefficient_gets_a_gradient_from_a_start_with_zero_denominators():
    zero = dataclasses.replace(ODD, b=(0.0, 0.0, 0.0, 0.0))
    model = vit(ViTConfig(**SHAPE, classes=5, mlp=dataclasses.replace(RATIONAL, first=zero, second=zero)))
    params = model.init(jax.random.key(0))
    gradients = jax.grad(lambda p: (model.apply({"params": p}, PIXELS) ** 2).sum())(params)
    for name in ("numerator", "denominator"):
        for path, leaf in select.get(gradients, f"blocks/mlp/*/{name}").items():
            assert bool((leaf != 0).all()), path


def test_kernels_start_with_the_standard_deviations_asked_for():
    mlp = dataclasses.replace(RATIONAL, init_std=(0.5, 2.0))
    model = vit(ViTConfig(**SHAPE | {"width": 64, "hidden": 128}, mlp=mlp))
    params = model.init(jax.random.key(0))
    for name, wanted in (("up", 0.5), ("down", 2.0)):
        assert float(params["blocks"]["mlp"][name]["kernel"].std()) == pytest.approx(wanted, rel=0.03)


def test_one_layer_alone():
    x = jax.random.normal(jax.random.key(1), (2, 8))
    module = GRKAN(3, ODD, groups=2)
    params = module.init(jax.random.key(0), x)["params"]
    a, b = params["rational"]["numerator"], params["rational"]["denominator"]
    wanted = rational(x, a, b, groups=2) @ params["linear"]["kernel"] + params["linear"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x), wanted, rtol=1e-5, atol=1e-6)


def test_bad_settings_are_refused():
    for change, word in (
        ({"mlp": dataclasses.replace(RATIONAL, groups=3)}, "groups=3 must divide width=8 and hidden=12"),
        ({"mlp": SplineMLP(grid=0)}, "grid must be at least 1"),
    ):
        with pytest.raises(ValueError, match=word):
            ViTConfig(**SHAPE | change)
    with pytest.raises(ValueError, match="mlp needs hidden, and gated=False"):
        gpt2(**SIZES | {"hidden": None}, mlp=RATIONAL)
    with pytest.raises(ValueError, match="wanted 6 finite a and 4 finite b"):
        Coefficients(a=(1.0,), b=(0.0,) * 4)
    with pytest.raises(ValueError, match='form must be "A" or "B", got "C"'):
        Coefficients(a=(0.0,) * 6, b=(0.0,) * 4, form="C")
