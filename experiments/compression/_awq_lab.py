"""The arms of the AWQ experiment and what is measured of them: KL from the unquantised decoder on held-out texts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.compression._awq_subjects import Subject
from experiments.measures import per_seed
from mechlab.core.errors import UserError
from mechlab.core.rng import stream
from mechlab.core.select import as_matrix
from mechlab.methods.compression import awq as method
from mechlab.methods.compression.adadim import adadim
from mechlab.methods.compression.decoders import Place, calibrate, kernel_of, places, quantise_blocks, with_kernels
from mechlab.methods.compression.outliers import plant_outliers
from mechlab.methods.compression.quality import quality
from mechlab.models.fold import scale_inputs
from mechlab.reporting.results import Metric

if TYPE_CHECKING:
    from experiments.compression.awq import Config

LOW = 0.01
"""The paper's share of channels; of 128 inputs that is one, of 384 four."""


@dataclasses.dataclass(frozen=True)
class Lab:
    """A subject, its held-out texts, and what has been measured so far.

    Attributes:
      values: one number a seed, by metric.
      losses: of the scale search over that of alpha = 0, (L, 20) a seed, by bits and site.
    """

    subject: Subject
    config: Config
    held_out: jax.Array
    values: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    losses: dict[int, dict[str, list[np.ndarray]]] = dataclasses.field(default_factory=dict)

    @property
    def blocks(self) -> Any:
        """The decoder's configuration."""
        return self.subject.model.module.config

    def grid(self, bits: int) -> dict[str, Any]:
        """What every arm is rounded to."""
        return {"bits": bits, "group": self.config.group}

    def note(self, name: str, value: Any) -> None:
        """One more seed of a metric."""
        self.values.setdefault(name, []).append(float(value))

    def kl(self, changed: Any, texts: jax.Array) -> float:
        """Mean KL on some texts, nats a token."""
        return float(quality(self.subject.model, self.subject.params, changed, texts).kl.mean())

    def compare(self, name: str, changed: Any) -> None:
        """KL and perplexity of one more seed."""
        found = quality(self.subject.model, self.subject.params, changed, self.held_out)
        self.note(f"kl/{name}", found.kl.mean())
        self.note(f"perplexity/{name}", found.perplexity)

    def metrics(self) -> dict[str, Metric]:
        """All that was noted, with every seed."""
        return {name: per_seed(values, _unit(name)) for name, values in self.values.items()}


def make_lab(key: jax.Array, subject: Subject, config: Config) -> Lab:
    """The held-out texts drawn, the lengths checked.

    Raises:
      UserError: texts longer than the decoder's context, or groups that do not divide its kernels.
    """
    context = subject.model.module.config.context
    longest = max(config.length, config.held_length)
    if longest > context:
        raise UserError(f"model {config.model} reads {context} tokens at most, length or held_length is {longest}")
    for place in places(subject.model.module.config):
        inputs = int(np.prod(kernel_of(subject.params, place).shape[1 : 1 + place.inputs]))
        if config.group is not None and inputs % config.group:
            raise UserError(f"group {config.group} does not divide the {inputs} inputs of {place.name}")
    return Lab(subject, config, subject.draw(key, config.held_out, config.held_length, held_out=True))


def arms(lab: Lab, key: jax.Array, tokens: jax.Array, acts: dict[str, jax.Array], bits: int) -> dict[str, Any]:
    """Parameters by arm, for one draw of calibration texts."""
    grid, subject = lab.grid(bits), lab.subject
    found = {"rtn": quantise_blocks(lab.blocks, subject.params, **grid)}
    sizes = magnitudes(acts)
    for share in (LOW, *lab.config.shares):
        for by in ("act", "weight", "random"):
            found[f"kept_{by}_{'low' if share == LOW else f'{share:g}'}"] = kept(lab, key, sizes, by, share, bits)
    found["awq"], report = method.awq(subject.model, subject.params, tokens, **grid)
    folded = subject.params
    for site, search in report.searches.items():
        folded = scale_inputs(lab.blocks, folded, site, search.s)
        lab.losses.setdefault(bits, {}).setdefault(site, []).append(over_rounding(search))
    found["awq_scale"] = quantise_blocks(lab.blocks, folded, **grid)
    found["gptq"] = gptq(lab, subject.params, tokens, bits)
    return found


def over_rounding(search: method.Search) -> np.ndarray:
    """(L, 20): the loss of every alpha over that of alpha = 0."""
    losses = np.asarray(search.losses)
    return losses / losses[:, :1]


def search_metrics(losses: Mapping[int, Mapping[str, Sequence[np.ndarray]]]) -> dict[str, Metric]:
    """The worst and the mean of the smallest ratios of losses, over bits, sites, seeds and layers."""
    ratios = [ratio for sites in losses.values() for of_seeds in sites.values() for ratio in of_seeds]
    least = np.concatenate([ratio.min(1) for ratio in ratios])
    return {
        f"search/{name}_ratio": Metric(value=float(value), n=least.size, unit="of the loss at alpha = 0")
        for name, value in (("worst", least.max()), ("mean", least.mean()))
    }


def gptq(lab: Lab, params: Any, tokens: jax.Array, bits: int) -> Any:
    """GPTQ with static groups and inputs by falling activity, all layers calibrated on the unquantised decoder."""
    return adadim(lab.subject.model, params, tokens, method="gptq", axis="oc", **lab.grid(bits))[0]


