"""The Bone experiment's workshop: the tasks, the arms, how an arm is tuned and what is measured of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.adaptation._bone_tasks import Task
from experiments.finetuning import Optimiser, adamw, exact_match, finetune
from mechlab.core import select
from mechlab.core.rng import stream
from mechlab.core.transforms import Adapter, AdapterState, tune
from mechlab.methods.adaptation import bone, lora
from mechlab.reporting.log import Log

if TYPE_CHECKING:
    from experiments.adaptation.bone import Config

GRADIENT_BATCHES = 8
"""Batches over which LoRA-GA averages its gradient, as its paper does."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
      make: the adapter, for a task; LoRA-GA takes its gradient in here.
      rate: centre of the grid of learning rates.
      optimiser: of the number of steps.
    """

    make: Callable[[Task], Adapter]
    rate: float
    optimiser: Callable[[int], Optimiser] = adamw


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an arm did on a task.

    Attributes:
      rate: the learning rate that was best on the validation rows, from the grid.
      grid: validation loss by rate.
      losses: (S, steps) training loss, the same batches for every arm.
      held_out: (S,) loss on the test rows.
      trained: numbers that were trained.
      hits: (S, N) exact match on the test rows, or None where it is not asked for.
    """

    rate: float
    grid: dict[float, float]
    losses: np.ndarray
    held_out: np.ndarray
    trained: int
    hits: np.ndarray | None


def make_arms(config: Config) -> dict[str, Arm]:
    """Every arm; ranks of the LoRA family are matched to Bone-col's numbers, task by task."""
    block = config.block

    def low_rank(method: Callable[..., Adapter], rate: float, **options: Any) -> Arm:
        return Arm(lambda task: method(matched_rank(task, block), pattern=task.pattern, **options), rate)

    def blocks(method: Callable[..., Adapter], size: int = block) -> Arm:
        return Arm(lambda task: method(size, pattern=task.pattern), config.bone_rate)

    def loraplus(steps: int) -> Optimiser:
        return lambda rate: lora.loraplus(rate, optimiser=adamw(steps))

    def gradient_start(task: Task) -> Adapter:
        return lora.lora_ga(matched_rank(task, block), gradient(task, config.batch), pattern=task.pattern)

    return {
        "bone_col": blocks(bone.bone_col),
        "lora": low_rank(lora.lora, config.lora_rate),
        "loraplus": dataclasses.replace(low_rank(lora.lora, config.lora_rate / 8), optimiser=loraplus),
        "pissa": low_rank(lora.pissa, config.informed_rate),
        "olora": low_rank(lora.olora, config.informed_rate),
        "lora_ga": Arm(gradient_start, config.informed_rate),
        "dora": low_rank(lora.dora, config.lora_rate),
        "miss": blocks(bone.miss),
        "guide_only": blocks(bone.guide_only),
        "bone_row": blocks(bone.bone_row),
        "bone_ab": blocks(bone.bone_ab),
        "bone_free": blocks(bone.bone_free),
        "full": Arm(lambda task: tune("**"), config.full_rate),
        **{f"bone_col_{size}": blocks(bone.bone_col, size) for size in config.blocks},
    }


def matched_rank(task: Task, block: int) -> int:
    """The rank at which LoRA trains as many numbers as Bone-col, as nearly as ranks allow."""
    wanted = bone.trained_numbers(bone.bone_col(block, pattern=task.pattern), task.params)
    return max(1, round(wanted / bone.trained_numbers(lora.lora(1, pattern=task.pattern), task.params)))


def gradient(task: Task, batch: int) -> Any:
    """Gradient of the training loss at the base, over the first rows."""
    rows = jax.tree.map(lambda x: x[: GRADIENT_BATCHES * batch], task.train)
    return _gradient(task)(task.params, rows)


def _gradient(task: Task) -> Callable[..., Any]:
    return jax.jit(jax.grad(lambda params, rows: task.loss(task.apply, params, rows)))


