"""Decoding emotion (arXiv 2510.04064): where a language model holds an emotion, how it bends, and how long it stays.

    python -m experiments run emotion_probes                  # minutes on two cores
    python -m experiments run emotion_probes --preset smoke   # tales-S alone, seconds

Two subjects, all frozen. "emotions": stories260K reads 1,250 real scenarios for six emotions, five folds; scenarios
that share half of their words are in one fold. "tales": the shipped models read texts of seven moods made in three
stages (``data/worlds/emotion_corpus.py``); no cue word is in two parts. One probe per depth and seed; the depth at
which an arm is reported is the best on dev texts, never on test texts. Then the model is asked (zero-shot, calibrated,
few-shot), instructions are put before neutral texts, and neutral or the model's own words behind emotional ones.

Results are on docs/papers/emotion_probes.md.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measures import per_seed, percent, points
from experiments.steering import _emotion_probes_figures as draw
from experiments.steering import _emotion_probes_lab as lab
from experiments.steering._emotion_probes_claims import CLAIMS
from experiments.steering._emotion_probes_measures import (
    LATER,
    geometry_of,
    measure_scale,
    peak,
    report,
    stages,
    standardised,
)
from experiments.steering._emotion_probes_subjects import (
    Subject,
    Tales,
    scenario_subject,
    tales_corpus,
    tales_subject,
)
from mechlab.analysis.linalg import pca, project
from mechlab.analysis.metrics import confusion, macro_f1
from mechlab.core.rng import stream
from mechlab.data.worlds import tales
from mechlab.methods.steering import emotion_probes as emo
from mechlab.models.subjects import SIZES
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      reader: of the scenarios: "stories260K", or a hub id or folder of a decoder or an encoder; "" leaves them out.
      limit: scenarios at most; 0 for all.
      folds: of the scenarios.
      sizes: of tales, smallest first; the last one is studied in full.
      texts: numbers of train, dev and test texts of tales, multiples of 21.
      seeds: probes per depth and fold.
      hidden, batch, epochs: of a probe.
      shuffled: also read a network of the same weights in random places.
      shots: texts asked about behind one example per class.
      neutral, emotional: test texts behind instructions, at most.
      utterances: test texts with something behind them; twice as many to train the probe of later places.
      offsets: tokens behind them.
      sampled: tokens that the model writes itself behind its texts; 0 for none.
    """

    reader: str = "stories260K"
    limit: int = 0
    folds: int = 5
    sizes: tuple[Literal["S", "M", "L"], ...] = ("S", "M", "L")
    texts: tuple[int, int, int] = (1050, 210, 630)
    seeds: int = 3
    hidden: int = 128
    batch: int = 64
    epochs: int = 30
    shuffled: bool = True
    shots: int = 200
    neutral: int = 90
    emotional: int = 70
    utterances: int = 140
    offsets: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 50, 75, 100, 140, 180)
    sampled: int = 100

    def __post_init__(self) -> None:
        unknown = [size for size in self.sizes if size not in SIZES]
        if unknown or not self.sizes:
            raise ValueError(f"sizes: unknown {unknown}; known: {', '.join(SIZES)}")
        if any(n < 21 or n % 21 for n in self.texts):
            raise ValueError(f"texts: wanted three positive multiples of 21, got {self.texts}")
        if self.offsets[:1] != (0,) or tuple(sorted(set(self.offsets))) != self.offsets or len(self.offsets) < 2:
            raise ValueError(f"offsets: wanted rising numbers from 0 on, got {self.offsets}")
        if min(self.seeds, self.shots, self.neutral, self.emotional, self.utterances) < 1 or self.folds < 2:
            raise ValueError("seeds, shots, neutral, emotional and utterances must be at least 1, folds at least 2")
        if self.utterances > self.texts[2] or self.emotional > self.texts[2]:
            raise ValueError(f"utterances and emotional: at most the {self.texts[2]} test texts of tales")

    @property
    def probe(self) -> emo.ProbeConfig:
        """Of every probe."""
        return emo.ProbeConfig(hidden=self.hidden, batch=self.batch, epochs=self.epochs)


