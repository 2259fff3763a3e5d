"""The tangent-arithmetic workshop: tasks, pre-training, fine-tuning of f or f_lin, accuracies along edits.

Array axes: S seeds, T tasks that are fine-tuned (the control is number T), A multiples. Parameters of the trunk are
pytrees with leaves (S, ...), task vectors (S, T, ...); heads are stacked (S, T + 1, ...) and frozen after pre-training.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mechlab.analysis.metrics import accuracy, correct, cross_entropy
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.data.families import CLASSES, FAMILIES, LabelledImages, blurred_digits, family_images
from mechlab.data.images import load_images
from mechlab.data.sources import MNIST_TEST, available
from mechlab.methods.adaptation import tangent_arithmetic as ta
from mechlab.models.mlp import MLPConfig, mlp
from mechlab.models.vit import ViTConfig, vit
from mechlab.reporting.log import Log
from mechlab.training.batches import shuffled
from mechlab.training.loop import Job, fit_many

if TYPE_CHECKING:
    from experiments.adaptation.tangent_arithmetic import Config

PARTS = ("train", "validation", "test")
HALVES = {"low_digits": 0, "high_digits": 5}
"""Halves of scikit-learn's digits: the first class of each."""


class Start(NamedTuple):
    """Where fine-tuning begins.

    Attributes:
      trunks: (S, ...) theta_0 by name: "pretrained", and "random", the same seed's trunk before pre-training.
      heads: (S, T + 1, ...), of the pre-trained model, for both.
      reached: (S,) mean validation accuracy over tasks at which pre-training stopped.
    """

    trunks: dict[str, Any]
    heads: Any
    reached: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Lab:
    """What all parts share. ``data[part]`` is ``{"x": (T + 1, N, h, w), "y": (T + 1, N)}``.

    Labs are compared by identity: each is the key of its own compiled functions.
    """

    config: Config
    log: Log
    keys: jax.Array  # (S,)
    model: Model
    head: str
    data: dict[str, dict[str, jax.Array]]

    @property
    def classes(self) -> np.ndarray:
        """(T,) number of classes of every task."""
        return np.asarray([5 if name in HALVES else CLASSES for name in self.config.tasks])

    def logits(self, trunk: Any, head: Any, x: jax.Array) -> jax.Array:
        """f(x; theta) of images (N, h, w) with one task's head."""
        x = x[..., None] if self.config.network == "vit" else x.reshape(len(x), -1)
        return self.model.apply({"params": trunk | {self.head: head}}, x)


def prepare(key: jax.Array, config: Config, log: Log) -> Lab:
    """Make or load the images of every task and of the control, and the network."""
    parts = [task_images(stream(key, "images"), name, config, log) for name in (*config.tasks, config.control)]
    data = {
        part: {what: jnp.asarray(np.stack([task[i][what] for task in parts])) for what in ("x", "y")}
        for i, part in enumerate(PARTS)
    }
    size = (int(data["train"]["x"].shape[-2]), int(data["train"]["x"].shape[-1]))
    if config.network == "vit":
        shape = ViTConfig(
            image=size,
            patch=size[0] // 4,
            layers=config.depth,
            width=config.width,
            heads=4,
            hidden=4 * config.width,
            channels=1,
            classes=CLASSES,
        )
        model, head = vit(shape), "head"
    else:
        widths = (size[0] * size[1], *(config.width,) * config.depth, CLASSES)
        model, head = mlp(MLPConfig(widths=widths)), f"layer_{config.depth}"
    keys = jax.vmap(lambda s: stream(key, s))(jnp.arange(config.seeds))
    return Lab(config, log, keys, model, head, data)


def task_images(key: jax.Array, name: str, config: Config, log: Log) -> list[dict[str, np.ndarray]]:
    """One task's images to train on, to choose multiples on, and to test on; real sets by their fixed split."""
    counts = (config.train, config.validation, config.test)
    known, unseen = _images(key, name, config, log)
    if len(known.y) < counts[0] + counts[1] or len(unseen.y) < counts[2]:
        have = len(known.y), len(unseen.y)
        raise ValueError(f"{name} has {have[0]} + {have[1]} images; train + validation, test ask for {counts}")
    known, unseen = jax.device_get((known, unseen))  # NumPy: slicing on the host compiles nothing
    x, y = (np.concatenate([a[: counts[0] + counts[1]], b[: counts[2]]]) for a, b in zip(known, unseen, strict=True))
    edges = np.cumsum(counts)[:2]
    return [{"x": a, "y": b} for a, b in zip(np.split(x, edges), np.split(y, edges), strict=True)]


