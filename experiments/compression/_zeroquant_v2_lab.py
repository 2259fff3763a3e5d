"""The ZeroQuant-V2 experiment's workshop: subjects and their texts, quantised kernels, and what they cost.

Kernels are kept as plain arrays by name, (L, in, out) whatever their form was, so that a subject has one compiled
evaluation: a variant is other numbers, and the scheme of its activations is a number too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core import linalg
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.core.select import as_matrix
from mechlab.data.sources import MissingData
from mechlab.data.text import load_text, rows_of
from mechlab.data.worlds import tales
from mechlab.methods.compression.activations import Scheme, round_inputs, static_grids
from mechlab.methods.compression.decoders import (
    Place,
    calibrate,
    dequantise_blocks,
    kernel_of,
    places,
    quantise_blocks,
    with_kernels,
)
from mechlab.methods.compression.gptq import hessian
from mechlab.methods.compression.low_rank import lorc
from mechlab.methods.compression.outliers import plant_outliers
from mechlab.methods.compression.quality import Quality, qualities
from mechlab.methods.compression.reconstruction import global_blocks, local_blocks
from mechlab.methods.compression.rounding import nearest
from mechlab.methods.compression.zeroquant_v2 import compensate_blocks, gptq_blocks
from mechlab.models import hub
from mechlab.models.generate import generate
from mechlab.models.llama2c import BEGIN
from mechlab.models.subjects import load_stories260k, load_tales
from mechlab.models.transformer_config import TransformerConfig
from mechlab.reporting.log import Log

if TYPE_CHECKING:
    from experiments.compression.zeroquant_v2 import Config

Kernels = dict[str, jax.Array]
OFF, SYM, ASYM, TENSOR, STATIC, GROUP = range(6)
"""Numbers of the schemes of activations; the last three are for studied subjects only."""


class Grid(NamedTuple):
    """The grid of weights: bits, inputs that share a step (None: a whole row of W), and whether it is around 0."""

    bits: int
    group: int | None = None
    symmetric: bool = False

    @property
    def name(self) -> str:
        """Such as "row" or "g32"."""
        return "row" if self.group is None else f"g{self.group}"

    @property
    def options(self) -> dict[str, Any]:
        """For ``rounding.quantise``, with 0 on asymmetric grids."""
        return self._asdict() | {"include_zero": True}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A decoder and its texts.

    Attributes:
      name: such as "tales-L".
      model, params: the decoder.
      calibration: (S, C, T), another set for every seed.
      evaluation: (S, E, T), likewise.
      schemes: of activations.
      static: for every seed the grids of the static scheme, or nothing where no scheme is static.
    """

    name: str
    model: Model
    params: Any
    calibration: jax.Array
    evaluation: jax.Array
    schemes: tuple[Scheme, ...] = (Scheme(), Scheme(8, True), Scheme(8))
    static: tuple[Any, ...] = ()

    @property
    def config(self) -> TransformerConfig:
        """Of the decoder."""
        config: TransformerConfig = self.model.module.config
        return config

    @property
    def seeds(self) -> int:
        """Number of sets of texts."""
        return len(self.evaluation)


def make_subjects(key: jax.Array, config: Config, log: Log) -> dict[str, Subject]:
    """Every decoder that the configuration names; one that is not on this machine is left out, with a word."""
    rows = config.seeds * (config.calibration + config.evaluation)
    write = jax.jit(lambda key: tales.sample_batch(key, rows, length=config.length)["tokens"])
    stories = functools.cache(lambda: write(stream(key, "tales")))
    subjects = {}
    for name in dict.fromkeys((*config.ladder, *config.planted, *config.studied)):
        try:
            model, params, tokens = _load(stream(key, name), name, rows, config, stories)
        except MissingData as missing:
            log.say(f"{name}: left out. {missing}")
            continue
        both = jnp.asarray(tokens).reshape(config.seeds, -1, config.length)
        subjects[name] = Subject(name, model, params, both[:, : config.calibration], both[:, config.calibration :])
    return subjects


def _load(key: jax.Array, name: str, rows: int, config: Config, stories: Any) -> tuple[Model, Any, Any]:
    """The decoder, and texts (rows, T) of its own kind."""
    if name.startswith("tales-"):
        size: Any = name.removeprefix("tales-")
        model, params, _ = load_tales(size)
        return model, params, stories()
    if name == "stories260K":
        # Its training texts are not at hand: it writes its own, stories one after another as it was trained.
        model, params, _ = load_stories260k(download=False)
        begun = jnp.full((rows, 1), BEGIN, jnp.int32)
        return model, params, generate(model, {"params": params}, begun, key=key, steps=config.length - 1).tokens
    model, params, tokenizer = hub.load(name)
    train, test = (rows_of(tokenizer.encode(text), config.length) for text in load_text("wikitext"))
    sets = (
        train[: config.seeds * config.calibration].reshape(config.seeds, -1, config.length),
        test[: config.seeds * config.evaluation].reshape(config.seeds, -1, config.length),
    )
    return model, params, np.concatenate(sets, axis=1)


