"""Fine-tuning of language models for experiments: rows of tokens with a loss mask, trainings as lanes, and two scores.

One training is an ``Adapter`` and an optimiser. ``core.transforms.tune("**")`` trains every parameter through its
change; ``whole`` trains the parameters themselves, for optimisers that look at them. The rates and seeds of one method
are lanes of one program::

    rows = answer_rows(questions, answers, length=64)
    tuned = finetune(keys, rates, apply, params, lora(2), rows, steps=150, batch=8)
    held_out_loss(apply, params, lora(2), tuned.states, test_rows)           # (lanes,) nats per answer token
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.core.transforms import Adapter, AdapterState
from mechlab.models.generate import generate
from mechlab.training.batches import shuffled
from mechlab.training.loop import Fit, Job, Progress, fit_many

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float

Apply = Callable[[Any, jax.Array], jax.Array]
"""``apply(params, tokens (B, T)) -> logits (B, T, V)``."""

Optimiser = Callable[[Any], optax.GradientTransformation]
"""``optimiser(rate)``; the rate may be traced."""


class Rows(NamedTuple):
    """Texts of one length.

    Attributes:
      tokens: (N, T) int32, padded on the right with 0.
      mask: (N, T) float32, 1 at the tokens that are to be predicted, 0 elsewhere and at the first token.
      prompts: (N,) int32, tokens in front of the answer.
    """

    tokens: jax.Array
    mask: jax.Array
    prompts: jax.Array


class Tuned(NamedTuple):
    """Trained adapters, one per lane.

    Attributes:
      states: leaves (lanes, ...), for ``adapter.merge``.
      losses: (lanes, steps), training loss before each update, nats per predicted token.
      fit: all that ``fit_many`` returned: optimiser states, records.
    """

    states: AdapterState
    losses: np.ndarray
    fit: Fit


whole = Adapter(lambda key, params: AdapterState(params), lambda params, state: state.train)
"""Full fine-tuning of the parameters themselves: the optimiser is given them, not their change."""


def answer_rows(prompts: Sequence[ArrayLike], answers: Sequence[ArrayLike], length: int) -> Rows:
    """Prompts with their answers, of which only the answers are to be predicted.

    Args:
      prompts, answers: N sequences of token ids each, none empty. Put an end token on the answers if one is wanted.
      length: T.

    Raises:
      ValueError: different numbers of prompts and answers, an empty one, or a row longer than T.
    """
    sizes = [(len(np.atleast_1d(p)), len(np.atleast_1d(a))) for p, a in zip(prompts, answers, strict=True)]
    if not sizes or min(map(min, sizes)) < 1 or max(map(sum, sizes)) > length:
        raise ValueError(
            f"answer_rows: prompts and answers (here {len(sizes)}) must have a token each, at most {length} together."
        )
    tokens, mask = np.zeros((len(sizes), length), np.int32), np.zeros((len(sizes), length), np.float32)
    for row, (prompt, answer, (p, a)) in enumerate(zip(prompts, answers, sizes, strict=True)):
        tokens[row, : p + a] = np.concatenate([prompt, answer])
        mask[row, p : p + a] = 1
    return Rows(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray([p for p, _ in sizes], jnp.int32))


def text_rows(tokens: ArrayLike) -> Rows:
    """Running text (N, T), see ``data.text.rows_of``, of which everything is to be predicted but the first token."""
    rows = jnp.asarray(tokens, jnp.int32)
    return Rows(rows, jnp.ones(rows.shape).at[:, 0].set(0), jnp.ones(len(rows), jnp.int32))


def adamw(steps: int) -> Optimiser:
    """AdamW without decay, the rate falling to zero along a cosine, no warm-up."""
    return lambda rate: optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=0.0)


def token_loss(apply: Apply, params: Any, rows: Rows) -> Float[Array, ""]:
    """Mean cross-entropy over the tokens to be predicted, nats."""
    total, count = _nats(apply, params, rows)
    return total / count


def finetune(
    keys: jax.Array,
    rates: ArrayLike,
    apply: Apply,
    params: Any,
    adapter: Adapter,
    rows: Any,
    *,
    steps: int,
    batch: int,
    optimiser: Optimiser | None = None,
    loss: Callable[[Apply, Any, Any], jax.Array] | None = None,
    segment: int | None = None,
    record: Callable[[Any], Any] | None = None,
    log: Progress | None = None,
    name: str = "finetuning",
) -> Tuned:
    """Train one method for several seeds and learning rates at once, from one base model.

    Args:
      keys: (lanes,) typed keys: decide the adapter's start and the batches. Lanes with equal keys differ in rate only.
      rates: (lanes,) learning rates.
      apply, params: the base model; ``params`` is not changed, and gets no gradient unless the adapter trains it.
      adapter: what is trained: any ``Adapter``, or ``whole``.
      rows: training rows; with a loss of your own any pytree of arrays (N, ...).
      steps, batch: updates, and rows in each.
      optimiser: AdamW with a cosine by default; its own ``update`` sees ``state.train`` as the parameters.
      loss: ``loss(apply, params, batch)``; ``token_loss`` by default.
      segment, record, log, name: as in ``fit_many``; ``record`` is given ``state.train``.

    Returns:
      See ``Tuned``.
    """
    make = optimiser or adamw(steps)
    starts = jax.jit(jax.vmap(lambda key: adapter.init(stream(key, "init"), params)))(keys)

    def build(lane: Any) -> Job:
        def of_state(train: Any, batch: Any) -> jax.Array:
            return (loss or token_loss)(apply, adapter.merge(params, AdapterState(train, lane["fixed"])), batch)

        return Job(of_state, lane["train"], make(lane["rate"]), shuffled(rows, batch))

    lanes = {"train": starts.train, "fixed": starts.fixed, "rate": jnp.asarray(rates)}
    batches = jax.vmap(lambda key: stream(key, "batches"))(keys)
    fit = fit_many(batches, lanes, build, steps=steps, segment=segment, record=record, log=log, name=name)
    return Tuned(AdapterState(fit.params, starts.fixed), np.asarray(fit.losses), fit)


def held_out_loss(
    apply: Apply, params: Any, adapter: Adapter, states: AdapterState, rows: Rows, *, chunk: int = 64
) -> np.ndarray:
    """Mean cross-entropy (lanes,) over all tokens to be predicted, nats; ``chunk`` rows per forward of all lanes."""
    merged = jax.jit(jax.vmap(lambda state: adapter.merge(params, state)))(states)
    parts = [
        _lane_nats(apply, merged, jax.tree.map(lambda x, at=at: x[at : at + chunk], rows))
        for at in range(0, len(rows.tokens), chunk)
    ]
    totals, counts = (np.sum([np.asarray(part[i]) for part in parts], axis=0) for i in (0, 1))
    return totals / counts


def exact_match(
    model: Model,
    params: Any,
    adapter: Adapter,
    states: AdapterState,
    rows: Rows,
    *,
    read: Callable[[list[int]], Any] = tuple,
) -> np.ndarray:
    """Whether the answer written by greedy decoding is the row's own, (lanes, N) bool.

    Args:
      model: a decoder from ``models.transformer``.
      params, adapter, states: as for ``held_out_loss``.
      rows: from ``answer_rows``. As many tokens are written as the longest answer has; what comes after the row's own
        number of tokens is not looked at, so answers should end with an end token.
      read: what counts of an answer's tokens: by default all, else for example only the number at its end.
    """
    answers = np.asarray(rows.mask.sum(-1), int)

    def write(state: AdapterState) -> jax.Array:
        variables = {"params": adapter.merge(params, state)}
        return generate(model, variables, rows.tokens[:, :longest], rows.prompts, steps=int(answers.max())).tokens

    longest = int(rows.prompts.max())
    written, gold, prompts = np.asarray(jax.vmap(write)(states)), np.asarray(rows.tokens), np.asarray(rows.prompts)
    spans = [slice(p, p + a) for p, a in zip(prompts, answers, strict=True)]
    wanted = [read(row[span].tolist()) for row, span in zip(gold, spans, strict=True)]
    return np.asarray(
        [
            [read(row[span].tolist()) == right for row, span, right in zip(lane, spans, wanted, strict=True)]
            for lane in written
        ]
    )


@functools.partial(jax.jit, static_argnums=0)
def _lane_nats(apply: Apply, params: Any, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """``_nats`` of every lane's parameters; one program for all methods."""
    return jax.vmap(lambda one: _nats(apply, one, rows))(params)


def _nats(apply: Apply, params: Any, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy of the tokens to be predicted, and how many they are."""
    logits = apply(params, rows.tokens)[:, :-1].astype(jnp.float32)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, rows.tokens[:, 1:])
    mask = rows.mask[:, 1:]
    return (nats * mask).sum(), mask.sum()
