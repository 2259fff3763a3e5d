"""How single units differ: each one steered alone, against its whole block; and what units write into the logits."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.steering import _austeer_lab as lab
from experiments.steering._austeer_planted import PLANTED_RIGHT, PLANTED_WRONG
from experiments.steering._tales_tasks import Items
from mechlab.analysis.intervals import resampled_auroc
from mechlab.analysis.metrics import auroc
from mechlab.methods.steering import austeer
from mechlab.reporting.results import Metric


class Scan(NamedTuple):
    """AUROC gained over the unsteered model, on dev items.

    Attributes:
      units: (L, D) by site, each unit steered alone.
      blocks: (L,) by site, all units of the layer at once, by the same rule.
      own: (L, D) by site, 1 or -1 where a unit's own 95 % bootstrap interval is above or below 0, as is that of
        5 % of units without any effect.
      band: half-width of the band that holds the noise of *all* units at once in 95 % of bootstrap samples.
      test: by site (L, 2): the unit that was best on dev, and the block, on test items.
    """

    units: dict[str, np.ndarray]
    blocks: dict[str, np.ndarray]
    own: dict[str, np.ndarray]
    band: float
    test: dict[str, np.ndarray]


class Words(NamedTuple):
    """Units: names, tokens that each raises and lowers most, and mutual Jensen-Shannon divergences (nats)."""

    names: list[str]
    tokens: list[str]
    divergence: np.ndarray


def scan(
    key: jax.Array,
    subject: lab.Subject,
    scores: dict[str, jax.Array],
    dev: Items,
    test: Items,
    alpha: float,
    resamples: int = 400,
) -> Scan:
    """Steer every unit of both sites alone at one alpha, and every block.

    Args:
      key: of the bootstrap.
      subject, scores: whom, and by which scores (L, D) at each site.
      dev, test: items of one seed, (1, N, ...).
      alpha: strength of units and blocks alike.
      resamples: bootstrap samples of the band.
    """
    model, layers = subject.model, subject.model.module.config.layers

    def masks_of(beta: np.ndarray) -> np.ndarray:
        # Every unit alone, then all units of each layer; on the host, where nothing has to be compiled.
        alone = np.eye(beta.size, dtype=np.float32).reshape(-1, *beta.shape)
        return alpha * beta * np.concatenate([alone, alone.reshape(layers, -1, *beta.shape).sum(1)])

    def aurocs(items: Items, masks: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        # No steering first, then the masks of each site, zeros at the other.
        sizes = np.cumsum([0, 1, *(len(of_site) for of_site in masks.values())])
        arms = jax.tree.map(lambda x: np.zeros((sizes[-1], *x.shape), np.float32), lab.arms_of(model))
        for i, (site, of_site) in enumerate(masks.items(), 1):
            getattr(arms, site)[sizes[i] : sizes[i + 1]] = of_site
        logits = lab.scores_of(subject, items, arms, np.zeros(sizes[-1], int))
        margins, first = logits[..., 0] - logits[..., 1], np.asarray(items.right[0]) == 0
        return margins, np.asarray(jax.jit(auroc)(margins, first))

    masks = {site: masks_of(np.asarray(scores[site])) for site in lab.SITES}
    margins, found = aurocs(dev, masks)
    draws = np.asarray(resampled_auroc(key, margins, np.asarray(dev.right[0]) == 0, resamples=resamples))
    gain, noise = found - found[0], (draws - draws[0]) - (found - found[0])[:, None]
    low, high = np.quantile(draws - draws[0], (0.025, 0.975), axis=1)
    sides = (low > 0).astype(int) - (high < 0)
    units, of_blocks, own, noises, start = {}, {}, {}, [], 1
    for site in lab.SITES:
        n = scores[site].size
        units[site] = gain[start : start + n].reshape(scores[site].shape)
        own[site] = sides[start : start + n].reshape(scores[site].shape)
        of_blocks[site] = gain[start + n : start + n + layers]
        noises.append(noise[start : start + n])
        start += n + layers
    band = float(np.quantile(np.abs(np.concatenate(noises)).max(0), 0.95))

    best = {
        site: np.concatenate(
            [masks[site][np.arange(layers) * x.shape[1] + x.argmax(1)], masks[site][-layers:]]
        )
        for site, x in units.items()
    }  # fmt: skip
    _, on_test = aurocs(test, best)
    halves = (on_test[1:] - on_test[0]).reshape(len(lab.SITES), 2, layers)
    return Scan(units, of_blocks, own, band, {site: halves[i].T for i, site in enumerate(lab.SITES)})


def scan_metrics(found: Scan, task: str, items: int) -> dict[str, Metric]:
    """The numbers of a scan that claims and the page quote."""
    metrics = {f"scan/{task}/band": Metric(value=found.band, n=items, unit="AUROC")}
    for site, units in found.units.items():
        lead = units.max(1) - found.blocks[site]
        layer = int(lead.argmax())
        of_test = found.test[site][layer]
        metrics |= {
            f"scan/{task}/{site}/lead": Metric(value=lead[layer], n=items, unit="AUROC"),
            f"scan/{task}/{site}/layer": Metric(value=layer),
            f"scan/{task}/{site}/best_unit": Metric(value=units.max(1)[layer], n=items, unit="AUROC"),
            f"scan/{task}/{site}/block": Metric(value=found.blocks[site][layer], n=items, unit="AUROC"),
            f"scan/{task}/{site}/test_lead": Metric(value=of_test[0] - of_test[1], unit="AUROC"),
            f"scan/{task}/{site}/layers_led": Metric(value=int((lead > 0).sum()), n=len(lead), unit="layers"),
            f"scan/{task}/{site}/helpful": Metric(value=int((units > found.band).sum()), n=units.size, unit="units"),
            f"scan/{task}/{site}/own_helpful": Metric(
                value=int((found.own[site] > 0).sum()), n=units.size, unit="units"
            ),
            f"scan/{task}/{site}/own_harmful": Metric(
                value=int((found.own[site] < 0).sum()), n=units.size, unit="units"
            ),
            f"scan/{task}/{site}/harmful": Metric(value=int((units < -found.band).sum()), n=units.size, unit="units"),
        }
    return metrics


def words(subject: lab.Subject, scores: jax.Array, site: str, k: int, top: int = 3) -> Words:
    """The first k units: which tokens the slice of each raises and lowers most, and how unlike the slices are."""
    layers, dims, beta = austeer.select_aus(scores, k)
    tables = {layer: austeer.au_token_logits(subject.model, subject.params, int(layer), site) for layer in set(layers)}
    rows = jnp.stack([tables[layer][dim] for layer, dim in zip(layers, dims, strict=True)])

    def ends(sign: int) -> list[str]:
        best = np.asarray(jax.lax.top_k(sign * rows, top)[1])
        return [", ".join(subject.decode([int(token)]).strip() for token in row) for row in best]

    spelled = [f"{up} | {down}" for up, down in zip(ends(1), ends(-1), strict=True)]
    names = [f"{layer}.{dim}{'+' if b > 0 else '-'}" for layer, dim, b in zip(layers, dims, beta, strict=True)]
    return Words(names, spelled, np.asarray(austeer.au_js(rows)))


def planted_metrics(reading: lab.Reading) -> dict[str, Metric]:
    """In every seed: how many of the planted units are among the eight chosen ones, and with the right sign."""
    wanted = {(0, dim): 1 for dim in PLANTED_RIGHT} | {(0, dim): -1 for dim in PLANTED_WRONG}
    found: dict[str, list[float]] = {"found": [], "signs": []}
    for scores in reading.scores["ffn"]:
        chosen = {(int(layer), int(dim)): beta for layer, dim, beta in zip(*austeer.select_aus(scores, 8), strict=True)}
        found["found"].append(sum(unit in chosen for unit in wanted))
        found["signs"].append(sum(chosen.get(unit, 0) * sign > 0 for unit, sign in wanted.items()))
    return {
        f"planted/{name}": Metric(value=min(values), n=len(values), unit="of 8", per_seed=tuple(values))
        for name, values in found.items()
    }
