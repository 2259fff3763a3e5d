"""The world tales: its vocabulary, its documents, and that what is said of a document is true of its text."""

from __future__ import annotations

import re
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlab.core.errors import UnknownName
from mechlab.data.worlds import tales
from mechlab.data.worlds.tales import corpus, grammar, moods, tables
from mechlab.training.batches import generated

COUNT = 300
key = jax.random.key


def words(ids: np.ndarray) -> list[str]:
    return [tales.VOCABULARY[i] for i in np.asarray(ids) if i]


@pytest.fixture(scope="module")
def texts() -> tales.Documents:
    return jax.tree.map(np.asarray, tales.documents(key(0), COUNT))


def test_vocabulary_is_small_and_every_word_is_written() -> None:
    assert len(tales.VOCABULARY) <= 1024
    assert tales.VOCABULARY[:2] == ("<pad>", "<bos>")
    batch = jax.jit(partial(tales.sample_batch, batch=1000))
    seen = set(np.unique(np.concatenate([batch(key(seed))["tokens"].ravel() for seed in range(3)])).tolist())
    unseen = [word for index, word in enumerate(tales.VOCABULARY) if index not in seen | {0}]
    assert unseen == []


def test_every_document_decodes_and_encodes_to_itself(texts: tales.Documents) -> None:
    for row, length in zip(texts.tokens, texts.lengths, strict=True):
        assert row[0] == 1
        assert not row[length:].any()
        assert (row[1:length] > 1).all()
        text = tales.tokenizer.decode(row)
        assert "\n" not in text
        assert text[-1] in ".”"
        assert tales.tokenizer.encode(text).tolist() == row[:length].tolist()


def test_no_document_can_be_longer_than_the_context() -> None:
    assert tables.longest(tables.PLOTS).max() <= tales.CONTEXT


def test_articles_agree_with_the_word_that_follows(texts: tales.Documents) -> None:
    for row in texts.tokens:
        text = " ".join(words(row))
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text


def test_pronouns_agree_with_the_only_person(texts: tales.Documents) -> None:
    girls = set(" ".join(grammar.GIRLS).split())
    boys = set(" ".join(grammar.BOYS).split())
    for row in texts.tokens:
        spoken = words(row)
        named = set(spoken) & (girls | boys)
        if len(named) == 1:
            wrong = {"he", "him", "his", "boy"} if named <= girls else {"she", "her", "girl"}
            # "A big boy took her seat" is somebody else.
            assert not (set(re.sub("a big boy|a girl", "", " ".join(spoken)).split()) & wrong), " ".join(spoken)


def test_genres_and_stages_tell_what_a_document_is() -> None:
    for genre, stage in {
        "question": "ask_",
        "list": "list_open",
        "instruction": "instruction",
        "filler": "filler",
    }.items():
        texts = tales.documents(key(1), 20, genre=genre)
        assert {tales.GENRES[g] for g in np.asarray(texts.genres)} == {genre}
        for row in np.asarray(texts.stages):
            assert any(tales.STAGES[s].startswith(stage) for s in row if s >= 0)
    for row in np.asarray(tales.documents(key(1), 20, genre="dialogue").tokens):
        assert "“" in words(row)


def test_shares_of_genres(texts: tales.Documents) -> None:
    genres = np.bincount(np.asarray(tales.documents(key(2), 3000).genres), minlength=len(tales.GENRES)) / 3000
    wanted = np.asarray(list(grammar.GENRE_SHARES.values())) / sum(grammar.GENRE_SHARES.values())
    np.testing.assert_allclose(genres, wanted, atol=0.03)


def test_spans_hold_what_the_latents_say(texts: tales.Documents) -> None:
    seen = set()
    for i in range(COUNT):
        row = words(texts.tokens[i])
        for name in tales.LATENTS:
            value, (start, stop) = texts.latents[name][i], texts.spans[name][i]
            assert (value == -1) == (start == -1) == (stop == -1)
            if value == -1:
                continue
            seen.add(name)
            assert 0 < start < stop <= texts.lengths[i]
            said = row[start:stop]
            if name in ("who", "other", "where", "thing", "preference", "goods"):
                assert said == [tales.VOCABULARY[value]]
                assert said[0] not in row[:start]
            elif name == "count":
                assert said == [grammar.NUMBERS.split()[value - 1]]
            elif name == "truth":
                assert said == [["no", "yes"][value]]
            elif name == "label":
                assert said == [tales.LABELS[value]]
            elif name == "period":
                stage = tales.STAGES[texts.stages[i, start]]
                item = 2 if stage in ("list_both", "list_comma") else 1
                assert stop - start == item * value
                assert row[stop : stop + item] in (said[:item], ["and", "so", "on"][:item])
            else:
                cue = (texts.event_cues if name == "mood" else texts.behaviour_cues)[i]
                assert cue_pattern(tales.CUES[cue]).fullmatch(" ".join(said))
                assert mood_of_cue(cue) == tales.MOODS[value]
    assert seen == set(tales.LATENTS)


def cue_pattern(line: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(line)))


def mood_of_cue(cue: int) -> str:
    for table in (moods.EVENTS, moods.BEHAVIOURS):
        for mood, lines in table.items():
            if tales.CUES[cue] in lines:
                return mood
    raise AssertionError(cue)


