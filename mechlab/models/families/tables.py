"""Families of hub checkpoints: which tensor holds which parameter, under which name.

A table lists tensors by their name in a checkpoint, ``{}`` for the layer, with the paths of our parameters. A row whose
parameters a config does not have (biases, an untied unembedding) is left out for that config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from mechlab.models.clip import clip_model
from mechlab.models.families import images, text
from mechlab.models.families.fields import Fields
from mechlab.models.families.layouts import (
    BY_HEAD,
    BY_HEAD_BIAS,
    CONV1D,
    CONV1D_OUT,
    DENSE,
    DENSE_OUT,
    FLAT,
    FROM_ROW_2,
    ONE_IMAGE,
    ONE_TOKEN,
    PATCH,
    SAME,
    Layout,
)
from mechlab.models.transformer import transformer
from mechlab.models.vit import vit


class Row(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
      tensor: its name; ``{}`` stands for the layer.
      paths: of our parameters in it; those of a layer have a leading axis L.
      layout: how it holds them.
    """

    tensor: str
    paths: tuple[str, ...]
    layout: Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What is needed to open and to write the checkpoints of one ``model_type``.

    Attributes:
      read, write: from and to the fields of config.json.
      tensors: the table.
      build: config to model.
      prefix: of tensor names, absent in some checkpoints.
      ignored: pattern of names that hold nothing we read: buffers, heads of other tasks.
    """

    read: Callable[[Fields], Any]
    write: Callable[[Any], dict[str, Any]]
    tensors: tuple[Row, ...]
    build: Callable[[Any], Any] = transformer
    prefix: str = "model."
    ignored: str = r"lm_head\.weight|rotary_emb\.inv_freq"


def _linear(tensor: str, *paths: str, layout: Layout = DENSE, bias: Layout = FLAT) -> tuple[Row, Row]:
    kernels, biases = (tuple(f"{path}/{leaf}" for path in paths) for leaf in ("kernel", "bias"))
    return Row(f"{tensor}.weight", kernels, layout), Row(f"{tensor}.bias", biases, bias)


def _norm(tensor: str, path: str) -> tuple[Row, Row]:
    return Row(f"{tensor}.weight", (f"{path}/scale",), FLAT), Row(f"{tensor}.bias", (f"{path}/bias",), FLAT)


def _table(tensor: str, path: str, layout: Layout = SAME) -> Row:
    return Row(tensor, (path,), layout)


_QKV = ("blocks/attn/q", "blocks/attn/k", "blocks/attn/v")

_GPT2 = (
    _table("transformer.wte.weight", "embed/tokens"),
    _table("transformer.wpe.weight", "embed/positions"),
    *_norm("transformer.h.{}.ln_1", "blocks/norm_attn"),
    *_linear("transformer.h.{}.attn.c_attn", *_QKV, layout=CONV1D),
    *_linear("transformer.h.{}.attn.c_proj", "blocks/attn/o", layout=CONV1D_OUT),
    *_norm("transformer.h.{}.ln_2", "blocks/norm_mlp"),
    *_linear("transformer.h.{}.mlp.c_fc", "blocks/mlp/up", layout=CONV1D),
    *_linear("transformer.h.{}.mlp.c_proj", "blocks/mlp/down", layout=CONV1D),
    *_norm("transformer.ln_f", "final_norm"),
    *_linear("lm_head", "unembed"),
)


def _separate(block: str, ours: str = "blocks", o: str = "out_proj") -> tuple[Row, ...]:
    """q, k, v and o as maps of their own, the commonest names."""
    return (
        *(row for name in "qkv" for row in _linear(f"{block}.self_attn.{name}_proj", f"{ours}/attn/{name}")),
        *_linear(f"{block}.self_attn.{o}", f"{ours}/attn/o", layout=DENSE_OUT),
    )


_OPT = (
    _table("model.decoder.embed_tokens.weight", "embed/tokens"),
    _table("model.decoder.embed_positions.weight", "embed/positions", FROM_ROW_2),
    *_separate("model.decoder.layers.{}"),
    *_norm("model.decoder.layers.{}.self_attn_layer_norm", "blocks/norm_attn"),
    *_linear("model.decoder.layers.{}.fc1", "blocks/mlp/up"),
    *_linear("model.decoder.layers.{}.fc2", "blocks/mlp/down"),
    *_norm("model.decoder.layers.{}.final_layer_norm", "blocks/norm_mlp"),
    *_norm("model.decoder.final_layer_norm", "final_norm"),
    *_linear("lm_head", "unembed"),
)

_GPT_NEOX = (
    _table("gpt_neox.embed_in.weight", "embed/tokens"),
    *_norm("gpt_neox.layers.{}.input_layernorm", "blocks/norm_attn"),
    *_linear("gpt_neox.layers.{}.attention.query_key_value", *_QKV, layout=BY_HEAD, bias=BY_HEAD_BIAS),
    *_linear("gpt_neox.layers.{}.attention.dense", "blocks/attn/o", layout=DENSE_OUT),
    *_norm("gpt_neox.layers.{}.post_attention_layernorm", "blocks/norm_mlp"),
    *_linear("gpt_neox.layers.{}.mlp.dense_h_to_4h", "blocks/mlp/up"),
    *_linear("gpt_neox.layers.{}.mlp.dense_4h_to_h", "blocks/mlp/down"),
    *_norm("gpt_neox.final_layer_norm", "final_norm"),
    *_linear("embed_out", "unembed"),
)

_LLAMA_ENDS = (
    _table("model.embed_tokens.weight", "embed/tokens"),
    *_norm("model.layers.{}.input_layernorm", "blocks/norm_attn"),
    *_linear("model.layers.{}.mlp.down_proj", "blocks/mlp/down"),
    *_norm("model.norm", "final_norm"),
    *_linear("lm_head", "unembed"),
)

_LLAMA_MAPS = (
    *_LLAMA_ENDS,
    *_separate("model.layers.{}", o="o_proj"),
    *_norm("model.layers.{}.self_attn.q_norm", "blocks/attn/norm_q"),
    *_norm("model.layers.{}.self_attn.k_norm", "blocks/attn/norm_k"),
    *_linear("model.layers.{}.mlp.gate_proj", "blocks/mlp/gate"),
    *_linear("model.layers.{}.mlp.up_proj", "blocks/mlp/up"),
)

_LLAMA = (*_LLAMA_MAPS, *_norm("model.layers.{}.post_attention_layernorm", "blocks/norm_mlp"))

# The same names as Llama's, but "post_attention" is the norm after attention, not the one before the MLP.
_GEMMA2 = (
    *_LLAMA_MAPS,
    *_norm("model.layers.{}.post_attention_layernorm", "blocks/attn/norm_out"),
    *_norm("model.layers.{}.pre_feedforward_layernorm", "blocks/norm_mlp"),
    *_norm("model.layers.{}.post_feedforward_layernorm", "blocks/mlp/norm_out"),
)

_PHI3 = (
    *_LLAMA_ENDS,
    *_norm("model.layers.{}.post_attention_layernorm", "blocks/norm_mlp"),
    *_linear("model.layers.{}.self_attn.qkv_proj", *_QKV),
    *_linear("model.layers.{}.self_attn.o_proj", "blocks/attn/o", layout=DENSE_OUT),
    *_linear("model.layers.{}.mlp.gate_up_proj", "blocks/mlp/gate", "blocks/mlp/up"),
)

_BERT = (
    _table("embeddings.word_embeddings.weight", "embed/tokens"),
    _table("embeddings.position_embeddings.weight", "embed/positions"),
    _table("embeddings.token_type_embeddings.weight", "embed/types"),
    *_norm("embeddings.LayerNorm", "embed/norm"),
    *_linear("encoder.layer.{}.attention.self.query", "blocks/attn/q"),
    *_linear("encoder.layer.{}.attention.self.key", "blocks/attn/k"),
    *_linear("encoder.layer.{}.attention.self.value", "blocks/attn/v"),
    *_linear("encoder.layer.{}.attention.output.dense", "blocks/attn/o", layout=DENSE_OUT),
    *_norm("encoder.layer.{}.attention.output.LayerNorm", "blocks/norm_attn"),
    *_linear("encoder.layer.{}.intermediate.dense", "blocks/mlp/up"),
    *_linear("encoder.layer.{}.output.dense", "blocks/mlp/down"),
    *_norm("encoder.layer.{}.output.LayerNorm", "blocks/norm_mlp"),
)


def _vit(name: str) -> tuple[Row, ...]:
    block = f"{name}.encoder.layer.{{}}"
    return (
        _table(f"{name}.embeddings.cls_token", "embed/class", ONE_TOKEN),
        _table(f"{name}.embeddings.distillation_token", "embed/distilled", ONE_TOKEN),
        _table(f"{name}.embeddings.position_embeddings", "embed/positions", ONE_IMAGE),
        *_linear(f"{name}.embeddings.patch_embeddings.projection", "embed/patch", layout=PATCH),
        *_norm(f"{block}.layernorm_before", "blocks/norm_attn"),
        *_linear(f"{block}.attention.attention.query", "blocks/attn/q"),
        *_linear(f"{block}.attention.attention.key", "blocks/attn/k"),
        *_linear(f"{block}.attention.attention.value", "blocks/attn/v"),
        *_linear(f"{block}.attention.output.dense", "blocks/attn/o", layout=DENSE_OUT),
        *_norm(f"{block}.layernorm_after", "blocks/norm_mlp"),
        *_linear(f"{block}.intermediate.dense", "blocks/mlp/up"),
        *_linear(f"{block}.output.dense", "blocks/mlp/down"),
        *_norm(f"{name}.layernorm", "final_norm"),
    )


_VIT = (*_vit("vit"), *_linear("classifier", "head"))
_DEIT = (
    *_vit("deit"),
    *_linear("classifier", "head"),
    *_linear("cls_classifier", "class_head"),
    *_linear("distillation_classifier", "distilled_head"),
)


def _clip_tower(name: str, ours: str) -> tuple[Row, ...]:
    block = f"{name}.encoder.layers.{{}}"
    return (
        *_separate(block, f"{ours}/blocks"),
        *_norm(f"{block}.layer_norm1", f"{ours}/blocks/norm_attn"),
        *_linear(f"{block}.mlp.fc1", f"{ours}/blocks/mlp/up"),
        *_linear(f"{block}.mlp.fc2", f"{ours}/blocks/mlp/down"),
        *_norm(f"{block}.layer_norm2", f"{ours}/blocks/norm_mlp"),
    )


_CLIP = (
    _table("logit_scale", "logit_scale"),
    _table("text_model.embeddings.token_embedding.weight", "text/tower/embed/tokens"),
    _table("text_model.embeddings.position_embedding.weight", "text/tower/embed/positions"),
    *_clip_tower("text_model", "text/tower"),
    *_norm("text_model.final_layer_norm", "text/tower/final_norm"),
    *_linear("text_projection", "text/projection"),
    _table("vision_model.embeddings.class_embedding", "vision/tower/embed/class"),
    _table("vision_model.embeddings.position_embedding.weight", "vision/tower/embed/positions"),
    *_linear("vision_model.embeddings.patch_embedding", "vision/tower/embed/patch", layout=PATCH),
    *_norm("vision_model.pre_layrnorm", "vision/tower/embed/norm"),
    *_clip_tower("vision_model", "vision/tower"),
    *_norm("vision_model.post_layernorm", "vision/tower/final_norm"),
    *_linear("visual_projection", "vision/projection"),
)

_BUFFERS = r"attn\.(masked_)?bias|attention\.(masked_)?bias|inv_freq|lm_head\.weight|embed_out\.weight"

FAMILIES: dict[str, Family] = {
    "gpt2": Family(read=text.read_gpt2, write=text.write_gpt2, tensors=_GPT2, prefix="transformer.", ignored=_BUFFERS),
    "opt": Family(read=text.read_opt, write=text.write_opt, tensors=_OPT),
    "gpt_neox": Family(
        read=text.read_gpt_neox, write=text.write_gpt_neox, tensors=_GPT_NEOX, prefix="gpt_neox.", ignored=_BUFFERS
    ),
    "llama": Family(read=text.read_llama, write=text.write_llama, tensors=_LLAMA),
    "mistral": Family(read=text.read_mistral, write=text.write_mistral, tensors=_LLAMA),
    "qwen2": Family(read=text.read_qwen2, write=text.write_qwen2, tensors=_LLAMA),
    "qwen3": Family(read=text.read_qwen3, write=text.write_qwen3, tensors=_LLAMA),
    "gemma": Family(read=text.read_gemma, write=text.write_gemma, tensors=_LLAMA),
    "gemma2": Family(read=text.read_gemma2, write=text.write_gemma2, tensors=_GEMMA2),
    "gemma3_text": Family(read=text.read_gemma3, write=text.write_gemma3, tensors=_GEMMA2),
    "phi3": Family(read=text.read_phi3, write=text.write_phi3, tensors=_PHI3),
    "bert": Family(
        read=text.read_bert,
        write=text.write_bert,
        tensors=_BERT,
        prefix="bert.",
        ignored=r"pooler\.dense\.(weight|bias)|cls\..*|(bert\.)?embeddings\.position_ids",
    ),
    "vit": Family(
        read=images.read_vit,
        write=images.write_vit,
        tensors=_VIT,
        build=vit,
        prefix="vit.",
        ignored=r"pooler\.dense\.(weight|bias)",
    ),
    "deit": Family(
        read=images.read_deit,
        write=images.write_deit,
        tensors=_DEIT,
        build=vit,
        prefix="deit.",
        ignored=r"pooler\.dense\.(weight|bias)",
    ),
    "clip": Family(
        read=images.read_clip,
        write=images.write_clip,
        tensors=_CLIP,
        build=clip_model,
        prefix="",
        ignored=r"(text|vision)_model\.embeddings\.position_ids",
    ),
}
"""``model_type`` of config.json to its family."""
