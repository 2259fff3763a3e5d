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

It gives w no signal of the task, only a pull to 1/2. ``end_to_end_loss`` is ours, and makes "layer-aware" testable:

    mean_target -log p_edit(refusal | prompt) + mean_benign KL(p_base | p_edit) + 0.001 mean |s| mean w     (end to end)

``two_pass`` is ours as well: a first pass that changes nothing reads x, the second patches every layer.

Since no layer below max S is ever patched, what the controller reads in the causal mode is what an unedited pass over
the same cache gives. So both modes are the same two passes, and differ in which layers the second may touch
(``reach``). ``Steered`` is a model that makes these two passes: ``models.generate`` and all else run it unchanged::

    controller = init_controller(key, n_inputs=2 * D, n_layers=L)
    steered = steer_by_controller(model, input_layers=(0, 1))
    variables = {"params": params, **steering(controller, r, scale=4.0, reach=reach(L, (0, 1), "causal"))}
    generate(steered, variables, tokens, lengths, steps=8)

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
import optax
from flax import linen as nn

from mechlab.analysis.directions import mean_difference
from mechlab.core.edits import Add, at
from mechlab.core.model import Model, Variables
from mechlab.core.rng import require_typed
from mechlab.methods.steering.vectors import SITE
from mechlab.models.blocks import Cache
from mechlab.models.generate import new_cache

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
        raise ValueError(f"reach: wanted one number for each of {logits.shape[-1]} layers, got shape {np.shape(reach)}.")
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


def released_loss(
    controller: Any,
    x: Float[ArrayLike, "B I"],
    is_target: bool | jax.Array,
    *,
    reg: float = 0.1,
    reg_l1: float = 0.01,
    rows: Float[ArrayLike, " B"] | None = None,
) -> jax.Array:
    """The released loss of one batch, of target or of benign inputs; see the module's equations.

    Args:
      controller: parameters.
      x: (B, I).
      is_target: label of the batch; may be traced.
      reg, reg_l1: 0.1 and 0.01.
      rows: weight of each row, for a batch that is not full; all 1 by default.
    """
    s, logits = controller_apply(controller, x)
    weight = jnp.ones(len(s)) if rows is None else jnp.asarray(rows)
    label = jnp.asarray(is_target, jnp.float32)
    w = jax.nn.sigmoid(logits)
    pull = (jnp.abs(w - 0.5) + reg_l1 * w).mean(-1)
    each = optax.sigmoid_binary_cross_entropy(s[:, 0], label) + label * reg * pull
    return (each * weight).sum() / weight.sum()


def adamw(rate: float | jax.Array, clip: float = 1.0) -> optax.GradientTransformation:
    """The paper's optimiser: the gradient's global norm cut at ``clip``, then AdamW with decay 0.01."""
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01))


def train_controller(
    key: jax.Array,
    controller: Any,
    x_target: Float[ArrayLike, "N I"],
    x_benign: Float[ArrayLike, "M I"],
    *,
    epochs: int = 10,
    batch: int = 8,
    rate: float | jax.Array = 5e-5,
    clip: float = 1.0,
    allow_target_only: bool = False,
) -> tuple[Any, Float[Array, "E 2"]]:
    """Train on the released loss: each epoch all target batches, then all benign ones, rows in a new order.

    Args:
      key: typed key, of the orders.
      controller: start.
      x_target, x_benign: stored inputs.
      epochs, batch, rate, clip: the paper's by default; ``rate`` may be traced.
      allow_target_only: accept an empty ``x_benign``, the ablation that never sees what it must not refuse.

    Returns:
      The parameters after the last epoch, and the mean loss of target and benign batches by epoch (0 without benign).

    Raises:
      ValueError: no target input, no benign one without ``allow_target_only``, widths that do not fit, values that are
        not finite, or epochs or batch below 1.
    """
    require_typed(key)
    sides = [jnp.asarray(x_target, jnp.float32), jnp.asarray(x_benign, jnp.float32)]
    width = controller["fc1"]["kernel"].shape[0]
    for name, x in zip(("x_target", "x_benign"), sides, strict=True):
        if x.ndim != 2 or x.shape[1] != width:
            raise ValueError(f"{name}: wanted inputs (N, {width}), got {x.shape}.")
        if not isinstance(x, jax.core.Tracer) and not np.isfinite(np.asarray(x)).all():
            raise ValueError(f"{name}: contains values that are not finite.")
    if not len(sides[0]):
        raise ValueError("x_target: at least one target prompt is needed.")
    if not len(sides[1]) and not allow_target_only:
        raise ValueError("x_benign is empty; pass allow_target_only=True to train on target prompts alone.")
    if min(epochs, batch) < 1:
        raise ValueError(f"train_controller: epochs and batch must be at least 1, got {epochs} and {batch}.")
    return _train(key, controller, sides[0], sides[1], rate, clip, epochs, batch)


