"""Every family against ``transformers``: random tiny checkpoints with every switch, loaded, exported, opened again."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.models import hub
from mechlab.models.clip import similarity

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

VOCABULARY, LENGTH = 19, 12
TOLERANCE = 1e-4
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 24}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
MLP = {"intermediate_size": 24}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OPT = SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16}
LLAMA = SIZES | MLP | SPECIAL
GQA = LLAMA | {"num_key_value_heads": 2}
GEMMA = GQA | {"head_dim": 6, "query_pre_attn_scalar": 9}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0},
    **{"original_max_position_embeddings": 24, "rope_theta": 50.0},
}
LONG = {
    **{"rope_type": "longrope", "short_factor": [1.0, 1.7], "long_factor": [2.0, 5.0], "rope_theta": 100.0},
    **{"original_max_position_embeddings": 24},
}
SWA = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
LOCAL = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}

# name -> (class of the model, class of its config, fields)
TEXT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"tie_word_embeddings": False, "n_inner": 20}),
    "gpt2-unscaled": (
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2 | {"scale_attn_weights": False, "activation_function": "relu"},
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),
    "opt-post-norm": ("OPTForCausalLM", "OPTConfig", OPT | {"do_layer_norm_before": False}),
    "opt-no-bias": ("OPTForCausalLM", "OPTConfig", OPT | {"enable_bias": False, "activation_function": "gelu"}),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES | MLP | {"rotary_pct": 0.5}),
    "neox-serial": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        SIZES
        | MLP
        | {"use_parallel_residual": False, "rotary_pct": 1.0, "rotary_emb_base": 500, "attention_bias": False},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama-gqa-tied": ("LlamaForCausalLM", "LlamaConfig", GQA | {"tie_word_embeddings": True, "head_dim": 6}),
    "llama-biases": ("LlamaForCausalLM", "LlamaConfig", GQA | {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"rope_parameters": LINEAR}),
    "llama-llama3": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"rope_parameters": LLAMA3, "head_dim": 12}),
    "mistral": ("MistralForCausalLM", "MistralConfig", GQA | {"sliding_window": None}),
    "mistral-window": ("MistralForCausalLM", "MistralConfig", GQA | {"sliding_window": 4, "head_dim": 6}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GQA),
    "qwen2-window": ("Qwen2ForCausalLM", "Qwen2Config", GQA | SWA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GQA | {"head_dim": 6}),
    "qwen3-window": ("Qwen3ForCausalLM", "Qwen3Config", GQA | SWA | {"head_dim": 8, "attention_bias": True}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GQA | {"head_dim": 6}),
    "gemma-biases": ("GemmaForCausalLM", "GemmaConfig", GQA | {"head_dim": 4, "attention_bias": True}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        GEMMA | {"sliding_window": 4, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2-no-caps": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        GEMMA | {"sliding_window": 4, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GEMMA | {"sliding_window": 4, "sliding_window_pattern": 2, "rope_parameters": LOCAL},
    ),
    "gemma3-all-local": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GEMMA | {"sliding_window": 3, "final_logit_softcapping": 2.0},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GQA | {"sliding_window": 5}),
    "phi3-partial": ("Phi3ForCausalLM", "Phi3Config", LLAMA | {"partial_rotary_factor": 0.5}),
    "phi3-longrope": (
        "Phi3ForCausalLM",
        "Phi3Config",
        GQA | {"max_position_embeddings": 96, "original_max_position_embeddings": 24, "rope_parameters": LONG},
    ),
    "bert": ("BertModel", "BertConfig", SIZES | MLP),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", SIZES | MLP | {"hidden_act": "relu", "type_vocab_size": 3}),
}


def scramble(model: Any) -> Any:
    """Nothing at its neutral value: norm scales around theirs, biases around 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(parameter + 0.3 * noise if is_scale else 0.2 * noise)
    return model.eval()


def build(case: str) -> Any:
    model, config, fields = TEXT[case]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**fields, attn_implementation="eager")
    return scramble(getattr(transformers, model)(config))


