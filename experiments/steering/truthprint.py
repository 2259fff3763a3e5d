"""TruthPrInt (arXiv 2503.10602): are hallucinated objects seen one token early, and does going back avoid them?

    python -m experiments run truthprint                  # two cores
    python -m experiments run truthprint --preset smoke   # checks the mechanics, not gains

Three small captioners describe shelves of digits (data/worlds/shelves.py): "a" and "b" go on from one text decoder, as
LVLMs share a language model, with encoders and themes of their own; "unrelated" shares nothing. All learned from
captions of which a quarter name an absent object of the theme. Detectors are trained on greedy captions of a, and
tested while decoding new pictures; seeds are new pictures and new detectors. ComnHallu carries them to the other domain
and the other captioners. Thresholds come from dev pictures.

The paper's subjects are LVLMs of 7 billion parameters. Ours are on docs/papers/truthprint.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measures import per_seed
from experiments.steering import _truthprint_figures as draw
from experiments.steering import _truthprint_lab as lab_of
from experiments.steering._truthprint_claims import CLAIMS
from experiments.steering._truthprint_measures import (
    Told,
    chair_metrics,
    compare,
    example,
    pair_rows,
    preceding_minimum,
    within_word,
    word_prior,
)
from mechlab.analysis.intervals import bootstrap_mean
from mechlab.analysis.mentions import chair, mentioned, pope, pope_negatives
from mechlab.analysis.metrics import auroc, tpr_at_fpr
from mechlab.core.rng import stream
from mechlab.data.images import load_images
from mechlab.data.worlds import shelves as world
from mechlab.methods.steering import rollback
from mechlab.methods.steering import truthprint as tp
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "resolve", "run"]

DECODERS = ("greedy", "beam", "nucleus", "vcd", "confidence", "random", "immediate", "sentence_start", "truthprint")
GUARDED = ("confidence", "random", "immediate", "sentence_start", "truthprint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      data: domain 0; "auto" takes MNIST where it is on this machine, else scikit-learn's digits.
      image_layers, text_layers, width: of the captioners.
      train: pictures to learn captions from.
      text_steps, eye_steps, steps: of the decoders on text, of the encoders on cells, of the captioners.
      batch, rate: of every training.
      lowest: contrast of the faintest object.
      detect, dev, test: pictures for G, for its epoch and threshold, and for testing, for each seed.
      seeds: new pictures and detectors on the same captioners.
      hidden: widths of G.
      epochs: of G.
      fpr: target on dev; fprs: of the trade-off curve.
      n_max: interventions per sentence.
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
    eye_steps: int = 300
    steps: int = 300
    batch: int = 32
    rate: float = 2e-3
    lowest: float = 0.15
    detect: int = 1500
    dev: int = 300
    test: int = 300
    seeds: int = 3
    hidden: tuple[int, ...] = (128, 64)
    epochs: int = 50
    fpr: float = 0.05
    fprs: tuple[float, ...] = (0.02, 0.1, 0.2)
    n_max: int = 5
    decoders: tuple[str, ...] = DECODERS
    beams: int = 5
    vcd_noise: float = 0.5
    ks: tuple[int, ...] = ()
    chunk: int = 300

    def __post_init__(self) -> None:
        unknown = [name for name in self.decoders if name not in DECODERS]
        if unknown or not {"greedy", "truthprint"} <= set(self.decoders):
            raise ValueError(f"decoders must hold greedy and truthprint and be of {', '.join(DECODERS)}, got {unknown}")
        if min(self.seeds, self.steps, self.detect, self.dev, self.test, self.chunk) < 1 or self.width % 16:
            raise ValueError("counts must be at least 1, and width a multiple of 16")


PRESETS: dict[str, Config] = {
    "smoke": Config(
        data="digits",
        image_layers=1,
        text_layers=2,
        width=48,
        train=400,
        text_steps=40,
        eye_steps=60,
        steps=100,
        detect=100,
        dev=60,
        test=40,
        seeds=1,
        hidden=(),
        epochs=10,
        fprs=(),
        decoders=("greedy", "random", "immediate", "truthprint"),
        chunk=100,
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
    metrics: dict[str, Metric] = {}
    greedy, states = lab_of.decoder(lab, "test", "greedy"), lab_of.state_reader(lab, "test")

    def told(name: str, domain: int, n: int, use: str) -> Told:
        """Greedy captions of n new pictures for every seed, by one captioner."""
        drawn = [lab_of.pictures(stream(key, use, domain, s), lab, n, "test", domain) for s in range(config.seeds)]
        data = {field: np.concatenate([one[field] for one in drawn]) for field in drawn[0]}
        return Told(data, lab_of.captions(lab, lab.of(name), data, greedy, states), config.seeds)

    log.say("greedy captions of a, for the detector")
    # Digits of the detector's pictures are those that the captioner was not trained on: there it would not err.
    sets = {use: told("a", 0, getattr(config, use), use) for use in ("detect", "dev", "test")}
    detectors, seen = detect(stream(key, "detectors"), lab, sets, metrics)
    guard(stream(key, "guard"), lab, sets, detectors, metrics, seen, log)
    transfer(stream(key, "transfer"), lab, sets, told, metrics, seen)
    return Result(metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=draw.all_figures(metrics, seen))


def detect(
    key: jax.Array, lab: lab_of.Lab, sets: dict[str, Told], metrics: dict[str, Metric]
) -> tuple[list[tp.Detector], dict[str, Any]]:
    """One detector per seed at the chosen block, and one at every block; what else could tell."""
    config = lab.config
    rows: dict[str, list[float]] = {}
    detectors, scores, labels, depth = [], [], [], []

    def add(name: str, value: Any) -> None:
        rows.setdefault(name, []).append(float(value))

    for seed in range(config.seeds):
        (x, y, _), (dev_x, dev_y, _), (test_x, test_y, at) = (sets[u].mentions(seed) for u in ("detect", "dev", "test"))
        kept = tp.balanced(stream(key, "balance", seed), y)
        every = at_every_depth(stream(key, "fit", seed), x[kept], y[kept], dev_x, dev_y, config)
        depth.append(
            [
                float(auroc(tp.detector_logit(jax.tree.map(lambda leaf, b=b: leaf[b], every), test_x[:, b]), test_y))
                for b in range(config.text_layers)
            ]
        )
        g = jax.tree.map(lambda leaf: leaf[lab.layer], every)
        logit = np.asarray(tp.detector_logit(g, test_x[:, lab.layer]))
        detectors.append(g)
        scores.append(logit)
        labels.append(test_y)
        add("auroc", auroc(logit, test_y))
        for fpr in (1, 5, 10):
            add(f"tpr_{fpr}", tpr_at_fpr(logit, test_y, fpr / 100))
        words = sets["test"].words(seed)
        add("auroc_confidence", auroc(-sets["test"].confidences(seed), test_y))
        add("auroc_word", auroc(word_prior(sets["detect"].words(seed), y)[words], test_y))
        if (inside := within_word(logit, test_y, words)) is not None:
            add("auroc_within_word", inside)
        false, true = preceding_minimum(sets["test"], seed, at, test_y)
        metrics_of = {"hallucinated": false, "truthful": true}
        for name, values in metrics_of.items():
            rows.setdefault(f"pmc/{name}", []).append(float(values.mean()))
    for name, values in rows.items():
        metrics[name if "/" in name else f"detector/{name}"] = per_seed(values, "probability" if "/" in name else "")
    seen = {"scores": scores, "labels": labels, "depth": np.asarray(depth), "pmc": metrics_of}
    return detectors, seen


def at_every_depth(key: jax.Array, x: Any, y: Any, dev_x: Any, dev_y: Any, config: Config) -> tp.Detector:
    """A detector after every block, all in one program; x (N, L, D), leaves of the result (L, ...)."""

    def fit(x: jax.Array, dev_x: jax.Array) -> tp.Detector:
        return tp.fit_detector(key, x, y, dev_x, dev_y, hidden=config.hidden, epochs=config.epochs)

    return jax.vmap(fit, in_axes=1)(jnp.asarray(x), jnp.asarray(dev_x))


def guard(
    key: jax.Array,
    lab: lab_of.Lab,
    sets: dict[str, Told],
    detectors: list[tp.Detector],
    metrics: dict[str, Metric],
    seen: dict[str, Any],
    log: Log,
) -> None:
    """Every decoder on the test pictures, at thresholds from dev that flag an equal share of greedy's words there."""
    config, found = lab.config, {}
    outputs: dict[str, list[rollback.Decoded]] = {}
    thresholds: dict[str, list[float]] = {name: [] for name in GUARDED}
    for seed in range(config.seeds):
        x, y, _ = sets["dev"].mentions(seed)
        prob = np.asarray(tp.detector_prob(detectors[seed], x[:, lab.layer]))
        tau = tp.threshold_at_fpr(prob, y, config.fpr)
        share = float((prob >= tau).mean())
        unsure = 1 - sets["dev"].confidences(seed)
        given = {"confidence": tp.threshold_at_rate(unsure, share), "random": 1 - share}
        for name in GUARDED:
            thresholds[name].append(given.get(name, tau))

    def texts(name: str, taus: list[float]) -> list[rollback.Decoded]:
        decode = lab_of.decoder(lab, "test", "truthprint" if name.startswith("fpr") else name)
        return [
            jax.tree.map(
                np.asarray,
                decode(lab.of("a"), sets["test"].batch(seed), detectors[seed], taus[seed], stream(key, name, seed)),
            )
            for seed in range(config.seeds)
        ]

    for name in config.decoders:
        log.say(f"decoding: {name}")
        outputs[name] = texts(name, thresholds.get(name, [2.0] * config.seeds))
    for fpr in config.fprs:
        taus = []
        for seed in range(config.seeds):
            x, y, _ = sets["dev"].mentions(seed)
            taus.append(tp.threshold_at_fpr(tp.detector_prob(detectors[seed], x[:, lab.layer]), y, fpr))
        outputs[f"fpr_{fpr:g}"] = texts(f"fpr_{fpr:g}", taus)

    for name, texts_of in outputs.items():
        counts = [chair(out.tokens, sets["test"].truth(seed), world.CLASS_OF) for seed, out in enumerate(texts_of)]
        found[name] = counts
        metrics |= chair_metrics(name, texts_of, counts)
        for kind in ("random", "popular", "adversarial"):
            asked = []
            for seed, out in enumerate(texts_of):
                truth = sets["test"].truth(seed)
                said = mentioned(out.tokens, world.CLASS_OF, world.CLASSES)
                asked.append(pope(said, truth, pope_negatives(stream(key, kind, seed), truth, kind)))
            for field in ("accuracy", "f1", "yes_rate"):
                metrics[f"pope/{kind}/{field}/{name}"] = per_seed([100 * float(getattr(p, field)) for p in asked], "%")
    for name in outputs:
        if name != "greedy":
            metrics |= compare(stream(key, "bootstrap", name), name, found)
    seen["example"] = example(sets["test"], outputs["greedy"], outputs["truthprint"])


