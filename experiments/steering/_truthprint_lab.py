"""The captioners, their captions and states, and the decoders of the TruthPrInt experiment."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mechlab.analysis.mentions import label_mentions
from mechlab.core.rng import stream
from mechlab.data.images import load_digits, load_images
from mechlab.data.worlds import shelves as world
from mechlab.methods.steering import rollback
from mechlab.methods.steering import truthprint as tp
from mechlab.methods.steering.decoding import IDLE, Step, beam_search, contrasted, sampled
from mechlab.models.captioner import Captioner, captioner, fill, look
from mechlab.models.transformer import llama
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


class Lab(NamedTuple):
    """Trained captioners (leaves lead with axis 3: ``MODELS``), and the bank of objects of both domains.

    ``train`` and ``test`` banks hold domain 0's images first; ``rows[part][domain]`` are each domain's own.
    """

    config: Config
    model: Captioner
    params: Any
    images: dict[str, jax.Array]
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

    @property
    def mentions(self) -> tuple[np.ndarray, np.ndarray]:
        """First mentions (n, 2) as (picture, position), and whether each is hallucinated (n,)."""
        mask, labels = map(np.asarray, label_mentions(self.tokens, self.truth, world.CLASS_OF))
        where = np.argwhere(mask)
        return where, labels[where[:, 0], where[:, 1]]


def prepare(key: jax.Array, config: Config, log: Log) -> Lab:
    """Load both domains and train: decoders on text alone, encoders on cells, then three captioners."""
    first = load_images(config.data)
    log.say(f"domain 0: {first.note}; domain 1: scikit-learn digits with other nouns")
    parts = [world.banks(first), world.banks(load_digits())]
    domains = {part: (parts[0][i], parts[1][i]) for i, part in enumerate(("train", "test"))}
    images = {part: jnp.concatenate([bank.images for bank in pair]) for part, pair in domains.items()}
    sizes = {"layers": config.text_layers, "width": config.width, "heads": config.width // 16}
    model = captioner(
        ViTConfig(
            image=(world.SIDE, world.SIDE),
            patch=world.CELL,
            channels=1,
            layers=config.image_layers,
            width=config.width,
            heads=config.width // 16,
            hidden=3 * config.width,
            init_std=None,
        ),
        llama(vocabulary=V, hidden=3 * config.width, context=64, rope_theta=100.0, init_std=None, **sizes),
    )
    lab = Lab(config, model, None, images, domains)
    data = [
        both(stream(key, "train", name), lab, config.train, "train", mix)
        for name, mix in zip(MODELS, MIXES, strict=True)
    ]
    data = jax.tree.map(lambda *x: jnp.stack(x), *data)
    keys = jax.vmap(lambda i: stream(key, "lane", i))(jnp.arange(3))
    starts = jax.vmap(lambda k: model.init(stream(k, "init")))(keys)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(config.rate))

    def ahead(tokens: jax.Array) -> jax.Array:
        return jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=BOS)[:, :-1]

    def caption_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
        return (losses * (tokens > 0)).sum() / (tokens > 0).sum()

    def train(lanes: Any, loss: Callable[..., Any], steps: int, name: str) -> Any:
        def build(lane: Any) -> Job:
            return Job(loss, lane["params"], optimiser, shuffled(lane["data"], config.batch))

        count = len(jax.tree.leaves(lanes)[0])
        streams = jax.vmap(lambda i: stream(key, name, i))(jnp.arange(count))
        return fit_many(streams, lanes, build, steps=steps, log=log, name=name).params

    # Text first: captioners a and b go on from one decoder, the third from its own.
    def text_loss(params: Any, batch: Any) -> jax.Array:
        tokens = batch["captions"]
        positions = model.prefix + jnp.arange(T)
        return caption_loss(model.text.apply({"params": params}, ahead(tokens), positions), tokens)

    pair = jnp.array([0, 2])
    text = train(
        {"params": jax.tree.map(lambda x: x[pair], starts["text"]), "data": jax.tree.map(lambda x: x[pair], data)},
        text_loss,
        config.text_steps,
        "decoders",
    )
    text = jax.tree.map(lambda x: x[jnp.array([0, 0, 1])], text)

    # Then encoders learn what stands in each cell, as those of LVLMs come pretrained.
    labels = jnp.concatenate([labels_of(bank) for bank in domains["train"]])

    def eye_loss(params: Any, batch: Any) -> jax.Array:
        seen = look(model, params["vision"], pixels(lab, batch, "train"))[:, 1:]
        wanted = jnp.where(batch["items"] >= 0, labels[batch["items"]], world.CLASSES)
        return optax.softmax_cross_entropy_with_integer_labels(seen @ params["head"], wanted).mean()

    heads = jax.vmap(lambda k: jax.random.normal(stream(k, "head"), (config.width, world.CLASSES + 1)) * 0.05)(keys)
    eyes = train(
        {"params": {"vision": starts["vision"], "head": heads}, "data": data}, eye_loss, config.eye_steps, "encoders"
    )

    def loss(params: Any, batch: Any) -> jax.Array:
        prefix = look(model, params["vision"], pixels(lab, batch, "train"))
        tokens = batch["captions"]
        return caption_loss(model.prefixed.apply({"params": params["text"]}, prefix, ahead(tokens)), tokens)

    params = train({"params": {"vision": eyes["vision"], "text": text}, "data": data}, loss, config.steps, "captioners")
    return lab._replace(params=params)


def labels_of(bank: world.Bank) -> jax.Array:
    """The class of every image of a bank (0 for the few that no row uses)."""
    classes = jnp.broadcast_to(jnp.arange(world.CLASSES)[:, None], bank.rows.shape)
    return jnp.zeros(len(bank.images), jnp.int32).at[bank.rows].set(classes)


def pictures(key: jax.Array, lab: Lab, n: int, part: str, domain: int, mix: Any = MIXES[0]) -> dict[str, np.ndarray]:
    """Pictures of one domain, items as rows of ``lab.images[part]``."""
    drawn = world.shelves(key, lab.domains[part][domain], n, domain=domain, lowest=lab.config.lowest, theme_mix=mix)
    offset = domain * len(lab.domains[part][0].images)
    return drawn._replace(items=np.where(drawn.items >= 0, drawn.items + offset, -1))._asdict()


def both(key: jax.Array, lab: Lab, n: int, part: str, mix: Any) -> dict[str, np.ndarray]:
    """Half of the pictures from each domain."""
    halves = [pictures(stream(key, domain), lab, n // 2, part, domain, mix) for domain in (0, 1)]
    return {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}


def pixels(lab: Lab, batch: Any, part: str) -> jax.Array:
    """The pictures of a batch."""
    bank = world.Bank(lab.images[part], jnp.zeros((0, 0), jnp.int32))
    return world.render(bank, batch["items"], batch["contrast"], batch["seed"])


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


def decoder(lab: Lab, part: str, kind: str) -> Callable[..., rollback.Decoded]:
    """``decode(params, batch, detector, tau, key)``, compiled: one decoder for all thresholds, detectors and models.

    Kinds: greedy, vcd, nucleus, beam; guarded by G: truthprint (min_conf), immediate, sentence_start; guarded by other
    scores: confidence (1 - c), random.
    """
    model, config = lab.model, lab.config

    def score(detector: tp.Detector, key: jax.Array) -> Callable[[rollback.Moment], jax.Array]:
        def g(moment: rollback.Moment) -> jax.Array:
            return tp.detector_prob(detector, moment.hidden[:, lab.layer])

        def confidence(moment: rollback.Moment) -> jax.Array:
            return 1 - moment.confidence

        def random(moment: rollback.Moment) -> jax.Array:
            rows = jnp.arange(len(moment.token))
            draw = jax.vmap(lambda r, n: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, r), n)))
            return draw(rows, moment.forwards)

        return {"confidence": confidence, "random": random}.get(kind, g)

    @jax.jit
    def decode(params: Any, batch: Any, detector: tp.Detector, tau: jax.Array, key: jax.Array) -> rollback.Decoded:
        seen = pixels(lab, batch, part)
        step = text_step(model, params)
        if kind == "beam":
            rows = jnp.repeat(jnp.arange(len(seen)), config.beams)
            cache = jax.tree.map(lambda x: x[:, rows], image_cache(model, params, seen))
            found = beam_search(
                step,
                cache,
                lambda cache, rows: jax.tree.map(lambda x: x[:, rows], cache),
                batch=len(seen),
                width=config.beams,
                start=BOS,
                eos=EOS,
                max_len=T,
            )
            none = jnp.zeros(len(seen), jnp.int32)
            forwards = jnp.full(len(seen), config.beams * T)
            confidence = jnp.zeros(found.tokens.shape)
            trace = jnp.full((len(seen), 0, 3), -1)
            return rollback.Decoded(found.tokens, found.lengths, confidence, trace, none, forwards, none == 0)
        cache = image_cache(model, params, seen)
        if kind == "vcd":
            noise = jax.random.normal(stream(key, "spoilt"), seen.shape) * config.vcd_noise
            cache, step = (cache, image_cache(model, params, seen + noise)), contrasted(step)
        if kind == "nucleus":
            step = sampled(step, stream(key, "sample"))
        return rollback.guarded_decode(
            step,
            cache,
            score(detector, stream(key, "detector")),
            batch=len(seen),
            vocabulary=V,
            objects=world.OBJECT_IDS,
            start=BOS,
            sentence_end=END,
            eos=EOS,
            tau=tau,
            max_len=T,
            n_max=0 if kind in ("greedy", "vcd", "nucleus") else config.n_max,
            rollback=kind if kind in ("immediate", "sentence_start") else "min_conf",
        )

    return decode


def captions(lab: Lab, params: Any, data: dict[str, np.ndarray], greedy: Any, states: Any) -> Captions:
    """Greedy captions in chunks, then the states that predicted each token, from one forward over the whole text."""
    found: list[Any] = []
    nobody, key = no_detector(lab), jax.random.key(0)
    for at in range(0, len(data["items"]), lab.config.chunk):
        batch = {name: jnp.asarray(data[name][at : at + lab.config.chunk]) for name in ("items", "contrast", "seed")}
        out = greedy(params, batch, nobody, 2.0, key)
        found.append(jax.tree.map(np.asarray, (out.tokens, out.confidence, states(params, batch, out.tokens))))
    return Captions(*(np.concatenate(part) for part in zip(*found, strict=True)), data["truth"])


def state_reader(lab: Lab, part: str) -> Callable[..., jax.Array]:
    """(B, T, L, D): the stream at the position that predicts each token."""

    @jax.jit
    def states(params: Any, batch: Any, tokens: jax.Array) -> jax.Array:
        prefix = look(lab.model, params["vision"], pixels(lab, batch, part))
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
