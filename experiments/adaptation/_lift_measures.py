"""What the LIFT experiment measures of its trained arms: scores, gaps at equal target loss, the base's own loss under
noise, and how the kernels changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.adaptation._lift_lab import Lab, Trained
from mechlab.analysis.linalg import numerical_rank
from mechlab.analysis.subspaces import energy_inside, subspace_overlap
from mechlab.core import linalg
from mechlab.core.rng import stream
from mechlab.methods.adaptation.matrices import get_matrices
from mechlab.methods.adaptation.sparse import Entries, perturb_selected


def equal_target_gap(ours: Trained, theirs: Trained) -> list[float]:
    """Retention of ours minus theirs at equal target loss, along the sweep of rates: one number for every seed.

    Both sweeps are interpolated linearly in the target loss and averaged over the losses that both cover; a seed whose
    sweeps do not overlap is left out.
    """
    gaps = []
    for seed in range(ours.held_out["target"].shape[1]):
        curves = []
        for arm in (ours, theirs):
            order = np.argsort(arm.held_out["target"][:, seed])
            curves.append((arm.held_out["target"][order, seed], arm.held_out["retention"][order, seed]))
        low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
        if low < high:
            at = np.linspace(low, high, 33)
            gaps.append(float(np.mean(np.interp(at, *curves[0]) - np.interp(at, *curves[1]))))
    return gaps


def perturbation(lab: Lab, arms: Mapping[str, Trained]) -> dict[str, np.ndarray]:
    """Rise of the base's own test loss when noise falls on an arm's first entries: by arm (S, sigmas).

    Sigma is in units of the root mean square of the base's kernels; averaged over draws of the noise.
    """
    config, subject = lab.config, lab.subject
    sigmas = jnp.asarray(config.sigmas)

    def one(key: jax.Array, base: Any, entries: Entries) -> jax.Array:
        weights = get_matrices(base, subject.pattern).values()
        unit = jnp.sqrt(jnp.mean(jnp.concatenate([jnp.square(w).reshape(-1) for w in weights])))
        # Noise of size 0 comes first: the base as it is. The same draws serve every size and every arm.
        sizes = jnp.concatenate([jnp.zeros(1), jnp.repeat(sigmas, config.draws) * unit])
        grid = sizes, jnp.concatenate([jnp.zeros(1, int), jnp.tile(jnp.arange(config.draws), len(sigmas))])

        def loss(noise: Any) -> jax.Array:
            draw = stream(key, "noise", noise[1])
            return subject.held_out(perturb_selected(draw, base, entries, noise[0]))["source"]

        losses = jax.lax.map(loss, grid)
        return losses[1:].reshape(len(sigmas), config.draws).mean(1) - losses[0]

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(trained.first for trained in arms.values()))
    over_seeds = jax.vmap(one)
    rises = jax.jit(lambda arms: jax.lax.map(lambda own: over_seeds(lab.keys, subject.bases, own), arms))(stacked)
    return dict(zip(arms, np.asarray(rises), strict=True))


def geometry(lab: Lab, arms: Mapping[str, Trained]) -> dict[str, dict[str, np.ndarray]]:
    """How every arm's best run changed the kernels: per seed (S,), in mean over kernels and layers, and one spectrum.

    Returns:
      By arm: "rank", numerical rank of the change as a share of the full one; "inside", the share of its energy in the
      leading ``filter_rank`` singular directions of the base's kernel; "overlap", mean cos² between these and those
      after; "spectrum" (S, n), singular values of one kernel's change over the largest; "sizes", its |change| > 0 in
      seed 0.
    """
    leading = lab.config.filter_rank

    def one(base: Any, tuned: Any) -> Any:
        found = []
        before, after = (get_matrices(params, lab.subject.pattern) for params in (base, tuned))
        for path, w in before.items():
            change = after[path] - w
            s = linalg.singular_values(change)
            both = subspace_overlap(w, after[path], leading)
            found.append(
                {
                    "rank": (numerical_rank(s, max(w.shape[-2:])) / min(w.shape[-2:])).mean(),
                    "inside": energy_inside(change, w, leading).mean(),
                    "overlap": jnp.concatenate([both.left, both.right], -1).mean(),
                }
            )
        means = jax.tree.map(lambda *x: jnp.stack(x).mean(), *found)
        path = next(path for path in before if "mlp/down" in path or "layer_0" in path)
        change = after[path] - before[path]
        change = change[0] if change.ndim == 3 else change
        s = linalg.singular_values(change)
        return means | {"spectrum": s / s[0], "sizes": jnp.abs(change).reshape(-1)}

    best = [jax.tree.map(lambda leaf, t=t: leaf[t.best()], t.params) for t in arms.values()]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *best)
    found = jax.jit(jax.vmap(jax.vmap(one), (None, 0)))(lab.subject.bases, stacked)
    by_arm = {name: jax.tree.map(lambda x, i=i: np.asarray(x[i]), found) for i, name in enumerate(arms)}
    for shown in by_arm.values():
        shown["sizes"] = shown["sizes"][0][shown["sizes"][0] > 0]
    return by_arm


def score(lab: Lab, arms: Mapping[str, Trained]) -> tuple[dict[str, Trained], dict[str, np.ndarray]]:
    """The arms with their test numbers, and those of the bases, (S,).

    "retention" is an arm's source score in % of its base's; 0 for a base that has nothing to lose.
    """
    stacks = [jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), trained.params) for trained in arms.values()]
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), lab.subject.bases, *stacks)
    found = jax.jit(lambda stack: jax.lax.map(lab.subject.held_out, stack))(together)
    seeds = lab.config.seeds
    sizes = [jax.tree.leaves(stack)[0].shape[0] for stack in stacks]
    parts = {name: np.split(np.asarray(x), seeds + np.cumsum([0, *sizes])) for name, x in found.items()}
    base = {name: split[0] for name, split in parts.items()}
    lab.log.say(f"the base's source score: {base['source_score'].mean():.1f} %")
    scored = {}
    for place, (name, trained) in enumerate(arms.items(), 1):
        own = {what: split[place].reshape(-1, seeds) for what, split in parts.items()}
        able = np.maximum(base["source_score"], 1e-6)
        own["retention"] = np.where(base["source_score"] > 0, 100 * own["source_score"] / able, 0)
        scored[name] = dataclasses.replace(trained, held_out=own)
    return scored, base
