"""The Fast IBP experiment's workshop: the arms, how they are trained together, what is measured of their networks.

``fit`` knows a loss and its gradient only. Running statistics of batch norm are therefore carried beside the network in
the trained pytree, ``{"net": ..., "running": ...}``: the loss holds ``running_pull``, whose descent at rate 1 is
PyTorch's running average, and the network's own optimiser does not see them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.classifiers import image_split
from mechlab.core.rng import stream
from mechlab.methods.architectures import networks
from mechlab.methods.architectures.batch_norm import clean_pass, fix, initial_running, running_pull, running_targets
from mechlab.methods.architectures.fast_ibp import (
    certify,
    fast_ibp_loss,
    relu_balance,
    smoothed_eps,
    verified,
)
from mechlab.methods.architectures.interval import ball, propagate, relu_boxes
from mechlab.methods.architectures.pgd import pgd
from mechlab.methods.architectures.piecewise import BatchNorm, Network, apply
from mechlab.reporting.log import Log
from mechlab.training.batches import numbered, shuffled
from mechlab.training.loop import Fit, Job, fit_many

if TYPE_CHECKING:
    from experiments.architectures.fast_ibp import Config

PROFILED = (128,) * 5
"""Hidden widths of the untrained networks whose bounds are measured."""

CLIP = 10.0
WATCHED = 1000
"""Test images that are looked at after every epoch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train a certified network.

    Attributes:
      init: initialiser of all kernels but the classifier's.
      batch_norm: after every hidden layer; ``centred``, ``scaled`` and ``affine`` are its parts.
      tightness, relu: which regularisers the loss holds.
      crown: CROWN-IBP instead of IBP.
      long: with the longer ramp.
    """

    init: Callable[[jax.Array, Network], Network] = networks.xavier_init
    batch_norm: bool = False
    centred: bool = True
    scaled: bool = True
    affine: bool = True
    tightness: bool = False
    relu: bool = False
    crown: bool = False
    long: bool = False


_REGULARISED: dict[str, Any] = {"tightness": True, "relu": True}
_FULL: dict[str, Any] = {"init": networks.ibp_init, "batch_norm": True, **_REGULARISED}
_INIT_BN: dict[str, Any] = {"init": networks.ibp_init, "batch_norm": True}

ARMS: dict[str, Arm] = {
    "xavier": Arm(),
    "init": Arm(init=networks.ibp_init),
    "bn": Arm(batch_norm=True),
    "reg": Arm(**_REGULARISED),
    "init_bn": Arm(**_INIT_BN),
    "init_reg": Arm(init=networks.ibp_init, **_REGULARISED),
    "bn_reg": Arm(batch_norm=True, **_REGULARISED),
    "full": Arm(**_FULL),
    "crown_xavier": Arm(crown=True),
    "crown_full": Arm(**_FULL, crown=True),
    "xavier_long": Arm(long=True),
    "full_long": Arm(**_FULL, long=True),
    "kaiming": Arm(init=networks.kaiming_init),
    "orthogonal": Arm(init=networks.orthogonal_init),
    "tight_only": Arm(**_INIT_BN, tightness=True),
    "relu_only": Arm(**_INIT_BN, relu=True),
    "bn_mean": Arm(**_FULL, scaled=False),
    "bn_variance": Arm(**_FULL, centred=False),
    "bn_plain": Arm(**_FULL, affine=False),
}


@dataclasses.dataclass(frozen=True)
class Lab:
    """What all trainings share; images are (N, X, Y), or (N, X, Y, 1) for convolutions."""

    config: Config
    log: Log
    train: dict[str, jax.Array]
    test: dict[str, jax.Array]
    keys: jax.Array  # (S,)

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return len(self.train["y"]) // self.config.batch

    def ramp(self, arm: Arm) -> int:
        """Epochs of the ramp."""
        return self.config.ramp * (self.config.longer if arm.long else 1)

    def epochs(self, arm: Arm) -> int:
        """Epochs in all: natural, ramp, full radius."""
        return self.config.natural + self.ramp(arm) + self.config.full


def prepare(key: jax.Array, config: Config, log: Log) -> Lab:
    """Load the images and make each seed's key."""
    split = image_split(config.data, log, train=config.train)
    train, test = split.train, split.test
    if config.network == "cnn7":
        train, test = ({**part, "x": part["x"][..., None]} for part in (train, test))
    return Lab(config, log, train, test, jax.vmap(lambda seed: stream(key, seed))(jnp.arange(config.seeds)))


