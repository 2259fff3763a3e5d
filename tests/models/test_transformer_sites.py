"""Every site of the decoder against the same change made by hand in a plain float64 forward."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core.edits import Add, Chain, Scale, at
from mechlab.core.sites import SiteTable, list_sites
from mechlab.core.sweeps import zero_probes
from mechlab.models.transformer import TransformerConfig, transformer
from tests.models.reference import forward
from tests.models.tiny import CONFIGS, TOKENS, decoder, scrambled

LAYER = 1
FACTOR = 1.7


def table(kind: str) -> SiteTable:
    return list_sites(decoder(kind)[0].module, TOKENS)


CASES = [(kind, name) for kind in CONFIGS for name in table(kind)]


def index_of(axes: tuple[str, ...], where: dict[str, int]) -> tuple[Any, ...]:
    """A NumPy index that picks one place along some axes."""
    return tuple(where.get(axis, slice(None)) for axis in axes)


def assert_same_acts(got: dict[str, jax.Array], wanted: dict[str, np.ndarray]) -> None:
    for name, value in got.items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_activation_equals_the_reference(kind: str) -> None:
    model, params = decoder(kind)
    logits, acts = jax.jit(lambda p, t: model.capture({"params": p}, t, sites=tuple(table(kind))))(params, TOKENS)
    wanted, wanted_acts = forward(params, TOKENS, CONFIGS[kind])
    assert set(acts) == set(wanted_acts)
    np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=0)
    assert_same_acts(acts, wanted_acts)
    assert [acts[name].shape for name in acts] == [wanted_acts[name].shape for name in acts]


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_equal_the_reference_with_fused_attention(kind: str) -> None:
    model, params = decoder(kind)
    wanted, _ = forward(params, TOKENS, CONFIGS[kind])
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, TOKENS), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "relu", "norm": "rms"},
        {"activation": "gelu", "positions": "rotary", "rope_theta": 100.0, "bias": False},
        {"activation": "silu", "head_width": 6, "kv_heads": 1, "gated": True},
    ],
    ids=["relu-rms", "gelu-rotary-nobias", "gated-multiquery-wide"],
)
def test_mixed_kinds_equal_the_reference(change: dict[str, Any]) -> None:
    config: TransformerConfig = dataclasses.replace(CONFIGS["gpt2"], **change)
    model = transformer(config)
    params = scrambled(jax.eval_shape(model.init, jax.random.key(0)))
    wanted, _ = forward(params, TOKENS, config)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, TOKENS), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind, name", CASES)
def test_edit_equals_the_same_change_by_hand(kind: str, name: str) -> None:
    model, params = decoder(kind)
    entry = table(kind)[name]
    axes = entry.context.axes
    value = np.random.default_rng(1).normal(size=entry.value.shape[1:])
    edit = Chain((Scale(jnp.asarray(FACTOR)), Add(jnp.asarray(value, jnp.float32))))

    @jax.jit
    def run(edits: Any) -> Any:
        return model.capture({"params": params, "edits": edits}, TOKENS, sites=(name,))

    def everywhere(x: np.ndarray) -> np.ndarray:
        return x * FACTOR + value

    def at_one_place(x: np.ndarray) -> np.ndarray:
        # The letter T is the query's position, the last axis is the unit.
        where = {"T": 3, axes[-1]: 1} | ({"H": 1} if "H" in axes else {})
        changed = x.copy()
        changed[index_of(axes, where)] = everywhere(x)[index_of(axes, where)]
        return changed

    def place(**limits: Any) -> Any:
        heads = {} if "H" in axes else {"head": None}
        layers = {} if entry.layers is not None else {"layer": None}
        return at(table(kind), name, edit, **(limits | heads | layers))

    length = TOKENS.shape[1]
    units, heads = (
        range(entry.value.shape[-1]),
        range(dict(zip(axes, entry.value.shape, strict=True)).get("H", 0)),
    )
    narrow = place(layer=LAYER, span=(3, 4), head=1, unit=1)
    wide = place(layer=range(CONFIGS[kind].layers), span=(0, length), head=heads, unit=units)
    layers = range(CONFIGS[kind].layers) if entry.layers is not None else [None]
    plain, _ = forward(params, TOKENS, CONFIGS[kind])
    for edits, change in (
        (narrow, {(name, LAYER if entry.layers is not None else None): at_one_place}),
        (wide, {(name, layer): everywhere for layer in layers}),
    ):
        logits, acts = run(edits)
        wanted, wanted_acts = forward(params, TOKENS, CONFIGS[kind], change)
        assert np.abs(wanted - plain).max() > 1e-3
        np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=1e-5)
        assert_same_acts(acts, wanted_acts)


@pytest.mark.parametrize("kind", CONFIGS)
def test_unplaced_edit_changes_every_layer(kind: str) -> None:
    model, params = decoder(kind)
    edits = {"mlp_out": Scale(jnp.asarray([0.5, 1.0, 2.0]))}
    wanted, _ = forward(
        params,
        TOKENS,
        CONFIGS[kind],
        {("mlp_out", i): lambda x, i=i: x * (0.5, 1.0, 2.0)[i] for i in range(3)},
    )
    np.testing.assert_allclose(model.apply({"params": params, "edits": edits}, TOKENS), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_probe_gradients_equal_finite_differences_at_every_site(kind: str) -> None:
    model, params = decoder(kind)
    names = [name for name in table(kind)]
    weights = np.random.default_rng(2).normal(size=(*TOKENS.shape, CONFIGS[kind].vocabulary))

    def loss(probes: Any) -> jax.Array:
        return (model.apply({"params": params, "edits": probes}, TOKENS) * weights).sum()

    gradients = jax.jit(jax.grad(loss))(zero_probes(table(kind), *names))
    rng = np.random.default_rng(3)
    step = 1e-5
    for name in names:
        gradient = np.asarray(gradients[name].value)
        largest = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        for place in (largest, tuple(rng.integers(0, gradient.shape))):
            layer, within = (place[0], place[1:]) if table(kind)[name].layers is not None else (None, place)

            def moved(h: float, name: str = name, layer: Any = layer, within: Any = within) -> float:
                def change(x: np.ndarray) -> np.ndarray:
                    x = x.copy()
                    x[within] += h
                    return x

                return (forward(params, TOKENS, CONFIGS[kind], {(name, layer): change})[0] * weights).sum()

            # A masked score is -1e30: moving it changes nothing, in both.
            wanted = (moved(step) - moved(-step)) / (2 * step)
            np.testing.assert_allclose(gradient[place], wanted, rtol=1e-3, atol=1e-4, err_msg=f"{name} {place}")


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradient_of_a_steering_vector_equals_finite_differences(kind: str) -> None:
    model, params = decoder(kind)
    vector = np.random.default_rng(4).normal(size=16)
    weights = np.random.default_rng(5).normal(size=(*TOKENS.shape, CONFIGS[kind].vocabulary))

    @jax.jit
    @jax.grad
    def gradient(vector: jax.Array) -> jax.Array:
        edits = at(model.sites, "resid_mid", Add(vector), layer=LAYER, position=[1, 3])
        return (model.apply({"params": params, "edits": edits}, TOKENS) * weights).sum()

    def reference(vector: np.ndarray) -> float:
        def change(x: np.ndarray) -> np.ndarray:
            return x + vector * np.isin(np.arange(5), [1, 3])[:, None]

        return (forward(params, TOKENS, CONFIGS[kind], {("resid_mid", LAYER): change})[0] * weights).sum()

    step = 1e-5
    wanted = [(reference(vector + step * e) - reference(vector - step * e)) / (2 * step) for e in np.eye(16)]
    np.testing.assert_allclose(gradient(jnp.asarray(vector, jnp.float32)), wanted, rtol=1e-3, atol=1e-4)
