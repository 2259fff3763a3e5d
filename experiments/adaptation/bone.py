"""Bone (arXiv 2409.15371): does a matrix guided by the frozen weight fit better and faster than LoRA?

    python -m experiments run bone --preset cpu

A base model is fine-tuned by every method at as many trained numbers as ranks allow, each at its own best of three
learning rates (seed 0, validation rows), then by three seeds. The same seed sees the same batches with every method.
Rates and seeds are lanes of one program. The `cpu` preset adapts stories260K to answers of GSM8K.

The paper's numbers are of LLaMA2-7B (GSM8K 49.4 for Bone, 43.5 for PiSSA, 39.0 for LoRA). Ours are on
docs/papers/bone.md.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.adaptation import _bone_figures as draw
from experiments.adaptation._bone_claims import CLAIMS
from experiments.adaptation._bone_lab import Outcome, first_looks, make_arms, run_arm, start_up_seconds
from experiments.adaptation._bone_tasks import make_tasks
from experiments.measures import per_seed, percent
from mechlab.core.rng import stream
from mechlab.data.sources import GSM8K, STORIES260K, TINYSHAKESPEARE, WIKITEXT2, MissingData, available
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "resolve", "run"]

TASKS = ("teacher", "gsm8k", "shakespeare", "sums", "recurrent")
ARMS = ("bone_col", "lora", "loraplus", "pissa", "olora", "lora_ga", "dora", "miss", "guide_only", "full")
FORMS = ("guide_only", "bone_row", "bone_ab", "bone_free")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      tasks: see ``_bone_tasks.py``; "teacher" stands alone, the others share a base.
      base: "stories260k", "own" (a decoder trained here), or a hub id or folder; not used by "teacher".
      arms: each tuned over ``rate_factors`` and trained with every seed.
      forms: further forms of Bone, at Bone-col's rate with seed 0 alone where they are not among the arms.
      block: r of the block methods; the ranks of the LoRA family are matched to it.
      blocks: further sizes of Bone-col, each tuned like an arm.
      seeds, steps, batch: of every training.
      length: tokens of a row, T.
      prompt: of a GSM8K question, the last so many tokens.
      train_rows, validation_rows, test_rows: rows of each part.
      bone_rate, lora_rate, informed_rate, full_rate: centres of the grids of the block methods, of LoRA and DoRA (an
        eighth of it for LoRA+'s A), of PiSSA, OLoRA and LoRA-GA, and of full fine-tuning.
      rate_factors: each arm's learning rate is the best of its centre times these.
      layers, width: of bases that are trained here.
      pretrain_steps, pretrain_batch, pretrain_rate: of their training.
    """

    tasks: tuple[str, ...] = ("gsm8k",)
    base: str = "stories260k"
    arms: tuple[str, ...] = ("bone_col", "lora", "loraplus", "pissa", "olora", "lora_ga", "miss", "full")
    forms: tuple[str, ...] = FORMS
    block: int = 4
    blocks: tuple[int, ...] = ()
    seeds: int = 3
    steps: int = 70
    batch: int = 8
    length: int = 64
    prompt: int = 24
    train_rows: int = 1600
    validation_rows: int = 128
    test_rows: int = 256
    bone_rate: float = 3e-3
    lora_rate: float = 2e-2
    informed_rate: float = 1e-2
    full_rate: float = 2e-3
    rate_factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    layers: int = 8
    width: int = 320
    pretrain_steps: int = 2000
    pretrain_batch: int = 64
    pretrain_rate: float = 1e-3

    def __post_init__(self) -> None:
        wrong = [x for x in self.tasks if x not in TASKS] + [x for x in self.arms if x not in ARMS]
        wrong += [x for x in self.forms if x not in FORMS]
        if wrong:
            raise ValueError(f"unknown {wrong}; tasks: {', '.join(TASKS)}; arms: {', '.join(ARMS)}; forms: {FORMS}")
        if not {"bone_col", "lora"} <= set(self.arms):
            raise ValueError('arms must contain "bone_col" and "lora", which the others are compared with')
        if "teacher" in self.tasks and len(self.tasks) > 1:
            raise ValueError('the task "teacher" has a base of its own and stands alone')
        sizes = (self.block, self.seeds, self.steps, self.batch, self.train_rows, self.validation_rows, self.test_rows)
        if not self.tasks or min(*sizes, *self.blocks) < 1 or not 0 < self.prompt < self.length:
            raise ValueError("sizes must be at least 1, prompt in 1 .. length - 1, and there must be a task")
        if not self.rate_factors or min(*self.rate_factors, *self.rates) <= 0:
            raise ValueError("learning rates and their factors must be positive, and there must be a factor")

    @property
    def rates(self) -> tuple[float, ...]:
        """The centres of all grids."""
        return self.bone_rate, self.lora_rate, self.informed_rate, self.full_rate


PRESETS: dict[str, Config] = {
    "smoke": Config(
        tasks=("teacher",),
        arms=("bone_col", "lora", "pissa", "miss"),
        forms=(),
        steps=200,
        batch=64,
        train_rows=1024,
        test_rows=256,
        bone_rate=1e-2,
        lora_rate=1e-2,
        rate_factors=(1.0,),
    ),
    "cpu": Config(),
    "accel": Config(
        tasks=("gsm8k", "shakespeare", "sums", "recurrent"),
        base="own",
        arms=ARMS,
        block=8,
        blocks=(4, 8, 16, 32),
        seeds=5,
        steps=300,
        batch=16,
        length=128,
        prompt=48,
        train_rows=4800,
        bone_rate=1e-3,
        lora_rate=5e-3,
        informed_rate=3e-3,
        full_rate=5e-4,
    ),
    "paper": Config(
        base="meta-llama/Llama-2-7b-hf",
        arms=("bone_col", "lora", "pissa"),
        forms=(),
        block=64,
        seeds=1,
        steps=58,
        batch=128,
        length=512,
        prompt=256,
        train_rows=7345,
        test_rows=1319,
        bone_rate=2e-5,
        lora_rate=2e-5,
        informed_rate=2e-5,
        full_rate=2e-5,
        rate_factors=(1.0,),
    ),
}


