"""Task arithmetic in the tangent space (arXiv 2305.12827): do linearised models add and subtract tasks better?

    python -m experiments run tangent_arithmetic                  # minutes on two cores
    python -m experiments run tangent_arithmetic --preset smoke   # halves of scikit-learn's digits, seconds

A small network with one head a task is trained on all tasks and stopped at half of its accuracy, as a stand-in for a
zero-shot model; heads are then frozen. Each task is fine-tuned on its own, once in f and once in its linearisation
f_lin, with the paper's recipe, the same number of steps and the same batches. Task vectors are added, subtracted, and
tried on a grid of multiples for every pair of tasks. Multiples are chosen on validation images. Everything is repeated
from a random trunk under the same heads. The paper's models are CLIP's on eight photographic data sets; ours are a
perceptron (cpu) and a small vision transformer (accel) on MNIST and generated families.

The paper's numbers (ViT-B/32, normalised accuracy after adding eight tasks, from memory): standard 76.5, post-hoc 81.9,
linear 85.4. Ours are on docs/papers/tangent_arithmetic.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.adaptation import _tangent_arithmetic_figures as draw
from experiments.adaptation._tangent_arithmetic_claims import CLAIMS
from experiments.adaptation._tangent_arithmetic_kernels import tangent_kernels
from experiments.adaptation._tangent_arithmetic_lab import (
    HALVES,
    Lab,
    Start,
    along,
    fine_tune,
    has_mnist,
    negative,
    pair_errors,
    prepare,
    pretrain,
    scaled,
    total,
    xi_grid,
)
from experiments.measures import per_seed
from mechlab.core.errors import did_you_mean
from mechlab.data.families import FAMILIES
from mechlab.methods.adaptation import tangent_arithmetic as ta
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "resolve", "run"]

TASKS = ("mnist", "digits", *FAMILIES, *HALVES)
MODES = {
    "standard": ("standard", False),
    "posthoc": ("standard", True),
    "linear": ("linear", True),
    "crossed": ("linear", False),
}
"""Name of a mode: whose task vectors, and whether f_lin is evaluated."""
Metrics = dict[str, Metric]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      tasks: fine-tuned. "mnist", "digits" (scikit-learn's, enlarged and inverted), families of ``data.families``, or
        halves of scikit-learn's digits. Without MNIST on this machine "digits" takes its place.
      control: a family that is pre-trained and never fine-tuned: what negation must not harm.
      size: side of a generated image in pixels.
      network, width, depth: "mlp" with hidden layers of this width, or "vit" of patches a quarter of the image wide.
      widths: of further networks, for addition and xi over width.
      seeds: of networks; images are shared.
      train, validation, test: images of every task.
      pretrain_target, pretrain_steps, pretrain_rate: mean validation accuracy at which joint training stops; at most
        so many steps of Adam.
      steps, batch: of fine-tuning, with the paper's recipe and a quarter of the steps as warm-up.
      rates: AdamW's peak learning rates. Claims are judged at the first.
      xi_points, xi_images: side of the grid of multiples from -3 to 3 (odd), test images per task on it.
      ntk_points, ntk_pairs: items per task in the tangent kernel of a pair; how many pairs. 0 leaves kernels out.
    """

    tasks: tuple[str, ...] = ("mnist", "gratings", "rings", "glyphs")
    control: str = "gaps"
    size: int = 28
    network: Literal["mlp", "vit"] = "mlp"
    width: int = 128
    depth: int = 2
    widths: tuple[int, ...] = ()
    seeds: int = 3
    train: int = 2000
    validation: int = 250
    test: int = 500
    pretrain_target: float = 0.5
    pretrain_steps: int = 200
    pretrain_rate: float = 1e-3
    steps: int = 400
    batch: int = 64
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    xi_points: int = 13
    xi_images: int = 500
    ntk_points: int = 64
    ntk_pairs: int = 3

    def __post_init__(self) -> None:
        problems = []
        for name in self.tasks:
            if name not in TASKS:
                problems.append(f'tasks: unknown "{name}".{did_you_mean(name, TASKS)} Known: {", ".join(TASKS)}')
        if len(self.tasks) < 2 or len(set(self.tasks)) < len(self.tasks):
            problems.append(f"tasks must be at least two, all different, got {self.tasks}")
        if self.control not in FAMILIES or self.control in self.tasks:
            problems.append(f'control must be a generated family that is no task, got "{self.control}"')
        if self.xi_points < 3 or self.xi_points % 2 == 0:
            problems.append(f"xi_points must be odd (0 is on the grid) and at least 3, got {self.xi_points}")
        counts = (self.seeds, self.train, self.validation, self.test, self.width, self.depth, self.batch)
        if min(*counts, self.pretrain_steps, self.steps, self.xi_images) < 1 or self.ntk_points < 0:
            problems.append("counts, widths, steps and batch must be at least 1, ntk_points at least 0")
        if not self.rates or min(self.rates) <= 0 or not 0 < self.pretrain_target <= 1:
            problems.append("rates must be positive, at least one, and pretrain_target in (0, 1]")
        if problems:
            raise ValueError("; ".join(problems))


