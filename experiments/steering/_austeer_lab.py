"""What is measured: subjects, readings, arms as data, and their margins on items.

An arm is four arrays, one for each place where any of the methods acts; zeros do nothing, to the bit. So every arm of
every method, site, k and alpha is a cell of one program, and so is every block of items.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.steering._austeer_planted import planted, spelled
from experiments.steering._tales_tasks import (
    STORIES,
    Draw,
    Items,
    cells_at_once,
    load_stories,
    stacked,
    story_task,
    tales_task,
)
from mechlab.core.edits import chain
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.core.sweeps import grid
from mechlab.methods.steering import austeer, baselines
from mechlab.methods.steering.vectors import Texts, read_states
from mechlab.models.generate import generate
from mechlab.models.subjects import load_tales, tales_card
from mechlab.reporting.log import Log

TALES = ("recall", "mood", "agree", "ioi")
TUNED = ("austeer", "sadi", "block", "caa", "iti")
SITES = ("attn", "ffn")
BLOCK = 40
"""Items that are asked together."""


class Subject(NamedTuple):
    """A model, how it spells, and the tasks that it is asked."""

    model: Model
    params: Any
    decode: Callable[..., str]
    tasks: dict[str, Draw]


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
        found["planted"] = planted_subject(stream(key, "planted"))
    if kinds := [task for task in config.tasks if task in TALES]:
        model, params, tokenizer = load_tales("L")
        usual = tales_card("L")["usual"]
        tasks = {kind: tales_task(kind, usual[kind]) for kind in kinds}
        found["tales-L"] = Subject(model, params, tokenizer.decode, tasks)
    names = [task for task in config.tasks if task in STORIES]
    if names and (stories := load_stories(log)):
        model, params, vocabulary = stories
        found["stories260K"] = Subject(
            model, params, vocabulary.decode, {name: story_task(name, vocabulary) for name in names}
        )
    return found


def planted_subject(key: jax.Array) -> Subject:
    """The random model with a behaviour put in by hand."""
    model, params, draw = planted(key)
    return Subject(model, params, spelled, {"planted": draw})


def read(key: jax.Array, subject: Subject, draw: Draw, seeds: int, n: int) -> Reading:
    """Scores, directions and heads of every seed, each from its own N training pairs."""
    items = stacked([draw(stream(key, "train", seed), n, "train") for seed in range(seeds)])
    flat = Texts(*(x.reshape(-1, *x.shape[2:]) for x in items.ended))
    config = subject.model.module.config
    found = read_states(
        subject.model, {"params": subject.params}, flat, tuple(austeer.SITES.values()), batch=min(100, 2 * n)
    )
    states = {name: found[site].reshape(seeds, 2, n, config.layers, -1) for name, site in austeer.SITES.items()}
    return _digest(states, heads=config.heads)


@functools.partial(jax.jit, static_argnames="heads")
def _digest(states: dict[str, jax.Array], heads: int) -> Reading:
    """What the states (S, 2, N, L, ...) at each site give, every seed for itself."""
    n = states["attn"].shape[2]
    # Pairs are independent draws, so the last fifth can rank the heads; both answers of a pair stay on one side.
    last = np.arange(2 * n) % n >= n - n // 5

    def of_seed(states: dict[str, jax.Array]) -> Reading:
        momentum = {site: austeer.au_momentum(*states[site]) for site in SITES}
        z = states["attn"].reshape(2 * n, states["attn"].shape[2], heads, -1)
        return Reading(
            momentum,
            {site: austeer.au_scores(m) for site, m in momentum.items()},
            {site: austeer.au_steadiness(m) for site, m in momentum.items()},
            baselines.caa_vector(*states["layer"]),
            baselines.iti_fit(z, np.repeat([1, 0], n), np.flatnonzero(~last), np.flatnonzero(last)),
        )

    return jax.vmap(of_seed)(states)


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
    cells = _settings(model, ks, alphas)
    found = _tuned(model, reading, cells)
    return {
        m: Choices(found[m], {"dims": touched(found[m])} | {name: np.asarray(x) for name, x in settings.items()})
        for m, settings in cells.items()
    }


def _settings(model: Model, ks: Sequence[int], alphas: Sequence[float]) -> dict[str, dict[str, jax.Array]]:
    """The settings of every method, (C,) each."""
    config = model.module.config
    budget = len(SITES) * len(ks) * len(alphas)
    kept = [k for k in (1, 2, 4, 8, 16) if k <= config.layers * config.heads]
    layers, sites = jnp.arange(config.layers), jnp.arange(2)

    def strengths(low: float, high: float, n: int) -> jax.Array:
        return jnp.asarray(np.geomspace(low, high, max(2, n)), jnp.float32)

    units = grid(site=sites, k=jnp.asarray(ks), alpha=jnp.asarray(alphas, jnp.float32))
    return {
        "austeer": units,
        "sadi": units,
        "block": grid(
            site=sites,
            layer=layers,
            alpha=strengths(min(alphas), max(alphas), budget // (2 * config.layers)),
        ),
        "caa": grid(layer=layers, alpha=strengths(0.25, 8, budget // config.layers)),
        "iti": grid(k=jnp.asarray(kept), alpha=strengths(0.5, 16, budget // len(kept))),
    }


@functools.partial(jax.jit, static_argnames="model")
def _tuned(model: Model, reading: Reading, cells: dict[str, dict[str, jax.Array]]) -> dict[str, Arm]:
    """The arms of every method, (S, C, ...)."""

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

    def of_seed(one: Reading) -> dict[str, Arm]:
        return {m: jax.vmap(functools.partial(arm, m, one))(settings) for m, settings in cells.items()}

    return jax.vmap(of_seed)(reading)


def touched(arms: Arm) -> np.ndarray:
    """How many numbers of the model's activations at a token each of (S, C) arms changes."""
    return sum((np.count_nonzero(np.asarray(x), axis=tuple(range(2, x.ndim))) for x in arms), np.zeros((), int))


