"""Items, mood texts, filler and instructions of tales: answers follow from the text, and nothing leaks."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from mechlab.core.errors import UnknownName
from mechlab.data.worlds import tales
from mechlab.data.worlds.tales import grammar, moods
from mechlab.data.worlds.tales.moods import SPLIT_SIZES

key = jax.random.key
N = 48


def words(ids: np.ndarray) -> list[str]:
    return [tales.VOCABULARY[i] for i in np.asarray(ids) if i]


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def split_cues(table: dict[str, str], split: str) -> dict[str, list[str]]:
    start = sum(SPLIT_SIZES[: tales.SPLITS.index(split)])
    return {mood: lines(text)[start : start + SPLIT_SIZES[tales.SPLITS.index(split)]] for mood, text in table.items()}


# ---- an independent reader: takes the text of a prompt apart and answers it


def answer(kind: str, text: str) -> str:
    sentences = [part.split() for part in text.split(" . ")]
    names = set(" ".join((*grammar.GIRLS, *grammar.BOYS)).split())
    if kind == "ioi":
        first, second = [word for word in sentences[0] if word in names]
        giver = next(word for word in sentences[-1] if word in names)
        return second if giver == first else first
    if kind in ("recall", "agree"):
        has = {next(word for word in s if word in names): s[-1] for s in sentences[:-1] if set(s) & names}
        asked = sentences[-1]
        if kind == "recall":
            return has[next(word for word in asked if word in names)]
        person, thing = re.search(r"does (\w+) have the (\w+) \?", " ".join(asked)).groups()
        return "yes" if has[person] == thing else "no"
    who = next(word for word in sentences[-1] if word in names)
    introduced = next(i for i, s in enumerate(sentences) if "happened" in s and who in s)
    event = " ".join([*sentences[introduced + 1], "."])
    mood = next(m for m, cues in moods.EVENTS.items() if any(like(cue, event) for cue in lines(cues)))
    return mood


def like(cue: str, text: str) -> bool:
    return re.fullmatch(re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(cue)), text) is not None


@pytest.mark.parametrize("kind", tales.ITEM_KINDS)
@pytest.mark.parametrize(("distractors", "pool"), [(0, "train"), (1, "dev"), (6, "test"), (16, "dev")])
def test_items(kind: str, distractors: int, pool: str) -> None:
    distractors = min(distractors, tales.MAX_DISTRACTORS[kind])
    items = jax.tree.map(np.asarray, tales.items(key(distractors), kind, N, distractors=distractors, pool=pool))
    assert items.lengths.max() <= tales.CONTEXT
    assert items.alternatives.shape[1] >= 4
    reactions = split_cues(moods.BEHAVIOURS, pool)
    for i in range(N):
        prompt = words(items.tokens[i])
        assert prompt[0] == "<bos>"
        assert len(prompt) == items.lengths[i]
        assert not items.tokens[i, items.lengths[i] :].any()
        right, wrong = (tales.VOCABULARY[c] for c in items.candidates[i])
        found = answer(kind, " ".join(prompt[1:]))
        if kind == "mood":
            said = re.fullmatch(r"\{A\} began to (\w+) \.", reactions[found][0])
            assert said is not None
            found = said[1]
        assert found == right != wrong
        others = [tales.VOCABULARY[c] for c in items.alternatives[i]]
        assert len({right, wrong, *others}) == 2 + len(others)
        if kind in ("ioi", "recall"):
            assert right in prompt and wrong in prompt
        # Every distractor is one sentence, with its lead-in two for moods.
        full_stops = prompt.count(".")
        assert full_stops == {"ioi": 1, "recall": 2, "mood": 2, "agree": 2}[kind] + distractors * (1 + (kind == "mood"))
    if kind != "mood" or distractors:
        assert (items.orders == 1).sum() == N // 2
    if kind == "agree":
        assert (items.truths == 1).sum() == N // 2
        assert ((items.truths == 1) & (items.orders == 1)).sum() == N // 4
        assert {tales.VOCABULARY[c] for c in items.candidates[:, 0]} == {"yes", "no"}
    assert len(set(items.groups.tolist())) > 3


def test_the_right_word_is_said_first_in_half_of_the_items() -> None:
    for kind in ("ioi", "recall"):
        items = tales.items(key(0), kind, N, distractors=2)
        firsts = [
            list(row).index(right) < list(row).index(wrong)
            for row, (right, wrong) in zip(np.asarray(items.tokens), np.asarray(items.candidates), strict=True)
        ]
        assert sum(firsts) == N // 2


def test_pools_are_disjoint() -> None:
    vocabulary = set(" ".join((*grammar.GIRLS, *grammar.BOYS, *grammar.THINGS)).split())
    used: dict[str, set[str]] = {}
    for pool in tales.SPLITS:
        drawn = tales.items(key(1), "recall", 200, distractors=6, pool=pool)
        ids = np.concatenate([np.asarray(drawn.tokens).ravel(), np.asarray(drawn.candidates).ravel()])
        used[pool] = set(words(np.unique(ids))) & vocabulary
        assert len(used[pool]) == 32
    assert not used["train"] & used["dev"] and not used["train"] & used["test"] and not used["dev"] & used["test"]


# ---- moods


def cue_words(cue: str) -> set[str]:
    return {word for word in cue.split() if word[0] != "{"} - moods.COMMON


def neutral_words() -> set[str]:
    neutral = grammar.FILLER + grammar.SENTENCES["opening"] + grammar.SENTENCES["lead"]
    listed = set(re.sub(r"[\[{]\w+[\]}]", "", neutral).split())
    for name in set(re.findall(r"\[(\w+)\]", neutral)):
        listed |= set(grammar.CLASSES[name].split())
    return listed


def test_no_cue_word_stands_in_two_splits() -> None:
    of_split: dict[str, set[str]] = {split: set() for split in tales.SPLITS}
    for table in (moods.EVENTS, moods.BEHAVIOURS):
        for split in tales.SPLITS:
            for cues in split_cues(table, split).values():
                for cue in cues:
                    assert cue_words(cue), cue
                    of_split[split] |= cue_words(cue)
    assert of_split["train"] & of_split["dev"] == set()
    assert of_split["train"] & of_split["test"] == set()
    assert of_split["dev"] & of_split["test"] == set()
    every = set().union(*of_split.values())
    assert every & neutral_words() == set()
    assert every & set(tales.LABELS) == set()


def test_there_are_twelve_cues_and_more_per_mood() -> None:
    for table in (moods.EVENTS, moods.BEHAVIOURS):
        assert set(table) == set(tales.MOODS)
        for text in table.values():
            assert len(set(lines(text))) >= 12
    assert len(set(tales.CUES)) == len(tales.CUES)


@pytest.mark.parametrize("stage", ["event", "behaviour"])
def test_mood_texts(stage: str) -> None:
    table = {"event": moods.EVENTS, "behaviour": moods.BEHAVIOURS}[stage]
    for split in tales.SPLITS:
        texts = jax.tree.map(np.asarray, tales.mood_texts(key(2), 140, split=split, stage=stage))
        assert np.bincount(texts.labels).tolist() == [20] * 7
        assert len(set(texts.frames.tolist())) > 4
        for i in range(140):
            text = words(texts.tokens[i])
            assert len(text) == texts.lengths[i]
            assert text[-1] == "."
            assert not set(text) & set(tales.LABELS)
            cue = tales.CUES[texts.cues[i]]
            assert cue in split_cues(table, split)[tales.MOODS[texts.labels[i]]]
            assert like(cue, " ".join(text[-len(cue.split()) :]))


def test_filler_is_neutral_and_long() -> None:
    rows = np.asarray(tales.filler(key(3), 30, 240))
    assert rows.shape == (30, 240)
    assert not set(" ".join(words(rows.ravel())).split()) & {"he", "she", "his", "her", "him"}
    assert (rows > 1).all()
    said = set(words(np.unique(rows)))
    cues = set().union(*(cue_words(cue) for cue in tales.CUES))
    names = set(" ".join((*grammar.GIRLS, *grammar.BOYS)).split())
    assert not said & (cues | set(tales.LABELS) | names)
    for row in rows[:5]:
        sentences = " ".join(words(row)).split(" . ")[:-1]
        assert len(set(sentences)) == len(sentences)


def test_instructions_name_their_mood_and_flat_ones_none() -> None:
    given = tales.instructions()
    assert tuple(given) == (*tales.MOODS, "flat")
    labels = dict(zip(tales.MOODS, tales.LABELS, strict=True))
    for mood, sentences in given.items():
        assert len(sentences) == 3
        for sentence in sentences:
            ids = tales.tokenizer.encode(sentence)
            wanted = {labels[mood]} if mood in labels else set()
            assert set(words(ids)) & set(tales.LABELS) == wanted
    documents = tales.documents(key(4), 60, genre="instruction")
    for row, event, behaviour in zip(
        np.asarray(documents.tokens),
        np.asarray(documents.latents["mood"]),
        np.asarray(documents.latents["behaviour"]),
        strict=True,
    ):
        named = [tales.LABELS.index(word) for word in words(row) if word in tales.LABELS]
        assert set(named) <= {int(event), int(behaviour)}


def test_same_key_same_items() -> None:
    first, again, other = (tales.items(key(seed), "recall", 6, distractors=1) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.tokens, other.tokens)


def test_refusals() -> None:
    with pytest.raises(UnknownName, match=r'unknown kind of item "recal"\. Did you mean "recall"'):
        tales.items(key(0), "recal", 2)
    with pytest.raises(UnknownName, match='unknown split "valid"'):
        tales.items(key(0), "recall", 2, pool="valid")
    with pytest.raises(ValueError, match=r"distractors 0\.\.6"):
        tales.items(key(0), "mood", 2, distractors=7)
    with pytest.raises(ValueError, match="n >= 1"):
        tales.mood_texts(key(0), 0)
    with pytest.raises(UnknownName, match="stage"):
        tales.mood_texts(key(0), 7, stage="middle")
    with pytest.raises(ValueError, match="length >= 1"):
        tales.filler(key(0), 1, 0)
