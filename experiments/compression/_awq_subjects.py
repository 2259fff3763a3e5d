"""Which decoder is quantised, and the texts that it is calibrated and evaluated on.

A model of tales reads rows of tales, and its two domains are genres. Any other decoder reads WikiText-2, and GSM8K as
the other domain. Where there is no tokenizer, or no such text on this machine, it reads what it writes itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.errors import UserError
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.data.sources import MissingData
from mechlab.data.text import load_text, rows_of
from mechlab.data.worlds import tales
from mechlab.models import hub
from mechlab.models.generate import generate
from mechlab.models.subjects import SIZES, load_stories260k, load_tales
from mechlab.models.transformer import TransformerConfig

CHARACTERS = 400_000
"""Of each real text, at most: some 100,000 tokens, which is more than any preset but the paper's reads."""


class Subject(NamedTuple):
    """A decoder and its texts.

    Attributes:
      model, params: the decoder.
      tokenizer: to show what it writes, or None.
      draw: ``draw(key, n, length, domain=None, held_out=False) -> (n, length)`` tokens; None for all domains, or the
        first of real text.
      domains: two, between which calibration may shift; none where it writes its own texts.
      texts: what they are, in words.
    """

    model: Model
    params: Any
    tokenizer: Any
    draw: Callable[..., jax.Array]
    domains: tuple[str, ...]
    texts: str


def load_subject(name: str) -> Subject:
    """A subject by name: "tales-L", "stories260K", a hub id or a folder.

    Raises:
      UserError: no such checkpoint, one that cannot be opened, or no decoder with MLPs of linear maps.
    """
    if name.startswith("tales-"):
        size: Any = name.removeprefix("tales-")
        if size not in SIZES:
            raise UserError(f'model "{name}": tales come as {", ".join(f"tales-{size}" for size in SIZES)}')
        return Subject(*load_tales(size), _draw_tales, ("story", "list"), "tales")
    try:
        if name == "stories260K":
            model, params, tokenizer = load_stories260k(download=False)
        else:
            model, params, tokenizer = hub.load(name)
    except (OSError, ValueError, KeyError, ImportError, MissingData) as error:
        raise UserError(f"model {name}: {error}") from error
    config = model.module.config if isinstance(model, Model) else None
    decodes = isinstance(config, TransformerConfig) and config.causal and config.unembed
    if not decodes or config.hidden is None or config.mlp is not None:
        raise UserError(f"model {name}: wanted a decoder whose blocks have an MLP of linear maps")
    return with_texts(model, params, tokenizer)


def with_texts(model: Model, params: Any, tokenizer: Any) -> Subject:
    """A decoder of real text with WikiText-2 and GSM8K, or with what it writes itself."""
    domains = ("wikitext", "gsm8k")
    try:
        texts = {} if tokenizer is None else {domain: load_text(domain, download=False) for domain in domains}
    except MissingData:
        texts = {}
    if not texts:
        return Subject(model, params, tokenizer, functools.partial(_write, model, params), (), "its own writing")
    ids = {
        (domain, held_out): np.asarray(tokenizer.encode(part[:CHARACTERS]), np.int32)
        for domain, parts in texts.items()
        for held_out, part in zip((False, True), parts, strict=True)
    }
    return Subject(model, params, tokenizer, functools.partial(_draw_rows, ids), domains, "WikiText-2")


def _draw_tales(key: jax.Array, n: int, length: int, domain: str | None = None, held_out: bool = False) -> jax.Array:
    own = stream(key, "held out") if held_out else key
    return _sample(own, n, domain)[:, :length]


@functools.partial(jax.jit, static_argnames=("n", "genre"))
def _sample(key: jax.Array, n: int, genre: str | None) -> jax.Array:
    # Whole rows, to be cut: one program serves calibration and evaluation.
    return tales.sample_batch(key, n, genres=None if genre is None else (genre,))["tokens"]


def _draw_rows(
    ids: dict[tuple[str, bool], np.ndarray],
    key: jax.Array,
    n: int,
    length: int,
    domain: str | None = None,
    held_out: bool = False,
) -> jax.Array:
    rows = rows_of(ids[domain or "wikitext", held_out], length)
    if n > len(rows):
        raise UserError(f"{domain or 'wikitext'} has {len(rows)} rows of {length} tokens here, {n} are wanted")
    return jnp.asarray(rows[np.asarray(jax.random.permutation(key, len(rows)))[:n]])


def _write(
    model: Model, params: Any, key: jax.Array, n: int, length: int, domain: str | None = None, held_out: bool = False
) -> jax.Array:
    own = stream(key, "held out") if held_out else key
    first = jax.random.randint(stream(own, "first"), (n, 1), 0, model.module.config.vocabulary)
    return generate(model, {"params": params}, first, key=stream(own, "next"), steps=length - 1).tokens
