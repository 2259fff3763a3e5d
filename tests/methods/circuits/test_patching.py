"""Every cell of a patching sweep equals a plain forward with that one edit in it, in every family of decoders."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core.edits import Replace, at, combine
from mechlab.core.sharding import make_mesh
from mechlab.core.sweeps import grid, sweep
from mechlab.methods.circuits import patching
from mechlab.methods.circuits.patching import (
    HEAD_SITES,
    STREAM_SITES,
    patch_heads,
    patch_heads_by_position,
    patch_neurons,
    patch_residual,
)
from mechlab.models.transformer import gpt2, llama, transformer
from tests.models.test_transformer_kinds import KINDS as FAMILIES
from tests.models.tiny import SIZES, scrambled

KINDS = {kind: config for kind, config in FAMILIES.items() if kind in ("neox", "mistral", "gemma2", "gemma3")} | {
    "gpt2": gpt2(**SIZES),
    "llama": llama(**SIZES, kv_heads=2, tied=False),
    "one group": llama(**SIZES | {"head_width": 6}, kv_heads=1),
    "attention only": gpt2(**SIZES | {"hidden": None}),
    "post-norm": gpt2(**SIZES, norm_order="post"),
    "one layer": gpt2(**SIZES | {"layers": 1}),
}
LENGTH = 6


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Fewer, wider groups of positions: less to compile, and positions that are not the first of their group."""
    monkeypatch.setattr(patching, "PROGRAMS", 2)


def metric(logits):
    return logits[:, 1] - logits[:, 2] * logits[:, 0]


def setup(kind, sites):
    model = transformer(KINDS[kind])
    params = scrambled(jax.eval_shape(model.init, jax.random.key(0)))
    tokens, clean = jax.random.randint(jax.random.key(1), (2, 2, LENGTH), 0, SIZES["vocabulary"])
    present = tuple(site for site in sites if site in model.sites)
    source = model.capture({"params": params}, clean, sites=present)[1]
    return model, params, tokens, source


def one_by_one(model, params, tokens, source, read=-1, **axes):
    """{site: the metric of a plain forward for every layer, head and span}; axes: first and last patched positions."""
    config = model.module.config
    counts = {site: {"k": config.n_kv_heads, "v": config.n_kv_heads}.get(site, config.heads) for site in source}

    def effect(cell, params, source):
        edits = []
        for number, (site, value) in enumerate(sorted(source.items())):
            place = {"layer": cell["layer"], "span": (cell["first"], cell["last"] + 1)}
            if site in HEAD_SITES:
                place["head"] = cell["head"] % counts[site]
            placed = at(model.sites, site, Replace(value), stacked=True, **place)[site]
            # One program for all sites: those that are not this cell's have strength 0.
            edits.append({site: dataclasses.replace(placed, gate=placed.gate * (cell["site"] == number))})
        return metric(model.apply({"params": params, "edits": combine(*edits)}, tokens)[:, read])

    cells = [
        grid(
            site=jnp.asarray([number]),
            layer=jnp.arange(config.layers),
            head=jnp.arange(counts[site] if site in HEAD_SITES else 1),
            span=jnp.arange(len(axes["first"])),
        )
        for number, site in enumerate(sorted(source))
    ]
    every = jax.tree.map(lambda *parts: jnp.concatenate(parts), *cells)
    span = every.pop("span")
    every |= {name: jnp.asarray(values)[span] for name, values in axes.items()}
    values = np.split(sweep(effect, every, params, source), np.cumsum([len(some["site"]) for some in cells])[:-1])
    return dict(zip(sorted(source), values, strict=True))


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)
    assert np.abs(wanted - wanted.mean()).max() > 1e-3, "the patches change nothing: this would test nothing"


EVERYWHERE = [(kind, -1) for kind in KINDS] + [("gpt2", 3), ("mistral", 3)]


