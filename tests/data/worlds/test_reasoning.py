"""The problems of coin and event_count, read back by a plain parser."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from mechlab.data.worlds import reasoning
from mechlab.data.worlds.reasoning import arith, coin, deduce, event_count, question_tokenizer, tokenizer

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


def asked(questions: Any, row: int) -> tuple[list[list[str]], str, str]:
    """Sentences, the person of the question, and the answer."""
    words = [question_tokenizer.words[i] for i in np.asarray(questions.tokens[row, : int(questions.lengths[row])])]
    assert words[0] == "<bos>" and words[-1] == "?" and not np.asarray(questions.tokens[row, len(words) :]).any()
    *told, question = " ".join(words[1:]).split(" . ")
    (person,) = [word for word in question.split() if word in reasoning.NAMES]
    return [line.split() for line in told], person, question_tokenizer.words[questions.answers[row]]


@pytest.mark.parametrize("hops", [1, 2])
def test_deductions_follow_from_facts_and_rules(hops: int) -> None:
    questions = deduce(jax.random.key(3), 200, hops=hops, pool="dev")
    sizes = set()
    for row in range(200):
        told, person, answer = asked(questions, row)
        rules = {line[1]: line[4] for line in told if "fears" in line}
        if hops == 1:
            animals = reasoning.ANIMALS
            rules = {kind: animals[(i + 3) % 8] for i, kind in enumerate(animals)}
        else:
            assert len(rules) == 4
        facts = {line[0]: line[3] for line in told if "is" in line}
        assert rules[facts[person]] == answer
        assert set(facts) <= set(reasoning.NAMES[8:16])
        sizes.add(len(facts))
    assert sizes == {2, 3, 4, 5}


def test_sums_follow_from_the_changes_of_the_person_asked_for() -> None:
    questions = arith(jax.random.key(4), 300, people=(1, 3), pool="test")
    answers = set()
    for row in range(300):
        told, person, answer = asked(questions, row)
        step = {"has": 1, "gets": 1, "loses": -1}
        own = [step[verb] * int(number) for name, verb, number in told if name == person]
        assert len(own) == 3 and sum(own) == int(answer)
        assert len(told) == 3 * len({line[0] for line in told})
        answers.add(answer)
    assert len(answers) >= 9 and set(reasoning.ARITH_ANSWERS.tolist()) >= set(np.unique(questions.answers).tolist())


@pytest.mark.parametrize("bad", [{"n": 0}, {"facts": (0, 2)}, {"facts": (2, 9)}, {"hops": 3}, {"pool": "valid"}])
def test_bad_deductions_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        deduce(jax.random.key(0), **({"n": 1} | bad))


@pytest.mark.parametrize("bad", [{"n": 0}, {"people": (3, 2)}, {"people": (1, 5)}, {"changes": 3}, {"pool": "valid"}])
def test_bad_sums_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        arith(jax.random.key(0), **({"n": 1} | bad))
