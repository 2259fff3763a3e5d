"""Dopamine (arXiv 2602.11726): can a frozen network be moved to a new mode by a threshold and a gain per unit?

    python -m experiments run dopamine                  # about 3 minutes on two cores
    python -m experiments run dopamine --preset smoke   # scikit-learn's digits, seconds

A perceptron is trained on images of which half are upright and half are rotated by 45 degrees (disjoint digits), then
frozen. Every arm adapts to rotated training images only, and is tested on rotated and, for forgetting, on upright test
images. A second base that saw upright images only tests the stated limitation. Every arm gets the same steps and its
own learning rate, the best of three on a validation slice of seed 0. Seeds are vmapped.

The paper gives no table of numbers. Ours are on docs/papers/dopamine.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.adaptation import _dopamine_figures as draw
from experiments.adaptation._dopamine_claims import CLAIMS
from experiments.adaptation._dopamine_lab import (
    Arm,
    Lab,
    best_rate,
    evaluate,
    foundation,
    gated_run,
    lanes_of,
    make_arms,
    prepare,
    train_arm,
)
from experiments.measures import per_seed, percent, points
from mechlab.analysis.metrics import accuracy
from mechlab.core import select
from mechlab.core.edits import Mask, at, chain
from mechlab.core.rng import stream
from mechlab.core.transforms import AdapterState
from mechlab.data.images import load_images
from mechlab.methods.adaptation import dopamine
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "resolve", "run"]

ALL_ARMS = ("taugate", "sparse", "gain", "threshold", "bias", "lora_1", "lora_4", "lora_8", "full")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      data: "auto" takes MNIST where it is on this machine, else scikit-learn's digits, and downloads nothing; the run's
        record says which it was.
      network: the perceptron with ``hidden``, or a small convolutional network with one gate per channel.
      hidden: hidden widths, or channels.
      seeds: number of networks.
      arms: adapted on the base that saw both modes.
      upright_arms: adapted on the base that saw upright images only.
      angles: of the target mode, degrees counter-clockwise; the first is the one that claims are judged on.
      steps, batch: of every training, foundation and arms alike (375 x 128 is six epochs of 8,000).
      foundation_rate: Adam's, for the base.
      rate_factors: each arm's learning rate is the best of its default times these.
      sharpness: s of the gates.
      sharpness_sweep, penalty_sweep: trained values of s and of lambda_g in the figures.
      schedules: also train with s annealed from 10 to 50, and with straight-through gates.
      closed: k of the causal check: how many units are closed.
    """

    data: Literal["auto", "mnist", "digits"] = "auto"
    network: Literal["mlp", "cnn"] = "mlp"
    hidden: tuple[int, ...] = (256, 256)
    seeds: int = 5
    arms: tuple[str, ...] = ALL_ARMS
    upright_arms: tuple[str, ...] = ("taugate", "lora_8")
    angles: tuple[float, ...] = (45.0,)
    steps: int = 375
    batch: int = 128
    foundation_rate: float = 1e-3
    rate_factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    sharpness: float = 10.0
    sharpness_sweep: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0, 50.0)
    penalty_sweep: tuple[float, ...] = ()
    schedules: bool = False
    closed: int = 10

    def __post_init__(self) -> None:
        unknown = [arm for arm in (*self.arms, *self.upright_arms) if arm not in ALL_ARMS]
        if unknown:
            raise ValueError(f"unknown arms {unknown}; known: {', '.join(ALL_ARMS)}")
        if "taugate" not in self.arms:
            raise ValueError('arms must contain "taugate", the method of the paper')
        if self.network == "cnn" and any(arm.startswith("lora") for arm in (*self.arms, *self.upright_arms)):
            raise ValueError("LoRA is defined on matrices; leave the lora arms out for network=cnn")
        if min(self.seeds, self.steps, self.batch, *self.hidden) < 1 or not self.angles:
            raise ValueError("seeds, steps, batch, hidden widths must be at least 1, and there must be an angle")


PRESETS: dict[str, Config] = {
    "smoke": Config(
        data="digits",
        hidden=(64, 64),
        seeds=3,
        arms=("taugate", "lora_1", "lora_4"),
        upright_arms=(),
        steps=120,
        batch=64,
        rate_factors=(1.0,),
        sharpness_sweep=(),
    ),
    "cpu": Config(),
    "accel": Config(
        data="mnist",
        hidden=(512, 512, 512, 512),
        seeds=10,
        angles=(45.0, 15.0, 30.0, 60.0, 75.0, 90.0),
        steps=2800,
        penalty_sweep=(0.0, 0.05, 0.1, 0.2, 0.4, 0.8),
        schedules=True,
    ),
    "paper": Config(data="mnist", seeds=10, steps=2800),
}


