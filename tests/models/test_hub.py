"""The hub loader without ``transformers``: round trips of every family, names, dtypes, shards, meshes, and errors."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

from mechlab.core.sharding import make_mesh
from mechlab.models import hub
from mechlab.models.clip import CLIPConfig, clip_model
from mechlab.models.families import FAMILIES, Fields
from mechlab.models.transformer import TransformerConfig, gpt2, llama, transformer
from mechlab.models.transformer_config import LinearRope, Llama3Rope, LongRope
from mechlab.models.vit import ViTConfig, vit
from tests.models.tiny import SIZES, scrambled

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer:UserWarning")

ROTARY = {"positions": "rotary"}
GEMMA = {"norm": "rms_plus_one", "activation": "gelu_tanh", "embed_scale": 4.0, "norm_eps": 1e-6}
SANDWICH = GEMMA | {"norm_order": "sandwich", "attn_scale": 9**-0.5, "window": 4, "local_layers": (0, 2)}
IMAGE = {"image": (8, 12), "patch": 4, "layers": 2, "width": 16, "heads": 4, "hidden": 24}
TEXT: dict[str, tuple[str, TransformerConfig]] = {
    "gpt2": ("gpt2", gpt2(**SIZES)),
    "opt": ("opt", gpt2(**SIZES, activation="relu", norm_order="post", tied=False)),
    "neox": ("gpt_neox", gpt2(**SIZES, **ROTARY, rope_width=2, parallel=True, activation="gelu", tied=False)),
    "llama": ("llama", llama(**SIZES, kv_heads=2, rope_scaling=LinearRope(factor=2.0))),
    "llama3": ("llama", llama(**SIZES, rope_scaling=Llama3Rope(factor=8.0, low=1.0, high=4.0, original=6))),
    "mistral": ("mistral", llama(**SIZES, window=4, tied=False)),
    "qwen2": ("qwen2", llama(**SIZES, bias_qkv=True, window=4, local_layers=(1, 2))),
    "qwen3": ("qwen3", llama(**SIZES, qk_norm=True, head_width=8)),
    "gemma": ("gemma", llama(**SIZES | GEMMA)),
    "gemma2": ("gemma2", llama(**SIZES | SANDWICH, attn_softcap=50.0, logit_softcap=30.0)),
    "gemma3": ("gemma3_text", llama(**SIZES | SANDWICH, qk_norm=True, rope_local_theta=10.0)),
    "phi3": ("phi3", llama(**SIZES, rope_scaling=LongRope(factors=(1.0, 3.0), amplitude=1.1), kv_heads=2, tied=False)),
    "bert": (
        "bert",
        gpt2(
            **SIZES, norm_order="post", embed_norm=True, token_types=2, causal=False, unembed=False, activation="gelu"
        ),
    ),
}
VISION: dict[str, tuple[str, ViTConfig]] = {
    "vit": ("vit", ViTConfig(**IMAGE, classes=5, channels=1, bias_qkv=False)),
    "deit": ("deit", ViTConfig(**IMAGE, distilled=True, norm_eps=1e-12)),
    "deit-teacher": ("deit", ViTConfig(**IMAGE, distilled=True, distilled_head=True, classes=3)),
}


def random(model: Any) -> Any:
    return scrambled(jax.eval_shape(model.init, jax.random.key(0)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama."""
    model = transformer(TEXT["llama"][1])
    hub.export(tmp_path, model, random(model))
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "model.safetensors") -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def configure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("kind", [*TEXT, *VISION])
def test_export_and_load_keep_shape_and_parameters(kind: str, tmp_path: Path) -> None:
    family, config = (TEXT | VISION)[kind]
    model = transformer(config) if kind in TEXT else vit(config)
    params = random(model)
    hub.export(tmp_path, model, params, family=family)
    loaded, again, _ = hub.load(tmp_path)
    assert_same(again, params)
    read, wanted = loaded.module.config, model.module.config
    assert read == wanted or read.explicit() == wanted.explicit()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family


def test_clip_keeps_both_towers(tmp_path: Path) -> None:
    text = gpt2(**SIZES, activation="quick_gelu", unembed=False)
    vision = ViTConfig(**IMAGE | {"image": (8, 8)}, activation="quick_gelu", embed_norm=True, bias_patch=False)
    clip = clip_model(CLIPConfig(text=text, vision=vision, projection=6, end=3))
    params = random(clip)
    hub.export(tmp_path, clip, params)
    loaded, again, _ = hub.load(tmp_path)
    assert loaded.config == clip.config
    assert_same(again, params)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "qwen3", "gemma2", "gemma3", "bert"])
def test_the_family_follows_from_the_shape(kind: str, tmp_path: Path) -> None:
    family, config = TEXT[kind]
    model = transformer(config)
    hub.export(tmp_path, model, random(model))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family


