"""What is measured on a subject: probes by depth, words alone, the model asked, prompts in front, tokens behind."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.steering._emotion_probes_subjects import Folds, Subject
from mechlab.analysis.metrics import cross_entropy
from mechlab.analysis.probes import fit_logistic
from mechlab.core.rng import stream
from mechlab.data.worlds import tales
from mechlab.methods.steering import emotion_probes as emo
from mechlab.methods.steering.readouts import capture_residuals, encode_texts, label_logprob, states_at
from mechlab.methods.steering.vectors import Texts, pad
from mechlab.models.generate import generate

LINEAR_STEPS = 10
WORD_STEPS = 60


class Reading(NamedTuple):
    """Probes of one kind of features.

    Attributes:
      probes: leaves (F, S, L + 1, ...): folds, seeds, depths.
      predicted: (S, L + 1, M) classes of the M tested texts, each by its own fold.
      hits: likewise, whether they are right.
      depth: the best one on dev texts, in the mean over folds and seeds.
    """

    probes: emo.Probe
    predicted: np.ndarray
    hits: np.ndarray
    depth: int

    @property
    def at_depth(self) -> np.ndarray:
        """(S, M) hits at the chosen depth."""
        return self.hits[:, self.depth]

    def chosen(self, fold: int = 0) -> emo.Probe:
        """The chosen depth's probes of a fold, leaves (S, ...)."""
        return jax.tree.map(lambda leaf: leaf[fold, :, self.depth], self.probes)


def features(subject: Subject, params: Any, pool: str = "last") -> jax.Array:
    """(N, L + 1, D) of all texts of a subject, with these parameters."""
    texts = encode_texts(subject.tokenizer, subject.texts, subject.context)
    return capture_residuals(subject.model, {"params": params}, texts, pool=pool)


def random_params(key: jax.Array, subject: Subject) -> Any:
    """The same network, untrained."""
    return subject.model.init(key)


def shuffled_params(key: jax.Array, params: Any) -> Any:
    """The same weights in random places, each array in itself: the scale of everything is kept."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    moved = [jax.random.permutation(k, leaf.ravel()).reshape(leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, moved)


def read(keys: jax.Array, x: jax.Array, y: np.ndarray, folds: Folds, classes: int, config: emo.ProbeConfig) -> Reading:
    """Probes of every fold, seed (keys (S,)) and depth, in one program."""
    probes, predicted = _fit_lanes(
        keys, x, jnp.asarray(y), jnp.asarray(folds.train), jnp.asarray(folds.dev), classes=classes, config=config
    )
    test = folds.test
    of_test = np.moveaxis(np.asarray(predicted)[folds.of_item[test], :, :, test], 0, -1)
    depth = int(np.asarray(probes.dev_accuracy).mean((0, 1)).argmax())
    return Reading(probes, of_test, of_test == np.asarray(y)[test], depth)


@functools.partial(jax.jit, static_argnames=("classes", "config"))
def _fit_lanes(
    keys: jax.Array,
    x: jax.Array,
    y: jax.Array,
    train: jax.Array,
    dev: jax.Array,
    *,
    classes: int,
    config: emo.ProbeConfig,
) -> tuple[emo.Probe, jax.Array]:
    def of_seed(key: jax.Array, train: jax.Array, dev: jax.Array) -> tuple[emo.Probe, jax.Array]:
        probes = emo.fit_probes(key, x, y, train, dev, classes=classes, config=config)
        return probes, emo.read_depths(probes, x).argmax(-1)

    return jax.vmap(lambda train, dev: jax.vmap(lambda key: of_seed(key, train, dev))(keys))(train, dev)


def read_linear(x: jax.Array, y: np.ndarray, folds: Folds, classes: int) -> np.ndarray:
    """(M,) hits of the linear probe on features (N, D) of one depth: logistic regression by Newton's method."""
    predicted = np.asarray(_fit_linear(x, jnp.asarray(y), jnp.asarray(folds.train), classes=classes))
    test = folds.test
    return predicted[folds.of_item[test], test] == np.asarray(y)[test]


@functools.partial(jax.jit, static_argnames=("classes",))
def _fit_linear(x: jax.Array, y: jax.Array, train: jax.Array, *, classes: int) -> jax.Array:
    def of_fold(train: jax.Array) -> jax.Array:
        seen = x[train]
        standard = emo.standardise(x, seen.mean(0), seen.std(0))
        probe = fit_logistic(standard[train], y[train], classes=classes, steps=LINEAR_STEPS)
        return probe(standard).argmax(-1)

    # One Hessian at a time: (K (D + 1))^2 numbers, of N D K^2 while it is made.
    return jax.lax.map(of_fold, train)