def planted(key: jax.Array, subject: Subject, factor: float, share: float) -> Subject:
    """The same function with outlier channels in the normed inputs of attention and MLP."""
    params = plant_outliers(stream(key, subject.name), subject.config, subject.params, factor=factor, share=share)
    return dataclasses.replace(subject, name=f"{subject.name} x{factor:g}", params=params)


def calibrated(subject: Subject, group: int) -> tuple[Subject, dict[str, jax.Array]]:
    """The subject with all schemes of activations, and what its blocks read on calibration texts, (S, L, C, T, ...)."""
    every = [calibrate(subject.model, subject.params, texts, also=("resid_pre",)) for texts in subject.calibration]
    static = tuple(static_grids({site: x for site, x in acts.items() if site != "resid_pre"}, bits=8) for acts in every)
    more = (Scheme(8, mode="tensor"), Scheme(8, mode="static"), Scheme(8, mode="group", group=group))
    acts = jax.tree.map(lambda *seeds: jnp.stack(seeds), *every)
    return dataclasses.replace(subject, schemes=subject.schemes + more, static=static), acts


def measure(subject: Subject, variants: Mapping[str, tuple[Sequence[Kernels | None], int]]) -> dict[str, Quality]:
    """What variants cost on each seed's texts.

    Args:
      subject: the decoder.
      variants: name to the kernels of every seed (None: as they are), and the number of the scheme of activations.

    Returns:
      By name, leaves (S, E).
    """
    found = []
    for seed in range(subject.seeds):
        static = subject.static[seed] if subject.static else None
        named = {}
        for name, (kernels, scheme) in variants.items():
            edits = round_inputs(subject.model, subject.schemes, scheme, static=static)
            own = kernels[seed]
            named[name] = (subject.params if own is None else with_kernels(subject.params, own), edits)
        texts = subject.evaluation[seed]
        found.append(qualities(subject.model, subject.params, named, texts, batch=len(texts)))
    return {name: jax.tree.map(lambda *seeds: np.stack(seeds), *[one[name] for one in found]) for name in variants}


@functools.partial(jax.jit, static_argnames="config")
def kernels_of(config: TransformerConfig, params: Any) -> Kernels:
    """All kernels of the blocks as plain arrays, by name."""
    whole = dequantise_blocks(params)
    return {place.name: kernel_of(whole, place) for place in places(config)}


@functools.partial(jax.jit, static_argnames=("config", "grids"))
def round_all(config: TransformerConfig, params: Any, grids: tuple[Grid, ...]) -> tuple[Kernels, ...]:
    """RTN on several grids, in one program."""
    return tuple(_rounded(config, params, grid) for grid in grids)


def _rounded(config: TransformerConfig, params: Any, grid: Grid) -> Kernels:
    def one(place: Place) -> jax.Array:
        return jax.vmap(lambda kernel: nearest(kernel, inputs=place.inputs, **grid.options))(kernel_of(params, place))

    return {place.name: one(place) for place in places(config)}


def run_gptq(subject: Subject, grid: Grid) -> list[Kernels]:
    """GPTQ on every seed's calibration texts."""
    options: dict[str, Any] = {"bits": grid.bits, "group": grid.group, "symmetric": grid.symmetric}
    return [
        kernels_of(subject.config, gptq_blocks(subject.model, subject.params, texts, **options))
        for texts in subject.calibration
    ]


def reconstruct(
    key: jax.Array, subject: Subject, acts: dict[str, jax.Array], grid: Grid, config: Config, method: str
) -> tuple[list[list[Kernels]], np.ndarray]:
    """ZQ-Local or ZQ-Global on every seed's calibration texts, for inputs as they are and rounded: one program.

    Args:
      key: of the order of texts.
      subject: the decoder.
      acts: from ``calibrated``.
      grid: of the weights.
      config: steps, rates and texts per step.
      method: "local", "global", or "in turn" for ZQ-Global on what quantised blocks give.

    Returns:
      Kernels by scheme (off, asymmetric) and seed; and of how many kernels or blocks no training and each rate was
      best, shares (1 + R,).
    """
    schemes = (subject.schemes[OFF], subject.schemes[ASYM])
    keys = jax.vmap(lambda seed: stream(key, seed))(jnp.arange(subject.seeds))
    settings = (grid, schemes, config.steps, config.rates, config.batch, method)
    kernels, losses = _reconstruct(subject.config, keys, subject.params, acts, settings)
    best = np.concatenate([np.asarray(leaf.argmin(-1)).ravel() for leaf in jax.tree.leaves(losses)])
    by_lane = [[jax.tree.map(lambda x, i=i, s=s: x[s, i], kernels) for s in range(subject.seeds)] for i in range(2)]
    return by_lane, np.bincount(best, minlength=1 + len(config.rates)) / best.size


