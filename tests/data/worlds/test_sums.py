"""Worked sums: every step is right, the result comes last, the key decides."""

from __future__ import annotations

import re

import jax
import pytest

from mechlab.data.worlds.sums import worked_sums


def test_every_step_is_right_and_the_last_one_is_the_answer():
    problems = worked_sums(jax.random.key(0), 50, terms=4)
    assert len({question for question, _ in problems}) > 45
    for question, answer in problems:
        numbers = list(map(int, re.findall(r"\d+", question)))
        steps = [tuple(map(int, re.findall(r"\d+", step))) for step in answer.split(", ")]
        assert len(numbers) == 4 and len(steps) == 3 and 1 <= min(numbers) and max(numbers) <= 99
        assert all(a + b == c for a, b, c in steps)
        assert [numbers[0], *(step[2] for step in steps[:-1])] == [step[0] for step in steps]
        assert steps[-1][2] == sum(numbers)


def test_the_key_decides():
    first, same, other = (worked_sums(jax.random.key(seed), 3) for seed in (0, 0, 1))
    assert first == same != other


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="n >= 1, terms >= 2"):
        worked_sums(jax.random.key(0), 3, terms=1)
