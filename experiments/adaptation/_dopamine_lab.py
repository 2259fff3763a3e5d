"""The Dopamine experiment's workshop: data and bases, the arms, how one is trained and tested."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mechlab.analysis.metrics import accuracy, correct, cross_entropy
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.core.transforms import Adapter, AdapterState, tune
from mechlab.data.images import load_images, rotate_images
from mechlab.methods.adaptation import dopamine
from mechlab.methods.adaptation.lora import lora, normal_init
from mechlab.models.cnn import CNNConfig, cnn
from mechlab.models.mlp import MLPConfig, mlp
from mechlab.reporting.log import Log
from mechlab.training.batches import numbered, shuffled
from mechlab.training.loop import Job, fit_many

if TYPE_CHECKING:
    from experiments.adaptation.dopamine import Config


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to adapt a frozen network: a small state, and what the model is run with."""

    init: Callable[[jax.Array, Any], AdapterState]
    variables: Callable[..., dict[str, Any]]
    rate: float
    penalty: float = 0.0
    gated: bool = False


def make_arms(model: Model, site: str) -> dict[str, Arm]:
    """Every arm with the centre of its grid of learning rates."""

    def gates(rate: float, penalty: float = 0.0, **options: Any) -> Arm:
        def variables(params: Any, state: AdapterState, **gate: Any) -> dict[str, Any]:
            return {"params": params, "edits": dopamine.taugate_edits(state, **gate)}

        start = dopamine.taugate_init(model.sites, site=site, **options)
        return Arm(lambda key, params: start, variables, rate, penalty, gated=True)

    def weights(adapter: Adapter, rate: float) -> Arm:
        def variables(params: Any, state: AdapterState, **gate: Any) -> dict[str, Any]:
            return {"params": adapter.merge(params, state)}

        return Arm(adapter.init, variables, rate)

    return {
        "taugate": gates(1e-2),
        "sparse": gates(1e-2, penalty=0.2),
        "gain": gates(1e-2, train=("gain",), threshold=-jnp.inf),
        "threshold": gates(1e-2, train=("threshold",)),
        "bias": weights(tune("**/bias"), 3e-3),
        **{f"lora_{rank}": weights(lora(rank, init=normal_init), 2e-3) for rank in (1, 4, 8)},
        "full": weights(tune("**"), 1e-3),
    }


@dataclasses.dataclass(frozen=True)
class Lab:
    """What all trainings share. Images of mode m (0 upright, then the angles) are rows m N .. (m+1) N of ``train``."""

    config: Config
    log: Log
    model: Model
    site: str
    train: dict[str, jax.Array]
    test_x: jax.Array  # (modes, M, pixels)
    test_y: jax.Array  # (M,)
    keys: jax.Array  # (S,)
    fit_rows: jax.Array  # (S, n) indices of digits, before rotation
    validation_rows: jax.Array  # (S, v)

    @property
    def digits(self) -> int:
        """N, the number of training digits of one mode."""
        return self.train["y"].shape[0] // self.test_x.shape[0]


def prepare(key: jax.Array, config: Config, log: Log) -> Lab:
    """Load the images, rotate them, draw each seed's training and validation digits."""
    images = load_images(config.data)
    log.say(f"data: {images.note}")
    modes = (0.0, *config.angles)
    train = jnp.concatenate([rotate_images(images.train_x, angle) for angle in modes])
    test = jnp.stack([rotate_images(images.test_x, angle) for angle in modes])
    size = images.train_x.shape[1:]
    pixels, digits = size[0] * size[1], len(images.train_y)
    if config.network == "cnn":
        model, site = cnn(CNNConfig(size=size, channels=config.hidden)), "conv_act"
    else:
        model, site = mlp(MLPConfig(widths=(pixels, *config.hidden, 10))), "mlp_act"
    keys = jax.vmap(lambda s: stream(key, s))(jnp.arange(config.seeds))
    order = jax.vmap(lambda k: jax.random.permutation(stream(k, "digits"), digits))(keys)
    held_out = digits // 8
    return Lab(
        config,
        log,
        model,
        site,
        {"x": train.reshape(-1, pixels), "y": jnp.tile(images.train_y, len(modes))},
        test.reshape(len(modes), -1, pixels),
        jnp.asarray(images.test_y),
        keys,
        order[:, held_out:],
        order[:, :held_out],
    )


def foundation(lab: Lab) -> dict[str, Any]:
    """Train both bases of every seed: half of the digits upright and the other half rotated, or all upright."""
    rows, config = lab.fit_rows, lab.config
    half = rows.shape[1] // 2
    mixed = jnp.concatenate([rows[:, :half], rows[:, half:] + lab.digits], axis=1)
    start = jax.vmap(lambda k: lab.model.init(stream(k, "init")))(lab.keys)
    bases = {"mixed": mixed} | ({"upright": rows} if config.upright_arms else {})

    def build(lane: Any) -> Job:
        def loss(params: Any, batch: Any) -> jax.Array:
            return cross_entropy(lab.model.apply({"params": params}, batch["x"]), batch["y"])

        optimiser = optax.adam(config.foundation_rate)
        return Job(loss, lane["params"], optimiser, shuffled(lab.train, config.batch, lane["rows"]))

    keys = jax.vmap(lambda k: stream(k, "foundation"))(lab.keys)
    lanes = {
        "params": jax.tree.map(lambda x: jnp.concatenate([x] * len(bases)), start),
        "rows": jnp.concatenate(list(bases.values())),
    }
    result = fit_many(
        jnp.concatenate([keys] * len(bases)), lanes, build, steps=config.steps, log=lab.log, name="foundation"
    )
    parts = jax.tree.map(lambda x: jnp.split(x, len(bases)), result.params)
    return {
        name: jax.tree.map(lambda x, i=i: x[i], parts, is_leaf=lambda x: isinstance(x, list))
        for i, name in enumerate(bases)
    }