PRESETS: dict[str, Config] = {
    "smoke": Config(
        reader="",
        sizes=("S",),
        texts=(168, 42, 84),
        seeds=2,
        hidden=64,
        batch=64,
        epochs=20,
        shuffled=False,
        shots=8,
        neutral=8,
        emotional=14,
        utterances=21,
        offsets=(0, 8, 32),
        sampled=0,
    ),
    "cpu": Config(),
    "accel": Config(
        texts=(9786, 2100, 2100),
        seeds=5,
        hidden=256,
        batch=256,
        shots=1250,
        neutral=500,
        emotional=700,
        utterances=1400,
    ),
    # The paper's kind of model on the scenarios; its own 400,000 texts are not wired up.
    "paper": Config(
        reader="Qwen/Qwen3-0.6B",
        texts=(9786, 2100, 2100),
        seeds=5,
        hidden=256,
        batch=256,
        shots=1250,
        neutral=500,
        emotional=700,
        utterances=1400,
    ),
}


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """The whole experiment: both subjects, then claims and figures."""
    metrics: dict[str, Metric] = {}
    drawn: dict[str, dict[str, Any]] = {}
    seeds = jax.vmap(lambda seed: stream(key, "probe", seed))(jnp.arange(config.seeds))
    corpus = tales_corpus(stream(key, "corpus"), config.texts)
    if config.reader:
        scenarios = scenario_subject(stream(key, "scenarios"), config.reader, config.folds, config.limit or None, log)
        if scenarios is not None:
            own = stream(key, "emotions")
            drawn["emotions"], reading = study(own, seeds, scenarios, config, metrics, log)
            bend(own, scenarios, corpus, reading, config, metrics, drawn["emotions"], log)
            if scenarios.writes:
                wait(own, seeds, scenarios, reading, config, metrics, drawn["emotions"])
    drawn["scale"] = {"sizes": config.sizes, "accuracy": [], "fisher": [], "silhouette": []}
    curves = {}
    for size in config.sizes[:-1]:
        log.say(f"tales-{size}")
        subject = tales_subject(size, corpus)
        x = lab.features(subject, subject.params)
        small = lab.read(seeds, x, subject.labels, subject.folds, len(subject.names), config.probe)
        measure_scale(size, small, geometry_of(subject, x), metrics, drawn["scale"])
        curves[f"tales-{size}"] = 100 * small.hits.mean(-1)
        x = lab.features(subject, subject.params, "mean")
        pooled = lab.read(seeds, x, subject.labels, subject.folds, len(subject.names), config.probe)
        metrics[f"scale/mean_pool/{size}"] = per_seed(100 * pooled.at_depth.mean(1), "%")
    own, subject = stream(key, "tales"), tales_subject(config.sizes[-1], corpus)
    drawn["tales"], reading = study(own, seeds, subject, config, metrics, log)
    measure_scale(config.sizes[-1], reading, drawn["tales"]["geometry"], metrics, drawn["scale"])
    drawn["tales"]["curves"] = curves | drawn["tales"]["curves"]
    stages(reading, subject, corpus, metrics)
    leak(own, seeds, subject, corpus, config, metrics)
    bend(own, subject, corpus, reading, config, metrics, drawn["tales"], log)
    wait(own, seeds, subject, reading, config, metrics, drawn["tales"])
    return Result(metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=draw.all_figures(metrics, drawn))


