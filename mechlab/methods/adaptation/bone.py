"""Bone: Block Affine Transformation (Kang 2024, arXiv 2409.15371, first version; later "Block-Affine Adaptation", BAT).

The frozen weight W (out, in) is cut into r x r blocks W_ab (a of out / r, b of in / r). A small trainable matrix, zero
before training, acts on the blocks from the right and is added to them: the weight itself guides its change::

    Bone-col     M (out/r, r, r)      dW_ab = W_ab M_a + M_a        the method; later called BAT
    Bone-row     M (in/r, r, r)       dW_ab = W_ab M_b + M_b
    Bone-AB      A, B (in/r, r, r)    dW_ab = W_ab A_b + B_b
    Bone-free    M (r, r)             dW_ab = W_ab M + M
    guide only   M (out/r, r, r)      dW_ab = W_ab M_a              ablation, our choice
    MiSS         M (r, out)           dW[o, b r + j] = M[j, o]      no guide; the author's later default
    MiSS-mini    M (r, m)             as MiSS, M tiled out / m times along the outputs

    dL/dM_a = sum_b (W_ab^T + I) dL/dW'_ab,    not zero at M = 0, as the gradient of LoRA's A is at B = 0

"Bone" has meant Bone-col (2024), MiSS (2025) and BAT (Bone-col again): only the names above are used here. Kernels are
(in, out), so W is their transpose; M, A, B keep the paper's meaning. There is no scale, no alpha and no dropout.

Cost: a merge multiplies in * out * r numbers per matrix and step, as much as a forward of r tokens. MiSS needs none
(``miss_forward``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core import linalg, select
from mechlab.core.transforms import Adapter, AdapterState, Params
from mechlab.methods.adaptation.matrices import add_to_matrices, get_matrices, put_matrices

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Delta = Callable[..., jax.Array]
"""``delta(kernel (in, out), **trained) -> change (in, out)``."""

LARGEST_CONDITION = 1e8
"""Of I + M_a, above which ``bone_unmerge`` refuses."""


def bone_col(block: int, *, pattern: str = "**/kernel") -> Adapter:
    """Bone-col, the method: dW_ab = W_ab M_a + M_a.

    Args:
      block: r, divides both sides of every matrix.
      pattern: glob over parameter paths; layouts as in ``matrices.py``.

    Returns:
      An adapter with state ``{path: {"M": (..., out/r, r, r)}}``: out * r numbers per matrix, zero at first. Its
      ``init`` raises ValueError naming path, shape and r where r does not divide, or a leaf is no matrix.

    Raises:
      ValueError: block < 1.
    """
    return _blocks("bone_col", block, pattern, lambda i, o: {"M": (o // block, block, block)}, bone_col_delta)


def bone_row(block: int, *, pattern: str = "**/kernel") -> Adapter:
    """Bone-row: one matrix per column of blocks, in * r numbers; otherwise as ``bone_col``."""
    return _blocks("bone_row", block, pattern, lambda i, o: {"M": (i // block, block, block)}, bone_row_delta)


def bone_ab(block: int, *, pattern: str = "**/kernel") -> Adapter:
    """Bone-AB: multiplying and added matrix apart, 2 in * r numbers; otherwise as ``bone_col``."""
    shape = lambda i, o: {name: (i // block, block, block) for name in "AB"}  # noqa: E731
    return _blocks("bone_ab", block, pattern, shape, bone_ab_delta)


def bone_free(block: int, *, pattern: str = "**/kernel") -> Adapter:
    """Bone-free: one matrix for all blocks, r * r numbers; otherwise as ``bone_col``."""
    return _blocks("bone_free", block, pattern, lambda i, o: {"M": (block, block)}, bone_free_delta)


def guide_only(block: int, *, pattern: str = "**/kernel") -> Adapter:
    """The ablation dW_ab = W_ab M_a; otherwise as ``bone_col``."""
    return _blocks("guide_only", block, pattern, lambda i, o: {"M": (o // block, block, block)}, guide_only_delta)


def miss(rank: int, *, pattern: str = "**/kernel") -> Adapter:
    """MiSS, Bone-col without the guide: dW[o, b r + j] = M[j, o], of rank at most r.

    Args:
      rank: r, at most ``in``; it need not divide it.
      pattern: glob over parameter paths.

    Returns:
      An adapter with state ``{path: {"M": (..., r, out)}}``; its ``init`` raises ValueError for r > in.

    Raises:
      ValueError: rank < 1.
    """
    return _sums("miss", rank, pattern, lambda path, out: out, lambda kernel, M: miss_delta(M, *kernel.shape[-2:]))


def miss_mini(rank: int, width: int, *, pattern: str = "**/kernel") -> Adapter:
    """MiSS with M (r, m) repeated along the outputs; ``init`` raises ValueError where m does not divide out."""

    def width_of(path: str, out: int) -> int:
        if width < 1 or out % width:
            raise ValueError(f'miss_mini: width {width} does not divide the {out} outputs of "{path}".')
        return width

    return _sums("miss_mini", rank, pattern, width_of, lambda kernel, M: miss_delta(M, *kernel.shape[-2:]))


def bone_col_delta(kernel: Float[Array, "i o"], M: Float[Array, "a r r"]) -> Float[Array, "i o"]:
    """W_ab M_a + M_a, transposed.

    Args:
      kernel: W^T, (in, out).
      M: (out/r, r, r).

    Returns:
      The change of the kernel, (in, out).
    """
    blocks = _cut(kernel, M.shape[-1])
    return (jnp.einsum("bkai,akj->bjai", blocks, M) + M.transpose(2, 0, 1)).reshape(kernel.shape)


def bone_row_delta(kernel: Float[Array, "i o"], M: Float[Array, "b r r"]) -> Float[Array, "i o"]:
    """W_ab M_b + M_b, transposed; arguments as in ``bone_col_delta``, M (in/r, r, r)."""
    return bone_ab_delta(kernel, M, M)


def bone_ab_delta(
    kernel: Float[Array, "i o"], A: Float[Array, "b r r"], B: Float[Array, "b r r"]
) -> Float[Array, "i o"]:
    """W_ab A_b + B_b, transposed; A, B (in/r, r, r)."""
    blocks = _cut(kernel, A.shape[-1])
    return (jnp.einsum("bkai,bkj->bjai", blocks, A) + B.transpose(0, 2, 1)[:, :, None]).reshape(kernel.shape)


def bone_free_delta(kernel: Float[Array, "i o"], M: Float[Array, "r r"]) -> Float[Array, "i o"]:
    """W_ab M + M, transposed; M (r, r)."""
    blocks = _cut(kernel, M.shape[-1])
    return (jnp.einsum("bkai,kj->bjai", blocks, M) + M.T[:, None]).reshape(kernel.shape)


def guide_only_delta(kernel: Float[Array, "i o"], M: Float[Array, "a r r"]) -> Float[Array, "i o"]:
    """W_ab M_a, transposed; M (out/r, r, r)."""
    return jnp.einsum("bkai,akj->bjai", _cut(kernel, M.shape[-1]), M).reshape(kernel.shape)


def miss_delta(M: Float[Array, "r m"], inputs: int, outputs: int) -> Float[Array, "i o"]:
    """M repeated down the inputs (the last repetition cut where r does not divide) and along the outputs."""
    rank, width = M.shape
    return jnp.tile(M, (-(-inputs // rank), outputs // width))[:inputs]


def bone_col_forward(
    x: Float[Array, "... i"], kernel: Float[Array, "i o"], M: Float[Array, "a r r"]
) -> Float[Array, "... o"]:
    """x W'^T of one layer, W' made again in the backward pass instead of kept (``jax.checkpoint``).

    The term x_b M_a depends on a and b, so nothing cheaper than W' serves all blocks.
    """
    return jax.checkpoint(lambda x, M: x @ (kernel + bone_col_delta(kernel, M)))(x, M)


def miss_forward(
    x: Float[Array, "... i"], kernel: Float[Array, "i o"], M: Float[Array, "r o"]
) -> Float[Array, "... o"]:
    """y = W x + M^T (sum over b of x_b), x padded with zeros to a multiple of r: no merged weight is made."""
    rank = M.shape[0]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % rank)])
    return x @ kernel + padded.reshape(*x.shape[:-1], -1, rank).sum(-2) @ M


def bone_unmerge(params: Params, state: AdapterState) -> Params:
    """The base back from parameters merged with ``bone_col``: W_ab = (W'_ab - M_a)(I + M_a)^-1.

    Args:
      params: merged parameters.
      state: of ``bone_col``.

    Returns:
      The parameters before the merge, up to rounding.

    Raises:
      ValueError: I + M_a of a condition number above 1e8, with the path (not checked while tracing).
    """

    def restore(path: str, merged: jax.Array, M: jax.Array) -> jax.Array:
        invertible = jnp.eye(M.shape[-1], dtype=M.dtype) + M
        if not isinstance(M, jax.core.Tracer):
            condition = float(np.linalg.cond(np.asarray(invertible, np.float64)).max())
            if not condition <= LARGEST_CONDITION:
                raise ValueError(f'bone_unmerge: I + M at "{path}" is singular (condition number {condition:.1e}).')
        inverse = linalg.inv(invertible)

        def one(merged: jax.Array, M: jax.Array, inverse: jax.Array) -> jax.Array:
            blocks = _cut(merged, M.shape[-1]) - M.transpose(2, 0, 1)
            return jnp.einsum("bkai,akj->bjai", blocks, inverse).reshape(merged.shape)

        return _over_layers(one, merged)(merged, M, inverse)

    merged = get_matrices(params, "|".join(state.train))
    return put_matrices(params, {path: restore(path, merged[path], m["M"]) for path, m in state.train.items()})


def trained_numbers(adapter: Adapter, params: Params) -> int:
    """How many numbers an adapter trains on this model, without making them."""
    return select.count(jax.eval_shape(adapter.init, jax.random.key(0), params).train)


def _blocks(name: str, block: int, pattern: str, shapes: Callable[..., dict[str, Any]], delta: Delta) -> Adapter:
    if block < 1:
        raise ValueError(f"{name}: block must be at least 1, got {block}.")

    def shapes_at(path: str, inputs: int, outputs: int) -> dict[str, Any]:
        if inputs % block or outputs % block:
            raise ValueError(
                f'{name}: blocks of {block} do not divide "{path}", a matrix of {inputs} inputs and {outputs} outputs.'
            )
        return shapes(inputs, outputs)

    return _adapter(pattern, shapes_at, delta)


def _sums(name: str, rank: int, pattern: str, width_of: Callable[[str, int], int], delta: Delta) -> Adapter:
    if rank < 1:
        raise ValueError(f"{name}: rank must be at least 1, got {rank}.")

    def shapes_at(path: str, inputs: int, outputs: int) -> dict[str, Any]:
        if rank > inputs:
            raise ValueError(f'{name}: rank {rank} is above the {inputs} inputs of "{path}".')
        return {"M": (rank, width_of(path, outputs))}

    return _adapter(pattern, shapes_at, delta)


def _adapter(pattern: str, shapes_at: Callable[..., dict[str, Any]], delta: Delta) -> Adapter:
    """The adapter whose trained arrays have these shapes per matrix, start at zero, and change the kernel by delta."""

    def init(key: jax.Array, params: Params) -> AdapterState:
        train = {}
        for path, kernel in get_matrices(params, pattern).items():
            *stacked, inputs, outputs = kernel.shape
            shapes = shapes_at(path, inputs, outputs)
            train[path] = {name: jnp.zeros((*stacked, *shape), kernel.dtype) for name, shape in shapes.items()}
        return AdapterState(train)

    def merge(params: Params, state: AdapterState) -> Params:
        kernels = get_matrices(params, "|".join(state.train))
        changes = {}
        for path, trained in state.train.items():
            # bfloat16: the change is computed and added in float32.
            wide = jnp.promote_types(kernels[path].dtype, jnp.float32)
            arguments = jax.tree.map(lambda leaf, wide=wide: leaf.astype(wide), trained)
            kernel = kernels[path].astype(wide)
            changes[path] = _over_layers(lambda kernel, m: delta(kernel, **m), kernel)(kernel, arguments)
        return add_to_matrices(params, changes)

    return Adapter(init, merge)


def _cut(kernel: jax.Array, block: int) -> jax.Array:
    """Blocks (b, j, a, i) of a kernel (in, out): entry [b, j, a, i] is W_ab[i, j]."""
    inputs, outputs = kernel.shape
    return kernel.reshape(inputs // block, block, outputs // block, block)


def _over_layers(function: Callable[..., jax.Array], kernel: jax.Array) -> Callable[..., jax.Array]:
    return jax.vmap(function) if kernel.ndim == 3 else function
