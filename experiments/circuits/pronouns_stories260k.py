"""How stories260K, a model of real stories, chooses between "She" and "He": the guides' steps on real text.

    python -m experiments.circuits.pronouns_stories260k [--out docs/figures/guides]

"One day, a little girl saw a dog in the park." -> She. The clean prompt has "girl" or "boy" and its corrupted twin the
other one, each three tokens of the model's 512; whatever tells them apart must be carried from there to the full stop.
The metric is logit[" She"] - logit[" He"], or the reverse where the clean prompt has a boy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.circuits import _tour as tour
from mechlab.analysis.directions import mean_difference
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.data.sources import MissingData
from mechlab.methods.circuits import heads as head_scores
from mechlab.methods.circuits.lens import residual_depths
from mechlab.models.generate import generate
from mechlab.reporting.figures import save
from mechlab.reporting.model_figures import head_maps
from mechlab.training.batches import shuffled

MOVERS = 3
FORM = "One day, a {size} {child} saw a {thing} in the {place}."
SIZES = ("little", "big", "good", "sad", "happy", "kind")
THINGS = ("dog", "cat", "ball", "box", "bird", "car", "tree", "toy", "cake", "bear")
PLACES = ("park", "room", "garden", "house", "store")


def make_pairs(vocabulary: Any) -> tour.Pairs:
    """All sentences of the most frequent form, same length and child at the same place; girls and boys in turn."""
    fillings = [{"size": s, "thing": t, "place": p} for s in SIZES for t in THINGS for p in PLACES]
    texts = [[vocabulary.encode(FORM.format(child=child, **f)) for child in ("girl", "boy")] for f in fillings]
    forms = [(len(girl), len(boy), *_places_that_differ(girl, boy)) for girl, boy in texts]
    usual = max(set(forms), key=forms.count)
    both = np.asarray([pair for pair, form in zip(texts, forms, strict=True) if form == usual])
    turn = np.arange(len(both)) % 2
    rows = np.arange(len(both))
    she, he = (vocabulary.encode(f"x {word}")[-1] for word in ("She", "He"))
    answers = np.asarray([(she, he), (he, she)])[turn]
    words = [vocabulary.decode([int(token)]).strip() or "_" for token in both[0, 0]]
    words[0] = "BOS"
    return tour.Pairs(jnp.asarray(both[rows, turn]), jnp.asarray(both[rows, 1 - turn]), jnp.asarray(answers), words)


def _places_that_differ(first: list[int], second: list[int]) -> list[int]:
    return [i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b]


def find_circuit(
    key: jax.Array,
    model: Model,
    params: Any,
    vocabulary: Any,
    *,
    lens_steps: int = 150,
    log: Callable[[str], None] = print,
) -> tuple[dict[str, Figure], dict[str, float]]:
    """Every step of the analysis; see ``ioi_tales.find_circuit``."""
    pairs = make_pairs(vocabulary)
    seen, numbers = tour.look(model, params, pairs)
    log(f"{len(seen.base)} prompts such as: {vocabulary.decode(pairs.clean[0])} accuracy {numbers['accuracy']:.0%}")

    figures = {"patching": tour.patching(seen)}
    figures["attribution_patching"], found, exact = tour.attribution(seen)
    numbers |= found
    figures["direct_attribution"], found, parts = tour.direct(seen)
    numbers |= found
    movers = tour.strongest(parts, MOVERS)
    log(f"heads that write the answer: {movers}")
    stories = _own_stories(stream(key, "stories"), seen)
    figures["lenses"] = tour.lenses(seen, parts, stream(key, "lens"), stories, lens_steps)
    pool = jnp.arange(259, len(vocabulary.pieces))  # whole pieces, not bytes
    repeated = head_scores.repeated_tokens(stream(key, "repeated"), 32, 20, pool, start=int(pairs.clean[0, 0]))
    child = int(np.argmax(np.asarray(pairs.clean[0] != pairs.corrupted[0])))
    to_child = seen.acts["attn_pattern"][:, :, :, -1, child : child + 3].sum(-1).mean(1)
    scores = tour.repeated_scores(model, params, repeated)
    figures["heads"] = head_maps(scores | {"end → girl, boy": to_child}, colour_label="share of attention")
    numbers |= {f"best head, {name}": float(value.max()) for name, value in scores.items()}
    figures["path_patching"] = tour.paths(seen, movers)
    figures["ablation"], found = tour.keeping(seen, exact)
    numbers |= found

    depths = jax.jit(lambda params: residual_depths(model, {"params": params}, pairs.clean))(params)
    labels = np.arange(len(pairs.clean)) % 2
    places = {"child": child + 2, "end": len(pairs.words) - 1}
    figures["probes"], found = tour.probes(depths, places, labels, "probe: girl or boy?")
    numbers |= found
    direction = mean_difference(depths[1:, :, places["child"]], labels).raw
    figures["steering"], found = tour.steering(
        seen,
        direction,
        places["child"],
        np.where(labels == 1, 1, -1),
        xlabel="dose (mean differences added at the child)",
        ylabel="logit of He over She (nats)",
    )
    numbers |= found
    figures["splice"] = tour.splicing(seen)
    return figures, numbers


def _own_stories(key: jax.Array, seen: tour.Seen, rows: int = 64, length: int = 96) -> Any:
    """Batches of stories that the model writes: its training texts are not at hand."""
    start = jnp.broadcast_to(seen.pairs.clean[:1, :1], (rows, 1))
    out = generate(seen.model, {"params": seen.params}, start, None, key, steps=length - 1, temperature=1.0)
    tokens = out.tokens[:, :length]
    return shuffled({"tokens": tokens, "mask": jnp.ones(tokens.shape, bool)}, 8)


def main() -> None:
    """Find the circuit of stories260K and write the figures, each as ``stories260k_NAME.png``."""
    from mechlab.models.subjects import load_stories260k

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/figures/guides"), help="folder of the figures")
    out = parser.parse_args().out
    begun = time.monotonic()
    try:
        subject = load_stories260k()
    except MissingData as missing:
        raise SystemExit(f"error: {missing}") from None
    figures, numbers = find_circuit(jax.random.key(0), *subject)
    for name, figure in figures.items():
        save(figure, out / f"stories260k_{name}.png", overwrite=True)
    print(json.dumps(numbers, indent=1), f"{len(figures)} figures in {out}, {time.monotonic() - begun:.0f} s", sep="\n")


if __name__ == "__main__":
    main()
