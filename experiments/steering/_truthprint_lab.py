"""The captioners, their captions and states, and the decoders of the TruthPrInt experiment."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mechlab.core.rng import stream
from mechlab.data.images import load_digits, load_images
from mechlab.data.worlds import shelves as world
from mechlab.methods.steering import rollback
from mechlab.methods.steering import truthprint as tp
from mechlab.methods.steering.decoding import IDLE, Step, beam_search, contrasted, layered, sampled
from mechlab.models.captioner import Captioner, captioner, fill, look
from mechlab.models.transformer import llama, unembed
from mechlab.models.vit import ViTConfig
from mechlab.reporting.log import Log
from mechlab.training.batches import shuffled
from mechlab.training.loop import Job, fit_many

if TYPE_CHECKING:
    from experiments.steering.truthprint import Config

BOS = world.tokenizer.ids["<bos>"]
EOS = world.tokenizer.ids[world.EOS]
END = world.tokenizer.ids[world.END]
V, T = len(world.tokenizer), world.MAX_LEN
MODELS = ("a", "b", "unrelated")
MIXES = ((0.25,) * 4, (0.4, 0.3, 0.2, 0.1), (0.25,) * 4)

UNGUARDED = ("nucleus", "vcd", "dola")
"""Decoders that choose tokens in another way and ask no detector; greedy and beam search apart."""

RULES = {
    "immediate": ("immediate", "objects"),
    "sentence_start": ("sentence_start", "objects"),
    "random_token": ("random", "objects"),
    "every_token": ("min_conf", "all"),
}
"""Where ablations go back to, and about which tokens they ask; all others: ("min_conf", "objects")."""

SCORES = {"confidence": 1, "random": 2}
"""Detectors that are not G: one minus the word's confidence, and a random number."""

NEVER = 2.0
"""A threshold that no score reaches."""

Decode = Callable[..., rollback.Decoded]


class Lab(NamedTuple):
    """Trained captioners and what pictures are made of.

    Attributes:
      config: of the run.
      model: the captioner.
      params: its parameters; leaves lead with axis 3: ``MODELS``.
      domains: the objects of pictures of each part, by domain: "train", and "detect", "dev" and "test", which share
        none with it or with each other.
    """

    config: Config
    model: Captioner
    params: Any
    domains: dict[str, tuple[world.Bank, world.Bank]]

    @property
    def layer(self) -> int:
        """The block that is read."""
        return int(0.6 * self.config.text_layers)

    def of(self, name: str) -> Any:
        """Parameters of one captioner."""
        return jax.tree.map(lambda leaf: leaf[MODELS.index(name)], self.params)


class Captions(NamedTuple):
    """Greedy captions of N pictures and what preceded every token: states (N, T, L, D) and confidences (N, T)."""

    tokens: np.ndarray
    confidence: np.ndarray
    states: np.ndarray
    truth: np.ndarray


