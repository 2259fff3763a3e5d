"""Every edit on its own: its formula in NumPy, its limits, its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mechlab.core.edits import (
    Add,
    AddRelative,
    Chain,
    Clamp,
    Gate,
    Mask,
    Noise,
    Placed,
    Project,
    Replace,
    Scale,
    at,
    chain,
    combine,
    edit,
    project_in,
    project_out,
)
from mechlab.core.estimators import straight_through
from mechlab.core.sites import Context, list_sites
from mechlab.models.mlp import MLPConfig, mlp
from tests.models.tiny import TOKENS, decoder

B, T, D, H = 2, 5, 6, 3
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
STREAM = Context(("B", "T", "D"), jnp.arange(T))
BARE = Context(("B", "F"))
HEADS = Context(("B", "T", "H", "K"), jnp.arange(T))


def normal(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(got: Any, wanted: Any, **tolerance: float) -> None:
    np.testing.assert_allclose(got, wanted, **({"rtol": 1e-5, "atol": 1e-6} | tolerance))


@pytest.mark.parametrize("shape", [(), (D,), (T, D), (T, 1), (B, T, D), (B, 1, 1)])
def test_arrays_broadcast_from_the_right(shape: tuple[int, ...]) -> None:
    v, x = normal(*shape), np.asarray(X)
    close(Add(v)(X, STREAM), x + np.asarray(v))
    close(Scale(v)(X, STREAM), x * np.asarray(v))
    close(Replace(v)(X, STREAM), np.broadcast_to(np.asarray(v), x.shape))
    close(Clamp(v, v + 0.5)(X, STREAM), np.minimum(np.maximum(x, np.asarray(v)), np.asarray(v) + 0.5))
    keep = v > 0
    close(Mask(keep)(X, STREAM), np.where(np.asarray(keep), x, 0))
    close(Mask(keep, v)(X, STREAM), np.where(np.asarray(keep), x, np.asarray(v)))


def test_clamp_at_infinity_and_at_one_value() -> None:
    np.testing.assert_array_equal(Clamp(jnp.float32(-jnp.inf), jnp.float32(jnp.inf))(X, STREAM), X)
    np.testing.assert_array_equal(Clamp(jnp.float32(0.5), jnp.float32(0.5))(X, STREAM), jnp.full_like(X, 0.5))


def test_mask_hides_infinities() -> None:
    np.testing.assert_array_equal(Mask(jnp.asarray([True, False]))(jnp.asarray([1.0, jnp.inf]), BARE), [1.0, 0.0])


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_project_equals_the_orthogonal_projector(rank: int) -> None:
    directions = normal(D, rank) * 7
    a = np.asarray(directions, np.float64)
    projector = a @ np.linalg.inv(a.T @ a) @ a.T
    within = np.asarray(X) @ projector
    close(project_in(directions)(X, STREAM), within, atol=1e-5)
    close(project_out(directions)(X, STREAM), np.asarray(X) - within, atol=1e-5)
    mixed = Project(project_in(directions).basis, 2.0, -0.5)
    close(mixed(X, STREAM), 2 * within - 0.5 * (np.asarray(X) - within), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, D])
def test_projections_add_up_to_the_identity_and_are_idempotent(rank: int) -> None:
    inside, outside = project_in(normal(D, rank)), project_out(normal(D, rank))
    close(inside(X, STREAM) + outside(X, STREAM), X, atol=1e-5)
    for project in (inside, outside):
        close(project(project(X, STREAM), STREAM), project(X, STREAM), atol=1e-5)
    close(outside(inside(X, STREAM), STREAM), jnp.zeros_like(X), atol=1e-5)
    if rank == D:
        close(inside(X, STREAM), X, atol=1e-5)


def test_project_takes_one_direction_of_any_length() -> None:
    v = normal(D)
    close(project_out(v)(X, STREAM) @ v, jnp.zeros((B, T)), atol=1e-5)
    close(project_out(100 * v)(X, STREAM), project_out(v[:, None])(X, STREAM), atol=1e-5)


def sigmoid(x: Any) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_soft_gate_equals_its_formula_and_reads_the_pre_activation() -> None:
    threshold, gain, z = normal(D, seed=2), normal(D, seed=3), normal(B, T, D, seed=4)
    gate = Gate(threshold, gain, 4.0)
    context = Context(STREAM.axes, STREAM.positions, z)
    close(gate(X, context), np.asarray(gain) * sigmoid(4.0 * (z - threshold)) * X)
    close(gate(X, STREAM), np.asarray(gain) * sigmoid(4.0 * (X - threshold)) * X)
    close(gate.open(z), sigmoid(4.0 * (z - threshold)))


def test_hard_gate_is_closed_at_the_threshold() -> None:
    z = jnp.asarray([-1.0, 0.5, jnp.nextafter(0.5, 1.0), 2.0])
    for gate in (
        Gate(jnp.float32(0.5), jnp.float32(1.0), hard=True),
        Gate(jnp.full(4, 0.5), jnp.ones(4), straight_through=True),
    ):
        np.testing.assert_array_equal(gate.open(z), [0, 0, 1, 1])
        np.testing.assert_array_equal(gate(z, BARE), [0, 0, z[2], z[3]])


def test_soft_gate_becomes_hard_as_it_gets_sharper() -> None:
    z = normal(B, T, D, seed=5)
    hard = Gate(jnp.zeros(D), jnp.ones(D), hard=True).open(z)
    gaps = [float(jnp.abs(Gate(jnp.zeros(D), jnp.ones(D), s).open(z) - hard).max()) for s in (1.0, 10.0, 1e3, 1e6)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.1 and gaps[-1] < 1e-6
    close(Gate(jnp.zeros(D), jnp.ones(D), 1e6).open(jnp.zeros(D)), jnp.full(D, 0.5))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "checkpoint"])
def test_hard_gate_refuses_a_gradient_of_its_threshold_but_not_of_its_input(wrap: Callable[..., Any]) -> None:
    gain = jnp.asarray([2.0, 3.0])

    def output(threshold: jax.Array, x: jax.Array, gain: jax.Array) -> jax.Array:
        return Gate(threshold, gain, hard=True)(x, BARE).sum()

    x = jnp.asarray([1.0, -1.0])
    with pytest.raises(ValueError, match="zero gradient with respect to its threshold"):
        jax.grad(wrap(output))(jnp.zeros(2), x, gain)
    np.testing.assert_array_equal(jax.grad(wrap(lambda x: output(jnp.zeros(2), x, gain)))(x), [2, 0])
    np.testing.assert_array_equal(jax.grad(wrap(lambda g: output(jnp.zeros(2), x, g)))(gain), [1, 0])


def test_hard_gate_in_a_model_refuses_only_the_gradient_of_its_threshold() -> None:
    for model, params, inputs in (
        (*decoder("gpt2"), TOKENS),
        (mlp(MLPConfig(widths=(4, 8, 3))), None, normal(2, 4)),
    ):
        params = model.init(jax.random.key(0)) if params is None else params
        scanned = "mlp_act" in model.sites
        width = 24 if scanned else 8

        def loss(params: Any, threshold: jax.Array, gain: jax.Array, model: Any = model, inputs: Any = inputs) -> Any:
            edits = at(model.sites, "mlp_act", Gate(threshold, gain, hard=True))
            return jnp.square(model.apply({"params": params, "edits": edits}, inputs)).sum()

        arguments = (params, jnp.full(width, 0.1), jnp.ones(width))
        for of in (0, 2):
            gradient = jax.jit(jax.grad(loss, of))(*arguments)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
            assert any(leaf.any() for leaf in jax.tree.leaves(gradient))
        with pytest.raises(ValueError, match="zero gradient with respect to its threshold"):
            jax.jit(jax.grad(loss, 1))(*arguments)


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    z, threshold = normal(B, T, D, seed=6), normal(D, seed=7)
    through = Gate(threshold, jnp.ones(D), 3.0, straight_through=True)
    soft = Gate(threshold, jnp.ones(D), 3.0)
    np.testing.assert_array_equal(through.open(z), (z > threshold).astype(jnp.float32))

    def backward(gate: Gate) -> Any:
        return jax.grad(lambda t, z: gate.replace(threshold=t).open(z).sum(), (0, 1))(threshold, z)

    for got, wanted in zip(backward(through), backward(soft), strict=True):
        close(got, wanted)
        assert wanted.any()


FLOATS = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)


@given(forward=FLOATS, backward=FLOATS)
def test_straight_through_has_exactly_the_forward_value(forward: float, backward: float) -> None:
    value, slope = jax.value_and_grad(lambda b: straight_through(jnp.float32(forward), 3 * b))(jnp.float32(backward))
    assert value == np.float32(forward)
    assert slope == 3


def test_noise_is_standard_normal_times_scale() -> None:
    x = jnp.zeros((8, 50, 40))
    noise = Noise(jax.random.key(0), jnp.float32(2.0))(x, Context(("B", "T", "D"), jnp.arange(50)))
    assert abs(float(noise.mean())) < 0.1
    assert abs(float(noise.std()) - 2.0) < 0.05
    flat = np.asarray(noise).reshape(-1, 40)
    assert len(np.unique(flat[:, 0])) == len(flat)
    np.testing.assert_array_equal(Noise(jax.random.key(0), jnp.float32(0.0))(X, STREAM), X)


@pytest.mark.parametrize("context", [STREAM, Context(STREAM.axes)], ids=["positions", "no-positions"])
def test_same_key_same_noise_and_another_key_another(context: Context) -> None:
    draw = [Noise(jax.random.key(seed), jnp.float32(1.0))(X, context) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert not np.isclose(draw[0], draw[2]).any()


@pytest.mark.parametrize("axes, shape", [("BTD", (3, 7, 4)), ("BTHK", (3, 7, 2, 4))])
def test_noise_of_a_token_depends_on_row_and_position_only(axes: str, shape: tuple[int, ...]) -> None:
    noise = Noise(jax.random.key(0), jnp.float32(1.0))
    whole = noise(jnp.zeros(shape), Context(tuple(axes), jnp.arange(7)))
    decoded = noise(jnp.zeros((3, 1, *shape[2:])), Context(tuple(axes), jnp.asarray([4])))
    np.testing.assert_array_equal(decoded[:, 0], whole[:, 4])
    fewer = noise(jnp.zeros((2, *shape[1:])), Context(tuple(axes), jnp.arange(7)))
    np.testing.assert_array_equal(fewer, whole[:2])
    padded = noise(jnp.zeros((3, 10, *shape[2:])), Context(tuple(axes), jnp.asarray([-1, -1, *range(7), -1])))
    np.testing.assert_array_equal(padded[:, 2:9], whole)


def test_noise_on_attention_scores_depends_on_row_and_position_only() -> None:
    noise, axes = Noise(jax.random.key(0), jnp.float32(1.0)), ("B", "H", "T", "S")
    whole = noise(jnp.zeros((2, 3, 7, 7)), Context(axes, jnp.arange(7)))
    shorter = noise(jnp.zeros((2, 3, 5, 5)), Context(axes, jnp.arange(5)))
    np.testing.assert_array_equal(shorter, whole[:, :, :5, :5])
    assert len(np.unique(whole)) == whole.size  # rows, heads, queries and keys all differ


def test_noise_at_several_layers_draws_another_key_per_layer() -> None:
    model, params = decoder("gpt2")
    edits = at(model.sites, "attn_out", Noise(jax.random.key(0), jnp.float32(1.0)))
    keys = jax.random.key_data(edits["attn_out"].key)
    assert len(np.unique(keys, axis=0)) == 3
    zero = jax.tree.map(jnp.zeros_like, params["blocks"]["attn"]["o"])
    silent = params | {"blocks": params["blocks"] | {"attn": params["blocks"]["attn"] | {"o": zero}}}
    _, acts = model.capture({"params": silent, "edits": edits}, TOKENS, sites=("attn_out",))
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert not np.isclose(acts["attn_out"][a], acts["attn_out"][b]).any()
    alone = Noise(edits["attn_out"].key[1], jnp.float32(1.0))(jnp.zeros((2, 5, 16)), STREAM)
    close(acts["attn_out"][1], alone)


def test_chain_applies_first_to_last() -> None:
    close(Chain((Add(jnp.float32(1)), Scale(jnp.float32(3))))(X, STREAM), (X + 1) * 3)
    close(Chain((Scale(jnp.float32(3)), Add(jnp.float32(1))))(X, STREAM), X * 3 + 1)
    np.testing.assert_array_equal(Chain(())(X, STREAM), X)


@given(data=st.data())
@settings(max_examples=25)
def test_placed_is_exact_where_it_is_fully_on_or_off(data: st.DataObject) -> None:
    numbers = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)  # XLA flushes subnormals to 0
    x, y = (jnp.asarray(data.draw(st.lists(numbers, min_size=4, max_size=4)), jnp.float32) for _ in range(2))
    x, y = x.reshape(1, 4), y.reshape(1, 4)
    np.testing.assert_array_equal(Placed(Replace(y), gate=jnp.float32(0))(x, BARE), x)
    np.testing.assert_array_equal(Placed(Replace(y), gate=jnp.float32(1))(x, BARE), y)
    on = jnp.asarray(data.draw(st.lists(st.booleans(), min_size=4, max_size=4)))
    np.testing.assert_array_equal(Placed(Replace(y), unit=on.astype(jnp.float32))(x, BARE), jnp.where(on, y, x))


def test_placed_multiplies_its_limits_and_interpolates() -> None:
    x = normal(B, T, H, 4)
    head, unit = jnp.asarray([0.0, 1.0, 0.5]), jnp.asarray([1.0, 0.0, 0.25, 1.0])
    placed = Placed(
        Add(jnp.float32(8)), jnp.float32(0.5), jnp.asarray([1, 4]), jnp.asarray([3, 5]), head=head, unit=unit
    )
    weight = 0.5 * np.asarray([0, 1, 1, 0, 1])[None, :, None, None] * head[None, None, :, None] * unit
    close(placed(x, HEADS), x + 8 * weight)


def test_placed_gate_is_differentiable() -> None:
    gate = jnp.float32(0.3)
    slope = jax.grad(lambda gate: Placed(Scale(jnp.float32(3)), gate=gate)(X, STREAM).sum())(gate)
    close(slope, 2 * X.sum(), rtol=1e-4)


def test_placed_positions_follow_each_row() -> None:
    context = Context(STREAM.axes, jnp.asarray([[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]]))
    placed = Placed(Replace(jnp.float32(0)), start=jnp.asarray([1]), stop=jnp.asarray([3]))
    kept = np.asarray([[1, 0, 0, 1, 1], [1, 1, 1, 0, 0]])[..., None]
    np.testing.assert_array_equal(placed(X, context), X * kept)
    rows = Placed(Replace(jnp.float32(0)), start=jnp.asarray([[0], [2]]), stop=jnp.asarray([[1], [9]]))
    kept = np.asarray([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])[..., None]
    np.testing.assert_array_equal(rows(X, context), X * kept)


@pytest.mark.parametrize("axes", ["BTD", "BTHK", "BHTS"])
def test_spread_puts_letters_where_the_value_has_them(axes: str) -> None:
    context = Context(tuple(axes))
    shape = context.spread(jnp.zeros((2, 5)), "BT").shape
    assert shape == tuple({"B": 2, "T": 5}.get(axis, 1) for axis in axes)


@given(
    layers=st.lists(st.integers(-3, 2), min_size=1, max_size=4),
    units=st.lists(st.integers(-16, 15), min_size=1, max_size=4),
    positions=st.lists(st.integers(0, 30), min_size=1, max_size=4),
)
def test_at_selects_what_numpy_would(layers: list[int], units: list[int], positions: list[int]) -> None:
    sites = decoder("gpt2")[0].sites
    placed = at(sites, "resid_post", Scale(2.0), layer=layers, unit=units, position=positions)["resid_post"]
    gate, unit = np.zeros(3), np.zeros(16)
    gate[layers], unit[units] = 1, 1
    np.testing.assert_array_equal(placed.gate, gate)
    np.testing.assert_array_equal(placed.unit, np.broadcast_to(unit, (3, 16)))
    np.testing.assert_array_equal(placed.start[0], positions)
    np.testing.assert_array_equal(placed.stop - placed.start, np.ones((3, len(positions))))


def test_at_without_limits_only_stacks_the_edit() -> None:
    sites = decoder("llama")[0].sites
    plain = at(sites, "mlp_out", Clamp(-1.0, jnp.ones(16)))["mlp_out"]
    assert isinstance(plain, Clamp)
    assert plain.low.shape == (3,) and plain.high.shape == (3, 16)
    assert at(sites, "final_norm", Scale(2.0)) == {"final_norm": Scale(2.0)}
    per_layer = at(sites, "mlp_out", Scale(jnp.arange(3.0)), stacked=True)["mlp_out"]
    np.testing.assert_array_equal(per_layer.factor, [0, 1, 2])


def test_at_counts_key_value_heads_at_k_and_v() -> None:
    sites = decoder("llama")[0].sites
    assert at(sites, "k", Scale(2.0), head=1)["k"].head.shape == (3, 2)
    assert at(sites, "q", Scale(2.0), head=3)["q"].head.shape == (3, 4)
    with pytest.raises(ValueError, match=r'head 2 is out of range: site "v" has 2 heads'):
        at(sites, "v", Scale(2.0), head=2)


def test_at_of_an_unscanned_layer_names_that_layer() -> None:
    sites = mlp(MLPConfig(widths=(4, 8, 8, 8, 3))).sites
    assert at(sites, "mlp_act", Scale(2.0), layer=1) == {"mlp_act.1": Scale(2.0)}
    assert list(at(sites, "mlp_act", Scale(2.0))) == ["mlp_act.0", "mlp_act.1", "mlp_act.2"]
    assert list(at(sites, "mlp_act", Scale(2.0), layer=[0, -1])) == ["mlp_act.0", "mlp_act.2"]
    assert at(sites, "mlp_act.2", Scale(2.0)) == {"mlp_act.2": Scale(2.0)}
    assert isinstance(at(sites, "mlp_act", Scale(2.0), layer=1, unit=3)["mlp_act.1"], Placed)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "layer too large": (
        "resid_post",
        {"layer": 3},
        r'layer 3 is out of range: site "resid_post" has 3 layers \(0..2\)',
    ),
    "layer too small": ("resid_post", {"layer": [0, -4]}, "layer -4 is out of range"),
    "no layers": ("embed", {"layer": 0}, 'site "embed" occurs once'),
    "not stacked": ("embed", {"stacked": True}, 'site "embed" is not stacked'),
    "no heads": ("resid_post", {"head": 0}, r'site "resid_post" \(B T D\) has no heads'),
    "head out of range": ("attn_z", {"head": 4}, r"head 4 is out of range.*4 heads \(0..3\)"),
    "unit out of range": ("resid_post", {"unit": 16}, "unit 16 is out of range"),
    "negative position": ("resid_post", {"position": -1}, "cannot be negative, got -1"),
    "one negative position": ("resid_post", {"position": [2, -3]}, "cannot be negative"),
    "position and span": ("resid_post", {"position": 1, "span": (0, 2)}, "not both"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_at_refuses(case: str) -> None:
    name, where, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        at(decoder("gpt2")[0].sites, name, Scale(2.0), **where)


@pytest.mark.parametrize(
    "where",
    [{"layer": 1.7}, {"position": 1.5}, {"span": (3, 1)}, {"span": (2, 2)}, {"layer": []}, {"unit": []}],
    ids=str,
)
def test_at_refuses_a_place_that_is_no_place(where: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        at(decoder("gpt2")[0].sites, "resid_post", Scale(2.0), **where)


@pytest.mark.parametrize("where", [{"layer": 3}, {"layer": -4}, {"head": 4}, {"unit": 9}], ids=str)
def test_a_traced_index_out_of_range_gives_nan_instead_of_nothing(where: dict[str, int]) -> None:
    sites = decoder("gpt2")[0].sites
    (field, index), run = (
        next(iter(where.items())),
        lambda i: at(sites, "attn_z", Scale(2.0), **{field: i})["attn_z"],
    )
    placed = jax.jit(run)(index)
    assert np.isnan({"layer": placed.gate, "head": placed.head, "unit": placed.unit}[field]).all()
    inside = jax.jit(run)(-1)
    weights = {"layer": inside.gate, "head": inside.head, "unit": inside.unit}[field]
    np.testing.assert_array_equal(np.atleast_2d(weights)[0][-1], 1)


def test_at_refuses_a_traced_layer_where_layers_are_not_stacked() -> None:
    sites = mlp(MLPConfig(widths=(4, 8, 8, 3))).sites
    with pytest.raises(ValueError, match="cannot be traced"):
        jax.vmap(lambda layer: at(sites, "mlp_act", Scale(2.0), layer=layer))(jnp.arange(2))


def test_combine_refuses_two_edits_at_one_site_and_chain_orders_them() -> None:
    first, second = {"a": Add(1.0), "b": Add(2.0)}, {"a": Scale(3.0), "c": Add(4.0)}
    with pytest.raises(ValueError, match='"a" is edited twice'):
        combine(first, second)
    assert combine(first, {"c": Add(4.0)}, {}) == {"a": Add(1.0), "b": Add(2.0), "c": Add(4.0)}
    chained = chain(first, second)
    assert chained == {"a": Chain((Add(1.0), Scale(3.0))), "b": Add(2.0), "c": Add(4.0)}
    assert chained["a"](2.0, BARE) == 9.0
    assert chain(second, first)["a"](2.0, BARE) == 7.0


def test_chained_edits_run_in_a_model() -> None:
    model, params = decoder("gpt2")
    both = chain(
        at(model.sites, "mlp_out", Add(jnp.ones(16)), layer=1),
        at(model.sites, "mlp_out", Scale(jnp.asarray(0.0)), layer=1),
        at(model.sites, "mlp_out", Add(jnp.full(16, 2.0)), layer=1),
    )
    _, acts = model.capture({"params": params, "edits": both}, TOKENS, sites=("mlp_out",))
    np.testing.assert_array_equal(acts["mlp_out"][1], np.full((*TOKENS.shape, 16), 2.0))
    assert not np.array_equal(acts["mlp_out"][0], acts["mlp_out"][1])


def test_an_edit_of_ones_own_runs_in_a_model() -> None:
    @flax.struct.dataclass
    class Reverse:
        strength: jax.Array

        def __call__(self, value: jax.Array, context: Context) -> jax.Array:
            return value[..., ::-1] * self.strength

    model, params = decoder("gpt2")
    edits = at(model.sites, "mlp_out", Reverse(jnp.float32(2.0)), layer=2)
    variables = {"params": params}
    _, plain = model.capture(variables, TOKENS, sites=("mlp_out",))
    _, acts = model.capture(variables | {"edits": edits}, TOKENS, sites=("mlp_out",))
    close(acts["mlp_out"][2], 2 * plain["mlp_out"][2][..., ::-1])
    close(acts["mlp_out"][:2], plain["mlp_out"][:2])


ONE_OF_EACH: list[Any] = [
    Add(jnp.ones(768)),
    Scale(2.0),
    Replace(jnp.ones((12, 5, 768))),
    Clamp(jnp.float32(-1), jnp.float32(1)),
    Mask(jnp.ones(8, bool)),
    project_out(jnp.ones((64, 4))),
    Gate(jnp.ones(3072), jnp.ones(3072), hard=True),
    Noise(jax.random.key(0), jnp.float32(1)),
    Chain((Add(jnp.ones((12, 3))), Scale(2.0))),
    Placed(Add(jnp.ones((12, 768))), gate=jnp.eye(12)[7], start=jnp.ones((12, 1), int)),
]


@pytest.mark.parametrize("one", ONE_OF_EACH, ids=lambda e: type(e).__name__)
def test_repr_is_one_short_line(one: Any) -> None:
    text = repr(one)
    assert text.startswith(f"{type(one).__name__}(")
    assert "\n" not in text
    assert len(text) < 160


def test_repr_shows_small_arrays_and_the_shape_of_large_ones() -> None:
    placed = Placed(Add(jnp.ones(768)), gate=jnp.asarray([0.0, 0.0, 1.0]))
    assert repr(placed) == "Placed(edit=Add(value=float32[768]), gate=[0. 0. 1.])"
    assert jax.jit(lambda v: str(Add(v)) and v)(jnp.ones(3)).shape == (3,)


@pytest.mark.parametrize("one", ONE_OF_EACH, ids=lambda e: type(e).__name__)
def test_edits_are_pytrees_that_survive_flattening(one: Any) -> None:
    leaves, structure = jax.tree.flatten(one)
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is type(one)
    assert repr(again) == repr(one)
    assert getattr(again, "hard", None) == getattr(one, "hard", None)


def test_a_static_field_is_no_leaf() -> None:
    assert len(jax.tree.leaves(Gate(jnp.ones(2), jnp.ones(2), hard=True))) == 3

    @edit
    class Named:
        value: jax.Array
        label: str = flax.struct.field(pytree_node=False, default="x")

    assert repr(Named(2.0)) == "Named(value=2.0, label=x)"
    assert len(jax.tree.leaves(Named(2.0))) == 1


@pytest.mark.filterwarnings("ignore:The chararray class is deprecated")
def test_edits_render_in_treescope() -> None:
    treescope = pytest.importorskip("treescope")
    model, _ = decoder("gpt2")
    edits = combine(
        at(model.sites, "resid_post", Add(jnp.ones(16)), layer=1, position=2),
        at(model.sites, "attn_z", Noise(jax.random.key(0), jnp.float32(1.0)), head=1),
    )
    text = treescope.render_to_text(edits)
    assert "resid_post" in text and "Placed" in text and "Noise" in text


@settings(max_examples=20)
@given(
    # XLA flushes subnormal numbers to zero, NumPy does not.
    x=st.lists(st.floats(-1e3, 1e3, width=32, allow_subnormal=False), min_size=D, max_size=D),
    low=st.floats(-10, 10, width=32, allow_subnormal=False),
    high=st.floats(-10, 10, width=32, allow_subnormal=False),
)
def test_clamp_stays_in_its_interval(x: list[float], low: float, high: float) -> None:
    assume(low <= high)
    clamped = Clamp(jnp.float32(low), jnp.float32(high))(jnp.asarray([x], jnp.float32), BARE)
    assert (clamped >= low).all() and (clamped <= high).all()
    inside = (np.asarray(x) >= low) & (np.asarray(x) <= high)
    np.testing.assert_array_equal(np.asarray(clamped)[0][inside], np.asarray(x, np.float32)[inside])


@pytest.mark.parametrize("name", ["attn_z", "logits"])
def test_every_edit_survives_jit_vmap_and_grad_at(name: str) -> None:
    model, params = decoder("gpt2")
    table = list_sites(model.module, TOKENS)
    width = table[name].value.shape[-1]
    several: list[Any] = [
        Add(normal(width)),
        Scale(normal(width)),
        Replace(normal(width)),
        Clamp(-normal(width), normal(width) + 3),
        Mask(normal(width) > 0, jnp.float32(0.5)),
        project_out(normal(width, 2)),
        Gate(normal(width), normal(width)),
    ]
    edits = jax.tree.map(jnp.asarray, at(table, name, Chain(tuple(several)), position=[1, 2]))
    floating = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, edits)

    def loss(floats: Any) -> jax.Array:
        merged = jax.tree.map(lambda a, b: b if a is None else a, floats, edits, is_leaf=lambda x: x is None)
        return model.apply({"params": params, "edits": merged}, TOKENS).sum()

    gradient = jax.jit(jax.grad(loss))(floating)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert jax.tree.structure(gradient) == jax.tree.structure(floating)
    doubled = jax.tree.map(lambda x: jnp.stack([x, x]), floating)
    close(jax.jit(jax.vmap(loss))(doubled), [loss(floating)] * 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(D,), (T, D), (B, T, D)])
@pytest.mark.parametrize("alpha", [0.3, -1.5])
def test_a_relative_patch_is_a_share_of_the_states_length(shape: tuple[int, ...], alpha: float) -> None:
    v = np.broadcast_to(np.asarray(normal(*shape)), X.shape)
    x = np.asarray(X)
    wanted = x + alpha * v * np.linalg.norm(x, axis=-1, keepdims=True) / np.linalg.norm(v, axis=-1, keepdims=True)
    close(AddRelative(normal(*shape), jnp.float32(alpha))(X, STREAM), wanted)
    close(AddRelative(7 * normal(*shape), jnp.float32(alpha))(X, STREAM), wanted)
    turned = AddRelative(normal(*shape), jnp.float32(alpha), renormalise=True)(X, STREAM)
    close(jnp.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1))
    close(turned * np.linalg.norm(wanted, axis=-1, keepdims=True), wanted * np.linalg.norm(x, axis=-1, keepdims=True))


def test_a_relative_patch_measures_all_axes_but_batch_and_time() -> None:
    field, context = normal(2, 3, 4, 5), Context(("B", "X", "Y", "D"))
    patch = AddRelative(normal(5, seed=3), jnp.float32(0.5))(field, context) - field
    close(jnp.linalg.norm(patch.reshape(2, -1), axis=1), 0.5 * jnp.linalg.norm(field.reshape(2, -1), axis=1))


def test_a_relative_patch_of_no_strength_no_value_or_no_state_is_none() -> None:
    np.testing.assert_array_equal(AddRelative(normal(D), jnp.float32(0.0))(X, STREAM), X)
    np.testing.assert_array_equal(AddRelative(jnp.zeros(D), jnp.float32(1.0))(X, STREAM), X)
    for renormalise in (False, True):
        zero = AddRelative(normal(D), jnp.float32(1.0), renormalise)(jnp.zeros_like(X), STREAM)
        np.testing.assert_array_equal(zero, jnp.zeros_like(X))


def test_a_relative_patch_of_half_precision_does_not_overflow() -> None:
    large = jnp.full((1, 300, 300, 4), 30.0, jnp.float16)
    moved = AddRelative(jnp.ones(4, jnp.float16), jnp.float32(1.0))(large, Context(("B", "X", "Y", "D")))
    close(moved, jnp.full(large.shape, 60.0))
