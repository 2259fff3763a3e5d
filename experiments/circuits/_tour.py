"""The steps that find a circuit, on any model and pairs of prompts: every function one step, one figure of the guides.

A clean prompt and its corrupted twin differ in what decides the answer; the metric is logit[right] - logit[wrong] of
the clean prompt at the last token, in nats. "Share" is of the full effect: clean minus corrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from mechlab.analysis.linalg import pca
from mechlab.analysis.probes import held_out_accuracy
from mechlab.core.edits import Add, at
from mechlab.core.model import Model
from mechlab.core.sweeps import sweep
from mechlab.methods.circuits import heads as head_scores
from mechlab.methods.circuits.ablation import ablation_effects, faithfulness, keep_only, mean_fill
from mechlab.methods.circuits.attribution import attribution_patching
from mechlab.methods.circuits.direct import Attribution, direct_attribution
from mechlab.methods.circuits.lens import identity_lens, logit_lens, tuned_lens_loss
from mechlab.methods.circuits.patching import patch_residual
from mechlab.methods.circuits.path_patching import paths_to_heads, paths_to_logits
from mechlab.methods.circuits.reading import Metric, logit_difference, logits_at
from mechlab.methods.circuits.splice import SparseAutoencoder, splice
from mechlab.reporting.figures import curve_band, heat_map
from mechlab.reporting.model_figures import depth_curves, head_maps
from mechlab.training.batches import Batches
from mechlab.training.loop import fit

Numbers = dict[str, float]


class Pairs(NamedTuple):
    """N pairs of prompts of one form.

    Attributes:
      clean, corrupted: (N, T) tokens; the same token at most positions.
      answers: (N, 2) right and wrong answer of the clean prompt, tokens.
      words: T names of the positions, for figures.
    """

    clean: jax.Array
    corrupted: jax.Array
    answers: jax.Array
    words: list[str]


class Seen(NamedTuple):
    """A model's behaviour on pairs, and what the steps below share.

    Attributes:
      model, params, pairs: as given.
      metric: of logits (N, V).
      base, other: (N,) metric of the clean and of the corrupted prompts.
      full: their mean difference.
      acts, corrupted_acts: sites of the two runs, (L, N, T, ...).
    """

    model: Model
    params: Any
    pairs: Pairs
    metric: Metric
    base: np.ndarray
    other: np.ndarray
    full: float
    acts: Mapping[str, jax.Array]
    corrupted_acts: Mapping[str, jax.Array]

    def read(self, edits: Any, tokens: jax.Array) -> jax.Array:
        """The metric (N,) of an edited run."""
        return self.metric(logits_at(self.model, {"params": self.params, "edits": edits}, tokens))


def look(model: Model, params: Any, pairs: Pairs) -> tuple[Seen, Numbers]:
    """Run both prompts of every pair."""
    metric = logit_difference(pairs.answers)
    run = jax.jit(
        lambda params, tokens: model.capture(
            {"params": params}, tokens, sites=("resid_post", "attn_z", "attn_pattern", "mlp_out")
        )
    )
    (clean, acts), (corrupted, corrupted_acts) = run(params, pairs.clean), run(params, pairs.corrupted)
    base, other = np.asarray(metric(clean[:, -1])), np.asarray(metric(corrupted[:, -1]))
    seen = Seen(model, params, pairs, metric, base, other, float((base - other).mean()), acts, corrupted_acts)
    return seen, {
        "prompts": len(base),
        "accuracy": float((base > 0).mean()),
        "logit difference": float(base.mean()),
        "corrupted logit difference": float(other.mean()),
    }


def patching(seen: Seen) -> Figure:
    """Where is it: the clean residual stream, one layer and position at a time, into the corrupted run."""
    model, pairs = seen.model, seen.pairs
    patched = jax.jit(lambda params, source: patch_residual(model, params, pairs.corrupted, source, seen.metric))
    restored = (np.asarray(patched(seen.params, seen.acts["resid_post"])) - seen.other).mean(-1) / seen.full
    return heat_map(
        restored[::-1], xlabel="position", ylabel="layer", column_labels=pairs.words, diverging=True,
        row_labels=[str(layer) for layer in reversed(range(len(restored)))],
        colour_label="share of the effect restored", title="clean residual stream into the corrupted run",
    )  # fmt: skip


def attribution(seen: Seen) -> tuple[Figure, Numbers, np.ndarray]:
    """Which heads: one gradient for all of them, and every head patched to check; also the exact shares (L, H)."""
    model, pairs = seen.model, seen.pairs

    def estimate(steps: int | None) -> np.ndarray:
        run = jax.jit(
            lambda params: attribution_patching(
                model, params, pairs.corrupted, pairs.clean, seen.metric, ("attn_z",), steps=steps
            )
        )
        return np.asarray(run(seen.params)["attn_z"].sum(2).mean(1)) / seen.full

    gradient, integrated = estimate(None), estimate(8)
    exact = ablation_effects(model, seen.params, pairs.corrupted, seen.metric, "attn_z", seen.acts["attn_z"])
    exact = np.asarray((exact - seen.other).mean(-1) / seen.full)
    figure = head_maps(
        {"gradient": gradient, "8 steps": integrated, "exact": exact}, diverging=True,
        colour_label="share of the effect restored", title="clean head output into the corrupted run",
    )  # fmt: skip
    numbers = {
        "r of gradient and exact": float(np.corrcoef(gradient.ravel(), exact.ravel())[0, 1]),
        "r of 8 steps and exact": float(np.corrcoef(integrated.ravel(), exact.ravel())[0, 1]),
    }
    return figure, numbers, exact


def direct(seen: Seen) -> tuple[Figure, Numbers, Attribution]:
    """Who writes the answer: the parts of the logit difference."""
    run = jax.jit(lambda params: direct_attribution(seen.model, params, seen.pairs.clean, seen.pairs.answers))
    parts = run(seen.params)
    figure = head_maps(
        {"written into the logit difference": np.asarray(parts.heads.mean(-1))}, colour_label="nats", diverging=True
    )
    return figure, {"parts minus logit difference": float(np.abs(parts.total() - seen.base).max())}, parts


def lenses(seen: Seen, parts: Attribution, key: jax.Array, texts: Batches, steps: int) -> Figure:
    """When is it known: the logit difference read off every layer; the tuned lens is trained on ``texts``."""
    model, clean = seen.model, seen.pairs.clean
    start = identity_lens(model.module.config.layers, model.module.config.width)
    loss = tuned_lens_loss(model, seen.params)
    tuned = fit(key, loss, start, optax.adam(2e-3), texts, steps=steps).params
    curves = {
        "logit lens": jax.jit(lambda p: logit_lens(model, {"params": p}, clean, read=-1))(seen.params),
        "tuned lens": jax.jit(lambda p: logit_lens(model, {"params": p}, clean, read=-1, lens=tuned))(seen.params),
    }
    return depth_curves(
        {name: np.asarray(jax.vmap(seen.metric)(logits)).T for name, logits in curves.items()}
        | {"frozen norm, sum of parts": np.asarray(jnp.cumsum(parts.by_depth(), 0)).T},
        ylabel="logit difference at the last token (nats)", xlabel="depth",
    )  # fmt: skip


def repeated_scores(model: Model, params: Any, repeated: jax.Array) -> dict[str, np.ndarray]:
    """What heads look at in random tokens that come twice: the token before, and what followed the first time."""
    read = jax.jit(lambda params: model.capture({"params": params}, repeated, sites=("attn_pattern",))[1])
    pattern = read(params)["attn_pattern"]
    return {
        "previous token": np.asarray(head_scores.attention_to(pattern, head_scores.previous_keys(repeated))),
        "induction": np.asarray(head_scores.attention_to(pattern, head_scores.induction_keys(repeated))),
    }


def paths(seen: Seen, movers: list[tuple[int, int]]) -> Figure:
    """Who speaks to whom: corrupted heads, passed on to the logits only, or to the movers' queries only."""
    clean, corrupted = seen.pairs.clean, seen.pairs.corrupted
    to_logits = paths_to_logits(seen.model, seen.params, clean, corrupted, seen.metric)
    to_queries = paths_to_heads(seen.model, seen.params, clean, corrupted, seen.metric, "q", movers)
    return head_maps(
        {
            "to the logits": (to_logits - seen.base).mean(-1) / seen.full,
            "to the movers' queries": (to_queries - seen.base).mean(-1) / seen.full,
        },
        colour_label="change of the logit difference (share of the whole effect)", diverging=True,
    )  # fmt: skip