def prepare(key: jax.Array, config: Config, log: Log) -> Lab:
    """Load both domains and train three captioners."""
    first = load_images(config.data)
    log.say(f"domain 0: {first.note}; domain 1: scikit-learn digits with other nouns")
    banks = [world.banks(first), world.banks(load_digits())]
    (train_0, unseen_0), (train_1, unseen_1) = banks
    domains = {"train": (train_0, train_1)}
    for part, rows in (("detect", slice(0, None, 2)), ("dev", slice(1, None, 4)), ("test", slice(3, None, 4))):
        domains[part] = (
            unseen_0._replace(rows=unseen_0.rows[:, rows]),
            unseen_1._replace(rows=unseen_1.rows[:, rows]),
        )
    sizes: dict[str, Any] = {"width": config.width, "heads": config.width // 16, "hidden": 3 * config.width}
    sizes["init_std"] = None
    side = (world.SIDE, world.SIDE)
    model = captioner(
        ViTConfig(image=side, patch=world.CELL, channels=1, layers=config.image_layers, **sizes),
        llama(vocabulary=V, layers=config.text_layers, context=64, rope_theta=100.0, **sizes),
    )
    lab = Lab(config, model, None, domains)
    return lab._replace(params=train_captioners(stream(key, "training"), lab, log))


def train_captioners(key: jax.Array, lab: Lab, log: Log) -> Any:
    """Decoders on text alone, encoders on the cells of pictures, then captioners of both: every model is a lane."""
    config, model = lab.config, lab.model
    data: Any = [
        both(stream(key, "pictures", name), lab, config.train, mix) for name, mix in zip(MODELS, MIXES, strict=True)
    ]
    data = jax.tree.map(lambda *x: jnp.stack(x), *data)
    starts = jax.vmap(lambda i: model.init(stream(key, "init", i)))(jnp.arange(len(MODELS)))

    def train(params: Any, data: Any, loss: Callable[..., Any], steps: int, name: str) -> Any:
        if not steps:
            return params
        rate = optax.warmup_cosine_decay_schedule(0.0, config.rate, steps // 10, steps)
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))

        def build(lane: Any) -> Job:
            return Job(loss, lane["params"], optimiser, shuffled(lane["data"], config.batch))

        keys = jax.vmap(lambda i: stream(key, name, i))(jnp.arange(len(data["cells"])))
        return fit_many(keys, {"params": params, "data": data}, build, steps=steps, log=log, name=name).params

    def ahead(tokens: jax.Array) -> jax.Array:
        return jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=BOS)[:, :-1]

    def caption_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
        return (losses * (tokens > 0)).sum() / (tokens > 0).sum()

    # Captioners a and b go on from one decoder, the third from its own.
    def text_loss(params: Any, batch: Any) -> jax.Array:
        tokens = batch["captions"]
        positions = model.prefix + jnp.arange(T)
        return caption_loss(model.text.apply({"params": params}, ahead(tokens), positions), tokens)

    pair, family = jnp.array([0, 2]), jnp.array([0, 0, 1])
    own, texts = (jax.tree.map(lambda leaf: leaf[pair], tree) for tree in (starts["text"], data))
    text = train(own, texts, text_loss, config.text_steps, "decoders")
    text = jax.tree.map(lambda leaf: leaf[family], text)

    # Encoders learn which noun stands in each cell, as those of LVLMs come pretrained.
    def eye_loss(params: Any, batch: Any) -> jax.Array:
        seen = look(model, params["vision"], batch["pixels"])[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(seen @ params["head"], batch["cells"]).mean()

    head = jnp.zeros((len(MODELS), config.width, 2 * world.CLASSES + 1))
    eyes = train({"vision": starts["vision"], "head": head}, data, eye_loss, config.eye_steps, "encoders")

    def loss(params: Any, batch: Any) -> jax.Array:
        prefix = look(model, params["vision"], batch["pixels"])
        tokens = batch["captions"]
        return caption_loss(model.prefixed.apply({"params": params["text"]}, prefix, ahead(tokens)), tokens)

    return train({"vision": eyes["vision"], "text": text}, data, loss, config.steps, "captioners")


def pictures(key: jax.Array, lab: Lab, n: int, part: str, domain: int, mix: Any = MIXES[0]) -> dict[str, np.ndarray]:
    """Pictures of one domain; ``cells`` (N, 9) are its nouns, of the 20 of both domains, or 20 for empty ones."""
    config, bank = lab.config, lab.domains[part][domain]
    drawn = world.shelves(key, bank, n, domain=domain, lowest=config.lowest, noise=config.noise, theme_mix=mix)
    nouns = np.where(drawn.cells >= 0, drawn.cells + domain * world.CLASSES, 2 * world.CLASSES)
    return drawn._replace(cells=nouns)._asdict()


def both(key: jax.Array, lab: Lab, n: int, mix: Any) -> dict[str, np.ndarray]:
    """Training pictures, half of them from each domain."""
    halves = [pictures(stream(key, domain), lab, n // 2, "train", domain, mix) for domain in (0, 1)]
    return {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}


def text_step(model: Captioner, params: Any) -> Step:
    """Reads one token behind the image; ``hidden`` is the stream after every block, (B, L, D)."""

    def step(cache: Any, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any, Any]:
        place = jnp.where(positions == IDLE, -1, model.prefix + 1 + positions)[:, None]
        inputs = (tokens[:, None], place, None, cache)
        (logits, cache), acts = model.text.capture({"params": params["text"]}, *inputs, sites=("resid_post",))
        return logits[:, 0], acts["resid_post"][:, :, 0].swapaxes(0, 1), cache

    return step


def image_cache(model: Captioner, params: Any, seen: jax.Array) -> Any:
    """The cache with the image and the start token in it."""
    prefix = look(model, params["vision"], seen)
    start = jnp.full((len(seen), 1), BOS)
    return fill(model, params["text"], prefix, start, model.prefix + 1 + T)


def decoders(lab: Lab) -> Decode:
    """``decode(name, params, pixels, detector, tau, key)``: one program for all thresholds, detectors and captioners.

    Names: "greedy", "beam", those of ``UNGUARDED``, "truthprint", and its ablations in ``RULES`` and ``SCORES``.
    Greedy decoding is the program of TruthPrInt with the threshold ``NEVER``.
    """
    model, config = lab.model, lab.config

    def read(params: Any, seen: jax.Array, kind: str, key: jax.Array) -> tuple[Step, Any]:
        """A step, and its carry with the pictures read."""
        step, cache = text_step(model, params), image_cache(model, params, seen)
        if kind == "nucleus":
            return sampled(step, key), cache
        if kind == "vcd":
            spoilt = seen + config.vcd_noise * jax.random.normal(key, seen.shape)
            return contrasted(step), (cache, image_cache(model, params, spoilt))
        if kind == "dola":
            variables = {"params": params["text"]}
            return layered(step, lambda hidden: unembed(model.text, variables, hidden[:, :-1])), cache
        return step, cache

    @partial(jax.jit, static_argnames="kind")
    def guarded(
        params: Any, seen: jax.Array, detector: tp.Detector, mix: jax.Array, tau: Any, key: jax.Array, kind: str
    ) -> rollback.Decoded:
        step, carry = read(params, seen, kind, stream(key, "step"))
        draws = stream(key, "draws")

        def draw(row: jax.Array, n: jax.Array) -> jax.Array:
            return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(draws, row), n))

        def score(moment: rollback.Moment) -> jax.Array:
            g = tp.detector_prob(detector, moment.hidden[:, lab.layer])
            chance = jax.vmap(draw)(jnp.arange(len(g)), moment.forwards)
            return mix @ jnp.stack([g, 1 - moment.confidence, chance])

        back, check = RULES.get(kind, ("min_conf", "objects"))
        return rollback.guarded_decode(
            step,
            carry,
            score,
            batch=len(seen),
            vocabulary=V,
            objects=world.OBJECT_IDS,
            start=BOS,
            sentence_end=END,
            eos=EOS,
            tau=tau,
            max_len=T,
            n_max=config.n_max,
            rollback=back,  # type: ignore[arg-type]
            check=check,  # type: ignore[arg-type]
            key=stream(key, "back"),
        )

    @jax.jit
    def beams(params: Any, seen: jax.Array) -> rollback.Decoded:
        step, cache = read(params, seen, "beam", jax.random.key(0))
        size, width = len(seen), config.beams

        def reorder(cache: Any, rows: jax.Array) -> Any:
            return jax.tree.map(lambda x: x[:, rows], cache)

        found = beam_search(
            step,
            reorder(cache, jnp.repeat(jnp.arange(size), width)),
            reorder,
            batch=size,
            width=width,
            start=BOS,
            eos=EOS,
            max_len=T,
        )
        none = jnp.zeros(size, jnp.int32)
        nothing = jnp.zeros((size, T)), jnp.full((size, 0, 3), -1), none
        return rollback.Decoded(found.tokens, found.lengths, *nothing, none + width * T, none == 0)

    def decode(
        name: str, params: Any, seen: Any, detector: tp.Detector, tau: float, key: jax.Array
    ) -> rollback.Decoded:
        if name == "beam":
            return beams(params, seen)
        kind = name if name in UNGUARDED or name in RULES else "min_conf"
        mix = jax.nn.one_hot(SCORES.get(name, 0), 3)
        return guarded(params, seen, detector, mix, tau, key, kind=kind)

    return decode


def captions(lab: Lab, params: Any, data: dict[str, np.ndarray], decode: Decode, states: Any) -> Captions:
    """Greedy captions in chunks, then the states that predicted each token, from one forward over the whole text."""
    found: list[Any] = []
    nobody, key = no_detector(lab), jax.random.key(0)
    for at in range(0, len(data["pixels"]), lab.config.chunk):
        seen = data["pixels"][at : at + lab.config.chunk]
        out = decode("greedy", params, seen, nobody, NEVER, key)
        found.append(jax.tree.map(np.asarray, (out.tokens, out.confidence, states(params, seen, out.tokens))))
    tokens, confidence, before = (np.concatenate(part) for part in zip(*found, strict=True))
    return Captions(tokens, confidence, before, data["truth"])


def state_reader(lab: Lab) -> Callable[..., jax.Array]:
    """``states(params, pixels, tokens)``, (B, T, L, D): the stream at the position that predicts each token."""

    @jax.jit
    def states(params: Any, seen: jax.Array, tokens: jax.Array) -> jax.Array:
        prefix = look(lab.model, params["vision"], seen)
        read = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=BOS)[:, :-1]
        _, acts = lab.model.prefixed.capture({"params": params["text"]}, prefix, read, sites=("resid_post",))
        return jnp.moveaxis(acts["resid_post"][:, :, lab.model.prefix :], 0, 2)

    return states


def no_detector(lab: Lab) -> tp.Detector:
    """What decoders without a detector are given."""
    width = lab.config.width
    widths = (width, *lab.config.hidden, 1)
    layers = tuple((jnp.zeros((i, o)), jnp.zeros(o)) for i, o in itertools.pairwise(widths))
    return tp.Detector(jnp.zeros(width), jnp.ones(width), layers, jnp.zeros(()))
