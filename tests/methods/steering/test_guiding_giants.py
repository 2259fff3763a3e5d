"""Controllers: the official numbers, the causal rule, what each loss teaches, and generation under them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlab.methods.steering import cast
from mechlab.methods.steering import guiding_giants as giants
from mechlab.methods.steering import guiding_giants_training as training
from mechlab.models.generate import generate
from mechlab.models.transformer import llama, transformer

L, D, V = 3, 16, 20
MODEL = transformer(llama(vocabulary=V, layers=L, width=D, heads=4, hidden=24, context=24, init_std=None))
PARAMS = MODEL.init(jax.random.key(0))
TOKENS = jnp.asarray([[1, 4, 2, 9, 5], [3, 3, 7, 0, 0]])
LENGTHS = jnp.asarray([5, 3])
R = jax.nn.one_hot(2, D)
CONTROLLER = giants.init_controller(jax.random.key(1), 2 * D, L, 8)
EARLY = giants.steer_by_controller(MODEL, (0, 1))


@pytest.fixture
def official(vectors):
    return vectors("guiding_giants")


def torch_layout(data, prefix):
    return {
        name: {
            "kernel": jnp.asarray(data[f"{prefix}{name}.weight"].T),
            "bias": jnp.asarray(data[f"{prefix}{name}.bias"]),
        }
        for name in ("fc1", "fc2")
    }


def variables(scale=4.0, mode="causal", layers=(0, 1), controller=CONTROLLER):
    return {"params": PARAMS} | giants.steering(controller, R, scale=scale, reach=giants.reach(L, layers, mode))


def states_of(steered, vs):
    """Logits of a steered forward over right-padded prompts, at each last token."""
    at_tokens = jnp.arange(TOKENS.shape[1])
    positions = jnp.where(at_tokens < LENGTHS[:, None], at_tokens, -1)
    return steered.step(vs, TOKENS, positions, None, None, LENGTHS - 1)


def test_direction_is_the_official_one(official):
    r = giants.refusal_direction_embedding(official["E"], official["refusal_ids"], official["answer_ids"])
    np.testing.assert_allclose(r, official["refusal_direction"], atol=1e-6)


@pytest.mark.parametrize("case", ["early_", "last_"])
def test_patches_are_the_official_ones(official, case):
    weights, r = official["W"], official["refusal_direction"]
    controller, layers = torch_layout(official, case), official[f"{case}input_layers"].tolist()
    base = official[f"{case}base_layer_outs"]
    x = giants.controller_inputs(np.moveaxis(base[:, :, -1], 0, 1), layers)
    said = giants.controller_apply(controller, x)
    np.testing.assert_allclose(said.scalar, official[f"{case}scalar"], atol=1e-5)
    np.testing.assert_allclose(said.weight_logits, official[f"{case}weight_logits"], atol=1e-5)
    added = np.asarray(giants.patch(said, r, float(official["scale"]), giants.reach(len(weights), layers)))
    h, outs = np.asarray(official["x"]), []
    for kernel, more in zip(weights, added, strict=True):
        h = h + np.tanh(h @ kernel)
        h[:, -1] += more
        outs.append(h)
        h = h.copy()
    np.testing.assert_allclose(outs, official[f"{case}steered_layer_outs"], atol=1e-5)
    unpatched = max(layers)
    np.testing.assert_array_equal(official[f"{case}steered_layer_outs"][:unpatched], base[:unpatched])
    assert not added[:unpatched].any() and added[unpatched:].any()


def test_training_is_the_official_one(official):
    epochs, rate = official["train_epochs_lr"]
    start = torch_layout(official, "train_init_")
    trained, history = training.train_controller(
        jax.random.key(0), start, official["X_target"], official["X_benign"], epochs=int(epochs), rate=rate, batch=8
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), trained, torch_layout(official, "train_final_")
    )
    assert history.shape == (epochs, 2) and (history[-1] < history[0]).all()


def test_without_strength_nothing_changes_and_the_causal_rule_holds():
    base = MODEL.apply({"params": PARAMS}, TOKENS[:1])
    np.testing.assert_array_equal(EARLY.apply(variables(0.0), TOKENS[:1]), base)
    moved = EARLY.apply(variables(), TOKENS[:1])
    np.testing.assert_array_equal(moved[:, :-1], base[:, :-1])
    assert float(abs(moved - base)[:, -1].max()) > 1e-3
    np.testing.assert_array_equal(giants.reach(4, (-1, 0)), [0, 0, 0, 1])
    np.testing.assert_array_equal(giants.reach(4, (1,), "two_pass"), [1, 1, 1, 1])


def test_padding_moves_nothing():
    (padded, _), (alone, _) = states_of(EARLY, variables()), EARLY.step(variables(), TOKENS[1:, :3])
    np.testing.assert_allclose(padded[1, 0], alone[0, -1], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.floats(-4, 4), st.floats(0.1, 8))
def test_the_patch_is_linear_in_s_and_c(s, c):
    logits = jnp.asarray([[0.3, -1.0, 2.0]])
    one = giants.patch(giants.Strengths(jnp.asarray([[s]]), logits), R, 2 * c, jnp.ones(3))
    two = giants.patch(giants.Strengths(jnp.asarray([[2 * s]]), logits), R, c, jnp.ones(3))
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    assert (np.asarray(one)[..., 3:] == 0).all()


@pytest.mark.parametrize(("gate", "wanted"), [("raw", -2.0), ("sigmoid", 0.1192029), ("softplus", 0.126928)])
def test_gates(gate, wanted):
    said = giants.Strengths(jnp.asarray([[-2.0]]), jnp.full((1, 3), 50.0))
    np.testing.assert_allclose(giants.patch(said, R, 1.0, jnp.ones(3), gate)[:, 0, 2], wanted, rtol=1e-4)


@pytest.mark.parametrize("mode", ["causal", "two_pass"])
def test_generation_is_the_stepwise_rule(mode):
    vs = variables(6.0, mode)
    out = generate(EARLY, vs, TOKENS, LENGTHS, steps=3)
    answers = out.tokens[jnp.arange(2)[:, None], LENGTHS[:, None] + jnp.arange(3)]
    logits = training.answer_logits(EARLY, vs, TOKENS, LENGTHS, answers)
    np.testing.assert_array_equal(logits.argmax(-1), answers)
    if mode == "causal":
        # What is read is unedited, so one forward without a cache gives every patch, at every position.
        row = out.tokens[:1, :8]
        states = MODEL.capture({"params": PARAMS}, row, sites=("resid_post",))[1]["resid_post"][:, 0]
        said = giants.controller_apply(CONTROLLER, giants.controller_inputs(jnp.moveaxis(states, 0, 1), (0, 1)))
        added = giants.patch(said, R, 6.0, giants.reach(L, (0, 1)))
        edits = {"resid_post": cast.Add((added * (jnp.arange(8) >= 4)[None, :, None])[:, None])}
        whole = MODEL.apply({"params": PARAMS, "edits": edits}, row)
        np.testing.assert_allclose(whole[0, 4:7], logits[0], atol=1e-4)


def test_constant_edits_are_the_same_in_a_forward_and_in_generation():
    edits = cast.constant_edits(MODEL, R, jnp.asarray([0.0, 3.0, 0.0]), LENGTHS)
    out = generate(MODEL, {"params": PARAMS, "edits": edits}, TOKENS, LENGTHS, steps=3)
    row = out.tokens[1:2, :6]
    one = cast.constant_edits(MODEL, R, 3.0 * jax.nn.one_hot(1, L), LENGTHS[1:])
    greedy = MODEL.apply({"params": PARAMS, "edits": one}, row)[0].argmax(-1)
    np.testing.assert_array_equal(greedy[2:5], row[0, 3:6])
    off = cast.constant_edits(MODEL, R, 9.0 * jnp.ones((L, 1)) * jnp.asarray([0.0, 1.0]), LENGTHS)
    base, gated = (
        MODEL.apply({"params": PARAMS} | e, TOKENS, None, None, None, LENGTHS - 1) for e in ({}, {"edits": off})
    )
    np.testing.assert_array_equal(base[0], gated[0])
    assert float(abs(base[1] - gated[1]).max()) > 1e-3


def test_the_released_loss_says_nothing_about_weights_on_benign_batches():
    x = jax.random.normal(jax.random.key(3), (6, 2 * D))
    benign = jax.grad(training.released_loss)(CONTROLLER, x, False)["fc2"]
    assert not benign["kernel"][:, 1:].any() and not benign["bias"][1:].any() and benign["kernel"][:, 0].any()
    target = jax.grad(training.released_loss)(CONTROLLER, x, True)["fc2"]
    assert target["kernel"][:, 1:].any()
    # Rows of weight 0 do not count.
    half = training.released_loss(CONTROLLER, x, True, rows=jnp.asarray([1.0, 1, 1, 0, 0, 0]))
    np.testing.assert_allclose(half, training.released_loss(CONTROLLER, x[:3], True), rtol=1e-6)


def test_the_end_to_end_loss_falls_and_is_zero_of_nothing():
    answers = jnp.asarray([[5, 6, 7], [8, 9, 10]])
    base = training.answer_logits(MODEL, {"params": PARAMS}, TOKENS, LENGTHS, answers)
    batch = {"tokens": TOKENS, "lengths": LENGTHS, "answers": answers, "target": jnp.asarray([1, 0]), "base": base}
    reach = giants.reach(L, (0, 1))

    def loss(controller, scale, target):
        return training.end_to_end_loss(
            controller, EARLY, PARAMS, batch | {"target": target}, direction=R, scale=scale, reach=reach, size=0.0
        )

    value = jax.jit(jax.value_and_grad(loss))
    at_zero, _ = value(CONTROLLER, 0.0, jnp.asarray([0, 0]))
    assert abs(float(at_zero)) < 1e-5
    both, grads = value(CONTROLLER, 2.0, jnp.asarray([1, 0]))
    stepped = jax.tree.map(lambda p, g: p - 1e-3 * g, CONTROLLER, grads)
    assert value(stepped, 2.0, jnp.asarray([1, 0]))[0] < both
    assert grads["fc2"]["kernel"][:, 2:].any() and not grads["fc2"]["kernel"][:, 1].any()  # layer 0 is out of reach


def test_ablations_do_what_they_say():
    x = jax.random.normal(jax.random.key(4), (5, 2 * D))
    full = giants.controller_apply(CONTROLLER, x)
    half = giants.controller_apply(giants.half_weights(CONTROLLER), x)
    fixed = giants.controller_apply(giants.constant_scalar(CONTROLLER, 3.0), x)
    np.testing.assert_array_equal(half.scalar, full.scalar)
    np.testing.assert_array_equal(half.weight_logits, 0 * full.weight_logits)
    np.testing.assert_allclose(fixed.scalar, 3.0)
    np.testing.assert_array_equal(fixed.weight_logits, full.weight_logits)
    moved = giants.controller_apply(giants.shift_scalar(CONTROLLER, -2.0), x)
    np.testing.assert_allclose(moved.scalar, full.scalar - 2, atol=1e-5)
    np.testing.assert_array_equal(moved.weight_logits, full.weight_logits)


def test_mixed_batches_are_the_same_batches_in_another_order():
    x = jax.random.normal(jax.random.key(8), (2, 24, 2 * D)) + 0.5 * jnp.asarray([1.0, -1.0])[:, None, None]

    def trained(n, **options):
        return training.train_controller(jax.random.key(0), CONTROLLER, x[0, :n], x[1, :n], epochs=1, **options)

    released, mixed = (trained(24, rate=1e-3, mixed=mixed) for mixed in (False, True))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (released[0], mixed[0])), strict=True))
    # Without a step the order does not matter, so every side's mean loss is that of the same batches.
    released, mixed = (trained(24, rate=0.0, mixed=mixed)[1] for mixed in (False, True))
    np.testing.assert_allclose(released, mixed, rtol=1e-5)


def test_target_only_training_is_asked_for_and_fires_everywhere():
    x = jax.random.normal(jax.random.key(5), (16, 2 * D))
    with pytest.raises(ValueError, match="allow_target_only"):
        training.train_controller(jax.random.key(0), CONTROLLER, x, x[:0])
    trained, history = training.train_controller(
        jax.random.key(0), CONTROLLER, x, x[:0], epochs=20, rate=1e-2, allow_target_only=True
    )
    unseen = [float(giants.controller_apply(params, -x).scalar.mean()) for params in (CONTROLLER, trained)]
    assert (giants.controller_apply(trained, x).scalar > 0).all() and unseen[1] > max(unseen[0], 0)
    assert not history[:, 1].any()


def test_the_gate_ranks_as_logistic_regression_does():
    linear = pytest.importorskip("sklearn.linear_model")
    from mechlab.analysis.metrics import auroc

    key = jax.random.split(jax.random.key(6), 2)
    shift = 0.8 * jax.nn.one_hot(0, 2 * D)
    pos, neg = jax.random.normal(key[0], (120, 2 * D)) + shift, jax.random.normal(key[1], (120, 2 * D)) - shift
    trained, _ = training.train_controller(jax.random.key(7), CONTROLLER, pos[:80], neg[:80], epochs=10, rate=1e-3)
    labels = np.repeat([1, 0], 80)
    oracle = linear.LogisticRegression().fit(np.concatenate([pos[:80], neg[:80]]), labels)
    held, truth = np.concatenate([pos[80:], neg[80:]]), np.repeat([1, 0], 40)
    ours = auroc(giants.controller_apply(trained, held).scalar[:, 0], truth)
    assert abs(float(ours) - float(auroc(oracle.decision_function(held), truth))) < 0.06


def test_cast_finds_the_layer_that_tells_them_apart():
    noise = jax.random.normal(jax.random.key(8), (2, 30, L, D))
    v = jax.random.normal(jax.random.key(9), (L, D))
    shift = jnp.zeros((L, D)).at[1].set(4 * v[1])
    rule = cast.fit_cast(noise[0] + shift, noise[1], v)
    assert (rule.layer, rule.sign) == (1, 1) and rule.f1 > 0.95
    assert cast.cast_gate(rule, noise[0] + shift, v).mean() > 0.9 > 0.2 > cast.cast_gate(rule, noise[1], v).mean()
    # The projection turns with h, so the condition knows how far h reaches along v, and not which way.
    flipped = cast.fit_cast(noise[0], noise[1] + shift, v)
    assert (flipped.layer, flipped.sign) == (1, -1)
    h, w = np.asarray([1.0, 2.0]), np.asarray([2.0, 0.0])
    wanted = np.tanh(1.0) / (np.sqrt(5) * np.tanh(1.0))
    np.testing.assert_allclose(cast.cast_similarity(h, w), wanted, rtol=1e-6)


X = jnp.zeros((3, 2 * D))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: giants.resolve_layers((), 4), "input_layers"),
        (lambda: giants.resolve_layers((4,), 4), "input_layers"),
        (lambda: giants.resolve_layers((-5,), 4), "input_layers"),
        (lambda: giants.resolve_layers((3, -1), 4), "different"),
        (lambda: giants.controller_apply(CONTROLLER, X[:, 1:]), "width"),
        (lambda: giants.refusal_direction_activation(np.ones((2, 3)), np.ones((1, 3))), "not zero"),
        (lambda: giants.refusal_direction_activation(np.full((2, 3), np.nan), np.ones((1, 3))), "finite"),
        (lambda: giants.refusal_direction_activation(np.ones((0, 3)), np.ones((1, 3))), "wanted"),
        (lambda: giants.refusal_direction_embedding(np.eye(3), [], [1]), "ids_refuse"),
        (lambda: giants.refusal_direction_embedding(np.eye(3), [0], [3]), "ids_answer"),
        (lambda: giants.reach(4, (1,), "both"), "mode"),
        (lambda: giants.steer_by_controller(MODEL, (0,), gate="tanh"), "gate"),
        (lambda: giants.patch(giants.Strengths(jnp.ones((1, 1)), jnp.ones((1, 3))), R, 1.0, jnp.ones(2)), "reach"),
        (lambda: giants.steering(CONTROLLER, 2 * R, scale=1.0, reach=jnp.ones(L)), "length 1"),
        (lambda: giants.steering(CONTROLLER, R, scale=np.inf, reach=jnp.ones(L)), "scale"),
        (lambda: giants.init_controller(jax.random.key(0), 0, 3), "sizes"),
        (lambda: giants.controller_inputs(jnp.ones((2, 3)), (0,)), "states"),
        (lambda: training.train_controller(jax.random.key(0), CONTROLLER, X[:0], X), "x_target"),
        (lambda: training.train_controller(jax.random.key(0), CONTROLLER, X * np.nan, X), "finite"),
        (lambda: training.train_controller(jax.random.key(0), CONTROLLER, X, X[:, 1:]), "x_benign"),
        (lambda: training.train_controller(jax.random.key(0), CONTROLLER, X, X, epochs=0), "epochs"),
        (lambda: cast.constant_edits(MODEL, R, jnp.ones(L + 1), LENGTHS), "strengths"),
        (lambda: cast.fit_cast(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 5)), jnp.ones((3, 4))), "fit_cast"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