@pytest.mark.parametrize(("kind", "read"), EVERYWHERE)
def test_heads_by_position(kind, read):
    model, params, tokens, source = setup(kind, HEAD_SITES)
    found = jax.jit(
        lambda params, source: patch_heads_by_position(model, params, tokens, source, metric, read=read, batch=3)
    )(params, source)
    wanted = one_by_one(model, params, tokens, source, read, first=range(LENGTH), last=range(LENGTH))
    assert set(found) == set(source)
    for site in source:
        close(found[site], wanted[site].reshape(found[site].shape))


@pytest.mark.parametrize("kind", KINDS)
def test_heads_at_some_positions_together(kind):
    model, params, tokens, source = setup(kind, HEAD_SITES)
    positions = range(1, 4) if kind in ("llama", "gemma2") else None
    found = jax.jit(
        lambda params, source: patch_heads(model, params, tokens, source, metric, positions=positions, batch=1)
    )(params, source)
    first, last = (0, LENGTH - 1) if positions is None else (1, 3)
    wanted = one_by_one(model, params, tokens, source, first=[first], last=[last])
    for site in source:
        close(found[site], wanted[site].reshape(found[site].shape))


@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_and_what_is_added_to_it(kind):
    model, params, tokens, source = setup(kind, STREAM_SITES)
    positions = [0, 1, 3, 5]

    @jax.jit
    def every_site(params, source):
        options = {"positions": positions, "batch": 3, "read": 4}
        return {
            site: patch_residual(model, params, tokens, value, metric, site=site, **options)
            for site, value in source.items()
        }

    found = every_site(params, source)
    wanted = one_by_one(model, params, tokens, source, read=4, first=positions, last=positions)
    for site in source:
        close(found[site], wanted[site].reshape(found[site].shape))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "attention only"])
def test_neurons(kind):
    model, params, tokens, source = setup(kind, ("mlp_act",))
    positions = [1, 4] if kind in ("llama", "gemma2") else None
    neurons = [0, 7, 23, 2, 2]
    found = jax.jit(
        lambda params, value: patch_neurons(
            model, params, tokens, value, metric, neurons=neurons, positions=positions, batch=2
        )
    )(params, source["mlp_act"])
    chosen = jnp.asarray(range(LENGTH) if positions is None else positions)

    def effect(cell, params, source):
        edits = at(
            model.sites,
            "mlp_act",
            Replace(source["mlp_act"]),
            layer=cell["layer"],
            unit=cell["unit"],
            position=chosen,
            stacked=True,
        )
        return metric(model.apply({"params": params, "edits": edits}, tokens)[:, -1])

    cells = grid(layer=jnp.arange(KINDS[kind].layers), unit=jnp.asarray(neurons))
    close(found, sweep(effect, cells, params, source).reshape(found.shape))


def test_all_neurons_by_default():
    model, params, tokens, source = setup("gpt2", ("mlp_act",))
    found = jax.jit(lambda params, value: patch_neurons(model, params, tokens, value, metric))(
        params, source["mlp_act"]
    )
    assert found.shape == (3, 24, 2)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_a_run_patched_with_itself_is_unchanged(kind):
    model, params, tokens, _ = setup(kind, ())
    logits, own = model.capture({"params": params}, tokens, sites=(*HEAD_SITES, *STREAM_SITES, "mlp_act"))
    heads = {site: own[site] for site in HEAD_SITES}

    @jax.jit
    def every_map(params, own, heads):
        return (
            patch_heads_by_position(model, params, tokens, heads, metric),
            patch_heads(model, params, tokens, heads, metric),
            [patch_residual(model, params, tokens, own[site], metric, site=site) for site in STREAM_SITES],
            patch_neurons(model, params, tokens, own["mlp_act"], metric, neurons=[0, 1]),
        )

    for found in jax.tree.leaves(every_map(params, own, heads)):
        wanted = jnp.broadcast_to(metric(logits[:, -1]), found.shape)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_only_the_logits_of_the_answers(kind):
    model, params, tokens, source = setup(kind, ("resid_mid",))
    answers = jnp.asarray([4, 1, 9])
    found = [
        jax.jit(lambda params, value, f=f, answers=answers: patch_residual(
            model, params, tokens, value, f, site="resid_mid", answers=answers
        ))(params, source["resid_mid"])
        for f, answers in ((lambda x: x, answers), (lambda x: x[:, jnp.asarray([4, 1, 9])], None))
    ]  # fmt: skip
    assert found[0].shape == (3, LENGTH, 2, 3)
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


