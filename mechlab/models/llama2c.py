"""Checkpoints and vocabularies of llama2.c, version 0: small Llamas trained on stories.

The model file is a header of seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len), then
float32 weights, each stacked over layers, matrices (out, in)::

    tokens (V, D)   norm_attn (L, D)   q (L, D, D)   k, v (L, G*K, D)   o (L, D, D)   norm_mlp (L, D)
    gate (L, F, D)   down (L, D, F)   up (L, F, D)   final_norm (D,)   cosines, sines (seq_len, K/2)   unembed (V, D)

The unembedding is there only if vocab_size is negative. Rotary positions pair channels 2i and 2i + 1; ours pair i and
i + K/2, so the columns of q and k are reordered within each head, which leaves every score as it was.

The vocabulary file is an int32 (longest piece), then for each token float32 score, int32 length, and that many bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.model import Model
from mechlab.models.transformer import llama, transformer

BEGIN, END = 1, 2
_FIRST_BYTE = 3


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Pieces of text with scores; token 1 begins a text, 2 ends it, 3 .. 258 are single bytes.

    Attributes:
      pieces: bytes of each token.
      scores: of each token; pairs are merged into the piece with the highest score first.
    """

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]

    @functools.cached_property
    def _tokens(self) -> dict[bytes, int]:
        # Of equal pieces the first counts.
        return {piece: token for token, piece in reversed(list(enumerate(self.pieces)))}

    def encode(self, text: str, *, begin: bool = True, end: bool = False) -> list[int]:
        """Tokens of a text: its characters, then the best-scored pair merged until no pair is a piece.

        Args:
          text: any text; characters without a piece become their UTF-8 bytes.
          begin, end: add token 1 in front, 2 behind.
        """
        # Training data had a space in front of every text.
        words = re.split("(?= )", f" {text}") if text else []
        if self._spaces_begin_pieces:
            tokens = [token for word in words for token in self._merged(word)]
        else:
            tokens = list(self._merged("".join(words)))
        return [BEGIN] * begin + tokens + [END] * end

    @functools.cached_property
    def _spaces_begin_pieces(self) -> bool:
        # Then no pair is merged across the beginning of a word, and words can be encoded one by one, each once.
        return not any(b" " in piece[1:] for piece in self.pieces)

    @functools.cached_property
    def _words(self) -> dict[str, tuple[int, ...]]:
        return {}

    def _merged(self, word: str) -> tuple[int, ...]:
        """Tokens of a word, remembered."""
        if word in self._words:
            return self._words[word]
        tokens: list[int] = []
        for character in word:
            piece = character.encode()
            known = self._tokens.get(piece)
            tokens += [known] if known is not None else [byte + _FIRST_BYTE for byte in piece]
        while len(tokens) > 1:
            pairs = [self._tokens.get(self.pieces[a] + self.pieces[b]) for a, b in itertools.pairwise(tokens)]
            scores = [-math.inf if merged is None else self.scores[merged] for merged in pairs]
            best = int(np.argmax(scores))
            merged = pairs[best]
            if merged is None:
                break
            tokens[best : best + 2] = [merged]
        return self._words.setdefault(word, tuple(tokens))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; the space in front of a text, and tokens 1 and 2, are left out."""
        out = b""
        previous = None
        for token in (int(token) for token in tokens):
            piece = self.pieces[token]
            if byte := re.fullmatch(rb"<0x([0-9A-F]{2})>", piece):
                piece = bytes([int(byte[1], 16)])
            elif previous == BEGIN:
                piece = piece.removeprefix(b" ")
            out += b"" if token in (BEGIN, END) else piece
            previous = token
        return out.decode(errors="replace")


def load(path: str | Path, *, dtype: str = "float32") -> tuple[Model, Any, Vocabulary | None]:
    """Open a model file, and the vocabulary ``tokV.bin`` (V tokens) or ``tokenizer.bin`` beside it.

    Args:
      path: the ``.bin`` file.
      dtype: of the parameters and of the model's computations.

    Returns:
      The model, its parameters, and the vocabulary, or None with a warning where there is none.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file's size or header is not that of version 0.
    """
    path = Path(path)
    model, params = _read_model(path, dtype)
    size = model.module.config.vocabulary
    for name in (f"tok{size}.bin", "tokenizer.bin"):
        if (path.parent / name).is_file():
            return model, params, load_vocabulary(path.parent / name, size)
    warnings.warn(f"no tokenizer: neither tok{size}.bin nor tokenizer.bin is beside {path}.", stacklevel=3)
    return model, params, None


def load_vocabulary(path: str | Path, size: int) -> Vocabulary:
    """Read a vocabulary file of ``size`` tokens.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file ends before the last token, or goes on behind it.
    """
    data = Path(path).read_bytes()
    pieces, scores = [], []
    at = 4
    for token in range(size):
        if at + 8 > len(data):
            raise ValueError(f"{path} ends within token {token} of {size}.")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if length < 0 or at + length > len(data):
            raise ValueError(f"{path} ends within token {token} of {size}.")
        pieces.append(data[at : at + length])
        scores.append(score)
        at += length
    if at != len(data):
        raise ValueError(f"{path} has {len(data) - at} bytes behind its {size} tokens; is it for another vocabulary?")
    return Vocabulary(tuple(pieces), tuple(scores))


def _read_model(path: Path, dtype: str) -> tuple[Model, Any]:
    if path.stat().st_size < 28:
        raise ValueError(f"{path} is no llama2.c checkpoint: it is shorter than the header of 28 bytes.")
    header = np.fromfile(path, "<i4", 7)
    dim, hidden, layers, heads, kv_heads, vocabulary, context = (int(x) for x in header)
    tied, vocabulary = vocabulary > 0, abs(vocabulary)
    if min(dim, hidden, layers, heads, kv_heads, vocabulary, context) < 1 or dim % heads or heads % kv_heads:
        raise ValueError(f"{path} is no llama2.c checkpoint of version 0: its header reads {header.tolist()}.")
    head = dim // heads
    shapes: dict[str, tuple[int, ...]] = {
        "tokens": (vocabulary, dim),
        "norm_attn": (layers, dim),
        "q": (layers, heads * head, dim),
        "k": (layers, kv_heads * head, dim),
        "v": (layers, kv_heads * head, dim),
        "o": (layers, dim, heads * head),
        "norm_mlp": (layers, dim),
        "gate": (layers, hidden, dim),
        "down": (layers, dim, hidden),
        "up": (layers, hidden, dim),
        "final_norm": (dim,),
        "cosines and sines": (2, context, head // 2),
        **({} if tied else {"unembed": (vocabulary, dim)}),
    }
    size = 28 + 4 * sum(math.prod(shape) for shape in shapes.values())
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; its header {header.tolist()} makes it {size}.")
    weights = np.memmap(path, "<f4", "r", 28)
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]
    file = {name: part.reshape(shapes[name]) for name, part in zip(shapes, np.split(weights, ends), strict=True)}

    def heads_of(name: str) -> Any:
        kernel = file[name].swapaxes(1, 2).reshape(layers, dim, -1, head)
        if name in "qk":
            kernel = np.concatenate([kernel[..., 0::2], kernel[..., 1::2]], axis=-1)
        return {"kernel": kernel}

    def dense(name: str) -> Any:
        return {"kernel": file[name].swapaxes(1, 2)}

    params = {
        "embed": {"tokens": file["tokens"]},
        "blocks": {
            "norm_attn": {"scale": file["norm_attn"]},
            "attn": {
                **{name: heads_of(name) for name in "qkv"},
                "o": {"kernel": file["o"].swapaxes(1, 2).reshape(layers, heads, head, dim)},
            },
            "norm_mlp": {"scale": file["norm_mlp"]},
            "mlp": {name: dense(name) for name in ("gate", "up", "down")},
        },
        "final_norm": {"scale": file["final_norm"]},
        **({} if tied else {"unembed": {"kernel": file["unembed"].T}}),
    }
    config = llama(
        vocabulary=vocabulary,
        layers=layers,
        width=dim,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        context=context,
        tied=tied,
        dtype=dtype,
    )
    # Copied: a view of the file would change with it.
    return transformer(config), jax.tree.map(lambda leaf: jnp.array(leaf, jnp.dtype(dtype)), params)
