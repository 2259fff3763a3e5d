"""TruthPrInt against an independent reference, its limits and invariants, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from mechlab.analysis.metrics import auroc
from mechlab.analysis.subspaces import principal_cosines
from mechlab.methods.steering import rollback
from mechlab.methods.steering import truthprint as tp
from mechlab.methods.steering.decoding import (
    IDLE,
    beam_search,
    contrast_layers,
    contrast_logits,
    contrasted,
    layered,
    sampled,
)

VECTORS = np.load(Path(__file__).parents[2] / "vectors" / "14-truthprint.npz")
OBJECTS = VECTORS["objects"].tolist()
END, EOS = VECTORS["stop_eos"].tolist()
V, T = 14, 16


def table_step(carry, tokens, positions):
    """The table language model of the vectors: p = t mod 7, and the previous token."""
    p = jnp.maximum(positions + 1, 0) % 7
    table = jnp.asarray(VECTORS["table_logits"])[p, tokens]
    return table, jnp.asarray(VECTORS["table_det"])[p, tokens], carry


def table_score(moment):
    return jnp.take_along_axis(moment.hidden, moment.token[:, None], 1)[:, 0]


def decode(**options):
    given = {
        "batch": 2,
        "vocabulary": V,
        "objects": OBJECTS,
        "start": V - 1,
        "sentence_end": END,
        "eos": EOS,
        "tau": 0.3,
        "max_len": T,
        "budget": 200,
    }
    return rollback.guarded_decode(table_step, (), options.pop("detector", table_score), **(given | options))


@pytest.mark.parametrize("tau", [0.3, 0.7])
@pytest.mark.parametrize("n_max", [0, 1, 4])
def test_decoding_gives_the_reference_s_texts_and_interventions(tau, n_max):
    found = decode(tau=tau, n_max=n_max)
    name = f"tau{tau}_iv{n_max}"
    trace = VECTORS[f"trace_{name}"]
    for row in range(2):
        length = int(found.lengths[row])
        np.testing.assert_array_equal(found.tokens[row, :length], VECTORS[f"decode_{name}"])
        np.testing.assert_allclose(found.confidence[row, :length], VECTORS[f"conf_{name}"], rtol=1e-5)
        np.testing.assert_array_equal(found.trace[row, : len(trace)], trace)
        assert int(found.interventions[row]) == len(trace) and bool((found.trace[row, len(trace) :] == -1).all())
    assert bool(found.finished.all())


def test_no_interventions_and_a_threshold_above_one_are_greedy():
    greedy, unreachable = decode(n_max=0), decode(tau=1.01)
    np.testing.assert_array_equal(greedy.tokens, unreachable.tokens)
    assert greedy.forwards.tolist() == greedy.lengths.tolist()
    # Greedy by hand.
    token, text = V - 1, []
    for t in range(T):
        token = int(VECTORS["table_logits"][t % 7, token].argmax())
        text.append(token)
        if token == EOS:
            break
    assert greedy.tokens[0, : len(text)].tolist() == text


@pytest.mark.parametrize("rollback", rollback.ROLLBACKS)
@pytest.mark.parametrize("check", ["objects", "all"])
def test_every_rollback_ends_and_bans_what_it_says(rollback, check):
    found = decode(rollback=rollback, check=check, key=jax.random.key(0), n_max=3, tau=0.2)
    assert bool(found.finished.all()) and int(found.forwards.max()) <= 200
    np.testing.assert_array_equal(found.forwards, found.lengths + _removed(found))
    trace = np.asarray(found.trace[0])[: int(found.interventions[0])]
    assert len(trace) and (trace[:, 1] <= trace[:, 0]).all()
    if rollback == "immediate":
        assert (trace[:, 1] == trace[:, 0]).all()
    # A token stays banned until something before it changes.
    text = np.asarray(found.tokens[0])
    for number, (_, goal, banned) in enumerate(trace):
        if not (trace[number + 1 :, 1] < goal).any():
            assert text[goal] != banned


def _removed(found):
    """Forwards that were undone: each intervention costs its own, and those of the tokens it takes back."""
    trace = np.asarray(found.trace)
    used = trace[..., 0] >= 0
    return (used * (1 + trace[..., 0] - trace[..., 1])).sum(1)


@jax.jit
def decode_random(table, det, tau):
    """A language model that knows the last token only; its detector likewise."""
    return rollback.guarded_decode(
        lambda carry, tokens, positions: (table[tokens], det[tokens], carry),
        (),
        table_score,
        batch=1,
        vocabulary=V,
        objects=OBJECTS,
        start=V - 1,
        sentence_end=END,
        eos=EOS,
        tau=tau,
        max_len=T,
        n_max=3,
    )


def by_hand(table, det, tau, n_max=3):
    """The loop of the paper as a list program."""
    text, confidence, start, count, bans, trace, forwards = [], [], 0, 0, {}, [], 0
    while forwards < 8 * T:
        forwards += 1
        t, before = len(text), text[-1] if text else V - 1
        p = np.exp(table[before] - table[before].max())
        p /= p.sum()
        v = max((w for w in range(V) if w not in bans.get(t, ())), key=lambda w: table[before, w])
        if v in OBJECTS and det[before, v] >= tau and count < n_max:
            count += 1
            back = start + int(np.argmin(confidence[start:])) if t > start else t
            bad = text[back] if back < t else v
            trace.append((t, back, bad))
            text, confidence = text[:back], confidence[:back]
            bans = {i: banned for i, banned in bans.items() if i <= back}
            bans[back] = bans.get(back, set()) | {bad}
            continue
        text.append(v)
        confidence.append(p[v])
        if v == END:
            start, count, bans = t + 1, 0, {}
        if v == EOS or len(text) == T:
            break
    return text, confidence, trace, forwards


@given(st.integers(0, 2**31 - 1), st.floats(0.0, 1.0, width=32))
def test_decoding_is_the_list_program_on_any_model(seed, tau):
    rng = np.random.default_rng(seed)
    table, det = rng.normal(size=(V, V)).astype(np.float32), rng.uniform(size=(V, V)).astype(np.float32)
    found = decode_random(table, det, tau)
    text, confidence, trace, forwards = by_hand(table, det, tau)
    assert found.tokens[0, : len(text)].tolist() == text and int(found.lengths[0]) == len(text)
    assert found.trace[0, : len(trace)].tolist() == [list(step) for step in trace]
    assert int(found.interventions[0]) == len(trace) and int(found.forwards[0]) == forwards
    np.testing.assert_allclose(found.confidence[0, : len(text)], confidence, rtol=1e-4)


def test_a_budget_cuts_short_and_says_so():
    found = decode(budget=T, n_max=4)
    assert not bool(found.finished.any()) and found.forwards.tolist() == [T, T]


def test_rows_do_not_see_each_other_and_jit_takes_a_traced_threshold():
    compiled = jax.jit(lambda tau: decode(tau=tau, n_max=4))
    for tau in (0.3, 0.7):
        np.testing.assert_array_equal(compiled(tau).tokens, np.repeat(decode(tau=tau, n_max=4, batch=1).tokens, 2, 0))
    both = jax.vmap(lambda tau: decode(tau=tau, n_max=4).tokens)(jnp.array([0.3, 0.7]))
    np.testing.assert_array_equal(both[1], compiled(0.7).tokens)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tau": float("nan")}, "NaN"),
        ({"n_max": -1}, "n_max"),
        ({"objects": []}, "empty"),
        ({"objects": [V]}, r"0\.\.13"),
        ({"objects": [END]}, "sentence end"),
        ({"budget": T - 1}, "budget >= max_len"),
        ({"rollback": "back"}, "rollback"),
        ({"check": "some"}, "check"),
        ({"rollback": "random"}, "key"),
    ],
)
def test_bad_decoding_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        decode(**options)


# ComnHallu.


def aligned(x_s=VECTORS["Xs"], x_t=VECTORS["Xt"], **options):
    return tp.comnhallu(x_s, x_t, 4, **options)


def test_alignment_gives_the_reference_s_maps():
    maps = aligned()
    for ours, theirs in (
        (maps.source_mean, "mu_s"),
        (maps.target_mean, "mu_t"),
        (maps.source_basis.T, "V_s"),
        (maps.target_basis.T, "V_t"),
        (maps.source_variance, "eig_s"),
        (maps.target_variance, "eig_t"),
        (maps.source(VECTORS["Xs"]), "Z_s"),
        (maps.target(VECTORS["Xt"]), "Z_t"),
    ):
        np.testing.assert_allclose(ours, VECTORS[theirs], rtol=1e-3, atol=1e-4)
    angles = np.arccos(np.asarray(principal_cosines(maps.source_basis, maps.target_basis)))
    np.testing.assert_allclose(angles, VECTORS["principal_angles"], atol=1e-4)
    by_scipy = subspace_angles(np.asarray(maps.source_basis).T, np.asarray(maps.target_basis).T)
    np.testing.assert_allclose(angles, by_scipy[::-1], atol=1e-4)


def test_alignment_of_a_set_with_itself_is_the_identity_and_variance_is_diagonal():
    maps = aligned(x_t=VECTORS["Xs"])
    z = np.asarray(maps.source(VECTORS["Xs"]))
    np.testing.assert_allclose(maps.target(VECTORS["Xs"]), z, atol=1e-4)
    np.testing.assert_allclose(z.T @ z / len(z), np.diag(VECTORS["eig_s"]), atol=1e-3)


def test_alignment_ignores_rotations_of_the_target_basis_and_of_both_domains():
    maps = aligned()
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    turned = maps._replace(target_basis=turn @ maps.target_basis)
    np.testing.assert_allclose(turned.target(VECTORS["Xt"]), maps.target(VECTORS["Xt"]), atol=1e-4)
    big = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0]
    both = aligned(VECTORS["Xs"] @ big, VECTORS["Xt"] @ big)
    for ours, other in (
        (maps.source(VECTORS["Xs"]), both.source(VECTORS["Xs"] @ big)),
        (maps.target(VECTORS["Xt"]), both.target(VECTORS["Xt"] @ big)),
    ):
        np.testing.assert_allclose(np.abs(ours), np.abs(other), atol=2e-3)


def test_without_centring_the_first_direction_is_the_mean_state():
    x = np.random.default_rng(0).normal(size=(200, 6)) + 10 * np.ones(6)
    _, basis, _ = tp.subspace(x, 2, center=False)
    assert float(jnp.abs(basis[0].sum()) / np.sqrt(6)) > 0.99


def test_k_holds_the_share_of_variance():
    x = np.random.default_rng(0).normal(size=(500, 4)) * [10, 3, 1, 0.1]
    variances = tp.subspace(x, 4)[2]
    assert tp.choose_k(variances, share=0.85) == 1 and tp.choose_k(variances, share=0.95) == 2
    assert tp.choose_k(variances, most=1) == 1 and tp.choose_k(variances, share=1.0) == 4


def test_maps_of_a_lower_rank_are_the_leading_ones():
    maps, low = tp.comnhallu(VECTORS["Xs"], VECTORS["Xt"], 7).leading(4), aligned()
    for name, theirs in low._asdict().items():
        np.testing.assert_allclose(getattr(maps, name), theirs, atol=1e-5)
    np.testing.assert_allclose(maps.target(VECTORS["Xt"]), low.target(VECTORS["Xt"]), atol=1e-4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: tp.comnhallu(np.ones((9, 3)), np.ones((9, 4)), 2), "one width"),
        (lambda: tp.comnhallu(np.ones((9, 3)), np.ones((3, 3)), 3), "k <= min"),
        (lambda: tp.subspace(np.full((9, 3), np.nan), 1), "not finite"),
    ],
)
def test_bad_alignments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# The detector.


def problem(n=400):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 5)).astype(np.float32)
    return x, (np.abs(x[:, 0]) > 0.7)


def test_the_mlp_learns_what_a_single_direction_cannot():
    x, y = problem()
    scores = {}
    for name, hidden in (("mlp", (16,)), ("linear", ())):
        found = tp.fit_detector(
            jax.random.key(0), x[:300], y[:300], x[300:], y[300:], hidden=hidden, epochs=60, rate=1e-2
        )
        scores[name] = float(found.dev_auroc)
        again = float(auroc(tp.detector_prob(found, x[300:]), y[300:]))
        assert again == pytest.approx(scores[name], abs=1e-3)
    assert scores["mlp"] > 0.9 and scores["linear"] < 0.7


def test_detectors_of_several_depths_come_from_one_program():
    x, y = problem(64)
    keys = jax.random.split(jax.random.key(1), 2)
    stack = jnp.stack([x, 2 * x])
    many = jax.vmap(lambda k, s: tp.fit_detector(k, s, y, s, y, hidden=(), epochs=3))(keys, stack)
    one = tp.fit_detector(keys[1], 2 * x, y, 2 * x, y, hidden=(), epochs=3)
    np.testing.assert_allclose(many.layers[0][0][1], one.layers[0][0], atol=1e-5)


def test_balancing_keeps_the_rarer_class_whole():
    labels = np.arange(10) < 3
    rows = tp.balanced(jax.random.key(0), labels)
    assert sorted(labels[rows]) == [False] * 3 + [True] * 3 and len(set(rows)) == 6
    assert labels[tp.balanced(jax.random.key(0), labels, 2)].tolist().count(True) == 2
    with pytest.raises(ValueError, match=r"1\.\.3"):
        tp.balanced(jax.random.key(0), labels, 4)


def test_thresholds_flag_at_most_what_was_asked():
    scores, labels = np.arange(100) / 100, np.arange(100) % 2 == 1
    tau = tp.threshold_at_fpr(scores, labels, 0.1)
    assert (scores[~labels].astype(np.float32) >= tau).sum() == 5
    assert (scores.astype(np.float32) >= tp.threshold_at_rate(scores, 0.0)).sum() == 0
    equal = np.full(8, 0.5)
    assert not (equal >= tp.threshold_at_rate(equal, 0.5)).any()


def test_bad_detectors_are_refused():
    x, y = problem(20)
    with pytest.raises(ValueError, match="truthful and hallucinated"):
        tp.fit_detector(jax.random.key(0), x, np.zeros(20, bool), x, y)
    with pytest.raises(ValueError, match="not finite"):
        tp.fit_detector(jax.random.key(0), x * np.nan, y, x, y)
    with pytest.raises(ValueError, match=r"\(N, D\) and \(N,\)"):
        tp.fit_detector(jax.random.key(0), x, y[1:], x, y)
    with pytest.raises(ValueError, match="truthful and hallucinated"):
        tp.balanced(jax.random.key(0), np.ones(4, bool))
    with pytest.raises(ValueError, match="rate in"):
        tp.threshold_at_rate([], 0.1)


# The decoders beside it.


def chain_step(carry, tokens, positions):
    """Carries the last token read, so that reordering can be seen; V = 4, token 3 ends."""
    logits = jnp.log(jnp.asarray([[0.1, 0.5, 0.4, 0.0], [0.1, 0.2, 0.3, 0.4], [0.01, 0.01, 0.01, 0.97], [0.25] * 4]))
    carry = jnp.where(positions == IDLE, carry, tokens)
    return logits[tokens], tokens, carry


def test_a_beam_finds_a_likelier_text_than_greedy():
    def run(width):
        return beam_search(
            chain_step,
            jnp.zeros(width, int),
            lambda carry, rows: carry[rows],
            batch=1,
            width=width,
            start=0,
            eos=3,
            max_len=3,
        )

    assert run(1).tokens[0].tolist() == [1, 3, 0]
    assert run(3).tokens[0].tolist() == [2, 3, 0] and int(run(3).lengths[0]) == 2
    with pytest.raises(ValueError, match="width"):
        run(0)


def test_contrast_is_closed_form_and_sampling_stays_in_the_nucleus():
    logits, spoilt = jnp.log(jnp.asarray([0.6, 0.38, 0.02])), jnp.log(jnp.asarray([0.8, 0.1, 0.1]))
    found = contrast_logits(logits, spoilt, strength=1.0, plausible=0.1)
    np.testing.assert_allclose(found[:2], (2 * logits - spoilt)[:2], rtol=1e-5)
    assert found[2] == -jnp.inf and int(found.argmax()) == 1
    pair = contrasted(lambda c, t, p: (c, c, c), strength=0.0)((logits[None], spoilt[None]), jnp.zeros(1), jnp.zeros(1))
    np.testing.assert_allclose(pair[0][0, :2], logits[:2], rtol=1e-6)
    early = jnp.stack([logits, spoilt])
    # The first early layer says the same as the last, so the contrast is with the other.
    grown = contrast_layers(logits, early)
    np.testing.assert_allclose(grown[:2], (logits - spoilt)[:2], rtol=1e-5)
    assert grown[2] == -jnp.inf
    np.testing.assert_allclose(contrast_layers(logits, early[:1])[:2], 0, atol=1e-6)
    step = layered(lambda c, t, p: (c, c, c), lambda hidden: jnp.stack([hidden, spoilt[None]], 1))
    np.testing.assert_array_equal(step(logits[None], jnp.zeros(1), jnp.zeros(1))[0][0], grown)
    draws = [
        int(
            sampled(lambda c, t, p: (c, c, c), jax.random.key(s), top_p=0.9)(
                logits[None], jnp.zeros(1, int), jnp.zeros(1, int)
            )[0].argmax()
        )
        for s in range(40)
    ]
    assert set(draws) == {0, 1}