def control_arms(
    key: jax.Array, model: Model, reading: Reading, ours: dict[str, np.ndarray], randoms: int
) -> tuple[list[str], Arm]:
    """Other scores, ties, least consistent and random units, (S, C), at AUSteer's site, k and alpha, (S,) each."""
    seeds = jnp.arange(len(ours["k"]))
    places = (jnp.asarray(ours[name]) for name in ("site", "k", "alpha"))
    names = ["mean", "steady", "inverse", *(f"random {i}" for i in range(randoms))]
    return names, _controls(model, randoms, key, seeds, reading, *places)


@functools.partial(jax.jit, static_argnames=("model", "randoms"))
def _controls(
    model: Model,
    randoms: int,
    key: jax.Array,
    seeds: jax.Array,
    reading: Reading,
    places: jax.Array,
    k: jax.Array,
    alpha: jax.Array,
) -> Arm:
    """The arms of ``control_arms``; what follows the key has a leading axis S."""

    def of_seed(seed: jax.Array, one: Reading, place: jax.Array, k: jax.Array, alpha: jax.Array) -> Arm:
        # Sites are as wide as each other in our models, so the chosen one's numbers can be picked first.
        first, second = SITES
        scores, momentum, steadiness = (
            jnp.where(place == 0, of[first], of[second]) for of in (one.scores, one.momentum, one.steadiness)
        )
        mean = austeer.au_mask(austeer.au_scores(momentum, "mean"), k, 1.0)
        # The mean momentum has the unit of an activation: it steers as strongly, on average, as the signs do.
        size = jnp.abs(austeer.au_mask(scores, k, alpha)).sum() / jnp.abs(mean).sum()
        steady = austeer.au_mask(scores, k, alpha, tie_break=steadiness)
        inverse = baselines.matched_mask(scores, baselines.inverse_ranks(scores), k, alpha)
        keys = jax.random.split(jax.random.fold_in(key, seed), randoms)
        orders = jax.vmap(lambda key: baselines.random_ranks(key, scores.shape))(keys)
        drawn = jax.vmap(lambda ranks: baselines.matched_mask(scores, ranks, k, alpha))(orders)
        masks = jnp.concatenate([jnp.stack([size * mean, steady, inverse]), drawn])
        both = {site: jnp.where(place == i, masks, 0) for i, site in enumerate(SITES)}
        return jax.vmap(lambda of_arm: arms_of(model, **of_arm))(both)

    return jax.vmap(of_seed)(seeds, reading, places, k, alpha)


