"""ZeroQuant-V2 (arXiv 2303.08302): what does rounding weights and activations cost, and what repairs it?

    python -m experiments run zeroquant_v2                    # about 10 minutes of CPU time
    python -m experiments run zeroquant_v2 --preset smoke     # one small decoder, a minute of it

Every decoder of a ladder is rounded to nearest in ten ways: weights (W), activations (A), both (WA), 8 or 4 bits,
symmetric or not (T1); some again with planted outliers, apart. Then the studied decoders: RTN, GPTQ, ZQ-Local and
ZQ-Global at W4A16 and W4A8, per row and in groups (T2, T3), LoRC on each (T4), and its rank (T5). The models are given;
a seed is another set of calibration and evaluation texts. Nothing is tuned on evaluation texts: the rates of ZQ are
chosen by the loss on calibration texts.

The paper's numbers are of models from 125 million parameters up; ours are on docs/papers/zeroquant_v2.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.compression import _zeroquant_v2_figures as draw
from experiments.compression._zeroquant_v2_claims import CLAIMS
from experiments.compression._zeroquant_v2_lab import (
    ASYM,
    GROUP,
    OFF,
    STATIC,
    SYM,
    TENSOR,
    Factors,
    Grid,
    Kernels,
    Subject,
    calibrated,
    factors,
    kernels_of,
    make_subjects,
    measure,
    planted,
    reconstruct,
    repaired,
    round_all,
    run_gptq,
    special_lorc,
)
from experiments.measures import per_seed
from mechlab.analysis.intervals import bootstrap_mean
from mechlab.core.rng import stream
from mechlab.methods.compression.quality import Quality
from mechlab.methods.compression.zeroquant_v2 import sensitivity_class
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "run"]

Metrics = dict[str, Metric]
LADDER_GRIDS = (Grid(8, None, True), Grid(8), Grid(4, None, True), Grid(4))
CELLS: dict[str, tuple[int | None, int]] = {
    "W8A16 sym": (0, OFF),
    "W8A16 asym": (1, OFF),
    "W4A16 sym": (2, OFF),
    "W4A16 asym": (3, OFF),
    "W16A8 sym": (None, SYM),
    "W16A8 asym": (None, ASYM),
    "W8A8 sym": (0, SYM),
    "W8A8 asym": (1, ASYM),
    "W4A8 sym": (2, SYM),
    "W4A8 asym": (3, ASYM),
}
"""T1: which of ``LADDER_GRIDS`` for the weights (None: as they are), and which scheme for the activations."""
METHODS = ("rtn", "gptq", "local", "global")
ACTIVATIONS = {"A16": OFF, "A8": ASYM}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      ladder: decoders of the sensitivity study: tales-S, -M, -L, stories260K, or hub ids, read with WikiText-2.
      planted, factors, share: decoders studied again with a share of outlier channels so many times as large.
      studied: decoders on which all methods are tried; every group must divide their widths.
      seeds: sets of texts.
      calibration, evaluation, length: texts of each set, and tokens of a text.
      groups: inputs that share a step, largest first; LoRC is tried per row and with the smallest.
      train_groups: train ZQ-Local and ZQ-Global with the smallest groups too, not only per row.
      rank, ranks: of LoRC on every method, and of its sweep.
      steps, rates, batch: of ZQ-Local and ZQ-Global; Adam's first step in mean |w|, and texts per step of ZQ-Global.
      in_turn: also train ZQ-Global on what the quantised blocks before give.
      lorc_forms: also try LoRC with factors of 8 bits, and weighted by the Hessians of the inputs.
    """

    ladder: tuple[str, ...] = ("tales-S", "tales-M", "tales-L", "stories260K")
    planted: tuple[str, ...] = ("tales-M", "tales-L")
    factors: tuple[float, ...] = (32.0,)
    share: float = 0.01
    studied: tuple[str, ...] = ("tales-L",)
    seeds: int = 2
    calibration: int = 24
    evaluation: int = 24
    length: int = 128
    groups: tuple[int, ...] = (128, 64, 32)
    train_groups: bool = True
    rank: int = 8
    ranks: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32)
    steps: int = 40
    rates: tuple[float, ...] = (3e-3, 1e-2)
    batch: int = 2
    in_turn: bool = False
    lorc_forms: bool = True

    def __post_init__(self) -> None:
        problems = []
        if not self.ladder or not self.groups or list(self.groups) != sorted(self.groups, reverse=True):
            problems.append("ladder must name a decoder, and groups must be there, the largest first")
        if min(self.seeds, self.calibration, self.evaluation, self.batch) < 1 or self.length < 2 or self.steps < 0:
            problems.append("seeds, calibration, evaluation and batch must be positive, length at least 2, steps >= 0")
        if self.batch > self.calibration:
            problems.append(f"batch must be at most the {self.calibration} calibration texts")
        if min(self.rank, *self.ranks) < 0 or 0 not in self.ranks:
            problems.append("ranks must not be negative, and 0 must be among them")
        if not self.rates or min(self.rates) <= 0 or not 0 < self.share <= 1:
            problems.append("rates must be positive, and share must be in (0, 1]")
        if problems:
            raise ValueError("; ".join(problems))


