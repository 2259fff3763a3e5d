"""Task Arithmetic in the Tangent Space (Ortiz-Jimenez et al. 2023, arXiv 2305.12827): editing by sums of task vectors.

Fine-tuning from theta_0 on task t gives a task vector, and a model is edited by adding multiples of such vectors::

    tau_t = theta_t* - theta_0                    theta = theta_0 + sum_t alpha_t tau_t                     (eq. 1)

alpha > 0 adds tasks, alpha < 0 takes one away. The vectors of different tasks do not disturb each other where weights
are *disentangled*: f(x; theta) = g_0(x) + sum_t g_t(x; alpha_t tau_t) with g_t = 0 off the inputs of task t. How far a
pair of tasks is from that is measured on a grid of multiples, each task by its own head::

    xi(a_1, a_2) = sum_i E_{x ~ mu_i} 1[ argmax f(x; theta_0 + a_i tau_i)
                                      != argmax f(x; theta_0 + a_1 tau_1 + a_2 tau_2) ]

Three ways to edit, by what is fine-tuned and what is evaluated. ``linearize`` makes the second from the first::

    f_lin(x; theta) = f(x; theta_0) + < grad f(x; theta_0), theta - theta_0 >            (one Jacobian-vector product)

    standard    fine-tune f,     edit f
    post-hoc    fine-tune f,     edit f_lin
    linear      fine-tune f_lin, edit f_lin

Heads are frozen: they are no part of theta. With an affine head, linearising trunk and head together with respect to
the trunk alone is the same function as the head after the linearised trunk. Theta_0 is constant, normalisation
statistics are those of theta_0. Which eigenvectors of the tangent kernel carry a task is in ``analysis/tangent.py``.

As released: weight decay in linear training pulls theta, not theta - theta_0. Differs from the release: vectors that do
not fit are refused, not dropped; the control floor of negation is an argument, and without a feasible alpha the answer
is 0 with a flag, not None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mechlab.core import select

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Int

Params = Any
Apply = Callable[[Params, jax.Array], jax.Array]
"""``apply(params, x) -> logits (N, C)``."""

ALPHAS = tuple(round(0.05 * i, 2) for i in range(21))
"""The multiples that the benchmark tries: 0, 0.05 .. 1."""


def task_vector(tuned: Params, base: Params) -> Params:
    """tau = theta* - theta_0, every floating-point leaf; leaves of other types become 0, and stay as they are in edits.

    Args:
      tuned, base: parameters of one structure, shapes and dtypes.

    Returns:
      A pytree like ``base``.

    Raises:
      ValueError: naming the first path that is missing, or differs in shape or dtype, or (where values are known) is
        not finite.

    >>> task_vector({"w": jnp.ones(2)}, {"w": jnp.zeros(2)})["w"].tolist()
    [1.0, 1.0]
    """
    _require_alike(base, tuned, "the tuned parameters")
    return jax.tree.map(lambda t, b: t - b if _floating(b) else jnp.zeros_like(b), tuned, base)


def apply_task_vectors(base: Params, vectors: Sequence[Params], alphas: float | Sequence[Any] | jax.Array) -> Params:
    """theta_0 + sum_t alpha_t tau_t: a transform of parameters. At alpha = 0 it returns theta_0 to the bit.

    Args:
      base: theta_0.
      vectors: tau_1 .. tau_T, each like ``base``.
      alphas: (T,) multiples, or one for all (as in the benchmark); may be traced.

    Raises:
      ValueError: no vectors, another number of multiples, or a vector that does not fit, as ``task_vector``.

    >>> base, vector = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    >>> apply_task_vectors(base, [vector, vector], [0.5, 1.0])["w"].tolist()
    [1.5, 1.5]
    """
    if not len(vectors):
        raise ValueError("vectors: wanted at least one task vector, got none.")
    for i, vector in enumerate(vectors):
        _require_alike(base, vector, f"task vector {i}")
    shape = (len(alphas),) if isinstance(alphas, Sequence) else np.shape(alphas)  # a sequence may hold tracers
    if shape not in ((), (len(vectors),)):
        raise ValueError(f"alphas: wanted one number, or one for each of {len(vectors)} vectors, got shape {shape}.")
    each = [alphas[i] if shape else alphas for i in range(len(vectors))]  # type: ignore[index]

    def moved(leaf: Any, *taus: Any) -> Any:
        if not _floating(leaf):
            return leaf
        step = sum(jnp.asarray(alpha, leaf.dtype) * tau for alpha, tau in zip(each, taus, strict=True))
        return leaf + step

    return jax.tree.map(moved, base, *vectors)


def negate(base: Params, vector: Params, alpha: float | jax.Array = 1.0) -> Params:
    """theta_0 - alpha tau: forget a task. Raises as ``apply_task_vectors``."""
    return apply_task_vectors(base, [vector], -jnp.asarray(alpha))


def tangent(
    apply: Apply, base: Params, direction: Params, x: Float[Array, "N ..."]
) -> tuple[Float[Array, "N C"], Float[Array, "N C"]]:
    """f(x; theta_0) and < grad f(x; theta_0), d >: all there is to know of f_lin along one direction.

    f_lin is affine, so edited outputs are ``f0 + alpha_1 df_1 + alpha_2 df_2 ...``: a grid of multiples costs one
    Jacobian-vector product a vector, about two forwards.

    Args:
      apply: pure.
      base: theta_0.
      direction: like ``base``, e.g. a task vector. Leaves may be wider than those of ``base`` (a float32 change of
        bfloat16 parameters); they are cast here.
      x: inputs.

    Returns:
      f0 and df, each shaped like the output.

    Raises:
      ValueError: ``apply`` also returns new state, or the parameters hold a random key: such a model is in training
        mode (batch statistics, dropout), and has no linearisation at theta_0.
    """
    _require_evaluation(apply, base, x)
    moving = {path: leaf for path, leaf in select.get(base, "**").items() if _floating(leaf)}
    steps = select.get(direction, "**")
    along = {path: jnp.asarray(steps[path], leaf.dtype) for path, leaf in moving.items()}
    return jax.jvp(lambda chosen: apply(select.put(base, chosen), x), (moving,), (along,))


def linearize(apply: Apply, base: Params) -> Apply:
    """f_lin(x; theta) = f(x; theta_0) + < grad f(x; theta_0), theta - theta_0 >, as a model like any other.

    Affine in theta, equal to f at theta_0. Training it differentiates through the product: two to three times the cost
    of training f. Survives jit, vmap and grad.

    Args:
      apply: f, pure.
      base: theta_0, a constant of the returned function.

    Returns:
      ``apply_lin(params, x)``. ``params`` may be of a wider dtype than ``base``: theta - theta_0 is taken in float32
      at least, because a small change is lost in bfloat16.

    Raises:
      ValueError: when called, as ``tangent``; also for parameters of another structure or other shapes.

    >>> square = lambda params, x: params["w"] ** 2 * x
    >>> f_lin = linearize(square, {"w": jnp.asarray(3.0)})
    >>> float(f_lin({"w": jnp.asarray(4.0)}, jnp.asarray(1.0)))      # 9 + 2 * 3 * (4 - 3)
    15.0
    """

    def apply_lin(params: Params, x: jax.Array) -> jax.Array:
        _require_alike(base, params, "params", same_dtype=False)

        def change(new: Any, old: Any) -> Any:
            if not _floating(old):
                return old
            wide = jnp.promote_types(jnp.asarray(old).dtype, jnp.float32)
            return jnp.asarray(new, wide) - jnp.asarray(old, wide)

        f0, df = tangent(apply, base, jax.tree.map(change, params, base), x)
        return f0 + df

    return apply_lin


def disentanglement_error(
    applies: tuple[Apply, Apply],
    base: Params,
    vectors: tuple[Params, Params],
    inputs: tuple[Float[Array, "N1 ..."], Float[Array, "N2 ..."]],
    alphas: tuple[Sequence[float] | ArrayLike, Sequence[float] | ArrayLike],
) -> Float[Array, "A1 A2"]:
    """xi(a_1, a_2) of a pair of tasks, for any f. The grid is a ``lax.map``, in the memory of one cell.

    Args:
      applies: f with the head of task 1, and of task 2.
      base: theta_0.
      vectors: tau_1, tau_2.
      inputs: inputs of task 1, of task 2; their numbers may differ.
      alphas: (A1,) and (A2,) multiples; each grid contains 0.

    Returns:
      (A1, A2) in [0, 2], a_1 along the rows; 0 at the origin. On an axis, where one task's edit is 0, what is left is
      how far the other's edit disturbs it: at most 1.

    Raises:
      ValueError: a grid that is empty or without 0, or vectors as in ``apply_task_vectors``.
    """
    zeros = _checked_pair(base, vectors, alphas)

    def cell(pair: jax.Array) -> tuple[jax.Array, jax.Array]:
        edited = apply_task_vectors(base, vectors, pair)
        first, second = (apply(edited, x).argmax(-1) for apply, x in zip(applies, inputs, strict=True))
        return first, second

    grid = jnp.stack(jnp.meshgrid(*(jnp.asarray(a, jnp.result_type(float)) for a in alphas), indexing="ij"), -1)
    first, second = jax.lax.map(cell, grid.reshape(-1, 2))
    return _disagreement(first.reshape(*grid.shape[:2], -1), second.reshape(*grid.shape[:2], -1), zeros)


def linear_disentanglement_error(
    applies: tuple[Apply, Apply],
    base: Params,
    vectors: tuple[Params, Params],
    inputs: tuple[Float[Array, "N1 ..."], Float[Array, "N2 ..."]],
    alphas: tuple[Sequence[float] | ArrayLike, Sequence[float] | ArrayLike],
) -> Float[Array, "A1 A2"]:
    """``disentanglement_error`` of the linearised f, from four Jacobian-vector products instead of one a cell.

    The same numbers as ``disentanglement_error`` of ``linearize(apply, base)``, up to ties of the argmax in rounding.
    """
    zeros = _checked_pair(base, vectors, alphas)
    a1, a2 = (jnp.asarray(a, jnp.result_type(float)) for a in alphas)

    def classes(apply: Apply, x: jax.Array) -> jax.Array:
        (f0, df1), (_, df2) = (tangent(apply, base, vector, x) for vector in vectors)
        row = lambda a: (f0 + a * df1 + a2[:, None, None] * df2).argmax(-1)  # noqa: E731
        return jax.lax.map(row, a1)

    first, second = (classes(apply, x) for apply, x in zip(applies, inputs, strict=True))
    return _disagreement(first, second, zeros)


class Choice(NamedTuple):
    """A multiple chosen on validation data.

    Attributes:
      place: its index in the grid.
      alpha: its value.
      feasible: whether any multiple met the floor (always true for addition).
    """

    place: Int[Array, ""]
    alpha: Float[Array, ""]
    feasible: Bool[Array, ""]


def normalised_accuracy(accuracy: Float[Array, "... T"], single: Float[Array, "... T"]) -> Float[Array, "..."]:
    """mean_t acc_t / acc_t(single): 1 where the edited model does each task as well as that task's own model.

    Args:
      accuracy: of the edited model by task.
      single: of the task's own model, at alpha = 1 and in the *same mode*; mixed references turn the ranking round.
    """
    return (accuracy / single).mean(-1)


def addition_alpha(
    accuracy: Float[Array, "A T"], single: Float[Array, " T"], alphas: Sequence[float] | ArrayLike = ALPHAS
) -> Choice:
    """The shared alpha with the largest normalised accuracy on validation data; ties go to the first.

    Args:
      accuracy: of every task under every multiple.
      single: accuracy of every task's own model.
      alphas: (A,) multiples, with 0.

    Raises:
      ValueError: a grid without 0, or another number of rows.
    """
    grid = _grid(alphas, accuracy)
    index = normalised_accuracy(accuracy, single).argmax(-1)
    return Choice(index, grid[index], jnp.asarray(True))


def negation_alpha(
    target: Float[Array, " A"],
    control: Float[Array, " A"],
    pretrained: float | jax.Array,
    alphas: Sequence[float] | ArrayLike = ALPHAS,
    *,
    floor: float = 0.95,
) -> Choice:
    """The alpha that forgets most: smallest target accuracy with control accuracy >= floor * the pre-trained one.

    Args:
      target, control: accuracies under theta_0 - alpha tau, on validation data.
      pretrained: control accuracy of theta_0.
      alphas: (A,) multiples, with 0.
      floor: share of control accuracy to keep, in (0, 1].

    Returns:
      The choice; ties go to the first. If no multiple meets the floor, alpha = 0 and ``feasible`` is false.

    Raises:
      ValueError: ``floor`` out of range, a grid without 0, or another number of accuracies.
    """
    if not 0 < floor <= 1:
        raise ValueError(f"floor must be in (0, 1], got {floor}.")
    grid, zero = _grid(alphas, target), _zero_of("alphas", alphas)
    if np.shape(control)[:1] != np.shape(target)[:1]:
        raise ValueError(f"control: wanted as many as target, {np.shape(target)}, got {np.shape(control)}.")
    allowed = control >= floor * pretrained
    feasible = allowed.any()
    index = jnp.where(feasible, jnp.where(allowed, target, jnp.inf).argmin(), zero)
    return Choice(index, grid[index], feasible)


def nonlinear_advantage(nonlinear: ArrayLike, linear: ArrayLike, classes: ArrayLike) -> Float[Array, "..."]:
    """[acc(f fine-tuned) - acc(f_lin fine-tuned)] / (1 - 1/C): what training f gains over training f_lin."""
    return (jnp.asarray(nonlinear) - jnp.asarray(linear)) / (1 - 1 / jnp.asarray(classes))


def fine_tuning_optimiser(
    rate: float | jax.Array, steps: int, *, warmup: int = 500, weight_decay: float = 0.1, clip: float = 1.0
) -> optax.GradientTransformation:
    """The paper's recipe: gradient norm clipped to 1, then AdamW with linear warm-up and a cosine to 0.

    Args:
      rate: peak learning rate (the paper: 1e-5 for CLIP); may be traced, so that it can be a lane.
      steps, warmup: length of training (about 2,000 in the paper) and of its warm-up, 0 <= warmup < steps.
      weight_decay, clip: pull on theta itself, in linear mode too; largest global norm of the gradient.

    Raises:
      ValueError: ``warmup`` not in [0, steps).
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup must be at least 0 and below the {steps} steps, got {warmup}.")
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, steps)
    adamw = optax.adamw(lambda step: rate * shape(step), weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip), adamw)


