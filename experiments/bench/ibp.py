"""A step of certified training: ours against auto_LiRPA, and against interval bounds written by hand in PyTorch.

    python -m experiments bench ibp
    MECHLAB_PEERS=/path/to/python python -m experiments bench ibp

One step is: clean forward in training mode, bounds of the margins, robust cross-entropy, gradient, Adam. Networks are
the perceptron of the Fast IBP experiment and CNN-7, both with batch norm; bounds are intervals, or CROWN-IBP. Peers are
looked for in the interpreters that ``MECHLAB_PEERS`` names. They start from the same weights, see the same batch and
run on the same cores, interleaved with ours, and their margins are compared with ours. Our step is a compiled step
called from Python, not a loop inside the program: there, convolutions are many times slower on a CPU.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from experiments.bench._peers import Peer, machine, running
from experiments.bench._timing import describe, ratio
from mechlab.methods.architectures.batch_norm import clean_pass
from mechlab.methods.architectures.fast_ibp import certified_margins, robust_cross_entropy
from mechlab.methods.architectures.interval import ball, propagate
from mechlab.methods.architectures.networks import cnn7, ibp_init, perceptron
from mechlab.methods.architectures.piecewise import BatchNorm, Conv, Dense, Network
from mechlab.reporting.results import write_json

PEERS = ("auto_LiRPA", "torch")
RATE = 1e-3
EPS = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured.

    Attributes:
      hidden: widths of the perceptron.
      pixels: of a side of the images.
      width, dense: of CNN-7.
      batch: inputs per step.
      steps, repeats: steps of a timing, and timings.
    """

    hidden: tuple[int, ...] = (128,) * 5
    pixels: int = 28
    width: int = 16
    dense: int = 128
    batch: int = 256
    steps: int = 20
    repeats: int = 5


SIZES = {
    "smoke": Size(hidden=(16,) * 2, pixels=8, width=2, dense=8, batch=16, steps=2, repeats=2),
    "cpu": Size(batch=64, steps=3),
    "accel": Size(width=64, dense=512, steps=50),
}


def bench(preset: str, out: Path) -> dict[str, Any]:
    """Measure, print a table, write ``ibp.json``; see the module's docstring."""
    size = SIZES[preset]
    keys = jax.random.split(jax.random.key(0), 6)
    image = (size.pixels, size.pixels, 1)
    nets = {
        "perceptron": perceptron(keys[0], (size.pixels**2, *size.hidden, 10), batch_norm=True),
        "CNN-7": cnn7(keys[1], image, 10, width=size.width, hidden=size.dense, batch_norm=True),
    }
    x, y = jax.random.uniform(keys[2], (size.batch, *image)), jax.random.randint(keys[3], (size.batch,), 0, 10)
    with jax.default_matmul_precision("highest"), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "batch.npz", x=np.asarray(x), y=np.asarray(y))
        for key, (label, net) in zip(keys[4:], nets.items(), strict=True):
            nets[label] = ibp_init(key, net)
            _store(nets[label], folder / label)
        with running(Path(__file__).with_name("_ibp_peers.py"), PEERS, folder) as peers:
            record: dict[str, Any] = {"size": dataclasses.asdict(size), "machine": machine(peers)}
            for label, net in nets.items():
                for crown in (False, True):
                    case = f"{label}, {'CROWN-IBP' if crown else 'IBP'}"
                    record[case] = _case(net, x, y, size, peers, f"{label}/{'crown' if crown else 'ibp'}", crown)
                    # What was measured survives if a later case is stopped.
                    write_json(out / "ibp.json", record)
    _print(record)
    return record


def _case(
    net: Network, x: jax.Array, y: jax.Array, size: Size, peers: dict[str, Peer], asked: str, crown: bool
) -> dict[str, Any]:
    optimiser = optax.adam(RATE)

    def loss(net: Network) -> tuple[jax.Array, jax.Array]:
        fixed, box = clean_pass(net, x).fixed, ball(x, EPS)
        margins = certified_margins(fixed, box, propagate(fixed, box), y, share=1.0 if crown else None)
        return robust_cross_entropy(margins), margins

    @jax.jit
    def step(net: Network, state: Any) -> tuple[Network, Any, jax.Array]:
        (_, margins), gradient = jax.value_and_grad(loss, has_aux=True)(net)
        updates, state = optimiser.update(gradient, state, net)
        return optax.apply_updates(net, updates), state, margins

    start = time.perf_counter()
    margins = np.asarray(step(net, optimiser.init(net))[2])
    first = time.perf_counter() - start

    def ours() -> float:
        params, state = net, optimiser.init(net)
        start = time.perf_counter()
        for _ in range(size.steps):
            params, state, _ = step(params, state)
        jax.block_until_ready(params)
        return (time.perf_counter() - start) / size.steps

    def theirs(peer: Peer) -> Callable[[], float]:
        return lambda: peer.ask(asked, [size.steps])["seconds"] / size.steps

    runs: dict[str, Callable[[], float]] = {"ours": ours}
    apart: dict[str, float] = {}
    for label, peer in peers.items():
        reply = peer.ask(asked, [2])
        if reply["values"]:  # a peer without this kind of bound answers with none
            apart[label] = float(np.abs(np.asarray(reply["values"]).reshape(margins.shape) - margins).max())
            runs[label] = theirs(peer)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(size.repeats):
        for name, measure in runs.items():
            seconds[name].append(measure())
    return {
        "seconds per step": seconds,
        "first call, seconds": first,
        "largest margin": float(np.abs(margins).max()),
        "largest difference of margins": apart,
        "over ours": {name: ratio(values, seconds["ours"]) for name, values in seconds.items() if name != "ours"},
    }


def _store(net: Network, folder: Path) -> None:
    """A network as ``layers.json`` (kind and settings of each layer) and ``arrays.npz`` (arrays by layer and name)."""
    folder.mkdir()
    layers: list[Any] = []
    arrays: dict[str, Any] = {}
    for index, layer in enumerate(net):
        settings = {"stride": layer.stride, "padding": layer.padding} if isinstance(layer, Conv) else {}
        layers.append({"kind": type(layer).__name__, **settings})
        names = {Conv: ("kernel", "bias"), Dense: ("kernel", "bias"), BatchNorm: ("scale", "bias")}.get(type(layer), ())
        arrays |= {f"{index}.{name}": np.asarray(getattr(layer, name)) for name in names}
    (folder / "layers.json").write_text(json.dumps(layers))
    np.savez(folder / "arrays.npz", **arrays)


def _print(record: dict[str, Any]) -> None:
    peers = list(record["machine"]["peers"])
    table = Table("step", "ours (ms)", *(f"{name} over ours" for name in peers), "difference, of the largest margin")
    for case, found in record.items():
        if case in ("size", "machine"):
            continue
        ratios = [describe(found["over ours"][name]) if name in found["over ours"] else "" for name in peers]
        apart = ", ".join(f"{x / found['largest margin']:.1e}" for x in found["largest difference of margins"].values())
        table.add_row(case, f"{1e3 * np.median(found['seconds per step']['ours']):.1f}", *ratios, apart)
    Console().print(table)
