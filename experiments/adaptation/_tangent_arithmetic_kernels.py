"""Tangent kernels of pairs of tasks: do the eigenvectors that carry a task live on its images?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.adaptation._tangent_arithmetic_lab import Lab, Start
from experiments.measures import per_seed
from mechlab.analysis.tangent import eigenvector_localisation, empirical_ntk, local_energy
from mechlab.data.families import CLASSES
from mechlab.reporting.results import Metric


def tangent_kernels(lab: Lab, start: Start, metrics: dict[str, Metric], seen: dict[str, Any]) -> None:
    """Local energy of both tasks of some pairs, from the pre-trained and from the random trunk.

    The outputs of an item are those of both heads, so that the kernel is that of one function on all items. Seeds and
    pairs follow one another (``lax.map``): a Jacobian holds items x 20 outputs x parameters.
    """
    config = lab.config
    n = config.ntk_points
    first, second = (index[: config.ntk_pairs] for index in np.triu_indices(len(config.tasks), 1))
    data = jax.tree.map(lambda leaf: leaf[:, :n], lab.data["test"])
    group = jnp.arange(2 * n) < n

    def one(cell: tuple[Any, Any, jax.Array, jax.Array]) -> Any:
        trunk, heads, i, j = cell
        both = [jax.tree.map(lambda leaf, t=t: leaf[t], heads) for t in (i, j)]
        x, y = (jnp.concatenate([leaf[i], leaf[j]]) for leaf in (data["x"], data["y"]))

        def outputs(trunk: Any, x: jax.Array) -> jax.Array:
            return jnp.concatenate([lab.logits(trunk, head, x) for head in both], -1)

        kernel = empirical_ntk(outputs, trunk, x, contract=True, block=n)
        f0 = outputs(trunk, x)
        own = jnp.where(group[:, None], f0[:, :CLASSES], f0[:, CLASSES:])
        residual = jax.nn.one_hot(y, CLASSES) - own
        spread = eigenvector_localisation(kernel, n)
        energies = [local_energy(kernel, residual, mask) for mask in (group, ~group)]
        inside = (energies[0][:n].mean() + energies[1][n:].mean()) / 2
        outside = (energies[0][n:].mean() + energies[1][:n].mean()) / 2
        weight = spread.eigenvalues / spread.eigenvalues.sum()
        return {
            "ratio": inside / outside,
            "inside": inside,
            "outside": outside,
            "localisation": (weight * spread.localisation).sum(),
            "energies": jnp.stack(energies),
        }

    every = jax.jit(lambda cells: jax.lax.map(one, cells))
    for kind, trunks in start.trunks.items():
        seed, pair = (index.reshape(-1) for index in np.indices((config.seeds, len(first))))
        cells = (
            jax.tree.map(lambda leaf, s=seed: leaf[s], trunks),
            jax.tree.map(lambda leaf, s=seed: leaf[s], start.heads),
            jnp.asarray(first[pair]),
            jnp.asarray(second[pair]),
        )
        found = jax.device_get(every(cells))
        shaped = {name: x.reshape(config.seeds, len(first), *x.shape[1:]) for name, x in found.items()}
        for name in ("ratio", "inside", "outside", "localisation"):
            metrics[f"ntk/{kind}/{name}"] = per_seed(shaped[name].mean(1), "")
        names = config.tasks[first[0]], config.tasks[second[0]]
        seen.setdefault("ntk", {})[kind] = {"names": names, "energies": shaped["energies"][0, 0]}
