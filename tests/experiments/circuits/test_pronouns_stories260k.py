"""The pairs of the pronoun analysis, and that stories260K answers them. The steps are run in test_ioi_tales.py."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from experiments.circuits import _tour as tour
from experiments.circuits.pronouns_stories260k import make_pairs
from mechlab.models.subjects import load_stories260k


def test_pairs_differ_in_the_child_only_and_the_model_answers_them(data_dir: Path) -> None:
    model, params, vocabulary = load_stories260k(download=False)
    pairs = make_pairs(vocabulary)
    differ = np.asarray(pairs.clean != pairs.corrupted)
    assert differ.any(0).sum() == 3 and len(pairs.words) == pairs.clean.shape[1]
    girls = ["girl" in vocabulary.decode(row) for row in pairs.clean]
    assert girls == [i % 2 == 0 for i in range(len(girls))]
    assert [vocabulary.decode([int(right)]).strip() for right, _ in pairs.answers[:2]] == ["She", "He"]

    seen, numbers = tour.look(model, params, pairs)
    assert numbers["accuracy"] == 1
    np.testing.assert_allclose(seen.full, (seen.base - seen.other).mean())
    np.testing.assert_allclose(jax.jit(seen.read)({}, pairs.corrupted), seen.other, atol=1e-4)
