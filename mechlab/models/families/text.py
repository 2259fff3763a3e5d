"""config.json of the families of text models to our configuration, and back."""

from __future__ import annotations

from mechlab.models.families.fields import (
    Fields,
    Json,
    read_layer_types,
    read_rope,
    write_activation,
    write_layer_types,
    write_rope,
    write_sizes,
)
from mechlab.models.transformer_config import TransformerConfig


def read_gpt2(fields: Fields) -> TransformerConfig:
    """GPT-2."""
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    width = fields.need("n_embd")
    return fields.build(
        TransformerConfig,
        vocabulary=fields.need("vocab_size"),
        layers=fields.need("n_layer"),
        width=width,
        heads=fields.need("n_head"),
        hidden=fields.get("n_inner", 4 * width),
        context=fields.need("n_positions"),
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        activation=fields.activation("activation_function", "gelu_new"),
        attn_scale=None if fields.get("scale_attn_weights", True) else 1.0,
        tied=fields.get("tie_word_embeddings", True),
    )


def write_gpt2(config: TransformerConfig) -> Json:
    """Inverse of ``read_gpt2``."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocabulary,
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.hidden,
        "n_positions": config.context,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": write_activation(config.activation),
        "scale_attn_weights": config.attn_scale != 1.0,
        "tie_word_embeddings": config.tied,
    }


def read_opt(fields: Fields) -> TransformerConfig:
    """OPT, those whose embeddings are as wide as the stream (all but 350m)."""
    width = fields.need("hidden_size")
    fields.only("word_embed_proj_dim", width)
    fields.only("layer_norm_elementwise_affine", True)
    fields.only("_remove_final_layer_norm", False)
    return fields.build(
        TransformerConfig,
        vocabulary=fields.need("vocab_size"),
        layers=fields.need("num_hidden_layers"),
        width=width,
        heads=fields.need("num_attention_heads"),
        hidden=fields.need("ffn_dim"),
        context=fields.need("max_position_embeddings"),
        norm_order="pre" if fields.get("do_layer_norm_before", True) else "post",
        activation=fields.activation("activation_function", "relu"),
        bias=fields.get("enable_bias", True),
        bias_norm=True,
        tied=fields.get("tie_word_embeddings", True),
    )


def write_opt(config: TransformerConfig) -> Json:
    """Inverse of ``read_opt``."""
    return {
        "architectures": ["OPTForCausalLM"],
        **write_sizes(config),
        "ffn_dim": config.hidden,
        "word_embed_proj_dim": config.width,
        "do_layer_norm_before": config.norm_order == "pre",
        "activation_function": write_activation(config.activation),
        "enable_bias": config.has_bias("qkv"),
        "tie_word_embeddings": config.tied,
    }


def read_gpt_neox(fields: Fields) -> TransformerConfig:
    """GPT-NeoX, Pythia."""
    biased = fields.get("attention_bias", True)
    rope = read_rope(fields, partial=fields.get("rotary_pct", 0.25), theta=fields.get("rotary_emb_base", 10_000.0))
    return fields.build(
        TransformerConfig,
        vocabulary=fields.need("vocab_size"),
        layers=fields.need("num_hidden_layers"),
        width=fields.need("hidden_size"),
        heads=fields.need("num_attention_heads"),
        hidden=fields.need("intermediate_size"),
        norm_eps=fields.get("layer_norm_eps", 1e-5),
        parallel=fields.get("use_parallel_residual", True),
        activation=fields.activation("hidden_act", "gelu"),
        bias_qkv=biased,
        bias_o=biased,
        tied=fields.get("tie_word_embeddings", False),
        **rope,
    )


def write_gpt_neox(config: TransformerConfig) -> Json:
    """Inverse of ``read_gpt_neox``."""
    rope = write_rope(config)
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        **write_sizes(config),
        "intermediate_size": config.hidden,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel,
        "hidden_act": write_activation(config.activation),
        "attention_bias": config.has_bias("qkv"),
        "tie_word_embeddings": config.tied,
        "rotary_pct": rope["partial_rotary_factor"],
        "rotary_emb_base": rope["rope_theta"],
        "rope_scaling": rope["rope_scaling"],
    }


def read_llama(fields: Fields) -> TransformerConfig:
    """Llama 1 to 3."""
    biased = fields.get("attention_bias", False)
    mlp = fields.get("mlp_bias", False)
    values = _llama_like(fields) | {"bias_qkv": biased, "bias_o": biased, "bias_mlp": mlp}
    return fields.build(TransformerConfig, **values)


def write_llama(config: TransformerConfig) -> Json:
    """Inverse of ``read_llama``."""
    biases = {"attention_bias": config.has_bias("qkv"), "mlp_bias": config.has_bias("mlp")}
    return {"architectures": ["LlamaForCausalLM"], **_write_llama_like(config), **biases}


def read_mistral(fields: Fields) -> TransformerConfig:
    """Mistral: a window in every layer, or none."""
    fields.only("layer_types", None)
    return fields.build(TransformerConfig, **_llama_like(fields), window=fields.get("sliding_window"))


def write_mistral(config: TransformerConfig) -> Json:
    """Inverse of ``read_mistral``."""
    return {
        "architectures": ["MistralForCausalLM"],
        **_write_llama_like(config),
        "sliding_window": config.window if len(config.windowed) == config.layers else None,
    }


def read_qwen2(fields: Fields) -> TransformerConfig:
    """Qwen 2 and 2.5: biases at q, k, v; a window in the upper layers, or none."""
    values = _llama_like(fields) | _qwen_window(fields) | {"bias_qkv": True}
    return fields.build(TransformerConfig, **values)


def write_qwen2(config: TransformerConfig) -> Json:
    """Inverse of ``read_qwen2``."""
    return {"architectures": ["Qwen2ForCausalLM"], **_write_llama_like(config), **_write_qwen_window(config)}


def read_qwen3(fields: Fields) -> TransformerConfig:
    """Qwen 3: normed queries and keys."""
    biased = fields.get("attention_bias", False)
    values = _llama_like(fields, head_width=128) | _qwen_window(fields)
    return fields.build(TransformerConfig, **values | {"bias_qkv": biased, "bias_o": biased, "qk_norm": True})


def write_qwen3(config: TransformerConfig) -> Json:
    """Inverse of ``read_qwen3``."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        **_write_llama_like(config),
        **_write_qwen_window(config),
        "attention_bias": config.has_bias("qkv"),
    }


