"""A decoder quantised to 4 bits by AWQ and written to a folder, opened again, and made to write with packed kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments.compression._awq_claims import CLAIMS
from experiments.compression._awq_figures import search_figures
from experiments.compression._awq_lab import make_lab, over_rounding, search_metrics
from experiments.compression._awq_subjects import load_subject
from mechlab.core.errors import UserError
from mechlab.core.rng import stream
from mechlab.methods.compression.awq import awq
from mechlab.methods.compression.decoders import (
    dequantise_blocks,
    kernel_of,
    pack_blocks,
    places,
    quantise_blocks,
)
from mechlab.methods.compression.quality import quality
from mechlab.models.generate import generate
from mechlab.models.hub import QUANTISED, Tokenizer
from mechlab.models.quantised_io import load_quantised, save_quantised
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

if TYPE_CHECKING:
    from experiments.compression.awq import Config

PROMPTS, PROMPT, WRITTEN = 4, 8, 16
"""Prompts taken from held-out texts, their tokens, and how many are written after each."""


def ship(key: jax.Array, config: Config, log: Log) -> Result:
    """Quantise ``config.model``, write it to ``config.out``, and say what it costs.

    Raises:
      UserError: the folder is there, or the model cannot be quantised.
    """
    folder = Path(config.out).expanduser()
    if folder.exists():
        raise UserError(f"out={folder} exists; remove it or choose another folder")
    subject = load_subject(config.model)
    lab = make_lab(stream(key, "held out"), subject, config)
    model, params = subject.model, subject.params
    log.say(f"calibrating on {config.texts} x {config.length} tokens of {subject.texts}")
    tokens = subject.draw(stream(key, "calibration"), config.texts, config.length)
    changed, report = awq(model, params, tokens, bits=4, group=config.group)
    packed = pack_blocks(changed)
    metrics = _memory(model, params, packed)
    rounded = quality(model, params, quantise_blocks(model.module.config, params, **lab.grid(4)), lab.held_out)
    metrics["kl/rounding"] = Metric(value=float(rounded.kl.mean()), unit="nats a token")

    tokenizer = subject.tokenizer if isinstance(subject.tokenizer, Tokenizer) else None
    grid = "one group of all inputs" if config.group is None else f"groups of {config.group}"
    card = {"method": f"AWQ (arXiv 2306.00978), 4 bits, {grid}", "model": config.model, "calibration": subject.texts}
    save_quantised(folder, model, packed, tokenizer=tokenizer, card=card)
    metrics["memory/file"] = Metric(value=(folder / QUANTISED).stat().st_size / 2**20, unit="MiB")
    log.say(f"written to {folder}")

    opened, packed, _, _ = load_quantised(folder)
    found = quality(model, params, packed, lab.held_out)
    metrics["kl/awq"] = Metric(value=float(found.kl.mean()), unit="nats a token")
    metrics["perplexity/none"] = Metric(value=float(found.base_perplexity))
    metrics["perplexity/awq"] = Metric(value=float(found.perplexity))
    texts = lab.held_out[:PROMPTS, :PROMPT]
    steps = min(WRITTEN, model.module.config.context - texts.shape[1])

    def write(tree: Any) -> np.ndarray:
        return np.asarray(generate(opened, {"params": tree}, texts, steps=steps).tokens[:, texts.shape[1] :])

    written = {"packed": write(packed), "made_whole": write(dequantise_blocks(packed)), "unquantised": write(params)}
    for other in ("made_whole", "unquantised"):
        same = 100 * float((written["packed"] == written[other]).mean())
        metrics[f"written/same_as_{other}"] = Metric(value=same, n=written["packed"].size, unit="% of tokens")
    if subject.tokenizer is not None:
        for prompt, text in zip(np.asarray(texts), written["packed"], strict=True):
            log.say(f"{subject.tokenizer.decode(prompt.tolist())} ... {subject.tokenizer.decode(text.tolist())}")

    losses = {4: {site: [over_rounding(search)] for site, search in report.searches.items()}}
    metrics |= search_metrics(losses)
    return Result(metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=search_figures(losses))


def _memory(model: Any, params: Any, packed: Any) -> dict[str, Metric]:
    """Bytes of all parameters and of the blocks' kernels, before and after."""

    def size(tree: Any) -> int:
        return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(tree))

    kernels = places(model.module.config)
    before, after = ([kernel_of(tree, place) for place in kernels] for tree in (params, packed))
    weights = sum(int(kernel.size) for kernel in before)
    sizes = {"before": params, "after": packed, "kernels_before": before, "kernels_after": after}
    found = {f"memory/{name}": Metric(value=size(tree) / 2**20, unit="MiB") for name, tree in sizes.items()}
    return found | {"memory/bits_per_weight": Metric(value=8 * size(after) / weights, n=weights, unit="bits")}
