"""Fast certified training with a short warm-up (arXiv 2103.17268): do initialisation, batch norm and regularisers help?

    python -m experiments run fast_ibp                  # the preset cpu
    python -m experiments run fast_ibp --preset smoke   # scikit-learn's digits, seconds

Classifiers of digits are trained on interval bounds: some natural epochs, a short ramp of ε, some epochs at full ε.
Arms leave out one or more of the paper's three improvements; two of them are trained with a longer ramp as well, and
one on CROWN-IBP's bounds. Reported on test images: verified error (by interval bounds), error under attack (PGD),
standard error, each at the end of training, and the states of the ReLUs over time. Nothing is selected on test images:
every number is of the last epoch. Arms of one seed see the same batches and share classifier and biases at the start.

Numbers of a run, and how they compare with the paper's, are on docs/papers/fast_ibp.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

from experiments.architectures import _fast_ibp_figures as draw
from experiments.architectures._fast_ibp_claims import CLAIMS
from experiments.architectures._fast_ibp_lab import ARMS, Trained, examiner, initial_ratios, prepare, train_all
from experiments.measures import per_seed, percent, points
from mechlab.core.rng import stream
from mechlab.data.images import load_images
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "resolve", "run"]

CPU_ARMS = ("xavier", "init", "bn", "init_bn", "init_reg", "full", "crown_full", "xavier_long", "full_long")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      data: "auto" takes MNIST where it is on this machine, else scikit-learn's digits, and downloads nothing.
      train: training images at most.
      network: a perceptron of the ``hidden`` widths, or CNN-7 of ``width``.
      hidden: hidden widths of the perceptron.
      width: channels of CNN-7's first convolution.
      eps: target radii, of pixels in [0, 1]; training and test use the same.
      arms: see ``_fast_ibp_lab.ARMS``.
      seeds: number of networks per arm and radius.
      natural, ramp, full: epochs at ε = 0, of the ramp, and at full ε.
      longer: the ramp of "_long" arms is so many times longer.
      batch, rate: of Adam; the norm of the gradient is clipped at 10.
      decay_at: shares of the epochs at full ε after which the rate is multiplied by 0.2.
      weight, tolerance: λ_0 and τ of the regularisers.
      attacked, attack_steps, restarts: PGD on so many test images.
    """

    data: Literal["auto", "mnist", "digits"] = "auto"
    train: int = 8000
    network: Literal["mlp", "cnn7"] = "mlp"
    hidden: tuple[int, ...] = (128,) * 5
    width: int = 16
    eps: tuple[float, ...] = (0.1, 0.2)
    arms: tuple[str, ...] = CPU_ARMS
    seeds: int = 2
    natural: int = 1
    ramp: int = 4
    full: int = 5
    longer: int = 3
    batch: int = 128
    rate: float = 1e-3
    decay_at: tuple[float, ...] = (0.6, 0.8)
    weight: float = 0.5
    tolerance: float = 0.5
    attacked: int = 500
    attack_steps: int = 20
    restarts: int = 2

    def __post_init__(self) -> None:
        counts = ("train", "width", "seeds", "ramp", "full", "longer", "batch", "attacked", "attack_steps", "restarts")
        problems = [
            f"{name} must be at least 1, got {getattr(self, name)}" for name in counts if getattr(self, name) < 1
        ]
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            problems.append(f"unknown arms {unknown}; known: {', '.join(ARMS)}")
        if not self.arms or len(set(self.arms)) < len(self.arms):
            problems.append(f"arms must be named, each once, got {self.arms}")
        if not self.eps or not all(0 < eps <= 1 for eps in self.eps) or len(set(self.eps)) < len(self.eps):
            problems.append(f"eps must be different radii in (0, 1], got {self.eps}")
        if not self.hidden or min(self.hidden) < 1:
            problems.append(f"hidden widths must be at least 1, got {self.hidden}")
        if not all(0 <= share < 1 for share in self.decay_at):
            problems.append(f"decay_at must be shares in [0, 1), got {self.decay_at}")
        if self.natural < 0 or self.rate <= 0 or self.weight < 0 or not 0 < self.tolerance <= 1:
            problems.append("natural and weight must not be negative, rate positive, tolerance in (0, 1]")
        if problems:
            raise ValueError("; ".join(problems))