def _images(key: jax.Array, name: str, config: Config, log: Log) -> tuple[LabelledImages, LabelledImages]:
    """Images to train and to choose on, and images to test on."""
    if name == "digits":
        return blurred_digits(stream(key, name), size=config.size)
    if name in FAMILIES:
        edge = config.train + config.validation
        x, y = jax.device_get(family_images(stream(key, name), name, edge + config.test, size=config.size))
        return LabelledImages(x[:edge], y[:edge]), LabelledImages(x[edge:], y[edge:])
    images = load_images("mnist" if name == "mnist" else "digits")
    log.say(f"{name}: {images.note}")
    parts: list[Any] = [(images.train_x, images.train_y), (images.test_x, images.test_y)]
    if name in HALVES:
        parts = [(x[y // 5 == HALVES[name] // 5], y[y // 5 == HALVES[name] // 5]) for x, y in parts]
    return LabelledImages(*parts[0]), LabelledImages(*parts[1])


def has_mnist() -> bool:
    """Whether MNIST is on this machine."""
    return available(MNIST_TEST)


def pretrain(lab: Lab, label: str = "") -> Start:
    """Trunk and all heads jointly, stopped at the first look at which mean validation accuracy reaches the target.

    The stopped state mirrors a zero-shot model: it knows something of every task. Every look keeps its parameters, so
    that seeds may stop at different steps of one program.
    """
    config = lab.config
    tasks = len(config.tasks) + 1

    def all_logits(params: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(lab.logits, (None, 0, 0))(params["trunk"], params["heads"], x)

    batches = shuffled(jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), lab.data["train"]), config.batch)

    def build(lane: Any) -> Job:
        def loss(params: Any, batch: Any) -> jax.Array:
            x, y = batch["x"].swapaxes(0, 1), batch["y"].swapaxes(0, 1)
            return cross_entropy(all_logits(params, x), y).mean()

        return Job(loss, lane, optax.adam(config.pretrain_rate), batches)

    def look(params: Any) -> Any:
        known = accuracy(all_logits(params, lab.data["validation"]["x"]), lab.data["validation"]["y"])
        return {"params": params, "accuracy": known.mean()}

    # One network a head, of which the first lends its trunk.
    each = jax.vmap(lambda k: jax.vmap(lambda i: stream(k, "network", "init", i))(jnp.arange(tasks)))(lab.keys)
    networks = jax.vmap(lab.model.init)(each.reshape(-1))
    networks = jax.tree.map(lambda leaf: leaf.reshape(config.seeds, tasks, *leaf.shape[1:]), networks)
    trunks = {name: jax.tree.map(lambda leaf: leaf[:, 0], leaves) for name, leaves in networks.items()}
    heads = networks[lab.head]
    start = {"heads": heads, "trunk": {name: leaves for name, leaves in trunks.items() if name != lab.head}}
    keys = jax.vmap(lambda k: stream(k, "pretrain"))(lab.keys)
    segment = max(1, config.pretrain_steps // 40)
    seen = fit_many(
        keys,
        start,
        build,
        steps=config.pretrain_steps,
        segment=segment,
        record=look,
        log=lab.log,
        name=f"pretrain{label}",
    ).records
    reached = seen["accuracy"] >= config.pretrain_target
    stop = np.where(reached.any(1), reached.argmax(1), -1)
    if (stop < 0).any():
        lab.log.say(f"pre-training did not reach {100 * config.pretrain_target:.0f} % in {config.pretrain_steps} steps")
    rows = np.arange(config.seeds)
    chosen = jax.tree.map(lambda leaf: jnp.asarray(leaf[rows, stop]), seen["params"])
    both = {"pretrained": chosen["trunk"], "random": start["trunk"]}
    return Start(both, chosen["heads"], seen["accuracy"][rows, stop])


def fine_tune(
    lab: Lab, start: Start, runs: Sequence[tuple[str, float]], name: str, *, linear: bool
) -> dict[tuple[str, float], Any]:
    """Task vectors (S, T, ...) of every run, by run: f, or f_lin, fine-tuned on one task a lane, all in one program.

    Seeds see the same batches in every run and in both modes.

    Args:
      runs: (name of the trunk, peak learning rate).
      linear: train f_lin instead of f.
    """
    config = lab.config
    count = lab.data["train"]["y"].shape[1]
    every = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), lab.data["train"])
    shape = (len(runs), config.seeds, len(config.tasks))
    run, seed, task = (index.reshape(-1) for index in np.indices(shape))
    trunks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(start.trunks[kind] for kind, _ in runs))
    lanes = {
        "base": jax.tree.map(lambda leaf: leaf[run, seed], trunks),
        "head": jax.tree.map(lambda leaf: leaf[seed, task], start.heads),
        "task": jnp.asarray(task),
        "rate": jnp.asarray([rate for _, rate in runs])[run],
    }

    def build(lane: Any) -> Job:
        def apply(trunk: Any, x: jax.Array) -> jax.Array:
            return lab.logits(trunk, lane["head"], x)

        trained = ta.linearize(apply, lane["base"]) if linear else apply

        def loss(trunk: Any, batch: Any) -> jax.Array:
            return cross_entropy(trained(trunk, batch["x"]), batch["y"])

        optimiser = ta.fine_tuning_optimiser(lane["rate"], config.steps, warmup=config.steps // 4)
        batches = shuffled(every, config.batch, lane["task"] * count + jnp.arange(count))
        return Job(loss, lane["base"], optimiser, batches)

    keys = jax.vmap(lambda s, i: stream(lab.keys[s], "fine-tune", i))(jnp.asarray(seed), jnp.asarray(task))
    tuned = fit_many(keys, lanes, build, steps=config.steps, log=lab.log, name=name).params
    vectors = jax.tree.map(lambda a, b: (a - b).reshape(*shape, *a.shape[1:]), tuned, lanes["base"])
    return {which: jax.tree.map(lambda leaf, i=i: leaf[i], vectors) for i, which in enumerate(runs)}


def along(lab: Lab, base: Any, heads: Any, directions: Any, tasks: Any, *, linear: bool) -> dict[str, np.ndarray]:
    """Accuracy under theta_0 + alpha · direction for every multiple of ``ALPHAS``: (S, K, A) by part.

    Args:
      directions: (S, K, ...), e.g. task vectors, or their sum K times.
      tasks: (K,) whose images and head are used.
      linear: evaluate f_lin instead of f.

    Returns:
      On "validation" and on "test" images.
    """
    data = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), lab.data["validation"], lab.data["test"])
    hits = np.asarray(_along(lab, linear)(base, heads, directions, jnp.asarray(tasks), data))
    edge = lab.config.validation
    return {"validation": hits[..., :edge].mean(-1), "test": hits[..., edge:].mean(-1)}


