"""Problems with a rationale: the state of a coin, and a count of events, both followed through a list of people.

    heads ; tom flips ; mia stays ; sam flips ? tom flips tails ; mia stays tails ; sam flips heads ; so yes .
    0 ; tom flips ; mia stays ; sam flips ? tom flips 1 ; mia stays 1 ; sam flips 2 ; so 2 .

The rationale repeats each event with the state behind it. It may *slip*: write a wrong state and go on from there,
while the answer stays the true one. A direct problem has no rationale. The people differ, so no event comes twice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.rng import streams
from mechlab.data.text import BOS, PAD, WordTokenizer

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int

PEOPLE = tuple("tom mia sam zoe leo eva ben amy max ida jon ann tim lea dan kim".split())
MOST = 12
"""People in a problem at most, and the highest count."""

tokenizer = WordTokenizer(
    words=(PAD, BOS, *"; ? so . flips stays heads tails yes no".split(), *PEOPLE, *map(str, range(MOST + 1)))
)

_ID = tokenizer.ids
_PEOPLE = np.asarray([_ID[name] for name in PEOPLE], np.int32)
_SIDES = np.asarray([_ID["heads"], _ID["tails"]], np.int32)
_YES_NO = np.asarray([_ID["yes"], _ID["no"]], np.int32)
_COUNTS = np.asarray([_ID[str(count)] for count in range(MOST + 1)], np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Problems:
    """N problems, written out.

    Attributes:
      tokens: (N, T) int32, BOS first, right-padded: problem, "?", rationale unless direct, "so", answer, full stop.
      lengths: (N,) int32.
      prompts: (N,) int32, length up to and with "?".
      answers: (N,) int32, the token of the true answer; it stands at ``lengths - 2``.
      people: (N,) int32, k.
      direct: (N,) bool, without a rationale.
      slips: (N,) int32, how many times the rationale went wrong.
      mask: (N, T) bool, true where the prediction made at a position is of the rationale or the answer.
    """

    tokens: Int[Array, "N T"]
    lengths: Int[Array, " N"]
    prompts: Int[Array, " N"]
    answers: Int[Array, " N"]
    people: Int[Array, " N"]
    direct: Bool[Array, " N"]
    slips: Int[Array, " N"]
    mask: Bool[Array, "N T"]


def coin(
    key: jax.Array, n: int, *, people: tuple[int, int] = (3, 8), slip: float = 0.06, direct: float = 0.3
) -> Problems:
    """Coin problems: heads lies up, some people flip the coin; does heads lie up in the end?

    Args:
      key: typed key.
      n: N, at least 1.
      people: k is drawn evenly from first to last, both included, within 1..12.
      slip: probability of a wrong state at each step of a rationale; the other side, and carried on.
      direct: share of problems without a rationale.

    Returns:
      The problems; answers are "yes" and "no".

    Raises:
      ValueError: a number out of range.
    """
    _check(n, people, slip, direct)
    return _problems(key, n, people, slip, direct, write=_coin)


def event_count(
    key: jax.Array, n: int, *, people: tuple[int, int] = (3, 8), slip: float = 0.08, direct: float = 0.3
) -> Problems:
    """How many of the people flipped? Arguments as in ``coin``; a slip is one too many or too few, and carried on.

    Returns:
      The problems; answers are "0" .. "12".

    Raises:
      ValueError: a number out of range.
    """
    _check(n, people, slip, direct)
    return _problems(key, n, people, slip, direct, write=_count)


def _coin(flips: jax.Array, slipped: jax.Array, sign: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First state, written states (K,) and answer, as tokens."""
    true = jnp.cumsum(flips) % 2
    written = (true + jnp.cumsum(slipped)) % 2
    return jnp.asarray(_SIDES)[0], jnp.asarray(_SIDES)[written], jnp.asarray(_YES_NO)[true[-1]]


def _count(flips: jax.Array, slipped: jax.Array, sign: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    true = jnp.cumsum(flips)
    written = jnp.clip(true + jnp.cumsum(slipped * sign), 0, MOST)
    return jnp.asarray(_COUNTS)[0], jnp.asarray(_COUNTS)[written], jnp.asarray(_COUNTS)[true[-1]]


@functools.partial(jax.jit, static_argnames=("n", "people", "write"))
def _problems(
    key: jax.Array, n: int, people: tuple[int, int], slip: float, direct: float, *, write: Callable[..., tuple]
) -> Problems:
    most = people[1]

    def one(key: jax.Array) -> Problems:
        number, who, flip, slipping, way, plain = streams(key, "people who flips slips sign direct")
        k = jax.random.randint(number, (), people[0], most + 1)
        there = jnp.arange(most) < k
        names = jax.random.permutation(who, jnp.asarray(_PEOPLE))[:most]
        flips = jax.random.bernoulli(flip, 0.5, (most,)) & there
        without = jax.random.bernoulli(plain, direct)
        slipped = jax.random.bernoulli(slipping, slip, (most,)) & there & ~without
        sign = 2 * jax.random.bernoulli(way, 0.5, (most,)).astype(jnp.int32) - 1
        first, states, answer = write(flips.astype(jnp.int32), slipped.astype(jnp.int32), sign)

        def words(*columns: jax.Array | str) -> jax.Array:
            filled = [jnp.full(most, _ID[c]) if isinstance(c, str) else c for c in columns]
            return jnp.stack(filled, 1).reshape(-1)

        acts = jnp.where(flips, _ID["flips"], _ID["stays"])
        end = jnp.stack([jnp.asarray(_ID["so"]), answer, jnp.asarray(_ID["."])])
        parts = (
            (jnp.stack([jnp.asarray(_ID[BOS]), first]), jnp.ones(2, bool)),
            (words(";", names, acts), jnp.repeat(there, 3)),
            (jnp.asarray([_ID["?"]]), jnp.ones(1, bool)),
            (words(names, acts, states, ";"), jnp.repeat(there & ~without, 4)),
            (end, jnp.ones(3, bool)),
        )
        tokens, kept = (jnp.concatenate(column) for column in zip(*parts, strict=True))
        # What is left out goes to the end, as padding; the rest keeps its order.
        order = jnp.argsort(~kept, stable=True)
        tokens, length = jnp.where(kept, tokens, _ID[PAD])[order].astype(jnp.int32), kept.sum()
        prompt = 3 + 3 * k
        at = jnp.arange(tokens.shape[0])
        return Problems(
            tokens=tokens,
            lengths=length,
            prompts=prompt,
            answers=answer,
            people=k,
            direct=without,
            slips=slipped.sum(),
            mask=(at >= prompt - 1) & (at < length - 1),
        )

    return jax.vmap(one)(jax.random.split(key, n))


def _check(n: int, people: tuple[int, int], slip: float, direct: float) -> None:
    if n < 1 or not 1 <= people[0] <= people[1] <= MOST:
        raise ValueError(f"wanted n >= 1 and people within 1..{MOST}, first to last, got n={n} and people={people}.")
    if not (0 <= slip <= 1 and 0 <= direct <= 1):
        raise ValueError(f"slip and direct are probabilities, got {slip} and {direct}.")
