"""Timing: alternatives interleaved in one run, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def interleave(functions: Mapping[str, Callable[[], Any]], *, repeats: int) -> dict[str, list[float]]:
    """Wall seconds of every function, run in turn ``repeats`` times, after one run each to compile and warm up."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Ratios of paired timings: median, and the smallest and largest of the pairs as the spread."""
    pairs = np.asarray(numerator) / np.asarray(denominator)
    return {"median": float(np.median(pairs)), "low": float(pairs.min()), "high": float(pairs.max())}


def compile_seconds(function: Callable[..., Any], *inputs: Any) -> float:
    """Seconds to trace, lower and compile ``function`` with the persistent cache off."""
    cached = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        start = time.perf_counter()
        jax.jit(function).lower(*inputs).compile()
        return time.perf_counter() - start
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def temporary_bytes(function: Callable[..., Any], *inputs: Any) -> dict[str, int]:
    """What the compiled program allocates: outputs and temporaries, in bytes."""
    memory: Any = jax.jit(function).lower(*inputs).compile().memory_analysis()
    return {"output": int(memory.output_size_in_bytes), "temporary": int(memory.temp_size_in_bytes)}


class Stopwatch:
    """A log for ``fit`` that notes when each segment ended."""

    def __init__(self) -> None:
        self.directory: Path | None = None
        self._ends: list[tuple[int, float]] = []

    @contextlib.contextmanager
    def track(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """See ``training.loop.Progress``."""
        yield lambda done, **numbers: self._ends.append((done, time.perf_counter()))

    def seconds_per_step(self) -> float:
        """Seconds per step after the first segment, which compiles."""
        (first, start), (last, end) = self._ends[0], self._ends[-1]
        return (end - start) / (last - first)


def describe(measured: dict[str, float]) -> str:
    """``4.2x (3.9-4.4)``."""
    return f"{measured['median']:.2f}x ({measured['low']:.2f}-{measured['high']:.2f})"


def matmul_peak(inputs: int, outputs: int, rows: int = 2048) -> float:
    """FLOP per second of one float32 matrix product alone, (rows, inputs) by (inputs, outputs), the best of several."""
    a, b = jnp.ones((rows, inputs)), jnp.ones((inputs, outputs))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, b))
    best = np.inf
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(product(a, b))
        best = min(best, time.perf_counter() - start)
    return 2 * rows * inputs * outputs / best
