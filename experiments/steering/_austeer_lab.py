"""What is measured: subjects, readings, arms as data, and their margins on items.

An arm is four arrays, one for each place where any of the methods acts; zeros do nothing, to the bit. So every arm of
every method, site, k and alpha is a cell of one program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.steering._austeer_tasks import Items, Subject, Task, planted, stacked, story_task, tales_task
from mechlab.core.edits import chain
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.core.sweeps import grid, sweep
from mechlab.data.sources import MissingData
from mechlab.data.splits import split_indices
from mechlab.methods.steering import austeer, baselines
from mechlab.methods.steering.vectors import Texts
from mechlab.models.generate import generate
from mechlab.models.subjects import load_stories260k, load_tales, tales_card
from mechlab.reporting.log import Log

TALES = ("recall", "mood", "agree", "ioi")
STORIES = ("stories_mood", "stories_recall")
TUNED = ("austeer", "sadi", "block", "caa", "iti")
SITES = ("attn", "ffn")


class Arm(NamedTuple):
    """Everything that any method does to a model; a leading axis for several.

    Attributes:
      attn: (L, H K) mask of units of ``attn_z``.
      ffn: (L, D) mask of units of ``mlp_out``.
      shift: (L, H, K) added to ``attn_z`` at the last token of the prompt (ITI).
      add: (L, D) added to ``resid_post`` (CAA).
    """

    attn: jax.Array
    ffn: jax.Array
    shift: jax.Array
    add: jax.Array


class Choices(NamedTuple):
    """C arms of one method with their settings, each (C,): site (0 attn, 1 ffn, -1 none), k, alpha, dims."""

    arms: Arm
    settings: dict[str, np.ndarray]


class Reading(NamedTuple):
    """What the training pairs of one seed give, by site where there are two.

    Attributes:
      momentum: (N, L, D).
      scores: (L, D) beta.
      steadiness: (L, D), for breaking ties.
      caa: (L, D) mean difference of the residual stream.
      iti: heads and shifts.
    """

    momentum: dict[str, jax.Array]
    scores: dict[str, jax.Array]
    steadiness: dict[str, jax.Array]
    caa: jax.Array
    iti: baselines.ITI


def make_subjects(key: jax.Array, config: Any, log: Log) -> dict[str, Subject]:
    """The models with their tasks; stories260K is left out, and said so, where it is not on this machine."""
    found: dict[str, Subject] = {}
    if "planted" in config.tasks:
        found["planted"] = planted(stream(key, "planted"))
    if kinds := [task for task in config.tasks if task in TALES]:
        model, params, tokenizer = load_tales("L")
        usual = tales_card("L")["usual"]
        tasks = {kind: tales_task(kind, usual[kind]) for kind in kinds}
        found["tales-L"] = Subject(model, params, tokenizer.decode, tasks)
    if names := [task for task in config.tasks if task in STORIES]:
        try:
            model, params, vocabulary = load_stories260k(download=False)
        except MissingData:
            log.say("stories260K is not on this machine; its tasks are left out")
        else:
            tasks = {name: story_task(name.removeprefix("stories_"), vocabulary) for name in names}
            found["stories260K"] = Subject(model, params, vocabulary.decode, tasks)
    return found


def read(key: jax.Array, subject: Subject, task: Task, seeds: int, n: int) -> list[Reading]:
    """Scores, directions and heads of every seed, each from its own N training pairs."""
    items = stacked([task.draw(stream(key, "train", seed), n, "train") for seed in range(seeds)])
    flat: Texts = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), items.ended)
    variables = {"params": subject.params}
    states = {
        site: austeer.unit_states(subject.model, variables, flat, site, batch=min(100, 2 * n)).reshape(
            seeds, 2, n, subject.model.module.config.layers, -1
        )
        for site in austeer.SITES
    }
    heads = subject.model.module.config.heads
    readings = []
    for seed in range(seeds):
        momentum = {site: austeer.au_momentum(*states[site][seed]) for site in SITES}
        z = states["attn"][seed].reshape(2 * n, states["attn"].shape[3], heads, -1)
        # Both answers of a pair stay on one side.
        train, ranking = split_indices(stream(key, "heads", seed), n, (n - n // 5, n // 5))
        sides = [np.concatenate([np.asarray(part), np.asarray(part) + n]) for part in (train, ranking)]
        readings.append(
            Reading(
                momentum,
                {site: austeer.au_scores(m) for site, m in momentum.items()},
                {site: austeer.au_steadiness(m) for site, m in momentum.items()},
                baselines.caa_vector(*states["layer"][seed]),
                baselines.iti_fit(z, np.repeat([1, 0], n), *sides),
            )
        )
    return readings


def arms_of(model: Model, n: int, **given: jax.Array) -> Arm:
    """N arms: the given arrays with their leading axis, zeros in the other places."""
    config = model.module.config
    layers, heads, width = config.layers, config.heads, config.d_head
    zeros = {
        "attn": jnp.zeros((n, layers, heads * width)),
        "ffn": jnp.zeros((n, layers, config.width)),
        "shift": jnp.zeros((n, layers, heads, width)),
        "add": jnp.zeros((n, layers, config.width)),
    }
    return Arm(**(zeros | given))


def edits_of(model: Model, arm: Arm, lengths: jax.Array) -> dict[str, Any]:
    """One arm as edits."""
    return chain(
        austeer.au_edits(model, arm.attn, "attn"),
        baselines.iti_edits(model, arm.shift, lengths - 1),
        austeer.au_edits(model, arm.ffn, "ffn"),
        baselines.caa_edits(model, arm.add),
    )


def tuned_arms(model: Model, reading: Reading, ks: Sequence[int], alphas: Sequence[float]) -> dict[str, Choices]:
    """Every setting of every method that is tuned on dev: about as many for each as AUSteer has.

    Where a method has no k, its budget goes into layers and finer strengths between fixed ends.
    """
    config = model.module.config
    budget = len(SITES) * len(ks) * len(alphas)

    def strengths(low: float, high: float, n: int) -> np.ndarray:
        return np.geomspace(low, high, max(2, n))

    both = {name: np.asarray(x) for name, x in grid(k=jnp.asarray(ks), alpha=jnp.asarray(alphas, jnp.float32)).items()}
    found = {}

    def by_site(masks: dict[str, jax.Array], settings: dict[str, np.ndarray]) -> Choices:
        parts = [arms_of(model, len(masks[site]), **{site: masks[site]}) for site in SITES]
        arms = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        sites = np.repeat(np.arange(len(SITES)), len(parts[0].attn))
        dims = np.count_nonzero(np.concatenate([np.asarray(masks[s]).reshape(len(masks[s]), -1) for s in SITES]), 1)
        spread = {name: np.tile(values, len(SITES)) for name, values in settings.items()}
        return Choices(arms, {"site": sites, "dims": dims} | spread)

    found["austeer"] = by_site(
        {s: jax.vmap(lambda k, a, s=s: austeer.au_mask(reading.scores[s], k, a))(both["k"], both["alpha"])
         for s in SITES}, both)  # fmt: skip
    found["sadi"] = by_site(
        {s: jax.vmap(lambda k, a, s=s: baselines.sadi_mask(reading.momentum[s], k, a))(both["k"], both["alpha"])
         for s in SITES}, both)  # fmt: skip
    cells = grid(
        layer=jnp.arange(config.layers),
        alpha=jnp.asarray(strengths(min(alphas), max(alphas), budget // (2 * config.layers)), jnp.float32),
    )
    found["block"] = by_site(
        {s: jax.vmap(lambda layer, a, s=s: baselines.whole_block(reading.scores[s], layer, a))(cells["layer"], cells["alpha"])
         for s in SITES}, {name: np.asarray(x) for name, x in cells.items()})  # fmt: skip
    cells = grid(
        layer=jnp.arange(config.layers), alpha=jnp.asarray(strengths(0.25, 8, budget // config.layers), jnp.float32)
    )
    add = jax.vmap(lambda layer, alpha: baselines.caa_shift(reading.caa, layer, alpha))(cells["layer"], cells["alpha"])
    found["caa"] = Choices(
        arms_of(model, len(add), add=add),
        {"dims": np.full(len(add), config.width)} | {name: np.asarray(x) for name, x in cells.items()},
    )
    kept = [k for k in (1, 2, 4, 8, 16) if k <= reading.iti.ranks.size]
    cells = grid(k=jnp.asarray(kept), alpha=jnp.asarray(strengths(0.5, 16, budget // len(kept)), jnp.float32))
    shift = jax.vmap(lambda k, alpha: baselines.iti_shift(reading.iti, k, alpha))(cells["k"], cells["alpha"])
    found["iti"] = Choices(
        arms_of(model, len(shift), shift=shift),
        {"dims": np.asarray(cells["k"]) * config.d_head} | {name: np.asarray(x) for name, x in cells.items()},
    )
    return found


def control_arms(
    key: jax.Array, model: Model, reading: Reading, site: str, k: int, alpha: float, randoms: int
) -> tuple[list[str], Arm]:
    """At one site, k and alpha: other scores, other ties, the least consistent units, and random ones."""
    scores, momentum = reading.scores[site], reading.momentum[site]
    mean = austeer.au_mask(austeer.au_scores(momentum, "mean"), k, 1.0)
    # The mean momentum has the unit of an activation: it steers as strongly, on average, as the signs do.
    size = jnp.abs(austeer.au_mask(scores, k, alpha)).sum() / jnp.abs(mean).sum()
    steady = austeer.au_mask(scores, k, alpha, tie_break=reading.steadiness[site])
    inverse = baselines.matched_mask(scores, baselines.inverse_ranks(scores), k, alpha)
    orders = jax.vmap(lambda one: baselines.random_ranks(one, scores.shape))(jax.random.split(key, randoms))
    drawn = jax.vmap(lambda ranks: baselines.matched_mask(scores, ranks, k, alpha))(orders)
    masks = jnp.concatenate([jnp.stack([size * mean, steady, inverse]), drawn])
    return ["mean", "steady", "inverse", *(f"random {i}" for i in range(randoms))], arms_of(
        model, len(masks), **{site: masks}
    )


def scores_of(subject: Subject, items: Items, arms: Arm, seeds: np.ndarray) -> np.ndarray:
    """Logits of both candidates under each arm, on the items of its seed, in one program.

    Args:
      subject: model and parameters.
      items: (S, N, ...) stacked seeds.
      arms: C arms.
      seeds: (C,) whose items each arm answers.

    Returns:
      (C, N, 2).
    """
    model = subject.model

    def cell(one: tuple[Arm, jax.Array], params: Any, asked: tuple[Texts, jax.Array]) -> jax.Array:
        arm, seed = one
        texts, candidates = jax.tree.map(lambda x: x[seed], asked)
        return austeer.steered_logits(model, params, edits_of(model, arm, texts.lengths), texts, candidates)

    # On a CPU chunks that stay in its cache: about 2 million numbers of the widest activation.
    tokens = int(np.prod(items.texts.tokens.shape[1:]))
    small = max(1, 2_000_000 // (tokens * model.module.config.hidden))
    batch = small if jax.default_backend() == "cpu" else None
    return np.asarray(sweep(cell, (arms, jnp.asarray(seeds)), subject.params, (items.texts, items.candidates), batch=batch))


def pick(arms: Arm, index: int) -> Arm:
    """One of several arms, with a leading axis of 1."""
    return jax.tree.map(lambda x: x[index : index + 1], arms)


def join(arms: Sequence[Arm]) -> Arm:
    """Arms one after another."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *arms)


def continuations(subject: Subject, items: Items, row: int, arm: Arm, steps: int = 8) -> tuple[str, str, str]:
    """A prompt of the first seed, and its greedy continuation without and with an arm's masks, as text."""
    length = int(items.texts.lengths[0, row])
    prompt = items.texts.tokens[0, row : row + 1, :length]
    written = []
    for edits in ({}, edits_of(subject.model, jax.tree.map(lambda x: x[0], arm), jnp.asarray([length]))):
        steps = min(steps, subject.model.module.config.context - length)
        done = generate(subject.model, {"params": subject.params, "edits": edits}, prompt, steps=steps)
        written.append(subject.decode(np.asarray(done.tokens[0, length : length + steps]).tolist()).strip())
    return subject.decode(np.asarray(prompt[0]).tolist()), written[0], written[1]