def transfer(
    key: jax.Array, lab: lab_of.Lab, sets: dict[str, Told], told: Any, metrics: dict[str, Metric], seen: dict[str, Any]
) -> None:
    """AUROC of a's detector on other pictures and other captioners, with and without ComnHallu, and its rank."""
    config = lab.config
    targets = {"cross_data": ("a", 1), "cross_lineage": ("b", 0), "cross_both": ("b", 1), "unrelated": ("unrelated", 0)}
    others = {name: told(model, domain, config.detect, "other") for name, (model, domain) in targets.items()}
    rows: dict[str, list[float]] = {}
    for seed in range(config.seeds):
        (x, y, _), (dev_x, dev_y, _) = (sets[use].mentions(seed) for use in ("detect", "dev"))
        kept = tp.balanced(stream(key, "balance", seed), y)
        x, dev_x = x[:, lab.layer], dev_x[:, lab.layer]
        best = tp.choose_k(x)
        settings = {"hidden": config.hidden, "epochs": config.epochs}
        plain = tp.fit_detector(stream(key, "plain", seed), x[kept], y[kept], dev_x, dev_y, **settings)
        for k in (best, *config.ks):
            # Source maps do not depend on the target, so one detector serves all.
            first = tp.comnhallu(x, x, k)
            g = tp.fit_detector(
                stream(key, "aligned", seed), first.source(x[kept]), y[kept], first.source(dev_x), dev_y, **settings
            )
            for name, other in others.items():
                target_x, target_y, _ = other.mentions(seed)
                target_x = target_x[:, lab.layer]
                maps = tp.comnhallu(x, target_x, k)
                value = float(auroc(tp.detector_logit(g, maps.target(target_x)), target_y))
                rows.setdefault(f"aligned/{name}" if k == best else f"k_{k}/{name}", []).append(value)
                if k == best:
                    rows.setdefault(f"plain/{name}", []).append(
                        float(auroc(tp.detector_logit(plain, target_x), target_y))
                    )
                    if name == "cross_lineage" and seed == 0:
                        seen["spaces"] = pair_rows(maps, x, y, target_x, target_y)
        rows.setdefault("k", []).append(best)
    for name, values in rows.items():
        metrics[f"transfer/{name}"] = per_seed(values, "directions" if name == "k" else "AUROC")
    related = ("cross_data", "cross_lineage", "cross_both")
    gains = np.concatenate([np.subtract(rows[f"aligned/{n}"], rows[f"plain/{n}"]) for n in related])
    mean, low, high = (float(v) for v in bootstrap_mean(stream(key, "bootstrap"), gains))
    metrics["transfer/gain"] = Metric(value=mean, ci95=(low, high), n=len(gains), unit="AUROC", per_seed=tuple(gains))
