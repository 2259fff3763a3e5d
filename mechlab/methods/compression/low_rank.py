"""LoRC (arXiv 2303.08302): a matrix of low rank beside a quantised kernel makes good most of its error.

With the error of any quantisation, kernels (in, out)::

    E = W - W_q = U S V^T,        A = U_m S_m^(1/2),        B = S_m^(1/2) V_m^T,        x W ~ x W_q + (x A) B

which is the best of rank m in the Frobenius norm (Eckart and Young): what remains is the sum of the squared singular
values from m + 1 on. Weighted by the inputs' Hessian H (ours), the error of the outputs is what is best approximated:
the factors are those of H^(1/2) E, the left one times H^(-1/2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from mechlab.core import linalg
from mechlab.core.kernel_forms import LowRank, QTensor

if TYPE_CHECKING:
    import jax
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float


def lorc(
    error: Float[ArrayLike, "I O"], rank: int, hessian: Float[ArrayLike, "I I"] | None = None
) -> tuple[Float[Array, "I R"], Float[Array, "R O"]]:
    """The factors A and B of an error.

    Args:
      error: E, (in, out).
      rank: m, 0 .. min(in, out).
      hessian: (in, in), to weight by; known values.

    Raises:
      ValueError: a rank out of range, or a Hessian of another size.
    """
    e = jnp.asarray(error, jnp.float32)
    if e.ndim != 2 or not 0 <= rank <= min(e.shape):
        raise ValueError(f"lorc: wanted a rank of 0..{min(e.shape, default=0)} for an error (in, out), got {rank}.")
    back = jnp.eye(len(e))
    if hessian is not None:
        h = np.asarray(hessian, np.float64)
        if h.shape != (len(e), len(e)):
            raise ValueError(f"lorc: wanted a Hessian ({len(e)}, {len(e)}), got {h.shape}.")
        values, vectors = np.linalg.eigh(h)
        # Directions without input cost nothing, and get nothing.
        roots = np.sqrt(np.maximum(values, 1e-8 * values.max()))
        e = jnp.asarray((vectors * roots) @ vectors.T, jnp.float32) @ e
        back = jnp.asarray((vectors / roots) @ vectors.T, jnp.float32)
    u, s, vt = linalg.svd(e)
    root = jnp.sqrt(s[:rank])
    return back @ (u[:, :rank] * root), root[:, None] * vt[:rank]


def compensate(
    kernel: jax.Array, quantised: QTensor, rank: int, hessian: Float[ArrayLike, "I I"] | None = None
) -> LowRank:
    """The quantised kernel with what is left of the kernel, to rank m, beside it; ``linear`` never adds them up.

    Args:
      kernel: as it was, input axes first.
      quantised: what it became.
      rank, hessian: as in ``lorc``.

    Raises:
      ValueError: kernels of different shapes; otherwise as ``lorc``.
    """
    if kernel.shape != quantised.shape:
        raise ValueError(f"compensate: the kernel has shape {kernel.shape}, the quantised one {quantised.shape}.")
    fan_in, fan_out = quantised.codes.shape
    a, b = lorc((kernel - quantised.dequantise()).reshape(fan_in, fan_out), rank, hessian)
    # The kernel's own axes, in front of and behind the rank.
    split = next(n for n in range(1, kernel.ndim) if int(np.prod(kernel.shape[:n])) == fan_in)
    return LowRank(quantised, a.reshape(*kernel.shape[:split], rank), b.reshape(rank, *kernel.shape[split:]))
