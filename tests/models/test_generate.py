"""Generation against forwards of the whole text, for every kind of decoder; sampling, stopping, bad input."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core.edits import Add, Scale, at, combine
from mechlab.core.sharding import make_mesh, shard
from mechlab.data.text import WordTokenizer
from mechlab.models.generate import Generated, _advance, advance, begin, generate, new_cache, restrict, stream
from mechlab.models.transformer import LOGICAL_AXES, gpt2, transformer
from tests.models.test_transformer_kinds import KINDS, build
from tests.models.tiny import SIZES, decoder, scrambled

PROMPTS = np.asarray([[3, 1, 4, 1, 5], [9, 2, 7, 7, 7]], np.int32)
LENGTHS = np.asarray([5, 2])
STEPS = 6
CAUSAL = [kind for kind, config in KINDS.items() if config.causal]


def greedy_by_forwards(model: Any, variables: Any, prompt: np.ndarray, steps: int) -> tuple[list[int], np.ndarray]:
    """The slow way: one forward of the whole text for every token; the text and the logits behind it."""
    text = prompt.tolist()
    forward = jax.jit(lambda tokens, last: model.apply(variables, tokens)[0, last])
    for _ in range(steps):
        padded = np.zeros((1, len(prompt) + steps), np.int32)
        padded[0, : len(text)] = text
        text.append(int(forward(padded, len(text) - 1).argmax()))
    return text, np.asarray(forward(np.asarray([text]), len(text) - 1))


def texts(out: Generated) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True)]


@pytest.mark.parametrize("kind", [*CAUSAL, "gpt2", "llama"])
def test_cached_equals_uncached_for_prompts_of_different_lengths(kind: str) -> None:
    model, params = decoder(kind) if kind in ("gpt2", "llama") else build(kind)
    out = generate(model, {"params": params}, PROMPTS, LENGTHS, steps=STEPS)
    for row, length in enumerate(LENGTHS):
        wanted, logits = greedy_by_forwards(model, {"params": params}, PROMPTS[row, :length], STEPS)
        assert texts(out)[row] == wanted
        np.testing.assert_allclose(out.logits[row], logits, atol=1e-5)
        scores = jax.nn.log_softmax(model.apply({"params": params}, np.asarray([wanted]))[0])
        told = [float(scores[t - 1, wanted[t]]) for t in range(length, len(wanted))]
        np.testing.assert_allclose(out.logprobs[row, length : len(wanted)], told, atol=1e-5)
    assert not np.asarray(out.tokens[1, 2 + STEPS :]).any()


def test_edits_act_in_the_prompt_and_in_every_step_at_absolute_positions() -> None:
    model, params = decoder("llama")
    rng = np.random.default_rng(1)
    edits = combine(
        at(model.sites, "resid_post", Add(jnp.asarray(rng.normal(size=16))), layer=1, span=(1, 7)),
        at(model.sites, "attn_z", Scale(jnp.asarray(0.0)), layer=0, head=2),
        at(model.sites, "logits", Add(jnp.eye(11)[4] * 3), position=8),
    )
    variables = {"params": params, "edits": edits}
    out = generate(model, variables, PROMPTS, LENGTHS, steps=STEPS)
    for row, length in enumerate(LENGTHS):
        wanted, logits = greedy_by_forwards(model, variables, PROMPTS[row, :length], STEPS)
        assert texts(out)[row] == wanted
        np.testing.assert_allclose(out.logits[row], logits, atol=1e-5)
    assert texts(out) != texts(generate(model, {"params": params}, PROMPTS, LENGTHS, steps=STEPS))


def test_in_pieces_or_in_one_go_and_alone_or_in_a_batch_the_same_key_writes_the_same_text() -> None:
    model, params = decoder("gpt2")
    variables, key = {"params": params}, jax.random.key(3)
    whole = generate(model, variables, PROMPTS, LENGTHS, key, steps=STEPS, temperature=2.0)
    pieces = begin(model, variables, PROMPTS, LENGTHS, steps=STEPS)
    for steps in (1, 2, 3):
        pieces = advance(model, variables, pieces, key, steps=steps, temperature=2.0)
    assert texts(pieces) == texts(whole)
    alone = generate(model, variables, PROMPTS[:1], LENGTHS[:1], key, steps=STEPS, temperature=2.0)
    assert texts(alone)[0] == texts(whole)[0]
    other = generate(model, variables, PROMPTS, LENGTHS, jax.random.key(4), steps=STEPS, temperature=2.0)
    assert texts(other) != texts(whole)


def test_samples_follow_the_distribution_of_the_model() -> None:
    model, params = decoder("gpt2")
    n = 4000
    out = generate(model, {"params": params}, np.tile(PROMPTS[:1], (n, 1)), None, jax.random.key(0), steps=1, top_k=5)
    logits = model.apply({"params": params}, PROMPTS[:1])[0, -1]
    wanted = jax.nn.softmax(restrict(logits, top_k=5))
    seen = np.bincount(np.asarray(out.tokens[:, 5]), minlength=11) / n
    np.testing.assert_allclose(seen, wanted, atol=4 * np.sqrt(0.25 / n))
    assert (seen > 0).sum() <= 5


def test_a_stop_token_ends_a_text_and_is_written() -> None:
    model, params = decoder("gpt2")
    free = texts(generate(model, {"params": params}, PROMPTS, LENGTHS, steps=STEPS))
    stop = free[0][6]
    out = generate(model, {"params": params}, PROMPTS, LENGTHS, steps=STEPS, stop=(stop,))
    for row, length in enumerate(LENGTHS):
        written = free[row][length:]
        n = written.index(stop) + 1 if stop in written else STEPS
        assert texts(out)[row] == free[row][: length + n]
        assert bool(out.done[row]) == (stop in written)
    again = advance(model, {"params": params}, out, steps=3, stop=(stop,))
    assert texts(again)[0] == texts(out)[0]


def test_going_back_in_a_text_is_going_on_from_an_earlier_position() -> None:
    model, params = decoder("llama")
    variables = {"params": params}
    _, cache = model.apply(variables, PROMPTS, np.tile(np.arange(5), (2, 1)), None, new_cache(model, 2, 12))
    # Tokens 3 and 4 are taken back; 8 stands at position 3 instead.
    tokens, positions = np.full((2, 1), 8), np.full((2, 1), 3)
    logits, _ = model.apply(variables, tokens, positions, None, cache)
    wanted = model.apply(variables, np.concatenate([PROMPTS[:, :3], tokens], 1))
    np.testing.assert_allclose(logits[:, 0], wanted[:, -1], atol=1e-5)


def test_reading_one_token_gives_its_logits() -> None:
    model, params = decoder("gpt2")
    read = model.apply({"params": params}, PROMPTS, None, None, None, LENGTHS - 1)
    wanted = model.apply({"params": params}, PROMPTS)
    np.testing.assert_allclose(read[:, 0], wanted[np.arange(2), LENGTHS - 1], atol=1e-6)


def test_sharded_parameters_write_the_same_text() -> None:
    model, params = decoder("llama")
    wanted = generate(model, {"params": params}, PROMPTS, LENGTHS, steps=STEPS)
    placed = shard(params, make_mesh(data=4, model=2), LOGICAL_AXES)
    out = generate(model, {"params": placed}, PROMPTS, LENGTHS, steps=STEPS)
    assert texts(out) == texts(wanted)
    np.testing.assert_allclose(out.logits, wanted.logits, atol=1e-5)


def test_half_precision_keeps_its_cache_in_half_precision() -> None:
    config = gpt2(**SIZES, dtype="bfloat16")
    model = transformer(config)
    params = scrambled(jax.eval_shape(model.init, jax.random.key(0)))
    out = generate(model, {"params": params}, PROMPTS, LENGTHS, steps=2)
    assert out.cache.k.dtype == jnp.bfloat16
    logits = model.apply({"params": params}, out.tokens[:1, :7])[0, -1]
    np.testing.assert_allclose(out.logits[0], logits, atol=0.15)


def test_restrict_equals_a_plain_sort() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, 9)).round(1)
    for row, p, k in zip(logits, rng.uniform(0.05, 1, 20), rng.integers(1, 9, 20), strict=True):
        order = sorted(range(9), key=lambda i: (-row[i], i))[:k]
        weights = np.exp(row[order] / 0.7)
        before = np.cumsum(weights / weights.sum()) - weights / weights.sum()
        kept = {token for token, mass in zip(order, before, strict=True) if mass < p}
        found = restrict(jnp.asarray(row), 0.7, int(k), p)
        assert set(np.flatnonzero(np.isfinite(found)).tolist()) == kept
        np.testing.assert_allclose(found[order[0]], row[order[0]] / 0.7, rtol=1e-6)
    assert np.isfinite(restrict(jnp.asarray(logits[0]), top_p=1e-9)).sum() == 1


class Letters:
    """Tokens 1 .. 10 are letters, and some end half a character."""

    def encode(self, text: str) -> list[int]:
        return ["_abcdefghij".index(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        text = "".join("_abcdefghij"[i] for i in ids)
        return text if len(ids) % 3 else text[:-1] + "\ufffd"


def test_a_stream_is_the_text_of_generate_and_never_shows_half_a_character() -> None:
    model, params = decoder("gpt2")
    pieces = list(stream(model, {"params": params}, Letters(), "cada", steps=STEPS + 1))
    tokens = generate(model, {"params": params}, [Letters().encode("cada")], steps=STEPS + 1)
    assert "cada" + "".join(pieces) == "".join("_abcdefghij"[i] for i in np.asarray(tokens.tokens[0]))
    assert "\ufffd" not in "".join(pieces)


def test_a_stream_of_words_begins_after_the_prompt() -> None:
    model, params = decoder("gpt2")
    words = WordTokenizer(words=("<pad>", "<bos>", *"abcdefghi"))
    pieces = list(stream(model, {"params": params}, words, "a b", jax.random.key(0), steps=4))
    assert len("".join(pieces).replace("\n", " ").split()) <= 4
    assert pieces


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 8}, "5 prompt tokens and 8 steps are more than the model's context 12"),
        ({"lengths": np.asarray([5, 6])}, r"lengths must be in 1\.\.5, got 5\.\.6"),
        ({"lengths": np.asarray([5])}, r"lengths must be \(B,\) = \(2,\)"),
        ({"tokens": np.zeros((2, 0), np.int32)}, "non-empty integers"),
        ({"tokens": PROMPTS.astype(float)}, "non-empty integers"),
        ({"tokens": PROMPTS + 5}, r"tokens must be in 0\.\.10, got"),
        ({"top_k": 3}, "need a key"),
        ({"temperature": 0.5}, "need a key"),
        ({"temperature": 0.0, "key": 0}, "leave the key out for greedy"),
        ({"top_k": 12, "key": 0}, r"top_k must be in 1\.\.11"),
        ({"top_p": 0.0, "key": 0}, r"top_p must be in \(0, 1\]"),
        ({"stop": (11,)}, r"stop tokens must be in 0\.\.10"),
    ],
)
def test_bad_input_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    model, params = decoder("gpt2")
    given = {"tokens": PROMPTS, "lengths": None, "steps": 2} | settings
    tokens, lengths = given.pop("tokens"), given.pop("lengths")
    if "key" in given:
        given["key"] = jax.random.key(given["key"])
    with pytest.raises(ValueError, match=message):
        generate(model, {"params": params}, tokens, lengths, **given)


def test_a_model_that_is_not_causal_has_no_cache() -> None:
    model, params = build("bert")
    with pytest.raises(ValueError, match="a cache needs a causal model"):
        generate(model, {"params": params}, PROMPTS, steps=2)


def test_padding_beyond_a_prompt_may_be_anything() -> None:
    model, params = decoder("llama")
    junk = PROMPTS.copy()
    junk[1, 2:] = 10_000
    first = generate(model, {"params": params}, PROMPTS, LENGTHS, steps=3)
    assert texts(generate(model, {"params": params}, junk, LENGTHS, steps=3)) == texts(first)


def test_a_second_prompt_of_the_same_shape_does_not_compile_again() -> None:
    model, params = decoder("gpt2")
    sampled = dict.fromkeys(("temperature", "top_p"), 0.9)
    generate(model, {"params": params}, PROMPTS, LENGTHS, jax.random.key(0), steps=3, **sampled)
    before = _advance._cache_size()
    generate(model, {"params": params}, PROMPTS[::-1].copy(), LENGTHS, jax.random.key(1), steps=3, **sampled)
    assert _advance._cache_size() == before


def test_windows_are_kept_in_long_texts() -> None:
    config = dataclasses.replace(KINDS["mistral"], context=40)
    model = transformer(config)
    params = scrambled(jax.eval_shape(model.init, jax.random.key(0)))
    out = generate(model, {"params": params}, PROMPTS[:1], steps=30)
    assert texts(out)[0] == greedy_by_forwards(model, {"params": params}, PROMPTS[0], 30)[0]