PRESETS: dict[str, Config] = {
    "smoke": Config(
        ladder=("tales-S",),
        planted=("tales-S",),
        studied=("tales-S",),
        calibration=6,
        evaluation=8,
        length=64,
        groups=(16,),
        train_groups=False,
        ranks=(0, 8),
        steps=20,
        rates=(1e-2,),
        lorc_forms=False,
    ),
    "cpu": Config(),
    "accel": Config(
        planted=("tales-S", "tales-M", "tales-L", "stories260K"),
        factors=(1.0, 8.0, 32.0),
        studied=("tales-M", "tales-L"),
        seeds=5,
        calibration=128,
        evaluation=64,
        length=256,
        groups=(64, 32),
        steps=300,
        rates=(1e-3, 3e-3, 1e-2, 3e-2),
        batch=8,
        in_turn=True,
    ),
    "paper": Config(
        ladder=("facebook/opt-125m", "facebook/opt-350m", "facebook/opt-1.3b", "facebook/opt-6.7b"),
        planted=(),
        studied=("facebook/opt-125m", "facebook/opt-1.3b"),
        seeds=1,
        calibration=100,
        evaluation=100,
        length=2048,
        groups=(512, 256, 128, 64, 32),
        steps=300,
        rates=(1e-3, 3e-3, 1e-2, 3e-2),
    ),
}


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """The whole experiment: the ladder, planted outliers, all methods on the studied decoders, claims and figures."""
    subjects = make_subjects(stream(key, "texts"), config, log)
    metrics: Metrics = {}
    seen: dict[str, Any] = {}
    acts = {}
    for name in config.studied:
        if name in subjects:
            subjects[name], acts[name] = calibrated(subjects[name], config.groups[-1])
    for name in config.ladder:
        if name in subjects:
            log.say(f"sensitivity of {name}")
            sensitivity(subjects[name], metrics)
    for name in config.planted:
        for factor in config.factors if name in subjects else ():
            sensitivity(planted(stream(key, "outliers"), subjects[name], factor, config.share), metrics)
    for name, seen_by_blocks in acts.items():
        log.say(f"all methods on {name}")
        study(stream(key, "study", name), subjects[name], seen_by_blocks, config, metrics, seen)
    return Result(metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=draw.all_figures(metrics, seen))


def sensitivity(subject: Subject, metrics: Metrics) -> None:
    """T1: plain rounding of weights, activations and both."""
    rounded = round_all(subject.config, subject.params, LADDER_GRIDS)
    variants = {
        cell: ([None if grid is None else rounded[grid]] * subject.seeds, scheme)
        for cell, (grid, scheme) in CELLS.items()
    }
    record(metrics, subject, measure(subject, variants))


def study(
    key: jax.Array,
    subject: Subject,
    acts: dict[str, jax.Array],
    config: Config,
    metrics: Metrics,
    seen: dict[str, Any],
) -> None:
    """T2 to T5 on one decoder, and ways to round activations that T1 leaves out."""
    own = kernels_of(subject.config, subject.params)
    others = {"W16A8 tensor": TENSOR, "W16A8 static": STATIC, "W16A8 groups": GROUP}
    none: list[Kernels | None] = [None] * subject.seeds
    record(metrics, subject, measure(subject, {name: (none, scheme) for name, scheme in others.items()}))

    weights = quantised(key, subject, acts, config, metrics)
    repairs: dict[str, list[Factors]] = {}
    variants: dict[str, tuple[list[Kernels], int]] = {}
    left: dict[str, np.ndarray] = {}
    for cell, kernels in weights.items():
        method, grid, act = cell.split("/")
        variants[f"{cell}/r0"] = (kernels, ACTIVATIONS[act])
        if grid not in ("row", f"g{config.groups[-1]}"):
            continue
        same = f"{method}/{grid}/A16"
        if method in ("rtn", "gptq") and same in repairs:
            repairs[cell] = repairs[same]
        else:
            top = max(config.rank, *config.ranks)
            repairs[cell] = [factors(subject.config, own, q, top) for q in kernels]
        swept = grid == "row" and act == "A16" and method in ("rtn", "gptq")
        for rank in {config.rank, *config.ranks} - {0} if swept else {config.rank}:
            both = [
                repaired(subject.config, own, q, f, jnp.asarray(rank))
                for q, f in zip(kernels, repairs[cell], strict=True)
            ]
            variants[f"{cell}/r{rank}"] = ([out for out, _ in both], ACTIVATIONS[act])
            left[f"{cell}/r{rank}"] = np.stack(
                [np.concatenate([np.asarray(rows) for rows in squares.values()]) for _, squares in both]
            )
    if config.lorc_forms:
        for name, special in special_lorc(subject, acts, Grid(4), config.rank).items():
            variants[f"rtn/row/A16/r{config.rank} {name}"] = (special, OFF)
    found = measure(subject, variants)
    record(metrics, subject, found)
    errors(metrics, subject, config, left)
    gains(stream(key, "bootstrap"), metrics, subject, config, found)
    seen.setdefault("spectra", {})[subject.name] = {
        cell: np.concatenate([values[0].values[f"attn/{name}"] for name in "qo"])
        for cell, values in repairs.items()
        if cell.split("/")[0] in ("rtn", "gptq") and cell.endswith("A16")
    }


