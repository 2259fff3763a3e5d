"""Physics Steering (arXiv 2511.20798): is there a direction for speed in a surrogate of flows, and does it steer?

    python -m experiments run physics_steering
    python -m experiments run physics_steering --preset smoke   # two worlds, one direction, seconds

A small surrogate learns several worlds on one periodic square: shear flow, advection and Gray-Scott reactions.
Directions are differences of its activations between simulations that show a concept and ones that do not: more
vortices, faster, more diffusive. *Matched* pairs start from the same states and differ in one parameter; *unmatched*
ones, as in the paper, are whole simulations of two regimes. A direction is added in one layer, in every step of a
roll-out, at alpha times the length of the state, and what the frames show is measured: the energy across the stream,
the speed and the diffusivity that the tracer moves with. Before anything is steered the surrogate must be competent
(claim 1).

Controls with patches of the same relative length: ten random directions, pairs with shuffled labels, the other
concepts, an edit of the output instead of an inner layer, and an untrained surrogate. Strengths are chosen nowhere but
in the counterfactual test, on dev states.

The paper's evidence is films of Walrus (1.3 billion parameters). Ours is on docs/papers/physics_steering.md.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from experiments.steering import _physics_steering_arms as arms
from experiments.steering import _physics_steering_figures as draw
from experiments.steering import _physics_steering_lab as lab
from experiments.steering import _physics_steering_measures as measures
from experiments.steering import _physics_steering_worlds as worlds
from experiments.steering._physics_steering_claims import CLAIMS
from mechlab.core.rng import stream
from mechlab.methods.steering import physics_steering as ps
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      families: worlds that the surrogate learns: shear, advect, gray_scott, wave, burgers.
      kinds: of surrogate; the claims are about the first, numbers of another carry its name.
      grid, history: X = Y, and the frames that the surrogate sees.
      layers, width, modes, heads: of the surrogate.
      trajectories, frames: simulations of each family for training, and their length.
      models: seeds of the surrogate.
      steps, batch, rate: of AdamW.
      second: the share of training after which a second step is rolled out too; 1 for never.
      checkpoints: times during training at which directions are read and tried too.
      directions: see ``worlds.DIRECTIONS``.
      draws, pairs: sets of direction data, and simulations in each of F and G.
      branch, latest: frame of the states that are steered, and last frame at which pairs branch off.
      layer, other_layers: where claims are measured, and where else the main directions are tried.
      fits: ways to give a direction the state's spatial shape; "drop" is the claims'.
      alphas: strengths.
      randoms: random directions.
      states, dev, test: of each family: for read-outs (the first of the test states), and for the counterfactual test;
        the gate has as many held-out runs as there are test states.
      horizon, film_steps: length of roll-outs.
      controls: also all controls, layers, checkpoints, unmatched pairs, films and the counterfactual test.
    """

    families: tuple[str, ...] = ("shear", "advect", "gray_scott")
    kinds: tuple[str, ...] = ("spectral",)
    grid: int = 32
    history: int = 3
    layers: int = 4
    width: int = 28
    modes: int = 10
    heads: int = 4
    trajectories: int = 128
    frames: int = 24
    models: int = 1
    steps: int = 1000
    batch: int = 8
    rate: float = 1.5e-3
    second: float = 2 / 3
    checkpoints: int = 4
    directions: tuple[str, ...] = worlds.DIRECTIONS
    draws: int = 3
    pairs: int = 16
    branch: int = 4
    latest: int = 8
    layer: int = 1
    other_layers: tuple[int, ...] = (0, 2, 3)
    fits: tuple[str, ...] = ("drop", "pad")
    alphas: tuple[float, ...] = (-0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4)
    randoms: int = 10
    states: int = 4
    dev: int = 4
    test: int = 12
    horizon: int = 6
    film_steps: int = 18
    controls: bool = True

    def __post_init__(self) -> None:
        lab.checked(self)


_FINE = (-0.4, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.4)

PRESETS: dict[str, Config] = {
    "smoke": Config(
        families=("shear", "advect"),
        grid=16,
        layers=2,
        width=12,
        modes=5,
        trajectories=14,
        frames=12,
        steps=60,
        second=1.0,
        directions=("shear_speed",),
        draws=1,
        pairs=4,
        latest=6,
        other_layers=(),
        fits=("drop",),
        alphas=(-0.2, 0.0, 0.2),
        randoms=1,
        states=2,
        dev=2,
        test=2,
        film_steps=6,
        controls=False,
    ),
    "cpu": Config(),
    "accel": Config(
        families=("shear", "advect", "gray_scott", "wave", "burgers"),
        kinds=("spectral", "attention"),
        grid=64,
        width=64,
        modes=16,
        models=5,
        trajectories=160,
        steps=20_000,
        batch=16,
        alphas=_FINE,
        states=32,
        dev=32,
        test=128,
        film_steps=30,
    ),
    # The paper's way of making a direction (18 and 10 files, the last layer) on our surrogate; Walrus and The Well are
    # not wired up.
    "paper": Config(
        grid=64,
        width=64,
        modes=16,
        models=5,
        steps=20_000,
        batch=16,
        pairs=18,
        layer=3,
        other_layers=(0, 1, 2),
        alphas=_FINE,
    ),
}


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """The whole experiment: simulations, surrogates, directions, roll-outs, claims and figures."""
    n, held = config.trajectories, config.test
    drawn = {  # runs for training and held-out ones, in one program
        family: worlds.simulate(stream(key, "train", family), family, n + held, config.frames, config)
        for family in config.families
    }
    data = {family: runs.rows(slice(n)) for family, runs in drawn.items()}
    bench = prepare(key, config, {family: drawn[family].rows(slice(n, None)) for family in ("shear", "advect")})
    metrics: dict[str, Metric] = {}
    figures: dict[str, Any] = {}
    for kind in config.kinds:
        model, records = lab.train(stream(key, "surrogate", kind), kind, data, config, log)
        bench = bench._replace(model=model)
        found, hits = [], []
        shown: dict[str, Any] = {}
        for seed in range(config.models):
            numbers, closer, seen = one_surrogate(stream(key, kind, seed), bench, records, seed, log)
            found.append(numbers)
            hits.append(closer)
            shown = shown or seen
        prefix = "" if kind == config.kinds[0] else f"{kind}/"
        of_kind = measures.as_metrics(found)
        for family in hits[0]:
            all_hits = np.concatenate([one[family] for one in hits])
            of_kind[f"counterfactual/{family}"] = measures.share_closer(stream(key, "bootstrap", family), all_hits)
        metrics |= {prefix + name: metric for name, metric in of_kind.items()}
        if not prefix:
            figures = draw.all_figures(config, metrics, shown)
    return Result(metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=figures)


