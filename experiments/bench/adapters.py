"""Adapters against peft: a training step's time and memory, and sixteen adapters served at once.

    python -m experiments bench adapters
    MECHLAB_PEERS=/path/to/python python -m experiments bench adapters

The model is a random Llama, exported so that peft adapts the same weights in the same process order on the same cores.
A step is: forward, cross-entropy of every token, gradient of the adapter, AdamW. Ours merges the adapter into the
weights in every step or, where it is a product A B, leaves it beside them as peft does; peft's block methods merge.
Every start but LoRA's and DoRA's random A is determined, so there the losses of all steps are compared, here that of
the first.

Serving: one text for each of 16 LoRAs, merged or beside the weights. Ours as one program mapped over adapters, or as 16
calls; peft as one mixed batch, or as 16 calls that switch adapters. Factors are the same, and so must the logits be.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from experiments.bench._peers import Peer, machine, running
from experiments.bench._timing import describe, ratio
from mechlab.core import select
from mechlab.core.model import Model
from mechlab.core.rng import stream
from mechlab.core.transforms import Adapter, AdapterState
from mechlab.methods.adaptation import bone, lora
from mechlab.models import hub
from mechlab.models.transformer import llama, transformer
from mechlab.reporting.results import write_json

PATTERN = "**/attn/[qkvo]/kernel|**/mlp/*/kernel"
RATE = 1e-3
PEERS = ("peft",)
Build = Callable[[Any, AdapterState], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured.

    Attributes:
      layers, width, heads, hidden, vocabulary: of the decoder.
      block: r of the block methods; the rank of the others is half of it.
      batch, length: tokens of a step.
      served: adapters that are served together.
      steps, repeats: steps of a timing, and timings.
    """

    layers: int = 4
    width: int = 256
    heads: int = 8
    hidden: int = 768
    vocabulary: int = 1024
    block: int = 16
    batch: int = 8
    length: int = 64
    served: int = 16
    steps: int = 5
    repeats: int = 5


SIZES = {
    "smoke": Size(
        layers=2, width=32, heads=4, hidden=48, vocabulary=64, block=4, batch=2, length=8, served=3, steps=2, repeats=2
    ),
    "cpu": Size(),
    "accel": Size(layers=8, width=1024, heads=16, hidden=2816, vocabulary=8192, block=64, length=256, steps=10),
}


def bench(preset: str, out: Path) -> dict[str, Any]:
    """Measure, print a table, write ``adapters.json``; see the module's docstring."""
    size = SIZES[preset]
    model = transformer(
        llama(
            vocabulary=size.vocabulary,
            layers=size.layers,
            width=size.width,
            heads=size.heads,
            hidden=size.hidden,
            context=size.length,
        )
    )
    keys = jax.random.split(jax.random.key(0), 3)
    params = model.init(keys[0])
    tokens = jax.random.randint(keys[1], (max(size.batch, size.served), size.length), 0, size.vocabulary)
    many = _random_loras(keys[2], params, size)
    rank = size.block // 2
    adapters = {
        "lora": lora.lora(rank, pattern=PATTERN),
        "dora": lora.dora(rank, pattern=PATTERN),
        "pissa": lora.pissa(rank, pattern=PATTERN),
        "olora": lora.olora(rank, pattern=PATTERN),
        "bone_col": bone.bone_col(size.block, pattern=PATTERN),
        "miss": bone.miss(size.block, pattern=PATTERN),
    }
    with jax.default_matmul_precision("highest"), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hub.export(folder / "model", model, params)
        factors: dict[str, Any] = {
            f"{path}/{part}": np.asarray(x) for path, ab in many.train.items() for part, x in ab.items()
        }
        np.savez(folder / "inputs.npz", tokens=np.asarray(tokens), **factors)
        np.savez(folder / "size.npz", block=size.block, batch=size.batch, served=size.served, rate=RATE)
        with running(Path(__file__).with_name("_adapters_peers.py"), PEERS, folder) as peers:
            record: dict[str, Any] = {"size": dataclasses.asdict(size), "machine": machine(peers), "steps": {}}
            for label, adapter in adapters.items():
                builds = {label: adapter.merge}
                if label in ("lora", "pissa", "olora"):
                    builds[f"{label}, beside"] = lora.beside
                steps = _steps(model, params, adapter, builds, tokens[: size.batch], size, peers, label)
                record["steps"] |= steps
                # What was measured survives if a later part is stopped.
                write_json(out / "adapters.json", record)
            record["serving"] = _serving(model, params, many, tokens[: size.served], size, peers)
    write_json(out / "adapters.json", record)
    _print(record)
    return record


