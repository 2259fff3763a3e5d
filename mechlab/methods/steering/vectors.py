"""Steering vectors: from two lists of texts to a vector at every layer, to an edit, to a file and back.

    texts = contrast(tokenizer, ["I am happy", ...], ["I am sad", ...])
    vector = steering_vector(model, {"params": params}, texts)            # mean difference, every layer
    edits = steer(model, vector, layer=6, strength=4.0)                   # for apply and generate alike
    save_vector("happy.safetensors", vector, name="gpt2")

A vector belongs to the model whose activations it was read from: the card that is saved with it says which, and
``steer`` and ``load_vector`` refuse another one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mechlab.analysis.directions import mean_difference, pca_direction
from mechlab.core.edits import Add, AddRenormed, at
from mechlab.core.model import Model, Variables
from mechlab.models.generate import TextTokenizer
from mechlab.training.checkpoints import load_edits, save_edits

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int

SITE = "resid_post"


class Texts(NamedTuple):
    """Right-padded texts.

    Attributes:
      tokens: (N, T), 0 behind the end of a text.
      lengths: (N,).
    """

    tokens: Int[Array, "N T"]
    lengths: Int[Array, " N"]

    @property
    def positions(self) -> Int[Array, "N T"]:
        """0, 1, ... in every text, and -1 behind its end: what a model takes as padding."""
        at_tokens = jnp.arange(self.tokens.shape[1])
        return jnp.where(at_tokens < jnp.asarray(self.lengths)[:, None], at_tokens, -1)


class Contrast(NamedTuple):
    """Pairs of texts: row n of both belongs together, if the method reads pairs."""

    positive: Texts
    negative: Texts


@struct.dataclass
class SteeringVector:
    """A vector for every layer of one model.

    Attributes:
      values: (L, D), in the unit of the activations.
      site: where it was read and is added.
      model: the shape of the model, as ``describe`` gives it.
    """

    values: Float[Array, "L D"]
    site: str = struct.field(pytree_node=False, default=SITE)
    model: str = struct.field(pytree_node=False, default="")


def pad(rows: Sequence[Sequence[int]], width: int | None = None) -> Texts:
    """Rows of token ids, right-padded with 0.

    Args:
      rows: each of at least one token.
      width: T; that of the longest row by default.

    Raises:
      ValueError: no rows, an empty row, or a row longer than ``width``.
    """
    lengths = [len(row) for row in rows]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"texts: wanted rows of at least one token, got lengths {lengths[:8]}.")
    width = max(lengths) if width is None else width
    if max(lengths) > width:
        raise ValueError(f"texts: the longest has {max(lengths)} tokens, more than {width}.")
    tokens = np.zeros((len(rows), width), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return Texts(jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32))


def contrast(tokenizer: TextTokenizer, positive: Sequence[str], negative: Sequence[str]) -> Contrast:
    """Two lists of texts as tokens, padded to one width.

    Args:
      tokenizer: the model's.
      positive, negative: texts that show what is wanted, and that do not. They may be of different number; methods that
        read pairs need equally many, in the same order.

    Raises:
      ValueError: a list or a text without content.
    """
    rows = [[list(tokenizer.encode(text)) for text in texts] for texts in (positive, negative)]
    if not all(rows):
        raise ValueError("contrast: wanted at least one text in each list.")
    width = max((len(row) for side in rows for row in side), default=0)
    return Contrast(*(pad(side, width) for side in rows))


def last_states(
    model: Model, variables: Variables, texts: Texts, *, site: str = SITE, batch: int = 32
) -> Float[Array, "N L ..."]:
    """A site at the last token of every text.

    Args:
      model, variables: as for ``model.apply``.
      texts: N texts.
      site: a site of every layer with positions.
      batch: texts per forward.

    Returns:
      (N, L, ...), float32: (N, L, D) at a residual site, (N, L, H, K) at ``attn_z``.

    Raises:
      KeyError: unknown site.
      ValueError: lengths that do not fit, or activations that are not finite, naming the layer.
    """
    return read_states(model, variables, texts, (site,), batch=batch)[site]


def read_states(
    model: Model, variables: Variables, texts: Texts, sites: Sequence[str], *, batch: int = 32
) -> dict[str, Float[Array, "N L ..."]]:
    """Several sites at the last token of every text, from one forward of each; arguments and errors of ``last_states``.

    Returns:
      Site name to (N, L, ...) float32.
    """
    tokens, lengths = map(jnp.asarray, texts)
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1] or not len(tokens):
        raise ValueError(f"texts: wanted tokens (N, T) and lengths (N,), got {tokens.shape} and {lengths.shape}.")
    if int(lengths.min()) < 1 or int(lengths.max()) > tokens.shape[1]:
        raise ValueError(f"texts: lengths must be in 1..{tokens.shape[1]}, got {lengths.min()}..{lengths.max()}.")

    def at_rows(start: int) -> dict[str, jax.Array]:
        # The last chunk repeats its last text instead of changing shape, which would compile a second program.
        rows = np.minimum(np.arange(start, start + min(batch, len(tokens))), len(tokens) - 1)
        return _read(model, variables, tokens[rows], lengths[rows], tuple(sites))

    chunks = [at_rows(start) for start in range(0, len(tokens), batch)]
    states = jax.tree.map(lambda *parts: jnp.concatenate(parts)[: len(tokens)], *chunks)
    for site, of_site in states.items():
        finite = np.isfinite(np.asarray(of_site)).reshape(len(tokens), of_site.shape[1], -1).all((0, 2))
        if not finite.all():
            raise ValueError(f'site "{site}" is not finite in layer {int(np.argmin(finite))}.')
    return states


@functools.partial(jax.jit, static_argnames=("model", "sites"))
def _read(
    model: Model, variables: Variables, tokens: jax.Array, lengths: jax.Array, sites: tuple[str, ...]
) -> dict[str, jax.Array]:
    acts = model.capture(variables, tokens, Texts(tokens, lengths).positions, sites=sites)[1]
    rows = jnp.arange(len(tokens))
    return {site: jnp.moveaxis(acts[site][:, rows, lengths - 1], 1, 0).astype(jnp.float32) for site in sites}


def steering_vector(
    model: Model, variables: Variables, texts: Contrast, *, site: str = SITE, principal: bool = False
) -> SteeringVector:
    """The vector from negative to positive texts, read at their last tokens.

    Args:
      model, variables: as for ``model.apply``.
      texts: see ``contrast``.
      site: a site of width D.
      principal: the first principal component of the pairs' differences times the length of their mean, instead of the
        mean difference (contrastive activation addition, arXiv 2312.06681).

    Raises:
      ValueError: as ``last_states``; with ``principal``, lists that are no pairs, or fewer than two.
    """
    high, low = (jnp.moveaxis(last_states(model, variables, side, site=site), 1, 0) for side in texts)
    if principal:
        if high.shape != low.shape:
            raise ValueError(
                f"principal: wanted pairs, got {high.shape[1]} positive and {low.shape[1]} negative texts."
            )
        values = pca_direction(high - low).raw
    else:
        labels = np.repeat([0, 1], [low.shape[1], high.shape[1]])
        values = mean_difference(jnp.concatenate([low, high], 1), labels).raw
    return SteeringVector(values, site, describe(model))


def describe(model: Model) -> str:
    """A model's shape in words: what a vector must fit.

    >>> from mechlab.models.transformer import llama, transformer
    >>> describe(transformer(llama(vocabulary=8, layers=2, width=16, heads=4, hidden=24, context=8)))
    '2 layers, width 16, 4 heads, MLP 24, vocabulary 8'
    """
    config = model.module.config
    return (
        f"{config.layers} layers, width {config.width}, {config.heads} heads, MLP {config.hidden}, "
        f"vocabulary {config.vocabulary}"
    )


def steer(
    model: Model,
    vector: SteeringVector,
    *,
    layer: int | Sequence[int] | jax.Array,
    strength: float | jax.Array,
    renorm: bool = False,
    position: Any = None,
    span: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """The edit ``h + strength * vector`` at some layers, for ``apply`` and ``generate``.

    Args:
      model: the model that the vector was read from.
      vector: see ``steering_vector``.
      layer: layer or layers; may be traced.
      strength: of either sign; may be traced.
      renorm: scale every token back to the length that it had.
      position, span: absolute positions, all by default; see ``at``.

    Raises:
      ValueError: a vector of another model, a layer out of range, or a strength that is not finite.
    """
    require_fit(model, vector)
    if not isinstance(strength, jax.core.Tracer) and not np.isfinite(strength).all():
        raise ValueError(f"steer: strength must be finite, got {strength}.")
    kind = AddRenormed if renorm else Add
    edit = kind(strength * vector.values)
    return at(model.sites, vector.site, edit, layer=layer, position=position, span=span, stacked=True)


def steered_logits(
    model: Model,
    params: Any,
    edits: dict[str, Any],
    texts: Texts,
    tokens: Int[ArrayLike, "N A"] | None = None,
) -> Float[Array, "N V"]:
    """Logits after the last token of each text, under edits; pure, so that grids are ``sweep`` or ``vmap`` over masks.

    Args:
      model, params: the decoder.
      edits: such as ``steer`` gives; empty for the model itself.
      texts: N prompts.
      tokens: (N, A), whose logits are kept; all V by default.

    Returns:
      (N, V) or (N, A) float32.
    """
    variables = {"params": params, "edits": edits}
    logits = model.apply(variables, texts.tokens, texts.positions, None, None, texts.lengths - 1)[:, 0]
    return logits if tokens is None else jnp.take_along_axis(logits, jnp.asarray(tokens), axis=-1)


def require_fit(model: Model, vector: SteeringVector) -> None:
    """Refuse a vector that was read from a model of another shape.

    Raises:
      ValueError: with both shapes.
      KeyError: the model lacks the vector's site.
    """
    if vector.model and vector.model != describe(model):
        raise ValueError(f"this vector was read from a model of {vector.model}; this one has {describe(model)}.")
    entry = model.sites.named(vector.site)[0]
    wanted = (entry.layers, entry.value.shape[-1])
    if vector.values.shape != wanted:
        raise ValueError(f'vector: wanted (layers, width) = {wanted} at "{vector.site}", got {vector.values.shape}.')


def random_vectors(key: jax.Array, vector: SteeringVector, n: int) -> SteeringVector:
    """Gaussian directions with the vector's length in each layer: the control of every dose curve.

    Returns:
      ``values`` (n, L, D); one of them is ``jax.tree.map(lambda x: x[i], ...)``.
    """
    noise = jax.random.normal(key, (n, *vector.values.shape))
    length = jnp.linalg.norm(vector.values, axis=-1, keepdims=True)
    values = noise * length / jnp.linalg.norm(noise, axis=-1, keepdims=True)
    return SteeringVector(values, vector.site, vector.model)


def save_vector(
    path: str | os.PathLike[str], vector: SteeringVector, *, name: str, layer: int | None = None, note: str = ""
) -> None:
    """Write a vector to a safetensors file, with a JSON card in its header.

    Args:
      path: the file; an existing one is refused.
      vector: see ``steering_vector``.
      name: of the model, such as its hub id.
      layer: the layer that it is meant for.
      note: anything else that a reader should know.

    Raises:
      FileExistsError: if the file is there.
    """
    norms = ", ".join(f"{x:.4g}" for x in np.linalg.norm(np.asarray(vector.values), axis=-1))
    card = {"model": name, "shape": vector.model, "site": vector.site, "norm by layer": norms, "note": note}
    save_edits(path, {vector.site: Add(vector.values)}, card | ({} if layer is None else {"layer": str(layer)}))


def load_vector(
    path: str | os.PathLike[str], model: Model, *, name: str | None = None
) -> tuple[SteeringVector, dict[str, str]]:
    """Read what ``save_vector`` wrote, for this model.

    Args:
      path: the file.
      model: the model that is to be steered.
      name: if given, the vector must have been read from a model of this name.

    Returns:
      The vector and its card: "model", "shape", "site", "norm by layer", "note" and maybe "layer".

    Raises:
      ValueError: not such a file, or a vector of another model.
    """
    edits, card = load_edits(path)
    if set(edits) != {card.get("site")} or not {"model", "shape"} <= set(card):
        raise ValueError(f"{path} holds edits, but no steering vector.")
    if name is not None and card["model"] != name:
        raise ValueError(f'{path} was read from "{card["model"]}", not from "{name}".')
    vector = SteeringVector(edits[card["site"]].value, card["site"], card["shape"])
    require_fit(model, vector)
    return vector, card