def test_eight_devices_give_the_same_numbers():
    model, params, tokens, source = setup("llama", HEAD_SITES)
    mesh = make_mesh(data=8)

    def maps(params, source, mesh):
        return (
            patch_heads_by_position(model, params, tokens, source, metric, mesh=mesh, batch=3),
            patch_heads(model, params, tokens, source, metric, mesh=mesh),
        )

    alone = jax.jit(lambda params, source: maps(params, source, None))(params, source)
    compiled = jax.jit(lambda params, source: maps(params, source, mesh)).lower(params, source).compile()
    assert "num_partitions=8" in compiled.as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), alone, compiled(params, source))


def test_a_bfloat16_model_takes_a_float32_source():
    config = dataclasses.replace(KINDS["llama"], dtype="bfloat16")
    model = transformer(config)
    _, params, tokens, source = setup("llama", ("k", "attn_pattern"))
    found = jax.jit(lambda p, s: patch_heads_by_position(model, p, tokens, s, metric, positions=[2]))(params, source)
    wanted = jax.jit(
        lambda p, s: patch_heads_by_position(transformer(KINDS["llama"]), p, tokens, s, metric, positions=[2])
    )(params, source)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.5), found, wanted)


def test_what_does_not_fit_is_refused():
    model, params, tokens, source = setup("gpt2", (*HEAD_SITES, "resid_post", "mlp_act"))
    heads = {site: source[site] for site in HEAD_SITES}
    post = source["resid_post"]
    with pytest.raises(ValueError, match=r"source of resid_post is \(3, 2, 5, 16\)"):
        patch_residual(model, params, tokens, post[:, :, 1:], metric)
    with pytest.raises(ValueError, match="source of k is"):
        patch_heads(model, params, tokens, {"k": source["q"][:1]}, metric)
    with pytest.raises(KeyError, match='Did you mean "attn_z"'):
        patch_heads(model, params, tokens, {"atn_z": source["attn_z"]}, metric)
    with pytest.raises(ValueError, match="at least one of"):
        patch_heads_by_position(model, params, tokens, {}, metric)
    with pytest.raises(KeyError, match='Did you mean "resid_post"'):
        patch_residual(model, params, tokens, post, metric, site="resid_pots")
    for wrong in ([], [3, 1], [1, 1], [-1], [LENGTH]):
        with pytest.raises(ValueError, match="positions must be increasing"):
            patch_heads_by_position(model, params, tokens, heads, metric, positions=wrong)
    with pytest.raises(ValueError, match="read must be"):
        patch_residual(model, params, tokens, post, metric, read=LENGTH)
    with pytest.raises(ValueError, match="after the position that is read"):
        patch_residual(model, params, tokens, post, metric, positions=[4], read=2)
    for wrong in ([], [24], [[0]]):
        with pytest.raises(ValueError, match="neurons must be"):
            patch_neurons(model, params, tokens, source["mlp_act"], metric, neurons=wrong)
    both_ways = transformer(dataclasses.replace(KINDS["gpt2"], causal=False))
    with pytest.raises(ValueError, match="causal"):
        patch_residual(both_ways, params, tokens, post, metric)


def test_the_number_of_programs_does_not_change_the_numbers(monkeypatch):
    model, params, tokens, source = setup("llama", ("v",))
    found = []
    for programs in (1, 8):
        monkeypatch.setattr(patching, "PROGRAMS", programs)
        found.append(patch_heads_by_position(model, params, tokens, source, metric)["v"])
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)