def resolve(config: Config) -> Config:
    """The same configuration, refused where its data are not on this machine; nothing is downloaded unasked."""
    wanted = {
        "gsm8k": [GSM8K],
        "shakespeare": [TINYSHAKESPEARE],
        "recurrent": [TINYSHAKESPEARE, WIKITEXT2, STORIES260K],
    }
    needed = [source for task in config.tasks for source in wanted.get(task, [])]
    needed += [STORIES260K] if config.tasks != ("teacher",) and config.base in ("stories260k", "own") else []
    needed += [WIKITEXT2] if config.base == "own" else []
    missing = sorted({source.name for source in needed if not available(source)})
    if missing:
        raise MissingData(
            f"bone needs {', '.join(missing)}; set MECHLAB_DATA to a folder that holds them, or load each once with "
            "mechlab.data.text.load_text or mechlab.models.subjects.load_stories260k."
        )
    return config


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """All tasks: what every arm starts from, its training, claims and figures."""
    keys = jax.vmap(lambda seed: stream(key, "seeds", seed))(jnp.arange(config.seeds))
    arms = make_arms(config)
    forms = [name for name in config.forms if name not in config.arms]
    compared = [*config.arms, *(f"bone_col_{size}" for size in config.blocks)]
    window = max(1, config.steps // 10)
    metrics: dict[str, Metric] = {}
    losses: dict[str, dict[str, np.ndarray]] = {}
    units: dict[str, str] = {}
    for label, task in make_tasks(key, config, log).items():
        units[label], losses[label] = task.unit, {}
        chosen = {name: arms[name] for name in config.arms}
        timed = start_up_seconds(stream(key, "start-up"), task, chosen, config)
        for name, seen in first_looks(keys, task, {name: arms[name] for name in (*compared, *forms)}, config).items():
            metrics[f"start/{label}/{name}"] = per_seed(seen["difference"], "largest difference of outputs")
            metrics[f"gradient/{label}/{name}"] = per_seed(seen["norm"], f"{task.unit} per unit")
        for name, seconds in timed.items():
            metrics[f"start_up/{label}/{name}"] = Metric(value=1e3 * float(np.median(seconds)), unit="ms")
        for name in compared:
            outcome = run_arm(keys, task, arms[name], config, log, f"{label}-{name}")
            metrics |= measured(stream(key, "bootstrap", label, name), outcome, f"{label}/{name}", task.unit, window)
            losses[label][name] = outcome.losses
        at_bone_s = dataclasses.replace(config, rate_factors=(1.0,))
        for name in forms:
            fixed = dataclasses.replace(arms[name], rate=metrics[f"rate/{label}/bone_col"].value)
            outcome = run_arm(keys[:1], task, fixed, at_bone_s, log, f"{label}-{name}")
            metrics |= measured(stream(key, "bootstrap", label, name), outcome, f"{label}/{name}", task.unit, window)
        metrics |= compared_with_bone(losses[label], label, task.unit, window)
    return Result(
        metrics=metrics,
        claims=judge_claims(CLAIMS, metrics),
        figures=draw.all_figures(metrics, losses, units, window),
    )


def measured(key: jax.Array, outcome: Outcome, label: str, unit: str, window: int) -> dict[str, Metric]:
    """The numbers of one arm on one task."""
    metrics = {
        f"rate/{label}": Metric(value=outcome.rate, unit="learning rate"),
        f"trained/{label}": Metric(value=outcome.trained, unit="numbers"),
        f"final/{label}": per_seed(outcome.losses[:, -window:].mean(1), unit),
        f"held_out/{label}": per_seed(outcome.held_out, unit),
    }
    for rate, loss in outcome.grid.items():
        metrics[f"validation/{label}/{rate:.2g}"] = Metric(value=loss, unit=unit)
    if outcome.hits is not None:
        metrics[f"exact/{label}"] = percent(key, outcome.hits)
    return metrics


def compared_with_bone(losses: dict[str, np.ndarray], label: str, unit: str, window: int) -> dict[str, Metric]:
    """By how much each arm ends above Bone-col on the same batches, and how soon Bone-col is where LoRA ends."""
    final = {name: run[:, -window:].mean(1) for name, run in losses.items()}
    metrics = {
        f"over_bone/{label}/{name}": per_seed(values - final["bone_col"], unit)
        for name, values in final.items()
        if name != "bone_col"
    }

    def arrivals(run: np.ndarray) -> np.ndarray:
        """Steps after which the running mean is at LoRA's final loss; all steps, so about 100 %, where it never is."""
        there = draw.smoothed(run, window) <= final["lora"][:, None] + 1e-9
        return np.where(there.any(1), window + there.argmax(1), run.shape[1])

    share = 100 * arrivals(losses["bone_col"]) / arrivals(losses["lora"])
    metrics[f"steps_to_lora/{label}"] = per_seed(share, "% of LoRA's steps")
    return metrics
