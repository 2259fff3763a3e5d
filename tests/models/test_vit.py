"""ViT, DeiT and CLIP against the float64 reference blocks and patches cut out one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core.edits import Replace, at
from mechlab.models.clip import CLIPConfig, clip_model, similarity
from mechlab.models.transformer import gpt2, transformer
from mechlab.models.vit import ViTConfig, vit
from tests.models import reference
from tests.models.tiny import SIZES, scrambled

SIZE: dict[str, Any] = {"image": (8, 12), "patch": 4, "layers": 2, "width": 16, "heads": 4, "hidden": 24, "channels": 2}
KINDS = {
    "classes": ViTConfig(**SIZE, classes=5, bias_qkv=False),
    "hidden": ViTConfig(**SIZE, embed_norm=True, bias_patch=False, activation="quick_gelu"),
    "teacher": ViTConfig(**SIZE, classes=3, distilled=True, distilled_head=True),
    "distilled": ViTConfig(**SIZE, classes=3, distilled=True),
}
PIXELS = np.random.default_rng(0).normal(size=(2, 8, 12, 2)).astype(np.float32)


def random(model: Any) -> Any:
    return scrambled(jax.eval_shape(model.init, jax.random.key(0)))


def by_hand(params: Any, config: ViTConfig) -> np.ndarray:
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    trunk = config.trunk
    embed = p["embed"]
    rows = []
    for image in PIXELS:
        tokens = [embed["class"]] + ([embed["distilled"]] if config.distilled else [])
        for top in range(0, 8, 4):
            for left in range(0, 12, 4):
                patch = image[top : top + 4, left : left + 4]
                tokens.append(
                    np.einsum("ijc,ijcd->d", patch, embed["patch"]["kernel"]) + embed["patch"].get("bias", 0.0)
                )
        rows.append(np.stack(tokens) + embed["positions"])
    x = np.stack(rows)
    if config.embed_norm:
        x = reference._norm(embed["norm"], x, trunk)
    positions = np.broadcast_to(np.arange(config.tokens), x.shape[:2])
    for layer in range(config.layers):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])
        x = reference._block(one, x, positions, trunk, layer, lambda name, value: value)
    x = reference._norm(p["final_norm"], x, trunk)
    if config.classes is None:
        return x
    heads = [("class_head", 0), ("distilled_head", 1)] if config.distilled_head else [("head", 0)]
    return np.mean([x[:, token] @ p[name]["kernel"] + p[name]["bias"] for name, token in heads], axis=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_equals_the_reference(kind: str) -> None:
    model = vit(KINDS[kind])
    params = random(model)
    wanted = by_hand(params, KINDS[kind])
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, PIXELS), wanted, atol=1e-4, rtol=0)
    assert ("logits" in model.sites) == (KINDS[kind].classes is not None)


def test_patching_the_class_token_of_one_image_into_another_moves_its_logits() -> None:
    model = vit(KINDS["classes"])
    params = random(model)
    logits, acts = model.capture({"params": params}, PIXELS, sites=("resid_post",))
    swapped = at(model.sites, "resid_post", Replace(acts["resid_post"][1, ::-1]), layer=1, position=0)
    moved = model.apply({"params": params, "edits": swapped}, PIXELS)
    np.testing.assert_allclose(moved, logits[::-1], atol=1e-5)


def test_bad_configurations_and_pixels_are_refused() -> None:
    for change, word in (
        ({"patch": 5}, "patch=5 does not divide"),
        ({"distilled_head": True}, "distilled_head needs"),
        ({"classes": 0}, "classes must be at least 1"),
        ({"heads": 3}, "heads=3 does not divide width=16"),
    ):
        with pytest.raises(ValueError, match=word):
            ViTConfig(**SIZE | change)
    model = vit(KINDS["hidden"])
    params = random(model)
    for pixels in (PIXELS[..., :1], PIXELS[:, :4], PIXELS.astype(np.int32), PIXELS[0]):
        with pytest.raises(ValueError, match=r"pixels must be floats of shape \(B, 8, 12, 2\)"):
            model.apply({"params": params}, pixels)


@pytest.mark.parametrize("end", [None, 7])
def test_clip_reads_a_text_at_its_end_and_an_image_at_its_class_token(end: int | None) -> None:
    text = gpt2(**SIZES, unembed=False)
    config = CLIPConfig(text=text, vision=KINDS["hidden"], projection=6, end=end)
    clip = clip_model(config)
    params = random(clip)
    tokens = np.asarray([[3, 1, 7, 2, 7], [7, 10, 2, 3, 1]])
    hidden = transformer(text).apply({"params": params["text"]["tower"]}, tokens)
    places = [2, 0] if end else [2, 1]
    texts = clip.text.apply({"params": params["text"]}, tokens)
    wanted = hidden[jnp.arange(2), jnp.asarray(places)] @ params["text"]["projection"]["kernel"]
    np.testing.assert_allclose(texts, wanted, atol=1e-5)
    images = clip.vision.apply({"params": params["vision"]}, PIXELS)
    seen = by_hand(params["vision"]["tower"], KINDS["hidden"])[:, 0]
    np.testing.assert_allclose(images, seen @ np.asarray(params["vision"]["projection"]["kernel"]), atol=1e-4)
    cosines = [[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in texts] for x in np.asarray(images)]
    np.testing.assert_allclose(
        similarity(params, images, texts), np.exp(params["logit_scale"]) * np.asarray(cosines), atol=1e-4
    )


def test_bad_clip_configurations_are_refused() -> None:
    text, vision = gpt2(**SIZES, unembed=False), KINDS["hidden"]
    for change, word in (
        ({"text": dataclasses.replace(text, unembed=True)}, "unembed=False"),
        ({"projection": 0}, "projection must be at least 1"),
        ({"end": 11}, r"end must be a token, 0\.\.10"),
    ):
        with pytest.raises(ValueError, match=word):
            CLIPConfig(**{"text": text, "vision": vision, "projection": 4} | change)
