"""The decoder, the prompts, the controllers and the runs of the experiment: what is measured, before it is a metric."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mechlab.analysis.metrics import kl_divergence
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.data.worlds import requests as world
from mechlab.methods.steering import guiding_giants as giants
from mechlab.methods.steering.cast import constant_edits
from mechlab.methods.steering.guiding_giants_training import (
    adamw,
    answer_logits,
    end_to_end_loss,
    train_controller,
)
from mechlab.methods.steering.vectors import Texts, last_states
from mechlab.models.generate import generate
from mechlab.models.transformer import llama, transformer
from mechlab.reporting.log import Log
from mechlab.training.batches import generated, shuffled
from mechlab.training.loop import Job, fit, fit_many

ANSWER = len(world.REFUSAL)
PLACES = ("early", "middle", "last")


def layers_of(place: str, layers: int) -> tuple[int, ...]:
    """S of a place."""
    if place == "early":
        return (0, 1) if layers >= 4 else (0,)
    return (layers // 2 - 1, layers // 2) if place == "middle" else tuple(range(max(0, layers - 4), layers))


class Panel(NamedTuple):
    """Prompts that arms are tried on, with what the decoder says without any.

    Attributes:
      tokens, lengths: (N, T) and (N,).
      target, wrapped: (N,) bool.
      helpful: (N, A) the answer that is right for a request that is not refused.
      states: (N, L, D) at the last prompt token.
      answers, logits: (N, A) and (N, A, V) of the decoder alone, greedy.
    """

    tokens: jax.Array
    lengths: jax.Array
    target: np.ndarray
    wrapped: np.ndarray
    helpful: jax.Array
    states: Any = None
    answers: Any = None
    logits: Any = None


class Outcome(NamedTuple):
    """What arms say on a panel, K lanes: answers (K, N, A), and KL (K, N) along the decoder's own, nats a token."""

    answers: np.ndarray
    kl: np.ndarray

    @property
    def refused(self) -> np.ndarray:
        """(K, N) bool."""
        return np.asarray(world.is_refusal(self.answers))


def train_decoder(key: jax.Array, config: Any, log: Log) -> tuple[Model, Any]:
    """The subject, on ``requests.conversations``; the loss is that of the answers alone."""
    model = transformer(
        llama(
            vocabulary=len(world.tokenizer),
            layers=config.layers,
            width=config.width,
            heads=config.width // 16,
            hidden=3 * config.width,
            context=48,
            rope_theta=100.0,
            init_std=None,
        )
    )

    def sample(key: jax.Array) -> dict[str, jax.Array]:
        tokens, lengths = world.conversations(key, config.batch)
        return {"tokens": tokens, "lengths": lengths}

    def loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        tokens, first = batch["tokens"], batch["lengths"][:, None] - 1
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:]
        )
        return jnp.take_along_axis(losses, first + jnp.arange(ANSWER), 1).mean()

    schedule = optax.warmup_cosine_decay_schedule(0.0, config.rate, config.steps // 10, config.steps, config.rate / 10)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    start = model.init(stream(key, "init"))
    trained = fit(
        stream(key, "batches"), loss, start, optimiser, generated(sample), steps=config.steps, log=log, name="decoder"
    )
    return model, trained.params


def draw_panel(key: jax.Array, n: int, pool: Any, wrapped: bool) -> Panel:
    """n plain target prompts, n plain benign ones and, with ``wrapped``, as many of both in wrappers."""
    room = world.width(True)
    kinds = [(kind, around) for around in (False, True)[: 1 + wrapped] for kind in ("target", "benign")]
    drawn = [
        world.requests(stream(key, kind, int(around)), n, kind, pool=pool, wrapped=around, room=room)  # type: ignore[arg-type]
        for kind, around in kinds
    ]
    tokens, lengths, helpful = (
        jnp.concatenate([getattr(one, name) for one in drawn]) for name in ("tokens", "lengths", "answers")
    )
    return Panel(
        tokens,
        lengths,
        np.repeat([kind == "target" for kind, _ in kinds], n),
        np.repeat([around for _, around in kinds], n),
        helpful,
    )


def draw_training(key: jax.Array, config: Any) -> dict[str, world.Requests]:
    """Plain prompts of the train pool for every seed, leaves (S, N, ...): "target", "benign" and "unknown"."""

    def of(kind: Any, n: int) -> world.Requests:
        keys = [stream(key, kind, seed) for seed in range(config.seeds)]
        drawn = [world.requests(one, n, kind, room=world.width(True)) for one in keys]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)

    return {kind: of(kind, config.prompts) for kind in ("target", "benign", "unknown")}