def run_arm(keys: jax.Array, task: Task, arm: Arm, config: Config, log: Log, name: str) -> Outcome:
    """Choose the rate on seed 0's validation rows, then train every seed at it.

    Args:
      keys: (S,) typed keys of the seeds; the same for every arm, so that all see the same batches.
    """
    adapter = arm.make(task)

    def trained(keys: jax.Array, rates: Any, part: str) -> Any:
        return finetune(
            keys,
            rates,
            task.apply,
            task.params,
            adapter,
            task.train,
            steps=config.steps,
            batch=config.batch,
            optimiser=arm.optimiser(config.steps),
            loss=task.loss,
            log=log,
            name=f"{name}-{part}",
        )

    rates = arm.rate * np.asarray(config.rate_factors)
    rate, grid = float(rates[0]), {}
    if len(rates) > 1:
        found = trained(jnp.stack([keys[0]] * len(rates)), rates, "rates")
        scores = task.score(adapter, found.states, task.validation)
        grid = dict(zip(map(float, rates), map(float, scores), strict=True))
        rate = float(rates[int(np.argmin(scores))])
    done = trained(keys, np.full(len(keys), rate), "seeds")
    return Outcome(
        rate,
        grid,
        done.losses,
        task.score(adapter, done.states, task.test),
        select.count(done.states.train) // len(keys),
        exact_match(task.model, task.params, adapter, done.states, task.test, read=task.read) if task.model else None,
    )


def first_looks(keys: jax.Array, task: Task, arms: dict[str, Arm], config: Config) -> dict[str, dict[str, Any]]:
    """Before any step, by arm: the largest difference of outputs to the base, and the gradient's norm, by seed.

    The gradient is that of the base's weights, pulled back through the merge: the loss is differentiated once.
    """
    rows = jax.tree.map(lambda x: x[: config.batch], task.train)
    inputs = jax.tree.leaves(rows)[0]
    outputs = jax.jit(jax.vmap(lambda params: task.apply(params, inputs)))
    base = outputs(jax.tree.map(lambda x: x[None], task.params))
    of_weights = _gradient(task)(task.params, rows)
    seen = {}
    for name, arm in arms.items():
        adapter = arm.make(task)

        def one(key: jax.Array, adapter: Adapter = adapter) -> tuple[Any, jax.Array]:
            state = adapter.init(stream(key, "init"), task.params)
            merged, back = jax.vjp(
                lambda train: adapter.merge(task.params, AdapterState(train, state.fixed)), state.train
            )
            return merged, optax.global_norm(back(of_weights))

        merged, norms = jax.jit(jax.vmap(one))(keys)
        difference = jnp.abs(outputs(merged) - base).max(range(1, base.ndim))
        seen[name] = {"difference": np.asarray(difference), "norm": np.asarray(norms)}
    return seen


def start_up_seconds(key: jax.Array, task: Task, arms: dict[str, Arm], config: Config, repeats: int = 7) -> Any:
    """Wall seconds of making each arm's state, compiled beforehand, in turns: ``{arm: [seconds, ...]}``.

    LoRA-GA's gradient counts as part of its start.
    """
    rows = jax.tree.map(lambda x: x[: GRADIENT_BATCHES * config.batch], task.train)
    of_loss = _gradient(task)

    def starter(name: str, arm: Arm) -> Callable[[], Any]:
        if name == "lora_ga":
            rank = matched_rank(task, config.block)
            make = jax.jit(lambda key, g: lora.lora_ga(rank, g, pattern=task.pattern).init(key, task.params))
            return lambda: make(key, of_loss(task.params, rows))
        # Parameters are an argument: as constants, their decomposition would be folded into the program.
        init = jax.jit(arm.make(task).init)
        return lambda: init(key, task.params)

    starts = {name: starter(name, arm) for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    for turn in range(repeats + 1):
        for name, start in starts.items():
            before = time.perf_counter()
            jax.block_until_ready(start())
            if turn:
                seconds[name].append(time.perf_counter() - before)
    return seconds