def study(
    key: jax.Array, seeds: jax.Array, subject: Subject, config: Config, metrics: dict[str, Metric], log: Log
) -> tuple[dict[str, Any], lab.Reading]:
    """A, B and C: probes at every depth with their baselines, the geometry, and the model asked."""
    name, folds, classes = subject.name, subject.folds, len(subject.names)
    truth = subject.labels[folds.test]
    fit = functools.partial(lab.read, seeds, folds=folds, classes=classes, config=config.probe)
    log.say(f"{name}: {subject.reader}, probes of trained and untrained networks")
    untrained = {"random": lab.random_params(stream(key, "random"), subject)}
    if config.shuffled:
        untrained["shuffled"] = lab.shuffled_params(stream(key, "shuffled weights"), subject.params)
    x = lab.features(subject, subject.params)
    kinds = {"random weights": lab.features(subject, untrained["random"])}
    reading, random = fit(x, subject.labels), fit(kinds["random weights"], subject.labels)
    pooled = fit(lab.features(subject, subject.params, "mean"), subject.labels)
    arms = {"probe": reading.at_depth, "embed": reading.hits[:, 0], "random": random.at_depth}
    arms["mean_pool"] = pooled.at_depth
    pooled_random = fit(lab.features(subject, untrained["random"], "mean"), subject.labels)
    arms["mean_pool_random"] = pooled_random.at_depth
    curves = {subject.reader: reading.hits, "mean of tokens": pooled.hits, "random weights": random.hits}
    if config.shuffled:
        moved = fit(lab.features(subject, untrained["shuffled"]), subject.labels)
        arms["shuffled"], curves["shuffled weights"] = moved.at_depth, moved.hits
    control = fit(x, np.asarray(emo.control_labels(stream(key, "control"), subject.groups, classes)))
    arms["control"] = control.hits[:, reading.depth]
    log.say(f"{name}: linear probes, words, prompts")
    arms["linear"] = lab.read_linear(x[:, reading.depth], subject.labels, folds, classes)[None]
    arms["words"] = lab.read_words(lab.count_words(subject.texts), subject.labels, folds, classes)[None]
    arms["majority"] = (truth == np.bincount(truth).argmax())[None]
    asked = lab.ask(stream(key, "ask"), subject, config.shots) if subject.writes else {}
    rows = asked.pop("few_shot_rows", None)
    arms |= {arm: hits[None] for arm, hits in asked.items()}

    metrics |= {f"accuracy/{name}/{arm}": percent(stream(key, arm), hits) for arm, hits in arms.items()}
    for arm in ("embed", "random", "shuffled", "linear", "words", "zero_shot", "calibrated"):
        if arm in arms:
            other = np.broadcast_to(arms[arm], reading.at_depth.shape)
            metrics[f"over_{arm}/{name}"] = points(stream(key, "over", arm), reading.at_depth, other)
    if rows is not None:
        few = np.broadcast_to(arms["few_shot"], (config.seeds, len(rows)))
        metrics[f"over_few_shot/{name}"] = points(stream(key, "over few"), reading.at_depth[:, rows], few)
    metrics[f"selectivity/{name}"] = points(stream(key, "selectivity"), reading.at_depth, arms["control"])
    layers = reading.hits.shape[1] - 1
    metrics[f"depth/{name}"] = Metric(value=reading.depth, unit=f"of {layers} layers, 0 is the embedding")
    metrics[f"layers/{name}"] = Metric(value=layers, unit="layers")
    metrics[f"peak/{name}"] = peak(stream(key, "peak"), reading.hits)
    guess = reading.predicted[:, reading.depth]
    metrics[f"macro_f1/{name}"] = per_seed(macro_f1(guess, truth, classes), "")
    for depth in range(layers + 1):
        metrics[f"by_depth/{name}/{depth}"] = per_seed(100 * reading.hits[:, depth].mean(1), "%")
        metrics[f"f1_by_depth/{name}/{depth}"] = per_seed(macro_f1(reading.predicted[:, depth], truth, classes), "")

    standard = standardised(subject, x)
    # All texts may end with the same token: then their embeddings are one point, which has no geometry.
    varies = float(standard[0].std()) > 0.1
    found = {"trained": geometry_of(subject, x), "random": geometry_of(subject, kinds["random weights"])}
    for kind, shape in found.items():
        for depth in range(layers + 1):
            if depth == 0 and not varies:
                continue
            metrics[f"silhouette/{name}/{kind}/{depth}"] = Metric(value=float(shape.silhouette[depth]))
            metrics[f"fisher/{name}/{kind}/{depth}"] = Metric(value=float(shape.fisher[depth]))
    by_class = confusion(guess, truth, classes).sum(0)
    return {
        "curves": {label: 100 * hits.mean(-1) for label, hits in curves.items()},
        "names": list(subject.names),
        "labels": truth,
        "confusion": np.asarray(by_class / by_class.sum(1, keepdims=True)),
        "geometry": found["trained"],
        "maps": {
            label: np.asarray(project(standard[depth], pca(standard[depth], 2)))
            for label, depth in {f"depth {depth}": depth for depth in (int(not varies), reading.depth, layers)}.items()
        },
    }, reading