def read_gemma(fields: Fields) -> TransformerConfig:
    """Gemma 1. Its "gelu" has always meant the tanh approximation."""
    values = _gemma_like(fields, "hidden_act")
    if values["activation"] == "gelu":
        values["activation"] = "gelu_tanh"
    return fields.build(TransformerConfig, **values)


def write_gemma(config: TransformerConfig) -> Json:
    """Inverse of ``read_gemma``."""
    return {"architectures": ["GemmaForCausalLM"], **_write_gemma_like(config)}


def read_gemma2(fields: Fields) -> TransformerConfig:
    """Gemma 2: a norm before and after each part, soft caps, a window in every other layer from the first."""
    values = _gemma_like(fields, "hidden_activation") | read_layer_types(fields, lambda layer: layer % 2 == 0)
    return fields.build(TransformerConfig, **values | _gemma2_extras(fields, scores=50.0, logits=30.0))


def write_gemma2(config: TransformerConfig) -> Json:
    """Inverse of ``read_gemma2``."""
    return {"architectures": ["Gemma2ForCausalLM"], **_write_gemma_like(config), **_write_gemma2_extras(config)}


def read_gemma3(fields: Fields) -> TransformerConfig:
    """Gemma 3, text: as Gemma 2 with normed queries and keys, and wavelengths of their own in layers with a window."""
    period = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
    window = read_layer_types(fields, lambda layer: (layer + 1) % period != 0)
    nested = fields.get("rope_parameters", {})
    local = nested.get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        fields.problems.append(f'"rope_parameters": {local["rope_type"]!r} in sliding_attention is not supported')
    theta = local.get("rope_theta", fields.get("rope_local_base_freq", 10_000.0)) if window["window"] else None
    values = _gemma_like(fields, "hidden_activation", theta=1_000_000.0, rope=nested.get("full_attention"))
    values |= window | _gemma2_extras(fields) | {"qk_norm": True, "rope_local_theta": theta}
    return fields.build(TransformerConfig, **values)


