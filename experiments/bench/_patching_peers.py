"""The other side of ``bench patching``: one peer in a process of its own, which measures what it is asked to.

    python _patching_peers.py PEER FOLDER DEVICE

It imports nothing from this repository, so that a peer may need other versions than we do. FOLDER holds a GPT-2
checkpoint (``config.json``, ``model.safetensors``) and ``prompts-NAME.npz`` (tokens, clean, answers). It says on stdout
that it is ready, then answers lines of JSON: ``{"prompts": NAME, "cells": [[site, layer, head, position], ...]}`` gives
``{"seconds": s, "values": [...]}``. A position of -1 means all of them; the residual stream has head -1. The metric is
the mean over prompts of logit[answer 0] - logit[answer 1] at the last position.
"""

from __future__ import annotations

import functools
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

Cell = tuple[str, int, int, int]
TL_NAMES = {"resid_pre": "resid_pre", "attn_z": "z", "q": "q", "k": "k", "v": "v", "attn_pattern": "pattern"}
BATCH = 12
"""Cells of one batch, where a peer takes several."""


def main(peer: str, folder: Path, device: str) -> None:
    # Libraries print; the answers go to the real stdout only.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_grad_enabled(False)
    torch.set_default_device(device)
    package = {"torch.compile": "torch"}.get(peer, peer)
    start = time.perf_counter()
    prepare = PEERS[peer](folder)
    ready = {"version": version(package), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(ready | {"seconds": time.perf_counter() - start}), file=answers)
    runs: dict[str, Callable[[list[Cell]], np.ndarray]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        name = asked["prompts"]
        if name not in runs:
            prompts = np.load(folder / f"prompts-{name}.npz")
            runs[name] = prepare(**{key: torch.tensor(prompts[key]).long() for key in ("tokens", "clean", "answers")})
        start = time.perf_counter()
        values = runs[name]([tuple(cell) for cell in asked["cells"]])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "values": np.asarray(values, float).tolist()}), file=answers)