def theirs(model: Any, tokens: np.ndarray, positions: np.ndarray | None = None, types: Any = None) -> np.ndarray:
    inputs: dict[str, Any] = {"input_ids": torch.tensor(tokens)}
    if positions is not None:
        inputs["attention_mask"] = torch.tensor((positions >= 0).astype(np.int64))
        inputs["position_ids"] = torch.tensor(np.maximum(positions, 0))
    if types is not None:
        inputs["token_type_ids"] = torch.tensor(types)
    with torch.no_grad():
        if hasattr(model, "bert"):
            model = model.bert
        out = model(**inputs)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


# One compiled program for all calls of a case.
@functools.partial(jax.jit, static_argnums=0)
def run(model: Any, params: Any, *inputs: Any) -> Any:
    return model.apply({"params": params}, *inputs)


def ours(model: Any, params: Any, *inputs: Any) -> np.ndarray:
    return np.asarray(run(model, params, *inputs))


TOKENS = np.random.default_rng(0).integers(3, VOCABULARY, (2, LENGTH))
PLAIN = np.broadcast_to(np.arange(LENGTH), TOKENS.shape)
# The first row is padded on the left, the second on the right.
POSITIONS = np.stack([np.r_[[-1] * 3, np.arange(9)], np.r_[np.arange(10), [-1] * 2]])


def reopen(kind: str, folder: Path) -> Any:
    return getattr(transformers, kind).from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("case", TEXT)
def test_text_family(case: str, tmp_path: Path) -> None:
    reference = build(case)
    reference.save_pretrained(tmp_path / "theirs")
    model, params, _ = hub.load(tmp_path / "theirs")

    wanted = theirs(reference, TOKENS)
    assert np.ptp(wanted) > 1
    np.testing.assert_allclose(ours(model, params, TOKENS, PLAIN), wanted, atol=TOLERANCE, rtol=0)

    real = POSITIONS >= 0
    padded = theirs(reference, TOKENS, POSITIONS)
    np.testing.assert_allclose(ours(model, params, TOKENS, POSITIONS)[real], padded[real], atol=TOLERANCE, rtol=0)

    hub.export(tmp_path / "ours", model, params, family=reference.config.model_type)
    again = reopen("BertModel" if "bert" in case else TEXT[case][0], tmp_path / "ours")
    np.testing.assert_allclose(theirs(again, TOKENS), wanted, atol=1e-5, rtol=0)
    reloaded, same, _ = hub.load(tmp_path / "ours")
    np.testing.assert_array_equal(ours(reloaded, same, TOKENS, PLAIN), ours(model, params, TOKENS, PLAIN))


def test_bert_reads_token_types(tmp_path: Path) -> None:
    reference = build("bert")
    reference.save_pretrained(tmp_path)
    model, params, _ = hub.load(tmp_path)
    types = np.random.default_rng(1).integers(0, 2, TOKENS.shape)
    wanted = theirs(reference, TOKENS, types=types)
    assert np.abs(wanted - theirs(reference, TOKENS)).max() > 0.1
    np.testing.assert_allclose(ours(model, params, TOKENS, PLAIN, types), wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ["llama-llama3", "neox", "opt-post-norm", "gemma2", "bert"])
def test_the_family_of_a_shape_is_found_and_opens_with_auto_classes(case: str, tmp_path: Path) -> None:
    reference = build(case)
    reference.save_pretrained(tmp_path / "theirs")
    model, params, _ = hub.load(tmp_path / "theirs")
    hub.export(tmp_path / "ours", model, params)
    kind = "AutoModel" if case == "bert" else "AutoModelForCausalLM"
    again = reopen(kind, tmp_path / "ours")
    np.testing.assert_allclose(theirs(again, TOKENS), theirs(reference, TOKENS), atol=1e-5, rtol=0)


IMAGE = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE |= {"intermediate_size": 24}
IMAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTModel", "ViTConfig", IMAGE),
    "vit-classes": ("ViTForImageClassification", "ViTConfig", IMAGE | {"num_labels": 3, "qkv_bias": False}),
    "vit-oblong": (
        "ViTModel",
        "ViTConfig",
        IMAGE | {"image_size": [8, 12], "num_channels": 1, "hidden_act": "gelu_new"},
    ),
    "deit": ("DeiTModel", "DeiTConfig", IMAGE),
    "deit-classes": ("DeiTForImageClassification", "DeiTConfig", IMAGE | {"num_labels": 3}),
    "deit-teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", IMAGE | {"num_labels": 3}),
}


