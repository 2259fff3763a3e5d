"""AWQ (arXiv 2306.00978) on tales-L: which channels matter, what scaling does, and what a search over scales is worth.

    python -m experiments run awq
    python -m experiments run awq --preset smoke     # tales-S, 3 bits, seconds

Kernels of the blocks are rounded with groups of 32 inputs, embeddings are not. Calibration texts are rows of tales;
seeds draw others. Beside AWQ stand rounding to nearest, a few channels kept unrounded or scaled by one factor, and GPTQ
(static groups, inputs by falling activity, every layer calibrated on the unquantised model). Calibration on one genre
and evaluation on another is the shift. The planted variant has a few channels 8 or 32 times as large, by a change of
parameters that keeps the function; AWQ can undo it exactly, so it is reported apart.

The paper's numbers are perplexities of Llama and OPT and are not quoted. Ours are on docs/papers/awq.md.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.compression import _awq_figures as draw
from experiments.compression._awq_claims import CLAIMS
from experiments.measures import per_seed
from mechlab.core.rng import stream
from mechlab.core.select import as_matrix
from mechlab.data.worlds import tales
from mechlab.methods.compression import awq as method
from mechlab.methods.compression.adadim import adadim
from mechlab.methods.compression.decoders import calibrate, kernel_of, places, quantise_blocks, with_kernels
from mechlab.methods.compression.outliers import plant_outliers
from mechlab.methods.compression.quality import quality
from mechlab.models.subjects import load_tales
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "run"]

LOW = 0.01
"""The paper's share of channels; of 128 inputs that is one, of 384 four."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      size: of the model of tales.
      bits: of the grids; the claims are about 3 and 4.
      group: inputs that share a step.
      seeds: draws of calibration texts.
      texts, length: calibration rows and their tokens.
      held_out: rows to evaluate on, of 256 tokens.
      shares: of inputs kept unrounded, beside one in a hundred.
      factors: s of the sweep; contains 1.
      genres: calibration and evaluation under shift; empty leaves it out.
      planted: factors of planted outliers, each reported apart.
    """

    size: Literal["S", "M", "L"] = "L"
    bits: tuple[int, ...] = (3, 4)
    group: int = 32
    seeds: int = 3
    texts: int = 16
    length: int = 128
    held_out: int = 16
    shares: tuple[float, ...] = (0.03, 0.1)
    factors: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 4.0)
    genres: tuple[str, ...] = ("story", "list")
    planted: tuple[float, ...] = (8.0, 32.0)

    def __post_init__(self) -> None:
        if min(self.seeds, self.texts, self.held_out) < 1 or self.length < 2 or not self.bits:
            raise ValueError("seeds, texts, held_out and bits must be at least 1, length at least 2")
        if 1.0 not in self.factors or any(not 0 < share <= 1 for share in self.shares):
            raise ValueError(f"factors must contain 1 and shares be in (0, 1], got {self.factors} and {self.shares}")
        if len(self.genres) not in (0, 2):
            raise ValueError(f"genres: wanted two, or none to leave the shift out, got {self.genres}")


PRESETS: dict[str, Config] = {
    "smoke": Config(
        size="S",
        bits=(3,),
        seeds=1,
        texts=4,
        length=64,
        held_out=4,
        shares=(),
        factors=(1.0, 2.0),
        genres=(),
        planted=(),
    ),
    "cpu": Config(),
    "accel": Config(seeds=10, texts=64, length=256, held_out=64, factors=(1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0)),
}


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """Every arm at every number of bits and seed, the shift, planted outliers; claims and figures."""
    model, params, _ = load_tales(config.size)
    lab = Lab(model, params, config, rows(stream(key, "held out"), config.held_out, 256))
    metrics: dict[str, Metric] = {}
    found = quality(model, params, params, lab.held_out)
    metrics["perplexity/none"] = Metric(value=float(found.base_perplexity))
    kls: dict[str, list[float]] = {}
    ratios: list[np.ndarray] = []
    seen: dict[str, Any] = {}
    for seed in range(config.seeds):
        own = jax.random.fold_in(stream(key, "calibration"), seed)
        tokens = rows(own, config.texts, config.length)
        acts = calibrate(model, params, tokens)
        for bits in config.bits:
            log.say(f"seed {seed}, {bits} bits")
            for name, changed in arms(lab, own, tokens, acts, bits, seen, ratios).items():
                lab.compare(f"{bits}/{name}", changed, kls, metrics)
        sweep(lab, acts, kls, seen)
    for name, values in kls.items():
        metrics[f"sweep_kl/{name[6:]}" if name.startswith("sweep/") else f"kl/{name}"] = per_seed(
            values, "nats a token"
        )
    worst = np.concatenate([ratio.ravel() for ratio in ratios])
    metrics["search/worst_ratio"] = Metric(value=float(worst.max()), n=worst.size, unit="of the loss at alpha = 0")
    metrics["search/mean_ratio"] = Metric(value=float(worst.mean()), n=worst.size, unit="of the loss at alpha = 0")
    if config.genres:
        shift(lab, stream(key, "shift"), metrics, log)
    for factor in config.planted:
        planted(lab, stream(key, "planted"), factor, metrics, log)
    return Result(metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=draw.all_figures(metrics, seen))


@dataclasses.dataclass(frozen=True)
class Lab:
    """The subject and the texts that everything is measured on."""

    model: Any
    params: Any
    config: Config
    held_out: jax.Array

    def compare(self, name: str, changed: Any, kls: dict[str, list[float]], metrics: dict[str, Metric]) -> None:
        """KL of one more seed, and the perplexity of the last one."""
        found = quality(self.model, self.params, changed, self.held_out)
        kls.setdefault(name, []).append(float(found.kl.mean()))
        metrics[f"perplexity/{name}"] = Metric(value=float(found.perplexity))

    def each(self, change: Any) -> Any:
        """The parameters with ``change(place, kernel (*in, *out), layer)`` made of every kernel, layer by layer."""
        numbers = jnp.arange(self.model.module.config.layers)
        return with_kernels(
            self.params,
            {
                place.name: jax.vmap(functools.partial(change, place))(kernel_of(self.params, place), numbers)
                for place in places(self.model.module.config)
            },
        )


def rows(key: jax.Array, n: int, length: int, genre: str | None = None) -> jax.Array:
    """Texts of tales, filled to the end."""
    return jnp.asarray(tales.sample_batch(key, n, length=length, genres=None if genre is None else (genre,))["tokens"])


def magnitudes(acts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """(L, I): mean |x| of every input of every site."""
    return {site: jnp.abs(x).mean((1, 2)).reshape(len(x), -1) for site, x in acts.items()}


def arms(
    lab: Lab,
    key: jax.Array,
    tokens: jax.Array,
    acts: dict[str, jax.Array],
    bits: int,
    seen: dict[str, Any],
    ratios: list[np.ndarray],
) -> dict[str, Any]:
    """Parameters by arm."""
    config, grid = lab.config, {"bits": bits, "group": lab.config.group}
    model, params = lab.model, lab.params
    sizes = magnitudes(acts)
    found: dict[str, Any] = {"rtn": quantise_blocks(model.module.config, params, **grid)}

    def kept(by: str, share: float) -> Any:
        def change(place: Any, kernel: jax.Array, layer: jax.Array) -> jax.Array:
            matrix = as_matrix(kernel, inputs=place.inputs)
            own = jax.random.fold_in(stream(key, by, place.name), layer)
            mask = method.salient(matrix, sizes[place.site][layer], share, by, own)
            return method.mixed_salient(kernel, mask, inputs=place.inputs, **grid)

        return lab.each(change)

    for share in (LOW, *config.shares):
        label = "low" if share == LOW else f"{share:g}"
        found |= {f"kept_{by}_{label}": kept(by, share) for by in ("act", "weight", "random")}
    found["awq_scale"], _ = method.awq(model, params, tokens, clip=False, **grid)
    found["awq"], report = method.awq(model, params, tokens, **grid)
    for site, search in report.searches.items():
        losses = np.asarray(search.losses)
        ratios.append(losses.min(1) / losses[:, 0])
        seen.setdefault("losses", {}).setdefault(bits, {})[site] = losses / losses[:, :1]
    found["gptq"], _ = adadim(model, params, tokens, method="gptq", axis="oc", **grid)
    return found


def sweep(lab: Lab, acts: dict[str, jax.Array], kls: dict[str, list[float]], seen: dict[str, Any]) -> None:
    """One channel in a hundred scaled by s, at 3 bits: KL, and what becomes of the steps."""
    config, sizes = lab.config, magnitudes(acts)
    for factor in config.factors:

        def change(place: Any, kernel: jax.Array, layer: jax.Array, s: float = factor) -> Any:
            mask = method.salient(as_matrix(kernel, inputs=place.inputs), sizes[place.site][layer], LOW, "act")
            return method.scaled_salient(kernel, mask, s, bits=3, group=config.group, inputs=place.inputs)

        numbers = jnp.arange(lab.model.module.config.layers)
        made = {
            place.name: jax.vmap(functools.partial(change, place))(kernel_of(lab.params, place), numbers)
            for place in places(lab.model.module.config)
        }
        changed = with_kernels(lab.params, {name: kernel for name, (kernel, _) in made.items()})
        found = quality(lab.model, lab.params, changed, lab.held_out)
        kls.setdefault(f"sweep/{factor:g}", []).append(float(found.kl.mean()))
        steps = np.concatenate([np.asarray(ratio).ravel() for _, ratio in made.values()])
        seen.setdefault("steps", {})[factor] = (
            float((steps != 1).mean()),
            float(steps.mean()),
            float(steps.mean() / factor),
        )


def shift(lab: Lab, key: jax.Array, metrics: dict[str, Metric], log: Log) -> None:
    """KL on one genre when calibrated on it and on the other, at 3 bits, in the mean over both ways round."""
    config, grid = lab.config, {"bits": 3, "group": lab.config.group}
    held = {genre: rows(stream(key, "held out", genre), config.held_out, 256, genre) for genre in config.genres}
    rises: dict[str, list[float]] = {"awq": [], "gptq": []}
    for seed in range(config.seeds):
        log.say(f"calibration on one genre, seed {seed}")
        kl: dict[tuple[str, str, str], float] = {}
        for genre in config.genres:
            tokens = rows(jax.random.fold_in(stream(key, genre), seed), config.texts, config.length, genre)
            changed = {
                "awq": method.awq(lab.model, lab.params, tokens, **grid)[0],
                "gptq": adadim(lab.model, lab.params, tokens, method="gptq", axis="oc", **grid)[0],
            }
            for name, params in changed.items():
                for other, texts in held.items():
                    kl[name, genre, other] = float(quality(lab.model, lab.params, params, texts).kl.mean())
        first, second = config.genres
        for name, values in rises.items():
            ways = ((second, first), (first, second))
            values.append(float(np.mean([kl[name, wrong, own] / kl[name, own, own] - 1 for wrong, own in ways])))
    for name, values in rises.items():
        metrics[f"shift_rise/3/{name}"] = per_seed(values, "of the KL calibrated on its own genre")


def planted(lab: Lab, key: jax.Array, factor: float, metrics: dict[str, Metric], log: Log) -> None:
    """RTN, AWQ and GPTQ at 3 bits on a model of the same function with a few large channels."""
    config, grid = lab.config, {"bits": 3, "group": lab.config.group}
    log.say(f"planted outliers, factor {factor:g}")
    subject = plant_outliers(stream(key, "channels"), lab.model.module.config, lab.params, factor=factor)
    tokens = rows(stream(key, "texts"), config.texts, config.length)
    changed = {
        "rtn": quantise_blocks(lab.model.module.config, subject, **grid),
        "awq": method.awq(lab.model, subject, tokens, **grid)[0],
        "gptq": adadim(lab.model, subject, tokens, method="gptq", axis="oc", **grid)[0],
    }
    for name, params in changed.items():
        found = quality(lab.model, lab.params, params, lab.held_out)
        metrics[f"planted/{factor:g}/{name}"] = Metric(value=float(found.kl.mean()), unit="nats a token")
