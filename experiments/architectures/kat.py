"""KAT (Yang and Wang 2024, arXiv 2409.10594): group rational functions against the MLP of a vision transformer.

    python -m experiments run kat

Small vision transformers on handwritten digits, the same but for the MLP: GELU; GR-KAN with groups of channels, with a
function per channel, with other numbers of groups, and without its initialisation (S3); B-splines on edges. All are
trained alike, with AdamW at the paper's rate: no arm is tuned. Kernels outside the compared MLPs start with standard
deviation 1 / sqrt(inputs), for every arm, since the usual 0.02 is that of 2,500 inputs. Then a trained transformer with
Swish becomes a KAT, and both are trained on.

The paper's numbers are of ImageNet-1k: KAT-T 74.6 % against DeiT-T 72.2, KAT-S 81.2 against 79.8. The preset "paper" is
that experiment's configuration; its data is not at hand, so it refuses. Ours are on docs/papers/kat.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.architectures import _kat_figures as draw
from experiments.architectures._kat_claims import CLAIMS
from experiments.bench._timing import interleave
from experiments.classifiers import CHUNK, Split, hits, image_split, train_classifiers
from experiments.measures import per_seed, percent, points
from mechlab.analysis.metrics import cross_entropy
from mechlab.core import select
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.data.images import load_images
from mechlab.data.sources import MissingData
from mechlab.kernels.rational import rational
from mechlab.methods.architectures import kat as method
from mechlab.models.kan import Coefficients, SplineMLP
from mechlab.models.vit import ViTConfig, vit
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "resolve", "run"]


ALL_ARMS = ("vit", "vit_swish", "kat", "no_s3", "channel", "spline")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      data: "auto" takes MNIST where it is on this machine, else scikit-learn's digits, and downloads nothing.
      train: training images used, the first ones.
      arms: what is trained; "vit_swish" is also what a KAT is started from.
      patch, width, layers, heads: of every model; hidden width 4 times the width.
      groups: G of the KAT.
      group_sweep: further numbers of groups.
      seeds: networks per arm.
      spline_seeds: networks of the B-spline arm.
      steps, batch, rate, decay: of every training: AdamW, warm-up over a twentieth of the steps, then a cosine to 0.
      more_steps: after a vision transformer became a KAT, of either, at a third of the rate.
      timings: repeats of the timing of a step.
    """

    data: Literal["auto", "mnist", "digits", "imagenet"] = "auto"
    train: int = 4000
    arms: tuple[str, ...] = ALL_ARMS
    patch: int = 7
    width: int = 64
    layers: int = 3
    heads: int = 4
    groups: int = 8
    group_sweep: tuple[int, ...] = (1,)
    seeds: int = 3
    spline_seeds: int = 1
    steps: int = 120
    batch: int = 64
    rate: float = 1e-3
    decay: float = 0.05
    more_steps: int = 32
    timings: int = 11

    def __post_init__(self) -> None:
        problems = []
        numbers = (self.train, self.seeds, self.steps, self.batch, self.more_steps, self.timings)
        if min(numbers) < 1 or not 1 <= self.spline_seeds <= self.seeds:
            problems.append("train, seeds, steps, batch, more_steps, timings must be at least 1, spline_seeds 1..seeds")
        if not {"vit", "kat"} <= set(self.arms) <= set(ALL_ARMS):
            problems.append(f"arms must contain vit and kat, and be of {', '.join(ALL_ARMS)}, got {self.arms}")
        bad = [g for g in (self.groups, *self.group_sweep) if g < 1 or self.width % g]
        if bad or self.width % self.heads:
            problems.append(f"groups and heads must divide width={self.width}, got {bad or self.heads}")
        if problems:
            raise ValueError(f"Config: {'; '.join(problems)}")


