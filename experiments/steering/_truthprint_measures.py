"""What is measured of captions: mentions with their states, CHAIR with intervals over pictures, an example as text."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measures import per_seed
from experiments.steering._truthprint_lab import EOS, Captions
from mechlab.analysis.mentions import Chair
from mechlab.analysis.metrics import auroc
from mechlab.data.worlds import shelves as world
from mechlab.methods.steering import rollback
from mechlab.methods.steering import truthprint as tp
from mechlab.reporting.results import Metric


class Told(NamedTuple):
    """Pictures of all seeds, one after the other, and a captioner's greedy captions of them."""

    data: dict[str, np.ndarray]
    captions: Captions
    seeds: int

    def rows(self, seed: int) -> slice:
        n = len(self.captions.tokens) // self.seeds
        return slice(seed * n, (seed + 1) * n)

    def truth(self, seed: int) -> np.ndarray:
        return self.captions.truth[self.rows(seed)]

    def batch(self, seed: int) -> dict[str, jax.Array]:
        return {name: jnp.asarray(self.data[name][self.rows(seed)]) for name in ("items", "contrast", "seed")}

    def mentions(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """States (n, L, D) before first mentions, whether these are hallucinated (n,), and where they are (n, 2)."""
        mine = Captions(*(field[self.rows(seed)] for field in self.captions))
        where, labels = mine.mentions
        return mine.states[where[:, 0], where[:, 1]], labels, where

    def confidences(self, seed: int) -> np.ndarray:
        """(n,) of first mentions."""
        where = self.mentions(seed)[2]
        return self.captions.confidence[self.rows(seed)][where[:, 0], where[:, 1]]

    def words(self, seed: int) -> np.ndarray:
        """(n,) tokens of first mentions."""
        where = self.mentions(seed)[2]
        return self.captions.tokens[self.rows(seed)][where[:, 0], where[:, 1]]


def word_prior(words: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(V,) how often each word is hallucinated, with the mean rate added once to every word."""
    size = len(world.tokenizer)
    return (np.bincount(words, labels, size) + labels.mean()) / (np.bincount(words, minlength=size) + 1)


def within_word(scores: np.ndarray, labels: np.ndarray, words: np.ndarray) -> float | None:
    """Mean AUROC within words, weighted by their pairs: what a lookup of words cannot have."""
    total = weight = 0.0
    for word in np.unique(words):
        mine = labels[words == word]
        if pairs := int(mine.sum() * (~mine).sum()):
            total += pairs * float(auroc(scores[words == word], mine))
            weight += pairs
    return total / weight if weight else None


def preceding_minimum(told: Told, seed: int, where: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PMC: the least confidence among the tokens of the sentence before a mention; of hallucinated, of truthful."""
    tokens, confidence = told.captions.tokens[told.rows(seed)], told.captions.confidence[told.rows(seed)]
    end = world.tokenizer.ids[world.END]
    least, kept = [], []
    for (i, t), label in zip(where.tolist(), labels.tolist(), strict=True):
        ends = np.flatnonzero(tokens[i, :t] == end)
        start = int(ends[-1]) + 1 if ends.size else 0
        if start < t:
            least.append(confidence[i, start:t].min())
            kept.append(label)
    values, false = np.asarray(least), np.asarray(kept, bool)
    return values[false], values[~false]


def chair_metrics(name: str, texts: list[rollback.Decoded], counts: list[Chair]) -> dict[str, Metric]:
    """CHAIR, recall, length and cost of one decoder, by seed."""
    return {
        f"chair_i/{name}": per_seed([100 * float(c.chair_i) for c in counts], "%"),
        f"chair_s/{name}": per_seed([100 * float(c.chair_s) for c in counts], "%"),
        f"recall/{name}": per_seed([100 * float(c.recall) for c in counts], "%"),
        f"length/{name}": per_seed([float(t.lengths.mean()) for t in texts], "tokens"),
        f"rollbacks/{name}": per_seed([float(t.interventions.mean()) for t in texts], "per caption"),
        f"cost/{name}": per_seed([float(t.forwards.sum() / t.lengths.sum()) for t in texts], "forwards per token"),
        f"unfinished/{name}": per_seed([100 * float((~t.finished).mean()) for t in texts], "% of captions"),
    }


def compare(key: jax.Array, name: str, found: dict[str, list[Chair]]) -> dict[str, Metric]:
    """Against greedy and against TruthPrInt; intervals draw pictures again, the same for both and for all seeds."""

    def table(decoder: str) -> np.ndarray:
        return np.stack([np.stack([np.asarray(field) for field in counts]) for counts in found[decoder]])  # (S, 4, N)

    own, greedy, best = table(name), table("greedy"), table("truthprint")
    size = own.shape[-1]
    drawn = np.asarray(jax.random.randint(key, (1000, size), 0, size))
    times = np.stack([np.bincount(rows, minlength=size) for rows in drawn])  # (R, N)

    def both(rule: Any) -> tuple[float, tuple[float, float], tuple[float, ...]]:
        once = tuple(float(rule(*(arm[s : s + 1].sum(-1) for arm in (own, greedy, best)))[0]) for s in range(len(own)))
        again = np.mean(
            [rule(*(np.einsum("rn,fn->rf", times, arm[s]) for arm in (own, greedy, best))) for s in range(len(own))], 0
        )
        low, high = np.quantile(again, [0.025, 0.975])
        return float(np.mean(once)), (float(low), float(high)), once

    def chair_i(sums: np.ndarray) -> np.ndarray:
        return 100 * sums[..., 1] / np.maximum(sums[..., 0], 1)

    def recall(sums: np.ndarray) -> np.ndarray:
        return 100 * sums[..., 2] / np.maximum(sums[..., 3], 1)

    rules = {
        f"drop/{name}": (
            lambda a, g, b: 100 * (1 - chair_i(a) / np.maximum(chair_i(g), 1e-9)),
            "% of greedy's CHAIR_i",
        ),
        f"recall_lost/{name}": (lambda a, g, b: recall(g) - recall(a), "points"),
        f"over/{name}": (lambda a, g, b: chair_i(a) - chair_i(b), "points of CHAIR_i"),
    }
    measured = {metric: (both(rule), unit) for metric, (rule, unit) in rules.items()}
    return {
        metric: Metric(value=value, ci95=interval, n=size, unit=unit, per_seed=seeds)
        for metric, ((value, interval, seeds), unit) in measured.items()
    }


def pair_rows(maps: tp.Alignment, x: Any, y: Any, other: Any, other_y: Any, most: int = 300) -> dict[str, np.ndarray]:
    """Two leading coordinates of source and target states in the source's subspace: raw, and aligned."""
    x, other = jnp.asarray(x[:most]), jnp.asarray(other[:most])
    return {
        "source": np.asarray(maps.source(x))[:, :2],
        "raw": np.asarray(maps.source(other))[:, :2],
        "aligned": np.asarray(maps.target(other))[:, :2],
        "source_labels": np.asarray(y[:most]),
        "target_labels": np.asarray(other_y[:most]),
    }


def words_of(tokens: np.ndarray, length: int) -> str:
    """The words of a caption, without its end."""
    return " ".join(world.tokenizer.words[token] for token in tokens[:length] if token != EOS)


def example(told: Told, greedy: list[rollback.Decoded], guarded: list[rollback.Decoded]) -> dict[str, Any] | None:
    """The first test picture of seed 0 whose caption was changed: its truth, both captions, every rollback."""
    changed = np.flatnonzero(guarded[0].interventions > 0)
    if not changed.size:
        return None
    row = int(changed[0])
    truth = [world.NOUNS[0][c] for c in np.flatnonzero(told.truth(0)[row])]
    steps = [
        f"at {t}: back to {i}, not '{world.tokenizer.words[banned]}'"
        for t, i, banned in guarded[0].trace[row][: guarded[0].interventions[row]].tolist()
    ]
    before, after = (words_of(out[0].tokens[row], int(out[0].lengths[row])) for out in (greedy, guarded))
    return {"truth": ", ".join(truth), "before": before, "after": after, "steps": steps}