@functools.partial(jax.jit, static_argnames=("config", "settings"))
def _reconstruct(config: TransformerConfig, keys: jax.Array, params: Any, acts: Any, settings: Any) -> Any:
    grid, schemes, steps, rates, batch, method = settings
    options = {"steps": steps, "rates": rates, "schemes": schemes} | grid.options

    def one(key: jax.Array, acts: Any, which: jax.Array) -> Any:
        if method == "local":
            found = local_blocks(config, params, acts, which=which, **options)
        else:
            turn = method == "in turn"
            streams = acts["resid_pre"]
            found = global_blocks(key, config, params, streams, in_turn=turn, batch=batch, which=which, **options)
        return _rounded(config, with_kernels(params, found.kernels), grid), found.loss

    both = jax.vmap(one, (None, None, 0))
    return jax.vmap(both, (0, 0, None))(keys, acts, jnp.arange(len(schemes)))


class Factors(NamedTuple):
    """LoRC of every kernel, to the largest rank that is asked for.

    Attributes:
      a, b: by name, (L, I, R) and (L, R, O).
      values: by name, all singular values of the error, (L, min(I, O)).
    """

    a: Kernels
    b: Kernels
    values: Kernels


@functools.partial(jax.jit, static_argnames=("config", "rank"))
def factors(config: TransformerConfig, kernels: Kernels, quantised: Kernels, rank: int) -> Factors:
    """The factors of the error; the first m of them are those of rank m."""
    a, b, values = {}, {}, {}
    for place in places(config):
        error = _matrices(place.inputs, kernels[place.name] - quantised[place.name])
        top = min(rank, *error.shape[1:])
        a[place.name], b[place.name] = jax.vmap(lambda e, top=top: lorc(e, top))(error)
        values[place.name] = linalg.singular_values(error)
    return Factors(a, b, values)


@functools.partial(jax.jit, static_argnames="config")
def repaired(
    config: TransformerConfig, kernels: Kernels, quantised: Kernels, found: Factors, rank: jax.Array
) -> tuple[Kernels, dict[str, jax.Array]]:
    """Quantised kernels with LoRC of a rank added up, and by kernel what is left of the error: squares, per layer.

    The last are (L, 3): |E|^2, |E - A B|^2, and what the singular values behind the rank predict for it.
    """
    out, left = {}, {}
    for place in places(config):
        name = place.name
        keep = jnp.arange(found.a[name].shape[-1]) < rank
        added = (found.a[name] * keep) @ found.b[name]
        out[name] = quantised[name] + added.reshape(quantised[name].shape)
        error = _matrices(place.inputs, kernels[name] - quantised[name])
        behind = jnp.arange(found.values[name].shape[-1]) >= rank
        predicted = jnp.square(found.values[name] * behind).sum(-1)
        left[name] = jnp.stack([_square(error), _square(error - added), predicted], -1)
    return out, left


def special_lorc(subject: Subject, acts: dict[str, jax.Array], grid: Grid, rank: int) -> dict[str, list[Kernels]]:
    """RTN with LoRC in two other ways, by seed: factors of 8 bits, and factors weighted by the inputs' Hessians."""
    config, params = subject.config, subject.params
    eight = _eight_bit_factors(config, params, grid, rank)
    quantised = quantise_blocks(config, params, **grid.options)
    weighted = [
        compensate_blocks(config, params, quantised, rank, hessians=_hessians(acts, seed))
        for seed in range(subject.seeds)
    ]
    return {"8 bits": [eight] * subject.seeds, "weighted": [kernels_of(config, found) for found in weighted]}


@functools.partial(jax.jit, static_argnames=("config", "grid", "rank"))
def _eight_bit_factors(config: TransformerConfig, params: Any, grid: Grid, rank: int) -> Kernels:
    quantised = quantise_blocks(config, params, **grid.options)
    return kernels_of(config, compensate_blocks(config, params, quantised, rank, factor_bits=8))


@jax.jit
def _hessians(acts: dict[str, jax.Array], seed: jax.Array) -> dict[str, jax.Array]:
    x = {site: leaf[seed] for site, leaf in acts.items() if site != "resid_pre"}
    return {site: jax.vmap(lambda z: hessian(z.reshape(*z.shape[:2], -1)))(leaf) for site, leaf in x.items()}


def _matrices(inputs: int, kernel: jax.Array) -> jax.Array:
    return jax.vmap(lambda one: as_matrix(one, inputs=inputs))(kernel)


def _square(matrices: jax.Array) -> jax.Array:
    return jnp.square(matrices).sum((-2, -1))
