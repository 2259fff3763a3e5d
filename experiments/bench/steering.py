"""Steering: what a steered token costs, and a grid of strengths and layers in one program.

    python -m experiments bench steering
    MECHLAB_PEERS=/path/to/python python -m experiments bench steering

A vector is added to the residual stream of GPT-2-small's shape, at every layer with twenty strengths. This grid is run
by ``dose_grid`` (one program, each cell from its layer on), as a loop over edited forwards of one compiled program, by
repeng and by TransformerLens (a loop over forwards, as their users write it), and by plain PyTorch with the strengths
of a layer as one batch. Peers run some of the layers, the mean layer among them, which costs them per cell what all
do. The logits of two tokens after the prompt must agree.

A steered token: greedy decoding of one text with a cache, with and without the vector, ours and repeng's; each is
compared with itself unsteered.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.bench._peers import Peer, machine, running
from experiments.bench._timing import describe, interleave, ratio
from mechlab.core.model import Model
from mechlab.methods.steering.doses import dose_grid
from mechlab.methods.steering.vectors import SteeringVector, Texts, steer
from mechlab.models import hub
from mechlab.models.generate import generate
from mechlab.models.transformer import gpt2, transformer
from mechlab.reporting.results import write_json

PEERS = ("repeng", "transformer_lens", "torch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured.

    Attributes:
      layers, width, heads, hidden, vocabulary: of the decoder.
      prompts, length: of the grid.
      strengths: how many, evenly from -1 to 1.
      probed: layers whose cells the peers run, with the mean of all layers.
      written: tokens of a generation.
      repeats: timed runs after the first.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    hidden: int = 3072
    vocabulary: int = 50257
    prompts: int = 2
    length: int = 15
    strengths: int = 20
    probed: tuple[int, ...] = (2, 9)
    written: int = 48
    repeats: int = 3


SIZES = {
    "smoke": Size(
        layers=2,
        width=32,
        heads=2,
        hidden=64,
        vocabulary=101,
        length=4,
        strengths=3,
        probed=(0, 1),
        written=4,
        repeats=2,
    ),
    "cpu": Size(),
    "accel": Size(prompts=8, length=64, probed=(2, 5, 6, 9), written=256, repeats=5),
}


def bench(preset: str, out: Path) -> dict[str, Any]:
    """Measure, print a table, write ``steering.json``; see the module's docstring."""
    size = SIZES[preset]
    model = transformer(
        gpt2(
            layers=size.layers,
            width=size.width,
            heads=size.heads,
            hidden=size.hidden,
            vocabulary=size.vocabulary,
            context=max(64, size.length + size.written),
        )
    )
    keys = jax.random.split(jax.random.key(0), 3)
    # Three times the usual size, so that a change of the stream shows in the logits.
    params = model.init(keys[0])
    params["blocks"] = jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 2 else leaf, params["blocks"])
    tokens = jax.random.randint(keys[1], (size.prompts, size.length), 0, size.vocabulary)
    vector = SteeringVector(jax.random.normal(keys[2], (size.layers, size.width)))
    with jax.default_matmul_precision("highest"), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hub.export(folder, model, params, family="gpt2")
        np.savez(folder / "inputs.npz", tokens=np.asarray(tokens), vector=np.asarray(vector.values))
        with running(Path(__file__).with_name("_steering_peers.py"), PEERS, folder) as peers:
            record: dict[str, Any] = {"size": dataclasses.asdict(size), "machine": machine(peers)}
            record["grid"] = grid(model, params, vector, tokens, size, peers)
            # What was measured survives if the rest is stopped.
            write_json(out / "steering.json", record | {"generation": {}})
            record["generation"] = generation(model, params, vector, tokens[:1], size, peers)
    write_json(out / "steering.json", record)
    _print(record)
    return record