PRESETS: dict[str, Config] = {
    "smoke": Config(
        data="digits", arms=("vit", "kat"), group_sweep=(), patch=2, width=32, layers=2, seeds=1, steps=54, timings=2
    ),
    "cpu": Config(),
    "accel": Config(
        data="mnist",
        train=60_000,
        patch=4,
        width=128,
        layers=6,
        group_sweep=(1, 2, 4, 16),
        seeds=5,
        spline_seeds=5,
        steps=4000,
        batch=128,
        more_steps=1000,
    ),
    "paper": Config(data="imagenet", train=1_281_167, patch=16, width=192, layers=12, heads=3, seeds=1, batch=1024),
}


def resolve(config: Config) -> Config:
    """The same configuration with ``data="auto"`` decided, so that the record names its data.

    Raises:
      MissingData: for ImageNet-1k.
    """
    if config.data == "imagenet":
        raise MissingData(
            "ImageNet-1k (1.28 million images, 300 epochs on 8 accelerators) has no loader here: its licence asks "
            "every user to register. The models are mechlab.methods.architectures.kat.imagenet(size)."
        )
    return dataclasses.replace(config, data=load_images(config.data).name)  # type: ignore[arg-type]


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """Train every arm, measure sizes, times and variances, start a KAT from a transformer, judge."""
    split = image_split(config.data, log, train=config.train)
    lab = Lab(key, config, log, split, arms(config, split))
    boot = stream(key, "bootstrap")
    metrics: dict[str, Metric] = {}
    right: dict[str, np.ndarray] = {}
    trained: dict[str, Any] = {}
    losses: dict[str, np.ndarray] = {}
    for name, model in lab.models.items():
        trained[name], losses[name] = train(lab, name, model)
        right[name] = hits(lab.apply(model), trained[name], split.test)
        metrics[f"accuracy/{name}"] = percent(stream(boot, name), right[name])
        metrics |= counts(model, trained[name], name)
    for name, correct in right.items():
        if name != "kat":
            metrics[f"kat_over/{name}"] = points(stream(boot, "over", name), right["kat"][: len(correct)], correct)
    metrics[f"accuracy/g{config.groups}"] = metrics["accuracy/kat"]
    if "no_s3" in losses:
        metrics["loss_over_no_s3/kat"] = per_seed(losses["kat"].mean(1) - losses["no_s3"].mean(1), "nats")
    variance = {name: branch_variance(lab, lab.models[name]) for name in ("kat", "no_s3") if name in lab.models}
    for name, values in variance.items():
        for end, of in (("min", values.min(1)), ("max", values.max(1))):
            metrics[f"variance/{name}/{end}"] = per_seed(of, "")
    metrics |= step_times(lab)
    if "vit_swish" in trained:
        metrics |= from_vit(lab, trained["vit_swish"], boot)
    # The curves of the losses in stretches: single steps are too rough to read.
    stretch = max(1, config.steps // 25)
    whole = config.steps // stretch * stretch
    smooth = {name: x[:, :whole].reshape(len(x), -1, stretch).mean(-1) for name, x in losses.items()}
    seen = {"variance": variance, "losses": smooth, "steps": stretch * (0.5 + np.arange(whole // stretch))}
    seen |= learned_functions(trained["kat"])
    return Result(metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=draw.all_figures(metrics, seen))


@dataclasses.dataclass(frozen=True)
class Lab:
    """What all parts of a run share."""

    key: jax.Array
    config: Config
    log: Log
    split: Split
    models: dict[str, Model]

    def keys(self, *names: str | int, seeds: int | None = None) -> jax.Array:
        """(S,) keys, one a seed, of a named stream."""
        numbers = jnp.arange(seeds or self.config.seeds)
        return jax.vmap(lambda seed: stream(stream(self.key, "seed", seed), *names))(numbers)

    def seeds(self, name: str) -> int:
        """How many networks an arm has."""
        return self.config.spline_seeds if name == "spline" else self.config.seeds

    def apply(self, model: Model) -> Callable[[Any, jax.Array], jax.Array]:
        """``(params, images (B, h, w)) -> logits``."""
        return lambda params, x: model.apply({"params": params}, x[..., None])


def arms(config: Config, split: Split) -> dict[str, Model]:
    """The models by arm, the same but for their MLPs."""
    plain = ViTConfig(
        image=split.train["x"].shape[1:],  # type: ignore[arg-type]
        patch=config.patch,
        channels=1,
        classes=10,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        hidden=4 * config.width,
        init_std=None,
    )
    kat = method.kat(plain, groups=config.groups)
    configs = {
        "vit": plain,
        "vit_swish": dataclasses.replace(plain, activation="silu"),
        "kat": kat,
        "no_s3": method.kat(plain, groups=config.groups, variance_preserving=False),
        "channel": method.kat(plain, groups=None),
        "spline": dataclasses.replace(plain, mlp=SplineMLP(), hidden=spline_width(plain)),
    }
    configs = {name: configs[name] for name in ALL_ARMS if name in config.arms}
    configs |= {f"g{g}": method.kat(plain, groups=g) for g in config.group_sweep}
    return {name: vit(each) for name, each in configs.items()}


def spline_width(plain: ViTConfig) -> int:
    """The hidden width with which a spline MLP has as many numbers as the plain one, as nearly as can be."""
    wanted = 2 * plain.width * plain.hidden + plain.hidden + plain.width

    def distance(hidden: int) -> int:
        there, back = (method.spline_parameters(*pair) for pair in ((plain.width, hidden), (hidden, plain.width)))
        return abs(there + back - wanted)

    return min(range(1, plain.hidden), key=distance)


def train(lab: Lab, name: str, model: Model) -> tuple[Any, np.ndarray]:
    """One network a seed, of one arm: parameters, and losses (S, steps). Seeds see the same batches in every arm."""
    config, seeds = lab.config, lab.seeds(name)
    start = jax.jit(jax.vmap(model.init))(lab.keys("init", seeds=seeds))
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.rate, max(1, config.steps // 20), config.steps)
    optimiser = optax.adamw(schedule, weight_decay=config.decay, mask=method.decayed)
    options: dict[str, Any] = {"steps": config.steps, "batch": config.batch, "log": lab.log, "name": name}
    keys = lab.keys("batches", seeds=seeds)
    fit = train_classifiers(keys, lab.apply(model), start, lab.split.train, optimiser, **options)
    return fit.params, np.asarray(fit.losses)


def counts(model: Model, params: Any, name: str) -> dict[str, Metric]:
    """Numbers of one network: all, and those of rational functions."""
    one = jax.tree.map(lambda leaf: leaf[0], params)
    found = select.matching(one, "**/numerator|**/denominator")
    return {
        f"parameters/{name}": Metric(value=select.count(one), unit="numbers"),
        f"coefficients/{name}": Metric(value=sum(leaf.size for leaf in found.values()), unit="numbers"),
    }


def branch_variance(lab: Lab, model: Model) -> np.ndarray:
    """Variance of what every layer's MLP adds to the stream, on images of N(0, 1) pixels, before training: (S, L)."""

    def one(key: jax.Array) -> jax.Array:
        pixels = jax.random.normal(stream(key, "pixels"), (64, *model.example[0].shape[1:]))
        params = model.init(stream(key, "init"))
        acts = model.capture({"params": params}, pixels, sites=("mlp_out",))[1]["mlp_out"]
        return acts.var((1, 2, 3))

    return np.asarray(jax.jit(jax.vmap(one))(lab.keys()))


def step_times(lab: Lab) -> dict[str, Metric]:
    """Milliseconds of a forward and backward pass of one batch, arms in turn; times the MLP's, median of pairs."""
    batch = {part: value[: lab.config.batch] for part, value in lab.split.train.items()}

    def timed(name: str) -> Callable[[], Any]:
        apply = lab.apply(lab.models[name])
        params = lab.models[name].init(stream(lab.key, "timing"))
        gradient = jax.jit(jax.value_and_grad(lambda p: cross_entropy(apply(p, batch["x"]), batch["y"])))
        return lambda: gradient(params)

    timed_arms: tuple[str, ...] = ("vit", "kat", "spline")
    calls = {name: timed(name) for name in timed_arms if name in lab.models}
    seconds = {name: np.asarray(times) for name, times in interleave(calls, repeats=lab.config.timings).items()}
    metrics = {f"step/{name}": per_seed(1000 * times, "ms") for name, times in seconds.items()}
    for name in [name for name in calls if name != "vit"]:
        ratio = float(np.median(seconds[name] / seconds["vit"]))
        metrics[f"slowdown/{name}"] = Metric(value=ratio, n=lab.config.timings, unit="times the MLP's step")
    return metrics


def from_vit(lab: Lab, params: Any, boot: jax.Array) -> dict[str, Metric]:
    """Trained transformers with Swish become KATs: how far logits move, and what training both on gives."""
    config, plain = lab.config, lab.models["vit_swish"]
    shape = plain.module.config
    wide, error = method.fit_rational(lambda x: x / (1 + np.exp(-x)), low=-8, high=8)
    metrics = {"from_vit/wide_fit_error": Metric(value=error, unit="largest on [-8, 8]")}

    def started(second: Coefficients) -> tuple[Model, Any]:
        model = vit(method.kat(shape, second=second, groups=config.groups))
        return model, jax.vmap(lambda p: method.vit_to_kat(p, model.module.config))(params)

    for suffix, second in (("", method.SWISH), ("_wide", wide)):
        apart = logits_apart(lab, (plain, params), started(second))
        metrics[f"from_vit/apart{suffix}"] = Metric(value=float(apart.max()), n=len(apart), unit="logit, largest")
        metrics[f"from_vit/mean_apart{suffix}"] = Metric(value=float(apart.mean()), n=len(apart), unit="logit")
    right = {}
    for name, (model, start) in {"vit": (plain, params), "kat": started(method.SWISH)}.items():
        optimiser = optax.adamw(
            optax.cosine_decay_schedule(config.rate / 3, config.more_steps),
            weight_decay=config.decay,
            mask=method.decayed,
        )
        options: dict[str, Any] = {"steps": config.more_steps, "batch": config.batch, "log": lab.log}
        options["name"] = f"from-vit-{name}"
        fit = train_classifiers(lab.keys("more"), lab.apply(model), start, lab.split.train, optimiser, **options)
        right[name] = hits(lab.apply(model), fit.params, lab.split.test)
        metrics[f"from_vit/accuracy/{name}"] = percent(stream(boot, "from", name), right[name])
    metrics["from_vit/over_vit"] = points(stream(boot, "from"), right["kat"], right["vit"])
    return metrics


def logits_apart(lab: Lab, one: tuple[Model, Any], other: tuple[Model, Any]) -> np.ndarray:
    """Absolute differences of the logits of two arms on all test images, (images, S, classes)."""

    @jax.jit
    def apart(x: jax.Array) -> jax.Array:
        logits = [jax.vmap(lab.apply(model), (0, None))(params, x) for model, params in (one, other)]
        return jnp.abs(logits[0] - logits[1])

    images = lab.split.test["x"]
    parts = [np.asarray(apart(images[at : at + CHUNK])) for at in range(0, len(images), CHUNK)]
    return np.concatenate([part.swapaxes(0, 1) for part in parts])


def learned_functions(params: Any) -> dict[str, np.ndarray]:
    """F_1 and F_2 of the first network, (layers, groups, N), on N points x."""
    x = jnp.linspace(-4, 4, 201)
    mlp = jax.tree.map(lambda leaf: leaf[0], params)["blocks"]["mlp"]

    def values(coefficients: Any) -> jax.Array:
        a, b = coefficients["numerator"], coefficients["denominator"]
        wide = jnp.broadcast_to(x[:, None], (len(x), len(b)))
        return rational(wide, a, b, groups=len(b)).T

    return {"x": np.asarray(x)} | {name: np.asarray(jax.vmap(values)(mlp[name])) for name in ("first", "second")}
