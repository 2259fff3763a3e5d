"""LIFT (arXiv 2506.00772): are weights that are large after a rank reduction the ones to train?

    python -m experiments run lift                    # minutes on two cores
    python -m experiments run lift --preset smoke     # a planted MLP, seconds

A decoder of two layers is trained on Markov strings and two-digit sums (the source), then fine-tuned on 400 worked
chains of subtractions (the target), by every rule of choosing 5 % of its kernels' entries, by LoRA of as many
numbers, and in full. Every arm gets the same steps and as many learning rates; its best is chosen on validation chains.
Retention is the exact match of held-out sums after fine-tuning, as a share of the base's.

The paper's own numbers are of 1 to 8 billion parameters. Ours are on docs/papers/lift.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.adaptation import _lift_figures as draw
from experiments.adaptation import _lift_lab as work
from experiments.adaptation import _lift_measures as measures
from experiments.adaptation._lift_claims import CLAIMS
from experiments.finetuning import whole
from experiments.measures import per_seed
from mechlab.core import select
from mechlab.methods.adaptation import lift
from mechlab.methods.adaptation.matrices import get_matrices
from mechlab.methods.adaptation.sparse import jaccard, sparse_adam
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "run"]

ADAPTERS = ("lora", "dora", "pissa")
UNITS = {"score": "%", "source_score": "%", "retention": "% of the base's"}
RULE_ARMS = (*work.RULES, "s2ft")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      subject: "decoder", which can add; "planted", an MLP; "stories260k"; or the hub id of a decoder. The last two
        learn answers of GSM8K.
      length: tokens of a row of GSM8K.
      layers, width, hidden: sizes; of the MLP its inputs and hidden units.
      bases: how many bases are trained; seeds share them in turn.
      seeds: of fine-tuning.
      source_steps, source_batch: the base's training; rows in a step, a quarter strings and the rest sums.
      examples: of the target, to train on.
      held_out: rows of each test and validation set.
      steps, batch: of every fine-tuning.
      rules: arms that choose entries.
      adapters: low-rank arms.
      density: share of every kernel that is trained.
      filter_rank: r of LIFT.
      refresh: N, steps between choices.
      lora_rank: of low-rank arms; 3 has as many numbers as 5 % of these kernels.
      channels: share of the hidden channels that S2FT trains.
      sparse_rate, adapter_rate, full_rate: centres of the grids of learning rates.
      rate_factors: an arm's rates over its centre.
      filter_ranks, refreshes, parts, densities: ablations of LIFT, at its best rate.
      mlp_only: also LIFT on kernels of MLPs only.
      sigmas, draws: noise of the perturbation analysis, in units of the kernels' root mean square.
    """

    subject: str = "decoder"
    length: int = 128
    layers: int = 2
    width: int = 96
    hidden: int = 256
    bases: int = 1
    seeds: int = 3
    source_steps: int = 1600
    source_batch: int = 64
    examples: int = 400
    held_out: int = 200
    steps: int = 150
    batch: int = 16
    rules: tuple[str, ...] = ("lift", "weight_mag", "random", "smallest", "grad_mag")
    adapters: tuple[str, ...] = ("lora",)
    density: float = 0.05
    filter_rank: int = 8
    refresh: int = 50
    lora_rank: int = 3
    channels: float = 0.06
    sparse_rate: float = 6e-3
    adapter_rate: float = 6e-3
    full_rate: float = 2e-3
    rate_factors: tuple[float, ...] = (0.5, 2.0)
    filter_ranks: tuple[int, ...] = (2, 32)
    refreshes: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()
    densities: tuple[float, ...] = ()
    mlp_only: bool = False
    sigmas: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    draws: int = 4

    def __post_init__(self) -> None:
        problems = [f"unknown rule {name!r}" for name in self.rules if name not in RULE_ARMS]
        problems += [f"unknown adapter {name!r}" for name in self.adapters if name not in ADAPTERS]
        problems += [f"unknown part {name!r}" for name in self.parts if name not in work.PARTS]
        if "lift" not in self.rules:
            problems.append('rules must contain "lift", the method of the paper')
        sizes = (self.length, self.layers, self.width, self.hidden, self.lora_rank)
        if (
            min(*sizes, self.bases, self.seeds, self.examples, self.batch, self.draws) < 1
            or self.held_out < 2
            or self.source_batch < 4
        ):
            problems.append(
                "lengths, sizes, seeds, examples, batches and draws must be at least 1, test rows 2, source rows 4"
            )
        if self.steps < 2 or self.refresh < 2:
            problems.append("steps and refresh must be at least 2")
        if not self.rate_factors or min(self.rate_factors) <= 0:
            problems.append("rate_factors must be positive, and there must be one")
        if self.subject == "planted" and (self.mlp_only or "s2ft" in self.rules):
            problems.append("the planted MLP has no MLP kernels of a transformer: leave out mlp_only and s2ft")
        if problems:
            raise ValueError("; ".join(problems))


