"""TruthPrInt (arXiv 2503.10602): are hallucinated objects seen one token early, and does going back avoid them?

    python -m experiments run truthprint                  # two cores
    python -m experiments run truthprint --preset smoke   # checks the mechanics, not gains

Three small captioners describe shelves of digits (data/worlds/shelves.py): "a" and "b" go on from one text decoder, as
LVLMs share a language model, with encoders and themes of their own; "unrelated" shares nothing. All learned from
captions of which a quarter name an absent object of the theme. Detectors are trained on greedy captions of a, and
tested while decoding new pictures; seeds are new pictures and new detectors. ComnHallu carries them to the other domain
and the other captioners. Thresholds come from dev pictures. A captioner that says too little, or errs too rarely or too
often, on dev, is not fit to judge the paper by: then no claim is judged.

The paper's subjects are LVLMs of 7 billion parameters. Ours are on docs/papers/truthprint.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.steering import _truthprint_figures as draw
from experiments.steering import _truthprint_lab as lab_of
from experiments.steering._truthprint_claims import CLAIMS
from experiments.steering._truthprint_detect import carry_over, detect
from experiments.steering._truthprint_measures import (
    Told,
    chair_metrics,
    change_metrics,
    compare,
    examples,
    first_mentions,
    match_rate,
    pope_metrics,
)
from mechlab.analysis.mentions import Chair, chair
from mechlab.core.rng import stream
from mechlab.data.images import load_images
from mechlab.data.worlds import shelves as world
from mechlab.methods.steering import rollback
from mechlab.methods.steering import truthprint as tp
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "resolve", "run"]

DECODERS = ("greedy", "beam", *lab_of.UNGUARDED, *lab_of.SCORES, *lab_of.RULES, "truthprint")
TARGETS = {"cross_data": ("a", 1), "cross_lineage": ("b", 0), "cross_both": ("b", 1), "unrelated": ("unrelated", 0)}
"""Captioner and domain that a's detectors are carried to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      data: domain 0; "auto" takes MNIST where it is on this machine, else scikit-learn's digits.
      image_layers, text_layers, width: of the captioners.
      train: pictures to learn captions from.
      text_steps, eye_steps, steps: of the decoders on text, of the encoders on cells, of the captioners; 0 leaves one
        of the first two out.
      batch, rate: of every training; the rate rises for a tenth of the steps, then falls to 0.
      lowest, noise: contrast of the faintest object, and standard deviation of the pixels' noise.
      detect, dev, test, transfer: pictures for G, for its epoch and threshold, for testing, and of each target of
        transfer, for each seed; ``chunk`` divides them.
      seeds: new pictures and detectors on the same captioners.
      hidden: widths of G.
      epochs: of G.
      fpr: target on dev; fprs: of the trade-off curve.
      n_max: interventions per sentence.
      matches: tries to give the controls as many rollbacks as TruthPrInt has on dev.
      decoders: which of ``DECODERS``; "greedy" and "truthprint" always.
      beams: width of the beam search.
      vcd_noise: standard deviation of the noise on the spoilt image.
      ks: ranks of the alignment beside the one chosen by variance.
      chunk: pictures decoded at once.
    """

    data: Literal["auto", "mnist", "digits"] = "auto"
    image_layers: int = 2
    text_layers: int = 3
    width: int = 96
    train: int = 8000
    text_steps: int = 100
    eye_steps: int = 800
    steps: int = 300
    batch: int = 32
    rate: float = 2e-3
    lowest: float = 0.5
    noise: float = 0.15
    detect: int = 1500
    dev: int = 300
    test: int = 300
    transfer: int = 600
    seeds: int = 3
    hidden: tuple[int, ...] = (128, 64)
    epochs: int = 50
    fpr: float = 0.05
    fprs: tuple[float, ...] = (0.02, 0.1, 0.2)
    n_max: int = 5
    matches: int = 3
    decoders: tuple[str, ...] = DECODERS
    beams: int = 5
    vcd_noise: float = 0.5
    ks: tuple[int, ...] = (2, 5, 20, 40)
    chunk: int = 300

    def __post_init__(self) -> None:
        unknown = [name for name in self.decoders if name not in DECODERS]
        if unknown or not {"greedy", "truthprint"} <= set(self.decoders):
            raise ValueError(f"decoders must hold greedy and truthprint and be of {', '.join(DECODERS)}, got {unknown}")
        counts = (self.detect, self.dev, self.test, self.transfer)
        if min(self.seeds, self.matches, self.chunk, *counts) < 1 or any(n % self.chunk for n in counts):
            raise ValueError(f"detect, dev, test and transfer must be multiples of chunk={self.chunk}, got {counts}")
        if self.steps < 10 or {self.text_steps, self.eye_steps} & set(range(1, 10)):
            raise ValueError("steps must be at least 10, text_steps and eye_steps 0 or at least 10")
        if self.width % 16 or self.text_layers < 2:
            raise ValueError("wanted 2 text layers or more, and a width in multiples of 16")


PRESETS: dict[str, Config] = {
    "smoke": Config(
        data="digits",
        image_layers=1,
        text_layers=2,
        width=48,
        train=400,
        text_steps=0,
        eye_steps=0,
        steps=100,
        detect=100,
        dev=50,
        test=50,
        transfer=50,
        seeds=1,
        hidden=(),
        epochs=10,
        fprs=(),
        ks=(),
        matches=1,
        decoders=("greedy", "random", "truthprint"),
        chunk=50,
    ),
    "cpu": Config(),
    "accel": Config(
        text_layers=4,
        train=40_000,
        steps=3000,
        eye_steps=2000,
        seeds=5,
        fprs=(0.01, 0.02, 0.1, 0.2),
        ks=(2, 4, 8, 16, 32),
    ),
    "paper": Config(
        data="mnist",
        text_layers=4,
        width=128,
        train=40_000,
        steps=10_000,
        eye_steps=3000,
        seeds=5,
        ks=(2, 4, 8, 16, 32, 64),
    ),
}


def resolve(config: Config) -> Config:
    """The same configuration with ``data="auto"`` decided."""
    found: Any = load_images(config.data).name
    return dataclasses.replace(config, data=found)


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """Captioners, detectors, decoding, transfer, claims and figures."""
    lab = lab_of.prepare(stream(key, "lab"), config, log)
    decode, states = lab_of.decoders(lab), lab_of.state_reader(lab)
    metrics: dict[str, Metric] = {}

    def told(name: str, domain: int, part: str, n: int, use: str) -> Told:
        """Greedy captions of n new pictures for every seed, by one captioner."""
        drawn = [lab_of.pictures(stream(key, use, domain, s), lab, n, part, domain) for s in range(config.seeds)]
        data = {field: np.concatenate([one[field] for one in drawn]) for field in drawn[0]}
        captions = lab_of.captions(lab, lab.of(name), data, decode, states)
        return Told(data["pixels"], captions, first_mentions(captions, config.seeds))

    log.say("greedy captions of a")
    # The detector's pictures are of objects that the captioner was not trained on: on others it would not err.
    sets = {use: told("a", 0, use, getattr(config, use), use) for use in ("detect", "dev", "test")}
    gate = chair(sets["dev"].captions.tokens, sets["dev"].captions.truth, world.CLASS_OF)
    metrics["gate/recall"] = Metric(value=100 * float(gate.recall), unit="% on dev")
    metrics["gate/chair_i"] = Metric(value=100 * float(gate.chair_i), unit="% on dev")
    log.say(
        f"greedy on dev: recall {metrics['gate/recall'].value:.1f} %, CHAIR_i {metrics['gate/chair_i'].value:.1f} %"
    )

    detectors, seen = detect(stream(key, "detectors"), lab, sets, metrics)
    guard(stream(key, "guard"), lab, sets, detectors, decode, metrics, seen, log)
    log.say("transfer")
    others = {name: told(*target, "test", config.transfer, "other") for name, target in TARGETS.items()}
    # The same key: the aligned detectors are trained on the same mentions.
    carry_over(stream(key, "detectors"), lab, sets, others, detectors, metrics, seen)
    return Result(metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=draw.all_figures(metrics, seen))


def guard(
    key: jax.Array,
    lab: lab_of.Lab,
    sets: dict[str, Told],
    detectors: tp.Detector,
    decode: lab_of.Decode,
    metrics: dict[str, Metric],
    seen: dict[str, Any],
    log: Log,
) -> None:
    """Every decoder on the test pictures; thresholds, and rollback rates of the controls, come from dev pictures."""
    config, dev = lab.config, sets["dev"]
    seeds = range(config.seeds)
    found: dict[str, list[Chair]] = {}
    outputs: dict[str, list[rollback.Decoded]] = {}
    probs = np.asarray(jax.vmap(tp.detector_prob)(detectors, jnp.asarray(dev.mentions.states[:, :, lab.layer])))

    def text(name: str, told: Told, seed: int, tau: float) -> rollback.Decoded:
        mine = jax.tree.map(lambda leaf: leaf[seed], detectors)
        return jax.tree.map(
            np.asarray, decode(name, lab.of("a"), told.pixels[told.rows(seed)], mine, tau, stream(key, name, seed))
        )

    def at_fpr(fpr: float) -> list[float]:
        return [tp.threshold_at_fpr(probs[seed], dev.mentions.false[seed], fpr) for seed in seeds]

    tau = at_fpr(config.fpr)
    on_dev = [float(text("truthprint", dev, seed, tau[seed]).interventions.mean()) for seed in seeds]

    def control(name: str, seed: int) -> float:
        """The threshold of another detector with which decoding goes back on dev as often as with G."""

        def threshold(rate: float) -> float:
            return 1 - rate if name == "random" else tp.threshold_at_rate(1 - dev.mentions.confidence[seed], rate)

        def rollbacks(rate: float) -> float:
            return float(text(name, dev, seed, threshold(rate)).interventions.mean())

        flagged = float((probs[seed] >= tau[seed]).mean())
        return threshold(match_rate(rollbacks, flagged, on_dev[seed], config.matches))

    for name in config.decoders:
        log.say(f"decoding: {name}")
        if name in lab_of.SCORES:
            thresholds = [control(name, seed) for seed in seeds]
        else:
            thresholds = tau if name in lab_of.RULES or name == "truthprint" else [lab_of.NEVER] * config.seeds
        outputs[name] = [text(name, sets["test"], seed, thresholds[seed]) for seed in seeds]
    for fpr in config.fprs:
        outputs[f"fpr_{fpr:g}"] = [text("truthprint", sets["test"], s, t) for s, t in enumerate(at_fpr(fpr))]

    truths = [sets["test"].truth(seed) for seed in seeds]
    for name, texts in outputs.items():
        found[name] = [chair(out.tokens, truth, world.CLASS_OF) for out, truth in zip(texts, truths, strict=True)]
        metrics |= chair_metrics(name, texts, found[name]) | pope_metrics(stream(key, "pope"), name, texts, truths)
    for name in outputs:
        if name != "greedy":
            metrics |= compare(stream(key, "bootstrap"), name, found)
            metrics |= change_metrics(name, outputs[name], outputs["greedy"])
    seen["examples"] = examples(truths[0], outputs["greedy"][0], outputs["truthprint"][0])
    for one in seen["examples"]:
        log.say("\n  ".join((one["truth"], f"greedy: {one['before']}", f"guarded: {one['after']}", *one["steps"])))
        one["picture"] = sets["test"].pixels[one["row"], ..., 0]
