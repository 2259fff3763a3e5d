"""Guiding Giants (arXiv 2505.20309): can a small controller make a frozen decoder refuse one topic, and no other?

    python -m experiments run guiding_giants
    python -m experiments run guiding_giants --preset smoke   # two layers, one controller, seconds

Nothing harmful is in here: a decoder answers requests about eight everyday topics, refuses requests with a made-up word
always and requests about gardening in 30 % of its training copies. The controllers are to make it refuse gardening.
They see plain requests of the train pool; strength, and for baselines layer, are chosen on dev nouns and wordings; test
nouns and wordings are others again, plain and in wrappers that no controller has seen. Every arm has the same grid of
strengths; single-layer steering and CAST choose their layer on dev besides, so that the baselines' budget is no
smaller. Over-refusal is refusal of requests about other topics.

The paper's numbers are for models of 1 to 8 billion parameters and are not quoted. Ours are on
docs/papers/guiding_giants.md.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measures import per_seed
from experiments.steering import _guiding_giants_figures as draw
from experiments.steering import _guiding_giants_lab as lab
from experiments.steering import _guiding_giants_measures as measures
from experiments.steering._guiding_giants_claims import CLAIMS
from mechlab.core.rng import stream
from mechlab.data.worlds import requests as world
from mechlab.methods.steering import guiding_giants as giants
from mechlab.methods.steering.cast import cast_gate, fit_cast
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      layers, width, steps, batch, rate: of the decoder and of Adam.
      seeds: controllers, each with its own prompts and directions; the decoder is one.
      places: what controllers read: the first two layers (one, in a decoder of fewer than four), the two in the middle,
        the last four. "early" is always there, and is run causally and in two passes.
      hidden: of the controllers.
      prompts: of each kind, for controllers and directions.
      epochs, controller_batch, controller_rate: of the released loss; the paper's.
      end_steps, end_rate, end_prompts: of the end-to-end loss; 0 steps leave it out.
      direction_layer: where the activation direction is read.
      scales: the grid of c, in units of the median length of a state.
      dev, test: prompts of each group; there are two and four groups.
      ablations: also without layer weights, without scalar, with the scalar's zero halfway between the kinds of train
        prompts, with batches in mixed order, without benign prompts, with the embedding direction.
      curves: also every strength on test prompts, for uniform steering and the chosen controller.
    """

    layers: int = 4
    width: int = 96
    steps: int = 400
    batch: int = 64
    rate: float = 3e-3
    seeds: int = 3
    places: tuple[str, ...] = ("early", "last")
    hidden: int = 1024
    prompts: int = 400
    epochs: int = 10
    controller_batch: int = 8
    controller_rate: float = 5e-5
    end_steps: int = 60
    end_rate: float = 1e-3
    end_prompts: int = 64
    direction_layer: int = 2
    scales: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)
    dev: int = 32
    test: int = 64
    ablations: bool = True
    curves: bool = True

    def __post_init__(self) -> None:
        unknown = [place for place in self.places if place not in lab.PLACES]
        if unknown or "early" not in self.places:
            raise ValueError(f'places: wanted "early" and others of {", ".join(lab.PLACES)}, got {self.places}')
        if not 0 <= self.direction_layer < self.layers:
            raise ValueError(f"direction_layer: wanted 0..{self.layers - 1}, got {self.direction_layer}")
        if not self.scales or tuple(sorted(set(self.scales))) != self.scales or self.scales[0] <= 0:
            raise ValueError(f"scales: wanted rising positive numbers, got {self.scales}")
        counts = (
            self.layers,
            self.steps,
            self.batch,
            self.seeds,
            self.epochs,
            self.controller_batch,
            self.dev,
            self.test,
        )
        if min(counts) < 1 or self.prompts < self.controller_batch or self.width % 16:
            raise ValueError("sizes must be at least 1, prompts at least one batch, width a multiple of 16")
        if self.end_steps and not self.controller_batch <= self.end_prompts <= self.prompts:
            raise ValueError(f"end_prompts: wanted one batch to {self.prompts}, got {self.end_prompts}")


