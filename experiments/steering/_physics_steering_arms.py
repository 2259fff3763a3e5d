"""What is tried on a surrogate: directions and controls at some strengths, over training, on other worlds, for long."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.steering import _physics_steering_lab as lab
from experiments.steering import _physics_steering_measures as measures
from experiments.steering import _physics_steering_worlds as worlds
from mechlab.core.rng import stream
from mechlab.methods.steering import physics_steering as ps
from mechlab.reporting.log import Log


class Bench(NamedTuple):
    """What all surrogates of a run share, and the one at hand.

    Attributes:
      held: runs for the gate.
      dev, test: states of each family.
      start: the states of read-outs, shear and advect together.
      matched, unmatched: windows by direction.
    """

    config: Any
    held: dict[str, worlds.Runs]
    dev: dict[str, worlds.States]
    test: dict[str, worlds.States]
    start: worlds.States
    matched: dict[str, worlds.Pair]
    unmatched: dict[str, worlds.Pair]
    model: Any = None


def directions(
    key: jax.Array, bench: Bench, params: Any, pairs: dict[str, worlds.Pair], draws: int
) -> dict[str, list[lab.Read]]:
    """What the surrogate makes of the pairs: by direction, one ``Read`` a draw."""
    masks = {name: worlds.mask_of(name.rpartition("_")[0], bench.config.families) for name in pairs}
    return {
        name: [
            lab.read_directions(
                bench.model, params, stream(key, name, k), pair.feature[k], pair.control[k], masks[name]
            )
            for k in range(draws)
        ]
        for name, pair in pairs.items()
    }


def base_runs(bench: Bench) -> dict[str, worlds.Runs]:
    """The states that steering starts from with what follows them, as runs for ``lab.competence``."""
    found = {}
    for family in ("shear", "advect"):
        parts = bench.dev[family], bench.test[family]
        frames = [np.concatenate([x.frames, x.truth[:, : bench.config.horizon]], 1) for x in parts]
        velocity = np.concatenate([x.velocity for x in parts])
        nothing = np.zeros(len(velocity))
        found[family] = worlds.Runs(np.concatenate(frames), velocity, nothing, nothing)
    return found


def list_patches(
    config: Any, reads: dict[str, list[lab.Read]], whole: dict[str, list[lab.Read]], randoms: jax.Array
) -> list[lab.Patch]:
    """Everything that is tried on the states of shear flow and advection."""
    layer = config.layer
    moved = [alpha for alpha in config.alphas if alpha != 0]
    strong = (-measures.STRONG, measures.STRONG)
    patches = [lab.Patch("none", 0, randoms[0] if len(randoms) else reads[config.directions[0]][0].delta[0], 0, (0.0,))]
    patches += [lab.Patch("random", k, one, layer, strong) for k, one in enumerate(randoms)]
    for name, of_draws in reads.items():
        patches += [lab.Patch(name, k, one.delta[layer], layer, moved) for k, one in enumerate(of_draws)]
    if not config.controls:
        return patches
    for name, of_draws in whole.items():
        patches += [
            lab.Patch(f"{name}@unmatched", k, one.delta[layer], layer, strong) for k, one in enumerate(of_draws)
        ]
    for name in worlds.MAIN:
        for k, one in enumerate(reads[name]):
            patches.append(lab.Patch(f"{name}@shuffled", k, one.shuffled[layer], layer, strong))
            patches += [
                lab.Patch(f"{name}@{fit}", k, one.delta[layer], layer, strong, fit)
                for fit in config.fits
                if fit != "drop"
            ]
        first = reads[name][0]
        patches += [lab.Patch(f"{name}@layer{i}", 0, first.delta[i], i, strong) for i in config.other_layers]
    if {"shear_speed", "advect_speed"} <= set(reads):
        for name in [name for name in reads if name.endswith("diffusion")]:
            for k, one in enumerate(reads[name]):
                speeds = [ps.channel_vector(reads[f"{family}_speed"][k].delta[layer]) for family in ("shear", "advect")]
                alone = ps.without(one.delta[layer], jnp.stack(speeds))
                strengths = moved if name == "advect_diffusion" else strong
                patches.append(lab.Patch(f"{name}@alone", k, alone, layer, strengths))
    return patches


def in_output_space(bench: Bench, params: Any, reads: dict[str, list[lab.Read]]) -> lab.Outcome:
    """The control that adds the mean difference of increments to the prediction, at +-0.2 times its length."""
    start, config, n = bench.start, bench.config, len(bench.start.mask)
    alphas = (-measures.STRONG, measures.STRONG)
    frames, mask, velocity = (np.concatenate([x, x]) for x in (start.frames, start.mask, start.velocity))
    strength = np.repeat(np.asarray(alphas, np.float32), n)[:, None, None, None]
    outcome: lab.Outcome = {}
    for name in worlds.MAIN:
        of_draws = []
        for one in reads[name]:
            out = lab.roll_output(bench.model, params, one.output, strength, frames, mask, config.horizon)
            found = lab.read(frames[:, -1], out, velocity, worlds.fields_of(config.families))
            of_draws.append({what: np.asarray(x).reshape(2, n, *x.shape[1:]) for what, x in found.items()})
        outcome[f"{name}@output"] = {
            alpha: {what: np.stack([one[what][a] for one in of_draws]) for what in of_draws[0]}
            for a, alpha in enumerate(alphas)
        }
    return outcome


def over_training(
    key: jax.Array, bench: Bench, records: Any, seed: int, log: Log
) -> tuple[list[int], dict[str, np.ndarray]]:
    """Gate and slopes before the end of training, directions read anew each time, one draw; time 0 is untrained."""
    config = bench.config
    strong = (-measures.STRONG, measures.STRONG)
    every = -(-config.steps // config.checkpoints)
    slots = len(jax.tree.leaves(records)[0][seed])
    numbers: dict[str, np.ndarray] = {}
    main = {name: pair for name, pair in bench.matched.items() if name in worlds.MAIN}
    for time in range(slots - 1):
        params = lab.at_checkpoint(records, seed, time)
        gate = lab.competence(bench.model, params, bench.held, config, lab.CHUNK)
        numbers |= {f"gate_at/{time * every}/{name}": np.asarray([value]) for name, value in gate.items()}
        reads = directions(key, bench, params, main, 1)
        none = lab.Patch("none", 0, reads[next(iter(main))][0].delta[config.layer], config.layer, (0.0,))
        patches = [lab.Patch(name, 0, one[0].delta[config.layer], config.layer, strong) for name, one in reads.items()]
        outcome = lab.measure(bench.model, params, [none, *patches], bench.start, config, log, f"checkpoint {time}")
        found = measures.summarise(measures.Outcomes(outcome, bench.start.family))
        numbers |= {
            f"{name}@{time * every}": x for name, x in found.items() if name.startswith(("ev", "speed", "c_eff"))
        }
    return [time * every for time in range(slots - 1)] + [config.steps], numbers


def on_reactions(bench: Bench, params: Any, reads: dict[str, list[lab.Read]], log: Log) -> dict[str, np.ndarray]:
    """Gray-Scott under directions of shear flow: what becomes of its patterns (reported)."""
    config = bench.config
    states = bench.test["gray_scott"].rows(np.arange(config.states))
    moved = [alpha for alpha in config.alphas if abs(alpha) >= measures.STRONG]
    named = ("shear_vorticity", "shear_speed")
    none = lab.Patch("none", 0, reads[named[0]][0].delta[config.layer], config.layer, (0.0,))
    patches = [lab.Patch(name, 0, reads[name][0].delta[config.layer], config.layer, moved) for name in named]
    outcome = lab.measure(bench.model, params, [none, *patches], states, config, log, "reactions")
    found = measures.summarise(measures.Outcomes(outcome, states.family))
    return {name: x for name, x in found.items() if name.startswith("rough_V")}


def films(bench: Bench, params: Any, reads: dict[str, list[lab.Read]]) -> dict[str, tuple[np.ndarray, worlds.States]]:
    """Long roll-outs (3, n, T, F, X, Y) at -0.2, 0 and 0.2, and their states, by "direction on family"."""
    config = bench.config
    found: dict[str, tuple[np.ndarray, worlds.States]] = {}
    wanted = (
        ("shear_vorticity", "shear"),
        ("shear_speed", "shear"),
        ("shear_diffusion", "shear"),
        ("shear_speed", "advect"),
        ("shear_vorticity", "gray_scott"),
    )
    alphas = (-measures.STRONG, 0.0, measures.STRONG)
    for name, family in wanted:
        if name in reads and family in bench.test:
            states = bench.test[family].rows(np.arange(config.states))
            delta = reads[name][0].delta[config.layer]
            made = lab.film(bench.model, params, delta, config.layer, alphas, states, config)
            found[f"{name} on {family}"] = made, states
    return found
