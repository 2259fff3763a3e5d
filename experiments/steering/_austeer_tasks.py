"""Items of every task in one shape: a prompt and two candidates in an order that means the same in all items.

The order must not tell which candidate is right, and must mean something, since margins are candidate 1 minus candidate
2 and the offset baseline adds one constant to them: happy before sad, yes before no, whoever is told of first
before the second. Candidates are scored at their first token that differs. Names, things and cues of train, dev and
test are disjoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.data.worlds import tales
from mechlab.methods.steering.vectors import Texts, pad
from mechlab.models.transformer import llama, transformer

POOLS = ("train", "dev", "test")

CANDIDATES = {
    "recall": ("the first thing", "the second thing"),
    "mood": ("the first person's mood", "the second person's mood"),
    "agree": ("yes", "no"),
    "ioi": ("the first name", "the second name"),
}

# Eight, four and eight cues of each mood for train, dev and test.
HAPPY = (
    *("got a new bike", "won a big race", "ate ice cream", "got a kiss from mom", "played with a puppy"),
    *("saw a pretty rainbow", "found a gold coin", "sang a fun song"),
    *("got a big gift", "made a new friend", "went to the zoo", "danced with dad"),
    *("got a shiny toy", "had a birthday cake", "played all day in the sun", "got a hug from grandma"),
    *("jumped in the puddles and laughed", "found the lost kitten", "went on a fun trip", "smiled at the baby"),
)
SAD = (
    *("lost a new bike", "fell and got a cut", "dropped the ice cream", "could not find mom", "broke the toy car"),
    *("had no one to play with", "lost a gold coin", "cried in bed"),
    *("lost a big gift", "missed an old friend", "was sick at home", "got hurt by a rock"),
    *("broke the shiny toy", "saw the cake fall on the floor", "was alone all day in the rain"),
    *("said goodbye to grandma", "hurt a leg and cried", "could not find the kitten", "missed the fun trip"),
    "had a bad dream",
)
CUES = (slice(0, 8), slice(8, 12), slice(12, 20))
NAMES = ("Tim", "Sue", "Ben", "Mia", "Tom", "Lily", "Max", "Anna", "Sam", "Amy", "Jack", "Sara", "Bob", "Jane", "Lucy")
THINGS = ("ball", "car", "doll", "book", "kite", "hat", "boat", "train", "bear", "cup", "drum", "box", "truck", "bag")
THIRDS = (slice(0, 5), slice(5, 10), slice(10, 15))
OPENINGS = (
    "One day,",
    "Once upon a time,",
    "It was a sunny day.",
    "There was a big park.",
    "It was late.",
    "That day,",
)
FEELS = ("was very", "felt so")


class Items(NamedTuple):
    """N items; leading axis S where seeds are stacked.

    Attributes:
      texts: prompts, up to the first token in which the candidates differ.
      candidates: (N, 2) tokens of that place.
      right: (N,) which one is right.
      ended: 2 N prompts with their answers: the right ones of all items, then the wrong ones.
    """

    texts: Texts
    candidates: jax.Array
    right: jax.Array
    ended: Texts


class Task(NamedTuple):
    """Where items come from.

    Attributes:
      draw: ``draw(key, n, pool)``.
      sides: what the two candidates stand for.
    """

    draw: Callable[[jax.Array, int, str], Items]
    sides: tuple[str, str]


class Subject(NamedTuple):
    """A model, how it spells, and the tasks that it is asked."""

    model: Model
    params: Any
    decode: Callable[..., str]
    tasks: dict[str, Task]


def tales_task(kind: str, distractors: int) -> Task:
    """An item kind of the world of tales."""

    def draw(key: jax.Array, n: int, pool: str) -> Items:
        found = tales.items(key, kind, n, distractors=distractors, pool=pool)
        # For "agree" the right answer is yes where the statement is true.
        right = 1 - found.truths if kind == "agree" else found.orders
        both = jnp.where(right[:, None] == 0, found.candidates, found.candidates[:, ::-1])
        texts = Texts(found.tokens, found.lengths)
        ended = [_with(texts, found.candidates[:, side]) for side in (0, 1)]
        return Items(texts, both, right, jax.tree.map(lambda *x: jnp.concatenate(x), *ended))

    return Task(draw, CANDIDATES[kind])


def story_task(kind: str, vocabulary: Any) -> Task:
    """Items in real English for stories260K.

    - "mood": "One day, Tim got a new bike. Sue was there. Tim was very" -> happy, or sad.
    - "recall": "One day, Tim had a ball and Sue had a car. Tim played with the" -> ball, or car.
    """

    def draw(key: jax.Array, n: int, pool: str) -> Items:
        part = POOLS.index(pool)
        # Host-side text; the draws come from the key.
        pick = np.asarray(jax.random.randint(stream(key, "picks"), (n, 8), 0, 1 << 20))
        prompts, answers = [], []
        for i, row in enumerate(pick):
            right = i % 2
            first, second = _two(NAMES[THIRDS[part]], row[0], row[1])
            opening = OPENINGS[row[2] % len(OPENINGS)]
            if kind == "mood":
                cue = _one((HAPPY, SAD)[right][CUES[part]], row[3])
                told = f"{opening} {first} {cue}. {second} was there. {first}"
                prompts.append(f"{told} {_one(FEELS, row[4])}")
                answers.append(("happy", "sad"))
            else:
                things = _two(THINGS[THIRDS[part]], row[3], row[4])
                told = f"{opening} {first} had a {things[0]} and {second} had a {things[1]}."
                prompts.append(f"{told} {(first, second)[right]} played with the")
                answers.append(things)
        return encoded(vocabulary.encode, prompts, answers, np.arange(n) % 2)

    return Task(draw, ("happy", "sad") if kind == "mood" else CANDIDATES["recall"])


def encoded(
    encode: Callable[[str], list[int]], prompts: list[str], answers: list[tuple[str, str]], right: np.ndarray
) -> Items:
    """Items from strings, candidates compared at the first token that differs: the longer prompt is asked."""
    rows, tokens, ended = [], [], [[], []]  # type: ignore[var-annotated]
    for prompt, both, side in zip(prompts, answers, right, strict=True):
        whole = [encode(f"{prompt} {answer}") for answer in both]
        shared = next(i for i, (a, b) in enumerate(zip(*whole, strict=False)) if a != b)
        rows.append(whole[0][:shared])
        tokens.append([ids[shared] for ids in whole])
        ended[0].append(whole[side])
        ended[1].append(whole[1 - side])
    return Items(pad(rows), jnp.asarray(tokens), jnp.asarray(right), pad([*ended[0], *ended[1]]))


def stacked(items: Sequence[Items]) -> Items:
    """Items of several seeds, padded to one width, none wider than needed: a leading axis S."""

    def together(texts: list[Texts]) -> Texts:
        width = max(int(one.lengths.max()) for one in texts)
        fitted = [np.pad(t.tokens, ((0, 0), (0, max(0, width - t.tokens.shape[1]))))[:, :width] for t in texts]
        return Texts(jnp.asarray(np.stack(fitted)), jnp.asarray(np.stack([t.lengths for t in texts])))

    return Items(
        together([one.texts for one in items]),
        jnp.asarray(np.stack([one.candidates for one in items])),
        jnp.asarray(np.stack([one.right for one in items])),
        together([one.ended for one in items]),
    )


PLANTED_RIGHT, PLANTED_WRONG = tuple(range(8, 12)), tuple(range(12, 16))
"""Units of ``mlp_out`` in layer 0 that carry the right answer and the wrong one."""

_GOOD, _BAD, _CONTEXT = slice(1, 17), slice(17, 33), slice(33, 81)


def planted(key: jax.Array) -> Subject:
    """A random two-layer model with a behaviour put in by hand: a check of the method, not a model of anything.

    Tokens are good, bad, or context. A neuron of layer 0 copies each of the channels 0..7 of the stream to the channels
    8..15; nothing else reads or writes these. Good tokens have 1 in channels 0..3, bad ones in 4..7, context tokens a
    and b of their own, so that the last token of a prompt votes a for every good token and b for every bad one. The
    right candidate is a good token, the wrong one a bad token: half of the contexts vote for the wrong one.
    """
    sizes = {"vocabulary": 81, "layers": 2, "width": 32, "heads": 4, "hidden": 64, "context": 8}
    kind: dict[str, Any] = {"gated": False, "activation": "relu", "tied": False, "init_std": None}
    model = transformer(llama(**sizes, **kind))
    # On the host: a few dozen small operations, each of which would be compiled.
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    shapes = jax.eval_shape(model.init, key)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    for norm in (params["final_norm"], params["blocks"]["norm_attn"], params["blocks"]["norm_mlp"]):
        norm["scale"][:] = 1
    tokens, attn, mlp = params["embed"]["tokens"], params["blocks"]["attn"], params["blocks"]["mlp"]
    tokens *= 5
    tokens[:, :16] = 0
    tokens[_GOOD, :4] = tokens[_BAD, 4:8] = 1
    tokens[_CONTEXT, :8] = rng.uniform(0.2, 1, (48, 2)).repeat(4, 1)
    for reader in (attn["v"]["kernel"], mlp["up"]["kernel"]):
        reader[:, :16] = 0
    for writer in (attn["o"]["kernel"], mlp["down"]["kernel"]):
        writer[..., :16] = 0
    copied = np.arange(8)
    mlp["up"]["kernel"][0, :, copied] = mlp["down"]["kernel"][0, copied] = 0
    mlp["up"]["kernel"][0, copied, copied] = mlp["down"]["kernel"][0, copied, copied + 8] = 1
    unembed = params["unembed"]["kernel"]
    unembed *= 0.01
    unembed[:16] = 0
    unembed[8:12, _GOOD] = unembed[12:16, _BAD] = 1

    @functools.partial(jax.jit, static_argnames=("n", "pool"))
    def draw(key: jax.Array, n: int, pool: str) -> Items:
        part = POOLS.index(pool)
        context = jax.random.randint(stream(key, "context"), (n, 4), 33 + 16 * part, 49 + 16 * part)
        good = jax.random.randint(stream(key, "good"), (n,), 1, 17)
        bad = jax.random.randint(stream(key, "bad"), (n,), 17, 33)
        right = jnp.arange(n) % 2
        both = jnp.where(right[:, None] == 0, jnp.stack([good, bad], 1), jnp.stack([bad, good], 1))
        texts = Texts(context, jnp.full(n, 4))
        ended = [_with(texts, answer) for answer in (good, bad)]
        return Items(texts, both, right, jax.tree.map(lambda *x: jnp.concatenate(x), *ended))

    def decode(ids: Sequence[int]) -> str:
        return " ".join("good" if i < 17 else "bad" if i < 33 else f"c{i - 33}" for i in ids)

    task = Task(draw, ("good or bad, at random", "the other"))
    return Subject(model, jax.tree.map(jnp.asarray, params), decode, {"planted": task})


@jax.jit
def _with(texts: Texts, answers: jax.Array) -> Texts:
    """Prompts with one more token each."""
    wider = jnp.pad(texts.tokens, ((0, 0), (0, 1)))
    return Texts(wider.at[jnp.arange(len(wider)), texts.lengths].set(answers), texts.lengths + 1)


def _one(options: Sequence[str], number: int) -> str:
    return options[number % len(options)]


def _two(options: Sequence[str], a: int, b: int) -> tuple[str, str]:
    """Two different ones."""
    first = a % len(options)
    second = (first + 1 + b % (len(options) - 1)) % len(options)
    return options[first], options[second]
