"""Task vectors and linearised models against stored float64 vectors, closed forms, limits and identities."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlab.analysis.tangent import empirical_ntk, kernel_flow
from mechlab.methods.adaptation import tangent_arithmetic as ta
from mechlab.models.mlp import MLPConfig, mlp
from mechlab.models.vit import ViTConfig, vit

NAMES = ("w0", "b0", "w1", "b1", "w", "b")


def tanh_network(params, x):
    h = jnp.tanh(x @ params["w0"] + params["b0"])
    h = jnp.tanh(h @ params["w1"] + params["b1"])
    return h @ params["w"] + params["b"]


def stored(v, prefix, dtype=np.float64):
    return {name: jnp.asarray(v[f"{prefix}{i}"].astype(dtype)) for i, name in enumerate(NAMES)}


def random_problem(seed=0, widths=(3, 5, 4, 2)):
    """Parameters, two task vectors, inputs of two tasks."""
    generator = np.random.default_rng(seed)
    shapes = [s for a, b in itertools.pairwise(widths) for s in ((a, b), (b,))]

    def draw(scale):
        return {n: jnp.asarray(scale * generator.normal(size=s)) for n, s in zip(NAMES, shapes, strict=True)}

    x1, x2 = (jnp.asarray(generator.normal(size=(n, 3))) for n in (6, 5))
    return draw(0.7), draw(0.3), draw(0.3), x1, x2


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_outputs_before_and_after_edits_equal_the_vectors(vectors, dtype, tolerance):
    v = vectors("tangent_arithmetic")
    with jax.enable_x64(dtype is np.float64):
        base, t1, t2 = (stored(v, prefix, dtype) for prefix in ("p", "t1_", "t2_"))
        x1, x2 = (jnp.asarray(v[name].astype(dtype)) for name in ("x1", "x2"))
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)  # noqa: E731
        f_lin = ta.linearize(tanh_network, base)
        close(tanh_network(base, x1), v["f0_x1"])
        close(tanh_network(ta.apply_task_vectors(base, [t1], 1.0), x1), v["f_t1_x1"])
        close(f_lin(ta.apply_task_vectors(base, [t1], 1.0), x1), v["lin_t1_x1"])
        close(f_lin(ta.apply_task_vectors(base, [t1, t2], [0.5, 1.0]), x2), v["lin_half_t1_plus_t2_x2"])


def test_disentanglement_errors_equal_the_vectors(vectors):
    v = vectors("tangent_arithmetic")
    with jax.enable_x64(True):
        base, t1, t2 = (stored(v, prefix) for prefix in ("p", "t1_", "t2_"))
        inputs, alphas = (jnp.asarray(v["x1"]), jnp.asarray(v["x2"])), (v["alphas"], v["alphas"])
        f_lin = ta.linearize(tanh_network, base)
        error = ta.disentanglement_error((tanh_network,) * 2, base, (t1, t2), inputs, alphas)
        np.testing.assert_allclose(error, v["xi_nonlin"], rtol=1e-6)
        np.testing.assert_allclose(
            ta.disentanglement_error((f_lin,) * 2, base, (t1, t2), inputs, alphas), v["xi_lin"], rtol=1e-6
        )
        np.testing.assert_allclose(
            ta.linear_disentanglement_error((tanh_network,) * 2, base, (t1, t2), inputs, alphas),
            v["xi_lin"],
            rtol=1e-6,
        )


@jax.jit
def linear_moves(base, t1, t2, x, alphas):
    f_lin = ta.linearize(tanh_network, base)
    moved = lambda a, b: f_lin(ta.apply_task_vectors(base, [t1, t2], [a, b]), x) - f_lin(base, x)  # noqa: E731
    return moved(*alphas), moved(1.0, 0.0), moved(0.0, 1.0), f_lin(base, x) - tanh_network(base, x)


@given(seed=st.integers(0, 10), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_the_linearised_model_is_affine_additive_and_the_model_at_the_base(seed, a, b):
    with jax.enable_x64(True):
        base, t1, t2, x, _ = random_problem(seed)
        both, first, second, at_base = linear_moves(base, t1, t2, x, jnp.asarray([a, b]))
        np.testing.assert_allclose(both, a * first + b * second, atol=1e-12)
        np.testing.assert_allclose(at_base, 0, atol=1e-14)


def test_the_tangent_is_a_finite_difference():
    with jax.enable_x64(True):
        base, tau, _, x, _ = random_problem()
        at = lambda h: tanh_network(ta.apply_task_vectors(base, [tau], h), x)  # noqa: E731
        f0, df = ta.tangent(tanh_network, base, tau, x)
        np.testing.assert_array_equal(f0, tanh_network(base, x))
        np.testing.assert_allclose((at(1e-5) - at(-1e-5)) / 2e-5, df, rtol=1e-7, atol=1e-9)


def test_a_one_layer_trunk_is_its_own_linearisation():
    layer = lambda params, x: x @ params["w0"] + params["b0"]  # noqa: E731
    base, tau, _, x, _ = random_problem()
    base, tau = ({name: p[name] for name in ("w0", "b0")} for p in (base, tau))
    edited = ta.apply_task_vectors(base, [tau], 1.7)
    np.testing.assert_allclose(ta.linearize(layer, base)(edited, x), layer(edited, x), atol=1e-6)


def test_linearising_below_a_frozen_head_is_the_head_after_the_linearised_trunk():
    base, tau, _, x, _ = random_problem()
    head = {name: base.pop(name) for name in ("w", "b")}
    tau = {name: tau[name] for name in base}
    trunk = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"])  # noqa: E731
    edited = ta.apply_task_vectors(base, [tau], 1.0)
    whole = ta.linearize(lambda p, x: tanh_network(p | head, x), base)(edited, x)
    parts = ta.linearize(trunk, base)(edited, x) @ head["w"] + head["b"]
    np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-6)


def test_alpha_zero_is_the_base_to_the_bit_and_edits_go_back():
    base, tau, other, _, _ = random_problem()
    for edited in (ta.apply_task_vectors(base, [tau, other], 0.0), ta.negate(base, tau, 0.0)):
        jax.tree.map(np.testing.assert_array_equal, edited, base)
    there = ta.apply_task_vectors(base, [tau], 1.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ta.negate(there, tau), base)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ta.task_vector(there, base), tau)


def test_integer_leaves_stay():
    base = {"w": jnp.ones(2), "steps": jnp.asarray(3)}
    vector = ta.task_vector({"w": jnp.full(2, 3.0), "steps": jnp.asarray(9)}, base)
    assert int(vector["steps"]) == 0
    edited = ta.apply_task_vectors(base, [vector], 0.5)
    assert int(edited["steps"]) == 3 and edited["w"].tolist() == [2.0, 2.0]
    f_lin = ta.linearize(lambda p, x: p["w"] ** 2 * x * p["steps"], base)
    assert f_lin(edited, jnp.ones(2)).tolist() == [9.0, 9.0]


def test_separate_networks_for_separate_inputs_are_disentangled():
    """Two sub-networks gated by the sign of the first input: each vector acts on its own inputs alone."""

    def gated(params, x):
        first = tanh_network(params["a"], x)
        return jnp.where(x[:, :1] > 0, first, tanh_network(params["b"], x))

    (a, ta_, _, x, _), (b, tb, _, y, _) = random_problem(0), random_problem(1)
    base, zeros = {"a": a, "b": b}, jax.tree.map(jnp.zeros_like, a)
    vectors_ = ({"a": ta_, "b": zeros}, {"a": zeros, "b": tb})
    inputs = (x.at[:, 0].set(1.0), y.at[:, 0].set(-1.0))
    grid = np.linspace(-3, 3, 5)
    for error in (ta.disentanglement_error, ta.linear_disentanglement_error):
        np.testing.assert_array_equal(error((gated, gated), base, vectors_, inputs, (grid, grid)), 0.0)


def test_error_is_zero_at_the_origin_and_symmetric_in_the_tasks():
    base, t1, t2, x1, x2 = random_problem()
    a1, a2 = np.asarray([-2.0, 0.0, 1.0, 3.0]), np.asarray([0.0, 2.0, -1.0])
    other = lambda p, x: -tanh_network(p, x)  # noqa: E731
    error = ta.disentanglement_error((tanh_network, other), base, (t1, t2), (x1, x2), (a1, a2))
    swapped = ta.disentanglement_error((other, tanh_network), base, (t2, t1), (x2, x1), (a2, a1))
    np.testing.assert_allclose(error, swapped.T, atol=1e-6)
    assert error.shape == (4, 3) and float(error.max()) > 0
    assert float(error[1, 0]) == 0.0
    # On an axis the edited task agrees with itself, and only the other task can be disturbed: at most 1.
    assert float(error[1].max()) <= 1 and float(error[:, 0].max()) <= 1


def test_gradient_descent_on_the_linearised_model_is_kernel_regression():
    with jax.enable_x64(True):
        base, _, _, x, elsewhere = random_problem(3)
        f_lin = ta.linearize(tanh_network, base)
        every = jnp.concatenate([x, elsewhere])
        kernel = empirical_ntk(tanh_network, base, every).reshape(2 * len(every), -1)
        y, rows, rate, steps = jnp.ones((len(x), 2)), 2 * len(x), 1e-4, 3000

        def step(params, _):
            gradient = jax.grad(lambda p: 0.5 * jnp.square(f_lin(p, x) - y).sum())(params)
            return jax.tree.map(lambda p, g: p - rate * g, params, gradient), None

        trained, _ = jax.lax.scan(step, base, None, length=steps)
        flow = kernel_flow(
            kernel[:rows, :rows], kernel[rows:, :rows], (y - tanh_network(base, x)).reshape(-1), time=rate * steps
        )
        moved = (f_lin(trained, elsewhere) - tanh_network(base, elsewhere)).reshape(-1)
        np.testing.assert_allclose(moved, flow, rtol=1e-4, atol=1e-4)


def test_linearised_models_survive_jit_vmap_and_grad():
    base, tau, _, x, _ = random_problem()
    f_lin = ta.linearize(tanh_network, base)
    many = jax.tree.map(lambda b, t: jnp.stack([b, b + t]), base, tau)
    together = jax.jit(jax.vmap(f_lin, (0, None)))(many, x)
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], many)
        np.testing.assert_allclose(together[i], f_lin(one, x), rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda p: f_lin(p, x).sum()))(ta.apply_task_vectors(base, [tau], 1.0))
    expected = jax.grad(lambda p: tanh_network(p, x).sum())(base)  # the gradient of f_lin is that of f at the base
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected)


@pytest.mark.parametrize("kind", ["mlp", "vit"])
def test_works_on_the_framework_s_models(kind):
    if kind == "mlp":
        model, x = mlp(MLPConfig(widths=(6, 5, 3))), jnp.ones((2, 6))
    else:
        shape = ViTConfig(image=(4, 4), patch=2, layers=1, width=8, heads=2, hidden=8, channels=1, classes=3)
        model, x = vit(shape), jnp.linspace(0, 1, 32).reshape(2, 4, 4, 1)
    base = model.init(jax.random.key(0))
    tau = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), base)
    apply = jax.jit(lambda params, x: model.apply({"params": params}, x))
    with jax.enable_x64(True):
        base, tau, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (base, tau, x))
        edited = ta.apply_task_vectors(base, [tau], 1e-5)
        bent = apply(edited, x) - jax.jit(ta.linearize(apply, base))(edited, x)
        assert float(jnp.abs(bent).max()) < 1e-3 * float(jnp.abs(apply(edited, x) - apply(base, x)).max())


def test_a_small_float32_change_of_bfloat16_parameters_is_not_lost():
    base = {"w": jnp.ones(3, jnp.bfloat16)}
    f_lin = ta.linearize(lambda p, x: (p["w"] * x).astype(jnp.float32), base)
    tuned = {"w": jnp.full(3, 1 + 1e-4)}  # bfloat16 next to 1 has steps of 0.0078
    assert tuned["w"].astype(jnp.bfloat16).tolist() == [1.0] * 3
    np.testing.assert_allclose(f_lin(tuned, jnp.ones(3, jnp.bfloat16)) - 1, 1e-4, rtol=0.01)


def test_alphas_are_chosen_by_their_rules():
    alphas = [0.0, 0.5, 1.0]
    accuracy = jnp.asarray([[0.2, 0.3], [0.6, 0.9], [0.8, 0.7]])
    single = jnp.asarray([0.8, 1.0])
    np.testing.assert_allclose(ta.normalised_accuracy(accuracy, single), [0.275, 0.825, 0.85], atol=1e-6)
    assert float(ta.addition_alpha(accuracy, single, alphas).alpha) == 1.0
    assert float(ta.addition_alpha(accuracy.at[1].set(accuracy[2]), single, alphas).alpha) == 0.5  # first of a tie
    target, control = jnp.asarray([0.9, 0.4, 0.1]), jnp.asarray([0.6, 0.58, 0.4])
    choice = ta.negation_alpha(target, control, 0.6, alphas)
    assert (float(choice.alpha), bool(choice.feasible)) == (0.5, True)
    assert float(ta.negation_alpha(target, control, 0.6, alphas, floor=0.5).alpha) == 1.0
    choice = ta.negation_alpha(target, jnp.zeros(3), 0.6, alphas)
    assert (float(choice.alpha), bool(choice.feasible)) == (0.0, False)
    np.testing.assert_allclose(ta.nonlinear_advantage(0.9, 0.45, 10), 0.5)


def test_the_optimiser_clips_warms_up_and_decays_the_weights_themselves():
    params = {"w": jnp.asarray([3.0])}
    optimiser = ta.fine_tuning_optimiser(0.1, 10, warmup=2)
    state = optimiser.init(params)
    moved = []
    for _ in range(10):
        updates, state = optimiser.update({"w": jnp.asarray([100.0])}, state, params)
        moved.append(-float(updates["w"][0]))
    rates = 0.1 * np.r_[0, 0.5, 0.5 * (1 + np.cos(np.pi * np.arange(8) / 8))]
    np.testing.assert_allclose(moved, rates * (1 + 0.1 * 3), rtol=1e-4, atol=1e-7)
    big = optax.chain(optax.clip_by_global_norm(1.0)).update({"w": jnp.asarray([100.0])}, (optax.EmptyState(),))[0]
    assert float(big["w"][0]) == pytest.approx(1.0)


def test_relative_norm():
    assert float(ta.relative_norm({"a": jnp.asarray([3.0, 4.0])}, {"a": jnp.asarray([0.0, 10.0])})) == pytest.approx(
        0.5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {k: v for k, v in p.items() if k != "b0"}, '"b0" is missing'),
        (lambda p: p | {"extra": jnp.ones(1)}, '"extra" is not a parameter of the base'),
        (lambda p: p | {"w1": p["w1"].T}, r'"w1" has shape \(4, 5\), wanted \(5, 4\)'),
        (lambda p: p | {"w1": p["w1"].astype(jnp.bfloat16)}, '"w1" has dtype bfloat16, wanted float32'),
        (lambda p: p | {"b1": p["b1"].at[0].set(jnp.nan)}, '"b1" is not finite'),
    ],
)
def test_vectors_that_do_not_fit_are_refused_by_path(change, message):
    base, tau, _, x, _ = random_problem()
    grid = [0.0, 1.0]
    calls = [
        lambda: ta.task_vector(change(base), base),
        lambda: ta.apply_task_vectors(base, [tau, change(tau)], 1.0),
        lambda: ta.negate(base, change(tau)),
        lambda: ta.disentanglement_error((tanh_network,) * 2, base, (tau, change(tau)), (x, x), (grid, grid)),
        lambda: ta.linear_disentanglement_error((tanh_network,) * 2, base, (change(tau), tau), (x, x), (grid, grid)),
    ]
    if "dtype" not in message:
        calls.append(lambda: ta.linearize(tanh_network, base)(change(base), x))
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_wrong_multiples_are_refused():
    base, tau, _, x, _ = random_problem()
    with pytest.raises(ValueError, match="at least one task vector"):
        ta.apply_task_vectors(base, [], 1.0)
    with pytest.raises(ValueError, match=r"one for each of 1 vectors, got shape \(2,\)"):
        ta.apply_task_vectors(base, [tau], [1.0, 2.0])
    for error in (ta.disentanglement_error, ta.linear_disentanglement_error):
        with pytest.raises(ValueError, match=r"alphas\[1\].*contains 0"):
            error((tanh_network,) * 2, base, (tau, tau), (x, x), ([0.0, 1.0], [0.5, 1.0]))
    accuracy = jnp.ones((2, 1))
    with pytest.raises(ValueError, match="contains 0"):
        ta.addition_alpha(accuracy, jnp.ones(1), [0.5, 1.0])
    with pytest.raises(ValueError, match="one row for each of 3 alphas, got 2"):
        ta.addition_alpha(accuracy, jnp.ones(1), [0.0, 0.5, 1.0])
    for floor in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"floor must be in \(0, 1\]"):
            ta.negation_alpha(jnp.ones(2), jnp.ones(2), 1.0, [0.0, 1.0], floor=floor)
    with pytest.raises(ValueError, match="as many as target"):
        ta.negation_alpha(jnp.ones(2), jnp.ones(3), 1.0, [0.0, 1.0])
    with pytest.raises(ValueError, match="warmup must be"):
        ta.fine_tuning_optimiser(0.1, 10, warmup=10)


def test_models_in_training_mode_are_refused():
    base = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="evaluation mode"):
        ta.linearize(lambda p, x: (p["w"] * x, {"mean": x.mean()}), base)(base, jnp.ones(2))
    keyed = base | {"dropout": jax.random.key(0)}
    with pytest.raises(ValueError, match='"dropout" is a random key'):
        ta.linearize(lambda p, x: p["w"] * x, keyed)(keyed, jnp.ones(2))