def new_network(lab: Lab, arm: Arm, key: jax.Array) -> Network:
    """An untrained network of an arm. Arms of one seed differ in kernels only, and not in the classifier's."""
    size: Any = lab.train["x"].shape[1:]
    if lab.config.network == "cnn7":
        plain = networks.cnn7(stream(key, "net"), size, 10, width=lab.config.width, batch_norm=arm.batch_norm)
    else:
        widths = (int(np.prod(size)), *lab.config.hidden, 10)
        plain = networks.perceptron(stream(key, "net"), widths, batch_norm=arm.batch_norm)

    def limited(layer: Any) -> Any:
        if not isinstance(layer, BatchNorm):
            return layer
        scale, bias = (layer.scale, layer.bias) if arm.affine else (None, None)
        return BatchNorm(scale, bias, centred=arm.centred, scaled=arm.scaled)

    return arm.init(stream(key, "init"), tuple(map(limited, plain)))


@dataclasses.dataclass(frozen=True)
class Trained:
    """The networks of one arm: leaves (radii, seeds, ...) with the radii of ``config.eps``.

    Attributes:
      params: ``{"net", "running"}``.
      losses: the terms of the loss by name, (radii, seeds, steps).
      records: what ``watch`` saw before training and after each epoch, (radii, seeds, epochs + 1, ...), for each of
        ``config.eps`` as the radius of the bounds.
    """

    params: Any
    losses: dict[str, np.ndarray]
    records: list[dict[str, np.ndarray]]


def train_all(lab: Lab) -> dict[str, Trained]:
    """Train every arm at every radius and seed; arms whose networks and schedules are alike share one program."""
    groups: dict[Any, list[str]] = {}
    for name in lab.config.arms:
        arm = ARMS[name]
        shape = jax.tree.structure(jax.eval_shape(lambda arm=arm: new_network(lab, arm, jax.random.key(0))))
        groups.setdefault((shape, arm.crown, arm.long), []).append(name)
    trained: dict[str, Trained] = {}
    for names in groups.values():
        trained |= dict(_train_group(lab, names))
    return {name: trained[name] for name in lab.config.arms}


def _train_group(lab: Lab, names: list[str]) -> Iterator[tuple[str, Trained]]:
    config = lab.config
    arms = [ARMS[name] for name in names]
    cells = [(arm, eps) for arm in arms for eps in config.eps]
    nets = [
        net
        for arm in arms
        for net in [jax.jit(jax.vmap(lambda key, arm=arm: new_network(lab, arm, key)))(lab.keys)] * len(config.eps)
    ]
    per_cell = {
        "eps": [eps for _, eps in cells],
        "tightness": [float(arm.tightness) for arm, _ in cells],
        "relu": [float(arm.relu) for arm, _ in cells],
    }
    lanes = {name: jnp.repeat(jnp.asarray(x), config.seeds) for name, x in per_cell.items()}
    lanes["net"] = jax.tree.map(lambda *x: jnp.concatenate(x), *nets)
    keys = jnp.tile(jax.vmap(lambda key: stream(key, "batches"))(lab.keys), len(cells))
    result = _fit(lab, arms[0], keys, lanes, names[0])

    def of(index: int, tree: Any) -> Any:
        shape = (len(names), len(config.eps), config.seeds)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:])[index], tree)

    for index, name in enumerate(names):
        yield name, Trained(of(index, result.params), of(index, result.aux), of(index, result.records))