def leak(
    key: jax.Array, seeds: jax.Array, subject: Subject, corpus: Tales, config: Config, metrics: dict[str, Metric]
) -> None:
    """The same with cues in both parts, and its control task, which can then be learned by heart."""
    x, classes = lab.features(subject, subject.params), len(subject.names)
    fit = functools.partial(lab.read, seeds, x, folds=corpus.mixed, classes=classes, config=config.probe)
    mixed = fit(subject.labels)
    control = fit(np.asarray(emo.control_labels(stream(key, "control"), subject.groups, classes)))
    metrics["accuracy/tales/ungrouped"] = percent(stream(key, "ungrouped"), mixed.at_depth)
    metrics["accuracy/tales/ungrouped_control"] = percent(
        stream(key, "ungrouped control"), control.hits[:, mixed.depth]
    )


def bend(
    key: jax.Array,
    subject: Subject,
    corpus: Tales,
    reading: lab.Reading,
    config: Config,
    metrics: dict[str, Metric],
    drawn: dict[str, Any],
    log: Log,
) -> None:
    """D: instructions before neutral texts, and before emotional ones."""
    plain = np.flatnonzero((corpus.labels == tales.MOODS.index("neutral")) & (corpus.grouped.of_item == 0))
    neutral = [corpus.texts[row] for row in plain[: config.neutral]]
    tested = np.flatnonzero(subject.folds.of_item == 0)
    emotional = tested[np.asarray(jax.random.permutation(stream(key, "emotional"), len(tested)))[: config.emotional]]
    found = lab.malleability(subject, reading.chosen(), reading.depth, neutral, emotional)
    for k, mood in enumerate(subject.names):
        asked, flat = (found.shift[:, found.prompts.index(prompt), k] for prompt in (mood, "flat"))
        metrics[f"shift/{subject.name}/{mood}"] = per_seed(asked, "probability")
        metrics[f"shift_from_flat/{subject.name}/{mood}"] = per_seed(asked - flat, "probability")
    diagonal = [metrics[f"shift/{subject.name}/{mood}"].value > 0 for mood in subject.names if mood != "neutral"]
    metrics[f"shifts_up/{subject.name}"] = Metric(value=sum(diagonal), n=len(diagonal), unit="instructions")
    for index, side in enumerate(("prompt", "text")):
        metrics[f"override/{subject.name}/{side}"] = per_seed(100 * found.override[:, index], "%")
    drawn["malleability"] = found
    log.say("\n".join((f"{subject.name}: what is read behind an instruction", *found.examples)))


def wait(
    key: jax.Array,
    seeds: jax.Array,
    subject: Subject,
    reading: lab.Reading,
    config: Config,
    metrics: dict[str, Metric],
    drawn: dict[str, Any],
) -> None:
    """E: what is still read behind neutral text and, on tales, behind the model's own."""
    name, parts = subject.name, {"test": np.flatnonzero(subject.folds.of_item == 0)}
    if name == "tales":
        parts |= {"train": subject.folds.train[0], "dev": subject.folds.dev[0]}
    most = {"test": config.utterances, "train": 2 * config.utterances, "dev": config.utterances // 2}
    rows = {
        part: at[np.asarray(jax.random.permutation(stream(key, "utterances", part), len(at)))[: most[part]]]
        for part, at in parts.items()
    }
    length = config.offsets[-1]
    more = lab.neutral_tokens(stream(key, "filler"), subject, rows, length)
    found = lab.persistence(seeds, subject, reading, rows, more, config.offsets, config.probe)
    drawn["persistence"] = found
    if name == "tales":
        for offset in (0, int(max(p for p in config.offsets if p <= LATER))):
            asked = lab.ask_later(subject, rows["test"], more["test"], offset)
            metrics[f"persistence/tales/asked/{offset}"] = percent(stream(key, "asked", offset), asked[None])
    report(stream(key, "later"), f"persistence/{name}", found, len(subject.names), metrics)
    if name == "tales" and config.sampled:
        short = {part: at[: config.utterances] for part, at in rows.items()}
        own = lab.own_tokens(stream(key, "sampled"), subject, short, config.sampled)
        offsets = tuple(offset for offset in config.offsets if offset <= config.sampled)
        found = lab.persistence(seeds, subject, reading, short, own, offsets, config.probe, words=True)
        drawn["sampled"] = found
        report(stream(key, "sampled later"), f"sampled/{name}", found, len(subject.names), metrics)
