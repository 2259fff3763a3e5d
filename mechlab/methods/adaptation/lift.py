"""LIFT the Veil for the Truth (Liu et al. 2025, arXiv 2506.00772): sparse fine-tuning of principal weights.

The weights to train are those that are largest in magnitude *after* their matrix is reduced in rank; they are chosen
again every N steps. For every kernel W (in, out), with filter rank r and budget rank R::

    W = U S Vᵀ,  W_r = U_{:r} S_{:r} V_{:r}ᵀ                                              rank reduction
    idx = the k largest |W_r|,   k = min((in + out) R, in out)  or  k = ⌈density · in out⌉   the entries
    m ← β1 m + (1 − β1) g,   v ← β2 v + (1 − β2) g²,   g = G[idx]                         sparse Adam, t = 1, 2 ...
    W[idx] ← W[idx] − η √(1 − β2^t) / (1 − β1^t) · m / (√v + ε)
    after N − 1, 2N − 1 ... steps: idx again, from the weights as they then are; an entry that stays keeps its
    m and v, one that enters starts from 0, one that leaves keeps its value                  refresh

ε stands beside the uncorrected root, as in the released optimiser, and not as in optax. k is the budget of a LoRA of
rank R; at a fixed R the share of a kernel that is trained depends on its shape, so look at ``density``.

Differs from the released code, follows the paper: its scripts pass a name by which its optimiser selects the k
*smallest* |W_r|; that rule is ``SMALLEST`` here. Weight decay acts on the trained entries (there it has no effect).
Ours: ``per_entry_bias_correction``, ``BOTTOM_RANK``, and that ties go to the lowest index.

The SVD of a refresh sits in a ``lax.cond``. Under ``vmap`` both sides of a cond run, so map over runs with
``sparse_adam`` for one period at a time, and ``choose`` and ``carry`` in between.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import checkify

from mechlab.analysis.linalg import product, randomised_svd, truncated_svd
from mechlab.core.rng import stream
from mechlab.methods.adaptation.matrices import get_matrices
from mechlab.methods.adaptation.sparse import Entries, Params, SparseState, carry, sparse_adam

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

LINEAR = "**/attn/[qkvo]/kernel|**/mlp/*/kernel"
"""The linear maps of a transformer's blocks: all but embeddings and output head, as in the paper."""


class Filter(NamedTuple):
    """How a rank is reduced.

    Attributes:
      rank: r.
      power: power iterations of a randomised SVD; None for the exact one.
    """

    rank: int
    power: int | None = None


class Rule(NamedTuple):
    """What makes an entry worth training.

    Attributes:
      scores: ``scores(key, weights, evidence, filter)``, (in, out) each: the k largest are trained.
      evidence: ``evidence(before, gradients, weights) -> after``, once a step, dense, from zero; None for a rule that
        reads weights alone. Such a rule chooses from the start, one with evidence at its first gradient.
    """

    scores: Callable[[jax.Array | None, jax.Array, Any, Filter], jax.Array]
    evidence: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None


def reduced(key: jax.Array | None, weights: Float[Array, "in out"], filter_: Filter) -> Float[Array, "in out"]:
    """W_r, in float32 or better: bfloat16 would make ties of most entries.

    Args:
      key: for the randomised SVD only.
      weights: W.
      filter_: rank and kind of the reduction.
    """
    if filter_.power is None:
        return product(*truncated_svd(weights, filter_.rank))
    return product(
        *randomised_svd(_needed(key), weights, filter_.rank, iterations=filter_.power, oversample=filter_.rank)
    )


def from_part(part: Callable[[jax.Array | None, int, int], jax.Array]) -> Rule:
    """The largest entries of another part of the spectrum than its top.

    Args:
      part: ``part(key, n, r)``: which r of the n singular values, numbered from the largest.
    """

    def scores(key: jax.Array | None, weights: jax.Array, evidence: Any, filter_: Filter) -> jax.Array:
        u, s, v = truncated_svd(weights, min(weights.shape))
        kept = part(key, len(s), filter_.rank)
        return jnp.abs(product(u[:, kept], s[kept], v[kept]))

    return Rule(scores)


