"""Decoders with packed kernels: they write what the whole kernels write, and come back from disk bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mechlab.core.kernel_forms import LowRank, QTensor, Quantised
from mechlab.kernels.w4a16 import Packed4, pack
from mechlab.methods.compression.decoders import dequantise_blocks, kernel_of, pack_blocks, places, quantise_blocks
from mechlab.methods.compression.rounding import quantise
from mechlab.models import hub
from mechlab.models.generate import generate
from mechlab.models.layers import linear
from mechlab.models.quantised_io import load_quantised, save_quantised
from mechlab.models.transformer import gpt2, llama, transformer
from tests.models.tiny import SIZES, TOKENS, scrambled

CONFIGS = {
    "llama": llama(**SIZES, kv_heads=2, tied=False),
    "opt": gpt2(**SIZES, activation="relu"),
}


def packed_decoder(kind: str) -> tuple[Any, Any]:
    model = transformer(CONFIGS[kind])
    params = scrambled(jax.eval_shape(model.init, jax.random.key(0)))
    return model, pack_blocks(quantise_blocks(CONFIGS[kind], params, bits=4, group=8))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A folder with a packed Llama."""
    save_quantised(tmp_path / "out", *packed_decoder("llama"), card={"method": "rounding"})
    return tmp_path / "out"


def rewrite(folder: Path, tensors: dict[str, Any], **header: str) -> None:
    from safetensors import safe_open

    with safe_open(folder / hub.QUANTISED, "numpy") as file:
        kept = dict(file.metadata())
    save_file(tensors, folder / hub.QUANTISED, metadata=kept | header)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_packed_decoder_writes_what_the_whole_kernels_write(kind: str, tmp_path: Path) -> None:
    model, params = packed_decoder(kind)
    assert all(isinstance(kernel_of(params, place), Packed4) for place in places(CONFIGS[kind]))
    save_quantised(tmp_path / "out", model, params)
    opened, again, tokenizer, card = load_quantised(tmp_path / "out")
    assert tokenizer is None and card == {}
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    read, wanted = opened.module.config, model.module.config
    assert read == wanted or read.explicit() == wanted.explicit()

    whole = dequantise_blocks(params)
    assert not any(isinstance(kernel_of(whole, place), Quantised) for place in places(CONFIGS[kind]))
    np.testing.assert_allclose(
        opened.apply({"params": again}, TOKENS), model.apply({"params": whole}, TOKENS), atol=1e-5
    )
    texts = [generate(m, {"params": p}, TOKENS, steps=6).tokens for m, p in ((opened, again), (model, whole))]
    np.testing.assert_array_equal(*texts)


def test_linear_takes_packed_kernels_of_every_layout_and_beneath_an_adapter() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    x, bias = jax.random.normal(keys[0], (2, 3, 4, 8)), jnp.arange(5.0)
    kernel = pack(quantise(jax.random.normal(keys[1], (4, 8, 5)), bits=4, group=8, inputs=2))
    wanted = jnp.tensordot(x, kernel.dequantise(), axes=2) + bias
    np.testing.assert_allclose(linear(x, kernel, bias, 2), wanted, atol=1e-5)
    a, b = jax.random.normal(keys[2], (4, 8, 2)), jax.random.normal(keys[3], (2, 5))
    both = linear(x, LowRank(kernel, a, b), None, 2)
    np.testing.assert_allclose(both, jnp.tensordot(x, kernel.dequantise() + a @ b, axes=2), atol=1e-4)
    slope = jax.grad(lambda x: linear(x, kernel, None, 2).sum())(x)
    np.testing.assert_allclose(slope[0, 0], kernel.dequantise().sum(-1), atol=1e-5)
    assert linear(x.astype(jnp.bfloat16), kernel, None, 2).dtype == jnp.bfloat16