def pair_errors(lab: Lab, base: Any, heads: Any, vectors: Any, *, linear: bool) -> np.ndarray:
    """xi on the grid for all pairs of tasks, (S, pairs, A, A), on test images."""
    return np.asarray(_pair_errors(lab, linear)(base, heads, vectors, lab.data["test"]["x"]))


@functools.lru_cache(maxsize=8)
def _along(lab: Lab, linear: bool) -> Callable[..., jax.Array]:
    """Compiled once per lab: this is called for every mode and rate."""

    alphas = jnp.asarray(ta.ALPHAS)

    def one(base: Any, heads: Any, direction: Any, task: jax.Array, data: Any) -> jax.Array:
        head = jax.tree.map(lambda leaf: leaf[task], heads)
        x, y = data["x"][task], data["y"][task]
        f = lambda trunk, x: lab.logits(trunk, head, x)  # noqa: E731
        if linear:
            f0, df = ta.tangent(f, base, direction, x)
            return jax.lax.map(lambda a: correct(f0 + a * df, y), alphas)
        return jax.lax.map(lambda a: correct(f(ta.apply_task_vectors(base, [direction], a), x), y), alphas)

    tasks = jax.vmap(one, (None, None, 0, 0, None))
    return jax.jit(jax.vmap(tasks, (0, 0, 0, None, None)))


@functools.lru_cache(maxsize=8)
def _pair_errors(lab: Lab, linear: bool) -> Callable[..., jax.Array]:
    grid = xi_grid(lab.config)
    pairs = tuple(jnp.asarray(index) for index in np.triu_indices(len(lab.config.tasks), 1))
    error = ta.linear_disentanglement_error if linear else ta.disentanglement_error

    def one(base: Any, heads: Any, vectors: Any, images: jax.Array, pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        def head_of(task: jax.Array) -> ta.Apply:
            head = jax.tree.map(lambda leaf: leaf[task], heads)
            return lambda trunk, x: lab.logits(trunk, head, x)

        i, j = pair
        tau_i, tau_j = (jax.tree.map(lambda leaf, t=t: leaf[t], vectors) for t in pair)
        return error((head_of(i), head_of(j)), base, (tau_i, tau_j), (images[i], images[j]), (grid, grid))

    def seed(base: Any, heads: Any, vectors: Any, images: jax.Array) -> jax.Array:
        kept = images[:, : lab.config.xi_images]
        return jax.lax.map(lambda pair: one(base, heads, vectors, kept, pair), pairs)

    return jax.jit(jax.vmap(seed, (0, 0, 0, None)))


def xi_grid(config: Config) -> np.ndarray:
    """Multiples from -3 to 3, 0 among them exactly."""
    half = (config.xi_points - 1) // 2
    return np.arange(-half, half + 1) * (3 / half)


def total(vectors: Any) -> Any:
    """The sum of the task vectors, once for every task: (S, T, ...)."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf.sum(1, keepdims=True), leaf.shape), vectors)


def negative(vectors: Any) -> Any:
    """Every vector with its sign turned."""
    return jax.tree.map(jnp.negative, vectors)


def scaled(vectors: Any, factors: np.ndarray) -> Any:
    """Every task vector times its own factor, (S, T)."""
    return jax.tree.map(lambda leaf: leaf * factors.reshape(*factors.shape, *(1,) * (leaf.ndim - 2)), vectors)
