"""Image classifiers for experiments: the images of one run, several networks trained at once, what each gets right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mechlab.analysis.metrics import correct, cross_entropy
from mechlab.data.images import load_images
from mechlab.reporting.log import Log
from mechlab.training.batches import shuffled
from mechlab.training.loop import Fit, Job, fit_many

Apply = Callable[[Any, jax.Array], jax.Array]
"""``apply(params, x) -> logits``."""

CHUNK = 500
"""Test images per forward of all networks."""


class Split(NamedTuple):
    """Images of one run.

    Attributes:
      train: ``{"x": (N, h, w) float32 in [0, 1], "y": (N,) int32}``.
      test: likewise, M images.
    """

    train: dict[str, jax.Array]
    test: dict[str, jax.Array]


def image_split(data: str, log: Log, *, train: int | None = None, test: int | None = None) -> Split:
    """A set of ``data.images.load_images``, or the first images of each part of it.

    Args:
      data: "auto", "mnist" or "digits".
      log: is told which images these are.
      train, test: at most so many; all by default.
    """
    images = load_images(data)
    kept = {"train": images.train_x[:train], "test": images.test_x[:test]}
    log.say(f"data: {images.note}; here {len(kept['train']):,} to train and {len(kept['test']):,} to test")
    labels = {"train": images.train_y[:train], "test": images.test_y[:test]}
    return Split(*({"x": jnp.asarray(kept[part]), "y": jnp.asarray(labels[part])} for part in ("train", "test")))


def train_classifiers(
    keys: jax.Array,
    apply: Apply,
    params: Any,
    data: dict[str, jax.Array],
    optimiser: optax.GradientTransformation,
    *,
    steps: int,
    batch: int,
    record: Callable[[Any], Any] | None = None,
    log: Log | None = None,
    name: str = "classifiers",
) -> Fit:
    """Train one network per seed by cross-entropy, all in one program.

    Args:
      keys: (S,) typed keys, for the batches.
      apply: of one network.
      params: leaves (S, ...), the starting points.
      data: ``{"x": (N, ...), "y": (N,)}``, shared.
      optimiser: shared; a new state per seed.
      steps, batch, record, log, name: as in ``training.loop.fit_many``.

    Returns:
      As ``fit_many``.
    """

    def build(lane: Any) -> Job:
        def loss(params: Any, batch: Any) -> jax.Array:
            return cross_entropy(apply(params, batch["x"]), batch["y"])

        return Job(loss, lane, optimiser, shuffled(data, batch))

    return fit_many(keys, params, build, steps=steps, record=record, log=log, name=name)


def hits(apply: Apply, params: Any, data: dict[str, jax.Array]) -> np.ndarray:
    """Which images every network classifies correctly, (S, N) bool.

    Args:
      apply: of one network.
      params: leaves (S, ...).
      data: ``{"x": (N, ...), "y": (N,)}``.
    """
    right = jax.jit(jax.vmap(lambda params, x, y: correct(apply(params, x), y), in_axes=(0, None, None)))
    parts = [
        np.asarray(right(params, data["x"][at : at + CHUNK], data["y"][at : at + CHUNK]))
        for at in range(0, len(data["y"]), CHUNK)
    ]
    return np.concatenate(parts, axis=1)
