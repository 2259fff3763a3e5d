"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv 2106.09685), and its variants.

A kernel W stays frozen; its change has rank r::

    W' = W + s A B,    A (in, r), B (r, out), s = alpha / r                                              (section 4.1)

    LoRA      A random, B = 0
    LoRA+     the same with a learning rate of B 16 times that of A                                  (arXiv 2402.12354)
    DoRA      W' = m (W + s A B) / |W + s A B|, m one trained number per output                      (arXiv 2402.09353)
    PiSSA     A B = the r largest singular components of W                                           (arXiv 2404.02948)
    OLoRA     W^T = Q R, B^T = the first r columns of Q, A^T = the first r rows of R                 (arXiv 2406.01775)
    LoRA-GA   from the gradient G = u S v of one batch: A = c u[:, :r], B = c v[r:2r]                (arXiv 2407.05000)

Kernels are (in, out), so A reads and B writes; the papers' W is the transpose. Layouts as in ``matrices.py``. PiSSA,
OLoRA and LoRA-GA start from A0, B0 that are not zero and take s A0 B0 off the frozen weight: W' = W + s (A B - A0 B0),
which is W to the bit at the start. All are adapters in weight space: dropout on a layer's input is none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mechlab.analysis.linalg import randomised_svd, truncated_svd
from mechlab.core import linalg
from mechlab.core.rng import stream
from mechlab.core.transforms import Adapter, AdapterState, Params
from mechlab.methods.adaptation.matrices import add_to_matrices, get_matrices, put_beside, put_matrices

Initialiser = Callable[[jax.Array, tuple[int, ...], int], jax.Array]

Factors = Callable[[jax.Array, str, jax.Array], tuple[jax.Array, jax.Array]]
"""``factors(key, path, kernel (..., in, out)) -> A0 (..., in, r), B0 (..., r, out)``."""


def uniform_init(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)): what the released implementations use (variance 1 / (3 in))."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def normal_init(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """A ~ N(0, 1/in): the paper's Gaussian, 1.7 times larger than ``uniform_init``."""
    return jax.random.normal(key, shape) / math.sqrt(fan_in)


def lora(
    rank: int, *, pattern: str = "**/kernel", alpha: float | None = None, init: Initialiser = uniform_init
) -> Adapter:
    """LoRA on the kernels whose path matches.

    Args:
      rank: r >= 1.
      pattern: glob over parameter paths (``core/select.py``); layouts as in ``matrices.py``.
      alpha: s r; r by default, which makes the scale 1.
      init: distribution of A.

    Returns:
      An adapter with state ``{path: {"A": (..., in, r), "B": (..., r, out)}}``: r (in + out) numbers per matrix. Its
      ``init`` raises ValueError for a leaf that is not a matrix, or for a rank above min(in, out).

    Raises:
      ValueError: rank < 1.
    """
    scale = _scale("lora", rank, alpha)

    def init_state(key: jax.Array, params: Params) -> AdapterState:
        return AdapterState(_random_factors("lora", key, get_matrices(params, pattern), rank, init))

    return Adapter(init_state, lambda params, state: add_to_matrices(params, _products(state.train, scale)))


def dora(
    rank: int, *, pattern: str = "**/kernel", alpha: float | None = None, init: Initialiser = uniform_init
) -> Adapter:
    """DoRA: the length of every output's weights is trained apart from their direction, which a LoRA changes.

    W' = m (W + s A B) / |W + s A B|, norms over the inputs of each output, without a gradient through the norm (the
    paper's section 4.3). m starts as |W|.

    Args:
      rank, pattern, alpha, init: as in ``lora``.

    Returns:
      An adapter with state ``{path: {"A", "B", "m": (..., out)}}``, r (in + out) + out numbers per matrix; errors as
      ``lora``, and ValueError in ``init`` for an output whose weights are all zero.
    """
    scale = _scale("dora", rank, alpha)

    def init_state(key: jax.Array, params: Params) -> AdapterState:
        kernels = get_matrices(params, pattern)
        factors = _random_factors("dora", key, kernels, rank, init)
        lengths = {path: jnp.linalg.norm(kernel, axis=-2) for path, kernel in kernels.items()}
        for path, length in lengths.items():
            if not isinstance(length, jax.core.Tracer) and not bool((length > 0).all()):
                raise ValueError(f'dora: "{path}" has an output whose weights are all zero, and no direction.')
        return AdapterState({path: {**ab, "m": lengths[path]} for path, ab in factors.items()})

    def merge(params: Params, state: AdapterState) -> Params:
        kernels = get_matrices(params, "|".join(state.train))
        merged = {}
        for path, product in _products(state.train, scale).items():
            direction = kernels[path] + product
            length = jax.lax.stop_gradient(jnp.linalg.norm(direction, axis=-2))
            merged[path] = direction * (state.train[path]["m"] / length)[..., None, :]
        return put_matrices(params, merged)

    return Adapter(init_state, merge)


