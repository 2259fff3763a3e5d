"""Small language models to study: three decoders that ship with mechlab, and one real one that is a short download::

    model, params, tokenizer = load_tales("L")          # of the world data/worlds/tales
    model, params, tokenizer = load_stories260k()       # Llama's kind, 260 thousand parameters, real English

The models of tales were trained on the same texts with the same vocabulary by ``python -m experiments run tales``; its
page in the documentation says what each can and cannot do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mechlab.core.errors import unknown
from mechlab.core.model import Model
from mechlab.data.sources import STORIES260K, locate
from mechlab.models import hub, llama2c

if TYPE_CHECKING:
    from mechlab.data.text import WordTokenizer

WEIGHTS = Path(__file__).parent / "weights"

_ALL = {"context": 256, "rope_theta": 100.0}

SHAPES: dict[str, dict[str, Any]] = {
    "S": {"layers": 2, "width": 32, "heads": 2, "hidden": 96, **_ALL},
    "M": {"layers": 4, "width": 64, "heads": 4, "hidden": 192, **_ALL},
    "L": {"layers": 6, "width": 128, "heads": 8, "hidden": 384, **_ALL},
    "XL": {"layers": 8, "width": 320, "heads": 10, "hidden": 896, **_ALL},
}
"""Llama's kind of block at four sizes: 0.06, 0.28, 1.4 and 10 million parameters. XL does not ship.

Heads are narrow, and texts short: at the usual base of 10,000 two thirds of a head's rotary frequencies would hardly
turn within a text, and it could not tell neighbouring tokens apart.
"""

SIZES = ("S", "M", "L")
"""The sizes that ship."""

Size = Literal["S", "M", "L"]


def load_tales(size: Size = "L", *, dtype: str = "float32") -> tuple[Model, Any, WordTokenizer]:
    """A trained model of the world of tales.

    Args:
      size: one of ``SIZES``.
      dtype: of the parameters and of the model's computations.

    Returns:
      The model, its parameters, and the world's tokenizer, which puts BOS first.

    Raises:
      UnknownName: a KeyError, for a size that does not exist.
      ValueError: the installed weights belong to another version of the world.
    """
    from mechlab.data.worlds import tales

    if size not in SIZES:
        raise unknown("size", size, SIZES)
    made_for = tales_card(size)["digest"]
    if made_for != tales.DIGEST:
        raise ValueError(f"tales-{size} was trained on world {made_for}, this is world {tales.DIGEST}; reinstall.")
    model, params = hub.load_model(WEIGHTS / f"tales-{size}", dtype=dtype)
    return model, params, tales.tokenizer


def tales_card(size: Size = "L") -> dict[str, Any]:
    """What is known of a shipped model: tokens trained on, digest of the world, accuracy, usual number of distractors.

    "accuracy" is in percent on the test pool, under "kind/distractors"; "usual" is for every kind of item the fewest
    distractors with which the model answers at most 90 % on the dev pool.

    Raises:
      UnknownName: a KeyError, for a size that does not exist.
    """
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    card: dict[str, Any] = json.loads((WEIGHTS / f"tales-{size}" / "card.json").read_text())
    return card


def load_stories260k(*, dtype: str = "float32", download: bool = True) -> tuple[Model, Any, llama2c.Vocabulary]:
    """The 260 K parameter model of llama2.c, trained on TinyStories: L5 D64 H8 F172, 4 key-value heads, context 512.

    Args:
      dtype: of the parameters and of the model's computations.
      download: fetch it (1 MB) if it is not on this machine.

    Returns:
      The model, its parameters, and its vocabulary of 512 pieces, which can spell any text.

    Raises:
      MissingData, CorruptData: as ``data.sources.locate``.
    """
    model, params, vocabulary = llama2c.load(locate(STORIES260K, download=download) / "stories260K.bin", dtype=dtype)
    assert vocabulary is not None  # the source has both files
    return model, params, vocabulary
