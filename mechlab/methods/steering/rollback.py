"""Decoding that goes back: the loop of TruthPrInt (arXiv 2503.10602), with any detector and any model.

At position t the likeliest token v that is not banned there is the candidate, with confidence p(v | y_<t, image). If it
is an object word that the detector flags, score >= tau, and the sentence from s on has had fewer than n_max
interventions, the text goes back to

    i* = argmin_{s <= i < t} p(y_i | y_<i, image)      (the first minimum; t itself in an empty sentence)

The token there is banned at i* as long as what precedes it stays the same, later bans are dropped, and decoding goes on
at i*. Otherwise v is written; the end of a sentence clears bans and the count of interventions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.methods.steering.decoding import IDLE, Step

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

Rollback = Literal["min_conf", "immediate", "sentence_start", "random"]
ROLLBACKS = ("min_conf", "immediate", "sentence_start", "random")


class Moment(NamedTuple):
    """What a detector may look at before a token is written; leading axis B.

    Attributes:
      hidden: what the step gave, at the position that predicts the token.
      token: (B,) the candidate.
      confidence: (B,) its probability under the model.
      position: (B,) t.
      forwards: (B,) how many the text has cost, this one included.
    """

    hidden: Any
    token: jax.Array
    confidence: jax.Array
    position: jax.Array
    forwards: jax.Array


class Decoded(NamedTuple):
    """Guarded texts.

    Attributes:
      tokens: (B, T), 0 after the end.
      lengths: (B,), end token included.
      confidence: (B, T) p(y_i | y_<i, image), 0 after the end.
      trace: (B, budget, 3) interventions in order: (t, i*, banned token); -1 after the last.
      interventions: (B,).
      forwards: (B,) of one token each.
      finished: (B,) False for a text that the budget cut short.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    confidence: Float[Array, "B T"]
    trace: Int[Array, "B R 3"]
    interventions: Int[Array, " B"]
    forwards: Int[Array, " B"]
    finished: Bool[Array, " B"]


def guarded_decode(
    step: Step,
    carry: Any,
    detector: Callable[[Moment], jax.Array],
    *,
    batch: int,
    vocabulary: int,
    objects: Sequence[int],
    start: int,
    sentence_end: int,
    eos: int,
    tau: float | jax.Array,
    max_len: int,
    n_max: int = 5,
    budget: int | None = None,
    rollback: Rollback = "min_conf",
    check: Literal["objects", "all"] = "objects",
    key: jax.Array | None = None,
) -> Decoded:
    """Greedy decoding that goes back before a hallucination, one compiled loop over all texts.

    Each round costs one forward of one token: the token before t is read (again, after going back), which overwrites
    what the cache held there. A text that has ended idles.

    Args:
      step: see ``methods/steering/decoding.py``.
      carry: the step's state, with the image read.
      detector: ``detector(moment) -> (B,)`` score of the candidates.
      batch: B.
      vocabulary: V.
      objects: the object words O.
      start: token before the text.
      sentence_end: a word after which bans and the count of interventions start anew.
      eos: ends a text; it is written.
      tau: a candidate with score >= tau is flagged; above the largest score, this is greedy decoding. May be traced.
      max_len: T.
      n_max: interventions per sentence, less than V; the rest of the sentence is then unguarded. 0 is greedy decoding.
      budget: most forwards of a text, 8 T by default.
      rollback: where to go back to: "min_conf", the paper's; "immediate", the flagged word itself, so that the next
        best is taken; "sentence_start"; "random", any token of the sentence. In an empty sentence all are "immediate".
      check: "all" asks the detector about every token.
      key: typed key, for "random" only.

    Returns:
      The texts and what was done to them.

    Raises:
      ValueError: tau NaN, n_max out of range, no objects or one outside the vocabulary, the sentence end among them,
        budget < max_len, an unknown rollback or check, or a missing key.
    """
    budget = 8 * max_len if budget is None else budget
    _check_decoding(vocabulary, objects, sentence_end, tau, max_len, n_max, budget, rollback, check, key)
    is_object = jnp.zeros(vocabulary, bool).at[jnp.asarray(objects)].set(True) | (check == "all")
    rows, at = jnp.arange(batch), jnp.arange(max_len)

    def going(state: _State) -> jax.Array:
        return ~state.done & (state.forwards < budget)

    def write(state: _State) -> _State:
        live, t, s = going(state), state.t, state.sentence
        before = jnp.where(t > 0, state.tokens[rows, t - 1], start)
        logits, hidden, carry = step(state.carry, before, jnp.where(live, t - 1, IDLE))
        v = jnp.where(state.bans[rows, t], -jnp.inf, logits).argmax(-1).astype(jnp.int32)
        confidence = jax.nn.softmax(logits, -1)[rows, v]
        forwards = state.forwards + live
        score = detector(Moment(hidden, v, confidence, t, forwards))
        back = live & is_object[v] & (score >= tau) & (state.tries < n_max)
        on = live & ~back

        # Going back: to token i*, which is banned there; bans behind it belong to another text.
        goal = _goal(rollback, key, state, at)
        bad = jnp.where(goal < t, state.tokens[rows, goal], v)
        bans = jnp.where((back[:, None] & (at > goal[:, None]))[..., None], False, state.bans)
        bans = bans.at[rows, goal, bad].max(back)
        entry = jnp.where(back, state.interventions, budget)
        trace = state.trace.at[rows, entry].set(jnp.stack([t, goal, bad], -1), mode="drop")

        # Going on.
        slot = jnp.where(on, t, max_len)
        ends = on & (v == sentence_end)
        # An idle text keeps its length, which t, kept inside the buffers, does not know when the text is full.
        moved = jnp.where(on, t + 1, jnp.where(back, goal, state.length))
        return _State(
            tokens=state.tokens.at[rows, slot].set(v, mode="drop"),
            confidence=state.confidence.at[rows, slot].set(confidence.astype(jnp.float32), mode="drop"),
            t=jnp.minimum(moved, max_len - 1),
            length=moved,
            sentence=jnp.where(ends, t + 1, s),
            tries=jnp.where(ends, 0, state.tries + back),
            bans=jnp.where(ends[:, None, None], False, bans),
            trace=trace,
            interventions=state.interventions + back,
            forwards=forwards,
            done=state.done | (on & ((v == eos) | (moved == max_len))),
            carry=carry,
        )

    zeros = jnp.zeros(batch, jnp.int32)
    state = jax.lax.while_loop(
        lambda state: going(state).any(),
        write,
        _State(
            tokens=jnp.zeros((batch, max_len), jnp.int32),
            confidence=jnp.zeros((batch, max_len)),
            t=zeros,
            length=zeros,
            sentence=zeros,
            tries=zeros,
            bans=jnp.zeros((batch, max_len, vocabulary), bool),
            trace=jnp.full((batch, budget, 3), -1, jnp.int32),
            interventions=zeros,
            forwards=zeros,
            done=jnp.zeros(batch, bool),
            carry=carry,
        ),
    )
    inside = at < state.length[:, None]
    return Decoded(
        jnp.where(inside, state.tokens, 0),
        state.length,
        jnp.where(inside, state.confidence, 0),
        state.trace,
        state.interventions,
        state.forwards,
        state.done,
    )


