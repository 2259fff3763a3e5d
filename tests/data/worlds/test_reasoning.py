"""The problems of coin and event_count, read back by a plain parser."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from mechlab.data.worlds.reasoning import coin, event_count, tokenizer

WORLDS = {"coin": coin, "event_count": event_count}


def words(problems: Any, row: int) -> list[str]:
    return [tokenizer.words[i] for i in np.asarray(problems.tokens[row, : int(problems.lengths[row])])]


def follow(world: str, flips: list[bool]) -> list[str]:
    total = 0
    states = []
    for flip in flips:
        total += flip
        states.append(str(total) if world == "event_count" else ("heads", "tails")[total % 2])
    return states


@pytest.mark.parametrize("world", WORLDS)
def test_without_slips_every_state_and_every_answer_is_right(world: str) -> None:
    problems = WORLDS[world](jax.random.key(0), 300, slip=0.0)
    for row in range(300):
        text = words(problems, row)
        asked = text.index("?")
        assert asked + 1 == problems.prompts[row]
        events = [text[i : i + 3] for i in range(2, asked, 3)]
        names = [name for _, name, _ in events]
        assert len(set(names)) == len(names) == problems.people[row] and 3 <= len(names) <= 8
        states = follow(world, [act == "flips" for *_, act in events])
        answer = states[-1] if world == "event_count" else {"heads": "yes", "tails": "no"}[states[-1]]
        assert text[-3:] == ["so", answer, "."] and tokenizer.words[problems.answers[row]] == answer
        rationale = text[asked + 1 : -3]
        assert bool(problems.direct[row]) == (not rationale)
        told = [word for (_, *event), state in zip(events, states, strict=True) for word in (*event, state, ";")]
        assert rationale in ([], told)
        counted = np.flatnonzero(np.asarray(problems.mask[row])) + 1
        assert counted.tolist() == list(range(asked + 1, len(text)))
    assert 60 < int(problems.direct.sum()) < 120


@pytest.mark.parametrize("world", WORLDS)
def test_slips_change_the_rationale_and_never_the_answer(world: str) -> None:
    same = {"people": (6, 6), "direct": 0.0}
    clean = WORLDS[world](jax.random.key(1), 400, slip=0.0, **same)
    slipped = WORLDS[world](jax.random.key(1), 400, slip=0.1, **same)
    np.testing.assert_array_equal(clean.answers, slipped.answers)
    np.testing.assert_array_equal(clean.tokens[:, :21], slipped.tokens[:, :21])
    apart = (np.asarray(clean.tokens) != np.asarray(slipped.tokens)).any(1)
    # Two slips may cancel, so a rationale that slipped need not end wrong, but the first wrong state stands there;
    # a count below 0 is written as 0, which may hide one.
    assert (apart <= (np.asarray(slipped.slips) > 0)).all()
    assert 400 * 6 * 0.1 == pytest.approx(int(slipped.slips.sum()), abs=60)
    if world == "coin":
        np.testing.assert_array_equal(apart, np.asarray(slipped.slips) > 0)


def test_the_same_key_gives_the_same_problems_and_answers_are_balanced() -> None:
    one, two = (coin(jax.random.key(2), 1000) for _ in range(2))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    assert 420 < int((one.answers == tokenizer.id("yes")).sum()) < 580


@pytest.mark.parametrize(
    "settings", [{"n": 0}, {"people": (0, 3)}, {"people": (5, 4)}, {"people": (3, 13)}, {"slip": 1.5}, {"direct": -1}]
)
def test_numbers_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"wanted n|are probabilities"):
        coin(jax.random.key(0), **({"n": 1} | settings))