def quantised(
    key: jax.Array, subject: Subject, acts: dict[str, jax.Array], config: Config, metrics: Metrics
) -> dict[str, list[Kernels]]:
    """Four-bit kernels of every seed, by "method/grid/activations"."""
    grids = (Grid(4), *(Grid(4, group) for group in config.groups))
    cells: dict[str, list[Kernels]] = {}
    for grid, kernels in zip(grids, round_all(subject.config, subject.params, grids), strict=True):
        gptq = run_gptq(subject, grid)
        for act in tuple(ACTIVATIONS) if grid in (grids[0], grids[-1]) else ("A16",):
            cells[f"rtn/{grid.name}/{act}"] = [kernels] * subject.seeds
            cells[f"gptq/{grid.name}/{act}"] = gptq
    with_training = (grids[0], grids[-1]) if config.train_groups else grids[:1]
    trained = [(method, grid) for grid in with_training for method in ("local", "global")]
    for method, grid in [*trained, *([("in turn", grids[0])] if config.in_turn else [])]:
        by_lane, best = reconstruct(stream(key, method, grid.name), subject, acts, grid, config, method)
        for act, lanes in zip(ACTIVATIONS, by_lane, strict=True):
            cells[f"{method}/{grid.name}/{act}"] = lanes
        for rate, share in zip((0.0, *config.rates), best, strict=True):
            name = f"rate/{subject.name}/{method}/{grid.name}/{rate:g}"
            metrics[name] = Metric(value=100 * float(share), unit="% of kernels or blocks")
    return cells


def record(metrics: Metrics, subject: Subject, found: dict[str, Quality]) -> None:
    """KL, increase of perplexity and class of every variant, by seed."""
    for name, quality in found.items():
        base, after = np.exp(quality.base_loss.mean(1)), np.exp(quality.loss.mean(1))
        metrics[f"perplexity/{subject.name}"] = per_seed(base, "perplexity")
        metrics[f"kl/{subject.name}/{name}"] = per_seed(quality.kl.mean(1), "nats a token")
        metrics[f"increase/{subject.name}/{name}"] = per_seed(after - base, "perplexity")
        metrics[f"relative/{subject.name}/{name}"] = per_seed(100 * (after / base - 1), "% of perplexity")
        classes = sensitivity_class(after - base), sensitivity_class(after - base, base)
        for kind, of_seeds in zip(("class", "relative_class"), classes, strict=True):
            metrics[f"{kind}/{subject.name}/{name}"] = per_seed(of_seeds, "class")


def errors(metrics: Metrics, subject: Subject, config: Config, left: dict[str, np.ndarray]) -> None:
    """How much of |E|^2 LoRC takes, and how far that is from what the singular values predict; (S, kernels, 3) each."""
    for cell, squares in left.items():
        before, after, predicted = np.moveaxis(squares.astype(np.float64), -1, 0)
        metrics[f"error/{subject.name}/{cell}"] = per_seed(100 * after.sum(1) / before.sum(1), "% of |E|^2")
        worst = np.abs(after - predicted) / before
        metrics[f"prediction/{subject.name}/{cell}"] = per_seed(worst.max(1), "of |E|^2")


def gains(key: jax.Array, metrics: Metrics, subject: Subject, config: Config, found: dict[str, Quality]) -> None:
    """By how much LoRC lowers the KL, with a bootstrap over all texts."""
    for name in [cell.removesuffix("/r0") for cell in found if cell.endswith("/r0")]:
        if f"{name}/r{config.rank}" not in found:
            continue
        gain = found[f"{name}/r0"].kl - found[f"{name}/r{config.rank}"].kl
        mean, low, high = (float(x) for x in bootstrap_mean(stream(key, name), gain.ravel()))
        metrics[f"gain/{subject.name}/{name}"] = Metric(
            value=mean, ci95=(low, high), n=gain.size, unit="nats a token", per_seed=tuple(gain.mean(1))
        )