PRINCIPAL = Rule(lambda key, w, _, filter_: jnp.abs(reduced(key, w, filter_)))
"""LIFT: |W_r|."""
SMALLEST = Rule(lambda key, w, _, filter_: -jnp.abs(reduced(key, w, filter_)))
"""The opposite, a control, and what the released scripts run: the smallest |W_r|."""
BOTTOM_RANK = Rule(lambda key, w, _, filter_: jnp.abs(w - reduced(key, w, filter_)))
"""What the rank reduction takes away, |W - W_r|: a control."""
MAGNITUDE = Rule(lambda key, w, *_: jnp.abs(w))
"""|W|, without rank reduction."""
RANDOM = Rule(lambda key, w, *_: jax.random.uniform(_needed(key), w.shape))
"""Random entries, drawn again at every refresh."""
GRADIENT = Rule(lambda key, w, seen, _: jnp.abs(seen), lambda before, g, w: g)
"""|G| of the step of the refresh."""
MOVEMENT = Rule(lambda key, w, seen, _: seen, lambda before, g, w: before - g * w)
"""Σ -G W over all steps so far: entries that move away from zero (movement pruning, arXiv 2005.07683)."""
MOMENTUM = Rule(lambda key, w, seen, _: jnp.abs(seen), lambda before, g, w: 0.9 * before + 0.1 * g)
"""|m| of a dense first moment, β1 = 0.9."""
BOTTOM = from_part(lambda key, n, r: jnp.arange(n - r, n))
"""Ablation of LIFT: the r smallest singular values."""
RANDOM_PART = from_part(lambda key, n, r: jax.random.permutation(_needed(key), n)[:r])
"""Ablation of LIFT: r singular values at random."""
MIXED = from_part(lambda key, n, r: jnp.concatenate([jnp.arange(r - r // 2), jnp.arange(n - r // 2, n)]))
"""Ablation of LIFT: half of them from the top and half from the bottom."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Which entries of which kernels are trained.

    Attributes:
      budget_rank: R: as many entries as a LoRA of this rank has parameters.
      density: share of every kernel in (0, 1]; where given, it decides instead of ``budget_rank``.
      filter_rank: r of the rank reduction.
      power: power iterations of a randomised SVD of 2 r columns; None for the exact SVD.
      rule: what makes an entry worth training.
      pattern: glob over parameter paths (``core/select.py``); layouts as in ``matrices.py``.
    """

    budget_rank: int = 128
    density: float | None = None
    filter_rank: int = 64
    power: int | None = None
    rule: Rule = PRINCIPAL
    pattern: str = LINEAR

    def __post_init__(self) -> None:
        problems = []
        if self.density is not None and not 0 < self.density <= 1:
            problems.append(f"density must be in (0, 1], got {self.density}")
        if self.density is None and self.budget_rank < 1:
            problems.append(f"budget_rank must be at least 1, got {self.budget_rank}")
        if self.filter_rank < 1:
            problems.append(f"filter_rank must be at least 1, got {self.filter_rank}")
        if self.power is not None and self.power < 0:
            problems.append(f"power must not be negative, got {self.power}")
        if problems:
            raise ValueError(f"Selection: {'; '.join(problems)}.")

    def entries(self, rows: int, columns: int) -> int:
        """k, the number of trained entries of a matrix.

        >>> Selection(budget_rank=128).entries(4096, 4096) / 4096**2
        0.0625
        """
        if self.density is None:
            return min((rows + columns) * self.budget_rank, rows * columns)
        # Less a rounding error, so that 5 % of 100 entries are 5 and not 6.
        return max(1, math.ceil(self.density * rows * columns - 1e-6))


def principal_indices(
    key: jax.Array | None,
    weights: Float[Array, "in out"],
    k: int,
    filter_: Filter,
    *,
    rule: Rule = PRINCIPAL,
    evidence: Float[Array, "in out"] | None = None,
) -> Int[Array, " k"]:
    """The entries of one matrix that a rule trains: the k largest scores, of equal ones the lowest index.

    Args:
      key: for random rules and a randomised SVD; None otherwise.
      weights: W; scored in float32 or better.
      k: 1..in·out, known when tracing.
      filter_: of the rank reduction.
      rule: by what to choose.
      evidence: what the rule has seen of gradients, if it reads them.

    Returns:
      Flat row-major indices, int32, increasing.

    Raises:
      ValueError: k out of range, or a rule that lacks its key or evidence.
    """
    if not 1 <= k <= weights.size:
        raise ValueError(f"k must be between 1 and the {weights.size} entries of the matrix, got {k}.")
    if rule.evidence is not None and evidence is None:
        raise ValueError("the rule reads gradients: give its evidence.")
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    scores = rule.scores(key, weights, evidence, filter_)
    return jnp.sort(jax.lax.top_k(scores.reshape(-1), k)[1].astype(jnp.int32))


def choose(
    key: jax.Array | None, params: Params, selection: Selection, evidence: Mapping[str, jax.Array] | None = None
) -> dict[str, jax.Array]:
    """The entries of all kernels that are trained.

    Costs one SVD per kernel and layer, except for rules that need none.

    Args:
      key: typed key for random rules and a randomised SVD; None otherwise.
      params: parameters of a model.
      selection: which entries.
      evidence: per path what the rule has seen of gradients, shaped as in ``matrices.py``.

    Returns:
      ``{path: (..., k) int32}``.

    Raises:
      KeyError: no parameter matches the pattern.
      ValueError: a leaf that is no kernel, a filter rank above min(in, out), or a matrix of 2^31 entries and more, each
        with the path; a rule that lacks its key or evidence.
    """
    chosen = {}
    for path, stack in get_matrices(params, selection.pattern).items():
        k = _checked_entries(path, stack, selection)
        one = functools.partial(
            principal_indices, k=k, filter_=Filter(selection.filter_rank, selection.power), rule=selection.rule
        )
        own = None if key is None else stream(key, path)
        seen = evidence.get(path) if evidence else None
        if stack.ndim == 3:
            own = None if own is None else jax.random.split(own, len(stack))
            chosen[path] = jax.vmap(lambda key, w, seen, one=one: one(key, w, evidence=seen))(own, stack, seen)
        else:
            chosen[path] = one(own, stack, evidence=seen)
    return chosen


def lift(
    learning_rate: optax.ScalarOrSchedule,
    selection: Selection = Selection(),
    *,
    refresh_every: int | None = 400,
    key: jax.Array | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    per_entry_bias_correction: bool = False,
) -> optax.GradientTransformation:
    """LIFT as an optimiser: ``sparse_adam`` on entries that are chosen at the start and again every N steps.

    What the selection's pattern does not match is frozen; ``optax.multi_transform`` can train it otherwise. A refresh
    that meets a matrix with NaN or infinity keeps that matrix's entries (and fails under ``checkify``).

    Args:
      learning_rate, b1, b2, eps, weight_decay, per_entry_bias_correction: as in ``sparse_adam``.
      selection: which entries.
      refresh_every: N >= 1: a refresh after N - 1, 2N - 1 ... steps; None chooses once.
      key: typed key for random rules and a randomised SVD.

    Returns:
      A transformation with state ``SparseState``: 2 k floats and k int32 per kernel. ``init`` raises what ``choose``
      raises, ``update`` ValueError without ``params``.

    Raises:
      ValueError: ``refresh_every`` < 1.

    >>> params = {"mlp": {"up": {"kernel": jnp.outer(jnp.arange(4.0), jnp.arange(3.0))}}}
    >>> optimiser = lift(0.1, Selection(density=0.25, filter_rank=1))
    >>> updates, _ = optimiser.update(jax.tree.map(jnp.ones_like, params), optimiser.init(params), params)
    >>> (updates["mlp"]["up"]["kernel"] != 0).astype(int).tolist()
    [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 1]]
    """
    if refresh_every is not None and refresh_every < 1:
        raise ValueError(f"lift: refresh_every must be at least 1 or None, got {refresh_every}.")

    def adam(entries: Entries) -> optax.GradientTransformation:
        return sparse_adam(
            learning_rate,
            entries,
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
            per_entry_bias_correction=per_entry_bias_correction,
        )

    seen = selection.rule.evidence

    def init(params: Params) -> SparseState:
        evidence = {}
        if seen is not None:
            evidence = jax.tree.map(jnp.zeros_like, get_matrices(params, selection.pattern))
        own = None if key is None else stream(key, "init")
        return adam(choose(own, params, selection, evidence)).init(params)._replace(evidence=evidence)

    def update(updates: Any, state: SparseState, params: Params | None = None) -> tuple[Any, SparseState]:
        if params is None:
            raise ValueError("lift: update needs params, as in update(gradients, state, params).")
        if seen is not None:
            gradients, weights = get_matrices(updates, selection.pattern), get_matrices(params, selection.pattern)
            state = state._replace(evidence=jax.tree.map(seen, state.evidence, gradients, weights))
        # One step early, as released; and before a step rather than after the last one, which is the same, because the
        # weights are then those of the forward.
        due = jnp.zeros((), bool)
        if refresh_every is not None:
            due = (state.steps > 0) & ((state.steps + 1) % refresh_every == 0)
        if seen is not None:
            due |= state.steps == 0
        if refresh_every is not None or seen is not None:
            own = None if key is None else jax.random.fold_in(stream(key, "refresh"), state.steps)
            state = jax.lax.cond(due, lambda s: _refresh(own, s, params, selection), lambda s: s, state)
        return adam(state.idx).update(updates, state, params)

    return optax.GradientTransformation(init, update)


def _refresh(key: jax.Array | None, state: SparseState, params: Params, selection: Selection) -> SparseState:
    chosen = choose(key, params, selection, state.evidence)
    for path, stack in get_matrices(params, selection.pattern).items():
        finite = jnp.isfinite(stack).all((-2, -1))
        checkify.debug_check(finite.all(), f'lift: "{path}" is not finite at a refresh.')
        chosen[path] = jnp.where(finite[..., None], chosen[path], state.idx[path])
    return carry(state, chosen)


def _checked_entries(path: str, stack: jax.Array, selection: Selection) -> int:
    """k of a kernel, once it is known to have one."""
    rows, columns = stack.shape[-2:]
    name = f'"{path}" ({rows} x {columns})'
    if selection.filter_rank > min(rows, columns):
        raise ValueError(f"lift: filter_rank {selection.filter_rank} is above what {name} can have.")
    if rows * columns >= 2**31:
        raise ValueError(f"lift: {name} has too many entries for int32 indices.")
    return selection.entries(rows, columns)


def _needed(key: jax.Array | None) -> jax.Array:
    if key is None:
        raise ValueError("this rule, or the randomised SVD, draws random numbers: give a key.")
    return key
