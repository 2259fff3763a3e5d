"""The LIFT experiment's workshop: arms, and their trainings period by period."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.adaptation._lift_subjects import Subject, batches, checkpoint, decoder, planted
from mechlab.core.rng import stream
from mechlab.core.transforms import Adapter, AdapterState
from mechlab.methods.adaptation import lift
from mechlab.methods.adaptation.lift import Rule, Selection
from mechlab.methods.adaptation.lora import dora, lora, pissa
from mechlab.methods.adaptation.matrices import get_matrices
from mechlab.methods.adaptation.sparse import (
    Entries,
    carry,
    entry_mask,
    hidden_channels,
    jaccard,
    optimiser_bytes,
    sparse_adam,
)
from mechlab.reporting.log import Log
from mechlab.training.loop import Job, fit_many

if TYPE_CHECKING:
    from experiments.adaptation.lift import Config

Choose = Callable[[jax.Array, Any, Any], Entries]
"""``choose(key, params, evidence) -> entries``."""

RULES: Mapping[str, Rule] = {
    "lift": lift.PRINCIPAL,
    "weight_mag": lift.MAGNITUDE,
    "random": lift.RANDOM,
    "smallest": lift.SMALLEST,
    "bottom_rank": lift.BOTTOM_RANK,
    "grad_mag": lift.GRADIENT,
    "movement": lift.MOVEMENT,
    "momentum": lift.MOMENTUM,
}
PARTS: Mapping[str, Rule] = {"bottom": lift.BOTTOM, "random": lift.RANDOM_PART, "mixed": lift.MIXED}
"""Parts of the spectrum, an ablation of ``lift``."""
WATCHED = ("movement", "momentum")
"""Rules whose evidence is gathered during training."""
SEGMENT = 10
"""Steps between two looks at the loss: fixed, so that the compiled programs of all periods are the same."""


@dataclasses.dataclass(frozen=True)
class SparseArm:
    """A choice of entries, and how often it is made again."""

    choose: Choose
    refresh: int | None
    rule: Rule | None = None


@dataclasses.dataclass(frozen=True)
class Lab:
    """What all trainings share."""

    config: Config
    log: Log
    subject: Subject
    keys: jax.Array  # (S,)


@dataclasses.dataclass(frozen=True)
class Trained:
    """One arm at every learning rate and seed.

    Attributes:
      params: leaves (R, S, ...).
      state_bytes: of one run's optimiser.
      first: the entries at the start, leaves (S, ...); sparse arms only.
      outside: entries that changed without ever having been chosen, over all rates and seeds; sparse arms only.
      kept: (R, S) Jaccard index of the first and the last entries; sparse arms only.
      held_out: by name (R, S), see ``Subject``; filled by ``_lift_measures.score``.
    """

    params: Any
    state_bytes: int
    first: Any = None
    outside: int = 0
    kept: np.ndarray | None = None
    held_out: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def best(self) -> int:
        """The rate with the smallest validation loss, in mean over seeds."""
        return int(self.held_out["validation"].mean(1).argmin())


def prepare(key: jax.Array, config: Config, log: Log) -> Lab:
    """Make the subject, with its trained base."""
    make = {"planted": planted, "decoder": decoder}.get(config.subject, checkpoint)
    keys = jax.vmap(lambda s: stream(key, "seed", s))(jnp.arange(config.seeds))
    return Lab(config, log, make(stream(key, "subject"), config, log), keys)


def rule_arm(lab: Lab, rule: Rule, *, refresh: int | None, **other: Any) -> SparseArm:
    """An arm of ``lift.choose``; ``other`` replaces fields of its ``Selection``."""
    defaults = {"density": lab.config.density, "filter_rank": lab.config.filter_rank, "pattern": lab.subject.pattern}
    settings: dict[str, Any] = {**defaults, "rule": rule, **other}
    selection = Selection(**settings)
    return SparseArm(lambda key, params, seen: lift.choose(key, params, selection, seen), refresh, rule)


def channels_arm(lab: Lab) -> SparseArm:
    """S2FT's channels, drawn once."""
    return SparseArm(lambda key, params, seen: hidden_channels(key, params, lab.config.channels), None)


def schedule(lab: Lab, rate: Any) -> optax.Schedule:
    """The paper's: warm-up over 3 % of the steps, then linearly to zero."""
    steps = lab.config.steps
    warm = max(1, round(0.03 * steps))
    return lambda count: rate * jnp.minimum((count + 1) / warm, (steps - count) / (steps - warm + 1))