def test_dtype_is_that_of_parameters_and_computation(folder: Path) -> None:
    model, params, _ = hub.load(folder)
    narrow, fewer, _ = hub.load(folder, dtype="bfloat16")
    assert narrow.module.config == dataclasses.replace(model.module.config, dtype="bfloat16")
    assert_same(fewer, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    hub.export(folder / "narrow", narrow, fewer)
    assert {tensor.dtype for tensor in load_file(folder / "narrow" / "model.safetensors").values()} == {
        jnp.dtype("bfloat16")
    }
    assert_same(hub.load(folder / "narrow", dtype="bfloat16")[1], fewer)
    with pytest.raises(ValueError, match="floating type"):
        hub.load(folder, dtype="int8")


def test_a_mesh_places_every_parameter_by_its_logical_axes(folder: Path) -> None:
    mesh = make_mesh(data=2, model=2)
    _, params, _ = hub.load(folder)
    model, placed, _ = hub.load(folder, mesh=mesh)
    assert placed["blocks"]["mlp"]["up"]["kernel"].sharding.spec == PartitionSpec(None, None, "model")
    assert placed["blocks"]["attn"]["k"]["kernel"].sharding.spec == PartitionSpec(None, None, "model", None)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(placed))
    assert_same(placed, params)
    tokens = jnp.asarray([[1, 2, 3]])
    wanted = model.apply({"params": params}, tokens)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": placed}, tokens), wanted, atol=1e-5)


def test_names_of_older_checkpoints(tmp_path: Path) -> None:
    for kind, family_prefix in (("gpt2", "transformer."), ("bert", "bert.")):
        model = transformer(TEXT[kind][1])
        params = random(model)
        hub.export(tmp_path, model, params)

        def older(tensors: dict[str, Any], prefix: str = family_prefix) -> None:
            for name in list(tensors):
                # GPT-2's first files lack the prefix, BERT's have it and call norms gamma and beta.
                other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
                other = other.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
                tensors[other] = tensors.pop(name)
            tensors["h.0.attn.bias" if prefix == "transformer." else "cls.predictions.bias"] = np.zeros((1, 1, 2, 2))

        rewrite(tmp_path, older)
        assert_same(hub.load(tmp_path)[1], params)


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_shards_are_read_as_one_file(folder: Path) -> None:
    wanted = hub.load(folder)[1]
    shard(folder)
    assert_same(hub.load(folder)[1], wanted)


def test_missing_and_truncated_shards_are_named_together(folder: Path) -> None:
    shard(folder)
    (folder / "model-00001-of-00003.safetensors").unlink()
    damaged = folder / "model-00003-of-00003.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"00001-of-00003\.safetensors is missing; .*00003-of.* is truncated"):
        hub.load(folder)


def test_all_problems_with_tensors_are_listed_at_once(folder: Path) -> None:
    def damage(tensors: dict[str, Any]) -> None:
        del tensors["model.layers.1.self_attn.q_proj.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((16, 24), np.float32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)

    rewrite(folder, damage)
    with pytest.raises(ValueError) as error:
        hub.load(folder)
    message = str(error.value)
    assert str(folder) in message and "inv_freq" not in message
    assert "model.layers.1.self_attn.q_proj.weight is missing" in message
    assert "model.layers.0.mlp.up_proj.weight has shape (16, 24) instead of (24, 16)" in message
    assert "model.layers.0.self_attn.q_proj.bias is unexpected" in message


def test_pickled_checkpoints_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        hub.load(folder)
    for start, name in ((b"PK\x03\x04", "pytorch_model.bin"), (b"\x80\x02}q", "other.pt")):
        (folder / name).write_bytes(start + b"\0" * 64)
        for source in (folder, folder / name):
            with pytest.raises(ValueError, match=f"{name} is pickled"):
                hub.load(source)
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"pass the checkpoint's folder"):
        hub.load(folder / "config.json")


def test_bad_config_files_are_refused_by_field(folder: Path) -> None:
    configure(folder, rope_scaling={"rope_type": "yarn", "factor": 2.0}, vocab_size=None, hidden_act="mish")
    with pytest.raises(ValueError) as error:
        hub.load(folder)
    for words in ("config.json", "'yarn' is not supported", '"vocab_size" is missing', "\"hidden_act\": 'mish'"):
        assert words in str(error.value)
    configure(folder, rope_scaling=None, vocab_size=11, hidden_act="silu", num_key_value_heads=3)
    with pytest.raises(ValueError, match=r"config.json: TransformerConfig: kv_heads=3 does not divide heads=4"):
        hub.load(folder)
    configure(folder, model_type="lama")
    with pytest.raises(
        KeyError, match=r'unknown model_type in .*config.json "lama". Did you mean "llama"\? Known: gpt2'
    ):
        hub.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        hub.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        hub.load(folder)


