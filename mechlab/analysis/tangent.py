"""Tangent kernels: how alike two items are to a network's gradient, and how much such a kernel turns in training.

The empirical kernel of f(x; theta) at given parameters (Jacot et al. 2018, arXiv 1806.07572)::

    J[i, c] = d f_c(x_i; theta) / d theta          K[i, c, j, c'] = < J[i, c], J[j, c'] >

Its eigenvectors say where a linearised network can learn what (``eigenvector_localisation``, ``local_energy``), and
solve its training in closed form (``kernel_flow``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core import linalg
from mechlab.core.select import get, put

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


def empirical_ntk(
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    x: Float[Array, "N ..."],
    *,
    select: str = "**",
    contract: bool = False,
    block: int = 64,
) -> Float[Array, "..."]:
    """K = J Jᵀ over all items and outputs, without ever holding J.

    Jacobians are made for two blocks of items at a time, so memory grows with ``block`` and not with N:
    2 · block · outputs · parameters numbers beside K itself. The price is N / block passes over the items (one pass if
    all fit into one block).

    Args:
      apply: ``apply(params, x) -> (N, ...)``. Items lie along the first axis of input and output and must not see each
        other; every item is evaluated in a batch of its own.
      params: pytree; floating-point leaves where selected.
      x: (N, ...) items.
      select: which parameters the gradient is taken of, a glob over their paths (``core.select``); all by default.
      contract: sum over outputs, K[i, j] = Σ_c K[i, c, j, c].
      block: items per block.

    Returns:
      ``(N, *outputs, N, *outputs)``, or (N, N) with ``contract``; symmetric, positive semidefinite, in the dtype of the
      gradients. Survives jit, vmap over parameters, and grad.

    Raises:
      KeyError: no parameter has such a path.
      ValueError: no items, ``block`` < 1, or an output whose first axis is not that of the items.

    >>> x = jnp.arange(6.0).reshape(3, 2)
    >>> linear = lambda params, x: x @ params["kernel"]
    >>> k = empirical_ntk(linear, {"kernel": jnp.ones((2, 1))}, x, contract=True)
    >>> bool(jnp.allclose(k, x @ x.T))
    True
    """
    items = np.shape(x)[:1]
    if not items or items[0] == 0:
        raise ValueError(f"x: wanted items along a first axis, got shape {np.shape(x)}.")
    if block < 1:
        raise ValueError(f"block: wanted at least 1 item, got {block}.")
    shape = jax.eval_shape(apply, params, x).shape
    if shape[:1] != items:
        raise ValueError(f"apply: wanted outputs of {items[0]} items along the first axis, got shape {shape}.")
    chosen, n, outputs = get(params, select), items[0], shape[1:]
    block = min(block, n)

    def one(chosen: dict[str, jax.Array], item: jax.Array) -> jax.Array:
        return apply(put(params, chosen), item[None])[0]

    def rows(part: jax.Array) -> jax.Array:
        jacobian = jax.vmap(jax.jacrev(one), (None, 0))(chosen, part)
        flat = jnp.concatenate([leaf.reshape(block, int(np.prod(outputs)), -1) for leaf in jacobian.values()], -1)
        return flat.reshape(block if contract else block * flat.shape[1], -1)

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(left, right.T, precision=jax.lax.Precision.HIGHEST)

    blocks = -(-n // block)
    x = jnp.asarray(x)
    if blocks == 1:
        left = rows(x)
        kernel = product(left, left)
    else:
        padded = jnp.concatenate([x, jnp.repeat(x[:1], blocks * block - n, 0)]).reshape(blocks, block, *x.shape[1:])

        def strip(part: jax.Array) -> jax.Array:
            left = rows(part)
            return jax.lax.map(lambda other: product(left, rows(other)), padded)

        strips = jax.lax.map(strip, padded)  # (blocks, blocks, rows, rows)
        side = blocks * strips.shape[-1]
        kernel = strips.swapaxes(1, 2).reshape(side, side)
    inner = () if contract else outputs
    kernel = kernel.reshape(blocks * block, *inner, blocks * block, *inner)
    return jax.lax.slice_in_dim(kernel[:n], 0, n, axis=1 + len(inner))


def kernel_alignment(
    first: Float[Array, "... M M"], second: Float[Array, "... M M"], *, center: bool = False
) -> Float[Array, "..."]:
    """⟨K, K'⟩ / (‖K‖ ‖K'‖) in the Frobenius product: in [0, 1] for positive semidefinite kernels.

    Args:
      first, second: (..., M, M).
      center: take the mean of rows and columns out of both (centred alignment, Cortes et al. 2012); off by default.

    Returns:
      (...). Each kernel is divided by its largest entry first, so that squares of a large float32 range stay finite.

    Raises:
      ValueError: not square or of different shapes; a zero kernel, where its values are known (NaN under jit).

    >>> float(kernel_alignment(jnp.eye(3), 5 * jnp.eye(3)))
    1.0
    """
    shapes = np.shape(first), np.shape(second)
    if shapes[0] != shapes[1] or len(shapes[0]) < 2 or shapes[0][-1] != shapes[0][-2]:
        raise ValueError(f"kernel_alignment: wanted two square kernels of one shape, got {shapes[0]} and {shapes[1]}.")
    kernels = [jnp.asarray(first), jnp.asarray(second)]
    if center:
        kernels = [
            k - k.mean(-1, keepdims=True) - k.mean(-2, keepdims=True) + k.mean((-1, -2), keepdims=True) for k in kernels
        ]
    largest = [jnp.abs(k).max((-1, -2), keepdims=True) for k in kernels]
    if not any(isinstance(k, jax.core.Tracer) for k in kernels) and any(bool((m == 0).any()) for m in largest):
        raise ValueError("kernel_alignment: a zero kernel has no direction to compare.")
    a, b = (k / m for k, m in zip(kernels, largest, strict=True))
    dot = lambda x, y: (x * y).sum((-1, -2))  # noqa: E731
    return dot(a, b) / jnp.sqrt(dot(a, a) * dot(b, b))


class Eigenspread(NamedTuple):
    """How a kernel's eigenvectors lie over two groups of items.

    Attributes:
      eigenvalues: (N,), descending.
      energy: (N,) e_ρ = Σ_{i in the first group} V_iρ², in [0, 1].
      localisation: (N,) |2 e_ρ - 1|: 1 for an eigenvector that lives on one group alone, 0 for one spread evenly.
    """

    eigenvalues: Float[Array, " N"]
    energy: Float[Array, " N"]
    localisation: Float[Array, " N"]


def eigenvector_localisation(kernel: Float[Array, "N N"], first: int) -> Eigenspread:
    """Energy of every eigenvector on the first of two groups of items (arXiv 2305.12827, section 5.2).

    Args:
      kernel: K = V Λ Vᵀ over the items of both groups, the first group's first; symmetric.
      first: n_1, items in the first group; half of all, because an even spread is e = n_1 / N.

    Raises:
      ValueError: not square, or groups of different sizes.

    >>> eigenvector_localisation(jnp.diag(jnp.arange(4.0)), 2).localisation.tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    values, vectors = _eigenpairs(kernel)
    if 2 * first != len(values):
        raise ValueError(f"first: wanted two groups of one size, got {first} of {len(values)} items.")
    energy = jnp.square(vectors[:first]).sum(0)
    return Eigenspread(values, energy, jnp.abs(2 * energy - 1))