def train_arm(lab: Lab, arm: Arm, lanes: dict[str, Any], name: str, schedule: str = "") -> AdapterState:
    """Adapt one network per lane to rotated images.

    Args:
      lanes: per lane "params", "seed", "rate", "sharpness", "penalty" and "mode" (which rotation), all (lanes, ...).
      schedule: "annealed" or "straight-through" gates instead of plain soft ones.

    Returns:
      The adapted states, (lanes, ...).
    """
    config = lab.config
    keys = jax.vmap(lambda s: stream(lab.keys[s], "adapt"))(lanes["seed"])
    start = jax.vmap(lambda k, params: arm.init(stream(k, "init"), params))(keys, lanes["params"])

    def build(lane: Any) -> Job:
        def loss(train: Any, batch: Any) -> jax.Array:
            state = AdapterState(train, lane["fixed"])
            gate = {"sharpness": lane["sharpness"], "straight_through": schedule == "straight-through"}
            if schedule == "annealed":
                gate["sharpness"] = dopamine.annealed_sharpness(batch["step"], config.steps)
            variables = arm.variables(lane["params"], state, **gate)
            if not arm.gated:
                return cross_entropy(lab.model.apply(variables, batch["x"]), batch["y"])
            logits, pre = gated_run(lab, variables, batch["x"])
            penalty = dopamine.gate_penalty(variables["edits"], pre)
            return cross_entropy(logits, batch["y"]) + lane["penalty"] * penalty

        rows = lab.fit_rows[lane["seed"]] + lane["mode"] * lab.digits
        batches = numbered(shuffled(lab.train, config.batch, rows))
        return Job(loss, lane["train"], optax.adam(lane["rate"]), batches)

    lanes = lanes | {"train": start.train, "fixed": start.fixed}
    result = fit_many(keys, lanes, build, steps=config.steps, log=lab.log, name=name)
    return AdapterState(result.params, start.fixed)


def gated_run(lab: Lab, variables: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits, and the pre-activation that each gate reads."""
    logits, acts = lab.model.capture(variables, x, sites=(lab.site.replace("_act", "_pre"),))
    return logits, dopamine.pre_activations(variables["edits"], acts)


def lanes_of(lab: Lab, base: Any, seeds: Any, arm: Arm, **settings: Any) -> dict[str, Any]:
    """One lane per entry of ``seeds``, with the arm's defaults where ``settings`` do not say otherwise."""
    seeds = jnp.asarray(seeds)
    defaults = {"rate": arm.rate, "sharpness": lab.config.sharpness, "penalty": arm.penalty, "mode": 1}
    spread = {name: jnp.broadcast_to(jnp.asarray(x), seeds.shape) for name, x in (defaults | settings).items()}
    return {"params": jax.tree.map(lambda x: x[seeds], base), "seed": seeds, **spread}


def evaluate(lab: Lab, arm: Arm | None, base: Any, states: Any) -> dict[str, np.ndarray]:
    """Which test images each seed gets right, (S, M) bool: upright, rotated, and rotated with hard gates.

    ``arm=None`` tests the frozen base; ``states`` is then any array (S,).
    """

    def one(params: Any, state: Any) -> dict[str, jax.Array]:
        def right(mode: int, **gate: Any) -> jax.Array:
            variables = {"params": params} if arm is None else arm.variables(params, state, **gate)
            return correct(lab.model.apply(variables, lab.test_x[mode]), lab.test_y)

        gate = {"sharpness": lab.config.sharpness}
        found = {"upright": right(0, **gate), "rotated": right(1, **gate)}
        if arm is not None and arm.gated:
            found["hard"] = right(1, **gate, hard=True)
        return found

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(base, states))


def best_rate(lab: Lab, arm: Arm, base: Any, name: str) -> float:
    """The learning rate with the best accuracy on seed 0's validation digits, rotated."""
    rates = arm.rate * jnp.asarray(lab.config.rate_factors)
    if rates.size == 1:
        return float(rates[0])
    lanes = lanes_of(lab, base, jnp.zeros(rates.size, int), arm, rate=rates)
    states = train_arm(lab, arm, lanes, f"{name}-rates")
    rows = lab.validation_rows[0] + lab.digits

    def score(params: Any, state: Any) -> jax.Array:
        variables = arm.variables(params, state, sharpness=lab.config.sharpness)
        return accuracy(lab.model.apply(variables, lab.train["x"][rows]), lab.train["y"][rows])

    return float(rates[int(jnp.argmax(jax.jit(jax.vmap(score))(lanes["params"], states)))])