def count_words(texts: Sequence[str]) -> np.ndarray:
    """(N, V) how often each word stands in each text."""
    found = [re.findall(r"[a-z']+", text.lower()) for text in texts]
    columns = {word: column for column, word in enumerate(sorted(set().union(*found)))}
    counts = np.zeros((len(texts), len(columns)), np.float32)
    for row, words in zip(counts, found, strict=True):
        np.add.at(row, [columns[word] for word in words], 1)
    return counts


def read_words(counts: np.ndarray, y: np.ndarray, folds: Folds, classes: int) -> np.ndarray:
    """(M,) hits of logistic regression on TF-IDF weights of words: C = 1, rows of length 1."""
    predicted = np.asarray(_fit_words(jnp.asarray(counts), jnp.asarray(y), jnp.asarray(folds.train), classes=classes))
    test = folds.test
    return predicted[folds.of_item[test], test] == np.asarray(y)[test]


@functools.partial(jax.jit, static_argnames=("classes",))
def _fit_words(counts: jax.Array, y: jax.Array, train: jax.Array, *, classes: int) -> jax.Array:
    def of_fold(train: jax.Array) -> jax.Array:
        documents = (counts[train] > 0).sum(0)
        weighted = counts * (jnp.log((1 + len(train)) / (1 + documents)) + 1)
        x = weighted / jnp.maximum(jnp.linalg.norm(weighted, axis=1, keepdims=True), 1e-9)
        seen, labels = x[train], y[train]

        def loss(params: Any) -> jax.Array:
            fit = cross_entropy(seen @ params["w"] + params["b"], labels)
            return fit + 0.5 * (params["w"] ** 2).sum() / len(train)

        optimiser = optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(15, store_grad=True))
        gradient = optax.value_and_grad_from_state(loss)

        def step(_: int, carry: Any) -> Any:
            params, state = carry
            value, grads = gradient(params, state=state)
            updates, state = optimiser.update(grads, state, params, value=value, grad=grads, value_fn=loss)
            return optax.apply_updates(params, updates), state

        start = {"w": jnp.zeros((x.shape[1], classes)), "b": jnp.zeros(classes)}
        params, _ = jax.lax.fori_loop(0, WORD_STEPS, step, (start, optimiser.init(start)))
        return (x @ params["w"] + params["b"]).argmax(-1)

    return jax.lax.map(of_fold, train)


def ask(key: jax.Array, subject: Subject, shots: int) -> dict[str, np.ndarray]:
    """Hits (M,) of the model asked about its tested texts; few-shot, about the first ``shots`` in random order.

    Keys: "zero_shot", "zero_shot_normalised", "calibrated", "few_shot", and "few_shot_rows", the rows of M it is about.
    """
    test, answers, variables = subject.folds.test, subject.answers(), {"params": subject.params}

    def scored(prompts: list[str], normalise: bool = False) -> np.ndarray:
        texts = encode_texts(subject.tokenizer, prompts, subject.context)
        return np.asarray(label_logprob(subject.model, variables, texts, answers, normalise=normalise))

    plain = scored([subject.ask(row) for row in test])
    without = scored([subject.question.format(name=subject.persons[0] or "You")])
    rows = np.sort(np.asarray(jax.random.permutation(stream(key, "shots"), len(test)))[:shots])
    front = examples(subject)
    few = scored([front + subject.ask(test[row]) for row in rows])
    labels = subject.labels[test]
    return {
        "zero_shot": plain.argmax(1) == labels,
        "zero_shot_normalised": (plain / np.asarray([len(answer) for answer in answers])).argmax(1) == labels,
        "calibrated": (plain - without).argmax(1) == labels,
        "few_shot": few.argmax(1) == labels[rows],
        "few_shot_rows": rows,
    }


def examples(subject: Subject) -> str:
    """One answered prompt per class, the shortest text among the training texts of fold 0."""
    train = subject.folds.train[0]
    lines = []
    for label, word in enumerate(emo.label_words(subject.names)):
        row = min(train[subject.labels[train] == label], key=lambda row: (len(subject.texts[row]), row))
        lines.append(f"{subject.ask(int(row))} {word}.\n")
    return "".join(lines)


class Malleability(NamedTuple):
    """Neutral and emotional texts behind instructions.

    Attributes:
      prompts: names of the rows: every class, "flat", and last "none".
      read: (S, P, K) mean probabilities in neutral texts.
      shift: (S, P, K) less those without an instruction.
      override: (S, 2) shares of emotional texts read as the prompt's class, and as their own.
      examples: lines of a table: what stood in front of one neutral text and what was read.
    """

    prompts: list[str]
    read: np.ndarray
    shift: np.ndarray
    override: np.ndarray
    examples: list[str]


