"""What is measured of captions: mentions with their states, CHAIR with intervals over pictures, examples as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measures import per_seed
from experiments.steering._truthprint_lab import END, EOS, Captions
from mechlab.analysis.mentions import Chair, label_mentions, mentioned, pope, pope_negatives
from mechlab.core.rng import stream
from mechlab.data.worlds import shelves as world
from mechlab.methods.steering import rollback
from mechlab.methods.steering import truthprint as tp
from mechlab.reporting.results import Metric


class Mentions(NamedTuple):
    """First mentions of objects in the captions of S seeds, cut to as many as the seed with the fewest has.

    Attributes:
      states: (S, n, L, D) what predicted the word, one token early.
      false: (S, n) whether the object is absent.
      confidence: (S, n) of the word.
      words: (S, n) tokens.
      rows, at: (S, n) caption and position.
    """

    states: np.ndarray
    false: np.ndarray
    confidence: np.ndarray
    words: np.ndarray
    rows: np.ndarray
    at: np.ndarray


class Told(NamedTuple):
    """Pictures of all seeds, one seed after the other, a captioner's greedy captions, and what they mention first."""

    pixels: np.ndarray
    captions: Captions
    mentions: Mentions

    def rows(self, seed: int) -> slice:
        n = len(self.captions.tokens) // len(self.mentions.false)
        return slice(seed * n, (seed + 1) * n)

    def truth(self, seed: int) -> np.ndarray:
        return self.captions.truth[self.rows(seed)]


def first_mentions(captions: Captions, seeds: int) -> Mentions:
    """Of captions (N, ...), N / S of each seed."""
    mask, labels = map(np.asarray, label_mentions(captions.tokens, captions.truth, world.CLASS_OF))
    size = len(mask) // seeds
    found = [np.argwhere(mask[s * size : (s + 1) * size]) + np.array([s * size, 0]) for s in range(seeds)]
    rows, at = np.stack([where[: min(map(len, found))] for where in found]).transpose(2, 0, 1)
    return Mentions(
        captions.states[rows, at], labels[rows, at], captions.confidence[rows, at], captions.tokens[rows, at], rows, at
    )


def preceding_minimum(captions: Captions, mentions: Mentions) -> np.ndarray:
    """PMC (S, n): the least confidence among the tokens of the sentence before a mention; NaN if there are none."""
    least = np.full(mentions.at.shape, np.nan)
    for (s, i), t in np.ndenumerate(mentions.at):
        row = mentions.rows[s, i]
        ends = np.flatnonzero(captions.tokens[row, :t] == END)
        start = int(ends[-1]) + 1 if ends.size else 0
        if start < t:
            least[s, i] = captions.confidence[row, start:t].min()
    return least


