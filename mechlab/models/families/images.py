"""config.json of the families of image models, and of CLIP, to our configuration, and back."""

from __future__ import annotations

from mechlab.models.clip import CLIPConfig
from mechlab.models.families.fields import Fields, Json, write_activation, write_sizes
from mechlab.models.transformer_config import TransformerConfig
from mechlab.models.vit import ViTConfig


def read_vit(fields: Fields) -> ViTConfig:
    """ViT, with or without a classifier."""
    return _read_vit(fields, "ViT", distilled=False)


def write_vit(config: ViTConfig) -> Json:
    """Inverse of ``read_vit``."""
    return {
        "architectures": ["ViTModel" if config.classes is None else "ViTForImageClassification"],
        **_write_vit(config),
    }


def read_deit(fields: Fields) -> ViTConfig:
    """DeiT: a ViT with a distillation token."""
    return _read_vit(fields, "DeiT", distilled=True)


def write_deit(config: ViTConfig) -> Json:
    """Inverse of ``read_deit``."""
    head = "ForImageClassificationWithTeacher" if config.distilled_head else "ForImageClassification"
    return {"architectures": ["DeiTModel" if config.classes is None else f"DeiT{head}"], **_write_vit(config)}


def read_clip(fields: Fields) -> CLIPConfig:
    """CLIP; fields that the towers leave out have the values of the first release."""
    text = Fields(fields.get("text_config", {}), f"{fields.where}, text_config")
    vision = Fields(fields.get("vision_config", {}), f"{fields.where}, vision_config")
    end = text.get("eos_token_id", 49407)
    return fields.build(
        CLIPConfig,
        text=text.build(
            TransformerConfig,
            vocabulary=text.get("vocab_size", 49408),
            layers=text.get("num_hidden_layers", 12),
            width=text.get("hidden_size", 512),
            heads=text.get("num_attention_heads", 8),
            hidden=text.get("intermediate_size", 2048),
            context=text.get("max_position_embeddings", 77),
            norm_eps=text.get("layer_norm_eps", 1e-5),
            activation=text.activation("hidden_act", "quick_gelu"),
            unembed=False,
        ),
        vision=vision.build(
            ViTConfig,
            **_image(vision, image=224, patch=32),
            layers=vision.get("num_hidden_layers", 12),
            width=vision.get("hidden_size", 768),
            heads=vision.get("num_attention_heads", 12),
            hidden=vision.get("intermediate_size", 3072),
            norm_eps=vision.get("layer_norm_eps", 1e-5),
            activation=vision.activation("hidden_act", "quick_gelu"),
            bias_patch=False,
            embed_norm=True,
        ),
        projection=fields.get("projection_dim", 512),
        # Early checkpoints name a wrong end token, 2; their texts are read at the largest token.
        end=None if end == 2 else end,
    )


def write_clip(config: CLIPConfig) -> Json:
    """Inverse of ``read_clip``."""
    text: Json = {"intermediate_size": config.text.hidden, "layer_norm_eps": config.text.norm_eps}
    text |= {"hidden_act": write_activation(config.text.activation), "projection_dim": config.projection}
    end = 2 if config.end is None else config.end
    return {
        "architectures": ["CLIPModel"],
        "projection_dim": config.projection,
        "text_config": {"model_type": "clip_text_model", **write_sizes(config.text), **text, "eos_token_id": end},
        "vision_config": {
            "model_type": "clip_vision_model",
            **_write_vit(config.vision),
            "projection_dim": config.projection,
        },
    }


def _read_vit(fields: Fields, name: str, *, distilled: bool) -> ViTConfig:
    plain, classifier = f"{name}Model", f"{name}ForImageClassification"
    known = (plain, classifier, f"{classifier}WithTeacher") if distilled else (plain, classifier)
    architecture = fields.get("architectures", [plain])[0]
    if architecture not in known:
        fields.problems.append(f'"architectures": {architecture!r} is not supported, only {", ".join(known)}')
    classes = len(fields.get("id2label", ())) or fields.get("num_labels", 2)
    return fields.build(
        ViTConfig,
        **_image(fields, image=224, patch=16),
        layers=fields.need("num_hidden_layers"),
        width=fields.need("hidden_size"),
        heads=fields.need("num_attention_heads"),
        hidden=fields.need("intermediate_size"),
        classes=None if architecture == plain else classes,
        distilled=distilled,
        distilled_head=architecture.endswith("WithTeacher"),
        norm_eps=fields.get("layer_norm_eps", 1e-12),
        activation=fields.activation("hidden_act", "gelu"),
        bias_qkv=fields.get("qkv_bias", True),
    )


def _image(fields: Fields, *, image: int, patch: int) -> Json:
    sides = fields.get("image_size", image)
    patches = fields.get("patch_size", patch)
    if not isinstance(patches, int):
        if len(set(patches)) != 1:
            fields.problems.append(f'"patch_size": {patches} is not supported, only squares')
        patches = patches[0]
    return {
        "image": (sides, sides) if isinstance(sides, int) else tuple(sides),
        "patch": patches,
        "channels": fields.get("num_channels", 3),
    }


def _write_vit(config: ViTConfig) -> Json:
    square = config.image[0] == config.image[1]
    classes = {} if config.classes is None else {"id2label": {str(i): f"LABEL_{i}" for i in range(config.classes)}}
    return {
        "image_size": config.image[0] if square else list(config.image),
        "patch_size": config.patch,
        "num_channels": config.channels,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": write_activation(config.activation),
        "qkv_bias": config.bias_qkv,
        **classes,
    }
