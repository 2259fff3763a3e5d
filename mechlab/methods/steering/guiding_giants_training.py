"""Training a controller of ``guiding_giants`` (arXiv 2505.20309): the released loss and one through the frozen decoder.

With s the scalar, w the layers' weights, and label 1 for target prompts:

    target   BCE(s, 1) + 0.1 (mean |w - 1/2| + 0.01 mean w)            benign   BCE(s, 0)                 (released)

    mean_target -log p_edit(refusal | prompt) + mean_benign KL(p_base | p_edit) + 0.001 mean |s| mean w     (end to end)

The released loss needs stored states only; on benign batches its gradient with respect to the weights is zero. The
second is our choice: it differentiates the patched forward over the answer, one cached token after another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mechlab.analysis.metrics import kl_divergence
from mechlab.core.model import Model, Variables
from mechlab.core.rng import require_typed, stream
from mechlab.methods.steering.guiding_giants import Steered, controller_apply, steering
from mechlab.methods.steering.vectors import Texts
from mechlab.models.generate import new_cache

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int


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
    return optax.chain(
        optax.clip_by_global_norm(clip), optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
    )


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
    mixed: bool = False,
) -> tuple[Any, Float[Array, "E 2"]]:
    """Train on the released loss: each epoch all target batches, then all benign ones, rows in a new order.

    Args:
      key: typed key, of the orders.
      controller: start.
      x_target, x_benign: stored inputs.
      epochs, batch, rate, clip: the paper's by default; ``rate`` may be traced.
      allow_target_only: accept an empty ``x_benign``, the ablation that never sees what it must not refuse.
      mixed: batches of both kinds in one random order instead, our ablation of that order.

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
    return _train(key, controller, sides[0], sides[1], rate, clip, epochs, batch, mixed)


def _train(
    key: jax.Array,
    controller: Any,
    x_target: jax.Array,
    x_benign: jax.Array,
    rate: Any,
    clip: float,
    epochs: int,
    batch: int,
    mixed: bool,
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

    def plan(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        for_target, for_benign = jax.random.split(key)
        parts = order(for_target, 0, len(x_target)), order(for_benign, len(x_target), len(x_benign))
        rows, weights = (jnp.concatenate(halves) for halves in zip(*parts, strict=True))
        turn = jax.random.permutation(stream(key, "turn"), len(rows)) if mixed else jnp.arange(len(rows))
        return rows[turn], weights[turn], is_target[turn]

    def epoch(state: Any, batches: Any) -> tuple[Any, jax.Array]:
        state, losses = jax.lax.scan(step, state, batches)
        sides = zip((batches[2], ~batches[2]), counts, strict=True)
        means = [jnp.where(side, losses, 0).sum() / max(1, count) for side, count in sides]
        return state, jnp.stack(means)

    start = controller, optimiser.init(controller)
    (trained, _), history = jax.lax.scan(epoch, start, jax.vmap(plan)(jax.random.split(key, epochs)))
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
    moved = kl_divergence(batch["base"], logits).mean(-1)
    target = batch["target"].astype(jnp.float32)
    benign = 1 - target
    per_target, per_benign = (refusal * target).sum() / jnp.maximum(target.sum(), 1), (moved * benign).sum()
    return per_target + kl * per_benign / jnp.maximum(benign.sum(), 1) + size * sizes.mean()


def _through_answers(
    step: Callable[..., Any], model: Model, tokens: jax.Array, lengths: jax.Array, answers: jax.Array
) -> tuple[jax.Array, Any]:
    """``step(tokens, positions, types, cache, read)`` -> logits, cache, aux over a prompt, then token by token."""
    batch, length = tokens.shape
    cache = new_cache(model, batch, length + answers.shape[1])
    logits, cache, aux = step(tokens, Texts(tokens, lengths).positions, None, cache, lengths - 1)

    def one(carry: Any, token: jax.Array) -> Any:
        cache, position = carry
        logits, cache, aux = step(token[:, None], position[:, None], None, cache, jnp.zeros_like(position))
        return (cache, position + 1), (logits[:, 0], aux)

    _, (later, others) = jax.lax.scan(one, (cache, lengths), answers[:, :-1].T)
    joined = jnp.concatenate([logits, jnp.moveaxis(later, 0, 1)], 1)
    return joined, jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), aux, others)