_EVERYTHING: dict[str, Any] = {
    "rules": RULE_ARMS,
    "adapters": ADAPTERS,
    "filter_ranks": (2, 32),
    "refreshes": (10,),
    "parts": tuple(work.PARTS),
    "densities": (0.01, 0.2),
    "mlp_only": True,
    "rate_factors": (1 / 3, 1.0, 3.0),
}

PRESETS: dict[str, Config] = {
    "smoke": Config(
        subject="planted",
        width=32,
        hidden=48,
        rules=("lift", "weight_mag", "random"),
        adapters=(),
        filter_rank=4,
        steps=60,
        refresh=40,
        filter_ranks=(),
        rate_factors=(1.0,),
        sparse_rate=2e-2,
        full_rate=6e-3,
    ),
    "cpu": Config(),
    "accel": Config(subject="stories260k", length=128, steps=300, held_out=256, **_EVERYTHING),
    "paper": Config(
        subject="meta-llama/Llama-3.2-1B",
        length=512,
        seeds=1,
        examples=7000,
        held_out=256,
        steps=1300,
        rules=("lift", "weight_mag"),
        filter_rank=32,
        refresh=400,
        lora_rank=64,
        sparse_rate=2e-4,
        adapter_rate=2e-4,
        full_rate=5e-5,
        rate_factors=(1.0,),
        filter_ranks=(),
        draws=1,
    ),
}


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """The whole experiment: base, arms, ablations, what the chosen weights are, claims and figures."""
    lab = work.prepare(key, config, log)
    unit = lab.subject.unit
    factors = jnp.asarray(config.rate_factors)
    arms: dict[str, work.Trained] = {}
    for name, group in rule_groups(lab):
        arms |= work.train_sparse(lab, group, config.sparse_rate * factors, name)
    for name in config.adapters:
        arms[name] = work.train_adapter(lab, work.adapters(lab)[name], config.adapter_rate * factors, name)
    arms["full"] = work.train_adapter(lab, whole, config.full_rate * factors, "full")
    arms, base = measures.score(lab, arms)

    metrics = {f"{name}/base": per_seed(x, UNITS.get(name, unit)) for name, x in base.items()}
    for name, trained in arms.items():
        centre = config.full_rate if name == "full" else config.sparse_rate
        centre = config.adapter_rate if name in ADAPTERS else centre
        rate = float(centre * factors[trained.best()])
        metrics |= arm_metrics(name, trained, unit) | {f"rate/{name}": Metric(value=rate, unit="Adam learning rate")}
    for name in ("full", "lora"):
        if name in arms and (gaps := measures.equal_target_gap(arms["lift"], arms[name])):
            metrics[f"retention_gap/{name}"] = per_seed(gaps, "points")

    ablated: dict[str, work.Trained] = {}
    for name, group in ablation_groups(lab):
        ablated |= work.train_sparse(lab, group, jnp.asarray([metrics["rate/lift"].value]), name)
    if ablated:
        for name, trained in measures.score(lab, ablated)[0].items():
            metrics |= arm_metrics(name, trained, unit)
    metrics |= budgets(lab, arms)

    by_rule = {name: trained for name, trained in arms.items() if name in work.RULES}
    rises = measures.perturbation(lab, by_rule)
    metrics |= {f"perturbation/{name}": per_seed(rise.mean(1), unit) for name, rise in rises.items()}
    shapes = measures.geometry(lab, {name: arms[name] for name in ("lift", "full", "lora") if name in arms})
    for name, found in shapes.items():
        readings = ("rank", "inside", "overlap")
        metrics |= {f"{reading}/{name}": per_seed(100 * found[reading], "%") for reading in readings}
    figures = draw.all_figures(config, metrics, arms, rises, shapes, masks(lab, by_rule))
    return Result(metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=figures)


def rule_groups(lab: work.Lab) -> Iterator[tuple[str, dict[str, work.SparseArm]]]:
    """Arms that choose entries, in groups that train as one program; ``lift_once`` is LIFT without refresh."""
    config = lab.config
    plain = [name for name in config.rules if name in work.RULES and name not in work.WATCHED]
    group = {name: work.rule_arm(lab, work.RULES[name], refresh=config.refresh) for name in plain}
    yield "rules", group | {"lift_once": work.rule_arm(lab, lift.PRINCIPAL, refresh=None)}
    for name in config.rules:
        if name in work.WATCHED:
            yield name, {name: work.rule_arm(lab, work.RULES[name], refresh=config.refresh)}
        elif name == "s2ft":
            yield name, {name: work.channels_arm(lab)}