def pixels(config: Any) -> np.ndarray:
    height, width = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    return np.random.default_rng(2).normal(size=(2, height, width, config.num_channels)).astype(np.float32)


def see(model: Any, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out = model(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)))
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


@pytest.mark.parametrize("case", IMAGES)
def test_image_family(case: str, tmp_path: Path) -> None:
    kind, config, fields = IMAGES[case]
    reference = scramble(getattr(transformers, kind)(getattr(transformers, config)(**fields)))
    reference.save_pretrained(tmp_path / "theirs")
    model, params, tokenizer = hub.load(tmp_path / "theirs")
    images = pixels(reference.config)
    wanted = see(reference, images)
    assert tokenizer is None and np.ptp(wanted) > 0.5
    np.testing.assert_allclose(ours(model, params, images), wanted, atol=TOLERANCE, rtol=0)
    hub.export(tmp_path / "ours", model, params)
    np.testing.assert_allclose(see(reopen(kind, tmp_path / "ours"), images), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("end", [2, 18])
def test_clip(end: int, tmp_path: Path) -> None:
    text = SIZES | MLP | {"eos_token_id": end, "projection_dim": 8}
    vision = IMAGE | {"projection_dim": 8, "num_hidden_layers": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    reference = scramble(transformers.CLIPModel(config))
    reference.save_pretrained(tmp_path / "theirs")
    clip, params, _ = hub.load(tmp_path / "theirs")
    tokens = TOKENS % 18
    tokens[0, 5], tokens[1, 11] = 18, 18
    images = pixels(config.vision_config)

    def all_of(model: Any, names: tuple[str, ...]) -> list[np.ndarray]:
        with torch.no_grad():
            pictures = torch.tensor(images.transpose(0, 3, 1, 2))
            out = model(input_ids=torch.tensor(tokens), pixel_values=pictures)
        return [getattr(out, name).numpy() for name in names]

    wanted_texts, wanted_images, wanted = all_of(reference, ("text_embeds", "image_embeds", "logits_per_image"))
    texts = clip.text.apply({"params": params["text"]}, tokens)
    seen = clip.vision.apply({"params": params["vision"]}, images)
    for mine, unit in ((texts, wanted_texts), (seen, wanted_images)):
        np.testing.assert_allclose(mine / jnp.linalg.norm(mine, axis=-1, keepdims=True), unit, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(similarity(params, seen, texts), wanted, atol=TOLERANCE, rtol=0)
    hub.export(tmp_path / "ours", clip, params)
    again = reopen("CLIPModel", tmp_path / "ours")
    np.testing.assert_allclose(all_of(again, ("logits_per_image",))[0], wanted, atol=1e-5, rtol=0)


def test_bfloat16_is_near_and_goes_back_to_transformers(tmp_path: Path) -> None:
    reference = build("gemma")
    reference.save_pretrained(tmp_path / "theirs")
    model, params, _ = hub.load(tmp_path / "theirs", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.bfloat16.dtype}
    wanted = theirs(reference, TOKENS)
    mine = ours(model, params, TOKENS, PLAIN)
    assert np.abs(mine - wanted).mean() < 0.05 * np.abs(wanted).mean()
    hub.export(tmp_path / "ours", model, params)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="float32").eval()
    assert np.abs(theirs(again, TOKENS) - wanted).mean() < 0.02 * np.abs(wanted).mean()


def test_shards_and_a_tokenizer_of_the_hub(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[UNK]", "the", "cat", "sat"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    reference = build("llama")
    reference.save_pretrained(tmp_path, max_shard_size="4KB")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model, params, loaded = hub.load(tmp_path)
    assert loaded.encode("the cat sat down") == [1, 2, 3, 0]
    assert loaded.decode(np.asarray([1, 2, 3])) == "the cat sat"
    np.testing.assert_allclose(ours(model, params, TOKENS, PLAIN), theirs(reference, TOKENS), atol=TOLERANCE, rtol=0)