def pissa(
    rank: int, *, pattern: str = "**/kernel", alpha: float | None = None, iterations: int | None = None
) -> Adapter:
    """PiSSA: the r largest singular components of W are trained, W = u S v: A0 = u sqrt(S / s), B0 = sqrt(S / s) v.

    Args:
      rank, pattern: as in ``lora``.
      alpha: s r; r by default, as in the paper.
      iterations: use a randomised SVD with so many power iterations (4 in the paper's fast variant); exact by default.

    Returns:
      An adapter with A and B in ``train``, A0 and B0 in ``fixed``, each as in ``lora``; errors as ``lora``.
    """
    scale = _scale("pissa", rank, alpha)

    def factors(key: jax.Array, path: str, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        if iterations is None:
            u, s, v = truncated_svd(kernel, rank)
        else:
            u, s, v = randomised_svd(key, kernel, rank, iterations=iterations)
        root = jnp.sqrt(s / scale)
        return u * root[..., None, :], root[..., None] * v

    return _informed("pissa", rank, pattern, scale, factors)


def olora(rank: int, *, pattern: str = "**/kernel", alpha: float | None = None) -> Adapter:
    """OLoRA: orthonormal B0 from W^T = Q R (reduced), B0 = Q[:, :r]^T, A0 = R[:r]^T.

    Args:
      rank, pattern, alpha: as in ``lora``.

    Returns:
      As ``pissa``.
    """

    def factors(key: jax.Array, path: str, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Of the transpose: the paper's W is (out, in), and the QR of W^T is not that of W.
        q, r = linalg.qr(jnp.swapaxes(kernel, -1, -2))
        return jnp.swapaxes(r[..., :rank, :], -1, -2), jnp.swapaxes(q[..., :rank], -1, -2)

    return _informed("olora", rank, pattern, _scale("olora", rank, alpha), factors)


def lora_ga(
    rank: int,
    gradients: Params,
    *,
    pattern: str = "**/kernel",
    alpha: float | None = None,
    gamma: float = 16.0,
) -> Adapter:
    """LoRA-GA: the first step follows full fine-tuning's: A0 = c u[:, :r], B0 = c v[r:2r] of the gradient u S v.

    c = out^(1/4) / sqrt(gamma) and s = alpha / sqrt(r) (the paper's; peft multiplies B0 by the singular values too).

    Args:
      rank: r, at most half of min(in, out).
      gradients: dL/dW at the base, a tree like the parameters, averaged over some batches (the paper: 8).
      pattern: as in ``lora``.
      alpha: r by default.
      gamma: 16 in the paper; the larger, the smaller A0 and B0.

    Returns:
      As ``pissa``. ``init`` also raises ValueError for a rank above half, or gradients of another shape.

    Raises:
      ValueError: rank < 1, no gradients, or gamma not positive.
    """
    if gradients is None:
        raise ValueError("lora_ga: gradients of the loss at the base are needed, got None.")
    if not gamma > 0:
        raise ValueError(f"lora_ga: gamma must be positive, got {gamma}.")
    scale = _scale("lora_ga", rank, alpha) * math.sqrt(rank)
    of_loss = get_matrices(gradients, pattern)

    def factors(key: jax.Array, path: str, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        gradient = of_loss.get(path)
        if gradient is None or gradient.shape != kernel.shape:
            found = "none" if gradient is None else f"one of shape {gradient.shape}"
            raise ValueError(f'lora_ga: "{path}" needs a gradient of shape {kernel.shape}, got {found}.')
        if 2 * rank > min(kernel.shape[-2:]):
            raise ValueError(f'lora_ga: rank {rank} is above half of what "{path}" of shape {kernel.shape} can have.')
        u, _, v = truncated_svd(gradient, 2 * rank)
        c = kernel.shape[-1] ** 0.25 / math.sqrt(gamma)
        return c * u[..., :rank], c * v[..., rank:, :]

    return _informed("lora_ga", rank, pattern, scale, factors)


def beside(params: Params, state: AdapterState, *, scale: float = 1.0) -> Params:
    """Parameters that act as the merged ones, with A and B left beside W: x W + s (x A) B.

    Saves the gradient by W, which training through ``merge`` computes to get those of A and B; and one program mapped
    over many adapters reads W once. DoRA rescales the sum and has no such form.

    Args:
      params: the base.
      state: of ``lora``, ``pissa``, ``olora`` or ``lora_ga``; where A0 B0 is taken off, the rank beside W is 2 r.
      scale: s of the adapter: alpha / r, 1 by default there; alpha / sqrt(r) in ``lora_ga``.

    Returns:
      A tree with ``LowRank`` in the place of every adapted kernel.

    Raises:
      ValueError: a state with other leaves than A and B.
      KeyError: a path that the parameters do not have.
    """
    factors = {}
    for path, ab in state.train.items():
        if set(ab) != {"A", "B"}:
            raise ValueError(f'beside: wanted A and B for "{path}", got {", ".join(sorted(ab))}.')
        reads, writes = ab["A"], scale * ab["B"]
        if state.fixed:
            start = state.fixed[path]
            reads = jnp.concatenate([reads, start["A"]], -1)
            writes = jnp.concatenate([writes, -scale * start["B"]], -2)
        factors[path] = reads, writes
    return put_beside(params, factors)


def loraplus(
    rate: Any,
    *,
    ratio: float = 16.0,
    optimiser: Callable[[Any], optax.GradientTransformation] = lambda rate: optax.adamw(rate, weight_decay=0.0),
) -> optax.GradientTransformation:
    """LoRA+: an optimiser for the state of ``lora`` in which B learns ``ratio`` times as fast as A.

    Args:
      rate: learning rate of A, as ``optimiser`` takes it; may be traced.
      ratio: lambda, positive; 16 in the paper.
      optimiser: of a rate. With a schedule inside, give a function that makes it: ``lambda rate: adam(cosine(rate))``.

    Raises:
      ValueError: ratio not positive.
    """
    if not ratio > 0:
        raise ValueError(f"loraplus: ratio must be positive, got {ratio}.")

    def labels(train: Any) -> Any:
        return jax.tree.map_with_path(lambda keys, _: "B" if getattr(keys[-1], "key", "") == "B" else "A", train)

    return optax.multi_transform({"A": optimiser(rate), "B": optimiser(ratio * rate)}, labels)


def _scale(name: str, rank: int, alpha: float | None) -> float:
    if rank < 1:
        raise ValueError(f"{name}: rank must be at least 1, got {rank}.")
    return (rank if alpha is None else alpha) / rank


def _random_factors(
    name: str, key: jax.Array, kernels: dict[str, jax.Array], rank: int, init: Initialiser
) -> dict[str, dict[str, jax.Array]]:
    """A from the initialiser, one stream per path, and B = 0."""
    factors = {}
    for path, kernel in kernels.items():
        _require_rank(name, rank, path, kernel)
        *stacked, fan_in, fan_out = kernel.shape
        reads = init(stream(key, path), (*stacked, fan_in, rank), fan_in).astype(kernel.dtype)
        factors[path] = {"A": reads, "B": jnp.zeros((*stacked, rank, fan_out), kernel.dtype)}
    return factors


def _informed(name: str, rank: int, pattern: str, scale: float, factors: Factors) -> Adapter:
    """LoRA from given factors, whose product is taken off the frozen weight."""

    def init(key: jax.Array, params: Params) -> AdapterState:
        start = {}
        for path, kernel in get_matrices(params, pattern).items():
            _require_rank(name, rank, path, kernel)
            # Decompositions of bfloat16 do not exist.
            wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
            a, b = factors(stream(key, path), path, wide)
            start[path] = {"A": a.astype(kernel.dtype), "B": b.astype(kernel.dtype)}
        return AdapterState(start, start)

    def merge(params: Params, state: AdapterState) -> Params:
        now, before = _products(state.train, scale), _products(state.fixed, scale)
        return add_to_matrices(params, {path: now[path] - before[path] for path in now})

    return Adapter(init, merge)


def _products(factors: dict[str, dict[str, jax.Array]], scale: float) -> dict[str, jax.Array]:
    return {path: scale * (ab["A"] @ ab["B"]) for path, ab in factors.items()}


def _require_rank(name: str, rank: int, path: str, kernel: jax.Array) -> None:
    if rank > min(kernel.shape[-2:]):
        raise ValueError(f'{name}: rank {rank} is above what "{path}" of shape {kernel.shape} can have.')
