"""What sites cost: nothing unused, one array where one is read, and the same program at any depth."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mechlab.core.edits import Add, Scale, at
from mechlab.core.sites import list_sites
from mechlab.models import blocks, layers, transformer
from mechlab.models.transformer import gpt2, llama
from tests.models.tiny import CONFIGS, TOKENS, decoder


def compiled(function: Callable[..., Any], *inputs: Any) -> Any:
    return jax.jit(function).lower(*inputs).compile()


def program(executable: Any) -> str:
    """The optimised program without the module's name, source lines and other metadata."""
    text = re.sub(r", metadata=\{[^}]*\}", "", executable.as_text())
    head, _, tables = text.partition("\n")
    instructions = re.search(r"^(%|ENTRY).*", tables, re.MULTILINE | re.DOTALL)
    assert instructions is not None
    return head.partition(",")[2] + instructions[0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_edits_the_program_is_that_of_a_model_without_sites(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = decoder(kind)
    no_layer = at(model.sites, "resid_post", Add(jnp.ones(16)), layer=1)
    with_sites = compiled(lambda p, t: model.apply({"params": p}, t), params, TOKENS)
    empty = compiled(lambda p, t: model.apply({"params": p, "edits": {}}, t), params, TOKENS)
    nothing_kept = compiled(lambda p, t: model.capture({"params": p}, t, sites=())[0], params, TOKENS)
    edited = compiled(lambda p, t: model.apply({"params": p, "edits": no_layer}, t), params, TOKENS)
    for module in (transformer, blocks, layers):
        monkeypatch.setattr(module, "site", lambda module, name, value, axes, **context: value)
    monkeypatch.setattr(layers, "in_use", lambda module, *names: False)
    bare = compiled(lambda p, t: model.apply({"params": p}, t), params, TOKENS)
    for other in (with_sites, empty, nothing_kept):
        assert other.cost_analysis() == bare.cost_analysis()
        assert program(other) == program(bare)
    assert program(edited) != program(bare)


@pytest.fixture(scope="module")
def wide() -> Iterator[tuple[Any, Any, jax.Array]]:
    config = gpt2(vocabulary=11, layers=3, width=32, heads=4, hidden=128, context=64)
    model = transformer.transformer(config)
    yield model, jax.eval_shape(model.init, jax.random.key(0)), jax.ShapeDtypeStruct((4, 64), jnp.int32)


def test_capturing_one_site_costs_no_memory_for_the_others(wide: Any) -> None:
    model, params, tokens = wide
    table = list_sites(model.module, tokens)

    def memory(*sites: str) -> Any:
        return compiled(lambda p, t: model.capture({"params": p}, t, sites=sites), params, tokens).memory_analysis()

    def size(name: str) -> int:
        return 4 * (table[name].layers or 1) * table[name].value.size

    without, one, every = memory(), memory("mlp_out"), memory(*table)
    pointer = 16  # an output tuple holds an address for each array
    assert 0 <= one.output_size_in_bytes - without.output_size_in_bytes - size("mlp_out") <= pointer
    total = sum(size(name) for name in table)
    assert abs(every.output_size_in_bytes - without.output_size_in_bytes - total) <= pointer * len(table)
    # In between: the stacked activation may be built once more before it is put out, other sites may not.
    assert one.temp_size_in_bytes <= without.temp_size_in_bytes + 2 * size("mlp_out")
    assert one.temp_size_in_bytes + one.output_size_in_bytes < every.output_size_in_bytes / 3


def test_only_the_sites_that_were_asked_for_leave_the_scan_without_jit_too(wide: Any) -> None:
    model, params, tokens = wide

    def stacked_outputs(*sites: str) -> int:
        traced = jax.make_jaxpr(lambda p, t: model.capture({"params": p}, t, sites=sites))(params, tokens)
        (scan,) = (equation for equation in traced.jaxpr.eqns if equation.primitive.name == "scan")
        return len(scan.outvars)

    assert stacked_outputs("mlp_out") == stacked_outputs() + 1
    assert stacked_outputs("embed", "mlp_out", "q", "logits") == stacked_outputs() + 2


def test_an_edit_at_one_layer_stores_no_activation(wide: Any) -> None:
    model, params, tokens = wide
    edits = at(model.sites, "mlp_act", Scale(jnp.asarray(2.0)), layer=1, unit=3)
    plain = compiled(lambda p, t: model.apply({"params": p}, t), params, tokens).memory_analysis()
    edited = compiled(lambda p, t, e: model.apply({"params": p, "edits": e}, t), params, tokens, edits)
    one_layer = 4 * 4 * 64 * 128
    assert edited.memory_analysis().temp_size_in_bytes <= plain.temp_size_in_bytes + 2 * one_layer


@pytest.mark.parametrize("kind", CONFIGS)
def test_attention_scores_are_formed_only_for_those_who_use_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = decoder(kind)
    table = list_sites(model.module, TOKENS)
    fused = jax.nn.dot_product_attention
    calls: list[int] = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, **kw: calls.append(1) or fused(*args, **kw))

    def uses_fused(sites: tuple[str, ...] = (), edits: Any = None) -> bool:
        calls.clear()
        jax.make_jaxpr(lambda p: model.capture({"params": p, "edits": edits or {}}, TOKENS, sites=sites))(params)
        return bool(calls)

    inside = {"attn_scores", "attn_pattern"}
    assert uses_fused()
    for name in table:
        assert uses_fused(sites=(name,)) == (name not in inside), name
    assert uses_fused(sites=tuple(name for name in table if name not in inside))
    for name in ("attn_scores", "attn_pattern", "attn_z", "q"):
        assert uses_fused(edits=at(table, name, Scale(1.0))) == (name not in inside), name


@pytest.mark.parametrize("kind", [gpt2, llama])
def test_the_traced_program_does_not_grow_with_depth(kind: Any) -> None:
    def lines(depth: int) -> tuple[int, int]:
        model = transformer.transformer(kind(vocabulary=11, layers=depth, width=16, heads=4, hidden=24, context=12))
        params = jax.eval_shape(model.init, jax.random.key(0))
        edits = at(model.sites, "resid_post", Add(jnp.ones(16)), layer=1, position=2)

        def loss(params: Any, edits: Any) -> jax.Array:
            return model.apply({"params": params, "edits": edits}, TOKENS).sum()

        traced = jax.jit(jax.grad(loss)).lower(params, edits).as_text()
        initialised = jax.jit(model.init).lower(jax.random.key(0)).as_text()
        return len(traced.splitlines()), len(initialised.splitlines())

    for shallow, deep in zip(lines(2), lines(16), strict=True):
        assert deep <= 1.01 * shallow


def test_layers_of_different_depth_compile_to_programs_of_the_same_length() -> None:
    def instructions(depth: int) -> int:
        model = transformer.transformer(gpt2(vocabulary=11, layers=depth, width=16, heads=4, hidden=24, context=12))
        params = jax.eval_shape(model.init, jax.random.key(0))
        return len(program(compiled(lambda p: model.apply({"params": p}, TOKENS), params)).splitlines())

    assert instructions(16) <= 1.1 * instructions(4)