def train_sparse(lab: Lab, arms: Mapping[str, SparseArm], rates: jax.Array, name: str) -> dict[str, Trained]:
    """Train arms with equally many entries as lanes of one program, from one refresh to the next.

    Args:
      lab: see ``Lab``.
      arms: all with the same shapes of entries. A rule whose evidence is gathered in training must be alone.
      rates: (R,).
      name: in the log.
    """
    config, subject = lab.config, lab.subject
    grid = (len(arms), len(rates), config.seeds)
    watched = next(iter(arms.values())).rule if name in WATCHED else None
    shown = batches(subject, config.batch)

    def start(key: jax.Array, base: Any) -> Any:
        every = [_chosen(lab, arm, key, base, None, 0) for arm in arms.values()]
        entries = jax.tree.map(lambda *leaves: jnp.stack(leaves), *every)
        states = jax.vmap(lambda own: sparse_adam(0.0, own).init(base))(entries)
        return states if watched is None else (jax.vmap(lambda _: _zeros(base, subject.pattern))(states.steps), states)

    def renewed(key: jax.Array, params: Any, opt: Any, arm: SparseArm, at: jax.Array) -> Any:
        before = None if watched is None else opt[0]
        state = carry(_sparse(opt), _chosen(lab, arm, key, params, before, at))
        return state if watched is None else (opt[0], state)

    def refresh(params: Any, opt: Any, due: tuple[int, ...], at: jax.Array) -> Any:
        for i in due:
            one = functools.partial(renewed, arm=list(arms.values())[i], at=at)
            own = jax.tree.map(lambda leaf, i=i: leaf[i], (params, opt))
            after = jax.vmap(jax.vmap(one), (None, 0, 0))(lab.keys, *own)
            opt = jax.tree.map(lambda leaf, new, i=i: leaf.at[i].set(new), opt, after)
        return opt

    def build(lane: Any) -> Job:
        optimiser = sparse_adam(schedule(lab, lane["rate"]), {})
        if watched is not None:
            optimiser = optax.chain(_watch(watched.evidence, subject.pattern), optimiser)
        return Job(subject.loss, lane["params"], optimiser._replace(init=lambda params: lane["opt"]), shown)

    states = jax.jit(jax.vmap(start))(lab.keys, subject.bases)
    params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*grid, *leaf.shape[1:])), subject.bases)
    # From (S, A, ...) to (A, R, S, ...).
    opt = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf.swapaxes(0, 1)[:, None], (*grid, *leaf.shape[2:])), states)
    first = _sparse(opt).idx
    union = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), params)
    mark = jax.jit(_over_lanes(lambda union, params, idx: jax.tree.map(jnp.logical_or, union, entry_mask(params, idx))))
    refresh = jax.jit(refresh, static_argnums=2)
    every_rate = jnp.broadcast_to(rates[:, None], grid).reshape(-1)
    bounds = _boundaries(arms.values(), config.steps)
    for at, until in itertools.pairwise(bounds):
        due = [i for i, arm in enumerate(arms.values()) if at and arm.refresh and (at + 1) % arm.refresh == 0]
        opt = refresh(params, opt, tuple(due), jnp.asarray(at)) if due else opt
        union = mark(union, params, _sparse(opt).idx)
        keys = jax.vmap(lambda key, at=at: stream(key, "batches", at))(lab.keys)
        lanes = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), {"params": params, "opt": opt})
        fit = fit_many(
            jnp.broadcast_to(keys, grid).reshape(-1),
            lanes | {"rate": every_rate},
            build,
            steps=until - at,
            segment=SEGMENT,
            log=lab.log,
            name=f"{name}-{at}" if len(bounds) > 2 else name,
        )
        back = jax.tree.map(lambda leaf: leaf.reshape(*grid, *leaf.shape[1:]), (fit.params, fit.opt_state))
        params, opt = back

    stray = jax.tree.map(lambda new, old, allowed: (new != old) & ~allowed, params, subject.bases, union)
    outside = sum(np.asarray(leaf).reshape(len(arms), -1).sum(1) for leaf in jax.tree.leaves(stray))
    shared = jax.tree.map(jax.jit(jaccard), first, _sparse(opt).idx)
    kept = np.mean([np.asarray(leaf).reshape(*grid, -1).mean(-1) for leaf in shared.values()], axis=0)
    size = optimiser_bytes(jax.tree.map(lambda leaf: leaf[0, 0, 0], _sparse(opt)))
    return {
        arm: Trained(
            jax.tree.map(lambda leaf, i=i: leaf[i], params),
            size,
            jax.tree.map(lambda leaf, i=i: leaf[i, 0], first),
            int(outside[i]),
            kept[i],
        )
        for i, arm in enumerate(arms)
    }


