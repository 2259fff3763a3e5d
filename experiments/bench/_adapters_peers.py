"""The other side of ``bench adapters``: peft in a process of its own.

    python _adapters_peers.py peft FOLDER

It imports nothing from this repository. FOLDER holds ``model`` (a checkpoint that transformers opens), ``size.npz``,
and ``inputs.npz`` with tokens and the factors of the adapters to serve, kernels (in, out). It says on stdout that it
is ready, then answers lines of JSON:

- ``{"prompts": "step/ADAPTER", "cells": [STEPS]}``: seconds for so many steps from the start, the losses, and the bytes
  that autograd keeps for the backward pass of one (the model's own parameters apart);
- ``{"prompts": "serve/mixed" or "serve/calls", "cells": [1]}``: seconds, and the last token's logits of every text.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM

TARGETS = {
    **{f"attn/{name}": f"self_attn.{name}_proj" for name in "qkvo"},
    **{f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
MODULES = [name.rpartition(".")[2] for name in TARGETS.values()]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(folder: Path) -> None:
    # Libraries print; the answers go to the real stdout only.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    start = time.perf_counter()
    size = {name: x.item() for name, x in np.load(folder / "size.npz").items()}
    inputs = dict(np.load(folder / "inputs.npz"))
    tokens = torch.tensor(inputs.pop("tokens")).long().to(DEVICE)
    ready = {"version": version("peft"), "torch": torch.__version__, "threads": torch.get_num_threads()}
    trained = functools.cache(functools.partial(adapted, folder / "model", size))
    served = functools.cache(lambda: with_loras(folder / "model", size, inputs))
    print(json.dumps(ready | {"device": DEVICE, "seconds": time.perf_counter() - start}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        kind, _, name = asked["prompts"].partition("/")
        if kind == "step":
            reply = train(trained(name), tokens[: size["batch"]], size["rate"], asked["cells"][0])
        else:
            reply = serve(served(), tokens[: size["served"]], name == "mixed")
        print(json.dumps(reply), file=answers)


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)


def adapted(folder: Path, size: dict[str, Any], name: str) -> Any:
    """The model with one adapter to train, and what its trained parameters were at the start."""
    block = size["block"]
    low_rank: dict[str, Any] = {"r": block // 2, "lora_alpha": block // 2, "target_modules": MODULES}
    configs: dict[str, Any] = {
        "lora": lambda: peft.LoraConfig(**low_rank),
        "dora": lambda: peft.LoraConfig(**low_rank, use_dora=True),
        "pissa": lambda: peft.LoraConfig(**low_rank, init_lora_weights="pissa"),
        "olora": lambda: peft.LoraConfig(**low_rank, init_lora_weights="olora"),
        "bone_col": lambda: peft.MissConfig(r=block, init_weights="bat", target_modules=MODULES),
        "miss": lambda: peft.MissConfig(r=block, init_weights=True, target_modules=MODULES),
    }
    model: Any = peft.get_peft_model(base(folder), configs[name]())
    return model, [p.detach().clone() for p in model.parameters() if p.requires_grad]


def train(prepared: Any, tokens: torch.Tensor, rate: float, steps: int) -> dict[str, Any]:
    """Steps from the start, timed; then the bytes kept for one backward pass."""
    model, start = prepared
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
    optimiser = torch.optim.AdamW(parameters, rate, weight_decay=0.0)

    def loss() -> torch.Tensor:
        logits = model(tokens).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    values = []
    synchronise()
    before = time.perf_counter()
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        values.append(value.detach())
    synchronise()
    seconds = time.perf_counter() - before
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss()
    return {"seconds": seconds, "values": [float(value) for value in values], "bytes": sum(kept.values())}


def with_loras(folder: Path, size: dict[str, Any], factors: dict[str, np.ndarray]) -> Any:
    """The model with all the adapters to serve, named 0, 1 ..."""
    block = size["block"]
    config = peft.LoraConfig(r=block // 2, lora_alpha=block // 2, target_modules=MODULES)
    model: Any = peft.get_peft_model(base(folder), config, adapter_name="0")
    for index in range(1, size["served"]):
        model.add_adapter(str(index), config)
    for path, stacked in factors.items():
        _, part, kind, _, factor = path.split("/")  # blocks/attn/q/kernel/A
        for layer in range(stacked.shape[1]):
            module = model.get_submodule(f"base_model.model.model.layers.{layer}.{TARGETS[f'{part}/{kind}']}")
            weights = module.lora_A if factor == "A" else module.lora_B
            for index in range(size["served"]):
                weights[str(index)].weight.data = torch.tensor(stacked[index, layer].T.copy()).to(DEVICE)
    return model.eval()


@torch.no_grad()
def serve(model: Any, tokens: torch.Tensor, mixed: bool) -> dict[str, Any]:
    """One forward of a mixed batch, or one per text after switching adapters."""
    names = [str(index) for index in range(len(tokens))]
    synchronise()
    before = time.perf_counter()
    if mixed:
        logits = model(tokens, adapter_names=names).logits[:, -1]
    else:
        rows = []
        for name, text in zip(names, tokens, strict=True):
            model.set_adapter(name)
            rows.append(model(text[None]).logits[0, -1])
        logits = torch.stack(rows)
    synchronise()
    return {"seconds": time.perf_counter() - before, "values": logits.flatten().tolist()}


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(Path(sys.argv[2]))