def scores_of(subject: Subject, items: Items, arms: Arm, seeds: np.ndarray) -> np.ndarray:
    """Logits of both candidates under each arm, on the items of its seed.

    A cell is an arm with a block of items, and chunks have one size, so that dev and test items, and all tasks whose
    texts are padded to one width, share one program.

    Args:
      subject: model and parameters.
      items: (S, N, ...) stacked seeds.
      arms: C arms.
      seeds: (C,) whose items each arm answers.

    Returns:
      (C, N, 2).
    """
    model, params = subject.model, subject.params
    _, total, width = items.texts.tokens.shape
    blocks = -(-total // BLOCK)
    # What is missing in the last block repeats the last item.
    rows = np.minimum(np.arange(blocks * BLOCK), total - 1).reshape(blocks, BLOCK)
    whose, which = np.repeat(seeds, blocks), np.tile(np.arange(blocks), len(seeds))
    size = cells_at_once(model, BLOCK, width)
    tokens, lengths, answers = (np.asarray(x) for x in (*items.texts, items.answers[..., :2]))
    arms = jax.tree.map(np.asarray, arms)
    found = []
    for start in range(0, len(whose), size):
        cells = np.minimum(np.arange(start, start + size), len(whose) - 1)
        of_cells = whose[cells, None], rows[which[cells]]
        steered = jax.tree.map(lambda x, cells=cells: x[cells // blocks], arms)
        found.append(_logits(model, params, steered, Texts(tokens[of_cells], lengths[of_cells]), answers[of_cells]))
    logits = np.concatenate(found)[: len(whose)]
    return logits.reshape(len(seeds), blocks * BLOCK, 2)[:, :total]


@functools.partial(jax.jit, static_argnames="model")
def _logits(model: Model, params: Any, arms: Arm, texts: Texts, candidates: jax.Array) -> jax.Array:
    """(C, N, 2) of C arms, each on its own N prompts."""

    def cell(arm: Arm, texts: Texts, candidates: jax.Array) -> jax.Array:
        return austeer.steered_logits(model, params, edits_of(model, arm, texts.lengths), texts, candidates)

    return jax.vmap(cell)(arms, texts, candidates)


def join(*arms: Arm) -> Arm:
    """Arms (S, C, ...) one after another along C, on the host."""
    return jax.tree.map(lambda *x: np.concatenate(x, 1), *arms)


def continuations(subject: Subject, items: Items, row: int, arm: Arm, steps: int = 8) -> tuple[str, str, str]:
    """A prompt of the first seed, and its greedy continuation without and with an arm, as text."""
    length, context = int(items.texts.lengths[0, row]), subject.model.module.config.context
    steps = min(steps, context - length)
    prompt = items.texts.tokens[0, row : row + 1, : context - steps]
    written = []
    for one in (arms_of(subject.model), arm):
        edits = edits_of(subject.model, one, jnp.asarray([length]))
        done = generate(
            subject.model, {"params": subject.params, "edits": edits}, prompt, jnp.asarray([length]), steps=steps
        )
        written.append(subject.decode(np.asarray(done.tokens[0, length : length + steps]).tolist()).strip())
    return subject.decode(np.asarray(prompt[0, :length]).tolist()), written[0], written[1]