def resolve(config: Config) -> Config:
    """The same configuration with ``data="auto"`` decided: a record names its data, and a resumed run keeps it."""
    found: Any = load_images(config.data).name
    return dataclasses.replace(config, data=found)


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """The whole experiment: bases, arms, sweeps, what the gates do, claims and figures."""
    lab = prepare(key, config, log)
    boot = stream(key, "bootstrap")
    arms = make_arms(lab.model, lab.site)
    bases = foundation(lab)
    before = jax.tree.map(np.array, bases)
    seeds = jnp.arange(config.seeds)

    metrics: dict[str, Metric] = {}
    right: dict[str, dict[str, np.ndarray]] = {}
    states: dict[str, AdapterState] = {}
    for base_name, names in (("mixed", config.arms), ("upright", config.upright_arms)):
        if not names:
            continue
        base = bases[base_name]
        right[f"{base_name}/frozen"] = evaluate(lab, None, base, seeds)
        for name in names:
            arm, label = arms[name], f"{base_name}/{name}"
            rate = best_rate(lab, arm, base, f"{base_name}-{name}")
            state = train_arm(lab, arm, lanes_of(lab, base, seeds, arm, rate=rate), f"{base_name}-{name}")
            states[label], right[label] = state, evaluate(lab, arm, base, state)
            metrics[f"rate/{label}"] = Metric(value=rate, unit="Adam learning rate")
            metrics[f"trainable/{name}"] = Metric(value=select.count(state.train) / config.seeds, unit="numbers")

    metrics |= accuracies(boot, right)
    metrics["base_changed"] = Metric(
        value=sum(
            int((x != np.asarray(y)).sum())
            for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(bases), strict=True)
        ),
        unit="weights",
    )
    metrics["gate_units"] = Metric(value=sum(s.value.shape[-1] for s in lab.model.sites.named(lab.site)), unit="units")
    seen = look_inside(lab, arms, bases["mixed"], states, metrics)
    curves = sweeps(lab, arms["taugate"], bases["mixed"], metrics)
    return Result(
        metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=draw.all_figures(metrics, seen, curves)
    )


def accuracies(key: jax.Array, right: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Metric]:
    """Accuracies in percent, and paired differences in points: of every arm to its frozen base, of LoRA to TauGate."""
    metrics: dict[str, Metric] = {}
    for label, by in right.items():
        metrics |= {f"{mode}/{label}": percent(stream(key, label), hits) for mode, hits in by.items()}
    for label, by in right.items():
        base, name = label.split("/")
        frozen = right[f"{base}/frozen"]
        if name != "frozen":
            metrics[f"gain/{label}"] = points(stream(key, label), by["rotated"], frozen["rotated"])
            metrics[f"forgetting/{label}"] = points(stream(key, label), frozen["upright"], by["upright"])
        if "hard" in by:
            metrics[f"hardening/{label}"] = points(stream(key, label), by["rotated"], by["hard"])
        if name.startswith("lora"):
            metrics[f"over_taugate/{label}"] = points(
                stream(key, label), by["rotated"], right[f"{base}/taugate"]["rotated"]
            )
    return metrics