def relative_norm(vector: Params, base: Params) -> Float[Array, ""]:
    """‖tau‖ / ‖theta_0‖ over all floating-point leaves: how far fine-tuning went."""
    norms = [optax.tree_utils.tree_norm([x for x in jax.tree.leaves(tree) if _floating(x)]) for tree in (vector, base)]
    return norms[0] / norms[1]


def _checked_pair(base: Params, vectors: Sequence[Params], alphas: Sequence[Any]) -> tuple[int, int]:
    for i, vector in enumerate(vectors):
        _require_alike(base, vector, f"task vector {i}")
    return _zero_of("alphas[0]", alphas[0]), _zero_of("alphas[1]", alphas[1])


def _disagreement(first: jax.Array, second: jax.Array, zeros: tuple[int, int]) -> jax.Array:
    # The model with one task's edit alone is the cell of the grid where the other multiple is 0.
    return (first != first[:, zeros[1], None]).mean(-1) + (second != second[zeros[0]]).mean(-1)


def _zero_of(name: str, alphas: Sequence[float] | ArrayLike) -> int:
    grid = np.asarray(alphas)
    if grid.ndim != 1 or not (grid == 0).any():
        raise ValueError(f"{name}: wanted a grid (A,) of multiples that contains 0, got {grid}.")
    return int(np.flatnonzero(grid == 0)[0])


