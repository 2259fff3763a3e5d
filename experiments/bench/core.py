"""The cost of the core: sites, edits, captures, a patching sweep, compile time with depth, memory.

    python -m experiments bench core

A random decoder of GPT-2-small's shape. The peer of the sweep is the usual way: one compiled forward per cell, called
in a loop, both with our edit in it and with no edit at all (nothing to patch: the least a loop can cost).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.bench._timing import compile_seconds, describe, interleave, ratio, temporary_bytes
from mechlab.core.edits import Add, Replace, at
from mechlab.core.model import Model
from mechlab.methods.circuits.patching import patch_residual
from mechlab.models import blocks, layers, transformer
from mechlab.reporting.results import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured: the decoder, the prompt's length, timing repeats, the layers that the loop really runs."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    hidden: int = 3072
    vocabulary: int = 50257
    tokens: tuple[int, ...] = (15,)
    repeats: int = 3
    depths: tuple[int, ...] = (2, 8, 32)
    loop_layers: int = 12


SIZES = {
    "smoke": Size(
        layers=3, width=32, heads=4, hidden=64, vocabulary=101, tokens=(5,), repeats=2, depths=(2, 4), loop_layers=3
    ),
    "cpu": Size(),
    "accel": Size(tokens=(15, 64, 256), repeats=5),
}


def bench(preset: str, out: Path) -> dict[str, Any]:
    """Measure, print a table, write ``core.json``; see the module's docstring."""
    size = SIZES[preset]
    model = _decoder(size, size.layers)
    params = jax.jit(model.init)(jax.random.key(0))
    record = {
        "size": dataclasses.asdict(size),
        "sites": overhead(model, params, size),
        "sweep": {str(length): sweep(model, params, size, length) for length in size.tokens},
        "compile": compile_time(size),
        "memory": memory(model, params, size),
    }
    write_json(out / "core.json", record)
    _print(record)
    return record


def overhead(model: Model, params: Any, size: Size) -> dict[str, Any]:
    """A forward with sites, with an edit, and with a capture, each over the same forward with the sites removed."""
    tokens = _prompt(size, size.tokens[0], 0)
    edits = at(model.sites, "resid_post", Add(jnp.ones(size.width)), layer=1)

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens)

    def edited(params: Any, tokens: jax.Array) -> jax.Array:
        return model.apply({"params": params, "edits": edits}, tokens)

    def captured(params: Any, tokens: jax.Array) -> Any:
        return model.capture({"params": params}, tokens, sites=("resid_post",))

    bare = _without_sites(forward, params, tokens)
    compiled = {
        "bare": bare,
        "sites": jax.jit(forward).lower(params, tokens).compile(),
        "one edit": jax.jit(edited).lower(params, tokens).compile(),
        "one capture": jax.jit(captured).lower(params, tokens).compile(),
    }
    seconds = interleave({name: _call(f, params, tokens) for name, f in compiled.items()}, repeats=4 * size.repeats)
    ratios = {name: ratio(times, seconds["bare"]) for name, times in seconds.items() if name != "bare"}
    return {"seconds": {k: float(np.median(v)) for k, v in seconds.items()}, "ratio to no sites": ratios}