def magnitudes(acts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """(L, I): mean |x| of every input of every site."""
    return {site: jnp.abs(x).mean((1, 2)).reshape(len(x), -1) for site, x in acts.items()}


def kept(lab: Lab, key: jax.Array, sizes: dict[str, jax.Array], by: str, share: float, bits: int) -> Any:
    """A share of the inputs of every kernel left unrounded (Table 1)."""

    def change(place: Place, kernel: jax.Array, layer: jax.Array) -> jax.Array:
        matrix = as_matrix(kernel, inputs=place.inputs)
        own = jax.random.fold_in(stream(key, by, place.name), layer)
        mask = method.salient(matrix, sizes[place.site][layer], share, by, own)
        return method.mixed_salient(kernel, mask, inputs=place.inputs, **lab.grid(bits))

    return with_kernels(lab.subject.params, _of_every_kernel(lab, change))


def sweep(lab: Lab, acts: dict[str, jax.Array]) -> None:
    """One input in a hundred scaled by s, at 3 bits: KL, and what becomes of the steps of its groups (Table 2)."""
    sizes = magnitudes(acts)
    for factor in lab.config.factors:

        def change(place: Place, kernel: jax.Array, layer: jax.Array, s: float = factor) -> Any:
            mask = method.salient(as_matrix(kernel, inputs=place.inputs), sizes[place.site][layer], LOW, "act")
            changed, steps = method.scaled_salient(kernel, mask, s, inputs=place.inputs, **lab.grid(3))
            holds = mask.reshape(len(steps), -1).any(1)
            return changed, steps, jnp.broadcast_to(holds[:, None], steps.shape)

        made = _of_every_kernel(lab, change)
        changed = with_kernels(lab.subject.params, {name: kernel for name, (kernel, _, _) in made.items()})
        lab.note(f"sweep_kl/{factor:g}", lab.kl(changed, lab.held_out))
        steps = np.concatenate([np.asarray(ratio)[np.asarray(holds)] for _, ratio, holds in made.values()])
        lab.note(f"steps_changed/{factor:g}", 100 * (steps != 1).mean())
        lab.note(f"steps_ratio/{factor:g}", steps.mean())
        lab.note(f"steps_error/{factor:g}", steps.mean() / factor)


def _of_every_kernel(lab: Lab, change: Any) -> dict[str, Any]:
    """``change(place, kernel of one layer, layer)`` of every kernel, over layers."""
    numbers = jnp.arange(lab.blocks.layers)
    return {
        place.name: jax.vmap(functools.partial(change, place))(kernel_of(lab.subject.params, place), numbers)
        for place in places(lab.blocks)
    }


def fewer_texts(lab: Lab, tokens: jax.Array) -> None:
    """AWQ and GPTQ at 3 bits, calibrated on the first n of the texts.

    The n are repeated to the number of all: no mean changes, and nothing is compiled anew.
    """
    for n in lab.config.sizes:
        rows = tokens[jnp.arange(len(tokens)) % n]
        awq, _ = method.awq(lab.subject.model, lab.subject.params, rows, **lab.grid(3))
        lab.note(f"texts_kl/awq/{n}", lab.kl(awq, lab.held_out))
        lab.note(f"texts_kl/gptq/{n}", lab.kl(gptq(lab, lab.subject.params, rows, 3), lab.held_out))


def shift(lab: Lab, key: jax.Array, seed: int) -> None:
    """KL at 3 bits on one domain, calibrated on it and on the other, in the mean over both ways round."""
    subject, config = lab.subject, lab.config
    held = {
        domain: subject.draw(stream(key, domain), config.held_out, config.held_length, domain, held_out=True)
        for domain in subject.domains
    }
    kl: dict[tuple[str, str, str], float] = {}
    for domain in subject.domains:
        own = jax.random.fold_in(stream(key, domain), seed)
        tokens = subject.draw(own, config.texts, config.length, domain)
        changed = {
            "awq": method.awq(subject.model, subject.params, tokens, **lab.grid(3))[0],
            "gptq": gptq(lab, subject.params, tokens, 3),
        }
        for name, params in changed.items():
            kl |= {(name, domain, other): lab.kl(params, texts) for other, texts in held.items()}
    first, second = subject.domains
    for name in ("awq", "gptq"):
        same = [kl[name, domain, domain] for domain in subject.domains]
        other = [kl[name, second, first], kl[name, first, second]]
        lab.note(f"shift_kl/{name}/same", np.mean(same))
        lab.note(f"shift_kl/{name}/other", np.mean(other))
        lab.note(f"shift_rise/{name}", 100 * np.mean([b / a - 1 for a, b in zip(same, other, strict=True)]))


def planted(lab: Lab, key: jax.Array, factor: float) -> None:
    """RTN, AWQ and GPTQ at 3 bits on a decoder of the same function with a few large channels."""
    subject, config = lab.subject, lab.config
    params = plant_outliers(stream(key, "channels"), lab.blocks, subject.params, factor=factor)
    tokens = subject.draw(stream(key, "texts"), config.texts, config.length)
    changed = {
        "rtn": quantise_blocks(lab.blocks, params, **lab.grid(3)),
        "awq": method.awq(subject.model, params, tokens, **lab.grid(3))[0],
        "gptq": gptq(lab, params, tokens, 3),
    }
    for name, tree in changed.items():
        lab.note(f"planted_kl/{factor:g}/{name}", lab.kl(tree, lab.held_out))


def calibration(lab: Lab, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One draw of texts, and what every kernel reads on them."""
    tokens = lab.subject.draw(stream(key, "texts"), lab.config.texts, lab.config.length)
    return tokens, calibrate(lab.subject.model, lab.subject.params, tokens)


def _unit(name: str) -> str:
    kind = name.split("/")[0]
    percent = {"shift_rise": "% of the KL calibrated on its own domain", "steps_changed": "% of groups"}
    return "nats a token" if kind == "kl" or kind.endswith("_kl") else percent.get(kind, "")
