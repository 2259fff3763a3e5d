"""The perceptron: formula, sites, initialisation, refusals."""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core.edits import Add, Gate, Replace, Scale, at, combine
from mechlab.core.sites import Context
from mechlab.models import mlp as mlp_module
from mechlab.models.mlp import MLPConfig, mlp
from tests.models.test_transformer_cost import compiled, program
from tests.models.tiny import scrambled

MODEL = mlp(MLPConfig(widths=(4, 8, 6, 3)))
PARAMS = scrambled(jax.eval_shape(MODEL.init, jax.random.key(0)))
X = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)


def by_hand(x: np.ndarray, change: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    change = change or {}
    x, acts = np.asarray(x, np.float64), {}
    for layer in range(3):
        p = {name: np.asarray(leaf, np.float64) for name, leaf in PARAMS[f"layer_{layer}"].items()}
        name = "logits" if layer == 2 else f"mlp_pre.{layer}"
        x = acts[name] = change.get(name, lambda x: x)(x @ p["kernel"] + p["bias"])
        if layer < 2:
            name = f"mlp_act.{layer}"
            x = acts[name] = change.get(name, lambda x: x)(np.maximum(x, 0))
    return acts


def test_sites_and_their_values() -> None:
    names = ["mlp_pre.0", "mlp_pre.1", "mlp_act.0", "mlp_act.1", "logits"]
    assert sorted(MODEL.sites) == sorted(names)
    logits, acts = MODEL.capture({"params": PARAMS}, X, sites=("mlp_pre", "mlp_act", "logits"))
    wanted = by_hand(X)
    assert set(acts) == set(names)
    for name in names:
        np.testing.assert_allclose(acts[name], wanted[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(logits, acts["logits"])
    assert list(MODEL.capture({"params": PARAMS}, X, sites=("mlp_act.1",))[1]) == ["mlp_act.1"]


@pytest.mark.parametrize("name", ["mlp_pre.0", "mlp_pre.1", "mlp_act.0", "mlp_act.1", "logits"])
def test_an_edit_equals_the_same_change_by_hand(name: str) -> None:
    edits = at(MODEL.sites, name, Scale(jnp.float32(-1.7)), unit=[0, 2])
    sign = np.where(np.isin(np.arange(by_hand(X)[name].shape[1]), [0, 2]), -1.7, 1.0)
    wanted = by_hand(X, {name: lambda x: x * sign})["logits"]
    np.testing.assert_allclose(MODEL.apply({"params": PARAMS, "edits": edits}, X), wanted, rtol=1e-5, atol=1e-6)


def test_an_edit_at_one_layer_and_at_every_layer() -> None:
    one = at(MODEL.sites, "mlp_act", Add(jnp.float32(0.5)), layer=1)
    assert list(one) == ["mlp_act.1"]
    every = at(MODEL.sites, "mlp_act", Add(jnp.float32(0.5)))
    assert list(every) == ["mlp_act.0", "mlp_act.1"]
    for edits in (one, every):
        wanted = by_hand(X, {name: lambda x: x + 0.5 for name in edits})["logits"]
        np.testing.assert_allclose(MODEL.apply({"params": PARAMS, "edits": edits}, X), wanted, rtol=1e-5, atol=1e-6)


def test_a_gate_at_the_activation_reads_the_pre_activation() -> None:
    @flax.struct.dataclass
    class PutPre:
        def __call__(self, value: jax.Array, context: Context) -> jax.Array:
            assert context.axes == ("B", "F") and context.positions is None and context.pre is not None
            return context.pre

    _, acts = MODEL.capture({"params": PARAMS, "edits": {"mlp_act.0": PutPre()}}, X, sites=("mlp_act.0",))
    np.testing.assert_allclose(acts["mlp_act.0"], by_hand(X)["mlp_pre.0"], rtol=1e-5, atol=1e-6)
    assert (acts["mlp_act.0"] < 0).any()

    hard = at(MODEL.sites, "mlp_act", Gate(jnp.full(8, -0.2), jnp.ones(8), hard=True), layer=0)
    z = by_hand(X)["mlp_pre.0"]
    _, acts = MODEL.capture({"params": PARAMS, "edits": hard}, X, sites=("mlp_act.0",))
    np.testing.assert_allclose(acts["mlp_act.0"], (z > -0.2) * np.maximum(z, 0), rtol=1e-5, atol=1e-6)


def test_the_pre_activation_in_the_context_is_the_edited_one() -> None:
    gate = at(MODEL.sites, "mlp_act", Gate(jnp.zeros(8), jnp.ones(8), hard=True), layer=0)
    edits = combine(at(MODEL.sites, "mlp_pre", Replace(jnp.float32(2.0)), layer=0), gate)
    _, acts = MODEL.capture({"params": PARAMS, "edits": edits}, X, sites=("mlp_act.0",))
    np.testing.assert_array_equal(acts["mlp_act.0"], np.full((5, 8), 2.0))


def test_he_initialisation() -> None:
    params = mlp(MLPConfig(widths=(300, 400, 200, 10))).init(jax.random.key(0))
    for layer, fan_in in enumerate((300, 400, 200)):
        kernel = np.asarray(params[f"layer_{layer}"]["kernel"])
        assert abs(kernel.var() * fan_in / 2 - 1) < 5 * np.sqrt(2 / kernel.size)
        assert abs(kernel.mean()) < 5 * kernel.std() / np.sqrt(kernel.size)
        # Plain normal, not truncated at two deviations.
        assert 0.03 < (np.abs(kernel) > 2 * kernel.std()).mean() < 0.065
        assert not params[f"layer_{layer}"]["bias"].any()
    other = mlp(MLPConfig(widths=(300, 400, 200, 10))).init(jax.random.key(1))
    assert not np.array_equal(other["layer_0"]["kernel"], params["layer_0"]["kernel"])


def test_activations_keep_their_scale_through_a_deep_relu_network() -> None:
    model = mlp(MLPConfig(widths=(128, *[128] * 10, 1)))
    params = model.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (64, 128))
    _, acts = model.capture({"params": params}, x, sites=("mlp_pre",))
    assert 0.3 < float(acts["mlp_pre.9"].var() / acts["mlp_pre.0"].var()) < 3


def test_without_edits_the_program_is_that_of_a_model_without_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    with_sites = compiled(lambda p, x: MODEL.apply({"params": p}, x), PARAMS, X)
    edits = at(MODEL.sites, "mlp_act", Scale(jnp.float32(2.0)), layer=0, unit=1)
    edited = compiled(lambda p, x: MODEL.apply({"params": p, "edits": edits}, x), PARAMS, X)
    monkeypatch.setattr(mlp_module, "site", lambda module, name, value, axes, **context: value)
    bare = compiled(lambda p, x: MODEL.apply({"params": p}, x), PARAMS, X)
    assert with_sites.cost_analysis() == bare.cost_analysis()
    assert program(with_sites) == program(bare)
    assert program(edited) != program(bare)


@pytest.mark.parametrize("widths", [(), (4,), (4, 0, 3), (4, -1)])
def test_widths_that_make_no_network_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="widths needs at least an input and an output"):
        MLPConfig(widths=widths)


def test_an_unknown_activation_is_refused_with_the_nearest() -> None:
    with pytest.raises(KeyError, match=r'unknown activation "rellu".*Did you mean "relu"'):
        MLPConfig(widths=(2, 2), activation="rellu")


@pytest.mark.parametrize("shape", [(4,), (5, 3), (5, 4, 1)])
def test_inputs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"inputs must be \(B, 4\), got"):
        MODEL.apply({"params": PARAMS}, jnp.ones(shape))


def test_a_perceptron_without_hidden_layers_is_linear() -> None:
    model = mlp(MLPConfig(widths=(4, 3)))
    params = model.init(jax.random.key(0))
    assert list(model.sites) == ["logits"]
    np.testing.assert_allclose(
        model.apply({"params": params}, X), X @ params["layer_0"]["kernel"], rtol=1e-5, atol=1e-6
    )


def test_init_under_jit_leaves_nothing_behind_for_the_next_call() -> None:
    model = mlp(MLPConfig(widths=(4, 6, 2), activation="silu"))
    first = jax.jit(model.init)(jax.random.key(0))
    again = jax.jit(lambda key: model.init(key))(jax.random.key(0))
    for one in (again, model.init(jax.random.key(0))):
        jax.tree.map(np.testing.assert_array_equal, one, first)