def word_prior(words: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(V,) how often each word is hallucinated, with the mean rate added once to every word."""
    size = len(world.tokenizer)
    return (np.bincount(words, labels, size) + labels.mean()) / (np.bincount(words, minlength=size) + 1)


def within_word(scores: np.ndarray, labels: np.ndarray, words: np.ndarray) -> float | None:
    """AUROC over pairs of mentions of one word: what a lookup of words cannot have."""
    wins = pairs = 0.0
    for word in np.unique(words):
        mine, false = scores[words == word], labels[words == word]
        gap = mine[false][:, None] - mine[~false]
        wins += (gap > 0).sum() + (gap == 0).sum() / 2
        pairs += gap.size
    return float(wins / pairs) if pairs else None


def match_rate(rollbacks: Callable[[float], float], rate: float, wanted: float, rounds: int) -> float:
    """The flag rate at which ``rollbacks(rate)`` comes nearest to ``wanted``, tried ``rounds`` times from ``rate`` on.

    Each new rate assumes that rollbacks are proportional to it.
    """
    tried = []
    for _ in range(rounds):
        found = rollbacks(rate)
        tried.append((abs(found - wanted), rate))
        rate = min(0.9, rate * wanted / found) if found > 0 else min(0.9, 2 * rate)
    return min(tried)[1]


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


def pope_metrics(
    key: jax.Array, name: str, texts: list[rollback.Decoded], truths: list[np.ndarray]
) -> dict[str, Metric]:
    """Answers to "is there a ...?" by the caption, by kind of negatives and seed; the same questions for all names."""
    found: dict[str, list[float]] = {}
    for kind in ("random", "popular", "adversarial"):
        for seed, (out, truth) in enumerate(zip(texts, truths, strict=True)):
            said = mentioned(out.tokens, world.CLASS_OF, world.CLASSES)
            answers = pope(said, truth, pope_negatives(stream(key, kind, seed), truth, kind))
            for field, value in answers._asdict().items():
                found.setdefault(f"pope/{kind}/{field}/{name}", []).append(100 * float(value))
    return {metric: per_seed(values, "%") for metric, values in found.items()}


def change_metrics(name: str, texts: list[rollback.Decoded], greedy: list[rollback.Decoded]) -> dict[str, Metric]:
    """What going back does: whether the same objects are named in the end, and whether a noun was taken back."""
    same, nouns = [], []
    for out, plain in zip(texts, greedy, strict=True):
        changed = out.interventions > 0
        said, before = (np.asarray(mentioned(x.tokens, world.CLASS_OF, world.CLASSES)) for x in (out, plain))
        banned = out.trace[out.trace[..., 0] >= 0][:, 2]
        if not changed.any():
            return {}
        same.append(100 * float((said == before).all(1)[changed].mean()))
        nouns.append(100 * float((world.CLASS_OF[banned] >= 0).mean()))
    return {
        f"same_objects/{name}": per_seed(same, "% of captions with a rollback"),
        f"banned_nouns/{name}": per_seed(nouns, "% of rollbacks"),
    }


def compare(key: jax.Array, name: str, found: dict[str, list[Chair]]) -> dict[str, Metric]:
    """Against greedy and against TruthPrInt; intervals draw pictures again, the same for all decoders."""

    def table(decoder: str) -> np.ndarray:
        return np.stack([np.stack([np.asarray(field) for field in counts]) for counts in found[decoder]])  # (S, 4, N)

    arms = [table(decoder) for decoder in (name, "greedy", "truthprint")]
    size = arms[0].shape[-1]
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    times = rng.multinomial(size, np.full(size, 1 / size), 1000)  # (R, N)
    once = [arm.sum(-1)[:, None] for arm in arms]  # (S, 1, 4)
    again = [np.einsum("rn,sfn->srf", times, arm) for arm in arms]  # (S, R, 4)

    def chair_i(sums: np.ndarray) -> np.ndarray:
        return 100 * sums[..., 1] / np.maximum(sums[..., 0], 1)

    def recall(sums: np.ndarray) -> np.ndarray:
        return 100 * sums[..., 2] / np.maximum(sums[..., 3], 1)

    def measured(rule: Callable[..., np.ndarray], unit: str) -> Metric:
        seeds = rule(*once)[:, 0]
        low, high = np.quantile(rule(*again).mean(0), [0.025, 0.975])
        return Metric(value=float(seeds.mean()), ci95=(low, high), n=size, unit=unit, per_seed=tuple(seeds))

    return {
        f"drop/{name}": measured(
            lambda own, greedy, _: 100 * (1 - chair_i(own) / np.maximum(chair_i(greedy), 1e-9)), "% of greedy's CHAIR_i"
        ),
        f"recall_lost/{name}": measured(lambda own, greedy, _: recall(greedy) - recall(own), "points"),
        f"over/{name}": measured(lambda own, _, best: chair_i(own) - chair_i(best), "points of CHAIR_i"),
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


def words_of(tokens: Any, length: int) -> str:
    """The words of a caption, without its end."""
    return " ".join(world.tokenizer.words[token] for token in tokens[:length] if token != EOS)


def examples(
    truth: np.ndarray, greedy: rollback.Decoded, guarded: rollback.Decoded, most: int = 4
) -> list[dict[str, Any]]:
    """The first pictures whose caption was changed: what is there, both captions, and every rollback."""
    found = []
    for row in np.flatnonzero(guarded.interventions > 0)[:most].tolist():
        before, after = (words_of(out.tokens[row], int(out.lengths[row])) for out in (greedy, guarded))
        steps = [
            f'at token {t}: back to {i}, not "{world.tokenizer.words[banned]}"'
            for t, i, banned in guarded.trace[row][: guarded.interventions[row]].tolist()
        ]
        there = [world.NOUNS[0][c] for c in np.flatnonzero(truth[row])]
        found.append({"row": row, "truth": ", ".join(there), "before": before, "after": after, "steps": steps})
    return found