PRESETS: dict[str, Config] = {
    "smoke": Config(
        tasks=("low_digits", "high_digits"),
        control="gratings",
        size=8,
        width=64,
        seeds=1,
        train=400,
        validation=100,
        test=200,
        steps=150,
        rates=(3e-4,),
        xi_points=7,
        xi_images=200,
        ntk_points=32,
        ntk_pairs=1,
    ),
    "cpu": Config(),
    "accel": Config(
        tasks=("mnist", "gratings", "rings", "glyphs", "stars", "blobs", "checkers", "digits"),
        network="vit",
        width=64,
        depth=4,
        widths=(32, 128),
        train=1000,
        validation=200,
        pretrain_steps=2000,
        steps=2000,
        batch=128,
        xi_points=21,
        ntk_points=100,
        ntk_pairs=6,
    ),
}
PRESETS["paper"] = dataclasses.replace(PRESETS["accel"], width=256, widths=(), seeds=5, rates=(1e-5, 3e-5, 1e-4))


def resolve(config: Config) -> Config:
    """The same configuration with "mnist" replaced by "digits" where MNIST is not on this machine: no download."""
    if "mnist" not in config.tasks or has_mnist():
        return config
    kept = tuple(name for name in config.tasks if name not in ("mnist", "digits"))
    return dataclasses.replace(config, tasks=("digits", *kept), train=min(config.train, 950))


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """The whole experiment: pre-training, fine-tuning, addition, negation, xi, kernels, claims and figures."""
    lab = prepare(key, config, log)
    start = pretrain(lab)
    metrics: Metrics = {"pretrain/accuracy": per_seed(100 * start.reached, "%")}
    seen: dict[str, Any] = {"tasks": config.tasks, "grid": xi_grid(config)}

    runs = [("pretrained", rate) for rate in config.rates] + [("random", config.rates[0])]
    vectors = tune(lab, start, runs)
    names = {run: "random" if run[0] == "random" else f"rates/{run[1]:g}" for run in runs}
    added = {run: addition(lab, start, run[0], vectors[run], names[run], metrics) for run in runs}
    first = runs[0]  # what claims are judged on
    metrics |= {k.replace(names[first], "addition"): m for k, m in metrics.items() if k.startswith(names[first] + "/")}
    main, (seen["addition"], own) = vectors[first], added[first]
    negation(lab, start, main, metrics)
    single_tasks(lab, own, metrics, seen)
    errors(lab, start, "pretrained", main, "xi", metrics, seen)
    matched_errors(lab, start, main, own, metrics)
    errors(lab, start, "random", vectors[runs[-1]], "xi_random", metrics, seen)
    if config.ntk_points:
        tangent_kernels(lab, start, metrics, seen)
    for width in config.widths:
        over_width(key, lab, width, metrics)
    return Result(metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=draw.all_figures(metrics, seen))