class _State(NamedTuple):
    """``t`` is the next position, kept inside the buffers when the text is full; ``length`` is the true one."""

    tokens: jax.Array
    confidence: jax.Array
    t: jax.Array
    length: jax.Array
    sentence: jax.Array
    tries: jax.Array
    bans: jax.Array
    trace: jax.Array
    interventions: jax.Array
    forwards: jax.Array
    done: jax.Array
    carry: Any


def _goal(rollback: str, key: Any, state: _State, at: jax.Array) -> jax.Array:
    """i*, (B,)."""
    t, s = state.t, state.sentence
    if rollback == "immediate":
        return t
    if rollback == "sentence_start":
        return s
    if rollback == "random":
        # One draw per text and forward, whatever the other texts do.
        mine = jax.vmap(lambda row, n: jax.random.fold_in(jax.random.fold_in(key, row), n))
        drawn = jax.vmap(jax.random.uniform)(mine(jnp.arange(len(t)), state.forwards))
        return s + jnp.floor(drawn * (t - s)).astype(jnp.int32)
    written = (at >= s[:, None]) & (at < t[:, None])
    least = jnp.where(written, state.confidence, jnp.inf).argmin(-1).astype(jnp.int32)
    return jnp.where(t > s, least, t)


def _check_decoding(
    vocabulary: int,
    objects: Sequence[int],
    sentence_end: int,
    tau: Any,
    max_len: int,
    n_max: int,
    budget: int,
    rollback: str,
    check: str,
    key: jax.Array | None,
) -> None:
    listed = np.asarray(objects)
    if not listed.size:
        raise ValueError("guarded_decode: the set of object words is empty; nothing would be checked.")
    if listed.min() < 0 or listed.max() >= vocabulary:
        raise ValueError(f"guarded_decode: object words must be in 0..{vocabulary - 1}, got {listed.tolist()}.")
    if sentence_end in listed:
        raise ValueError(f"guarded_decode: the sentence end {sentence_end} cannot be an object word.")
    if not isinstance(tau, jax.core.Tracer) and np.isnan(tau):
        raise ValueError("guarded_decode: tau is NaN.")
    if not 0 <= n_max < vocabulary:
        raise ValueError(f"guarded_decode: n_max must be in 0..{vocabulary - 1}, got {n_max}.")
    if max_len < 1 or budget < max_len:
        raise ValueError(f"guarded_decode: wanted max_len >= 1 and budget >= max_len, got {max_len} and {budget}.")
    if rollback not in ROLLBACKS:
        raise ValueError(f'guarded_decode: rollback must be one of {", ".join(ROLLBACKS)}, got "{rollback}".')
    if check not in ("objects", "all"):
        raise ValueError(f'guarded_decode: check must be "objects" or "all", got "{check}".')
    if rollback == "random" and key is None:
        raise ValueError('guarded_decode: rollback="random" needs a key.')
