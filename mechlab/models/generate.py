"""Generation: a prompt is read once, then every new token is one cached step, all in one compiled loop::

    out = generate(model, {"params": params}, tokens, lengths, steps=50)                       # greedy
    out = generate(model, variables, tokens, lengths, key, steps=50, temperature=0.8, top_p=0.9)
    for text in stream(model, variables, tokenizer, "Once upon a time", key, steps=50):
        print(text, end="", flush=True)

Edits are active in the prompt and in every step, at the same absolute positions as in a forward of the whole text.
Rows of a batch do not see each other: a row's text depends on its own prompt, its own key and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mechlab.core.model import Model, Variables
from mechlab.core.rng import require_typed
from mechlab.models.blocks import Cache

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Generated:
    """Texts that are being written, and all that is needed to go on.

    Attributes:
      tokens: (B, S) int32, prompt and continuation without a gap; slots from ``lengths`` on are 0.
      lengths: (B,) int32, tokens of each text, stop token included.
      logprobs: (B, S) float32, log-probability (nats) of each written token under the model itself, before temperature
        and top-k; 0 in the prompt and after the end.
      done: (B,) bool, a stop token was written.
      logits: (B, V) of the token that comes next.
      cache: keys and values.
    """

    tokens: Int[Array, "B S"]
    lengths: Int[Array, " B"]
    logprobs: Float[Array, "B S"]
    done: Bool[Array, " B"]
    logits: Float[Array, "B V"]
    cache: Cache


class TextTokenizer(Protocol):
    """What ``stream`` needs of a tokenizer."""

    def encode(self, text: str) -> Any: ...
    def decode(self, ids: Any) -> str: ...


def new_cache(model: Model, batch: int, slots: int) -> Cache:
    """An empty cache for texts of up to ``slots`` tokens, in the model's compute dtype.

    Args:
      model: a causal decoder from ``models.transformer``.
      batch: B.
      slots: S.

    Returns:
      The cache: 2 L B S G K numbers.
    """
    config = model.module.config
    shape = (config.layers, batch, slots, config.n_kv_heads, config.d_head)
    embed = jnp.zeros((batch, slots, config.width)) if config.embed_conv else None
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype), embed)


def restrict(
    logits: Float[Array, "... V"],
    temperature: Any = 1.0,
    top_k: int | None = None,
    top_p: Any = None,
) -> Float[Array, "... V"]:
    """The logits to sample from: divided by the temperature, and minus infinity for tokens that are left out.

    Args:
      logits: of one or many tokens.
      temperature: > 0.
      top_k: keep the k likeliest; of equal ones the lowest id.
      top_p: keep the likeliest tokens until their probability, after temperature and top-k, reaches p (arXiv
        1904.09751); at least one.

    Returns:
      Of the same shape.
    """
    logits = logits / temperature
    if top_k is None and top_p is None:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    kept = rank < (logits.shape[-1] if top_k is None else top_k)
    if top_p is not None:
        p = jnp.take_along_axis(jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), -1), order, -1)
        before = jnp.cumsum(p, -1) - p
        kept &= (jnp.take_along_axis(before, rank, -1) < top_p) | (rank == 0)
    return jnp.where(kept, logits, -jnp.inf)


def generate(
    model: Model,
    variables: Variables,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None = None,
    key: jax.Array | None = None,
    *,
    steps: int,
    temperature: float | jax.Array = 1.0,
    top_k: int | None = None,
    top_p: float | jax.Array | None = None,
    stop: Sequence[int] = (),
) -> Generated:
    """Continue prompts, each by up to ``steps`` tokens.

    Costs one forward of the prompts and ``steps`` forwards of one token; fewer when all texts have stopped.

    Args:
      model: a causal decoder from ``models.transformer``.
      variables: params and edits, as for ``model.apply``. Edits must fit one token as well as many: place them with
        ``at(..., position=...)`` or ``span=`` rather than by arrays with an axis T.
      tokens: prompts, right-padded with anything; row b has ``lengths[b]`` tokens.
      lengths: 1..T; all T by default.
      key: typed key for sampling; greedy (the likeliest token, the lowest id of equal ones) without one. The draw for a
        row and a position depends on the key, the row's number and the position only.
      steps: at most this many new tokens a text.
      temperature, top_k, top_p: see ``restrict``; only with a key.
      stop: tokens that end a text; they are written.

    Returns:
      The texts. ``advance`` goes on from there.

    Raises:
      ValueError: no prompt, lengths that do not fit, a text longer than the model's context, or sampling settings out
        of range or without a key.
      As ``model.apply`` for variables.
    """
    if steps < 1:
        raise ValueError(f"generate: steps must be at least 1, got {steps}.")
    begun = begin(model, variables, tokens, lengths, steps=steps)
    return advance(
        model, variables, begun, key, steps=steps, temperature=temperature, top_k=top_k, top_p=top_p, stop=stop
    )


def begin(
    model: Model,
    variables: Variables,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None = None,
    *,
    steps: int,
) -> Generated:
    """Read prompts, with room for ``steps`` more tokens; arguments and errors as in ``generate``."""
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"generate: tokens must be non-empty integers (B, T), got {tokens.dtype}{tokens.shape}.")
    lengths = jnp.full(len(tokens), tokens.shape[1]) if lengths is None else jnp.asarray(lengths)
    if lengths.shape != tokens.shape[:1]:
        raise ValueError(f"generate: lengths must be (B,) = {tokens.shape[:1]}, got {lengths.shape}.")
    if not isinstance(lengths, jax.core.Tracer):
        low, high = int(np.min(lengths)), int(np.max(lengths))
        if low < 1 or high > tokens.shape[1]:
            raise ValueError(f"generate: lengths must be in 1..{tokens.shape[1]}, got {low}..{high}.")
    context = model.module.config.context
    if tokens.shape[1] + steps > context:
        raise ValueError(
            f"generate: {tokens.shape[1]} prompt tokens and {steps} steps are more than the model's context {context}."
        )
    _check_ids(model, tokens, lengths)
    return _begin(model, variables, tokens.astype(jnp.int32), lengths.astype(jnp.int32), steps=steps)


def advance(
    model: Model,
    variables: Variables,
    texts: Generated,
    key: jax.Array | None = None,
    *,
    steps: int,
    temperature: float | jax.Array = 1.0,
    top_k: int | None = None,
    top_p: float | jax.Array | None = None,
    stop: Sequence[int] = (),
) -> Generated:
    """Write up to ``steps`` more tokens to texts from ``begin`` or ``generate``; other arguments as in ``generate``.

    In pieces or in one go, the same key writes the same text. A text whose slots are full is not written to.
    """
    if key is not None:
        require_typed(key)
    elif top_k is not None or top_p is not None or not (isinstance(temperature, float | int) and temperature == 1):
        raise ValueError("generate: temperature, top_k and top_p need a key; without one the choice is greedy.")
    vocabulary = model.module.config.vocabulary
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise ValueError(f"generate: top_k must be in 1..{vocabulary}, got {top_k}.")
    if isinstance(temperature, float | int) and not temperature > 0:
        raise ValueError(f"generate: temperature must be positive, got {temperature}; leave the key out for greedy.")
    if isinstance(top_p, float | int) and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}.")
    if any(not 0 <= token < vocabulary for token in stop):
        raise ValueError(f"generate: stop tokens must be in 0..{vocabulary - 1}, got {tuple(stop)}.")
    return _advance(model, variables, texts, key, steps, temperature, top_p, top_k=top_k, stop=tuple(stop))


def stream(
    model: Model,
    variables: Variables,
    tokenizer: TextTokenizer,
    prompt: str,
    key: jax.Array | None = None,
    *,
    steps: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] = (),
) -> Iterator[str]:
    """The continuation of one prompt, piece by piece as it is written; arguments as in ``generate``.

    Yields:
      What a new token adds to the text. Put together it is the decoded text, without the prompt.
    """
    ids = tokenizer.encode(prompt)
    texts = begin(model, variables, jnp.asarray([ids], jnp.int32), steps=steps)
    shown = tokenizer.decode(ids)
    for _ in range(steps):
        texts = advance(
            model, variables, texts, key, steps=1, temperature=temperature, top_k=top_k, top_p=top_p, stop=stop
        )
        text = tokenizer.decode(np.asarray(texts.tokens[0, : int(texts.lengths[0])]).tolist())
        # A character of several tokens is shown as a replacement mark until it is whole.
        if not text.endswith("\ufffd"):
            yield text.removeprefix(shown)
            shown = text
        if bool(texts.done[0]):
            return


@functools.partial(jax.jit, static_argnames=("model", "steps"))
def _begin(model: Model, variables: Variables, tokens: jax.Array, lengths: jax.Array, *, steps: int) -> Generated:
    batch, length = tokens.shape
    at = jnp.arange(length)
    inside = at < lengths[:, None]
    tokens = jnp.where(inside, tokens, 0)
    cache = new_cache(model, batch, length + steps)
    # Padding writes nothing into the cache and is never seen.
    logits, cache = model.apply(variables, tokens, jnp.where(inside, at, -1), None, cache, lengths - 1)
    return Generated(
        tokens=jnp.pad(tokens, ((0, 0), (0, steps))),
        lengths=lengths,
        logprobs=jnp.zeros((batch, length + steps)),
        done=jnp.zeros(batch, bool),
        logits=logits[:, 0],
        cache=cache,
    )


@functools.partial(jax.jit, static_argnames=("model", "top_k", "stop"))
def _advance(
    model: Model,
    variables: Variables,
    texts: Generated,
    key: jax.Array | None,
    steps: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array | None,
    *,
    top_k: int | None,
    stop: tuple[int, ...],
) -> Generated:
    batch, slots = texts.tokens.shape
    rows = jnp.arange(batch)

    def choose(logits: jax.Array, row: jax.Array, position: jax.Array) -> jax.Array:
        if key is None:
            return logits.argmax(-1)
        mine = jax.random.fold_in(jax.random.fold_in(key, row), position)
        return jax.random.categorical(mine, restrict(logits, temperature, top_k, top_p))

    def going(texts: Generated) -> jax.Array:
        return ~texts.done & (texts.lengths < slots)

    def step(state: tuple[jax.Array, Generated]) -> tuple[jax.Array, Generated]:
        count, texts = state
        writes = going(texts)
        chosen = jax.vmap(choose)(texts.logits, rows, texts.lengths).astype(jnp.int32)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(texts.logits), chosen[:, None], -1)[:, 0]
        # Texts that have ended write past the end, which drops it, and read nothing.
        slot = jnp.where(writes, texts.lengths, slots)
        positions = jnp.where(writes, texts.lengths, -1)[:, None]
        logits, cache = model.apply(variables, chosen[:, None], positions, None, texts.cache, jnp.zeros_like(rows))
        return count + 1, Generated(
            tokens=texts.tokens.at[rows, slot].set(chosen, mode="drop"),
            lengths=texts.lengths + writes,
            logprobs=texts.logprobs.at[rows, slot].set(logprob, mode="drop"),
            done=texts.done | (writes & jnp.isin(chosen, jnp.asarray(stop, jnp.int32))),
            logits=jnp.where(writes[:, None], logits[:, 0], texts.logits),
            cache=cache,
        )

    def more(state: tuple[jax.Array, Generated]) -> jax.Array:
        count, texts = state
        return (count < steps) & going(texts).any()

    return jax.lax.while_loop(more, step, (jnp.int32(0), texts))[1]


def _check_ids(model: Model, tokens: Any, lengths: Any) -> None:
    if isinstance(tokens, jax.core.Tracer) or isinstance(lengths, jax.core.Tracer):
        return
    real = np.asarray(tokens)[np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]]
    vocabulary = model.module.config.vocabulary
    if real.min() < 0 or real.max() >= vocabulary:
        raise ValueError(f"generate: tokens must be in 0..{vocabulary - 1}, got {real.min()}..{real.max()}.")
