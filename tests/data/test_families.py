"""Image families: ranges, classes that can be told apart, independence of the count, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.data.families import FAMILIES, blurred_digits, family_images


@pytest.mark.parametrize("name", FAMILIES)
def test_images_are_in_range_and_a_key_decides_them(name):
    x, y = family_images(jax.random.key(0), name, 40, size=12)
    assert x.shape == (40, 12, 12) and x.dtype == jnp.float32 and y.dtype == jnp.int32
    assert float(x.min()) >= 0 and float(x.max()) <= 1 and float(x.std()) > 0.05
    assert set(np.asarray(y)) <= set(range(10)) and len(set(np.asarray(y))) > 5
    again = family_images(jax.random.key(0), name, 40, size=12)
    np.testing.assert_array_equal(x, again.x)
    assert not np.array_equal(x, family_images(jax.random.key(1), name, 40, size=12).x)


@pytest.mark.parametrize("name", FAMILIES)
def test_classes_differ_by_more_than_chance(name):
    """Pixels and their mean, or the power spectrum, tell classes apart: the nearest class mean beats 20 %."""
    x, y = (np.asarray(a) for a in family_images(jax.random.key(0), name, 600, size=16))
    plain = np.concatenate([x.reshape(600, -1), 10 * x.mean((1, 2))[:, None]], 1)
    power = np.log(np.abs(np.fft.fft2(x)) ** 2 + 1).reshape(600, -1)
    best = 0.0
    for features in (plain, power):
        means = np.stack([features[:400][y[:400] == c].mean(0) for c in range(10)])
        nearest = np.square(features[400:, None] - means).sum(-1).argmin(1)
        best = max(best, float((nearest == y[400:]).mean()))
    assert best > 0.2, best


def test_blurred_digits_are_the_digits_inverted():
    train, test = blurred_digits(jax.random.key(0), size=8)
    from mechlab.data.images import load_digits

    digits = load_digits()
    assert len(train.y) == 1200 and len(test.y) == 597
    np.testing.assert_array_equal(train.y, digits.train_y)
    np.testing.assert_allclose(np.asarray(train.x).mean(), 1 - digits.train_x.mean(), atol=0.03)
    assert blurred_digits(jax.random.key(0), size=28)[1].x.shape == (597, 28, 28)


def test_unknown_families_and_sizes_are_refused():
    with pytest.raises(ValueError, match=r'unknown family "ring".*"rings"'):
        family_images(jax.random.key(0), "ring", 3)
    with pytest.raises(ValueError, match="at least 1 image"):
        family_images(jax.random.key(0), "rings", 0)
    with pytest.raises(ValueError, match="4 x 4"):
        family_images(jax.random.key(0), "rings", 1, size=4)
    with pytest.raises(ValueError, match="at least 8"):
        blurred_digits(jax.random.key(0), size=4)
