"""What is measured: subjects, readings, arms as data, and their margins on items.

An arm is four arrays, one for each place where any of the methods acts; zeros do nothing, to the bit. So every arm of
every method, site, k and alpha is a cell of one program.
"""

from __future__ import annotations

import functools
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
    """C arms of one method with their settings: site (0 attn, 1 ffn), k, layer, alpha, each (C,), and dims (S, C)."""

    arms: Arm
    settings: dict[str, np.ndarray]


class Reading(NamedTuple):
    """What the training pairs of each seed give, by site where there are two; all with a leading axis S.

    Attributes:
      momentum: (S, N, L, D).
      scores: (S, L, D) beta.
      steadiness: (S, L, D), for breaking ties.
      caa: (S, L, D) mean difference of the residual stream.
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


def read(key: jax.Array, subject: Subject, task: Task, seeds: int, n: int) -> Reading:
    """Scores, directions and heads of every seed, each from its own N training pairs."""
    items = stacked([task.draw(stream(key, "train", seed), n, "train") for seed in range(seeds)])
    flat = Texts(*(x.reshape(-1, *x.shape[2:]) for x in items.ended))
    layers, heads = subject.model.module.config.layers, subject.model.module.config.heads
    states = {
        site: austeer.unit_states(subject.model, {"params": subject.params}, flat, site, batch=min(100, 2 * n)).reshape(
            seeds, 2, n, layers, -1
        )
        for site in austeer.SITES
    }
    # Pairs are independent draws, so the last fifth can rank the heads; both answers of a pair stay on one side.
    last = np.arange(2 * n) % n >= n - n // 5

    @jax.jit
    @jax.vmap
    def digest(states: dict[str, jax.Array]) -> Reading:
        momentum = {site: austeer.au_momentum(*states[site]) for site in SITES}
        z = states["attn"].reshape(2 * n, layers, heads, -1)
        return Reading(
            momentum,
            {site: austeer.au_scores(m) for site, m in momentum.items()},
            {site: austeer.au_steadiness(m) for site, m in momentum.items()},
            baselines.caa_vector(*states["layer"]),
            baselines.iti_fit(z, np.repeat([1, 0], n), np.flatnonzero(~last), np.flatnonzero(last)),
        )

    return digest(states)


@jax.jit
@jax.vmap
def consistency(key: jax.Array, reading: Reading) -> tuple[jax.Array, jax.Array]:
    """The largest |beta| of all units at both sites, and its 95 % quantile where the sides of pairs are drawn by lot.

    Every unit's signs are flipped together, pair by pair, so that what units have in common is kept.
    """
    m = jnp.concatenate([reading.momentum[site].reshape(reading.momentum[site].shape[0], -1) for site in SITES], 1)
    flips = jax.random.rademacher(key, (400, len(m)), jnp.float32)
    excess = jnp.abs(flips @ jnp.sign(m))  # |c+ - c-|, where c+ + c- is the number of momenta that are not 0
    drawn = ((m != 0).sum(0) + excess).max(1) / (2 * len(m))
    top = jnp.stack([jnp.abs(reading.scores[site]).max() for site in SITES]).max()
    return top, jnp.quantile(drawn, 0.95)


def arms_of(model: Model, **given: jax.Array) -> Arm:
    """An arm of the given arrays, zeros in the other places."""
    config = model.module.config
    layers, heads, width = config.layers, config.heads, config.d_head
    zeros = {
        "attn": jnp.zeros((layers, heads * width)),
        "ffn": jnp.zeros((layers, config.width)),
        "shift": jnp.zeros((layers, heads, width)),
        "add": jnp.zeros((layers, config.width)),
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
    """Every setting of every method that is tuned on dev, arms (S, C, ...): about as many for each as AUSteer has.

    Where a method has no k, its budget goes into layers and finer strengths between fixed ends.
    """
    config = model.module.config
    budget = len(SITES) * len(ks) * len(alphas)
    kept = [k for k in (1, 2, 4, 8, 16) if k <= config.layers * config.heads]
    layers = jnp.arange(config.layers)

    def strengths(low: float, high: float, n: int) -> jax.Array:
        return jnp.asarray(np.geomspace(low, high, max(2, n)), jnp.float32)

    cells = {
        "austeer": grid(site=jnp.arange(2), k=jnp.asarray(ks), alpha=jnp.asarray(alphas, jnp.float32)),
        "sadi": grid(site=jnp.arange(2), k=jnp.asarray(ks), alpha=jnp.asarray(alphas, jnp.float32)),
        "block": grid(
            site=jnp.arange(2),
            layer=layers,
            alpha=strengths(min(alphas), max(alphas), budget // (2 * config.layers)),
        ),
        "caa": grid(layer=layers, alpha=strengths(0.25, 8, budget // config.layers)),
        "iti": grid(k=jnp.asarray(kept), alpha=strengths(0.5, 16, budget // len(kept))),
    }

    def arm(method: str, one: Reading, cell: dict[str, jax.Array]) -> Arm:
        alpha = cell["alpha"]
        if method == "caa":
            return arms_of(model, add=baselines.caa_shift(one.caa, cell["layer"], alpha))
        if method == "iti":
            return arms_of(model, shift=baselines.iti_shift(one.iti, cell["k"], alpha))
        masks = {
            site: {
                "austeer": lambda s: austeer.au_mask(one.scores[s], cell["k"], alpha),
                "sadi": lambda s: baselines.sadi_mask(one.momentum[s], cell["k"], alpha),
                "block": lambda s: baselines.whole_block(one.scores[s], cell["layer"], alpha),
            }[method](site)
            for site in SITES
        }
        return arms_of(model, **{site: jnp.where(cell["site"] == i, masks[site], 0) for i, site in enumerate(SITES)})

    @jax.jit
    def make(reading: Reading) -> dict[str, Arm]:
        def of_seed(one: Reading) -> dict[str, Arm]:
            return {m: jax.vmap(functools.partial(arm, m, one))(settings) for m, settings in cells.items()}

        return jax.vmap(of_seed)(reading)

    found = make(reading)
    return {
        m: Choices(found[m], {"dims": touched(found[m])} | {name: np.asarray(x) for name, x in settings.items()})
        for m, settings in cells.items()
    }


def touched(arms: Arm) -> np.ndarray:
    """How many numbers of the model's activations at a token each of (S, C) arms changes."""
    return sum((np.count_nonzero(np.asarray(x), axis=tuple(range(2, x.ndim))) for x in arms), np.zeros((), int))