def test_kernels_of_several_kinds_and_a_tokenizer_come_back(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model, params = packed_decoder("llama")
    q = quantise_blocks(model.module.config, dequantise_blocks(params), bits=3, group=8, symmetric=True)
    params["blocks"]["attn"] = q["blocks"]["attn"]
    params["blocks"]["mlp"]["down"] = dequantise_blocks(params["blocks"]["mlp"]["down"])
    save_quantised(tmp_path / "out", model, params, tokenizer=hub.Tokenizer(inner), card={"method": "mixed"})
    _, again, tokenizer, card = load_quantised(tmp_path / "out")
    assert isinstance(again["blocks"]["attn"]["q"]["kernel"], QTensor) and card == {"method": "mixed"}
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert tokenizer is not None and tokenizer.encode("the cat") == [1, 2]


def test_nothing_is_overwritten_and_other_parameters_are_refused(written: Path, tmp_path: Path) -> None:
    before = (written / hub.QUANTISED).read_bytes()
    model, params = packed_decoder("llama")
    with pytest.raises(FileExistsError, match="remove it or choose another name"):
        save_quantised(written, model, params)
    assert (written / hub.QUANTISED).read_bytes() == before
    other = transformer(llama(**SIZES | {"width": 32}, kv_heads=2, tied=False))
    with pytest.raises(ValueError, match=r"blocks/attn/q/kernel is \(3, 16, 4, 4\) instead of \(3, 32, 4, 8\)"):
        save_quantised(tmp_path / "new", other, params)
    with pytest.raises(ValueError, match="blocks/mlp/gate/kernel is unexpected"):
        save_quantised(tmp_path / "new", transformer(CONFIGS["opt"]), params)
    unknown = transformer(llama(**SIZES, kv_heads=2, tied=False, embed_conv=2))
    with pytest.raises(ValueError, match="no checkpoint family has this shape"):
        save_quantised(tmp_path / "new", unknown, scrambled(jax.eval_shape(unknown.init, jax.random.key(0))))
    assert not (tmp_path / "new").exists()


def test_folders_that_are_no_quantised_decoder_are_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no quantised.safetensors"):
        load_quantised(tmp_path / "nowhere")
    model = transformer(CONFIGS["opt"])
    hub.export(tmp_path / "plain", model, scrambled(jax.eval_shape(model.init, jax.random.key(0))))
    with pytest.raises(FileNotFoundError, match=r"a plain checkpoint is opened by models.hub.load"):
        load_quantised(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"open it with models\.quantised_io\.load_quantised"):
        hub.load(written)


def test_files_that_do_not_fit_are_refused(written: Path) -> None:
    tensors = load_file(written / hub.QUANTISED)
    name = "blocks/attn/q/kernel"
    rewrite(written, tensors, format="another")
    with pytest.raises(ValueError, match="wanted the format \"mechlab-quantised-1\", got 'another'"):
        load_quantised(written)
    rewrite(written, tensors, format="mechlab-quantised-1", forms=json.dumps({name: {"form": "Own", "arrays": []}}))
    with pytest.raises(KeyError, match='unknown kind of kernel "Own"'):
        load_quantised(written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks/attn/q/kernel/scales"), "blocks/attn/q/kernel is broken"),
        (lambda t: t.pop("final_norm/scale"), "final_norm/scale is missing"),
        (lambda t: t.update(more=np.ones(2)), "more is unexpected"),
        (
            lambda t: t.update({"blocks/mlp/down/kernel/bytes": t["blocks/mlp/down/kernel/bytes"][:, :4]}),
            "blocks/mlp/down/kernel is broken",
        ),
    ],
)
def test_tensors_that_do_not_make_the_model_are_named(written: Path, change: Any, message: str) -> None:
    tensors = load_file(written / hub.QUANTISED)
    change(tensors)
    rewrite(written, tensors)
    with pytest.raises(ValueError, match=message):
        load_quantised(written)


def test_a_truncated_file_is_refused(written: Path) -> None:
    whole = (written / hub.QUANTISED).read_bytes()
    (written / hub.QUANTISED).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        load_quantised(written)