def test_counts_add_up() -> None:
    number = {word: n for n, word in enumerate(grammar.NUMBERS.split(), 1)}
    texts = tales.documents(key(3), 200, genre="dialogue")
    checked = 0
    for row, count in zip(np.asarray(texts.tokens), np.asarray(texts.latents["count"]), strict=True):
        said = re.search(r" i have (\w+) .* (\w+) more , .* now i have (\w+) ", " ".join(words(row)))
        if said is not None:
            had, more, in_all = (number[word] for word in said.groups())
            assert had + more == in_all == count
            checked += 1
    assert checked > 5


def test_behaviour_fits_the_event_and_moods_of_two_persons_differ(texts: tales.Documents) -> None:
    both = (texts.event_cues >= 0) & (texts.behaviour_cues >= 0)
    assert both.sum() > 30
    for event, behaviour in zip(texts.event_cues[both], texts.behaviour_cues[both], strict=True):
        assert mood_of_cue(event) == mood_of_cue(behaviour)


def test_label_words_stand_in_questions_and_instructions_only(texts: tales.Documents) -> None:
    allowed = {tales.STAGES.index("ask_mood"), tales.STAGES.index("instruction")}
    labels = [tales.tokenizer.id(label) for label in tales.LABELS]
    assert set(texts.stages[np.isin(texts.tokens, labels)].tolist()) == allowed


def test_a_batch_is_rows_of_whole_documents() -> None:
    batch = tales.sample_batch(key(4), 16)
    tokens, mask = np.asarray(batch["tokens"]), np.asarray(batch["mask"])
    assert tokens.shape == mask.shape == (16, 256)
    assert tokens.dtype == np.int32 and mask.dtype == bool
    assert (tokens[:, 0] == 1).all()
    assert mask[:, :-1].all() and not mask[:, -1].any()
    for row in tokens:
        row = row[:-1] if row[-1] == 1 else row  # a document that has just begun is no text yet
        text = tales.tokenizer.decode(row)
        assert tales.tokenizer.encode(text).tolist() == row.tolist()
        for document in text.split("\n")[:-1]:
            assert document[-1] in ".”"


def test_a_row_that_is_not_filled_is_padded_and_masked() -> None:
    batch = tales.sample_batch(key(5), 64, length=700, genres=("list",))
    tokens, mask = np.asarray(batch["tokens"]), np.asarray(batch["mask"])
    np.testing.assert_array_equal(mask[:, :-1], tokens[:, 1:] != 0)
    short = tales.sample_batch(key(5), 2, length=20)
    assert short["tokens"].shape == (2, 20)


def test_same_key_same_text_eager_jitted_and_one_by_one() -> None:
    sample = partial(tales.sample_batch, batch=3)
    eager, jitted = sample(key(6))["tokens"], jax.jit(sample)(key(6))["tokens"]
    np.testing.assert_array_equal(eager, jitted)
    assert not np.array_equal(eager, sample(key(7))["tokens"])
    batches = generated(sample)
    fetched = batches.fetch(jax.tree.map(lambda leaf: leaf[0], batches.plan(key(6), 4, 2)))["tokens"]
    np.testing.assert_array_equal(fetched, sample(jax.random.fold_in(key(6), 4))["tokens"])

    many = tales.documents(key(8), 5)
    # A document depends on its own key only: a vmapped row equals the same row alone.
    alone = [corpus._documents(k[None], genres=tales.GENRES, length=256) for k in jax.random.split(key(8), 5)]
    for i, one in enumerate(alone):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b[0]), many, one)


@settings(max_examples=10)
@given(st.integers(0, 2**31 - 1))
def test_any_seed_gives_readable_rows(seed: int) -> None:
    row = np.asarray(SAMPLE(key(seed))["tokens"])[0]
    text = tales.tokenizer.decode(row)
    assert tales.tokenizer.encode(text).tolist() == row.tolist()
    assert len(set(words(row))) > 20


SAMPLE = jax.jit(partial(tales.sample_batch, batch=1))


def test_the_world_has_not_changed_unnoticed() -> None:
    """Shipped weights belong to one grammar: whoever changes it must train them anew and then change this line."""
    assert tales.digest() == tales.DIGEST


def test_refusals() -> None:
    with pytest.raises(UnknownName, match=r'unknown genre "storys"\. Did you mean "story"'):
        tales.documents(key(0), 1, genre="storys")
    with pytest.raises(UnknownName, match="genre"):
        tales.sample_batch(key(0), 1, genres=("story", "poem"))
    with pytest.raises(ValueError, match="at least one"):
        tales.sample_batch(key(0), 1, genres=())
    with pytest.raises(ValueError, match="batch=0"):
        tales.sample_batch(key(0), 0)
    with pytest.raises(ValueError, match="n >= 1"):
        tales.documents(key(0), 0)
    with pytest.raises(UnknownName, match=r'unknown word "dragon"'):
        tales.tokenizer.encode("Tom met a dragon.")
    with pytest.raises(ValueError, match="no step of a plot"):
        tables.parse_plots(["fact@A fcat@B"])