def keeping(seen: Seen, exact: np.ndarray) -> tuple[Figure, Numbers]:
    """Is that all: keep k heads, fill the others with their mean over both kinds of prompts."""
    model, tokens = seen.model, seen.pairs.clean
    both = jnp.concatenate([seen.acts["attn_z"], seen.corrupted_acts["attn_z"]], axis=1)
    fill = mean_fill(both, by_position=True)
    order = np.argsort(-np.abs(exact).ravel())
    random_order = np.random.default_rng(0).permutation(order)
    counts = np.arange(0, exact.size + 1, max(1, exact.size // 24))

    def alone(keep: jax.Array, params: Any, fill: jax.Array) -> jax.Array:
        edits = keep_only(model.sites, "attn_z", keep, fill)
        return seen.metric(logits_at(model, {"params": params, "edits": edits}, tokens)).mean()

    def kept(order: np.ndarray) -> np.ndarray:
        masks = np.zeros((len(counts), exact.size), bool)
        for row, count in zip(masks, counts, strict=True):
            row[order[:count]] = True
        return np.asarray(sweep(alone, masks.reshape(-1, *exact.shape), seen.params, fill))

    curve, random_curve = kept(order), kept(random_order)
    base = float(seen.base.mean())
    share = np.asarray(faithfulness(curve, base, float(curve[0])))
    random_share = np.asarray(faithfulness(random_curve, base, float(curve[0])))
    figure = curve_band(
        counts, {"heads by importance": share[None], "heads in random order": random_share[None]},
        xlabel="heads kept (count)", ylabel="faithfulness",
    )  # fmt: skip
    return figure, {"heads for 90 % of the behaviour": int(counts[np.argmax(share >= 0.9)]), "heads": exact.size}


def probes(depths: jax.Array, places: Mapping[str, int], labels: np.ndarray, title: str) -> tuple[Figure, Numbers]:
    """Where can a property be read: held-out accuracy of linear probes at some positions of (L + 1, N, T, D)."""
    train, test = np.split(np.random.default_rng(0).permutation(len(labels)), [2 * len(labels) // 3])
    found = {
        f"at the {name}": np.asarray(held_out_accuracy(depths[:, :, place], labels, train, test, C=0.1))
        for name, place in places.items()
    }
    figure = depth_curves(
        {name: values[None] for name, values in found.items()}, ylabel="held-out accuracy", xlabel="depth", title=title
    )
    return figure, {f"best probe {name}": float(values.max()) for name, values in found.items()}


def steering(
    seen: Seen, direction: jax.Array, position: int, sign: np.ndarray, *, xlabel: str, ylabel: str
) -> tuple[Figure, Numbers]:
    """Is it used: add a direction (L, D) at a position, in one layer at a time, and average metric x ``sign`` (N,)."""
    doses, tokens = jnp.linspace(-2, 2, 9), seen.pairs.clean

    def run(cell: dict[str, Any], params: Any, direction: jax.Array) -> jax.Array:
        add = Add(cell["dose"] * direction)
        edits = at(seen.model.sites, "resid_post", add, layer=cell["layer"], position=position, stacked=True)
        return seen.metric(logits_at(seen.model, {"params": params, "edits": edits}, tokens))

    layers = np.unique(np.linspace(0, len(direction) - 1, 4).astype(int))
    cells = {"layer": jnp.repeat(jnp.asarray(layers), len(doses)), "dose": jnp.tile(doses, len(layers))}
    found = np.asarray(sweep(run, cells, seen.params, direction)).reshape(len(layers), len(doses), -1) * sign
    curves = found.mean(-1)
    figure = curve_band(
        doses,
        {f"layer {layer}": curve[None] for layer, curve in zip(layers, curves, strict=True)},
        xlabel=xlabel,
        ylabel=ylabel,
    )
    return figure, {"largest effect of steering": float(np.ptp(curves, axis=1).max())}


def splicing(seen: Seen) -> Figure:
    """How many of a dictionary's features carry the behaviour: both signs of the principal components of a layer."""
    resid = seen.acts["resid_post"]
    layers, width = resid.shape[0], resid.shape[-1]
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= width]
    read = jax.jit(seen.read)
    curves = {}
    for layer in sorted({0, layers // 2, layers - 1}):
        rows = resid[layer].reshape(-1, width)
        components = pca(rows, width)
        both = jnp.concatenate([components.directions, -components.directions])
        values = []
        for k in ks:
            autoencoder = SparseAutoencoder(both.T, jnp.zeros(2 * width), both, components.mean, top_k=k)
            edits = at(seen.model.sites, "resid_post", splice(autoencoder, keep_error=False), layer=layer)
            values.append(float(read(edits, seen.pairs.clean).mean() / seen.base.mean()))
        curves[f"layer {layer}"] = np.asarray(values)[None]
    return curve_band(
        ks, curves, xlabel="features active at once, k", ylabel="share of the logit difference left", logx=True
    )


def strongest(parts: Attribution, n: int) -> list[tuple[int, int]]:
    """The n heads, (layer, head), that write most into the logit difference."""
    scores = np.asarray(parts.heads.mean(-1))
    return [tuple(divmod(int(i), scores.shape[1])) for i in np.argsort(-scores.ravel())[:n]]