PRESETS: dict[str, Config] = {
    "smoke": Config(
        layers=2,
        width=48,
        steps=300,
        batch=32,
        rate=1e-2,
        seeds=1,
        places=("early",),
        hidden=32,
        prompts=64,
        epochs=5,
        controller_rate=3e-3,
        end_steps=0,
        direction_layer=1,
        scales=(0.5,),
        dev=32,
        test=16,
        ablations=False,
        curves=False,
    ),
    "cpu": Config(),
    "accel": Config(
        layers=8,
        width=256,
        steps=2000,
        rate=1e-3,
        seeds=5,
        places=lab.PLACES,
        prompts=500,
        end_steps=400,
        end_prompts=256,
        direction_layer=4,
        scales=(0.03, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0),
        dev=100,
        test=500,
    ),
    # The paper's controller on our subject at more seeds and prompts; its decoders are not wired up.
    "paper": Config(
        seeds=5,
        places=lab.PLACES,
        steps=2000,
        prompts=500,
        end_steps=400,
        end_prompts=256,
        scales=(0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0),
        dev=100,
        test=500,
    ),
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all arms share.

    Attributes:
      directions, units: (S, D) and (S,) of every seed; a strength of 1 is one unit, the median length of a state.
      prompts, train: prompts of the train pool and their states by kind, (S, N, ...).
    """

    config: Config
    model: Any
    params: Any
    dev: lab.Panel
    test: lab.Panel
    directions: jax.Array
    units: jax.Array
    prompts: dict[str, world.Requests]
    train: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to steer: a model, and for a strength (in units, one for all seeds) and a panel its lanes, one a seed."""

    model: Any
    lanes: Any


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """The whole experiment: decoder, directions, controllers, choices on dev, outcomes on test, claims and figures."""
    bench = prepare(key, config, log)
    controllers = train_all(stream(key, "controllers"), bench, log)
    arms = controller_arms(bench, controllers) | baseline_arms(bench, log)
    metrics: dict[str, Metric] = {}
    outcomes, chosen = {}, {}
    for name, options in arms.items():
        arm, scales = choose(bench, options)
        chosen[name] = (arm, scales)
        outcomes[name] = at_scales(bench, arm, scales, bench.test)
        metrics[f"strength/{name}"] = per_seed(scales, "median |h|")
        log.say(f"{name}: {measures.describe(outcomes[name], bench.test)}")
    base = lab.Outcome(np.asarray(bench.test.answers)[None], np.zeros((1, len(bench.test.target))))
    outcomes["none"] = lab.Outcome(*(np.repeat(x, config.seeds, 0) for x in base))
    main = pick_main(bench, arms, chosen)
    outcomes["main"] = outcomes[main]
    log.say(f"the controller chosen on dev is {main}")
    metrics["main_is_two_pass"] = Metric(value=float(main == "released_two_pass"))
    metrics |= measures.refusals(stream(key, "bootstrap"), outcomes, bench.test)
    seen = measures.look_inside(bench, controllers, metrics)
    if config.curves:
        seen |= strengths(bench, {"uniform": arms["uniform"][0], "controller": arms[main][0]}, outcomes[main], metrics)
    for line in measures.table(bench, outcomes):
        log.say(line)
    return Result(metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=draw.all_figures(metrics, seen))


def prepare(key: jax.Array, config: Config, log: Log) -> Bench:
    """The decoder, all prompts with their states, and the directions."""
    model, params = lab.train_decoder(stream(key, "decoder"), config, log)
    prompts = lab.draw_training(stream(key, "train"), config)
    panels = [
        lab.draw_panel(stream(key, "dev"), config.dev, "dev", False),
        lab.draw_panel(stream(key, "test"), config.test, "test", True),
    ]
    asked = [(p.tokens.reshape(-1, p.tokens.shape[-1]), p.lengths.reshape(-1)) for p in prompts.values()]
    states = lab.read_states(model, params, asked + [(panel.tokens, panel.lengths) for panel in panels])
    train = {
        kind: x.reshape(config.seeds, config.prompts, *x.shape[1:]) for kind, x in zip(prompts, states, strict=False)
    }
    on_dev, on_test = states[len(prompts) :]
    dev = lab.with_base(model, params, panels[0], on_dev, config.seeds * len(config.scales))
    test = lab.with_base(model, params, panels[1], on_test, config.seeds)
    alone = lab.Outcome(np.asarray(test.answers)[None], np.zeros((1, len(test.target))))
    right = 100 * float((test.answers == test.helpful).all(-1).mean())
    log.say(f"the decoder alone: {right:.1f} % as the template says; {measures.describe(alone, test)}")
    pairs = [(train["unknown"][s], train["benign"][s]) for s in range(config.seeds)]
    here = config.direction_layer
    directions = jnp.stack([giants.refusal_direction_activation(a[:, here], b[:, here]) for a, b in pairs])
    units = jnp.asarray([np.median(np.linalg.norm(b, axis=-1)) for _, b in pairs])
    return Bench(config, model, params, dev, test, directions, units, prompts, train)


def inputs_of(bench: Bench, kind: str, place: str) -> jax.Array:
    """(S, N, I): what controllers read of train prompts."""
    chosen = lab.layers_of(place, bench.config.layers)
    return jnp.stack([giants.controller_inputs(x, chosen) for x in bench.train[kind]])


def train_all(key: jax.Array, bench: Bench, log: Log) -> dict[str, Any]:
    """Controllers by name, leaves (S, ...): released_PLACE, end_PLACE, end_two_pass, released_mixed, target_only."""
    config, found = bench.config, {}
    for place in config.places:
        x, y = inputs_of(bench, "target", place), inputs_of(bench, "benign", place)
        found[f"released_{place}"] = lab.train_released(stream(key, place), x, y, config.layers, config)
        if config.ablations and place == "early":
            found["target_only"] = lab.train_released(stream(key, "target"), x, y[:, :0], config.layers, config)
            found["released_mixed"] = lab.train_released(stream(key, place), x, y, config.layers, config, mixed=True)
    for place in config.places if config.end_steps else ():
        chosen = lab.layers_of(place, config.layers)
        modes = {f"end_{place}": "causal"} | ({"end_two_pass": "two_pass"} if place == "early" else {})
        found |= lab.train_end_to_end(
            stream(key, "end", place),
            giants.steer_by_controller(bench.model, chosen),
            bench.params,
            bench.prompts,
            bench.directions,
            bench.units,
            {name: giants.reach(config.layers, chosen, mode) for name, mode in modes.items()},
            config,
            log,
            f"end-to-end-{place}",
        )
    return found


def controller_arms(bench: Bench, controllers: dict[str, Any]) -> dict[str, list[Arm]]:
    """Every controller with its direction and mode, and the ablations; each is a list of one option."""
    config = bench.config

    def arm(controller: Any, place: str, mode: str = "causal", directions: Any = None) -> list[Arm]:
        layers = lab.layers_of(place, config.layers)
        reach = giants.reach(config.layers, layers, mode)
        r = bench.directions if directions is None else directions

        def lanes(scale: float, panel: lab.Panel) -> Any:
            return {
                "controller": controller,
                "direction": r,
                "scale": scale * bench.units,
                "reach": jnp.tile(reach, (config.seeds, 1)),
            }

        return [Arm(giants.steer_by_controller(bench.model, layers), lanes)]

    arms = {f"released_{place}": arm(controllers[f"released_{place}"], place) for place in config.places}
    arms["released_two_pass"] = arm(controllers["released_early"], "early", "two_pass")
    if config.end_steps:
        arms |= {f"end_{place}": arm(controllers[f"end_{place}"], place) for place in config.places}
        arms["end_two_pass"] = arm(controllers["end_two_pass"], "early", "two_pass")
    if config.ablations:
        released = controllers["released_early"]
        mean, low = (
            jax.vmap(lambda c, x: giants.controller_apply(c, x).scalar.mean())(
                released, inputs_of(bench, kind, "early")
            )
            for kind in ("target", "benign")
        )
        arms["half_weights"] = arm(jax.vmap(giants.half_weights)(released), "early")
        arms["constant_s"] = arm(jax.vmap(giants.constant_scalar)(released, mean), "early")
        arms["centred_s"] = arm(jax.vmap(giants.shift_scalar)(released, -(mean + low) / 2), "early")
        arms["released_mixed"] = arm(controllers["released_mixed"], "early")
        arms["target_only"] = arm(controllers["target_only"], "early")
        ids = [np.asarray([world.tokenizer.id(w) for w in text.split()]) for text in (world.REFUSAL_TEXT, "sure ,")]
        r = giants.refusal_direction_embedding(bench.params["embed"]["tokens"], *ids)
        arms["released_embedding"] = arm(released, "early", directions=jnp.tile(r, (config.seeds, 1)))
    return arms


def baseline_arms(bench: Bench, log: Log) -> dict[str, list[Arm]]:
    """Uniform steering, one option for each single layer, and CAST, whose rule is fitted to dev prompts."""
    config = bench.config

    def arm(layers: np.ndarray, gates: Any = None) -> Arm:
        """Layers (S, L) of 0 and 1; gates(panel) (S, N)."""

        def lanes(scale: float, panel: lab.Panel) -> Any:
            gate = jnp.ones((config.seeds, len(panel.target))) if gates is None else gates(panel)
            sizes = (scale * bench.units)[:, None, None] * jnp.asarray(layers)[..., None] * gate[:, None]
            return {"direction": bench.directions, "strengths": sizes}

        return Arm(bench.model, lanes)

    every = np.ones((config.seeds, config.layers))
    conditions = [bench.train["target"][s].mean(0) - bench.train["benign"][s].mean(0) for s in range(config.seeds)]
    on_target, on_others = bench.dev.states[bench.dev.target], bench.dev.states[~bench.dev.target]
    rules = [fit_cast(on_target, on_others, v) for v in conditions]
    log.say("CAST: " + "; ".join(f"layer {rule.layer}, F1 {rule.f1:.3f} on dev" for rule in rules))
    later = np.asarray(
        [[layer > min(rule.layer, config.layers - 2) for layer in range(config.layers)] for rule in rules], float
    )

    def gates(panel: lab.Panel) -> jax.Array:
        return jnp.stack([cast_gate(rule, panel.states, v) for rule, v in zip(rules, conditions, strict=True)])

    singles = [arm(every * (np.arange(config.layers) == layer)) for layer in range(config.layers)]
    return {"uniform": [arm(every)], "single": singles, "cast": [arm(later, gates)]}


def at_scales(bench: Bench, arm: Arm, scales: np.ndarray, panel: lab.Panel) -> lab.Outcome:
    """Outcome with one strength for each seed."""
    return lab.run_lanes(arm.model, bench.params, arm.lanes(jnp.asarray(scales), panel), panel)


def choose(bench: Bench, options: list[Arm]) -> tuple[Arm, np.ndarray]:
    """The option with the best mean score on dev, and the best strength of each seed; ties go to the smaller KL."""
    config, grids = bench.config, []
    for arm in options:
        lanes = [arm.lanes(jnp.full(config.seeds, scale), bench.dev) for scale in config.scales]
        stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *lanes)
        found = lab.run_lanes(arm.model, bench.params, stacked, bench.dev)
        worth = measures.scores_of(found, bench.dev) - 1e-3 * np.tanh(found.kl[:, ~bench.dev.target].mean(1))
        grids.append(worth.reshape(len(config.scales), config.seeds))
    best = int(np.argmax([grid.max(0).mean() for grid in grids]))
    return options[best], np.asarray(config.scales)[grids[best].argmax(0)]