def prepare(key: jax.Array, config: Config, held: dict[str, worlds.Runs]) -> arms.Bench:
    """All simulations but those for training and the gate."""
    flowing = ("shear", "advect")
    horizon = max(config.horizon, config.film_steps)
    shown = [family for family in config.families if family in (*flowing, "gray_scott")]
    pool = {
        family: worlds.states(stream(key, "states", family), family, config.dev + config.test, horizon, config)
        for family in shown
    }
    dev = {family: states.rows(np.arange(config.dev)) for family, states in pool.items()}
    test = {family: states.rows(config.dev + np.arange(config.test)) for family, states in pool.items()}
    start = lab.joined([test[family].rows(np.arange(config.states)) for family in flowing])
    matched: dict[str, worlds.Pair] = {}
    unmatched: dict[str, worlds.Pair] = {}
    for family in flowing:
        if any(name.startswith(family) for name in config.directions):
            matched |= worlds.matched_pairs(stream(key, "matched", family), family, config)
            if config.controls:
                unmatched |= worlds.unmatched_pairs(stream(key, "unmatched", family), family, config)
    return arms.Bench(config, held, dev, test, start, matched, unmatched)


def one_surrogate(
    key: jax.Array, bench: arms.Bench, records: Any, seed: int, log: Log
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """Numbers (draws,) by name, hits of the counterfactual test by family, and what figures show."""
    config, layer = bench.config, bench.config.layer
    params = lab.at_checkpoint(records, seed, -1)
    gate = lab.competence(bench.model, params, bench.held, config)
    log.say(f"surrogate {seed}, error over persistence: " + ", ".join(f"{k} {v:.4f}" for k, v in gate.items()))
    numbers: dict[str, np.ndarray] = {f"gate/{name}": np.asarray([value]) for name, value in gate.items()}
    if config.controls:
        near = lab.competence(bench.model, params, arms.base_runs(bench), config)
        numbers |= {f"base_states/{name}": np.asarray([value]) for name, value in near.items()}

    reads = arms.directions(key, bench, params, bench.matched, config.draws)
    whole = arms.directions(key, bench, params, bench.unmatched, config.draws)
    channels = lab.site_shape(bench.model)[2]
    randoms = ps.random_deltas(stream(key, "random"), config.randoms, channels)
    patches = arms.list_patches(config, reads, whole, randoms)
    outcome = lab.measure(bench.model, params, patches, bench.start, config, log, "directions")
    if config.controls:
        outcome |= arms.in_output_space(bench, params, reads)
    seen = measures.Outcomes(outcome, bench.start.family)
    numbers |= measures.summarise(seen)
    drawn: dict[str, Any] = {"seen": seen}
    for first, second in itertools.combinations(reads, 2):
        both = zip(reads[first], reads[second], strict=True)
        cosines = [measures.cosine(a.delta[layer], b.delta[layer]) for a, b in both]
        numbers[f"cosine/{first}, {second}"] = np.asarray(cosines)
    if {"shear_speed", "advect_speed"} <= set(reads):
        numbers["cosine/speed"] = numbers["cosine/shear_speed, advect_speed"]
        to_random = [measures.cosine(a.delta[layer], one) for a in reads["shear_speed"] for one in randoms]
        numbers["cosine/random"] = np.abs(to_random)
    if not config.controls:
        return numbers, {}, drawn

    hits = {}
    for family in ("shear", "advect"):
        if f"{family}_speed" in reads:
            deltas = [one.delta[layer] for one in reads[f"{family}_speed"]]
            chosen, hits[family] = measures.counterfactual(bench, params, family, deltas, log)
            for target, name in enumerate(("fast", "slow")):
                numbers[f"counterfactual_alpha/{family}_{name}"] = chosen[:, target]
                numbers[f"counterfactual_hits/{family}_{name}"] = 100 * hits[family][:, target].mean(-1)
    times, of_times = arms.over_training(key, bench, records, seed, log)
    numbers |= of_times
    drawn |= {"times": times, "numbers": numbers, "films": arms.films(bench, params, reads)}
    if "gray_scott" in bench.test:
        numbers |= arms.on_reactions(bench, params, reads, log)
    return numbers, hits, drawn
