"""GSM8K and the paper's text tasks with a model of the hub: a small untrained decoder stands in for one."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from experiments.steering import _repe_reasoning_reader as reading
from experiments.steering._repe_reasoning_texts import deduce_text, ioi_text, text_task
from mechlab.core.errors import UserError
from mechlab.models.transformer import llama, transformer
from mechlab.reporting.log import Log

CONFIG = types.SimpleNamespace(solution_alphas=(-1.0, 0.0, 1.0), randoms=2)


class Digits:
    """Every character is a token; every token reads as one digit."""

    def encode(self, text):
        return [ord(letter) % 40 for letter in text]

    def decode(self, ids):
        return "".join(str(int(token) % 10) for token in ids)


class Words:
    """Every word is a token."""

    def __init__(self):
        self.known = {}

    def encode(self, text):
        return [self.known.setdefault(word, len(self.known) + 1) for word in text.split()]


@pytest.fixture(scope="module")
def reader():
    model = transformer(llama(vocabulary=40, layers=2, width=32, heads=2, hidden=64, context=64, init_std=0.3))
    return reading.Reader(model, model.init(jax.random.key(0)), Digits(), 5, 1)


@pytest.fixture(scope="module")
def problems(reader):
    """Twelve questions; for those that begin with "y" the number is what the model writes."""
    questions = [f"{'yn'[i % 2]} how many {'abcdefghijkl'[i]}" for i in range(12)]
    written = reading.write(reader, [(question, 0.0) for question in questions], [(None, 0.0)])[0]
    assert all(len(text) == 5 for text in written)
    return [
        (question, float(text) if question[0] == "y" else -1.0)
        for question, text in zip(questions, written, strict=True)
    ]


def test_problems_are_solved_as_the_model_writes(reader, problems):
    v = jax.random.normal(jax.random.key(1), (2, 32))
    hits = reading.accuracy(reader, problems, [(v, 0.0), (v, 3.0)])
    expected = np.asarray([question[0] == "y" for question, _ in problems])
    np.testing.assert_array_equal(hits[0], expected)
    assert hits[1].sum() < hits[0].sum()


def test_the_study_reads_chooses_and_tests(reader, problems):
    found = reading.study(jax.random.key(2), reader, (problems[:8], problems[:4], problems), CONFIG, Log())
    assert found["gsm8k/accuracy/zero"].value == 50 and found["gsm8k/accuracy/zero"].n == 12
    gain = found["gsm8k/accuracy/chosen"].value - found["gsm8k/accuracy/zero"].value
    np.testing.assert_allclose(found["gsm8k/gain/chosen"].value, gain, atol=1e-4)
    assert {f"gsm8k/accuracy/{name}" for name in (*reading.TYPES, "random")} < set(found)
    assert found["gsm8k/alpha"].value in (-1.0, 1.0)


def test_too_few_solutions_and_too_long_problems_are_refused(reader, problems):
    wrong = [(question, -1.0) for question, _ in problems]
    with pytest.raises(UserError, match=r"solves 0 of 12 .* two right solutions"):
        reading.study(jax.random.key(0), reader, (wrong, wrong, wrong), CONFIG, Log())
    with pytest.raises(UserError, match=r"exceed the reader's context of 64: --set solution="):
        reading.write(reader._replace(steps=60), problems, [(None, 0.0)])


def test_what_follows_a_next_question_does_not_count():
    assert reading.is_right(" 2 + 3 = 5\n#### 5\nQuestion: 7 + 8 = 15", 5.0)
    assert not reading.is_right(" It is 4.", 5.0) and not reading.is_right(" none", 5.0)
    assert reading.is_right("#### 1,005", 1005.0) and not reading.is_right("#### 5.01", 5.0)


def test_problems_for_vectors_choices_and_tests_are_disjoint():
    train, test = list(range(30)), list(range(100, 120))
    texts, dev, last = reading.draw_problems(jax.random.key(0), train, test, (10, 8, 6))
    assert (len(texts), len(dev), len(last)) == (10, 8, 6)
    assert not set(texts) & set(dev) and set(texts + dev) <= set(train) and set(last) <= set(test)


@pytest.mark.parametrize("level", [0, 2])
def test_the_recipient_is_who_does_not_give(level):
    rng, families = np.random.default_rng(0), set()
    for _ in range(20):
        text, answers, family = ioi_text(rng, level, ("Anna", "Max", "Lily", "Tom", "Sue"))
        persons, giver = answers[:2], text.split(".")[level + 1].split()[0]
        assert giver == persons[1 - family] and text.index(persons[0]) < text.index(persons[1])
        assert not any(name in text for name in answers[2:]) and len(set(answers)) == 4
        families.add(family)
    assert families == {0, 1}


def test_deduction_follows_its_rules():
    rng = np.random.default_rng(1)
    for _ in range(20):
        text, animals, right = deduce_text(rng, 3, ("Ada", "Ben", "Cat", "Dan"))
        person = text.rpartition("What is ")[2].split()[0]
        kind = text.partition(f"{person} is a ")[2].partition(".")[0]
        rule = next(
            line
            for line in text.split(". ")
            if line.startswith({"mouse": "Mice", "wolf": "Wolves"}.get(kind, kind.capitalize()[:4]))
        )
        plural = {
            "mice": "mouse",
            "wolves": "wolf",
            "cats": "cat",
            "sheep": "sheep",
            "lions": "lion",
            "horses": "horse",
        }
        assert plural[rule.rpartition(" ")[2]] == animals[right]


def test_text_items_are_scored_at_the_first_token_of_answers():
    words = Words()
    items = text_task(ioi_text, 0, words)(jax.random.key(0), 6, "dev")
    assert items.answers.shape == (6, 4) and items.texts.tokens.shape[1] % 16 == 0
    names = {number: word for word, number in words.known.items()}
    for row, length, gold in zip(items.texts.tokens, items.texts.lengths, items.gold, strict=True):
        said = [names[int(token)] for token in row[:length]]
        assert said[-1] == "to" and names[int(gold)] in said
    again = text_task(ioi_text, 0, words)(jax.random.key(0), 6, "dev")
    np.testing.assert_array_equal(items.texts.tokens, again.texts.tokens)


def test_answers_that_begin_alike_are_refused():
    class Letters:
        def encode(self, text):
            return [7] * len(text)

    with pytest.raises(UserError, match="with the same token"):
        text_task(deduce_text, 2, Letters())(jax.random.key(0), 2, "dev")