def grid(
    model: Model, params: Any, vector: SteeringVector, tokens: jax.Array, size: Size, peers: dict[str, Peer]
) -> dict[str, Any]:
    """Seconds per cell and the two logits, of every way."""
    strengths = np.linspace(-1, 1, size.strengths)
    answers = jnp.asarray([3, 7])
    texts = Texts(tokens, jnp.full(size.prompts, size.length))
    layers = np.arange(size.layers)

    def one_program() -> np.ndarray:
        found = dose_grid(model, params, vector.values[None], texts, layers=layers, strengths=strengths, tokens=answers)
        return np.asarray(found[0])

    @jax.jit
    def one(params: Any, layer: jax.Array, strength: jax.Array) -> jax.Array:
        edits = steer(model, vector, layer=layer, strength=strength)
        return model.apply({"params": params, "edits": edits}, tokens)[:, -1, answers]

    def loop() -> np.ndarray:
        probed = [[np.asarray(one(params, layer, strength)) for strength in strengths] for layer in size.probed]
        return np.asarray(probed)

    cells = [[int(layer), float(strength)] for layer in size.probed for strength in strengths]
    first: dict[str, float] = {}
    values: dict[str, np.ndarray] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ("one program", "loop", *peers)}
    counts = {"one program": size.layers * size.strengths, **dict.fromkeys(("loop", *peers), len(cells))}

    shape = (len(size.probed), size.strengths, size.prompts, len(answers))
    for turn in range(size.repeats + 1):
        for name, run in (("one program", one_program), ("loop", loop)):
            start = time.perf_counter()
            values[name] = run()
            seconds[name].append((time.perf_counter() - start) / counts[name])
        for name, peer in peers.items():
            reply = peer.ask("grid", cells)
            values[name] = np.asarray(reply["values"]).reshape(shape)
            seconds[name].append(reply["seconds"] / counts[name])
        if not turn:
            first = {name: spent.pop() for name, spent in seconds.items()}
    probed = values["one program"][list(size.probed)]
    values["one program"] = probed
    return {
        "cells": size.layers * size.strengths,
        "cells of peers": len(cells),
        "seconds per cell": seconds,
        "seconds per cell, first call": first,
        "over one program": {name: ratio(spent, seconds["one program"]) for name, spent in seconds.items()},
        "largest difference": {name: float(np.abs(x - probed).max()) for name, x in values.items()},
        "largest effect": float(np.abs(probed - probed[:, [size.strengths // 2]]).max()),
    }


def generation(
    model: Model, params: Any, vector: SteeringVector, prompt: jax.Array, size: Size, peers: dict[str, Peer]
) -> dict[str, Any]:
    """Seconds per token, with the vector over without, ours and repeng's."""
    middle = size.layers // 2
    ways = {
        "unsteered": {"params": params},
        "one layer": {"params": params, "edits": steer(model, vector, layer=middle, strength=0.5)},
        "every layer": {"params": params, "edits": steer(model, vector, layer=range(size.layers), strength=0.05)},
    }
    runs = {
        name: lambda variables=variables: generate(model, variables, prompt, steps=size.written).tokens
        for name, variables in ways.items()
    }
    ours = interleave(runs, repeats=size.repeats)
    found: dict[str, Any] = {
        "ours": {
            "seconds per token": {name: [x / size.written for x in spent] for name, spent in ours.items()},
            "over unsteered": {name: ratio(spent, ours["unsteered"]) for name, spent in ours.items()},
        }
    }
    steered = np.asarray(runs["one layer"]())[0, size.length :]
    for label, peer in peers.items():
        if peer.name != "repeng":
            continue
        spent: dict[str, list[float]] = {"unsteered": [], "one layer": []}
        for turn in range(size.repeats + 1):
            for name, strength in (("unsteered", 0.0), ("one layer", 0.5)):
                reply = peer.ask("generate", [middle, strength, size.written])
                if turn:
                    spent[name].append(reply["seconds"] / size.written)
        found[label] = {
            "seconds per token": spent,
            "over unsteered": {name: ratio(x, spent["unsteered"]) for name, x in spent.items()},
            "tokens as ours": float(np.mean(np.asarray(reply["values"]) == steered)),
        }
    return found


def _print(record: dict[str, Any]) -> None:
    found = record["grid"]
    table = Table(f"{found['cells']} cells", "ms per cell", "first call", "over one program", "largest difference")
    for name, spent in found["seconds per cell"].items():
        table.add_row(
            name,
            f"{1e3 * np.median(spent):.2f}",
            f"{1e3 * found['seconds per cell, first call'][name]:.2f}",
            describe(found["over one program"][name]),
            f"{found['largest difference'][name]:.1e}",
        )
    tokens = Table("generation", "way", "ms per token", "over unsteered")
    for who, measured in record["generation"].items():
        for name, spent in measured["seconds per token"].items():
            over = describe(measured["over unsteered"][name])
            tokens.add_row(who, name, f"{1e3 * np.median(spent):.2f}", over)
    for shown in (table, tokens):
        Console().print(shown)
