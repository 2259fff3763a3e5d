"""llama2.c files: a tiny one written here, and the trained 260 K model continued greedily, against float64 NumPy."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mechlab.core.sharding import make_mesh
from mechlab.models import hub, llama2c


class Plain:
    """The file's own model: float64, one token at a time, channels 2i and 2i + 1 turned together."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        self.dim, self.hidden, self.layers, self.heads, self.kv, vocabulary, self.context = struct.unpack(
            "7i", data[:28]
        )
        self.head = self.dim // self.heads
        rest = np.frombuffer(data, "<f4", offset=28).astype(np.float64)

        def take(*shape: int) -> np.ndarray:
            nonlocal rest
            part, rest = rest[: int(np.prod(shape))], rest[int(np.prod(shape)) :]
            return part.reshape(shape)

        n, d, f, kv = self.layers, self.dim, self.hidden, self.kv * self.head
        self.tokens = take(abs(vocabulary), d)
        self.norm1, self.wq, self.wk, self.wv, self.wo = (
            take(n, d),
            take(n, d, d),
            take(n, kv, d),
            take(n, kv, d),
            take(n, d, d),
        )
        self.norm2, self.w1, self.w2, self.w3, self.norm = (
            take(n, d),
            take(n, f, d),
            take(n, d, f),
            take(n, f, d),
            take(d),
        )
        take(self.context, self.head)
        self.out = self.tokens if vocabulary > 0 else take(-vocabulary, d)
        assert not rest.size
        self.keys: list[list[np.ndarray]] = [[] for _ in range(n)]
        self.values: list[list[np.ndarray]] = [[] for _ in range(n)]

    def rms(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean() + 1e-5) * scale

    def turn(self, x: np.ndarray, position: int) -> np.ndarray:
        pairs = x.reshape(-1, self.head // 2, 2)
        angle = position / 10000 ** (np.arange(0, self.head, 2) / self.head)
        numbers = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
        return np.stack([numbers.real, numbers.imag], -1).reshape(-1, self.head)

    def step(self, token: int) -> np.ndarray:
        position = len(self.keys[0])
        x = self.tokens[token]
        for i in range(self.layers):
            h = self.rms(x, self.norm1[i])
            q = self.turn(self.wq[i] @ h, position)
            self.keys[i].append(self.turn(self.wk[i] @ h, position))
            self.values[i].append((self.wv[i] @ h).reshape(-1, self.head))
            out = []
            for j in range(self.heads):
                group = j // (self.heads // self.kv)
                scores = np.array([q[j] @ key[group] for key in self.keys[i]]) / np.sqrt(self.head)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out.append(sum(w * value[group] for w, value in zip(weights, self.values[i], strict=True)))
            x = x + self.wo[i] @ np.concatenate(out)
            h = self.rms(x, self.norm2[i])
            gate = self.w1[i] @ h
            x = x + self.w2[i] @ (gate / (1 + np.exp(-gate)) * (self.w3[i] @ h))
        return self.out @ self.rms(x, self.norm)


PIECES = [
    b"<unk>",
    b"\n<s>\n",
    b"\n</s>\n",
    *(b"<0x%02X>" % i for i in range(256)),
    b" ",
    b"a",
    b"b",
    b"ab",
    b" ab",
    b"ba",
]
SCORES = [0.0] * 259 + [-9.0, -9.0, -9.0, 1.0, 2.0, 3.0]


def write(folder: Path, *, shared: bool = True) -> Path:
    dim, hidden, layers, heads, kv, size, context = 16, 12, 2, 4, 2, len(PIECES), 10
    path = folder / "tiny.bin"
    attention = 2 * dim * dim + 2 * dim * (dim // heads * kv)
    weights = size * dim + layers * (2 * dim + attention + 3 * dim * hidden) + dim + context * dim // heads
    weights += 0 if shared else size * dim
    values = np.random.default_rng(0).normal(0, 0.5, weights).astype("<f4")
    header = struct.pack("7i", dim, hidden, layers, heads, kv, size if shared else -size, context)
    path.write_bytes(header + values.tobytes())
    data = struct.pack("i", max(map(len, PIECES)))
    for piece, score in zip(PIECES, SCORES, strict=True):
        data += struct.pack("fi", score, len(piece)) + piece
    (folder / "tokenizer.bin").write_bytes(data)
    return path


@pytest.mark.parametrize("shared", [True, False])
def test_a_file_gives_the_logits_of_its_own_equations(shared: bool, tmp_path: Path) -> None:
    path = write(tmp_path, shared=shared)
    model, params, _ = hub.load(path)
    tokens = [1, 260, 5, 77, 262, 3]
    plain = Plain(path)
    wanted = np.stack([plain.step(token) for token in tokens])
    np.testing.assert_allclose(model.apply({"params": params}, jnp.asarray([tokens]))[0], wanted, atol=1e-4)
    assert model.module.config.tied is shared and model.module.config.kv_heads == 2
    _, placed, _ = hub.load(path, mesh=make_mesh(data=1, model=2), dtype="bfloat16")
    assert placed["blocks"]["mlp"]["up"]["kernel"].sharding.spec == PartitionSpec(None, None, "model")


def test_it_goes_on_to_safetensors(tmp_path: Path) -> None:
    model, params, _ = hub.load(write(tmp_path))
    hub.export(tmp_path / "out", model, params)
    with pytest.warns(UserWarning, match="no tokenizer"):
        again, same, _ = hub.load(tmp_path / "out")
    assert again.module.config.explicit() == model.module.config.explicit()
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_encoding_merges_the_best_pair_first_and_falls_back_to_bytes(tmp_path: Path) -> None:
    vocabulary = llama2c.load(write(tmp_path))[2]
    assert vocabulary is not None
    tokens = {piece: i for i, piece in enumerate(PIECES)}
    # "ba" scores above " ab" and "ab": of " aba", "ba" is merged, and then nothing is left to merge.
    assert vocabulary.encode("aba") == [1, tokens[b" "], tokens[b"a"], tokens[b"ba"]]
    assert vocabulary.encode("ab", end=True) == [1, tokens[b" ab"], 2]
    assert vocabulary.encode("", begin=False) == []
    assert vocabulary.encode("é", begin=False) == [tokens[b" "], 0xC3 + 3, 0xA9 + 3]
    for text in ("aba", "ab é\n", "", "a  b"):
        assert vocabulary.decode(vocabulary.encode(text, end=True)) == text
    assert vocabulary.decode(np.asarray([tokens[b" ab"], 0xC3 + 3])) == " ab�"


def test_words_are_encoded_one_by_one_only_where_no_piece_holds_two(tmp_path: Path) -> None:
    vocabulary = llama2c.load(write(tmp_path))[2]
    assert vocabulary is not None
    longer = dataclasses.replace(vocabulary, pieces=(*vocabulary.pieces, b"q q"), scores=(*vocabulary.scores, 9.0))
    for text in ("aba ab  ba", "ab\naba é ab", " "):
        assert vocabulary.encode(text) == longer.encode(text)
    across = dataclasses.replace(vocabulary, pieces=(*vocabulary.pieces, b"a ab"), scores=(*vocabulary.scores, 9.0))
    assert len(vocabulary.pieces) in across.encode("a ab")


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    for data, words in (
        (whole[:20], "shorter than the header"),
        (whole[:-4], "bytes; its header"),
        (whole + b"\0" * 4, "bytes; its header"),
        (struct.pack("7i", 8, 12, 2, 3, 2, 9, 10) + whole[28:], "no llama2.c checkpoint of version 0"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"tiny.bin.*{words}"):
            hub.load(path)
    vocabulary = (tmp_path / "tokenizer.bin").read_bytes()
    for data, words in ((vocabulary[:-1], "ends within token 264 of 265"), (vocabulary + b"x", "1 bytes behind")):
        (tmp_path / "tokenizer.bin").write_bytes(data)
        with pytest.raises(ValueError, match=f"tokenizer.bin.*{words}"):
            llama2c.load_vocabulary(tmp_path / "tokenizer.bin", len(PIECES))


def test_an_absent_vocabulary_is_none_with_a_reason(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "tokenizer.bin").unlink()
    with pytest.warns(UserWarning, match="neither tok265.bin nor tokenizer.bin"):
        assert hub.load(path)[2] is None


def test_the_trained_story_model_continues_as_its_equations_say(data_dir: Path) -> None:
    path = data_dir / "stories260k" / "stories260K.bin"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    model, params, vocabulary = hub.load(path)
    start = vocabulary.encode("Once upon a time")
    assert vocabulary.decode(start) == "Once upon a time"
    # Merges must find the long pieces of the vocabulary, not leave characters.
    assert len(start) < 10

    plain = Plain(path)
    logits = [plain.step(token) for token in start]
    wanted = list(start)
    for _ in range(40):
        wanted.append(int(np.argmax(logits[-1])))
        logits.append(plain.step(wanted[-1]))

    @jax.jit
    def predict(tokens: jax.Array, length: jax.Array) -> Any:
        place = jnp.arange(64)
        out = model.apply({"params": params}, tokens, jnp.where(place < length, place, -1)[None])
        return out[0]

    tokens = list(start)
    for _ in range(40):
        padded = jnp.asarray([tokens + [0] * (64 - len(tokens))])
        tokens.append(int(predict(padded, len(tokens))[len(tokens) - 1].argmax()))
    assert tokens == wanted
    full = predict(jnp.asarray([tokens + [0] * (64 - len(tokens))]), len(tokens))
    np.testing.assert_allclose(full[: len(tokens)], np.stack(logits), atol=1e-3)
    text = vocabulary.decode(tokens)
    print(text)
    assert text.startswith("Once upon a time, there was a little")
    assert all(f" {word} " in text for word in ("there", "was", "a", "to"))
