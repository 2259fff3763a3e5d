"""What the two patching benchmarks share: the decoder and its weights, the prompts, the metric, the peers.

Peers are looked for in the interpreters that ``MECHLAB_PEERS`` names and run in processes of their own, on the same
weights, prompts, metric and cores, interleaved with ours; they run a stated subset of the cells, which costs them per
cell what the whole does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench._peers import Peer, running
from mechlab.core.model import Model
from mechlab.models import hub
from mechlab.models.transformer import gpt2, transformer

PEERS = ("transformer_lens", "nnsight", "torch", "torch.compile")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured.

    Attributes:
      layers, width, heads, hidden, vocabulary: the decoder.
      prompts, length, first: of the flagship; ``first`` is where the demo's prompts differ.
      lengths: prompt lengths of the layer x position and layer x head maps, one prompt.
      probed: layers whose cells the peers run; their mean is the mean layer, so that the mean cost is that of all.
      spread: positions that stand for all of the flagship where the prompts differ everywhere.
      most: positions of a map at most; of longer prompts an even subset.
      repeats: timed runs after the first.
      depths: layers of the compiled decoders.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    hidden: int = 3072
    vocabulary: int = 50257
    prompts: int = 8
    length: int = 15
    first: int = 10
    lengths: tuple[int, ...] = (15, 64, 256)
    probed: tuple[int, ...] = (2, 9)
    spread: int = 3
    most: int = 64
    repeats: int = 3
    depths: tuple[int, ...] = (8, 32)


SIZES = {
    "smoke": Size(
        layers=2,
        width=32,
        heads=2,
        hidden=64,
        vocabulary=101,
        prompts=2,
        length=4,
        first=3,
        lengths=(4,),
        probed=(0, 1),
        spread=1,
        most=1,
        repeats=2,
        depths=(2,),
    ),
    "cpu": Size(most=12, repeats=2),
    "accel": Size(lengths=(15, 256), most=64, repeats=5),
}


class Bench(NamedTuple):
    """A decoder with weights, the prompts by name, and the peers that run them."""

    size: Size
    model: Model
    params: Any
    prompts: dict[str, dict[str, jax.Array]]
    peers: dict[str, Peer]


@contextlib.contextmanager
def ready(preset: str, wanted: tuple[str, ...] = PEERS) -> Iterator[Bench]:
    """Everything made, written to a folder for the peers, and the peers running, of those that are wanted."""
    size = SIZES[preset]
    model = decoder(size, size.layers)
    params, prompts = weights(model), make_prompts(size)
    # An accelerator's default of shorter products would be compared with float32.
    with jax.default_matmul_precision("highest"), tempfile.TemporaryDirectory() as folder:
        hub.export(folder, model, params, family="gpt2")
        for name, arrays in prompts.items():
            whole: dict[str, Any] = {key: np.asarray(x) for key, x in arrays.items()}
            np.savez(Path(folder) / f"prompts-{name}.npz", **whole)
        with running(Path(__file__).with_name("_patching_peers.py"), wanted, Path(folder)) as peers:
            yield Bench(size, model, params, prompts, peers)


def decoder(size: Size, depth: int) -> Model:
    shape = {"width": size.width, "heads": size.heads, "hidden": size.hidden, "vocabulary": size.vocabulary}
    return transformer(gpt2(layers=depth, **shape))


def weights(model: Model) -> Any:
    """Random weights, those of the blocks three times as large as usual, so that a patched head shows in the logits."""
    params = jax.jit(model.init)(jax.random.key(0))

    def larger(keys: Any, leaf: jax.Array) -> jax.Array:
        return 3 * leaf if keys[0].key == "blocks" and keys[-1].key == "kernel" else leaf

    return jax.tree.map_with_path(larger, params)


def make_prompts(size: Size) -> dict[str, dict[str, jax.Array]]:
    """{set: tokens and clean (B, T), answers (B, 2)}."""
    found = {}
    for number, (name, rows, length) in enumerate(
        [("demo", size.prompts, size.length), ("everywhere", size.prompts, size.length)]
        + [(str(length), 1, length) for length in size.lengths]
    ):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), number), 3)
        tokens, clean = (jax.random.randint(key, (rows, length), 0, size.vocabulary) for key in keys[:2])
        if name == "demo":
            tokens = clean.at[:, size.first].set(tokens[:, size.first])
        # Different answers everywhere, so that the metric can read the logits of all of them.
        answers = jax.random.choice(keys[2], size.vocabulary, (rows, 2), replace=False)
        found[name] = {"tokens": tokens, "clean": clean, "answers": answers}
    return found


def answer_metric(prompt: dict[str, Any]) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """The answers' tokens, and the mean logit difference of logits at those, (B, 2 B)."""
    rows = jnp.arange(len(prompt["answers"]))
    return prompt["answers"].reshape(-1), lambda logits: (logits[rows, 2 * rows] - logits[rows, 2 * rows + 1]).mean()


def captured(model: Model, params: Any, prompt: dict[str, Any], sites: tuple[str, ...]) -> dict[str, jax.Array]:
    return model.capture({"params": params}, prompt["clean"], sites=sites)[1]


def source_of(model: Model, params: Any, prompt: dict[str, Any], sites: tuple[str, ...]) -> dict[str, jax.Array]:
    return jax.jit(lambda params: captured(model, params, prompt, sites))(params)


def spaced(length: int, count: int) -> list[int]:
    """Positions evenly spread, with the mean of all positions."""
    count = min(count, length)
    return [int((2 * i + 1) * length / (2 * count)) for i in range(count)]
