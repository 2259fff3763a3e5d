"""The other side of ``bench ibp``: one peer in a process of its own, which runs the training steps it is asked for.

    python _ibp_peers.py PEER FOLDER DEVICE

It imports nothing from this repository. FOLDER holds ``batch.npz`` (x, y) and, by network, ``layers.json`` and
``arrays.npz`` in our layouts, kernels (in, out) and HWIO. It says on stdout that it is ready, then answers lines of
JSON: ``{"prompts": "NETWORK/ibp" or "NETWORK/crown", "cells": [STEPS]}`` gives ``{"seconds": s, "values": [...]}``:
seconds for so many steps from the stored weights, and the margins of the first one (B (K − 1)); no values where the
peer does not offer such bounds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

RATE, EPS = 1e-3, 0.1

Margins = Callable[[], torch.Tensor]


def main(peer: str, folder: Path, device: str) -> None:
    # Libraries print; the answers go to the real stdout only.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_default_device(device)
    start = time.perf_counter()
    prepare = PEERS[peer]
    batch = np.load(folder / "batch.npz")
    x, y = torch.tensor(batch["x"]).permute(0, 3, 1, 2).contiguous(), torch.tensor(batch["y"]).long()
    ready = {"version": version(peer), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(ready | {"seconds": time.perf_counter() - start}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        network, kind = asked["prompts"].rsplit("/", 1)
        prepared = prepare(stored(folder / network, x), x, y, kind == "crown")
        if prepared is None:
            print(json.dumps({"seconds": 0.0, "values": []}), file=answers)
            continue
        parameters, margins_of = prepared
        seconds, values = train(parameters, margins_of, asked["cells"][0])
        print(json.dumps({"seconds": seconds, "values": values.flatten().tolist()}), file=answers)


def train(parameters: Any, margins_of: Margins, steps: int) -> tuple[float, torch.Tensor]:
    """Seconds of some steps, and the margins of the first."""
    optimiser = torch.optim.Adam(parameters, RATE)
    first = None
    start = time.perf_counter()
    for _ in range(steps):
        margins = margins_of()
        first = margins.detach().clone() if first is None else first
        loss = nn.functional.pad(-margins, (1, 0)).logsumexp(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert first is not None
    first = first.cpu()  # an accelerator has then finished every step
    return time.perf_counter() - start, first


def stored(folder: Path, x: torch.Tensor) -> nn.Sequential:
    """The stored network in PyTorch's layouts, in training mode."""
    arrays = np.load(folder / "arrays.npz")
    layers: list[nn.Module] = []
    image: torch.Size | None = None
    with torch.no_grad():
        for index, spec in enumerate(json.loads((folder / "layers.json").read_text())):
            take = {key.split(".")[1]: torch.tensor(arrays[key]) for key in arrays if key.startswith(f"{index}.")}
            layer = KINDS[spec.pop("kind")](take, x, **spec)
            layers.append(layer)
            if image is not None:  # the layer after a Flatten
                _reorder(layer, image)
            image = x.shape if isinstance(layer, nn.Flatten) else None
            x = layer(x)
    for layer in layers:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_running_stats()
    return nn.Sequential(*layers).train()


def _reorder(layer: Any, image: torch.Size) -> None:
    """Ours flattens (X, Y, C), PyTorch (C, X, Y)."""
    channels, rows, columns = image[1:]
    weight = layer.weight.reshape(-1, rows, columns, channels).permute(0, 3, 1, 2)
    layer.weight.copy_(weight.reshape(layer.weight.shape))


def _conv(take: dict[str, torch.Tensor], x: torch.Tensor, stride: int, padding: int) -> nn.Module:
    height, width, inputs, outputs = take["kernel"].shape
    layer: Any = nn.Conv2d(inputs, outputs, (height, width), stride, padding)
    layer.weight.copy_(take["kernel"].permute(3, 2, 0, 1))
    layer.bias.copy_(take["bias"])
    return layer


def _dense(take: dict[str, torch.Tensor], x: torch.Tensor) -> nn.Module:
    layer: Any = nn.Linear(*take["kernel"].shape)
    layer.weight.copy_(take["kernel"].T)
    layer.bias.copy_(take["bias"])
    return layer


