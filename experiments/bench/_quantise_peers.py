"""The other side of ``bench quantise``: the same searches by hand in PyTorch, in a process of its own.

    python _quantise_peers.py torch FOLDER DEVICE

It imports nothing from this repository. FOLDER holds ``arrays.npz``: x (N, I) and the kernels gate, up (I, H) and down
(H, I), and ``size.json`` with bits and group. It says on stdout that it is ready, then answers lines of JSON:
``{"prompts": CASE, "cells": [1]}`` gives ``{"seconds": s, "values": [...], "bytes": b}``: the seconds of one call, some
numbers of its result, and by how much the process grew beyond what it had held before its first call of this case.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

RATIOS = [i / 20 for i in range(20)]
SHRINK = [1 - t / 20 for t in range(10)]
CLIP_TOKENS = 512

Arrays = dict[str, torch.Tensor]


def main(peer: str, folder: Path, device: str) -> None:
    # Libraries print; the answers go to the real stdout only.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    start = time.perf_counter()
    torch.set_default_device(device)
    size = json.loads((folder / "size.json").read_text())
    arrays = {name: torch.tensor(array) for name, array in np.load(folder / "arrays.npz").items()}
    ready = {"version": version(peer), "threads": torch.get_num_threads()}
    print(json.dumps(ready | {"seconds": time.perf_counter() - start}), file=answers)
    grown: dict[str, int] = {}
    for line in sys.stdin:
        case = json.loads(line)["prompts"]
        before = peak_bytes(device)
        start = time.perf_counter()
        with torch.no_grad():
            values = CASES[case](arrays, size["bits"], size["group"]).flatten().tolist()
        seconds = time.perf_counter() - start
        grown.setdefault(case, peak_bytes(device) - before)
        print(json.dumps({"seconds": seconds, "values": values, "bytes": grown[case]}), file=answers)


def peak_bytes(device: str) -> int:
    """The most memory that was ever held; on a CPU that of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def grid(w: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and zero of the asymmetric grid along ``dim``."""
    least, most = w.amin(dim, keepdim=True), w.amax(dim, keepdim=True)
    step = (most - least).clamp(min=1e-5) / (2**bits - 1)
    return step, (-(least / step).round()).clamp(0, 2**bits - 1)


def nearest(w: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The nearest points of the grid."""
    step, zero = grid(w, bits, dim)
    return (((w / step).round() + zero).clamp(0, 2**bits - 1) - zero) * step


def rounded(kernel: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """A kernel (I, O) in groups of inputs."""
    return nearest(kernel.reshape(-1, group, kernel.shape[1]), bits, 1).reshape(kernel.shape)


def rounding(arrays: Arrays, bits: int, group: int) -> torch.Tensor:
    """Every kernel rounded; the mean square of the result."""
    return torch.stack([rounded(arrays[name], bits, group).square().mean() for name in ("gate", "up", "down")])


def scales(arrays: Arrays, bits: int, group: int) -> torch.Tensor:
    """AWQ's search for the scales of gate and up; the loss of every ratio."""
    x, down = arrays["x"], arrays["down"]

    def run(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (functional.silu(x @ gate) * (x @ up)) @ down

    size, wanted = x.abs().mean(0), run(arrays["gate"], arrays["up"])
    losses = []
    for alpha in RATIOS:
        s = size.pow(alpha).clamp(min=1e-4)
        s = (s / (s.max() * s.min()).sqrt())[:, None]
        kernels = (rounded(arrays[name] * s, bits, group) / s for name in ("gate", "up"))
        losses.append((run(*kernels) - wanted).square().mean())
    return torch.stack(losses)


def clip(arrays: Arrays, bits: int, group: int) -> torch.Tensor:
    """AWQ's search for the clipping of gate; the mean of what is kept over the largest."""
    x, kernel = arrays["x"], arrays["gate"]
    rows = torch.linspace(0, len(x) - 1, min(len(x), CLIP_TOKENS)).round().long()
    seen = x[rows].reshape(len(rows), -1, group).transpose(0, 1)
    cut = kernel.reshape(-1, group, kernel.shape[1])
    most, wanted = cut.abs().amax(1, keepdim=True), seen @ cut
    errors = []
    for shrink in SHRINK:
        clipped = torch.minimum(torch.maximum(cut, -shrink * most), shrink * most)
        errors.append((seen @ nearest(clipped, bits, 1) - wanted).square().mean(1))
    best = torch.stack(errors).argmin(0)
    return torch.tensor(SHRINK)[best].mean()[None]


def gptq(arrays: Arrays, bits: int, group: int) -> torch.Tensor:
    """GPTQ of gate with groups as they come; the mean squared error of what it gives."""
    x, w = arrays["x"], arrays["gate"].clone()
    hessian = (2 / len(x) * (x.T @ x)).double()
    damp = 0.01 * hessian.diagonal().mean()
    inverse = torch.linalg.inv(hessian + damp * torch.eye(len(w), dtype=torch.float64))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    result = torch.zeros_like(w)
    for start in range(0, len(w), group):
        stop = start + group
        block = w[start:stop].clone()
        with_zero = torch.cat([block, torch.zeros_like(block[:1])])
        step, zero = grid(with_zero, bits, 0)
        errors = torch.zeros_like(block)
        for i in range(group):
            q = (((block[i] / step[0]).round() + zero[0]).clamp(0, 2**bits - 1) - zero[0]) * step[0]
            result[start + i] = q
            errors[i] = (block[i] - q) / factor[start + i, start + i]
            block[i:] -= factor[start + i, start + i : stop, None] * errors[i]
        w[stop:] -= factor[start:stop, stop:].T @ errors
    return (x @ (result - arrays["gate"])).square().mean()[None]


CASES: dict[str, Callable[[Arrays, int, int], Any]] = {
    "rounding": rounding,
    "AWQ scales": scales,
    "AWQ clip": clip,
    "GPTQ": gptq,
}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
