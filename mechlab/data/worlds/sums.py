"""Sums with worked steps: a generated stand-in for word problems whose answers are read off exactly.

``"23+45+12="`` is answered ``"23+45=68, 68+12=80"``: every step is written out, the result last.
"""

from __future__ import annotations

import jax
import numpy as np

from mechlab.core.rng import stream


def worked_sums(key: jax.Array, n: int, *, terms: int = 3, largest: int = 99) -> list[tuple[str, str]]:
    """Additions of several numbers from left to right.

    Args:
      key: typed key.
      n: number of problems; some may come twice.
      terms: numbers in each, at least 2.
      largest: numbers are drawn from 1 .. largest.

    Returns:
      Pairs (question, answer).

    Raises:
      ValueError: fewer than one problem, two terms, or a largest number below 1.

    >>> worked_sums(jax.random.key(0), 1, largest=1)
    [('1+1+1=', '1+1=2, 2+1=3')]
    """
    if n < 1 or terms < 2 or largest < 1:
        raise ValueError(f"worked_sums: n >= 1, terms >= 2 and largest >= 1 are needed, got {n}, {terms}, {largest}.")
    drawn = np.asarray(jax.random.randint(stream(key, "terms"), (n, terms), 1, largest + 1))
    problems = []
    for row in drawn.tolist():
        totals = np.cumsum(row).tolist()
        steps = [f"{before}+{term}={after}" for before, term, after in zip(totals, row[1:], totals[1:], strict=False)]
        problems.append(("+".join(map(str, row)) + "=", ", ".join(steps)))
    return problems
