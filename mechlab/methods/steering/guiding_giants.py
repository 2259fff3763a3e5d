"""Guiding Giants: lightweight controllers for weighted activation steering (Hegazy et al. 2025, arXiv 2505.20309).

A small network reads a few hidden states of a frozen decoder and says how strongly, and in which layers, to push along
a fixed direction r, |r| = 1. With h_l the residual stream after block l at the last token of the current step, S the
layers that are read, and B blocks in all:

    x = concat_{l in S} h_l                       read before anything of this step is changed
    z = W2 relu(W1 x + b1) + b2 in R^(1+L)        s = z_0, a raw logit;  w_l = sigmoid(z_l)
    h_l <- h_l + c s w_l r                        for l >= max S: earlier blocks have run when z is known    (patch)

in the prompt at its last token, and again at every token that is written. The released loss trains on states that were
stored, target prompts (label 1) and benign ones (label 0) in turn:

    target   BCE(s, 1) + 0.1 (mean |w - 1/2| + 0.01 mean w)            benign   BCE(s, 0)                 (released)

It gives w no signal of the task, only a pull to 1/2. The end-to-end loss is ours, and makes "layer-aware" testable:

    mean_target -log p_edit(refusal | prompt) + mean_benign KL(p_base | p_edit) + 0.001 mean |s| mean w     (end to end)

``two_pass`` is ours as well: a first pass that changes nothing reads x, the second patches every layer.

Since no layer below max S is ever patched, what the controller reads in the causal mode is what an unedited pass over
the same cache gives. So both modes are the same two passes, and differ in which layers the second may touch
(``reach``). ``Steered`` is a model that makes these two passes: ``models.generate`` and all else run it unchanged::

    controller = init_controller(key, n_inputs=2 * D, n_layers=L)
    steered = steer_by_controller(model, input_layers=(0, 1))
    variables = {"params": params, **steering(controller, r, scale=4.0, reach=reach(L, (0, 1), "causal"))}
    generate(steered, variables, tokens, lengths, steps=8)

Both losses are in ``guiding_giants_training``, the baselines with fixed strengths in ``cast``.

Differs from the official code: states are read at the true last token (there at position -1 of a padded batch) and in
the format of inference; a direction of length zero is refused; patches do not depend on the batch's size. There the
epoch that is "restored" is the last one, as here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mechlab.analysis.directions import mean_difference
from mechlab.core.edits import Add
from mechlab.core.model import Model, Variables
from mechlab.core.rng import require_typed
from mechlab.methods.steering.vectors import SITE
from mechlab.models.blocks import Cache

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int

GATES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "raw": lambda s: s,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
}
"""How the scalar becomes a strength; the official code uses the raw logit, which may be negative."""

MODES = ("causal", "two_pass")


class Strengths(NamedTuple):
    """What a controller says.

    Attributes:
      scalar: (..., 1) raw logit s.
      weight_logits: (..., L) logits of the layers' weights.
    """

    scalar: Float[Array, "... 1"]
    weight_logits: Float[Array, "... L"]


class Controller(nn.Module):
    """Two dense layers with a relu between, float32, initialised evenly within 1 / sqrt(inputs)."""

    layers: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(name: str, inputs: int, outputs: int) -> nn.Dense:
            bound = 1 / math.sqrt(inputs)

            def even(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
                return jax.random.uniform(key, shape, dtype, -bound, bound)

            return nn.Dense(outputs, kernel_init=even, bias_init=even, name=name)

        x = jnp.asarray(x, jnp.float32)
        return dense("fc2", self.hidden, 1 + self.layers)(nn.relu(dense("fc1", x.shape[-1], self.hidden)(x)))


def init_controller(key: jax.Array, n_inputs: int, n_layers: int, hidden: int = 1024) -> Any:
    """Parameters of a controller.

    Args:
      key: typed key.
      n_inputs: |S| D.
      n_layers: L of the decoder.
      hidden: width of the hidden layer.

    Returns:
      ``{"fc1": {"kernel", "bias"}, "fc2": {"kernel", "bias"}}``; kernels (in, out).

    Raises:
      ValueError: a size below 1.
    """
    require_typed(key)
    if min(n_inputs, n_layers, hidden) < 1:
        raise ValueError(f"init_controller: sizes must be at least 1, got {n_inputs}, {n_layers} and {hidden}.")
    return Controller(n_layers, hidden).init(key, jnp.zeros((1, n_inputs)))["params"]


def controller_apply(controller: Any, x: Float[ArrayLike, "... I"]) -> Strengths:
    """The controller's scalar and weight logits for inputs (..., I).

    Raises:
      ValueError: x is not as wide as the controller's input.
    """
    kernels = controller["fc1"]["kernel"], controller["fc2"]["kernel"]
    if np.shape(x)[-1:] != kernels[0].shape[:1]:
        raise ValueError(f"controller: wanted inputs of width |S| D = {kernels[0].shape[0]}, got shape {np.shape(x)}.")
    module = Controller(layers=kernels[1].shape[1] - 1, hidden=kernels[0].shape[1])
    z: Any = module.apply({"params": controller}, x)
    return Strengths(z[..., :1], z[..., 1:])


def half_weights(controller: Any) -> Any:
    """The ablation without layer weights: w = 1/2 everywhere, s as it was. A transform of parameters."""
    last = controller["fc2"]
    only_scalar = {name: leaf.at[..., 1:].set(0.0) for name, leaf in last.items()}
    return {**controller, "fc2": only_scalar}


def constant_scalar(controller: Any, value: float | jax.Array) -> Any:
    """The ablation without the gate: s = ``value`` for every input, w as it was. A transform of parameters."""
    last = controller["fc2"]
    kernel, bias = last["kernel"].at[:, 0].set(0.0), last["bias"].at[0].set(value)
    return {**controller, "fc2": {"kernel": kernel, "bias": bias}}


def shift_scalar(controller: Any, by: float | jax.Array) -> Any:
    """The controller with ``by`` added to its scalar: another zero, the same ranking. A transform of parameters."""
    last = controller["fc2"]
    return {**controller, "fc2": {**last, "bias": last["bias"].at[0].add(by)}}


def refusal_direction_embedding(
    embedding: Float[ArrayLike, "V D"], ids_refuse: Int[ArrayLike, " M"], ids_answer: Int[ArrayLike, " N"]
) -> Float[Array, " D"]:
    """r of the official code: the mean input embedding of refusing phrases minus that of answering phrases, length 1.

    Args:
      embedding: (V, D) input embeddings.
      ids_refuse, ids_answer: all tokens of the phrases one after another; one that comes twice counts twice.

    Raises:
      ValueError: no tokens, tokens out of range, a direction of length zero, or one that is not finite.
    """
    table, sides = np.asarray(embedding), [np.asarray(ids) for ids in (ids_refuse, ids_answer)]
    for name, ids in zip(("ids_refuse", "ids_answer"), sides, strict=True):
        if ids.ndim != 1 or not ids.size or ids.min() < 0 or ids.max() >= len(table):
            raise ValueError(f"{name}: wanted at least one token of 0..{len(table) - 1}, got {ids[:8]}.")
    return _unit(jnp.asarray(table[sides[0]].mean(0) - table[sides[1]].mean(0)))


def refusal_direction_activation(
    h_refuse: Float[ArrayLike, "N D"], h_answer: Float[ArrayLike, "M D"]
) -> Float[Array, " D"]:
    """The usual r: the mean state of refused prompts minus that of answered ones, length 1.

    Args:
      h_refuse, h_answer: states at the last prompt token, after one block.

    Raises:
      ValueError: no states, widths that differ, values that are not finite, or a direction of length zero.
    """
    high, low = np.asarray(h_refuse, np.float32), np.asarray(h_answer, np.float32)
    if high.ndim != 2 or low.ndim != 2 or not len(high) or not len(low) or high.shape[1] != low.shape[1]:
        raise ValueError(f"h_refuse, h_answer: wanted (N, D) and (M, D), got {high.shape} and {low.shape}.")
    both = np.concatenate([low, high])
    return _unit(mean_difference(jnp.asarray(both), np.repeat([0, 1], [len(low), len(high)])).raw)


def resolve_layers(input_layers: Sequence[int], n_layers: int) -> tuple[int, ...]:
    """S in rising order, negative indices counted from the end.

    Raises:
      ValueError: no layer, one outside -L..L - 1, or one that comes twice.
    """
    found = [layer + n_layers if layer < 0 else layer for layer in map(int, input_layers)]
    if not found or min(found) < 0 or max(found) >= n_layers or len(set(found)) < len(found):
        raise ValueError(f"input_layers: wanted different layers of 0..{n_layers - 1}, got {tuple(input_layers)}.")
    return tuple(sorted(found))


def reach(n_layers: int, input_layers: Sequence[int], mode: str = "causal") -> Float[Array, " L"]:
    """1 for the layers that may be patched, 0 for the others: from max S on, or all in the mode "two_pass".

    Raises:
      ValueError: as ``resolve_layers``, or another mode.
    """
    if mode not in MODES:
        raise ValueError(f'mode: wanted one of {", ".join(MODES)}, got "{mode}".')
    first = max(resolve_layers(input_layers, n_layers)) if mode == "causal" else 0
    return (jnp.arange(n_layers) >= first).astype(jnp.float32)


def patch(
    strengths: Strengths,
    direction: Float[ArrayLike, " D"],
    scale: float | jax.Array,
    reach: Float[ArrayLike, " L"],
    gate: str = "raw",
) -> Float[Array, "L B D"]:
    """What is added to each layer at the last position: c s w_l r where ``reach`` is 1, and 0 elsewhere.

    Args:
      strengths: of B inputs.
      direction: r, of length 1.
      scale: c; the paper's is 4.
      reach: see ``reach``.
      gate: one of ``GATES``.

    Raises:
      ValueError: another gate, or another number of layers.
    """
    _require_gate(gate)
    s, logits = strengths
    if np.shape(reach) != logits.shape[-1:]:
        raise ValueError(f"reach: wanted a number for each of {logits.shape[-1]} layers, got {np.shape(reach)}.")
    size = scale * GATES[gate](s) * jax.nn.sigmoid(logits) * jnp.asarray(reach)
    return size.T[..., None] * jnp.asarray(direction)


@dataclasses.dataclass(frozen=True)
class Steered(Model):
    """A decoder under a controller; build it with ``steer_by_controller``.

    It is called as the decoder is, by ``apply``, and generates as it does, with variables ``{"params": ...}`` and what
    ``steering`` makes. The patch acts at one token of each row and call: at ``read``, or at the last one.
    """

    input_layers: tuple[int, ...] = ()
    gate: str = "raw"

    def apply(self, variables: Variables, *inputs: Any) -> Any:
        """Inputs and output as of the decoder: (tokens, positions, types, cache, read) to logits, and the cache."""
        return self.step(variables, *inputs)[0]

    def step(
        self,
        variables: Variables,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        types: jax.Array | None = None,
        cache: Cache | None = None,
        read: jax.Array | None = None,
    ) -> tuple[Any, Strengths]:
        """As ``apply``, and what the controller said.

        Raises:
          KeyError: variables lack a part of the steering.
          ValueError: sizes that do not fit; as the decoder.
        """
        plain = Model(self.module, self.example)
        batch, length = tokens.shape
        rows = jnp.arange(batch)
        # Rows are right-padded: without ``read``, the last token is the last that is no padding.
        last = read
        if last is None:
            real = jnp.arange(length) if positions is None else positions
            last = jnp.broadcast_to(jnp.where(real >= 0, jnp.arange(length), 0), (batch, length)).max(-1)
        inputs = (tokens, positions, types, cache)
        weights = {"params": variables["params"]}
        _, acts = plain.capture(weights, *inputs, last, sites=(SITE,))
        x = acts[SITE][jnp.asarray(self.input_layers)][:, rows, last]
        x = jnp.moveaxis(x, 0, 1).reshape(batch, -1).astype(jnp.float32)
        strengths = controller_apply(variables["controller"], x)
        values = patch(strengths, variables["direction"], variables["scale"], variables["reach"], self.gate)
        here = jax.nn.one_hot(last, length)[None, :, :, None]
        edits = {SITE: Add(values[:, :, None] * here)}
        return plain.apply(weights | {"edits": edits}, *inputs, read), strengths


def steer_by_controller(model: Model, input_layers: Sequence[int], *, gate: str = "raw") -> Steered:
    """The decoder with a controller that reads ``input_layers``.

    Args:
      model: from ``models.transformer``.
      input_layers: S.
      gate: one of ``GATES``; the official one is "raw".

    Raises:
      ValueError: as ``resolve_layers``, or another gate.
    """
    _require_gate(gate)
    return Steered(model.module, model.example, resolve_layers(input_layers, model.module.config.layers), gate)


def steering(
    controller: Any, direction: Float[ArrayLike, " D"], *, scale: float | jax.Array, reach: Float[ArrayLike, " L"]
) -> dict[str, Any]:
    """What ``Steered`` needs beside the decoder's parameters; arrays all, so that it can be mapped and differentiated.

    Raises:
      ValueError: where they are known, a direction that is not of length 1 or a scale that is not finite.
    """
    if not isinstance(direction, jax.core.Tracer) and not np.allclose(np.linalg.norm(direction, axis=-1), 1, atol=1e-3):
        raise ValueError(f"steering: the direction must have length 1, got {np.linalg.norm(direction, axis=-1)}.")
    if not isinstance(scale, jax.core.Tracer) and not np.isfinite(scale).all():
        raise ValueError(f"steering: scale must be finite, got {scale}.")
    return {
        "controller": controller,
        "direction": jnp.asarray(direction),
        "scale": jnp.asarray(scale, jnp.float32),
        "reach": jnp.asarray(reach),
    }


def controller_inputs(states: Float[ArrayLike, "N L D"], input_layers: Sequence[int]) -> Float[Array, "N I"]:
    """x of stored states: those of the layers that are read, one after another; ``vectors.last_states`` reads states.

    Raises:
      ValueError: states of another shape, and as ``resolve_layers``.
    """
    if np.ndim(states) != 3:
        raise ValueError(f"states: wanted (N, L, D), got {np.shape(states)}.")
    chosen = resolve_layers(input_layers, np.shape(states)[1])
    return jnp.asarray(states, jnp.float32)[:, jnp.asarray(chosen)].reshape(len(states), -1)  # type: ignore[arg-type]


def _require_gate(gate: str) -> None:
    if gate not in GATES:
        raise ValueError(f'gate: wanted one of {", ".join(GATES)}, got "{gate}".')


def _unit(raw: jax.Array) -> jax.Array:
    length = float(jnp.linalg.norm(raw))
    if not math.isfinite(length) or length < 1e-12:
        raise ValueError(f"the refusal direction must be finite and not zero, got length {length}.")
    return raw / length