def ablation_groups(lab: work.Lab) -> Iterator[tuple[str, dict[str, work.SparseArm]]]:
    """LIFT with one thing changed, at its best rate."""
    config = lab.config

    def arm(rule: lift.Rule = lift.PRINCIPAL, refresh: int | None = config.refresh, **other: Any) -> work.SparseArm:
        return work.rule_arm(lab, rule, refresh=refresh, **other)

    group = {f"lift_rank_{r}": arm(filter_rank=r) for r in config.filter_ranks}
    group |= {f"lift_{part}": arm(work.PARTS[part]) for part in config.parts}
    if group:
        yield "ablations", group
    for every in config.refreshes:
        yield f"every_{every}", {f"lift_every_{every}": arm(refresh=every)}
    if config.mlp_only:
        yield "mlp_only", {"lift_mlp_only": arm(pattern="**/mlp/*/kernel")}
    for share in config.densities:
        ranks = (config.filter_rank, *config.filter_ranks)
        yield (
            f"density_{share:g}",
            {f"lift_rank_{r}_density_{share:g}": arm(filter_rank=r, density=share) for r in ranks},
        )


def arm_metrics(name: str, trained: work.Trained, unit: str) -> dict[str, Metric]:
    """An arm at its best rate, by seed."""
    best = trained.best()
    metrics = {f"{what}/{name}": per_seed(x[best], UNITS.get(what, unit)) for what, x in trained.held_out.items()}
    metrics[f"state_bytes/{name}"] = Metric(value=trained.state_bytes, unit="bytes")
    if trained.kept is not None:
        metrics[f"outside/{name}"] = Metric(value=trained.outside, unit="weights")
        metrics[f"kept/{name}"] = per_seed(trained.kept[best], "Jaccard index of first and last entries")
    return metrics


def budgets(lab: work.Lab, arms: Mapping[str, work.Trained]) -> dict[str, Metric]:
    """Trained shares and optimiser bytes: of these kernels, and counted for Llama 2 7B."""
    one = jax.tree.map(lambda leaf: leaf[0], lab.subject.bases)
    numbers = select.count(one, lab.subject.pattern)
    entries = (arms["lift"].state_bytes - 4) / 12
    metrics = {
        "density/lift": Metric(value=100 * entries / numbers, unit="% of the kernels' numbers"),
        "state_share/lift": Metric(
            value=100 * arms["lift"].state_bytes / (8 * numbers), unit="% of dense Adam's bytes"
        ),
    }
    # Shapes only: q, k, v, o, gate, up and down of 32 layers.
    sizes = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
    selection = lift.Selection(density=lab.config.density)
    kernels = {str(i): jax.ShapeDtypeStruct((32, *size), jnp.float32) for i, size in enumerate(sizes)}
    index = {str(i): jax.ShapeDtypeStruct((32, selection.entries(*size)), jnp.int32) for i, size in enumerate(sizes)}
    state = jax.eval_shape(lambda params, idx: sparse_adam(1.0, idx).init(params), kernels, index)
    dense = sum(8 * int(np.prod(kernel.shape)) for kernel in kernels.values())
    metrics["llama_2_7b/lift"] = Metric(
        value=work.optimiser_bytes(state) / 1e9, unit="GB, float32 moments and int32 indices"
    )
    metrics["llama_2_7b/dense"] = Metric(value=dense / 1e9, unit="GB, float32 moments")
    return metrics


def masks(lab: work.Lab, arms: Mapping[str, work.Trained]) -> dict[str, Any]:
    """Which entries the rules choose first, in seed 0: their overlap, and one kernel with two masks."""
    chosen = {name: {path: x[0] for path, x in trained.first.items()} for name, trained in arms.items()}

    together = jax.jit(jaccard)

    def overlap(a: str, b: str) -> float:
        return float(np.mean([np.mean(together(x, chosen[b][path])) for path, x in chosen[a].items()]))

    path = next(path for path in chosen["lift"] if "mlp/up" in path or "layer_0" in path)
    one = jax.tree.map(lambda leaf: leaf[0], lab.subject.bases)
    shape = get_matrices(one, path)[path].shape[-2:]

    def marks(name: str) -> np.ndarray:
        first = np.asarray(chosen[name][path]).reshape(-1, chosen[name][path].shape[-1])[0]
        return np.isin(np.arange(np.prod(shape)), first).reshape(shape)

    table = np.asarray([[overlap(a, b) for b in arms] for a in arms])
    shown = {name: marks(name) for name in ("lift", "weight_mag") if name in arms}
    return {"names": list(arms), "overlap": table, **shown}