def control_arms(
    key: jax.Array, model: Model, reading: Reading, ours: dict[str, np.ndarray], randoms: int
) -> tuple[list[str], Arm]:
    """Other scores, ties, least consistent and random units, (S, C), at AUSteer's site, k and alpha, (S,) each."""

    def of_site(key: jax.Array, one: Reading, site: str, k: jax.Array, alpha: jax.Array) -> jax.Array:
        scores, momentum = one.scores[site], one.momentum[site]
        mean = austeer.au_mask(austeer.au_scores(momentum, "mean"), k, 1.0)
        # The mean momentum has the unit of an activation: it steers as strongly, on average, as the signs do.
        size = jnp.abs(austeer.au_mask(scores, k, alpha)).sum() / jnp.abs(mean).sum()
        steady = austeer.au_mask(scores, k, alpha, tie_break=one.steadiness[site])
        inverse = baselines.matched_mask(scores, baselines.inverse_ranks(scores), k, alpha)
        orders = jax.vmap(lambda key: baselines.random_ranks(key, scores.shape))(jax.random.split(key, randoms))
        drawn = jax.vmap(lambda ranks: baselines.matched_mask(scores, ranks, k, alpha))(orders)
        return jnp.concatenate([jnp.stack([size * mean, steady, inverse]), drawn])

    @jax.jit
    @jax.vmap
    def make(seed: jax.Array, one: Reading, place: jax.Array, k: jax.Array, alpha: jax.Array) -> Arm:
        masks = {
            site: jnp.where(place == i, of_site(stream(jax.random.fold_in(key, seed), site), one, site, k, alpha), 0)
            for i, site in enumerate(SITES)
        }
        return jax.vmap(lambda both: arms_of(model, **both))(masks)

    places = (jnp.asarray(ours[name]) for name in ("site", "k", "alpha"))
    names = ["mean", "steady", "inverse", *(f"random {i}" for i in range(randoms))]
    return names, make(jnp.arange(len(ours["k"])), reading, *places)


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
    return np.asarray(
        sweep(cell, (arms, jnp.asarray(seeds)), subject.params, (items.texts, items.candidates), batch=batch)
    )


def join(*arms: Arm) -> Arm:
    """Arms (S, C, ...) one after another along C, on the host."""
    return jax.tree.map(lambda *x: np.concatenate(x, 1), *arms)


def continuations(subject: Subject, items: Items, row: int, arm: Arm, steps: int = 8) -> tuple[str, str, str]:
    """A prompt of the first seed, and its greedy continuation without and with an arm, as text."""
    length = int(items.texts.lengths[0, row])
    prompt = items.texts.tokens[0, row : row + 1, :length]
    written = []
    for one in (arms_of(subject.model), arm):
        edits = edits_of(subject.model, one, jnp.asarray([length]))
        steps = min(steps, subject.model.module.config.context - length)
        done = generate(subject.model, {"params": subject.params, "edits": edits}, prompt, steps=steps)
        written.append(subject.decode(np.asarray(done.tokens[0, length : length + steps]).tolist()).strip())
    return subject.decode(np.asarray(prompt[0]).tolist()), written[0], written[1]
