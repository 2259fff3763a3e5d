"""tales: a world of short English stories, dialogues, questions and lists whose facts are known.

    batches = generated(functools.partial(tales.sample_batch, batch=32))     # for training.loop.fit
    texts = tales.documents(jax.random.key(0), 8, genre="story")
    print(tales.tokenizer.decode(texts.tokens[0]), texts.latents["mood"][0])

Everything is a pure function of a key: the same key gives the same text on every platform. All texts begin with BOS.
To read the grammar, open ``grammar`` (words, sentences, plots) and ``moods`` (what happens, and what people then do).
``tables`` turns it into arrays and ``machine`` writes text with them; ``corpus`` holds the documents, ``candidates``
the two-candidate items, ``probes`` the texts of one mood, the neutral filler and the instructions.
"""

from mechlab.data.worlds.tales.candidates import ITEM_KINDS, MAX_DISTRACTORS, Items, items
from mechlab.data.worlds.tales.corpus import CONTEXT, LATENTS, Documents, digest, documents, sample_batch
from mechlab.data.worlds.tales.moods import LABELS, MOODS
from mechlab.data.worlds.tales.probes import MoodTexts, filler, instructions, mood_texts
from mechlab.data.worlds.tales.tables import CUES, GENRES, SPLITS, STAGES, VOCABULARY, tokenizer

DIGEST = "f0eafeb0b99693be"
"""What ``digest()`` gives for this version of the world."""

__all__ = [
    "CONTEXT",
    "CUES",
    "DIGEST",
    "GENRES",
    "ITEM_KINDS",
    "LABELS",
    "LATENTS",
    "MAX_DISTRACTORS",
    "MOODS",
    "SPLITS",
    "STAGES",
    "VOCABULARY",
    "Documents",
    "Items",
    "MoodTexts",
    "digest",
    "documents",
    "filler",
    "instructions",
    "items",
    "mood_texts",
    "sample_batch",
    "tokenizer",
]
