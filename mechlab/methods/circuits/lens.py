"""The logit lens and the tuned lens: what a decoder would answer if it stopped after some layer.

Both read the residual stream at every *depth*: the embedding, then the stream after each of the L layers, L + 1 in all.

- Logit lens (nostalgebraist 2020): the model's own final norm and unembedding, applied once, at every depth.
- Tuned lens (Belrose et al. 2023, arXiv 2303.08112, section 3): a learned affine translator of each depth comes first::

      TunedLens_l(h) = LogitLens(h + h A_l + b_l)                                                             (eq. 8)
      (A, b) = argmin  mean KL( model's output || TunedLens_l(h_l) )                                          (eq. 9)

They use the model's final norm and unembedding, so they are here and not in ``analysis``, which knows no model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct

from mechlab.analysis.metrics import kl_divergence
from mechlab.core.model import Model, Variables
from mechlab.methods.circuits.reading import Read, at_read
from mechlab.models.transformer import unembed

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


@struct.dataclass
class TunedLens:
    """Affine translators of the depths 0..L - 1 into the basis of the last; depth L needs none.

    Attributes:
      kernel: (L, D, D), A; the identity is added to it.
      bias: (L, D), b.
    """

    kernel: Float[Array, "L D D"]
    bias: Float[Array, "L D"]


def residual_depths(model: Model, variables: Variables, tokens: Int[Array, "B T"]) -> Float[Array, "L+1 B T D"]:
    """The residual stream at every depth: ``embed``, then ``resid_post`` of every layer, before the final norm."""
    _, acts = model.capture(variables, tokens, sites=("embed", "resid_post"))
    return jnp.concatenate([acts["embed"][None], acts["resid_post"]])


def logit_lens(
    model: Model,
    variables: Variables,
    tokens: Int[Array, "B T"],
    *,
    lens: TunedLens | None = None,
    read: Read | None = None,
    answers: Int[Array, "B A"] | None = None,
) -> Float[Array, "L+1 B ..."]:
    """The logits of every depth; those of depth L are the model's own.

    Cost: one forward and L + 1 unembeddings. They are made one after the other, so that with ``answers`` the memory is
    that of one depth's logits.

    Args:
      model: a decoder from ``models.transformer``.
      variables: params and edits, as for ``model.apply``; what is read is what the edits left. Edits at ``final_norm``
        and ``logits`` apply at every depth, and must broadcast over positions where ``read`` is given.
      tokens: (B, T).
      lens: translators from ``tuned_lens_loss``; the plain logit lens by default.
      read: the only position to be read, see ``reading.at_read``; all by default.
      answers: (B, A) or (A,) the only tokens whose logits are kept; all by default.

    Returns:
      (L + 1, B, T, V) float32; no axis T with ``read``, and A in place of V with ``answers``.

    Raises:
      ValueError: a lens or answers that do not fit.
    """
    stream = residual_depths(model, variables, tokens)
    edits = variables.get("edits") or {}
    # Those of the layers have done their work, and need not fit the positions that are read.
    last = {"params": variables["params"], "edits": {k: e for k, e in edits.items() if k in ("final_norm", "logits")}}
    if lens is not None:
        stream = translate(lens, stream)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if read is not None:
        stream = jax.vmap(lambda x: at_read(x, read))(stream)[:, :, None]
        positions = at_read(positions, read)[:, None]
    if answers is not None:
        batch = len(tokens)
        if answers.ndim not in (1, 2) or answers.shape[:-1] not in ((), (batch,)):
            raise ValueError(f"answers: wanted tokens ({batch}, A) or (A,), got shape {answers.shape}.")
        answers = jnp.broadcast_to(answers, (batch, answers.shape[-1]))

    def at_depth(x: jax.Array) -> jax.Array:
        logits = unembed(model, last, x, positions)
        if answers is not None:
            logits = jnp.take_along_axis(logits, answers[:, None, :], axis=-1)
        return logits if read is None else logits[:, 0]

    return jax.lax.map(at_depth, stream)


def identity_lens(layers: int, width: int) -> TunedLens:
    """The translators before training, for L ``layers`` and D ``width``: the tuned lens is then the logit lens."""
    if layers < 1 or width < 1:
        raise ValueError(f"identity_lens: wanted layers and width of at least 1, got {layers} and {width}.")
    return TunedLens(jnp.zeros((layers, width, width)), jnp.zeros((layers, width)))


def translate(lens: TunedLens, stream: Float[Array, "L+1 B T D"]) -> Float[Array, "L+1 B T D"]:
    """``h + h A_l + b_l`` at depths 0..L - 1; depth L is returned as it is.

    Raises:
      ValueError: a lens for another number of layers or another width.
    """
    layers, width = lens.bias.shape
    if (stream.shape[0], stream.shape[-1]) != (layers + 1, width):
        raise ValueError(f"the lens is for (L + 1, ..., D) = ({layers + 1}, ..., {width}), got {stream.shape}.")
    moved = jnp.einsum("lbtd,lde->lbte", stream[:-1], lens.kernel.astype(stream.dtype))
    moved = stream[:-1] + moved + lens.bias[:, None, None].astype(stream.dtype)
    return jnp.concatenate([moved, stream[-1:]])


def tuned_lens_loss(model: Model, params: Any) -> Callable[[TunedLens, Any], tuple[jax.Array, dict[str, jax.Array]]]:
    """The loss that trains a tuned lens, for ``training.loop.fit`` (eq. 9); the model itself is not trained::

        start = identity_lens(model.module.config.layers, model.module.config.width)
        lens = fit(key, tuned_lens_loss(model, params), start, optax.adam(1e-3), batches, steps=250).params

    Args:
      model: a decoder from ``models.transformer``.
      params: its parameters; they become constants of the compiled loop.

    Returns:
      ``loss(lens, batch) -> (mean, {"kl": (L,)})``: KL in nats from the model's output to the lens, mean over tokens,
      for each of the depths 0..L - 1 and averaged over them. ``batch`` is ``{"tokens": (B, T)}``, with
      ``"mask": (B, T)`` where some tokens do not count.

    Differs from the paper: it trains with SGD with Nesterov momentum; the optimiser is the caller's here.
    """
    variables = {"params": params}

    def loss(lens: TunedLens, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        tokens = batch["tokens"]
        logits = logit_lens(model, variables, tokens, lens=lens)
        kl = kl_divergence(jax.lax.stop_gradient(logits[-1]), logits[:-1])
        weight = batch.get("mask", jnp.ones(tokens.shape)).astype(jnp.float32)
        per_depth = (kl * weight).sum((1, 2)) / weight.sum()
        return per_depth.mean(), {"kl": per_depth}

    return loss
