"""The other side of ``bench steering``: one peer in a process of its own.

    python _steering_peers.py PEER FOLDER DEVICE

It imports nothing from this repository. FOLDER holds a GPT-2 checkpoint and ``inputs.npz``: tokens (B, T) and a vector
(L, D) that is added to the residual stream after a block. It says on stdout that it is ready, then answers lines of
JSON:

- ``{"prompts": "grid", "cells": [[LAYER, STRENGTH], ...]}``: seconds, and logits of tokens 3 and 7 after the prompt;
- ``{"prompts": "generate", "cells": [LAYER, STRENGTH, STEPS]}``: seconds, and the tokens written (repeng only).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

ANSWERS = [3, 7]


def main(peer: str, folder: Path, device: str) -> None:
    # Libraries print; the answers go to the real stdout only.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_grad_enabled(False)
    torch.set_default_device(device)
    start = time.perf_counter()
    inputs = np.load(folder / "inputs.npz")
    tokens, vector = torch.tensor(inputs["tokens"]).long(), torch.tensor(inputs["vector"])
    ways = PEERS[peer](folder, tokens, vector)
    ready = {"version": version(peer), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(ready | {"seconds": time.perf_counter() - start}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        values = ways[asked["prompts"]](asked["cells"]).tolist()
        print(json.dumps({"seconds": time.perf_counter() - start, "values": values}), file=answers)


def hugging_face(folder: Path) -> Any:
    """The checkpoint in transformers' own GPT-2."""
    from transformers import GPT2LMHeadModel

    model: Any = GPT2LMHeadModel.from_pretrained(folder)
    return model.to(torch.get_default_device()).eval()


def repeng(folder: Path, tokens: torch.Tensor, vector: torch.Tensor) -> dict[str, Callable[..., torch.Tensor]]:
    """A ControlModel: set the control of a layer, run, set the next."""
    from repeng import ControlModel

    model = ControlModel(hugging_face(folder), range(len(vector)))
    silent = torch.zeros_like(vector)

    def control(layer: int, strength: float) -> None:
        values = silent.clone()
        values[layer] = strength * vector[layer]
        model.set_raw_control(dict(enumerate(values)))

    def grid(cells: list[Any]) -> torch.Tensor:
        found = []
        for layer, strength in cells:
            control(layer, strength)
            found.append(model(tokens).logits[:, -1, ANSWERS])
        return torch.stack(found)

    def generate(cell: list[Any]) -> torch.Tensor:
        layer, strength, steps = cell
        if strength:
            control(layer, strength)
        else:
            model.reset()
        written: Any = model.generate(
            tokens[:1],
            attention_mask=torch.ones_like(tokens[:1]),
            do_sample=False,
            max_new_tokens=steps,
            min_new_tokens=steps,
            pad_token_id=0,
            eos_token_id=None,
        )
        return written[0, tokens.shape[1] :]

    return {"grid": grid, "generate": generate}


def transformer_lens(folder: Path, tokens: torch.Tensor, vector: torch.Tensor) -> dict[str, Any]:
    """A hook that adds to hook_resid_post, one forward per cell."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    inner = hugging_face(folder)
    model: Any = build_bridge_from_module(inner, "GPT2LMHeadModel", hf_config=inner.config)

    def grid(cells: list[Any]) -> torch.Tensor:
        found = []
        for layer, strength in cells:
            added = strength * vector[layer]
            hooks = [(f"blocks.{layer}.hook_resid_post", lambda x, hook, added=added: x + added)]
            found.append(model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1, ANSWERS])
        return torch.stack(found)

    return {"grid": grid}


def by_hand(folder: Path, tokens: torch.Tensor, vector: torch.Tensor) -> dict[str, Any]:
    """PyTorch batched by hand: the strengths of a layer are one batch, the vector is added by a forward hook."""
    model = hugging_face(folder)

    def grid(cells: list[Any]) -> torch.Tensor:
        found = []
        for layer, some in groupby(cells, lambda cell: cell[0]):
            strengths = torch.tensor([cell[1] for cell in some])
            added = (strengths[:, None] * vector[layer]).repeat_interleave(len(tokens), 0)[:, None]

            def add(module: Any, inputs: Any, output: Any, added: torch.Tensor = added) -> Any:
                return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

            handle = model.transformer.h[layer].register_forward_hook(add)
            rows = tokens.repeat(len(strengths), 1)
            logits = model(rows, logits_to_keep=1).logits[:, 0, ANSWERS]
            handle.remove()
            found.append(logits.unflatten(0, (len(strengths), len(tokens))))
        return torch.cat(found)

    return {"grid": grid}


PEERS = {"repeng": repeng, "transformer_lens": transformer_lens, "torch": by_hand}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