def difference(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """The metric, of logits (B, V) at the last position."""
    rows = torch.arange(len(answers))
    return (logits[rows, answers[:, 0]] - logits[rows, answers[:, 1]]).mean()


def hugging_face(folder: Path, attention: str = "sdpa") -> Any:
    """The checkpoint in transformers' own GPT-2."""
    from transformers import GPT2LMHeadModel

    model: Any = GPT2LMHeadModel.from_pretrained(folder, attn_implementation=attention)
    return model.to(torch.get_default_device()).eval()


def transformer_lens(folder: Path) -> Any:
    """TransformerLens' own patching functions: TransformerBridge, or in 2.x HookedTransformer; one forward per cell.

    Its functions loop over a table of cells; the same table is passed, limited to the cells asked for.
    """
    import pandas
    from transformer_lens import patching

    if int(version("transformer_lens").split(".")[0]) >= 3:
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        inner = hugging_face(folder, "eager")
        model: Any = build_bridge_from_module(inner, "GPT2LMHeadModel", hf_config=inner.config)
    else:
        model = _hooked_transformer(folder)

    def prepare(tokens: torch.Tensor, clean: torch.Tensor, answers: torch.Tensor) -> Any:
        cache = model.run_with_cache(clean)[1]

        def metric(logits: torch.Tensor) -> torch.Tensor:
            return difference(logits[:, -1], answers)

        def run(cells: list[Cell]) -> np.ndarray:
            found = []
            for (site, everywhere), some in groupby(cells, lambda cell: (cell[0], cell[3] == -1)):
                setter, columns = _setter(patching, site, everywhere)
                rows = [dict(zip(("layer", "head", "pos"), cell[1:], strict=True)) for cell in some]
                table = pandas.DataFrame(rows)[list(columns)]
                found.append(
                    patching.generic_activation_patch(
                        model, tokens, cache, metric, setter, TL_NAMES[site], index_df=table
                    ).numpy(force=True)
                )
            return np.concatenate(found)

        return run

    return prepare


def _setter(patching: Any, site: str, everywhere: bool) -> tuple[Any, tuple[str, ...]]:
    """The function that TransformerLens patches this kind of cell with, and the order of its index."""
    if site == "resid_pre":
        return patching.layer_pos_patch_setter, ("layer", "pos")
    if site == "attn_pattern":
        if everywhere:
            return patching.layer_head_pattern_patch_setter, ("layer", "head")
        return patching.layer_head_pos_pattern_patch_setter, ("layer", "head", "pos")
    if everywhere:
        return patching.layer_head_vector_patch_setter, ("layer", "head")
    return patching.layer_pos_head_vector_patch_setter, ("layer", "pos", "head")


def _hooked_transformer(folder: Path) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    inner = hugging_face(folder)
    shape = inner.config
    config = HookedTransformerConfig(
        n_layers=shape.n_layer,
        d_model=shape.n_embd,
        n_heads=shape.n_head,
        d_head=shape.n_embd // shape.n_head,
        d_mlp=4 * shape.n_embd if shape.n_inner is None else shape.n_inner,
        d_vocab=shape.vocab_size,
        n_ctx=shape.n_positions,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=shape.layer_norm_epsilon,
        device=str(torch.get_default_device()),
    )
    model = HookedTransformer(config)
    # Unprocessed, so that activations are those of the other peers.
    model.load_and_process_state_dict(
        convert_gpt2_weights(inner, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


def nnsight(folder: Path) -> Any:
    """nnsight around transformers' GPT-2: one trace per batch of cells of a layer, the prompts repeated for each."""
    from nnsight import NNsight

    model: Any = NNsight(hugging_face(folder))
    layers, width, heads = (getattr(model.config, name) for name in ("n_layer", "n_embd", "n_head"))
    head_width = width // heads
    part = {"q": 0, "k": 1, "v": 2}

    def prepare(tokens: torch.Tensor, clean: torch.Tensor, answers: torch.Tensor) -> Any:
        kept: list[Any] = []
        with model.trace(clean):
            for layer in range(layers):
                block = model.transformer.h[layer]
                resid = block.input.save()
                qkv = block.attn.c_attn.output.save()
                kept.append((resid, qkv, block.attn.c_proj.input.save()))
        count = len(tokens)

        def run(cells: list[Cell]) -> np.ndarray:
            found = []
            for (site, layer), some in _batches(cells):
                block = model.transformer.h[layer]
                with model.trace(tokens.repeat(len(some), 1)):
                    if site == "resid_pre":
                        target, source = block.input, kept[layer][0]
                    elif site == "attn_z":
                        target, source = block.attn.c_proj.input, kept[layer][2]
                    else:
                        target, source = block.attn.c_attn.output, kept[layer][1]
                    for number, (_, _, head, position) in enumerate(some):
                        rows = slice(number * count, (number + 1) * count)
                        where = slice(None) if position == -1 else position
                        first = part.get(site, 0) * width + head * head_width
                        units = slice(None) if head == -1 else slice(first, first + head_width)
                        target[rows, where, units] = source[:, where, units]
                    logits = model.lm_head.output[:, -1].save()
                found += [difference(x, answers) for x in logits.split(count)]
            return torch.stack(found).numpy(force=True)

        return run

    return prepare


def _batches(cells: list[Cell]) -> list[tuple[tuple[str, int], list[Cell]]]:
    """Neighbouring cells of one site and layer, at most ``BATCH`` together."""
    found = []
    for key, some in groupby(cells, lambda cell: cell[:2]):
        together = list(some)
        found += [(key, together[i : i + BATCH]) for i in range(0, len(together), BATCH)]
    return found


def by_hand(folder: Path, compiled: bool = False) -> Any:
    """PyTorch batched by hand: cells of a layer are one batch that starts at that layer; only the answers' logits.

    It is what a careful user writes: fused attention wherever the pattern is not patched, no hooks, nothing computed
    below the patched layer, one unembedded position, one transfer at the end.
    """
    functional = torch.nn.functional
    model = hugging_face(folder)
    weights = dict(model.named_parameters())
    layers, heads = model.config.n_layer, model.config.n_head
    eps = model.config.layer_norm_epsilon
    names = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    blocks = [
        [weights[f"transformer.h.{layer}.{name}.{kind}"] for name in names for kind in ("weight", "bias")]
        for layer in range(layers)
    ]

    def normed(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], scale, bias, eps)

    def project(x: torch.Tensor, block: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        qkv = normed(x, block[0], block[1]) @ block[2] + block[3]
        return tuple(part.unflatten(-1, (heads, -1)).transpose(-2, -3) for part in qkv.chunk(3, -1))

    def leave(x: torch.Tensor, z: torch.Tensor, block: list[torch.Tensor]) -> torch.Tensor:
        x = x + (z.transpose(-2, -3).flatten(-2) @ block[4] + block[5])
        hidden = functional.gelu(normed(x, block[6], block[7]) @ block[8] + block[9], approximate="tanh")
        return x + (hidden @ block[10] + block[11])

    def whole(x: torch.Tensor, block: list[torch.Tensor]) -> torch.Tensor:
        q, k, v = project(x, block)
        return leave(x, functional.scaled_dot_product_attention(q, k, v, is_causal=True), block)

    def pattern_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        return ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf).softmax(-1)

    layer_of = torch.compile(whole) if compiled else whole

    def prepare(tokens: torch.Tensor, clean: torch.Tensor, answers: torch.Tensor) -> Any:
        def record(tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
            x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][: tokens.shape[1]]
            kept = []
            for block in blocks:
                q, k, v = project(x, block)
                pattern = pattern_of(q, k)
                kept.append({"resid_pre": x, "q": q, "k": k, "v": v, "attn_pattern": pattern, "attn_z": pattern @ v})
                x = leave(x, pattern @ v, block)
            return kept

        source = record(clean)
        chosen = weights["transformer.wte.weight"][answers]

        def run(cells: list[Cell]) -> np.ndarray:
            base = record(tokens)
            found = []
            for (site, layer), some in _batches(cells):
                acts = base[layer]
                patched = acts[site].repeat(len(some), 1, *(1 for _ in acts[site].shape[2:]))
                patched = patched.unflatten(0, (len(some), -1))
                for number, (_, _, head, position) in enumerate(some):
                    where = slice(None) if position == -1 else position
                    index = (slice(None), where) if head == -1 else (slice(None), head, where)
                    patched[number][index] = source[layer][site][index]
                x = _resume(site, patched, acts, blocks[layer]).flatten(0, 1)
                for later in blocks[layer + (site != "resid_pre") :]:
                    x = layer_of(x, later)
                last = normed(x[:, -1], weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"])
                logits = torch.einsum("cbd,bad->cba", last.unflatten(0, (len(some), -1)), chosen)
                found.append((logits[..., 0] - logits[..., 1]).mean(-1))
            return torch.cat(found).numpy(force=True)

        def _resume(
            site: str, patched: torch.Tensor, acts: dict[str, torch.Tensor], block: list[torch.Tensor]
        ) -> torch.Tensor:
            if site == "resid_pre":
                return patched
            if site == "attn_z":
                z = patched
            elif site == "attn_pattern":
                z = patched @ acts["v"]
            else:
                q, k, v = (patched if name == site else acts[name] for name in "qkv")
                z = pattern_of(q, k) @ v
            return leave(acts["resid_pre"], z, block)

        return run

    return prepare


PEERS: dict[str, Callable[[Path], Any]] = {
    "transformer_lens": transformer_lens,
    "nnsight": nnsight,
    "torch": by_hand,
    "torch.compile": functools.partial(by_hand, compiled=True),
}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
