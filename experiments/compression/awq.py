"""AWQ (arXiv 2306.00978): which channels matter, what scaling does, and what a search over scales is worth.

    python -m experiments run awq                            # tales-L, 3 and 4 bits, three draws of calibration texts
    python -m experiments run awq --preset smoke             # tales-S, 3 bits, seconds
    python -m experiments run awq --preset stories           # a second subject: stories260K, a group per output
    python -m experiments run awq --set model=HUB_ID_OR_FOLDER out=FOLDER group=128

The last one quantises any decoder that ``models.hub`` opens to 4 bits, writes it to a folder, opens it again and lets
it write with packed kernels.

Kernels of the blocks are rounded with groups of 32 inputs, embeddings are not. Beside AWQ stand rounding to nearest, a
few channels kept unrounded or scaled by one factor, and GPTQ (static groups, inputs by falling activity, every layer
calibrated on the unquantised model). Seeds draw other calibration texts; held-out texts are the same for all. Under
shift, calibration is on one domain and evaluation on another. The planted variant has a few channels 8 or 32 times as
large, by a change of parameters that keeps the function; AWQ can undo it exactly, so it is reported apart.

The paper's numbers are perplexities of Llama and OPT and are not quoted. Ours are on docs/papers/awq.md; how fast the
packed kernel is, is the business of ``experiments/bench``.
"""

from __future__ import annotations

import dataclasses

import jax

from experiments.compression import _awq_figures as draw
from experiments.compression import _awq_lab as lab_of
from experiments.compression._awq_claims import CLAIMS
from experiments.compression._awq_ship import ship
from experiments.compression._awq_subjects import load_subject
from mechlab.core.rng import stream
from mechlab.methods.compression.quality import quality
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      model: "tales-S", "tales-M" or "tales-L", "stories260K", a hub id, or a folder.
      out: a folder to be made: quantise the model to 4 bits and write it there, instead of the study.
      bits: of the grids; the claims are about 3 and 4.
      group: inputs that share a step; none for all inputs of an output.
      seeds: draws of calibration texts.
      texts, length: calibration rows and their tokens.
      held_out, held_length: rows to evaluate on, and their tokens.
      shares: of inputs kept unrounded, beside one in a hundred.
      factors: s of the sweep; contains 1.
      sizes: smaller numbers of calibration texts to try.
      shift: whether to calibrate on the wrong domain, where the subject has two.
      planted: factors of planted outliers, each reported apart.
    """

    model: str = "tales-L"
    out: str = ""
    bits: tuple[int, ...] = (3, 4)
    group: int | None = 32
    seeds: int = 3
    texts: int = 8
    length: int = 128
    held_out: int = 8
    held_length: int = 256
    shares: tuple[float, ...] = (0.03, 0.1)
    factors: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 4.0)
    sizes: tuple[int, ...] = (2,)
    shift: bool = True
    planted: tuple[float, ...] = (8.0, 32.0)

    def __post_init__(self) -> None:
        if min(self.seeds, self.texts, self.held_out) < 1 or min(self.length, self.held_length) < 2 or not self.bits:
            raise ValueError("seeds, texts, held_out and bits must be at least 1, lengths at least 2")
        if 1.0 not in self.factors or any(not 0 < share <= 1 for share in self.shares):
            raise ValueError(f"factors must contain 1 and shares be in (0, 1], got {self.factors} and {self.shares}")
        if any(not 1 <= n < self.texts for n in self.sizes):
            raise ValueError(f"sizes must be in 1..{self.texts - 1}, fewer than texts, got {self.sizes}")
        if any(not 2 <= bits <= 8 for bits in self.bits) or (self.group is not None and self.group < 1):
            raise ValueError(f"bits must be in 2..8 and group at least 1, got {self.bits} and {self.group}")


PRESETS: dict[str, Config] = {
    "smoke": Config(
        model="tales-S",
        bits=(3,),
        seeds=1,
        texts=4,
        length=64,
        held_out=4,
        shares=(),
        factors=(1.0, 2.0),
        sizes=(),
        shift=False,
        planted=(),
    ),
    "cpu": Config(),
    "stories": Config(model="stories260K", group=None),
    "accel": Config(seeds=10, texts=256, length=256, held_out=64, sizes=(4, 16, 64)),
    "paper": Config(
        model="meta-llama/Llama-2-7b-hf",
        group=128,
        seeds=1,
        texts=64,
        length=512,
        held_out=64,
        held_length=512,
        shares=(0.001, 0.03),
        sizes=(),
        planted=(),
    ),
}


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """Every arm at every number of bits and seed, the sweep, fewer texts, the shift, planted outliers; claims."""
    if config.out:
        return ship(key, config, log)
    subject = load_subject(config.model)
    log.say(f"{config.model}, calibrated and evaluated on {subject.texts}")
    lab = lab_of.make_lab(stream(key, "held out"), subject, config)
    for seed in range(config.seeds):
        own = jax.random.fold_in(stream(key, "calibration"), seed)
        tokens, acts = lab_of.calibration(lab, own)
        for bits in config.bits:
            log.say(f"seed {seed}, {bits} bits")
            for name, changed in lab_of.arms(lab, own, tokens, acts, bits).items():
                lab.compare(f"{bits}/{name}", changed)
        log.say(f"seed {seed}, sweep, fewer texts and shift")
        lab_of.sweep(lab, acts)
        lab_of.fewer_texts(lab, tokens)
        if config.shift and subject.domains:
            lab_of.shift(lab, stream(key, "shift"), seed)
    for factor in config.planted:
        log.say(f"planted outliers, factor {factor:g}")
        lab_of.planted(lab, stream(key, "planted"), factor)
    metrics = lab.metrics()
    base = quality(subject.model, subject.params, subject.params, lab.held_out)
    metrics["perplexity/none"] = Metric(value=float(base.base_perplexity))
    metrics |= lab_of.search_metrics(lab.losses)
    figures = draw.all_figures(metrics, config) | draw.search_figures(lab.losses)
    return Result(metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=figures)