def tune(
    lab: Lab, start: Start, runs: list[tuple[str, float]], label: str = ""
) -> dict[tuple[str, float], dict[str, Any]]:
    """Task vectors of both ways to fine-tune, by (trunk, learning rate)."""
    ways = {way: fine_tune(lab, start, runs, f"{way}{label}", linear=way == "linear") for way in ("standard", "linear")}
    return {run: {way: found[run] for way, found in ways.items()} for run in runs}


def addition(
    lab: Lab, start: Start, kind: str, vectors: dict[str, Any], prefix: str, metrics: Metrics
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """All tasks added in every mode, the multiple chosen on validation images.

    Returns:
      By mode: mean test accuracy over tasks along the sum (S, A), and accuracy of every task along its own vector
      (S, T, A) by part.
    """
    base, tasks = start.trunks[kind], np.arange(len(lab.config.tasks))
    curves, own = {}, {}
    for mode, (way, linear) in MODES.items():
        tau = vectors[way]
        summed = along(lab, base, start.heads, total(tau), tasks, linear=linear)
        own[mode] = along(lab, base, start.heads, tau, tasks, linear=linear)
        single = {part: jnp.asarray(accuracies[..., -1]) for part, accuracies in own[mode].items()}
        by_alpha = jnp.asarray(summed["validation"]).swapaxes(1, 2)
        choice = jax.vmap(ta.addition_alpha)(by_alpha, single["validation"])
        chosen = np.take_along_axis(summed["test"], np.asarray(choice.place)[:, None, None], 2)[..., 0]
        metrics[f"{prefix}/{mode}/normalised"] = per_seed(
            100 * ta.normalised_accuracy(jnp.asarray(chosen), single["test"]), "%"
        )
        metrics[f"{prefix}/{mode}/absolute"] = per_seed(100 * chosen.mean(1), "%")
        metrics[f"{prefix}/{mode}/single"] = per_seed(100 * single["test"].mean(1), "%")
        metrics[f"{prefix}/{mode}/alpha"] = per_seed(choice.alpha, "")
        metrics[f"{prefix}/{mode}/before"] = per_seed(100 * summed["test"][..., 0].mean(1), "%")
        curves[mode] = 100 * summed["test"].mean(1)
    for way, tau in vectors.items():
        moved = jax.vmap(jax.vmap(ta.relative_norm, (0, None)))(tau, base)
        metrics[f"{prefix}/{way}/moved"] = per_seed(100 * np.asarray(moved).mean(1), "% of the norm of theta_0")
    return curves, own


def negation(lab: Lab, start: Start, vectors: dict[str, Any], metrics: Metrics) -> None:
    """One task at a time taken away, as far as the control task allows on validation images."""
    base, tasks = start.trunks["pretrained"], np.arange(len(lab.config.tasks))
    control = np.full_like(tasks, len(tasks))
    for mode, (way, linear) in MODES.items():
        tau = negative(vectors[way])
        target, kept = (along(lab, base, start.heads, tau, which, linear=linear) for which in (tasks, control))
        # At alpha = 0 nothing is edited: that is the pre-trained control accuracy.
        choose = jax.vmap(jax.vmap(lambda t, c: ta.negation_alpha(t, c, c[0])))
        choice = choose(*(jnp.asarray(accuracies["validation"]) for accuracies in (target, kept)))
        for name, accuracies in (("target", target["test"]), ("control", kept["test"])):
            chosen = np.take_along_axis(accuracies, np.asarray(choice.place)[..., None], 2)[..., 0]
            metrics[f"negation/{mode}/{name}"] = per_seed(100 * chosen.mean(1), "%")
            metrics[f"negation/before/{name}"] = per_seed(100 * accuracies[..., 0].mean(1), "%")
        metrics[f"negation/{mode}/alpha"] = per_seed(np.asarray(choice.alpha).mean(1), "")


def single_tasks(lab: Lab, curves: dict[str, dict[str, np.ndarray]], metrics: Metrics, seen: dict[str, Any]) -> None:
    """Each task's own model in every mode: non-linear advantage, and whether fine-tuning was in the linear regime."""
    own = {mode: parts["test"][..., -1] for mode, parts in curves.items()}
    for mode, by_task in own.items():
        for i, task in enumerate(lab.config.tasks):
            metrics[f"single/{mode}/{task}"] = per_seed(100 * by_task[:, i], "%")
    advantage = ta.nonlinear_advantage(own["standard"], own["linear"], lab.classes)
    metrics["advantage"] = per_seed(100 * np.asarray(advantage).mean(1), "points")
    for i, task in enumerate(lab.config.tasks):
        drop = own["standard"][:, i] - own["posthoc"][:, i]
        metrics[f"posthoc_drop/{task}"] = per_seed(100 * drop, "points")
    seen["single"] = {mode: 100 * by_task for mode, by_task in own.items()}


def errors(
    lab: Lab, start: Start, kind: str, vectors: dict[str, Any], prefix: str, metrics: Metrics, seen: dict[str, Any]
) -> None:
    """Disentanglement errors of all pairs; their mean over [-1, 1]² without the axes, and over its adding quarter."""
    for mode, (way, linear) in MODES.items():
        maps = pair_errors(lab, start.trunks[kind], start.heads, vectors[way], linear=linear)
        metrics[f"{prefix}/{mode}"] = per_seed(inner(lab, maps), "of 2")
        metrics[f"{prefix}/{mode}/adding"] = per_seed(inner(lab, maps, lowest=0.0), "of 2")
        seen.setdefault(prefix, {})[mode] = maps.mean((0, 1))


def inner(lab: Lab, maps: np.ndarray, *, lowest: float = -1.0) -> np.ndarray:
    """Mean of xi over multiples in [lowest, 1] that are not 0, and over pairs: (S, pairs, A, A) -> (S,)."""
    grid = xi_grid(lab.config)
    kept = (grid >= lowest - 1e-6) & (grid <= 1 + 1e-6) & (grid != 0)
    return maps[:, :, kept][..., kept].mean((1, 2, 3))


def matched_errors(
    lab: Lab, start: Start, vectors: dict[str, Any], own: dict[str, dict[str, np.ndarray]], metrics: Metrics
) -> None:
    """xi of standard and linear where both do the single tasks equally well.

    The vector of the better of the two is shortened to the smallest multiple that reaches the other's validation
    accuracy; the error is then a matter of direction and not of how far training went.
    """
    base, curves = start.trunks["pretrained"], {mode: own[mode]["validation"] for mode in ("standard", "linear")}
    common = np.minimum(*(curve[..., -1] for curve in curves.values()))
    for mode, curve in curves.items():
        factor = np.asarray(ta.ALPHAS)[(curve >= common[..., None]).argmax(-1)]
        maps = pair_errors(lab, base, start.heads, scaled(vectors[mode], factor), linear=mode == "linear")
        metrics[f"xi_matched/{mode}"] = per_seed(inner(lab, maps), "of 2")
        metrics[f"xi_matched/{mode}/adding"] = per_seed(inner(lab, maps, lowest=0.0), "of 2")
        metrics[f"xi_matched/{mode}/factor"] = per_seed(factor.mean(1), "")


def over_width(key: jax.Array, lab: Lab, width: int, metrics: Metrics) -> None:
    """Addition and xi of another network width, at the first learning rate."""
    config = dataclasses.replace(lab.config, width=width)
    other = prepare(key, config, lab.log)
    start = pretrain(other, f"-{width}")
    run = ("pretrained", config.rates[0])
    vectors = tune(other, start, [run], f"-{width}")[run]
    metrics[f"width/{width}/pretrain"] = per_seed(100 * start.reached, "%")
    addition(other, start, "pretrained", vectors, f"width/{width}", metrics)
    errors(other, start, "pretrained", vectors, f"width/{width}/xi", metrics, {})
