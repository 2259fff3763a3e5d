"""Emotion probes against an independent float64 reference and scikit-learn, closed forms and limits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlab.analysis.metrics import confusion, cross_entropy, macro_f1
from mechlab.methods.steering import emotion_probes as emo

SMALL = emo.ProbeConfig(hidden=16, rate=1e-2, epochs=12, batch=8)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_standardised_features_logits_loss_and_gradients_equal_the_vectors(vectors):
    v = vectors("emotion_probes")
    seen = jnp.asarray(v["last"][: int(v["n_train"])], jnp.float32)
    close(seen.mean(0), v["mu"])
    close(seen.std(0), v["sd"])
    x = emo.standardise(jnp.asarray(v["last"], jnp.float32), v["mu"], v["sd"])
    close(x, v["X"])
    params = {name: jnp.asarray(v[name], jnp.float32) for name in ("W1", "b1", "W2", "b2")}
    logits = emo.probe_apply(params, x)
    close(logits, v["logits"])
    y = jnp.asarray(v["y"], jnp.int32)
    loss, grads = jax.value_and_grad(lambda params: cross_entropy(emo.probe_apply(params, x), y))(params)
    close(loss, v["loss"])
    for name, gradient in grads.items():
        close(gradient, v[f"g{name}"])
    guess = logits.argmax(-1)
    close((guess == y).mean(), v["acc"])
    close(macro_f1(guess, y, 7), v["macro_f1"])
    np.testing.assert_array_equal(confusion(guess, y, 7), v["confusion"])


def test_geometry_equals_the_vectors_at_every_depth(vectors):
    v = vectors("emotion_probes")
    x, y = jnp.asarray(v["X"], jnp.float32), v["y"].astype(np.int32)
    found = emo.geometry(jnp.stack([x, 3 * x]), y, 7)
    for depth in range(2):
        close(found.silhouette[depth], v["silhouette"])
        close(found.fisher[depth], v["fisher_ratio"])
        close(found.cosine[depth], v["centroid_cosine"])


def test_geometry_equals_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    x = jax.random.normal(jax.random.key(0), (40, 5))
    # Class 3 has a single text.
    y = np.concatenate([np.arange(39) % 3, [3]])
    close(emo.geometry(x, y, 4).silhouette, sklearn.silhouette_score(np.asarray(x), y))


@settings(max_examples=10)
@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_geometry_knows_no_rotation_and_no_scale(seed, scale):
    x = jax.random.normal(jax.random.key(seed), (24, 4))
    y = np.arange(24) % 3
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))
    before, after = emo.geometry(x, y, 3), emo.geometry(scale * x @ jnp.asarray(turn, jnp.float32) + 1, y, 3)
    for a, b in zip(before, after, strict=True):
        close(a, b, 2e-4)


@pytest.fixture(scope="module")
def separable():
    """(96, 2, 6) of three classes: depth 0 is the class, depth 1 is noise; and its probes."""
    y = np.arange(96) % 3
    keys = jax.random.split(jax.random.key(1), 2)
    clear = jax.nn.one_hot(y, 6) + 0.01 * jax.random.normal(keys[0], (96, 6))
    x = jnp.stack([clear, jax.random.normal(keys[1], (96, 6))], 1)
    parts = np.arange(48), np.arange(48, 72), np.arange(72, 96)
    probes = emo.fit_probes(jax.random.key(2), x, y, *parts[:2], classes=3, config=SMALL)
    return x, y, parts, probes


def test_a_clear_class_is_read_and_noise_is_not(separable):
    x, y, (_, _, test), probes = separable
    right = (emo.read_depths(probes, x).argmax(-1) == y)[:, test].mean(1)
    assert right[0] == 1
    assert abs(right[1] - 1 / 3) < 3 * np.sqrt(2 / 9 / len(test))
    assert (probes.epochs <= SMALL.epochs).all() and probes.dev_accuracy[0] == 1


def test_training_stops_when_the_dev_texts_are_not_read_better(separable):
    # All dev texts right after the first epochs, and nothing better can come: patience more epochs, and the end.
    _, _, _, probes = separable
    assert SMALL.patience < int(probes.epochs[0]) <= SMALL.epochs


def test_the_kept_parameters_are_those_of_the_best_epoch(separable):
    x, y, (_, dev, _), probes = separable
    found = (emo.read_depths(probes, x).argmax(-1) == y)[:, dev].mean(1)
    np.testing.assert_allclose(found, probes.dev_accuracy, atol=1e-6)


def test_all_depths_at_once_are_each_depth_alone_and_a_copy_has_the_same_accuracy(separable):
    x, y, (train, dev, _), probes = separable
    twice = jnp.concatenate([x[:, 1:], x], 1)
    again = emo.fit_probes(jax.random.key(2), twice, y, train, dev, classes=3, config=SMALL)
    for depth, source in ((0, 1), (1, 0), (2, 1)):
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(probes), strict=True):
            np.testing.assert_allclose(a[depth], b[source], rtol=1e-5, atol=1e-5)
    alone = emo.fit_probes(jax.random.key(2), x[:, 1:], y, train, dev, classes=3, config=SMALL)
    close(alone.params["W1"][0], probes.params["W1"][1])
    one = jax.tree.map(lambda leaf: leaf[1], probes)
    close(one(x[:, 1]), emo.read_depths(probes, x)[1])


def test_seeds_folds_and_labels_are_lanes(separable):
    x, y, (train, dev, _), probes = separable
    keys = jax.random.split(jax.random.key(5), 2)

    def fit(key, y):
        return emo.fit_probes(key, x, y, train, dev, classes=3, config=SMALL)

    lanes = jax.jit(jax.vmap(fit))(keys, jnp.stack([y, y]))
    assert lanes.params["W1"].shape == (2, 2, 6, 16)
    single = fit(keys[1], y)
    close(lanes.params["W2"][1], single.params["W2"])
    assert not np.allclose(lanes.params["W1"][0], lanes.params["W1"][1])
    assert probes.mean.shape == (2, 6)


def test_a_constant_feature_stays_finite(separable):
    x, y, (train, dev, _), _ = separable
    probes = emo.fit_probes(jax.random.key(2), x.at[:, :, 3].set(4.0), y, train, dev, classes=3, config=SMALL)
    assert bool((probes.deviation[:, 3] == 0).all())
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(probes))


def test_test_texts_do_not_enter_the_standardisation(separable):
    x, y, (train, dev, test), probes = separable
    moved = emo.fit_probes(jax.random.key(2), x.at[test].add(50), y, train, dev, classes=3, config=SMALL)
    close(moved.mean, probes.mean)
    close(moved.params["W1"], probes.params["W1"])


def test_a_control_task_has_one_class_per_group_and_all_classes():
    groups = np.repeat(np.arange(10, 40), 4)
    labels = np.asarray(emo.control_labels(jax.random.key(0), groups, 7))
    assert all(len(set(labels[groups == g])) == 1 for g in set(groups))
    assert set(labels) == set(range(7))
    assert (labels != emo.control_labels(jax.random.key(1), groups, 7)).any()


def test_shift_and_override_are_their_definitions():
    plain = jnp.zeros((4, 3))
    logits = jnp.stack([plain + 50 * jax.nn.one_hot(k, 3) for k in (0, 1)])
    read, shift = emo.prompt_shift(logits, plain)
    close(read, jnp.eye(3)[:2])
    close(shift, jnp.eye(3)[:2] - 1 / 3)
    # Prompt 0 against texts 1, 2 and prompt 1 against texts 0, 2: four pairs; the probe reads the prompt in prompt 0
    # and the text in prompt 1.
    labels = jnp.asarray([0, 1, 2])
    logits = jnp.stack([jnp.tile(jax.nn.one_hot(0, 3), (3, 1)), jax.nn.one_hot(labels, 3)])
    by_prompt, by_text = emo.override_rates(logits, jnp.asarray([0, 1]), labels)
    close(by_prompt, 0.5)
    close(by_text, 0.5)


def test_half_life_counts_what_is_above_chance():
    # Chance 1/4: above it 0.6, 0.4, 0.3, 0.2; the first under 0.3 is the last.
    assert emo.half_life([0.85, 0.65, 0.5501, 0.45], [0, 5, 50, 90], 4) == 90
    assert emo.half_life([0.85, 0.85], [0, 5], 4) == float("inf")
    with pytest.raises(ValueError, match="P values of both"):
        emo.half_life([0.85], [0, 5], 4)


def test_what_cannot_be_trained_is_refused(separable):
    x, y, (train, dev, _), _ = separable

    def fit(**changed):
        given = {"x": x, "y": y, "train": train, "dev": dev, "classes": 3, "config": SMALL} | changed
        return emo.fit_probes(jax.random.key(0), **given)

    with pytest.raises(ValueError, match=r"classes \[3\] have no training text"):
        fit(classes=4)
    with pytest.raises(ValueError, match=r"wanted classes 0\.\.1, got 0\.\.2"):
        fit(classes=2)
    with pytest.raises(ValueError, match="share 1 texts"):
        fit(dev=np.asarray([0, 80]))
    with pytest.raises(ValueError, match="1 features are not finite"):
        fit(x=x.at[3, 1, 2].set(jnp.nan))
    with pytest.raises(ValueError, match=r"wanted \(N, L \+ 1, D\)"):
        fit(x=x[:, 0])
    with pytest.raises(ValueError, match="dropout in"):
        emo.ProbeConfig(dropout=1.0)
    with pytest.raises(ValueError, match=r"wrong: \[3\]"):
        emo.geometry(x[:, 0], y, 4)
    with pytest.raises(ValueError, match="at least 2 classes"):
        emo.geometry(x[:, 0], y * 0, 1)


def test_classes_have_label_words_and_unknown_ones_are_named():
    assert emo.label_words(("anger", "joy")) == ["angry", "happy"]
    with pytest.raises(KeyError, match=r'unknown class "angr".*Did you mean "anger"'):
        emo.label_words(("angr",))
    with pytest.raises(ValueError, match="same word"):
        emo.label_words(("joy", "happiness"))