def sweep(model: Model, params: Any, size: Size, length: int) -> dict[str, Any]:
    """All layer x position patches as one program, against a loop of single forwards over the same cells."""
    tokens, clean = _prompt(size, length, 0), _prompt(size, length, 1)
    source = jax.jit(lambda p: model.capture({"params": p}, clean, sites=("resid_post",))[1]["resid_post"])(params)
    answers = jnp.asarray([1, 2])

    def difference(logits: jax.Array) -> jax.Array:
        return logits[:, answers[0]] - logits[:, answers[1]]

    @jax.jit
    def one_program(params: Any, source: jax.Array) -> jax.Array:
        return patch_residual(model, params, tokens, source, difference, batch=min(length, 64))

    @jax.jit
    def one_cell(params: Any, source: jax.Array, layer: jax.Array, position: jax.Array) -> jax.Array:
        patch = at(model.sites, "resid_post", Replace(source), layer=layer, position=position, stacked=True)
        return difference(model.apply({"params": params, "edits": patch}, tokens)[:, -1])

    @jax.jit
    def no_edit(params: Any) -> jax.Array:
        return difference(model.apply({"params": params}, tokens)[:, -1])

    cells = [(layer, position) for layer in range(size.loop_layers) for position in range(length)]
    # A long prompt has too many cells for a loop; a stated share of them stands for the whole.
    cells = cells[:: max(1, len(cells) // 360)]
    share = size.layers * length / len(cells)

    def loop() -> list[float]:
        return [float(one_cell(params, source, layer, position)[0]) for layer, position in cells]

    def plain_loop() -> list[float]:
        return [float(no_edit(params)[0]) for _ in cells]

    program = np.asarray(one_program(params, source))[..., 0]
    apart = max(abs(program[cell] - value) for cell, value in zip(cells, loop(), strict=True))
    seconds = interleave(
        {"one program": lambda: one_program(params, source), "loop": loop, "loop without edit": plain_loop},
        repeats=size.repeats,
    )
    for name in ("loop", "loop without edit"):
        seconds[name] = [share * s for s in seconds[name]]
    return {
        "cells": size.layers * length,
        "cells run in the loop": len(cells),
        "largest difference": float(apart),
        "seconds": {name: float(np.median(times)) for name, times in seconds.items()},
        "loop / one program": ratio(seconds["loop"], seconds["one program"]),
        "loop without edit / one program": ratio(seconds["loop without edit"], seconds["one program"]),
    }


def compile_time(size: Size) -> dict[str, float]:
    """Seconds to compile the gradient of a loss through the decoder, by depth; scanned layers keep it flat."""
    found = {}
    for depth in size.depths:
        model = _decoder(size, depth)
        params = jax.eval_shape(model.init, jax.random.key(0))
        tokens = _prompt(size, size.tokens[0], 0)

        def loss(params: Any, model: Model = model, tokens: jax.Array = tokens) -> jax.Array:
            return model.apply({"params": params}, tokens).mean()

        found[str(depth)] = compile_seconds(jax.grad(loss), params)
    return found


def memory(model: Model, params: Any, size: Size) -> dict[str, Any]:
    """Bytes of the compiled forward: nothing captured, one site, one large site, all sites."""
    tokens = _prompt(size, size.tokens[-1], 0)
    wanted = {"none": (), "resid_post": ("resid_post",), "attn_pattern": ("attn_pattern",), "all": tuple(model.sites)}

    def capture(sites: tuple[str, ...]) -> Callable[..., Any]:
        return lambda params: model.capture({"params": params}, tokens, sites=sites)

    return {name: temporary_bytes(capture(sites), params) for name, sites in wanted.items()}


def _decoder(size: Size, depth: int) -> Model:
    shape = {"width": size.width, "heads": size.heads, "hidden": size.hidden, "vocabulary": size.vocabulary}
    return transformer.transformer(transformer.gpt2(layers=depth, **shape))


def _prompt(size: Size, length: int, number: int) -> jax.Array:
    return jax.random.randint(jax.random.key(number), (1, length), 0, size.vocabulary)


def _without_sites(function: Callable[..., Any], *inputs: Any) -> Any:
    def untouched(module: Any, name: str, value: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        return value

    with contextlib.ExitStack() as stack:
        for each in (transformer, blocks, layers):
            stack.enter_context(mock.patch.object(each, "site", untouched))
        return jax.jit(function).lower(*inputs).compile()


def _call(function: Callable[..., Any], *inputs: Any) -> Callable[[], Any]:
    return lambda: function(*inputs)


def _print(record: dict[str, Any]) -> None:
    table = Table("measured", "value", title=f"core on {jax.devices()[0].device_kind}")
    for name, found in record["sites"]["ratio to no sites"].items():
        table.add_row(f"forward with {name}, over no sites", describe(found))
    for length, found in record["sweep"].items():
        table.add_row(
            f"{found['cells']} patches at {length} tokens, loop over one program", describe(found["loop / one program"])
        )
        table.add_row("  the same against a loop without edits", describe(found["loop without edit / one program"]))
        table.add_row("  largest difference of the two", f"{found['largest difference']:.1e}")
    for depth, seconds in record["compile"].items():
        table.add_row(f"compile a gradient, {depth} layers", f"{seconds:.2f} s")
    for name, found in record["memory"].items():
        table.add_row(f"temporaries + outputs, capturing {name}", f"{sum(found.values()) / 2**20:.2f} MiB")
    Console().print(table)