def _norm(take: dict[str, torch.Tensor], x: torch.Tensor) -> nn.Module:
    layer = (nn.BatchNorm2d if x.ndim == 4 else nn.BatchNorm1d)(len(take["scale"]))
    layer.weight.copy_(take["scale"])
    layer.bias.copy_(take["bias"])
    return layer


KINDS: dict[str, Any] = {
    "Conv": _conv,
    "Dense": _dense,
    "BatchNorm": _norm,
    "ReLU": lambda take, x: nn.ReLU(),
    "Flatten": lambda take, x: nn.Flatten(),
}


def specification(y: torch.Tensor, classes: int) -> torch.Tensor:
    """(B, K − 1, K): rows e_y − e_k for k ≠ y, ascending."""
    rows = torch.eye(classes)[y].unsqueeze(1) - torch.eye(classes).unsqueeze(0)
    return rows[y[:, None] != torch.arange(classes)].view(len(y), classes - 1, classes)


def auto_lirpa(net: nn.Sequential, x: torch.Tensor, y: torch.Tensor, crown: bool) -> tuple[Any, Margins]:
    """auto_LiRPA's bounds: interval propagation, or one backward pass on top of it."""
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

    model: Any = BoundedModule(net, x)
    model.train()
    low, high = (x - EPS).clamp(min=0), (x + EPS).clamp(max=1)
    box = BoundedTensor(x, PerturbationLpNorm(norm=np.inf, eps=EPS, x_L=low, x_U=high))
    asked = specification(y, 10)

    def margins() -> torch.Tensor:
        model(box)
        found = model.compute_bounds(IBP=True, C=asked, method=None)[0]
        return model.compute_bounds(IBP=False, C=asked, method="backward", bound_upper=False)[0] if crown else found

    return model.parameters(), margins


def by_hand(net: nn.Sequential, x: torch.Tensor, y: torch.Tensor, crown: bool) -> tuple[Any, Margins] | None:
    """Interval bounds as a careful user writes them in PyTorch: clean pass and box together, last layer fused."""
    if crown:
        return None
    low, high = (x - EPS).clamp(min=0), (x + EPS).clamp(max=1)
    asked = specification(y, 10)
    layers: list[Any] = list(net)
    *hidden, head = layers

    def margins() -> torch.Tensor:
        clean, centre, radius = x, (low + high) / 2, (high - low) / 2
        for layer in hidden:
            if isinstance(layer, nn.ReLU):
                lower, upper = (centre - radius).relu(), (centre + radius).relu()
                clean, centre, radius = clean.relu(), (lower + upper) / 2, (upper - lower) / 2
            elif isinstance(layer, nn.Flatten):
                clean, centre, radius = clean.flatten(1), centre.flatten(1), radius.flatten(1)
            elif isinstance(layer, nn.Conv2d):
                around: Any = {"stride": layer.stride, "padding": layer.padding}
                radius = nn.functional.conv2d(radius, layer.weight.abs(), None, **around)
                clean, centre = layer(clean), layer(centre)
            elif isinstance(layer, nn.Linear):
                radius = nn.functional.linear(radius, layer.weight.abs())
                clean, centre = layer(clean), layer(centre)
            elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                axes = [axis for axis in range(clean.ndim) if axis != 1]
                variance, mean = torch.var_mean(clean, axes, correction=0)
                count = clean.numel() // clean.shape[1]
                running: Any = (layer.running_mean, layer.running_var)
                with torch.no_grad():
                    running[0].lerp_(mean, 0.1)
                    running[1].lerp_(variance * count / (count - 1), 0.1)
                wide = (1, -1, *(1,) * (clean.ndim - 2))
                scale = layer.weight / (variance + layer.eps).sqrt()
                shift = (layer.bias - scale * mean).view(wide)
                scale = scale.view(wide)
                clean, centre, radius = scale * clean + shift, scale * centre + shift, scale.abs() * radius
            else:
                raise TypeError(type(layer).__name__)
        rows = asked @ head.weight
        return (rows @ centre.unsqueeze(-1) - rows.abs() @ radius.unsqueeze(-1)).squeeze(-1) + asked @ head.bias

    return net.parameters(), margins


PEERS: dict[str, Any] = {"auto_LiRPA": auto_lirpa, "torch": by_hand}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
