"""The circuit of indirect object identification in tales-L, found from scratch with the interpretability toolkit.

    python -m experiments.circuits.ioi_tales [--out docs/figures/guides]

"Tom and Mia went to the park. Mia gave a ball to" -> Tom. A model that answers must find the two names, see that one
of them came twice, and write the other one. Wang et al. 2022 (arXiv 2211.00593) traced this in GPT-2 small; here every
step is one call, on a model of 1.4 million parameters, and the figures are those of the guides in the documentation.

A clean prompt and its corrupted twin differ in one token: in the twin the other person gives, which swaps the answers.
The metric is logit[answer] - logit[other name] at the last token, in nats.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from mechlab.analysis.directions import mean_difference
from mechlab.analysis.linalg import pca
from mechlab.analysis.probes import held_out_accuracy
from mechlab.core.edits import Add, at
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.core.sweeps import sweep
from mechlab.data.worlds import tales
from mechlab.data.worlds.tales import tables
from mechlab.methods.circuits import heads as head_scores
from mechlab.methods.circuits.ablation import ablation_effects, faithfulness, keep_only, mean_fill
from mechlab.methods.circuits.attribution import attribution_patching
from mechlab.methods.circuits.direct import direct_attribution
from mechlab.methods.circuits.lens import identity_lens, logit_lens, residual_depths, tuned_lens_loss
from mechlab.methods.circuits.patching import patch_residual
from mechlab.methods.circuits.path_patching import paths_to_heads, paths_to_logits
from mechlab.methods.circuits.reading import logit_difference, logits_at
from mechlab.methods.circuits.splice import SparseAutoencoder, splice
from mechlab.reporting.figures import curve_band, heat_map, save
from mechlab.reporting.model_figures import depth_curves, head_maps
from mechlab.training.batches import generated
from mechlab.training.loop import fit

PROMPTS = 64
MOVERS = 3


class Prompts(NamedTuple):
    """N pairs of prompts of one form: same length, names at the same places.

    Attributes:
      clean, corrupted: (N, T) tokens; they differ where the giver is named again.
      answers: (N, 2) right and wrong name of the clean prompt.
      places: positions of the two names, of the giver's second mention, and of the last token.
    """

    clean: jax.Array
    corrupted: jax.Array
    answers: jax.Array
    places: dict[str, int]


def make_prompts(key: jax.Array, n: int) -> Prompts:
    """The most frequent form among many items; half of the answers are the first name, half the second."""
    items = jax.tree.map(np.asarray, tales.items(key, "ioi", 16 * n + 512))
    rows = np.arange(len(items.tokens))
    is_right, is_wrong = (items.tokens == items.candidates[:, i : i + 1] for i in (0, 1))
    again = items.tokens.shape[1] - 1 - is_wrong[:, ::-1].argmax(1)
    first, second = np.sort([is_right.argmax(1), is_wrong.argmax(1)], 0)
    form = np.stack([items.groups, items.lengths, first, second, again], 1)
    forms, which, counts = np.unique(form, axis=0, return_inverse=True, return_counts=True)
    chosen = rows[which.ravel() == counts.argmax()]
    by_order = [chosen[items.orders[chosen] == order] for order in (0, 1)]
    chosen = np.concatenate([rows[: n // 2] for rows in by_order])
    _, length, first, second, again = (int(x) for x in forms[counts.argmax()])
    clean, answers = items.tokens[chosen, :length], items.candidates[chosen]
    corrupted = clean.copy()
    corrupted[:, again] = answers[:, 0]
    places = {"name 1": first, "name 2": second, "giver": again, "end": length - 1}
    return Prompts(jnp.asarray(clean), jnp.asarray(corrupted), jnp.asarray(answers), places)


def find_circuit(
    key: jax.Array,
    model: Model,
    params: Any,
    tokenizer: Any,
    *,
    lens_steps: int = 150,
    log: Callable[[str], None] = print,
) -> tuple[dict[str, Figure], dict[str, float]]:
    """Every step of the analysis, top to bottom.

    Args:
      key: typed key, of the prompts.
      model, params, tokenizer: a model of the world of tales.
      lens_steps: of the training of the tuned lens.
      log: called with one line per step.

    Returns:
      The figures by file name, and the numbers that the guides quote.
    """
    config = model.module.config
    prompts = make_prompts(stream(key, "prompts"), PROMPTS)
    clean, corrupted, answers, places = prompts
    metric = logit_difference(answers)
    words = [tokenizer.decode([int(token)]).lower() for token in clean[0]]
    words[0] = "BOS"
    for name in ("name 1", "name 2", "giver"):
        words[places[name]] = name
    read = jax.jit(lambda params, edits, tokens: metric(logits_at(model, {"params": params, "edits": edits}, tokens)))
    capture = jax.jit(
        lambda params, tokens: model.capture(
            {"params": params}, tokens, sites=("resid_post", "attn_z", "attn_pattern", "mlp_out")
        )[1]
    )
    acts, corrupted_acts = capture(params, clean), capture(params, corrupted)
    figures: dict[str, Figure] = {}
    numbers: dict[str, float] = {}

    # ---- behaviour --------------------------------------------------------------------------------------------------
    base, other = read(params, {}, clean), read(params, {}, corrupted)
    full = float((base - other).mean())
    numbers |= {"prompts": len(clean), "accuracy": float((base > 0).mean()), "logit difference": float(base.mean())}
    log(f"{len(clean)} prompts such as: {tokenizer.decode(clean[0])} ... accuracy {numbers['accuracy']:.0%}")
    log(f"logit difference {base.mean():.2f}, corrupted {other.mean():.2f}")

    # ---- where is it: patch the clean residual stream into the corrupted run ----------------------------------------
    patched = jax.jit(lambda params, source: patch_residual(model, params, corrupted, source, metric))
    restored = (np.asarray(patched(params, acts["resid_post"])) - np.asarray(other)).mean(-1) / full
    figures["patching"] = heat_map(
        restored[::-1], xlabel="position", ylabel="layer", column_labels=words, diverging=True,
        row_labels=[str(layer) for layer in reversed(range(config.layers))],
        colour_label="share of the effect restored", title="clean residual stream into the corrupted run",
    )  # fmt: skip

    # ---- which heads: one gradient for all, and every head patched to check -----------------------------------------
    def estimate(steps: int | None) -> np.ndarray:
        run = jax.jit(
            lambda params: attribution_patching(model, params, corrupted, clean, metric, ("attn_z",), steps=steps)
        )
        return np.asarray(run(params)["attn_z"].sum(2).mean(1)) / full

    gradient, integrated = estimate(None), estimate(8)
    exact = ablation_effects(model, params, corrupted, metric, "attn_z", acts["attn_z"])
    exact = (exact - np.asarray(other)).mean(-1) / full
    figures["attribution_patching"] = head_maps(
        {"gradient": gradient, "8 steps": integrated, "exact": exact}, diverging=True,
        colour_label="share of the effect restored", title="clean head output into the corrupted run",
    )  # fmt: skip
    numbers["r of gradient and exact"] = float(np.corrcoef(gradient.ravel(), exact.ravel())[0, 1])
    numbers["r of 8 steps and exact"] = float(np.corrcoef(integrated.ravel(), exact.ravel())[0, 1])

    # ---- who writes the answer: direct logit attribution ------------------------------------------------------------
    parts = jax.jit(lambda params: direct_attribution(model, params, clean, answers))(params)
    direct = np.asarray(parts.heads.mean(-1))
    numbers["parts minus logit difference"] = float(np.abs(parts.total() - base).max())
    movers = [divmod(int(i), config.heads) for i in np.argsort(-direct.ravel())[:MOVERS]]
    log(f"heads that write the answer: {movers}")
    tuned = _train_lens(stream(key, "lens"), model, params, lens_steps)
    curves = {
        "logit lens": jax.jit(lambda p: logit_lens(model, {"params": p}, clean, read=-1))(params),
        "tuned lens": jax.jit(lambda p: logit_lens(model, {"params": p}, clean, read=-1, lens=tuned))(params),
    }
    figures["lenses"] = depth_curves(
        {name: np.asarray(jax.vmap(metric)(logits)).T for name, logits in curves.items()}
        | {"frozen norm, sum of parts": np.asarray(jnp.cumsum(parts.by_depth(), 0)).T},
        ylabel="logit difference at the last token (nats)", xlabel="depth",
    )  # fmt: skip

    # ---- what do heads look at --------------------------------------------------------------------------------------
    # Only names and things are ever repeated in lists of this world.
    pool = jnp.concatenate([tables.NAMES, tables.THINGS])
    repeated = head_scores.repeated_tokens(stream(key, "repeated"), 32, 20, pool, start=tokenizer.ids["<bos>"])
    pattern = capture(params, repeated)["attn_pattern"]
    rows = jnp.arange(len(clean))
    giver = acts["attn_pattern"][:, :, :, places["giver"]]
    before = jnp.argmax(clean == clean[:, places["giver"]][:, None], axis=1)
    right = jnp.argmax(clean == answers[:, :1], axis=1)
    to_right = acts["attn_pattern"][:, rows, :, places["end"], right].mean(0)
    figures["heads"] = head_maps(
        {
            "previous token": head_scores.attention_to(pattern, head_scores.previous_keys(repeated)),
            "induction": head_scores.attention_to(pattern, head_scores.induction_keys(repeated)),
            "giver → its first mention": giver[:, rows, :, before].mean(0),
            "end → the answer": to_right,
        },
        colour_label="share of attention",
    )
    figures["direct_attribution"] = head_maps(
        {"written into the logit difference": direct}, colour_label="nats", diverging=True
    )

    # ---- who tells the movers where to look -------------------------------------------------------------------------
    to_logits = paths_to_logits(model, params, clean, corrupted, metric)
    to_queries = paths_to_heads(model, params, clean, corrupted, metric, "q", movers)
    figures["path_patching"] = head_maps(
        {
            "to the logits": (to_logits - np.asarray(base)).mean(-1) / full,
            "to the movers' queries": (to_queries - np.asarray(base)).mean(-1) / full,
        },
        colour_label="change of the logit difference (share of the whole effect)", diverging=True,
    )  # fmt: skip

    # ---- is that all: keep k heads, fill the others with their mean over both kinds of prompts ----------------------
    both = jnp.concatenate([acts["attn_z"], corrupted_acts["attn_z"]], axis=1)
    fill = mean_fill(both, by_position=True)
    order = np.argsort(-np.abs(exact).ravel())
    random_order = np.random.default_rng(0).permutation(order)
    counts = np.arange(0, direct.size + 1, max(1, direct.size // 24))

    def alone(keep: jax.Array, params: Any, fill: jax.Array, tokens: jax.Array) -> jax.Array:
        edits = keep_only(model.sites, "attn_z", keep, fill)
        return metric(logits_at(model, {"params": params, "edits": edits}, tokens)).mean()

    def kept(order: np.ndarray) -> np.ndarray:
        masks = np.zeros((len(counts), direct.size), bool)
        for row, count in zip(masks, counts, strict=True):
            row[order[:count]] = True
        return np.asarray(sweep(alone, masks.reshape(-1, *direct.shape), params, fill, clean))

    curve, random_curve = kept(order), kept(random_order)
    share = np.asarray(faithfulness(curve, float(base.mean()), float(curve[0])))
    random_share = np.asarray(faithfulness(random_curve, float(base.mean()), float(curve[0])))
    figures["ablation"] = curve_band(
        counts, {"heads by importance": share[None], "heads in random order": random_share[None]},
        xlabel="heads kept (count)", ylabel="faithfulness",
    )  # fmt: skip
    enough = counts[np.argmax(share >= 0.9)]
    numbers |= {"heads for 90 % of the behaviour": int(enough), "heads": direct.size}

    # ---- a feature: is the answer the first or the second name? -----------------------------------------------------
    many = make_prompts(stream(key, "probe prompts"), 4 * PROMPTS)
    labels = np.repeat([0, 1], len(many.clean) // 2)
    depths = jax.jit(lambda params: residual_depths(model, {"params": params}, many.clean))(params)
    train, test = np.split(np.random.default_rng(0).permutation(len(labels)), [2 * len(labels) // 3])
    probes = {
        f"at the {name}": np.asarray(held_out_accuracy(depths[:, :, many.places[name]], labels, train, test, C=0.1))
        for name in ("giver", "end")
    }
    figures["probes"] = depth_curves(
        {name: values[None] for name, values in probes.items()}, ylabel="held-out accuracy", xlabel="depth",
        title="probe: is the answer the first or second name?",
    )  # fmt: skip
    numbers["best probe at the giver"] = float(probes["at the giver"].max())
    direction = mean_difference(depths[1:, :, many.places["giver"]], labels).raw
    figures["steering"] = _steer(model, params, prompts, direction, read)

    # ---- features by principal components, spliced in ---------------------------------------------------------------
    figures["splice"] = _splice_curve(model, params, clean, acts["resid_post"], base, read)
    return figures, numbers


def _train_lens(key: jax.Array, model: Model, params: Any, steps: int) -> Any:
    """A tuned lens on stories of the world, not on the prompts that it will read."""
    batches = generated(functools.partial(tales.sample_batch, batch=8, length=64))
    start = identity_lens(model.module.config.layers, model.module.config.width)
    return fit(key, tuned_lens_loss(model, params), start, optax.adam(2e-3), batches, steps=steps).params


def _steer(model: Model, params: Any, prompts: Prompts, direction: jax.Array, read: Any) -> Figure:
    """Add the mean difference of the two orders (L, D) at the giver, in one layer at a time, to all prompts."""
    doses = jnp.linspace(-2, 2, 9)

    def run(cell: dict[str, Any], params: Any, direction: jax.Array, tokens: jax.Array) -> jax.Array:
        where = {"layer": cell["layer"], "position": prompts.places["giver"]}
        return read(params, at(model.sites, "resid_post", Add(cell["dose"] * direction), **where, stacked=True), tokens)

    layers = np.unique(np.linspace(0, len(direction) - 1, 4).astype(int))
    cells = {"layer": jnp.repeat(jnp.asarray(layers), len(doses)), "dose": jnp.tile(doses, len(layers))}
    found = sweep(run, cells, params, direction, prompts.clean).reshape(len(layers), len(doses), -1)
    # The answer is the first name in the first half of the prompts, the second in the others.
    sign = np.repeat([-1, 1], len(prompts.clean) // 2)
    return curve_band(
        doses,
        {f"layer {layer}": curve.mean(-1)[None] for layer, curve in zip(layers, found * sign, strict=True)},
        xlabel="dose (mean differences added at the giver)",
        ylabel="logit of name 2 over name 1 (nats)",
    )


def _splice_curve(model: Model, params: Any, tokens: Any, resid: Any, base: Any, read: Any) -> Figure:
    """How many of a dictionary's features carry the behaviour: both signs of the principal components of a layer."""
    layers, width = resid.shape[0], resid.shape[-1]
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= width]
    curves = {}
    for layer in sorted({0, layers // 2, layers - 1}):
        rows = resid[layer].reshape(-1, width)
        components = pca(rows, width)
        both = jnp.concatenate([components.directions, -components.directions])
        values = []
        for k in ks:
            autoencoder = SparseAutoencoder(both.T, jnp.zeros(2 * width), both, components.mean, top_k=k)
            edits = at(model.sites, "resid_post", splice(autoencoder, keep_error=False), layer=layer)
            values.append(float(jnp.mean(read(params, edits, tokens)) / jnp.mean(base)))
        curves[f"layer {layer}"] = np.asarray(values)[None]
    return curve_band(
        ks, curves, xlabel="features active at once, k", ylabel="share of the logit difference left", logx=True
    )


def main() -> None:
    """Find the circuit of tales-L and write the figures."""
    from mechlab.models.subjects import load_tales

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/figures/guides"), help="folder of the figures")
    out = parser.parse_args().out
    begun = time.monotonic()
    figures, numbers = find_circuit(jax.random.key(0), *load_tales("L"))
    for name, figure in figures.items():
        save(figure, out / f"{name}.png", overwrite=True)
    print(json.dumps(numbers, indent=1), f"{len(figures)} figures in {out}, {time.monotonic() - begun:.0f} s", sep="\n")


if __name__ == "__main__":
    main()