@pytest.mark.parametrize(
    "family, field, value",
    [
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "add_cross_attention", True),
        ("opt", "word_embed_proj_dim", 8),
        ("opt", "layer_norm_elementwise_affine", False),
        ("llama", "quantization_config", {"bits": 4}),
        ("llama", "rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 2.0}),
        ("mistral", "layer_types", ["full_attention"] * 3),
        ("qwen2", "layer_types", ["full_attention", "linear_attention"]),
        ("gemma", "use_bidirectional_attention", True),
        ("gemma3_text", "rope_parameters", {"sliding_attention": {"rope_type": "linear"}}),
        ("bert", "is_decoder", True),
        ("bert", "position_embedding_type", "relative_key"),
        ("vit", "architectures", ["ViTForMaskedImageModeling"]),
        ("vit", "patch_size", [4, 2]),
    ],
)
def test_settings_that_are_not_computed_are_refused_by_name(family: str, field: str, value: Any) -> None:
    config = next(config for name, config in (TEXT | VISION).values() if name == family)
    raw = FAMILIES[family].write(config)
    FAMILIES[family].read(Fields(raw, "here/config.json"))
    named = "rope type" if field == "rope_scaling" else f'"{field}"'
    with pytest.raises(ValueError, match=f"here/config.json: .*{named}"):
        FAMILIES[family].read(Fields(raw | {field: value}, "here/config.json"))


def test_older_and_newer_rope_fields_say_the_same() -> None:
    base = FAMILIES["llama"].write(TEXT["llama"][1])
    for name in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
        del base[name]
    older = {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5}
    newer = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0, "partial_rotary_factor": 0.5}}
    configs = [FAMILIES["llama"].read(Fields(base | each, "")) for each in (older, newer)]
    assert configs[0] == configs[1]
    assert (configs[0].rope_theta, configs[0].rope_width) == (5.0, 2)
    assert configs[0].rope_scaling == LinearRope(factor=2.0)


def test_longrope_limits_the_context_to_its_short_factors() -> None:
    base = FAMILIES["phi3"].write(TEXT["mistral"][1])
    rope = {"type": "su", "short_factor": [1.0, 2.0], "long_factor": [4.0, 4.0]}
    sizes = {"max_position_embeddings": 48, "original_max_position_embeddings": 12, "rope_scaling": rope}
    config = FAMILIES["phi3"].read(Fields(base | sizes, ""))
    assert config.context == 12
    assert config.rope_scaling.factors == (1.0, 2.0)
    assert config.rope_scaling.amplitude == pytest.approx((1 + np.log(4) / np.log(12)) ** 0.5)


def test_gemma_calls_the_tanh_approximation_gelu() -> None:
    raw = FAMILIES["gemma"].write(TEXT["gemma"][1]) | {"hidden_act": "gelu"}
    assert FAMILIES["gemma"].read(Fields(raw, "")).activation == "gelu_tanh"


def test_shapes_without_a_family_are_refused_with_the_reason(tmp_path: Path) -> None:
    for config, words in (
        (gpt2(**SIZES | {"hidden": None}), "no checkpoint family"),
        (gpt2(**SIZES, embed_conv=2), r"nearest is gpt2, but for embed_conv=2 \(there 0\)"),
    ):
        model = transformer(config)
        with pytest.raises(ValueError, match=words):
            hub.export(tmp_path, model, random(model))
    model = transformer(gpt2(**SIZES))
    with pytest.raises(ValueError, match="nearest is llama"):
        hub.export(tmp_path, model, random(model), family="llama")
    with pytest.raises(KeyError, match='Did you mean "gpt2"'):
        hub.export(tmp_path, model, random(model), family="gpt-2")
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_model_are_not_written(tmp_path: Path) -> None:
    model = transformer(gpt2(**SIZES))
    params = random(transformer(gpt2(**SIZES | {"width": 8})))
    with pytest.raises(ValueError, match=r"embed/tokens has shape \(11, 8\) instead of \(11, 16\)"):
        hub.export(tmp_path, model, params)
    with pytest.raises(ValueError, match="embed/tokens is missing"):
        hub.export(tmp_path, model, {"blocks": params["blocks"]})


def test_a_source_that_is_nowhere_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (tmp_path / "nowhere", "./nowhere", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no folder or file"):
            hub.load(source)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install mechlab\[hub\]"):
        hub.load("openai-community/gpt2")


def test_without_a_network_the_hub_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match='"openai-community/gpt2" is no local folder, and the hub did not'):
        hub.load("openai-community/gpt2")


def test_a_hub_id_fetches_only_what_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("huggingface_hub")
    calls: list[Any] = []

    def fetch(source: str, **options: Any) -> str:
        calls.append((source, options))
        return str(folder)

    monkeypatch.setattr(library, "snapshot_download", fetch)
    hub.load("someone/model")
    patterns = calls[0][1]["allow_patterns"]
    assert calls[0][0] == "someone/model" and not [p for p in patterns if p.endswith((".bin", ".pt", "*"))]


def test_an_absent_tokenizer_is_none_with_a_reason(folder: Path) -> None:
    with pytest.warns(UserWarning, match="has no tokenizer.json"):
        assert hub.load(folder)[2] is None


def test_the_loader_imports_its_libraries_only_when_it_loads() -> None:
    code = "import sys, mechlab.models.hub, mechlab.models.llama2c; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"huggingface_hub", "tokenizers", "safetensors", "torch", "transformers"} & set(run.stdout.split())