def write_gemma3(config: TransformerConfig) -> Json:
    """Inverse of ``read_gemma3``."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        **_write_gemma_like(config),
        **_write_gemma2_extras(config),
        "rope_local_base_freq": config.rope_local_theta or config.rope_theta,
    }


def read_phi3(fields: Fields) -> TransformerConfig:
    """Phi-3 and 3.5. LongRoPE within the original context, where its short factors apply."""
    return fields.build(TransformerConfig, **_llama_like(fields), window=fields.get("sliding_window"))


def write_phi3(config: TransformerConfig) -> Json:
    """Inverse of ``read_phi3``."""
    return {
        **write_mistral(config),
        "architectures": ["Phi3ForCausalLM"],
        "original_max_position_embeddings": config.context,
    }


def read_bert(fields: Fields) -> TransformerConfig:
    """BERT, MiniLM: final hidden states."""
    fields.only("is_decoder", False)
    fields.only("add_cross_attention", False)
    fields.only("position_embedding_type", "absolute")
    return fields.build(
        TransformerConfig,
        vocabulary=fields.need("vocab_size"),
        layers=fields.need("num_hidden_layers"),
        width=fields.need("hidden_size"),
        heads=fields.need("num_attention_heads"),
        hidden=fields.need("intermediate_size"),
        context=fields.need("max_position_embeddings"),
        norm_eps=fields.get("layer_norm_eps", 1e-12),
        norm_order="post",
        activation=fields.activation("hidden_act", "gelu"),
        embed_norm=True,
        token_types=fields.get("type_vocab_size", 2),
        causal=False,
        unembed=False,
    )


def write_bert(config: TransformerConfig) -> Json:
    """Inverse of ``read_bert``."""
    return {
        "architectures": ["BertModel"],
        **write_sizes(config),
        "intermediate_size": config.hidden,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": write_activation(config.activation),
        "type_vocab_size": config.token_types,
    }


def _llama_like(fields: Fields, head_width: int | None = None) -> Json:
    return {
        "vocabulary": fields.need("vocab_size"),
        "layers": fields.need("num_hidden_layers"),
        "width": fields.need("hidden_size"),
        "heads": fields.need("num_attention_heads"),
        "hidden": fields.need("intermediate_size"),
        "kv_heads": fields.get("num_key_value_heads"),
        "head_width": fields.get("head_dim", head_width),
        "norm": "rms",
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "gated": True,
        "activation": fields.activation("hidden_act", "silu"),
        "bias": False,
        "tied": fields.get("tie_word_embeddings", False),
        **read_rope(fields),
    }


def _write_llama_like(config: TransformerConfig) -> Json:
    return {
        **write_sizes(config),
        "intermediate_size": config.hidden,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": write_activation(config.activation),
        "tie_word_embeddings": config.tied,
        **write_rope(config),
    }


def _qwen_window(fields: Fields) -> Json:
    if not fields.get("use_sliding_window", False):
        return {"window": None}
    return read_layer_types(fields, lambda layer: layer >= fields.get("max_window_layers", 28))


def _write_qwen_window(config: TransformerConfig) -> Json:
    return {
        "use_sliding_window": bool(config.windowed),
        "sliding_window": config.window,
        "max_window_layers": min(config.windowed, default=config.layers),
        "layer_types": write_layer_types(config),
    }


def _gemma_like(fields: Fields, activation: str, rope: Json | None = None, theta: float = 10_000.0) -> Json:
    fields.only("use_bidirectional_attention", False)
    biased = fields.get("attention_bias", False)
    return {
        **_llama_like(fields, head_width=256),
        "activation": fields.activation(activation, "gelu_pytorch_tanh"),
        "norm": "rms_plus_one",
        "embed_scale": fields.need("hidden_size") ** 0.5,
        "bias_qkv": biased,
        "bias_o": biased,
        "tied": fields.get("tie_word_embeddings", True),
        **read_rope(fields, rope=rope, theta=theta),
    }


def _write_gemma_like(config: TransformerConfig) -> Json:
    activation = write_activation(config.activation)
    return {
        **_write_llama_like(config),
        "hidden_activation": activation,
        "attention_bias": config.has_bias("qkv"),
    }


def _gemma2_extras(fields: Fields, scores: float | None = None, logits: float | None = None) -> Json:
    # A null in the file switches a cap off; only an absent field means the default.
    return {
        "norm_order": "sandwich",
        "attn_scale": fields.get("query_pre_attn_scalar", 256) ** -0.5,
        "attn_softcap": fields.raw.get("attn_logit_softcapping", scores),
        "logit_softcap": fields.raw.get("final_logit_softcapping", logits),
    }


def _write_gemma2_extras(config: TransformerConfig) -> Json:
    return {
        "query_pre_attn_scalar": config.d_head if config.attn_scale is None else round(config.attn_scale**-2),
        "attn_logit_softcapping": config.attn_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": config.window,
        "layer_types": write_layer_types(config),
    }