def read_states(model: Model, params: Any, texts: list[tuple[jax.Array, jax.Array]]) -> list[np.ndarray]:
    """(N, L, D) at the last token of each list of prompts; one compiled program for all."""
    joined = Texts(jnp.concatenate([tokens for tokens, _ in texts]), jnp.concatenate([n for _, n in texts]))
    states = np.asarray(last_states(model, {"params": params}, joined, batch=256))
    return np.split(states, np.cumsum([len(n) for _, n in texts])[:-1])


@functools.partial(jax.jit, static_argnames=("model",))
def along(model: Model, params: Any, tokens: jax.Array, lengths: jax.Array, answers: jax.Array) -> jax.Array:
    """Logits (N, A, V) of the decoder alone along answers, from one forward."""
    slots = lengths[:, None] + jnp.arange(ANSWER)
    text = jnp.pad(tokens, ((0, 0), (0, ANSWER))).at[jnp.arange(len(tokens))[:, None], slots].set(answers)
    logits = model.apply({"params": params}, text)
    return jnp.take_along_axis(logits, (slots - 1)[..., None], 1)


@functools.partial(jax.jit, static_argnames=("model",))
def _lanes(model: Model, params: Any, lanes: Any, panel: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    tokens, lengths, base_answers, base_logits = panel

    def one(lane: Any) -> tuple[jax.Array, jax.Array]:
        if isinstance(model, giants.Steered):
            variables = {"params": params} | lane
        else:
            variables = {
                "params": params,
                "edits": constant_edits(model, lane["direction"], lane["strengths"], lengths),
            }
        texts = generate(model, variables, tokens, lengths, steps=ANSWER)
        answers = jnp.take_along_axis(texts.tokens, lengths[:, None] + jnp.arange(ANSWER), 1)
        moved = kl_divergence(base_logits, answer_logits(model, variables, tokens, lengths, base_answers))
        return answers, moved.mean(-1)

    # One lane at a time: a lane is a batch of prompts already, and memory stays that of one.
    return jax.lax.map(one, lanes)


def run_lanes(model: Model, params: Any, lanes: Any, panel: Panel) -> Outcome:
    """Greedy answers and KL of every lane: of ``giants.steering``, or "direction" (D,) and "strengths" (L, N)."""
    found = _lanes(model, params, lanes, (panel.tokens, panel.lengths, panel.answers, panel.logits))
    return Outcome(*map(np.asarray, found))


def with_base(model: Model, params: Any, panel: Panel, states: np.ndarray, lanes: int) -> Panel:
    """The panel with states and the decoder's own greedy answers.

    They are those of steering by nothing, in as many lanes as the arms will have, which is one program less to compile.
    """
    config = model.module.config
    blank = panel._replace(
        answers=jnp.zeros((len(panel.target), ANSWER), jnp.int32),
        logits=jnp.zeros((len(panel.target), ANSWER, config.vocabulary)),
    )
    nothing = {
        "direction": jnp.zeros((lanes, config.width)),
        "strengths": jnp.zeros((lanes, config.layers, len(panel.target))),
    }
    answers = jnp.asarray(run_lanes(model, params, nothing, blank).answers[0])
    logits = along(model, params, panel.tokens, panel.lengths, answers)
    return panel._replace(states=states, answers=answers, logits=logits)


def train_released(
    key: jax.Array, x_target: Any, x_benign: Any, layers: int, config: Any, *, mixed: bool = False
) -> Any:
    """Controllers of every seed on the released loss, from inputs (S, N, I); an empty x_benign trains on targets."""
    alone = not x_benign.shape[1]

    @jax.jit
    @jax.vmap
    def train(key: jax.Array, x_target: jax.Array, x_benign: jax.Array) -> Any:
        start = giants.init_controller(stream(key, "init"), x_target.shape[-1], layers, config.hidden)
        return train_controller(
            stream(key, "order"),
            start,
            x_target,
            x_benign,
            epochs=config.epochs,
            batch=config.controller_batch,
            rate=config.controller_rate,
            allow_target_only=alone,
            mixed=mixed,
        )[0]

    keys = jnp.stack([stream(key, seed) for seed in range(len(x_target))])
    return train(keys, jnp.asarray(x_target), jnp.asarray(x_benign))


def train_end_to_end(
    key: jax.Array,
    steered: giants.Steered,
    params: Any,
    prompts: dict[str, world.Requests],
    directions: jax.Array,
    units: jax.Array,
    reaches: dict[str, jax.Array],
    config: Any,
    log: Log,
    name: str,
) -> dict[str, Any]:
    """Controllers of every reach and seed through the frozen decoder, all in one program; by name, leaves (S, ...)."""
    model, seeds, room = Model(steered.module, steered.example), config.seeds, world.width(False)
    layers, width = config.layers, config.width
    data: dict[str, Any] = {}
    for kind in ("target", "benign"):
        some = jax.tree.map(lambda leaf: leaf[:, : config.end_prompts], prompts[kind])
        answers = some.answers if kind == "benign" else jnp.broadcast_to(world.REFUSAL, some.answers.shape)
        tokens = some.tokens[..., :room]
        flat = (tokens.reshape(-1, room), some.lengths.reshape(-1), answers.reshape(-1, ANSWER))
        base = along(model, params, *flat)
        data[kind] = {
            "tokens": tokens,
            "lengths": some.lengths,
            "answers": answers,
            "base": base.reshape(*answers.shape, -1),
        }

    def build(lane: dict[str, jax.Array]) -> Job:
        def loss(controller: Any, batch: Any) -> jax.Array:
            both = jax.tree.map(lambda *halves: jnp.concatenate(halves), batch["target"], batch["benign"])
            both["target"] = jnp.arange(len(both["lengths"])) < config.controller_batch
            settings: dict[str, Any] = {"direction": lane["direction"], "scale": lane["unit"], "reach": lane["reach"]}
            return end_to_end_loss(controller, steered, params, both, **settings)

        own = jax.tree.map(lambda leaf: leaf[lane["seed"]], data)
        n_inputs = len(steered.input_layers) * width
        start = giants.init_controller(
            stream(jax.random.fold_in(key, lane["seed"]), "init"), n_inputs, layers, config.hidden
        )
        return Job(loss, start, adamw(config.end_rate), shuffled(own, config.controller_batch))

    many = len(reaches)
    lanes = {
        "seed": jnp.tile(jnp.arange(seeds), many),
        "reach": jnp.repeat(jnp.stack(list(reaches.values())), seeds, 0),
        "direction": jnp.tile(directions, (many, 1)),
        "unit": jnp.tile(units, many),
    }
    keys = jax.vmap(lambda lane: stream(jax.random.fold_in(key, lane), "batches"))(jnp.arange(many * seeds))
    trained = fit_many(keys, lanes, build, steps=config.end_steps, log=log, name=name).params
    return {
        label: jax.tree.map(lambda leaf, i=i: leaf[i * seeds : (i + 1) * seeds], trained)
        for i, label in enumerate(reaches)
    }