def _train(
    key: jax.Array, controller: Any, x_target: jax.Array, x_benign: jax.Array, rate: Any, clip: float, epochs: int, batch: int
) -> tuple[Any, jax.Array]:
    optimiser = adamw(rate, clip)
    x = jnp.concatenate([x_target, x_benign])
    counts = [-(-len(side) // batch) for side in (x_target, x_benign)]
    is_target = jnp.arange(sum(counts)) < counts[0]

    def order(key: jax.Array, first: int, n: int) -> tuple[jax.Array, jax.Array]:
        """Batches of rows (K, batch) in a new order; the last one is filled with rows of weight 0."""
        slots = -(-n // batch) * batch
        rows = jnp.pad(first + jax.random.permutation(key, n), (0, slots - n), mode="edge") if n else jnp.zeros(0, int)
        return rows.reshape(-1, batch), (jnp.arange(slots) < n).astype(jnp.float32).reshape(-1, batch)

    def step(state: Any, now: Any) -> tuple[Any, jax.Array]:
        params, opt_state = state
        rows, weights, target = now
        loss, grads = jax.value_and_grad(released_loss)(params, x[rows], target, rows=weights)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def epoch(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        own = jax.random.split(key)
        plans = order(own[0], 0, len(x_target)), order(own[1], len(x_target), len(x_benign))
        rows, weights = (jnp.concatenate(parts) for parts in zip(*plans, strict=True))
        state, losses = jax.lax.scan(step, state, (rows, weights, is_target))
        means = [jnp.where(side, losses, 0).sum() / max(1, count) for side, count in zip((is_target, ~is_target), counts, strict=True)]
        return state, jnp.stack(means)

    start = controller, optimiser.init(controller)
    (trained, _), history = jax.lax.scan(epoch, start, jax.random.split(key, epochs))
    return trained, history


def answer_logits(
    model: Model, variables: Variables, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], answers: Int[Array, "B A"]
) -> Float[Array, "B A V"]:
    """Logits at every token of given answers, read one cached step at a time, exactly as ``generate`` writes them.

    Args:
      model: a decoder, steered or not.
      variables: for its ``apply``.
      tokens, lengths: right-padded prompts.
      answers: the tokens that follow each prompt.
    """

    def step(*inputs: Any) -> Any:
        return (*model.apply(variables, *inputs), ())

    return _through_answers(step, model, tokens, lengths, answers)[0]


def end_to_end_loss(
    controller: Any,
    steered: Steered,
    params: Any,
    batch: dict[str, jax.Array],
    *,
    direction: jax.Array,
    scale: float | jax.Array,
    reach: jax.Array,
    kl: float = 1.0,
    size: float = 1e-3,
) -> jax.Array:
    """Our loss, through the frozen decoder with the patch in place; see the module's equations.

    Args:
      controller: parameters, what is trained.
      steered: the decoder with its controller.
      params: of the decoder.
      batch: right-padded prompts "tokens" (B, T) and "lengths" (B,), "answers" (B, A): the refusal after target prompts
        and the decoder's own answer after benign ones, "target" (B,) 1 or 0, and "base" (B, A, V), the logits of the
        unedited decoder along the answers.
      direction, scale, reach: as in ``steering``.
      kl, size: weights of the second and third term, our choice.

    Returns:
      Scalar: nats of a refusal per target prompt, plus nats per answer token of a benign prompt, plus the size.
    """
    variables = {"params": params} | steering(controller, direction, scale=scale, reach=reach)

    def step(*inputs: Any) -> Any:
        (logits, cache), said = steered.step(variables, *inputs)
        return logits, cache, jnp.abs(said.scalar[..., 0]) * jax.nn.sigmoid(said.weight_logits).mean(-1)

    logits, sizes = _through_answers(step, steered, batch["tokens"], batch["lengths"], batch["answers"])
    log_p = jax.nn.log_softmax(logits)
    refusal = -jnp.take_along_axis(log_p, batch["answers"][..., None], -1)[..., 0].sum(-1)
    moved = divergence(batch["base"], logits).mean(-1)
    target = batch["target"].astype(jnp.float32)
    benign = 1 - target
    per_target, per_benign = (refusal * target).sum() / jnp.maximum(target.sum(), 1), (moved * benign).sum()
    return per_target + kl * per_benign / jnp.maximum(benign.sum(), 1) + size * sizes.mean()


def divergence(base: Float[Array, "... V"], edited: Float[Array, "... V"]) -> Float[Array, "..."]:
    """KL(p_base | p_edit) of two sets of logits, nats."""
    log_base, log_edit = jax.nn.log_softmax(base), jax.nn.log_softmax(edited)
    return (jnp.exp(log_base) * (log_base - log_edit)).sum(-1)


def constant_edits(
    model: Model, direction: Float[ArrayLike, " D"], strengths: Float[ArrayLike, "L ..."], lengths: Int[ArrayLike, " B"]
) -> dict[str, Any]:
    """The baselines: r times a fixed strength for each layer, at the same positions that a controller acts on.

    ``c * jnp.ones(L)`` is uniform steering, ``c * jax.nn.one_hot(layer, L)`` that of a single layer, and strengths
    (L, B), one for each prompt, are CAST's (see ``cast_gate``).

    Args:
      model: the decoder.
      direction: r.
      strengths: (L,) or (L, B).
      lengths: (B,) of the prompts; the edit acts from their last token on.

    Raises:
      ValueError: another number of layers or prompts.
    """
    layers, sizes, many = model.module.config.layers, jnp.asarray(strengths), np.shape(lengths)
    if sizes.shape not in ((layers,), (layers, *many)):
        raise ValueError(f"strengths: wanted ({layers},) or {(layers, *many)}, got {sizes.shape}.")
    values = sizes.reshape(layers, -1, 1, 1) * jnp.asarray(direction)
    last = jnp.asarray(lengths) - 1
    return at(model.sites, SITE, Add(values), span=(last, jnp.full_like(last, model.module.config.context)), stacked=True)


def cast_similarity(h: Float[ArrayLike, "... D"], v: Float[ArrayLike, "... D"]) -> Float[Array, "..."]:
    """Conditional activation steering's condition (arXiv 2409.05907, recalled): cos(h, tanh(proj_v h))."""
    h, v = jnp.asarray(h), jnp.asarray(v)
    projected = jnp.tanh(((h * v).sum(-1) / (v * v).sum(-1))[..., None] * v)
    return (h * projected).sum(-1) / (jnp.linalg.norm(h, axis=-1) * jnp.linalg.norm(projected, axis=-1) + 1e-12)


class CastRule(NamedTuple):
    """When CAST steers: ``sign * similarity > threshold`` at one layer of the prompt's last token; F1 where it was fit."""

    layer: int
    sign: int
    threshold: float
    f1: float


def fit_cast(
    h_target: Float[ArrayLike, "N L D"], h_benign: Float[ArrayLike, "M L D"], v: Float[ArrayLike, "L D"]
) -> CastRule:
    """The layer, sign and threshold with the best F1 on dev prompts; ties go to the lowest layer.

    Args:
      h_target, h_benign: states of dev prompts.
      v: condition vectors, from train prompts.

    Raises:
      ValueError: no prompts of a kind, or shapes that do not fit.
    """
    shapes = np.shape(h_target), np.shape(h_benign)
    if any(len(s) != 3 or s[1:] != np.shape(v) or not s[0] for s in shapes):
        raise ValueError(f"fit_cast: wanted states (N, {np.shape(v)}), got {shapes[0]} and {shapes[1]}.")
    sims = np.asarray(cast_similarity(jnp.concatenate([jnp.asarray(h_target), jnp.asarray(h_benign)]), v)).T
    label = np.arange(sims.shape[1]) < shapes[0][0]
    best = CastRule(0, 1, math.inf, -1.0)
    for layer, values in enumerate(sims):
        for sign in (1, -1):
            sorted_values = np.sort(sign * values)
            thresholds = np.append(sorted_values[0] - 1e-3, (sorted_values[1:] + sorted_values[:-1]) / 2)
            fires = sign * values > thresholds[:, None]
            hit = (fires & label).sum(1)
            f1 = 2 * hit / (fires.sum(1) + label.sum())
            if f1.max() > best.f1:
                best = CastRule(layer, sign, float(thresholds[f1.argmax()]), float(f1.max()))
    return best


def cast_gate(rule: CastRule, states: Float[ArrayLike, "N L D"], v: Float[ArrayLike, "L D"]) -> Float[Array, " N"]:
    """1 for the prompts that CAST steers, 0 for the others; decided once, at the prompt."""
    similarity = cast_similarity(jnp.asarray(states)[:, rule.layer], jnp.asarray(v)[rule.layer])
    return (rule.sign * similarity > rule.threshold).astype(jnp.float32)


def _through_answers(
    step: Callable[..., Any], model: Model, tokens: jax.Array, lengths: jax.Array, answers: jax.Array
) -> tuple[jax.Array, Any]:
    """``step(tokens, positions, types, cache, read)`` -> logits, cache, aux over a prompt, then token by token."""
    batch, length = tokens.shape
    at_tokens = jnp.arange(length)
    cache = new_cache(model, batch, length + answers.shape[1])
    positions = jnp.where(at_tokens < lengths[:, None], at_tokens, -1)
    logits, cache, aux = step(tokens, positions, None, cache, lengths - 1)

    def one(carry: Any, token: jax.Array) -> Any:
        cache, position = carry
        logits, cache, aux = step(token[:, None], position[:, None], None, cache, jnp.zeros_like(position))
        return (cache, position + 1), (logits[:, 0], aux)

    _, (later, others) = jax.lax.scan(one, (cache, lengths), answers[:, :-1].T)
    joined = jnp.concatenate([logits, jnp.moveaxis(later, 0, 1)], 1)
    return joined, jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), aux, others)


def _require_gate(gate: str) -> None:
    if gate not in GATES:
        raise ValueError(f'gate: wanted one of {", ".join(GATES)}, got "{gate}".')


def _unit(raw: jax.Array) -> jax.Array:
    length = float(jnp.linalg.norm(raw))
    if not math.isfinite(length) or length < 1e-12:
        raise ValueError(f"the refusal direction must be finite and not zero, got length {length}.")
    return raw / length