def malleability(
    subject: Subject, probes: emo.Probe, depth: int, neutral: list[str], emotional: np.ndarray
) -> Malleability:
    """The chosen depth's probes (S, ...) on texts behind an instruction of every class, a flat one, and none.

    Args:
      subject: tales takes its own instructions, in turn over the texts; other models are told "You feel very angry."
      probes, depth: as trained in A, without a change.
      neutral: texts without an emotion.
      emotional: rows of the subject's tested texts.
    """
    words = emo.label_words(subject.names)
    own = tales.instructions()
    fronts = {
        name: own[name] if subject.name == "tales" else (f"You feel very {word}.",)
        for name, word in zip(subject.names, words, strict=True)
    } | {"flat": own["flat"] if subject.name == "tales" else ("This is a story.",), "none": ("",)}

    def logits(texts: list[str], prompts: Sequence[str]) -> jax.Array:
        """(S, P, N, K)."""
        rows = [f"{fronts[name][i % len(fronts[name])]} {text}" for name in prompts for i, text in enumerate(texts)]
        batch = encode_texts(subject.tokenizer, [row.strip() for row in rows], subject.context)
        x = capture_residuals(subject.model, {"params": subject.params}, batch)[:, depth]
        found = jax.vmap(lambda probe: probe(x))(probes)
        return found.reshape(len(found), len(prompts), len(texts), -1)

    found = logits(neutral, list(fronts))
    shifted, shift = jax.vmap(emo.prompt_shift)(found, found[:, -1])
    told = logits([subject.texts[row] for row in emotional], list(subject.names))
    over = jax.vmap(lambda x: jnp.stack(emo.override_rates(x, jnp.arange(len(words)), subject.labels[emotional])))(told)
    first = np.asarray(jax.nn.softmax(found[0, :, 0], -1))
    lines = [
        f"{(fronts[name][0] + ' ' + neutral[0]).strip()} -> {subject.names[p.argmax()]} ({p.max():.2f})"
        for name, p in zip(fronts, first, strict=True)
    ]
    return Malleability(list(fronts), np.asarray(shifted), np.asarray(shift), np.asarray(over), lines)


class Persistence(NamedTuple):
    """Hits at P offsets behind N texts.

    Attributes:
      offsets: tokens behind the end of the text.
      early: (S, P, N) of the probe trained at the end of texts.
      shuffled: (S, P, N) what the same readings hit behind another text, in the mean over all other texts.
      late: (S, P, N) of a probe trained behind texts, and ``late_shuffled``; None where it was not trained.
      words: (N,) of the continuation's words alone, or None.
    """

    offsets: tuple[int, ...]
    early: np.ndarray
    shuffled: np.ndarray
    late: np.ndarray | None
    late_shuffled: np.ndarray | None
    words: np.ndarray | None


def behind(subject: Subject, rows: np.ndarray, more: np.ndarray) -> tuple[Texts, np.ndarray]:
    """Texts with continuations (N, M) of tokens, and where each text ends, (N,)."""
    texts = encode_texts(subject.tokenizer, [subject.texts[row] for row in rows], subject.context)
    ends = np.asarray(texts.lengths)
    whole = [[*ids[:end], *extra] for ids, end, extra in zip(np.asarray(texts.tokens), ends, more, strict=True)]
    return pad([list(map(int, row)) for row in whole]), ends - 1