def look_inside(
    lab: Lab, arms: Mapping[str, Arm], base: Any, states: Mapping[str, AdapterState], metrics: dict[str, Metric]
) -> dict[str, np.ndarray]:
    """What the gates do on rotated test images: activity, saved products, attribution. Adds metrics, returns arrays."""
    config = lab.config
    seen: dict[str, np.ndarray] = {}
    for name in ("taugate", "sparse"):
        if name not in config.arms:
            continue

        def inside(params: Any, state: AdapterState, x: jax.Array, name: str = name) -> Any:
            variables = arms[name].variables(params, state, sharpness=config.sharpness)
            _, pre = gated_run(lab, variables, x)
            opened = jnp.concatenate([g.open(pre[at]).reshape(-1) for at, g in variables["edits"].items()])
            pre = {at: z.reshape(-1, z.shape[-1]) for at, z in pre.items()}
            last = list(variables["edits"])[-1]
            return {
                "activity": dopamine.activity(variables["edits"], pre),
                "skipped": dopamine.skipped(variables["edits"], pre),
                "firing": dopamine.firing(variables["edits"][last], pre[last]),
                "gates": opened[:: max(1, opened.size // 20_000)],
            }

        rotated = jax.jit(jax.vmap(inside, (0, 0, None)))(base, states[f"mixed/{name}"], lab.test_x[1])
        for reading, shares in (
            rotated["activity"] | {f"skipped.{k}": v for k, v in rotated["skipped"].items()}
        ).items():
            metrics[f"activity/{name}/{reading}"] = per_seed(100 * shares, "%")
        seen[f"gates/{name}"] = np.asarray(rotated["gates"]).reshape(-1)
        if name == "taugate":
            upright = jax.jit(jax.vmap(inside, (0, 0, None)))(base, states[f"mixed/{name}"], lab.test_x[0])
            seen["firing"] = np.stack([np.asarray(upright["firing"][0]), np.asarray(rotated["firing"][0])], 1)
    if config.network == "mlp":
        attribute(lab, arms["taugate"], base, states["mixed/taugate"], metrics, seen)
    return seen


def attribute(
    lab: Lab, arm: Arm, base: Any, state: AdapterState, metrics: dict[str, Metric], seen: dict[str, np.ndarray]
) -> None:
    """Close the most attributed units of the last hidden layer, and as many random open ones: which hurts more?"""
    last = f"{lab.site}.{len(lab.config.hidden) - 1}"
    head = f"layer_{len(lab.config.hidden)}/kernel"

    def one(key: jax.Array, params: Any, state: AdapterState) -> Any:
        variables = arm.variables(params, state, sharpness=lab.config.sharpness)
        logits, acts = lab.model.capture(variables, lab.test_x[1], sites=(last,))
        kernel = select.get(params, head)[head]
        ranked = dopamine.rank_units(acts[last], kernel, logits)
        # Random open units: a random score, with units that are (nearly) closed sorted last.
        scores = jax.random.uniform(key, acts[last].shape) + (jnp.abs(acts[last]) < 1e-3)
        predicted = logits.argmax(-1)[:, None]

        def drop(order: jax.Array) -> jax.Array:
            keep = Mask(dopamine.keep_without(order, lab.config.closed))
            closed = chain(variables["edits"], at(lab.model.sites, last, keep))
            after = lab.model.apply(variables | {"edits": closed}, lab.test_x[1])
            return jnp.take_along_axis(logits - after, predicted, 1).mean()

        return drop(ranked), drop(jnp.argsort(scores, -1)), dopamine.class_contribution(acts[last], kernel)

    keys = jax.vmap(lambda k: stream(k, "random units"))(lab.keys)
    top, random, contribution = jax.jit(jax.vmap(one))(keys, base, state)
    metrics["closing/attributed"], metrics["closing/random"] = per_seed(top, "logit"), per_seed(random, "logit")
    seen["contribution"] = np.asarray(contribution[0])


def sweeps(lab: Lab, arm: Arm, base: Any, metrics: dict[str, Metric]) -> dict[str, dict[str, Any]]:
    """TauGate trained at several sharpnesses, penalties, angles and schedules; every sweep is one vmapped program."""
    config = lab.config
    curves: dict[str, dict[str, Any]] = {}
    seeds = jnp.arange(config.seeds)
    rate = metrics["rate/mixed/taugate"].value

    def over(values: tuple[float, ...], name: str, **settings: Any) -> tuple[Any, AdapterState, dict[str, Any]]:
        lanes = lanes_of(lab, base, jnp.tile(seeds, len(values)), arm, rate=rate, **settings)
        return lanes["params"], train_arm(lab, arm, lanes, name), lanes

    def scored(params: Any, state: AdapterState, sharpness: Any, hard: bool, mode: int = 1) -> np.ndarray:
        def one(params: Any, state: AdapterState, s: jax.Array) -> jax.Array:
            variables = arm.variables(params, state, sharpness=s, hard=hard)
            return accuracy(lab.model.apply(variables, lab.test_x[mode]), lab.test_y)

        return 100 * np.asarray(jax.jit(jax.vmap(one))(params, state, sharpness)).reshape(-1, config.seeds).T

    if values := config.sharpness_sweep:
        params, state, lanes = over(values, "sharpness", sharpness=jnp.repeat(jnp.asarray(values), config.seeds))
        both = {kind: scored(params, state, lanes["sharpness"], kind == "hard") for kind in ("soft", "hard")}
        curves["sharpness"] = {"x": values, "curves": both}
    if values := config.penalty_sweep:
        params, state, lanes = over(values, "penalty", penalty=jnp.repeat(jnp.asarray(values), config.seeds))
        curves["penalty"] = {"x": values, "curves": {"soft": scored(params, state, lanes["sharpness"], False)}}
    if config.angles[1:]:
        adapted, frozen = [], []
        for mode in range(1, len(config.angles) + 1):
            params, state, lanes = over((1.0,), f"angle-{mode}", mode=mode)
            adapted.append(scored(params, state, lanes["sharpness"], False, mode))
            unmoved = jax.vmap(lambda p, x=lab.test_x[mode]: accuracy(lab.model.apply({"params": p}, x), lab.test_y))
            frozen.append(100 * np.asarray(unmoved(base))[:, None])
        order = np.argsort(config.angles)
        both = {name: np.concatenate(x, 1)[:, order] for name, x in (("TauGate", adapted), ("frozen", frozen))}
        curves["angle"] = {"x": np.asarray(config.angles)[order], "curves": both}
    for schedule in ("annealed", "straight-through") if config.schedules else ():
        lanes = lanes_of(lab, base, seeds, arm, rate=rate)
        state = train_arm(lab, arm, lanes, schedule, schedule)
        end = jnp.full(config.seeds, 50.0 if schedule == "annealed" else config.sharpness)
        for kind in ("soft", "hard"):
            accuracy_of = scored(lanes["params"], state, end, kind == "hard")[:, 0]
            metrics[f"schedule/{schedule}/{kind}"] = per_seed(accuracy_of, "%")
    for name, curve in curves.items():
        for kind, values_of in curve["curves"].items():
            for x, column in zip(curve["x"], values_of.T, strict=True):
                metrics[f"{name}/{kind}/{x:g}"] = per_seed(column, "%")
    return curves