def train_adapter(lab: Lab, adapter: Adapter, rates: jax.Array, name: str) -> Trained:
    """Train one adapter (or, with ``finetuning.whole``, all parameters) with Adam, rates and seeds as lanes."""
    config, subject = lab.config, lab.subject
    grid = (len(rates), config.seeds)
    begun = jax.jit(jax.vmap(lambda key, base: adapter.init(stream(key, "init"), base)))(lab.keys, subject.bases)

    def spread(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*grid, *leaf.shape[1:])), tree)

    lanes = {"base": spread(subject.bases), "train": spread(begun.train), "fixed": spread(begun.fixed)}
    lanes["rate"] = jnp.broadcast_to(rates[:, None], grid)

    def build(lane: Any) -> Job:
        def loss(train: Any, batch: Any) -> jax.Array:
            return subject.loss(adapter.merge(lane["base"], AdapterState(train, lane["fixed"])), batch)

        return Job(loss, lane["train"], optax.adam(schedule(lab, lane["rate"])), batches(subject, config.batch))

    keys = jax.vmap(lambda key: stream(key, "batches", 0))(lab.keys)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), lanes)
    fit = fit_many(jnp.broadcast_to(keys, grid).reshape(-1), flat, build, steps=config.steps, log=lab.log, name=name)
    merged = jax.jit(jax.vmap(lambda base, train, fixed: adapter.merge(base, AdapterState(train, fixed))))(
        flat["base"], fit.params, flat["fixed"]
    )
    params = jax.tree.map(lambda leaf: leaf.reshape(*grid, *leaf.shape[1:]), merged)
    size = optimiser_bytes(jax.tree.map(lambda leaf: leaf[0], fit.opt_state))
    return Trained(params, size)


def adapters(lab: Lab) -> dict[str, Adapter]:
    """The low-rank baselines at LIFT's budget; as in the paper alpha = 2 r for LoRA and DoRA, r for PiSSA."""
    rank, pattern = lab.config.lora_rank, lab.subject.pattern
    return {
        "lora": lora(rank, pattern=pattern, alpha=2.0 * rank),
        "dora": dora(rank, pattern=pattern, alpha=2.0 * rank),
        "pissa": pissa(rank, pattern=pattern),
    }


def _chosen(lab: Lab, arm: SparseArm, key: jax.Array, params: Any, before: Any, at: Any) -> Entries:
    """An arm's entries at a step, with the evidence of one batch where its rule reads gradients."""
    seen = None
    gather = None if arm.rule is None else arm.rule.evidence
    if gather is not None:
        plan, fetch = batches(lab.subject, lab.config.batch)
        batch = fetch(jax.tree.map(lambda leaf: leaf[0], plan(stream(key, "evidence", at), jnp.asarray(0), 1)))
        gradients = get_matrices(jax.grad(lab.subject.loss)(params, batch), lab.subject.pattern)
        weights = get_matrices(params, lab.subject.pattern)
        seen = jax.tree.map(gather, before or _zeros(params, lab.subject.pattern), gradients, weights)
    return arm.choose(stream(key, "entries", at), params, seen)


def _boundaries(arms: Any, steps: int) -> list[int]:
    """Steps at which some arm refreshes, with the first and the end."""
    every = {arm.refresh for arm in arms if arm.refresh}
    return sorted({0, steps} | {t for n in every for t in range(n - 1, steps, n) if t})


def _over_lanes(one: Callable[..., Any]) -> Callable[..., Any]:
    return jax.vmap(jax.vmap(jax.vmap(one)))


def _sparse(opt: Any) -> Any:
    return opt if hasattr(opt, "idx") else opt[1]


def _zeros(params: Any, pattern: str) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.zeros_like, get_matrices(params, pattern))


def _watch(gather: Any, pattern: str) -> optax.GradientTransformation:
    """Passes gradients on, and gathers a rule's evidence from them."""

    def update(updates: Any, seen: Any, params: Any = None) -> tuple[Any, Any]:
        return updates, jax.tree.map(gather, seen, get_matrices(updates, pattern), get_matrices(params, pattern))

    return optax.GradientTransformation(lambda params: _zeros(params, pattern), update)