def pick_main(bench: Bench, arms: dict[str, list[Arm]], chosen: dict[str, tuple[Arm, np.ndarray]]) -> str:
    """The released controller with S early that does best on dev: causal or in two passes."""
    names = ("released_early", "released_two_pass")
    on_dev = [measures.scores_of(at_scales(bench, *chosen[name], bench.dev), bench.dev).mean() for name in names]
    return names[int(np.argmax(on_dev))]


def strengths(bench: Bench, arms: dict[str, Arm], main: lab.Outcome, metrics: dict[str, Metric]) -> dict[str, Any]:
    """Test outcomes at every strength, uniform steering at the controller's refusal, and the time of a token."""
    config, panel = bench.config, bench.test
    plain = {"refusal": panel.target & ~panel.wrapped, "over": ~panel.target & ~panel.wrapped}
    curves: dict[str, dict[str, np.ndarray]] = {}
    seconds = {}
    for name, arm in arms.items():
        began = time.perf_counter()
        found = [at_scales(bench, arm, np.full(config.seeds, scale), panel) for scale in config.scales]
        seconds[name] = (time.perf_counter() - began) / (len(found) * config.seeds * len(panel.target) * lab.ANSWER)
        curves[name] = {k: np.stack([o.refused[:, rows].mean(1) for o in found], 1) for k, rows in plain.items()}
        curves[name]["kl"] = np.stack([o.kl[:, plain["over"]].mean(1) for o in found], 1)
    metrics["overhead"] = Metric(
        value=seconds["controller"] / seconds["uniform"], unit="times a token of uniform steering"
    )
    own = {k: main.refused[:, rows].mean(1) for k, rows in plain.items()} | {"kl": main.kl[:, plain["over"]].mean(1)}
    matched = [
        measures.match(own["refusal"][s], {k: x[s] for k, x in curves["uniform"].items()}) for s in range(config.seeds)
    ]
    for k in ("refusal", "over", "kl"):
        factor, unit = (1, "nats a token") if k == "kl" else (100, "%")
        metrics[f"matched_{k}/main"] = per_seed(factor * own[k], unit)
        metrics[f"matched_{k}/uniform"] = per_seed(factor * np.asarray([m[k] for m in matched]), unit)
    return {"curves": curves, "scales": config.scales}