PRESETS: dict[str, Config] = {
    "smoke": Config(
        data="digits",
        hidden=(64,) * 4,
        eps=(0.1,),
        arms=("xavier", "full"),
        seeds=1,
        ramp=3,
        full=4,
        batch=64,
        attacked=200,
        attack_steps=10,
    ),
    "cpu": Config(),
    "accel": Config(
        data="mnist", train=20_000, network="cnn7", eps=(0.2, 0.3, 0.4), arms=tuple(ARMS), seeds=3, batch=256
    ),
    "paper": Config(
        data="mnist",
        train=60_000,
        network="cnn7",
        width=64,
        eps=(0.4,),
        arms=("xavier", "init_bn", "full", "crown_full"),
        seeds=5,
        ramp=20,
        full=49,
        batch=256,
        rate=5e-4,
        attacked=10_000,
        attack_steps=100,
    ),
}


def resolve(config: Config) -> Config:
    """The same configuration with ``data="auto"`` decided: a record names its data, and a resumed run keeps it."""
    found: Any = load_images(config.data).name
    return dataclasses.replace(config, data=found)


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """The whole experiment: bounds at initialisation, every arm trained, errors, claims and figures."""
    lab = prepare(key, config, log)
    ratios = initial_ratios(lab)
    trained = train_all(lab)
    examine = examiner(lab)
    final = {name: examine(arm) for name, arm in trained.items()}
    metrics = initial_metrics(ratios) | errors(stream(key, "bootstrap"), config, final) | soundness(final)
    for name, arm in trained.items():
        metrics |= regulariser_metrics(config, name, arm, lab.per_epoch)
    return Result(
        metrics=metrics,
        claims=judge_claims(CLAIMS, metrics),
        figures=draw.all_figures(config, lab.per_epoch, ratios, trained, metrics),
    )


def initial_metrics(ratios: dict[str, np.ndarray]) -> dict[str, Metric]:
    """E[δ_i]/E[δ_0] before training, by initialisation and layer, counted from 1."""
    return {
        f"initial/{name}/{layer}": per_seed(column, "times the input's radius")
        for name, values in ratios.items()
        for layer, column in enumerate(values.T, 1)
    }


def errors(key: jax.Array, config: Config, final: dict[str, dict[str, np.ndarray]]) -> dict[str, Metric]:
    """Verified, attacked and standard error, and states of the ReLUs, by radius and arm.

    Intervals are bootstraps over test images. ``gain`` is by how many points the verified error is below
    that of Xavier.
    """
    metrics: dict[str, Metric] = {}
    for name, found in final.items():
        for i, eps in enumerate(config.eps):
            at = f"{eps:g}/{name}"
            for kind in ("verified", "attacked", "standard"):
                metrics[f"{kind}/{at}"] = percent(stream(key, kind, at), ~found[kind][i])
            for state in ("active", "inactive"):
                metrics[f"{state}/{at}"] = per_seed(100 * found[state][i].mean(-1), "% of ReLUs, mean over layers")
            metrics[f"balance/{at}"] = per_seed(found["balance"][i].mean(-1), "min(α, 1/α), mean over layers")
            for layer, share in enumerate(found["inactive"][i].T, 1):
                metrics[f"inactive_by_layer/{at}/{layer}"] = per_seed(100 * share, "% of ReLUs")
            if "xavier" in final and name != "xavier":
                vanilla = final["xavier"]["verified"][i]
                metrics[f"gain/{at}"] = points(stream(key, "gain", at), found["verified"][i], vanilla)
    return metrics


def soundness(final: dict[str, dict[str, np.ndarray]]) -> dict[str, Metric]:
    """Image by image: certified ones that the attack broke, and wrong ones that were right under attack."""
    broken = wrong = networks = 0
    for found in final.values():
        attacked = found["attacked"]
        verified, standard = (found[kind][..., : attacked.shape[-1]] for kind in ("verified", "standard"))
        broken += int((verified & ~attacked).sum())
        wrong += int((~standard & attacked).sum())
        networks += attacked.shape[0] * attacked.shape[1]
    return {
        "soundness/certified_but_broken": Metric(value=broken, n=networks, unit="images"),
        "soundness/right_under_attack_only": Metric(value=wrong, n=networks, unit="images"),
    }


def regulariser_metrics(config: Config, name: str, arm: Trained, per_epoch: int) -> dict[str, Metric]:
    """The regularisers' values in the first and the last epoch of the ramp, whether or not the loss held them."""
    last = config.natural + config.ramp * (config.longer if ARMS[name].long else 1)
    metrics = {}
    for i, eps in enumerate(config.eps):
        for term in ("tightness", "relu"):
            by_epoch = arm.losses[term][i].reshape(config.seeds, -1, per_epoch).mean(-1)
            for when, epoch in (("first", 0), ("last", last - 1)):
                metrics[f"{term}_{when}/{eps:g}/{name}"] = per_seed(by_epoch[:, epoch], "regulariser, without λ")
    return metrics