def local_energy(
    kernel: Float[Array, "N N"],
    residual: Float[Array, "N C"],
    mask: Bool[Array, " N"],
    *,
    share: float = 0.95,
) -> Float[Array, " N"]:
    """E_loc(x_i) = Σ_{ρ in S} V_iρ²: how much of item i the eigenvectors that carry a task's target cover.

    S is the smallest set of eigenvectors with ``share`` of the energy of the task's residual (what training has to add
    to the outputs), which is zero off the task. Large on the task and small elsewhere if those eigenvectors are local.

    Args:
      kernel: K = V Λ Vᵀ over the items of all tasks, symmetric.
      residual: targets minus outputs, e.g. one-hot labels minus f_0.
      mask: the items of the task.
      share: in (0, 1].

    Returns:
      (N,) in [0, 1].

    Raises:
      ValueError: not square, other lengths, or ``share`` out of range.

    >>> mask = jnp.asarray([True, True, False, False])
    >>> local_energy(jnp.diag(jnp.arange(4.0)), jnp.ones((4, 1)), mask).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}.")
    _, vectors = _eigenpairs(kernel)
    lengths = len(vectors), len(residual), len(mask)
    if len(set(lengths)) != 1:
        raise ValueError(f"kernel, residual, mask: wanted one number of items, got {lengths}.")
    carried = jnp.square(vectors.T @ (jnp.asarray(residual) * jnp.asarray(mask)[:, None])).sum(-1)
    order = jnp.argsort(-carried)
    sums = jnp.cumsum(carried[order])
    # An eigenvector belongs to S if those before it do not yet carry the share.
    inside = (sums - carried[order]) < share * sums[-1]
    return (jnp.square(vectors[:, order]) * inside).sum(-1)


def kernel_flow(
    kernel: Float[Array, "M M"],
    cross: Float[Array, "Q M"],
    residual: Float[Array, " M"],
    *,
    time: float | jax.Array | None = None,
) -> Float[Array, " Q"]:
    """What gradient flow on squared loss adds to a linearised model's outputs: kernel regression, or the way there.

    For the loss ½ Σ_m (f_lin(x_m) - y_m)², the outputs at other points move by

        Δf(x) = K(x, X) K⁻¹ (1 - e^{-K t}) (y - f_0(X))

    Args:
      kernel: K(X, X), positive definite; rows are (item, output) pairs.
      cross: K(x, X) of Q outputs elsewhere.
      residual: y - f_0(X).
      time: t = learning rate · steps; None for t → ∞.

    Raises:
      ValueError: shapes that do not fit.

    >>> kernel_flow(2 * jnp.eye(1), jnp.ones((1, 1)), jnp.ones(1)).tolist()
    [0.5]
    """
    if np.shape(cross)[1:] != np.shape(residual) or np.shape(kernel) != np.shape(residual) * 2:
        shapes = np.shape(kernel), np.shape(cross), np.shape(residual)
        raise ValueError(f"kernel_flow: wanted shapes (M, M), (Q, M) and (M,), got {shapes}.")
    values, vectors = _eigenpairs(kernel)
    reached = 1 / values if time is None else -jnp.expm1(-values * time) / values
    return cross @ (vectors @ (reached * (vectors.T @ residual)))


def _eigenpairs(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, descending, and the eigenvectors as columns."""
    shape = np.shape(kernel)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"kernel: wanted a square matrix, got shape {shape}.")
    values, vectors = linalg.eigh(jnp.asarray(kernel))
    return values[::-1], vectors[:, ::-1]
