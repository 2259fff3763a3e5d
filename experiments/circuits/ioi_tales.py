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
from matplotlib.figure import Figure

from experiments.circuits import _tour as tour
from mechlab.analysis.directions import mean_difference
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.data.worlds import tales
from mechlab.data.worlds.tales import tables
from mechlab.methods.circuits import heads as head_scores
from mechlab.methods.circuits.lens import residual_depths
from mechlab.reporting.figures import save
from mechlab.reporting.model_figures import head_maps
from mechlab.training.batches import generated

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
    """Every step of the analysis, top to bottom; each is a function of ``_tour``.

    Args:
      key: typed key, of the prompts.
      model, params, tokenizer: a model of the world of tales.
      lens_steps: of the training of the tuned lens.
      log: called with one line per step.

    Returns:
      The figures by file name, and the numbers that the guides quote.
    """
    prompts = make_prompts(stream(key, "prompts"), PROMPTS)
    words = [tokenizer.decode([int(token)]).lower() for token in prompts.clean[0]]
    words[0] = "BOS"
    for name in ("name 1", "name 2", "giver"):
        words[prompts.places[name]] = name
    seen, numbers = tour.look(model, params, tour.Pairs(prompts.clean, prompts.corrupted, prompts.answers, words))
    log(f"{PROMPTS} prompts such as: {tokenizer.decode(prompts.clean[0])} ... accuracy {numbers['accuracy']:.0%}")

    figures = {"patching": tour.patching(seen)}
    figures["attribution_patching"], found, exact = tour.attribution(seen)
    numbers |= found
    figures["direct_attribution"], found, parts = tour.direct(seen)
    numbers |= found
    movers = tour.strongest(parts, MOVERS)
    log(f"heads that write the answer: {movers}")
    stories = generated(functools.partial(tales.sample_batch, batch=8, length=64))
    figures["lenses"] = tour.lenses(seen, parts, stream(key, "lens"), stories, lens_steps)
    figures["heads"] = _what_heads_read(stream(key, "repeated"), seen, prompts, tokenizer)
    figures["path_patching"] = tour.paths(seen, movers)
    figures["ablation"], found = tour.keeping(seen, exact)
    numbers |= found

    # A feature: is the answer the first or the second name? Half of the prompts are of either kind.
    many = make_prompts(stream(key, "probe prompts"), 4 * PROMPTS)
    depths = jax.jit(lambda params: residual_depths(model, {"params": params}, many.clean))(params)
    labels = np.repeat([0, 1], len(many.clean) // 2)
    places = {name: many.places[name] for name in ("giver", "end")}
    figures["probes"], found = tour.probes(depths, places, labels, "probe: is the answer the first or second name?")
    numbers |= found
    direction = mean_difference(depths[1:, :, many.places["giver"]], labels).raw
    figures["steering"], found = tour.steering(
        seen,
        direction,
        prompts.places["giver"],
        np.repeat([-1, 1], PROMPTS // 2),
        xlabel="dose (mean differences added at the giver)",
        ylabel="logit of name 2 over name 1 (nats)",
    )
    numbers |= found
    figures["splice"] = tour.splicing(seen)
    return figures, numbers


def _what_heads_read(key: jax.Array, seen: tour.Seen, prompts: Prompts, tokenizer: Any) -> Figure:
    """Scores on repeated tokens, and attention from the giver to its first mention and from the end to the answer."""
    # Only names and things are ever repeated in lists of this world.
    pool = jnp.concatenate([tables.NAMES, tables.THINGS])
    repeated = head_scores.repeated_tokens(key, 32, 20, pool, start=tokenizer.ids["<bos>"])
    pattern, places, rows = seen.acts["attn_pattern"], prompts.places, jnp.arange(len(prompts.clean))
    before = jnp.argmax(prompts.clean == prompts.clean[:, places["giver"]][:, None], axis=1)
    right = jnp.argmax(prompts.clean == prompts.answers[:, :1], axis=1)
    return head_maps(
        tour.repeated_scores(seen.model, seen.params, repeated)
        | {
            "giver → its first mention": pattern[:, rows, :, places["giver"], before].mean(0),
            "end → the answer": pattern[:, rows, :, places["end"], right].mean(0),
        },
        colour_label="share of attention",
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