def neutral_tokens(key: jax.Array, subject: Subject, rows: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """(N, M) tokens of neutral sentences behind the texts of each part, in the subject's own tokens."""
    drawn = np.asarray(tales.filler(key, sum(map(len, rows.values())), length))
    if subject.name == "tales":
        return _by_part(drawn, rows)
    front = len(subject.tokenizer.encode("It"))
    told = [list(map(int, subject.tokenizer.encode("It " + tales.tokenizer.decode(row))))[front:] for row in drawn]
    return _by_part(np.asarray([ids[:length] for ids in told]), rows)


def ask_later(subject: Subject, rows: np.ndarray, more: np.ndarray, offset: int) -> np.ndarray:
    """(N,) hits of the model asked behind its texts and at most ``offset`` tokens (whole sentences) of what follows.

    Whether the model still knows, which is not the same as whether every later token carries it.
    """
    stop = tales.tokenizer.id(".")
    prompts = []
    for row, ids in zip(rows, more, strict=True):
        ends = np.flatnonzero(ids[:offset] == stop)
        between = ids[: ends[-1] + 1] if ends.size else ids[:0]
        question = subject.tokenizer.encode(subject.question.format(name=subject.persons[row]), bos=False)
        prompts.append([*subject.tokenizer.encode(subject.texts[row]), *between, *question])
    scores = label_logprob(
        subject.model, {"params": subject.params}, pad([list(map(int, ids)) for ids in prompts]), subject.answers()
    )
    return np.asarray(scores).argmax(1) == subject.labels[rows]


def _by_part(drawn: np.ndarray, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    ends = np.cumsum([len(at) for at in rows.values()])
    return dict(zip(rows, np.split(drawn, ends[:-1]), strict=True))


def own_tokens(key: jax.Array, subject: Subject, rows: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """(N, M) tokens that the model writes behind the texts of each part, at temperature 1."""
    texts = encode_texts(subject.tokenizer, [subject.texts[row] for at in rows.values() for row in at], subject.context)
    done = generate(subject.model, {"params": subject.params}, texts.tokens, texts.lengths, key, steps=length)
    at = np.asarray(texts.lengths)[:, None] + np.arange(length)
    return _by_part(np.take_along_axis(np.asarray(done.tokens), at, 1), rows)


def persistence(
    keys: jax.Array,
    subject: Subject,
    reading: Reading,
    rows: dict[str, np.ndarray],
    more: dict[str, np.ndarray],
    offsets: tuple[int, ...],
    config: emo.ProbeConfig,
    *,
    words: bool = False,
) -> Persistence:
    """What is read p tokens behind the texts.

    Args:
      keys: (S,) of the probes.
      subject, reading: fold 0's probes at the chosen depth.
      rows: texts by part: "test", and "train" and "dev" for the probe that is trained behind texts.
      more: continuations (N, M) of every part.
      offsets: p, from 0 to M.
      config: of the probe that is trained behind texts.
      words: also classify the continuations' words alone.
    """
    everything, of_part = np.concatenate(list(rows.values())), np.repeat(list(rows), [len(at) for at in rows.values()])
    texts, ends = behind(subject, everything, np.concatenate([more[part] for part in rows]))
    places = ends[:, None] + np.asarray(offsets)
    states = states_at(subject.model, {"params": subject.params}, texts, places)[:, :, reading.depth]
    found = {part: states[of_part == part] for part in rows}
    labels = {part: subject.labels[at] for part, at in rows.items()}
    x, y = found["test"], labels["test"]

    def hits(probes: emo.Probe) -> tuple[np.ndarray, np.ndarray]:
        read = np.asarray(jax.vmap(lambda probe: jax.vmap(probe, 1)(x).argmax(-1))(probes))
        return read == y, behind_others(read, y)

    early, shuffled = hits(reading.chosen())
    if "train" not in rows:
        return Persistence(offsets, early, shuffled, None, None, None)
    after = [p for p, offset in enumerate(offsets) if offset > 0]
    parts = [found[part][:, after].reshape(-1, x.shape[-1]) for part in ("train", "dev")]
    of_parts = np.concatenate([np.repeat(labels[part], len(after)) for part in ("train", "dev")])
    split = len(parts[0])
    at = np.arange(len(of_parts))
    folds = Folds(at[None, :split], at[None, split:], np.where(at < split, -1, 0))
    late = read(keys, jnp.concatenate(parts)[:, None], of_parts, folds, len(subject.names), config)
    of_late = hits(jax.tree.map(lambda leaf: leaf[0, :, 0], late.probes))
    by_words = _words_alone(subject, rows, more, labels) if words else None
    return Persistence(offsets, early, shuffled, *of_late, by_words)


def behind_others(read: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of readings (..., N), the share of the N - 1 other texts whose class each one names.

    That is its hit in a shuffled pair of text and continuation, in the mean over all pairings.
    """
    counts = np.bincount(labels, minlength=int(read.max()) + 1)
    return (counts[read] - (read == labels)) / (len(labels) - 1)


def _words_alone(
    subject: Subject, rows: dict[str, np.ndarray], more: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> np.ndarray:
    order = ("train", "test")
    tokens = np.concatenate([more[part] for part in order])
    counts = np.zeros((len(tokens), subject.model.module.config.vocabulary), np.float32)
    for row, ids in zip(counts, tokens, strict=True):
        np.add.at(row, ids, 1)
    counts = counts[:, counts.any(0)]
    train, at = len(rows["train"]), np.arange(len(tokens))
    folds = Folds(at[None, :train], at[None, :1], np.where(at < train, -1, 0))
    return read_words(counts, np.concatenate([labels[part] for part in order]), folds, len(subject.names))
