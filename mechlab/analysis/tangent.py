"""Tangent kernels: how alike two items are to a network's gradient, and how much such a kernel turns in training.

The empirical kernel of f(x; theta) at given parameters (Jacot et al. 2018, arXiv 1806.07572)::

    J[i, c] = d f_c(x_i; theta) / d theta          K[i, c, j, c'] = < J[i, c], J[j, c'] >
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.select import get, put

if TYPE_CHECKING:
    from jaxtyping import Array, Float


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
      (N, *outputs, N, *outputs), or (N, N) with ``contract``; symmetric, positive semidefinite, dtype of the gradients.
      Survives jit, vmap over parameters, and grad.

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