def _grid(alphas: Sequence[float] | ArrayLike, rows: jax.Array) -> jax.Array:
    _zero_of("alphas", alphas)
    if len(np.asarray(alphas)) != len(rows):
        raise ValueError(f"accuracies: wanted one row for each of {len(np.asarray(alphas))} alphas, got {len(rows)}.")
    return jnp.asarray(alphas)


def _floating(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def _require_alike(base: Params, other: Params, what: str, *, same_dtype: bool = True) -> None:
    wanted, given = select.matching(base, "**"), select.matching(other, "**")
    for path in [*wanted, *given]:
        if (path in wanted) != (path in given):
            raise ValueError(f'{what}: "{path}" is {"missing" if path in wanted else "not a parameter of the base"}.')
    for path, leaf in wanted.items():
        if np.shape(given[path]) != np.shape(leaf):
            raise ValueError(f'{what}: "{path}" has shape {np.shape(given[path])}, wanted {np.shape(leaf)}.')
        dtypes = jnp.result_type(given[path]), jnp.result_type(leaf)
        if same_dtype and dtypes[0] != dtypes[1]:
            raise ValueError(f'{what}: "{path}" has dtype {dtypes[0]}, wanted {dtypes[1]}.')
    structures: list[Any] = [jax.tree.structure(tree) for tree in (base, other)]
    if structures[0] != structures[1]:
        raise ValueError(f"{what}: {structures[1]} is not the structure {structures[0]} of the base.")
    for path, leaf in given.items():
        if not isinstance(leaf, jax.core.Tracer) and _floating(leaf) and not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(f'{what}: "{path}" is not finite.')


def _require_evaluation(apply: Apply, base: Params, x: jax.Array) -> None:
    for path, leaf in select.get(base, "**").items():
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            raise ValueError(f'linearize: "{path}" is a random key: run the model in evaluation mode, without dropout.')
    output = jax.eval_shape(apply, base, x)
    if not isinstance(output, jax.ShapeDtypeStruct):
        kinds = jax.tree.structure(output)
        why = "a model that returns new state (batch statistics) is in training mode: run it in evaluation mode"
        raise ValueError(f"linearize: wanted one array of outputs, got {kinds}; {why}.")
