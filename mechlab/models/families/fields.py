"""Reading config.json: fields with their problems collected, and the parts that several families share.

What a family can switch on and we do not compute is refused by the field's name. Written files use the fields that both
older and newer releases of ``transformers`` read (``rope_theta`` and ``rope_scaling`` rather than ``rope_parameters``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mechlab.models.transformer_config import LinearRope, Llama3Rope, LongRope, TransformerConfig

Json = dict[str, Any]

_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
}


class Fields:
    """The fields of one config.json, with what is missing or not supported collected until ``build``."""

    def __init__(self, raw: Json, where: str) -> None:
        self.raw = raw
        self.where = where
        self.problems: list[str] = []
        if raw.get("quantization_config"):
            self.problems.append('"quantization_config": quantised checkpoints cannot be opened')

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or the default where it is absent or null."""
        value = self.raw.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """The field; its absence is a problem."""
        if self.raw.get(name) is None:
            self.problems.append(f'"{name}" is missing')
            return 1
        return self.raw[name]

    def only(self, name: str, wanted: Any) -> None:
        """A switch that has one setting we compute, which is also what its absence means."""
        if self.get(name, wanted) != wanted:
            self.problems.append(f'"{name}": {self.raw[name]!r} is not supported, only {wanted!r}')

    def activation(self, name: str, default: str) -> str:
        """Our name of an activation."""
        value = self.get(name, default)
        if value not in _ACTIVATIONS:
            self.problems.append(f'"{name}": {value!r} is not supported, only {", ".join(_ACTIVATIONS)}')
        return _ACTIVATIONS.get(value, "relu")

    def build(self, make: Callable[..., Any], **values: Any) -> Any:
        """``make(**values)``, or everything that is wrong with the file.

        Raises:
          ValueError: naming the file and each field.
        """
        if self.problems:
            raise ValueError(f"{self.where}: {'; '.join(self.problems)}.")
        try:
            return make(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.where}: {error}") from error


def write_activation(ours: str) -> str:
    """Their name of our activation."""
    return "gelu_pytorch_tanh" if ours == "gelu_tanh" else ours


def write_sizes(config: TransformerConfig) -> Json:
    """The sizes that nearly all families call alike. Special tokens are the tokenizer's, not the model's."""
    return {
        "vocab_size": config.vocabulary,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def read_rope(fields: Fields, *, rope: Json | None = None, theta: float = 10_000.0, partial: float = 1.0) -> Json:
    """Rotary positions and the context that they are good for.

    Args:
      fields: of the file, in the older form (``rope_scaling``) or the newer (``rope_parameters``).
      rope: the newer form, where the file has several.
      theta, partial: base, and part of a head that is rotated, where the file does not say.

    Returns:
      Values of ``TransformerConfig``.
    """
    rope = rope or fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    context = fields.need("max_position_embeddings")
    head = fields.get("head_dim", fields.get("hidden_size", 1) // fields.get("num_attention_heads", 1))
    part = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", partial))
    values: Json = {
        "positions": "rotary",
        "context": context,
        "rope_theta": rope.get("rope_theta", fields.get("rope_theta", theta)),
        "rope_width": int(head * part) if part != 1 else None,
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    original = fields.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", context))
    wanted = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "longrope": ("short_factor",),
        "su": ("short_factor",),  # LongRoPE's first name
    }
    if kind not in wanted:
        fields.problems.append(f"rope type {kind!r} is not supported, only {', '.join(wanted)}")
        return values
    absent = [name for name in wanted[kind] if rope.get(name) is None]
    if absent:
        fields.problems.append(f"rope type {kind!r} needs {', '.join(absent)}")
    elif kind == "linear":
        values["rope_scaling"] = LinearRope(factor=rope["factor"])
    elif kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        values["rope_scaling"] = Llama3Rope(factor=rope["factor"], low=low, high=high, original=original)
    elif kind != "default":
        factor = rope.get("factor") or context / original
        amplitude = rope.get("attention_factor") or math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
        # Longer texts would need the long factors, for every position of them.
        values["context"] = min(context, original)
        values["rope_scaling"] = LongRope(factors=tuple(rope["short_factor"]), amplitude=amplitude)
    return values


def write_rope(config: TransformerConfig) -> Json:
    """The fields that ``read_rope`` reads, in the older form."""
    rope = config.rope_scaling
    scaling: Json | None = None
    if isinstance(rope, LinearRope):
        scaling = {"rope_type": "linear", "factor": rope.factor}
    elif isinstance(rope, Llama3Rope):
        turns = {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
        scaling = {"rope_type": "llama3", "factor": rope.factor, **turns}
        scaling |= {"original_max_position_embeddings": rope.original}
    elif isinstance(rope, LongRope):
        factors = list(rope.factors)
        scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
        scaling |= {"attention_factor": rope.amplitude, "original_max_position_embeddings": config.context}
    part = config.d_rotary / config.d_head
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling, "partial_rotary_factor": part}


def read_layer_types(fields: Fields, local: Callable[[int], bool]) -> Json:
    """The window, and the layers that have it.

    Args:
      fields: of the file.
      local: whether a layer has the window, where the file does not list its ``layer_types``.

    Returns:
      Values of ``TransformerConfig``.
    """
    layers = fields.need("num_hidden_layers")
    types = fields.get("layer_types", ["sliding_attention" if local(i) else "full_attention" for i in range(layers)])
    if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        fields.problems.append(f'"layer_types" must be {layers} times sliding_attention or full_attention, got {types}')
    chosen = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    if fields.get("sliding_window") is None or not chosen:
        return {"window": None}
    return {"window": fields.get("sliding_window"), "local_layers": chosen}


def write_layer_types(config: TransformerConfig) -> list[str]:
    """``layer_types``."""
    return ["sliding_attention" if i in config.windowed else "full_attention" for i in range(config.layers)]
