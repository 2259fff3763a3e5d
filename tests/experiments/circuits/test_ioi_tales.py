"""The prompts of the IOI analysis are what its figures say; the whole analysis runs on a tiny model."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from experiments.circuits.ioi_tales import find_circuit, make_prompts
from mechlab.data.worlds import tales
from mechlab.models.transformer import llama, transformer


def test_prompts_are_of_one_form_and_balanced():
    prompts = make_prompts(jax.random.key(0), 16)
    clean, corrupted, answers = (np.asarray(x) for x in prompts[:3])
    first, second, giver, end = (prompts.places[name] for name in ("name 1", "name 2", "giver", "end"))
    assert clean.shape == corrupted.shape == (16, end + 1)
    # The giver is one of the two, the answer the other, and the twin swaps them.
    np.testing.assert_array_equal(clean[:, giver], answers[:, 1])
    np.testing.assert_array_equal(corrupted[:, giver], answers[:, 0])
    np.testing.assert_array_equal(np.sort(clean[:, [first, second]]), np.sort(answers))
    assert ((clean != corrupted).sum(1) == 1).all() and (clean != tales.tokenizer.ids["<pad>"]).all()
    # The first half is answered by the first name, the other by the second.
    np.testing.assert_array_equal(clean[:, first] == answers[:, 0], np.repeat([True, False], 8))
    assert len({row.tobytes() for row in clean}) == 16


@pytest.mark.slow
def test_the_analysis_runs_and_its_identities_hold():
    sizes = {"vocabulary": len(tales.VOCABULARY), "layers": 2, "width": 16, "heads": 2, "hidden": 16, "context": 256}
    model = transformer(llama(**sizes))
    lines: list[str] = []
    params = model.init(jax.random.key(1))
    figures, numbers = find_circuit(jax.random.key(0), model, params, tales.tokenizer, lens_steps=1, log=lines.append)
    assert {*figures} == {
        *("patching", "attribution_patching", "path_patching", "ablation", "lenses", "direct_attribution", "heads"),
        *("probes", "steering", "splice"),
    }
    assert numbers["parts minus logit difference"] < 1e-5 and lines
