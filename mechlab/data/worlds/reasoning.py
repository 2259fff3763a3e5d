"""Small reasoning problems: with a rationale (coin, event_count), and answered by one word (deduce, arith).

The state of a coin, and a count of events, both followed through a list of people:

    heads ; tom flips ; mia stays ; sam flips ? tom flips tails ; mia stays tails ; sam flips heads ; so yes .
    0 ; tom flips ; mia stays ; sam flips ? tom flips 1 ; mia stays 1 ; sam flips 2 ; so 2 .

The rationale repeats each event with the state behind it. It may *slip*: write a wrong state and go on from there,
while the answer stays the true one. A direct problem has no rationale. The people differ, so no event comes twice.

Questions about a few people, in a vocabulary of their own (``question_tokenizer``), answered by the next word:

    ada is a sheep . bob is a mouse . what is bob afraid of ? wolf                                     (deduce, one hop)
    a mouse fears a cat . a sheep fears a dog . ada is a sheep . what is ada afraid of ? dog          (deduce, two hops)
    ada has 4 . bob has 5 . bob gets 2 . ada loses 1 . bob loses 1 . ada gets 1 . how many has bob ? 6           (arith)
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

POOLS = ("train", "dev", "test")
"""Of the people in questions; each has eight of its own. "all" is their union."""
NAMES = tuple(
    "ada bob cal dan eve fay gus hal ike joy ken lou meg ned oda pam quin ray sue ted una viv wes yan".split()
)
ANIMALS = tuple("mouse sheep horse lion bear eagle snake wolf".split())
"""In the fixed world each is afraid of the next but two, so that no animal and its enemy are neighbours in the list."""

question_tokenizer = WordTokenizer(
    words=(
        *(PAD, BOS),
        *". ? is a what afraid of fears has gets loses how many".split(),
        *NAMES,
        *ANIMALS,
        *map(str, range(10)),
    )
)
DEDUCE_ANSWERS = np.asarray([question_tokenizer.ids[word] for word in ANIMALS], np.int32)
ARITH_ANSWERS = np.asarray([question_tokenizer.ids[str(number)] for number in range(10)], np.int32)

_ID = tokenizer.ids
_WORD = question_tokenizer.ids
_NAMES = np.asarray([_WORD[name] for name in NAMES], np.int32)
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """N questions, each answered by one word.

    Attributes:
      tokens: (N, T) int32, BOS first, right-padded, up to and with "?"; the answer would be the next token.
      lengths: (N,) int32.
      answers: (N,) int32, its token.
    """

    tokens: Int[Array, "N T"]
    lengths: Int[Array, " N"]
    answers: Int[Array, " N"]


def deduce(key: jax.Array, n: int, *, facts: tuple[int, int] = (2, 5), hops: int = 1, pool: str = "train") -> Questions:
    """Deduction as in bAbI's task 15: who is of which kind, and what is this kind afraid of?

    Args:
      key: typed key.
      n: N, at least 1.
      facts: the number of people is drawn evenly from first to last, within 1..8; all but one distract.
      hops: 1: enemies are fixed in this world and must be known. 2: four rules, drawn anew, stand in the text.
      pool: of the people, one of ``POOLS`` or "all".

    Returns:
      The questions; answers are in ``DEDUCE_ANSWERS``.

    Raises:
      ValueError: a number out of range, or an unknown pool.
    """
    if n < 1 or not 1 <= facts[0] <= facts[1] <= 8 or hops not in (1, 2):
        raise ValueError(f"wanted n >= 1, facts within 1..8, 1 or 2 hops, got n={n}, facts={facts}, hops={hops}.")
    return _deduce(key, n, facts, hops, _pool(pool))


def arith(
    key: jax.Array, n: int, *, people: tuple[int, int] = (1, 2), changes: int = 2, pool: str = "train"
) -> Questions:
    """Sums in words: everybody starts with 4 or 5 and gets or loses 1 or 2 several times; how many has one of them?

    Args:
      key: typed key.
      n: N, at least 1.
      people: their number is drawn evenly from first to last, within 1..4; all but one distract.
      changes: of everybody's number, 1 or 2; those of different people come in a random order.
      pool: as in ``deduce``.

    Returns:
      The questions; answers are in ``ARITH_ANSWERS``.

    Raises:
      ValueError: a number out of range, or an unknown pool.
    """
    if n < 1 or not 1 <= people[0] <= people[1] <= 4 or changes not in (1, 2):
        raise ValueError(f"wanted n >= 1, people within 1..4, 1 or 2 changes, got {n}, {people}, {changes}.")
    return _arith(key, n, people, changes, _pool(pool))


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


@functools.partial(jax.jit, static_argnames=("n", "facts", "hops", "pool"))
def _deduce(key: jax.Array, n: int, facts: tuple[int, int], hops: int, pool: tuple[int, int]) -> Questions:
    most = facts[1]
    animals = jnp.asarray(DEDUCE_ANSWERS)

    def one(key: jax.Array) -> Questions:
        number, who, kind, ask, rule, order = streams(key, "number who kinds ask rules order")
        k = jax.random.randint(number, (), facts[0], most + 1)
        there = jnp.arange(most) < k
        names = jax.random.permutation(who, jnp.asarray(_NAMES)[pool[0] : pool[1]])[:most]
        if hops == 1:
            told, enemies = jnp.arange(8), (jnp.arange(8) + 3) % 8
        else:
            told, enemies = jnp.split(jax.random.permutation(rule, 8), 2)
            enemies = jax.random.choice(order, enemies, (4,))
        kinds = jax.random.randint(kind, (most,), 0, len(told))
        asked = jax.random.randint(ask, (), 0, k)
        rules = [_sentences("a", animals[told], "fears", "a", animals[enemies], ".")] if hops == 2 else []
        lines = _sentences(names, "is", "a", animals[told[kinds]], ".")
        question = _sentences("what", "is", names[asked][None], "afraid", "of", "?")
        answer = animals[enemies[kinds[asked]]]
        return _question([*((r, jnp.ones(len(r), bool)) for r in rules), (lines, there)], question, answer)

    return jax.vmap(one)(jax.random.split(key, n))


@functools.partial(jax.jit, static_argnames=("n", "people", "changes", "pool"))
def _arith(key: jax.Array, n: int, people: tuple[int, int], changes: int, pool: tuple[int, int]) -> Questions:
    most = people[1]
    numbers = jnp.asarray(ARITH_ANSWERS)

    def one(key: jax.Array) -> Questions:
        number, who, first, change, ask, order = streams(key, "number who first changes ask order")
        k = jax.random.randint(number, (), people[0], most + 1)
        there = jnp.arange(most) < k
        names = jax.random.permutation(who, jnp.asarray(_NAMES)[pool[0] : pool[1]])[:most]
        start = jax.random.randint(first, (most,), 4, 6)
        change = jax.random.choice(change, jnp.asarray([-2, -1, 1, 2]), (changes * most,))
        whose = jax.random.permutation(order, jnp.tile(jnp.arange(most), changes))
        asked = jax.random.randint(ask, (), 0, k)
        begin = _sentences(names, "has", numbers[start], ".")
        verbs = jnp.where(change > 0, _WORD["gets"], _WORD["loses"])
        then = _sentences(names[whose], verbs, numbers[jnp.abs(change)], ".")
        question = _sentences("how", "many", "has", names[asked][None], "?")
        answer = numbers[start[asked] + jnp.where(whose == asked, change, 0).sum()]
        return _question([(begin, there), (then, there[whose])], question, answer)

    return jax.vmap(one)(jax.random.split(key, n))


def _sentences(*columns: jax.Array | str) -> jax.Array:
    """(S, W) tokens of S sentences of W words; a word is the same in all of them, or an array (S,)."""
    size = max((len(c) for c in columns if not isinstance(c, str)), default=1)
    return jnp.stack([jnp.full(size, _WORD[c]) if isinstance(c, str) else c for c in columns], 1)


def _question(told: list[tuple[jax.Array, jax.Array]], question: jax.Array, answer: jax.Array) -> Questions:
    """BOS, the sentences (S, W) that are kept (S,), and the question; what is left out goes to the end as padding."""
    parts = [jnp.asarray([_WORD[BOS]]), *(lines.reshape(-1) for lines, _ in told), question[0]]
    kept = [
        jnp.ones(1, bool),
        *(jnp.repeat(keep, lines.shape[1]) for lines, keep in told),
        jnp.ones(question.size, bool),
    ]
    tokens, keep = jnp.concatenate(parts), jnp.concatenate(kept)
    order = jnp.argsort(~keep, stable=True)
    written = jnp.where(keep, tokens, _WORD[PAD])[order].astype(jnp.int32)
    return Questions(tokens=written, lengths=keep.sum(dtype=jnp.int32), answers=answer)


def _pool(pool: str) -> tuple[int, int]:
    """First and last number of a pool's names."""
    if pool == "all":
        return 0, len(NAMES)
    if pool not in POOLS:
        raise ValueError(f'pool: wanted one of {", ".join(POOLS)} or "all", got "{pool}".')
    first = 8 * POOLS.index(pool)
    return first, first + 8


def _check(n: int, people: tuple[int, int], slip: float, direct: float) -> None:
    if n < 1 or not 1 <= people[0] <= people[1] <= MOST:
        raise ValueError(f"wanted n >= 1 and people within 1..{MOST}, first to last, got n={n} and people={people}.")
    if not (0 <= slip <= 1 and 0 <= direct <= 1):
        raise ValueError(f"slip and direct are probabilities, got {slip} and {direct}.")