def _fit(lab: Lab, arm: Arm, keys: jax.Array, lanes: Any, name: str) -> Fit:
    """Train lanes whose arms differ from ``arm`` in weights and regularisers only."""
    config = lab.config
    batches = numbered(shuffled(lab.train, config.batch))
    decays = {
        int((config.natural + lab.ramp(arm) + share * config.full) * lab.per_epoch): 0.2 for share in config.decay_at
    }
    rate = optax.piecewise_constant_schedule(config.rate, decays)
    optimiser = optax.partition(
        {"net": optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(rate)), "running": optax.sgd(1.0)},
        {"net": "net", "running": "running"},
    )

    def build(lane: Any) -> Job:
        def loss(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            eps = smoothed_eps(
                batch["step"],
                start=config.natural + 1,
                length=lab.ramp(arm),
                batches=lab.per_epoch,
                eps_max=lane["eps"],
            )
            _, terms, clean = fast_ibp_loss(
                params["net"],
                batch["x"],
                batch["y"],
                eps,
                eps_max=lane["eps"],
                weight=config.weight,
                tolerance=config.tolerance,
                crown=arm.crown,
            )
            # Every arm's terms are computed and kept; an arm's loss holds those that are its own.
            held = lane["tightness"] * terms.tightness + lane["relu"] * terms.relu
            pull = running_pull(params["running"], running_targets(clean))
            return terms.robust + terms.weight * held + pull, terms._asdict()

        running = initial_running(lane["net"], lab.train["x"][:2])
        return Job(loss, {"net": lane["net"], "running": running}, optimiser, batches)

    watched = {name: x[:WATCHED] for name, x in lab.test.items()}
    return fit_many(
        keys,
        lanes,
        build,
        steps=lab.epochs(arm) * lab.per_epoch,
        segment=lab.per_epoch,
        record=lambda params: [watch(params, watched, eps) for eps in config.eps],
        log=lab.log,
        name=name,
    )


def watch(params: Any, data: dict[str, jax.Array], eps: float) -> dict[str, jax.Array]:
    """What bounds at a radius say of a network on some images.

    Returns:
      ``verified_error`` and, per ReLU layer (m,): shares ``active`` (l > 0) and ``inactive`` (u < 0), and ``balance``,
      min(α, 1/α).
    """
    fixed = fix(params["net"], params["running"])
    margins, boxes = certify(fixed, data["x"], data["y"], eps)
    return {
        "verified_error": 1 - verified(margins).mean(),
        "active": jnp.stack([(box.lower > 0).mean() for box in boxes]),
        "inactive": jnp.stack([(box.upper < 0).mean() for box in boxes]),
        "balance": jnp.stack([relu_balance(box).mean for box in boxes]),
    }


def examiner(lab: Lab) -> Callable[[Trained], dict[str, np.ndarray]]:
    """Final measurements on the test images, as a function of an arm's networks; networks alike share its program.

    Returns:
      The function, whose results are (radii, seeds, ...): which images are ``verified``, ``standard`` (classified
      rightly) and, of the first ``config.attacked``, ``attacked`` (right under attack), bool; and what ``watch`` gives
      over all of them.
    """
    config = lab.config

    def one(cell: Any, test: dict[str, jax.Array]) -> dict[str, jax.Array]:
        params, eps, key = cell
        hit = {name: x[: config.attacked] for name, x in test.items()}
        fixed = fix(params["net"], params["running"])
        worst = pgd(
            key,
            lambda x: apply(fixed, x),
            hit["x"],
            hit["y"],
            eps,
            steps=config.attack_steps,
            restarts=config.restarts,
        )
        return {
            "verified": verified(certify(fixed, test["x"], test["y"], eps)[0]),
            "standard": apply(fixed, test["x"]).argmax(-1) == test["y"],
            "attacked": apply(fixed, worst).argmax(-1) == hit["y"],
            **watch(params, test, eps),
        }

    radii, seeds = len(config.eps), config.seeds
    # Every radius and seed has its own attack, the same for all arms.
    by_radius = jax.vmap(lambda radius: jax.vmap(lambda key: stream(key, "attack", radius))(lab.keys))

    # One network after another: all at once would hold every network's activations of the whole test set. The images
    # are an argument, because XLA spends seconds on folding such large constants.
    @jax.jit
    def all_cells(cells: Any, test: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return jax.lax.map(lambda cell: one(cell, test), cells)

    def examine(trained: Trained) -> dict[str, np.ndarray]:
        flat = jax.tree.map(lambda x: x.reshape(radii * seeds, *x.shape[2:]), trained.params)
        keys = by_radius(jnp.arange(radii)).reshape(-1)
        found = all_cells((flat, jnp.repeat(jnp.asarray(config.eps), seeds), keys), lab.test)
        return {name: np.asarray(x).reshape(radii, seeds, *x.shape[1:]) for name, x in found.items()}

    return examine


def initial_ratios(lab: Lab) -> dict[str, np.ndarray]:
    """E[δ_i]/E[δ_0] of untrained perceptrons of width 128, before each ReLU, at the first radius: (S, layers) by name.

    Batch norm is at the statistics of the same images, as in the first step of training.
    """
    x = lab.train["x"][: 2 * lab.config.batch].reshape(2 * lab.config.batch, -1)
    inits = {
        "ibp": networks.ibp_init,
        "xavier": networks.xavier_init,
        "kaiming": networks.kaiming_init,
        "orthogonal": networks.orthogonal_init,
    }
    cells = [(name, False) for name in inits] + [("ibp", True), ("xavier", True)]

    def ratios(key: jax.Array, name: str, batch_norm: bool) -> jax.Array:
        net = networks.perceptron(stream(key, "profile"), (x.shape[1], *PROFILED, 10), batch_norm=batch_norm)
        box = ball(x, lab.config.eps[0])
        fixed = clean_pass(inits[name](stream(key, "profile init"), net), x).fixed
        boxes = relu_boxes(fixed, propagate(fixed, box).entering)
        return jnp.stack([each.radius.mean() for each in boxes]) / box.radius.mean()

    def of_seed(key: jax.Array) -> dict[str, jax.Array]:
        return {f"{name}_bn" if norm else name: ratios(key, name, norm) for name, norm in cells}

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(of_seed))(lab.keys))