def _random_loras(key: jax.Array, params: Any, size: Size) -> AdapterState:
    """Adapters that were trained to different places, stacked: leaves (served, ...)."""
    adapter = lora.lora(size.block // 2, pattern=PATTERN)

    def one(key: jax.Array) -> AdapterState:
        train = adapter.init(stream(key, "init"), params).train
        writes = {path: 0.02 * jax.random.normal(stream(key, "B", path), ab["B"].shape) for path, ab in train.items()}
        return AdapterState({path: {"A": ab["A"], "B": writes[path]} for path, ab in train.items()})

    return jax.vmap(one)(jax.random.split(key, size.served))


def _steps(
    model: Model,
    params: Any,
    adapter: Adapter,
    builds: dict[str, Build],
    tokens: jax.Array,
    size: Size,
    peers: dict[str, Peer],
    label: str,
) -> dict[str, Any]:
    """One record for each way in which the adapter changes the parameters."""
    start, optimiser = adapter.init(jax.random.key(0), params), optax.adamw(RATE, weight_decay=0.0)

    def compiled(build: Build) -> Any:
        def loss(train: Any, fixed: Any, params: Any) -> jax.Array:
            logits = model.apply({"params": build(params, AdapterState(train, fixed))}, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

        def step(train: Any, state: Any, fixed: Any, params: Any) -> Any:
            value, gradient = jax.value_and_grad(loss)(train, fixed, params)
            updates, state = optimiser.update(gradient, state, train)
            return optax.apply_updates(train, updates), state, value

        return jax.jit(step).lower(start.train, optimiser.init(start.train), start.fixed, params).compile()

    programs = {name: compiled(build) for name, build in builds.items()}

    def ours(name: str) -> tuple[float, list[float]]:
        train, state, losses = start.train, optimiser.init(start.train), []
        before = time.perf_counter()
        for _ in range(size.steps):
            train, state, value = programs[name](train, state, start.fixed, params)
            losses.append(value)
        jax.block_until_ready(train)
        return (time.perf_counter() - before) / size.steps, [float(value) for value in losses]

    losses = {name: ours(name)[1] for name in programs}
    replies = {name: peer.ask(f"step/{label}", [size.steps]) for name, peer in peers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in (*programs, *peers)}
    for _ in range(size.repeats):
        for name in programs:
            seconds[name].append(ours(name)[0])
        for name, peer in peers.items():
            seconds[name].append(peer.ask(f"step/{label}", [size.steps])["seconds"] / size.steps)
    of_peers = {name: seconds[name] for name in peers}
    return {
        way: {
            "trained numbers": select.count(start.train),
            "seconds per step": {"ours": seconds[way], **of_peers},
            "over ours": {name: ratio(seconds[name], seconds[way]) for name in peers},
            "temporaries of our program (bytes)": int(program.memory_analysis().temp_size_in_bytes),
            "kept for the backward pass (bytes)": {name: reply["bytes"] for name, reply in replies.items()},
            "losses": {"ours": losses[way], **{name: reply["values"] for name, reply in replies.items()}},
        }
        for way, program in programs.items()
    }


def _serving(
    model: Model, params: Any, many: AdapterState, tokens: jax.Array, size: Size, peers: dict[str, Peer]
) -> dict[str, Any]:
    states = [jax.tree.map(lambda leaf, i=i: leaf[i], many) for i in range(size.served)]

    def ways_of(build: Build) -> tuple[Callable[[], Any], Callable[[], Any]]:
        def one(state: AdapterState, text: jax.Array, params: Any) -> jax.Array:
            return model.apply({"params": build(params, state)}, text[None])[0, -1]

        mapped, single = jax.jit(jax.vmap(one, (0, 0, None))), jax.jit(one)
        return lambda: mapped(many, tokens, params), lambda: jnp.stack(
            [single(state, text, params) for state, text in zip(states, tokens, strict=True)]
        )

    ways: dict[str, Callable[[], Any]] = {}
    ways["one program"], ways["calls"] = ways_of(lora.beside)
    ways["one program, merged"], ways["calls, merged"] = ways_of(lora.lora(size.block // 2, pattern=PATTERN).merge)
    logits = {name: np.asarray(run()) for name, run in ways.items()}
    for name, peer in peers.items():
        for way in ("mixed", "calls"):
            reply = peer.ask(f"serve/{way}", [1])
            logits[f"{name}, {way}"] = np.asarray(reply["values"]).reshape(logits["calls"].shape)
    seconds: dict[str, list[float]] = {name: [] for name in logits}
    for _ in range(size.repeats):
        for name, run in ways.items():
            before = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - before)
        for name, peer in peers.items():
            for way in ("mixed", "calls"):
                seconds[f"{name}, {way}"].append(peer.ask(f"serve/{way}", [1])["seconds"])
    base = logits["one program"]
    return {
        "adapters": size.served,
        "seconds": seconds,
        "over one program": {name: ratio(seconds[name], seconds["one program"]) for name in seconds},
        "largest difference of logits": {name: float(np.abs(x - base).max()) for name, x in logits.items()},
        "largest effect of the adapters": float(
            np.abs(base - np.asarray(model.apply({"params": params}, tokens))[:, -1]).max()
        ),
    }


def _print(record: dict[str, Any]) -> None:
    peers = list(record["machine"]["peers"])
    table = Table("adapter", "numbers", "step (ms)", *(f"{x} over ours" for x in peers), "temporaries (MiB)", *peers)
    for label, found in record["steps"].items():
        kept = found["kept for the backward pass (bytes)"]
        table.add_row(
            label,
            f"{found['trained numbers']:,}",
            f"{1e3 * np.median(found['seconds per step']['ours']):.1f}",
            *(describe(found["over ours"][name]) for name in peers),
            f"{found['temporaries of our program (bytes)'] / 2**20:.1f}",
            *(f"keeps {kept[name] / 2**20:.1f}" for name in peers),
        )
    serving = record["serving"]
    ways = Table(f"{serving['adapters']} adapters", "ms", "over one program", "largest difference of logits")
    for name, seconds in serving["seconds"].items():
        apart = serving["largest difference of logits"][name]
        over = describe(serving["over one program"][name])
        ways.add_row(name, f"{1e3 * np.median(seconds):.1f}", over, f"{apart:.1e}")
    for shown in (table, ways):
        Console().print(shown)
