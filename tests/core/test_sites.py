"""Sites: the table, and what is refused before anything is traced."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mechlab.core.edits import Add, Noise, Replace, Scale, at, combine
from mechlab.core.model import Model
from mechlab.core.sites import Context, apply_edit, list_sites, site
from mechlab.models.mlp import MLPConfig, mlp
from tests.models.tiny import TOKENS, decoder

NEAREST = {
    "resid_pots": "resid_post",
    "atn_z": "attn_z",
    "mlp_ac": "mlp_act",
    "logit": "logits",
    "attn_score": "attn_scores",
}


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing or running the decoder fails the test. The site tables were made before."""
    for kind in ("gpt2", "llama"):
        model, _ = decoder(kind)
        list_sites(model.module, TOKENS)
        model.sites  # noqa: B018 (fills the cache)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was traced")

    monkeypatch.setattr(nn.Module, "apply", refuse)
    monkeypatch.setattr(nn.Module, "init", refuse)


@pytest.mark.parametrize("word", NEAREST)
@pytest.mark.usefixtures("untraced")
def test_a_misspelt_site_is_refused_everywhere_with_the_nearest_name(word: str) -> None:
    model, params = decoder("gpt2")
    message = f'unknown site "{word}".*Did you mean "{NEAREST[word]}"'
    with pytest.raises(KeyError, match=message):
        at(model.sites, word, Add(jnp.ones(16)))
    with pytest.raises(KeyError, match=message):
        model.apply({"params": params, "edits": {word: Add(jnp.ones((3, 16)))}}, TOKENS)
    with pytest.raises(KeyError, match=message):
        model.capture({"params": params}, TOKENS, sites=("logits", word))
    with pytest.raises(KeyError, match=message):
        model.sites[word]
    with pytest.raises(KeyError, match=message):
        jax.jit(model.apply)({"params": params, "edits": {word: Add(jnp.ones((3, 16)))}}, TOKENS)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "no layer axis": (
        {"resid_post": Add(jnp.ones(16))},
        ValueError,
        ['"resid_post"', "leading layer axis of 3", "(16,)"],
    ),
    "scalar": ({"resid_post": Scale(2.0)}, ValueError, ['"resid_post"', "leading layer axis of 3", "()"]),
    "too many layers": (
        {"mlp_act": Add(jnp.ones((4, 24)))},
        ValueError,
        ['"mlp_act"', "axis of 3", "(4, 24)"],
    ),
    "width": (
        {"resid_post": Add(jnp.ones((3, 15)))},
        ValueError,
        ['"resid_post"', "(B T D) = (2, 5, 16)", "(15,)"],
    ),
    "length": (
        {"mlp_out": Replace(jnp.ones((3, 2, 4, 16)))},
        ValueError,
        ['"mlp_out"', "(2, 5, 16)", "[2, 4, 16]"],
    ),
    "too large": (
        {"attn_z": Add(jnp.ones((3, 7, 1, 1, 1, 1)))},
        ValueError,
        ['"attn_z"', "(2, 5, 4, 4)", "(7, 2, 5, 4, 4)"],
    ),
    "unscanned width": (
        {"final_norm": Add(jnp.ones(15))},
        ValueError,
        ['"final_norm"', "(2, 5, 16)", "(15,)"],
    ),
    "an array": ({"resid_post": jnp.ones((3, 16))}, TypeError, ['"resid_post"', "callable"]),
    "None": ({"logits": None}, TypeError, ['"logits"', "callable", "NoneType"]),
    "a class": ({"logits": "Add"}, TypeError, ['"logits"', "callable", "str"]),
    "a nested collection": (
        {"blocks": {"@resid_post": Scale(jnp.ones(3))}},
        KeyError,
        ['unknown site "blocks"'],
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.usefixtures("untraced")
def test_an_edit_that_does_not_fit_is_refused_before_tracing(case: str) -> None:
    model, params = decoder("gpt2")
    edits, kind, parts = WRONG[case]
    for call in (
        lambda: model.apply({"params": params, "edits": edits}, TOKENS),
        lambda: model.capture({"params": params, "edits": edits}, TOKENS, sites=("logits",)),
    ):
        with pytest.raises(kind) as caught:
            call()
        for part in parts:
            assert part in str(caught.value)


@pytest.mark.usefixtures("untraced")
def test_placed_edits_that_do_not_fit_name_the_site() -> None:
    model, params = decoder("gpt2")
    edits = at(model.sites, "mlp_out", Add(jnp.ones(15)), layer=1, position=2)
    with pytest.raises(ValueError, match=r'site "mlp_out".*\(2, 5, 16\).*15'):
        model.apply({"params": params, "edits": edits}, TOKENS)


def test_position_and_head_need_sites_that_have_them() -> None:
    model = mlp(MLPConfig(widths=(4, 8, 3)))
    params = model.init(jax.random.key(0))
    edits = at(model.sites, "mlp_act", Scale(2.0), position=1)
    with pytest.raises(ValueError, match=r'site "mlp_act.0".*position= and span= need a site with positions'):
        model.apply({"params": params, "edits": edits}, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r'"mlp_act".*has no heads'):
        at(model.sites, "mlp_act", Scale(2.0), head=1)


@pytest.mark.usefixtures("untraced")
def test_an_unknown_collection_is_refused() -> None:
    model, params = decoder("gpt2")
    with pytest.raises(KeyError, match=r'unknown collection "edit".*Did you mean "edits"'):
        model.apply({"params": params, "edit": {}}, TOKENS)
    with pytest.raises(KeyError, match='unknown collection "acts"'):
        model.capture({"params": params, "acts": {}}, TOKENS, sites=("logits",))


@pytest.mark.usefixtures("untraced")
def test_a_string_of_sites_is_refused() -> None:
    model, params = decoder("gpt2")
    with pytest.raises(TypeError, match=r'write \("resid_post",\)'):
        model.capture({"params": params}, TOKENS, sites="resid_post")


def test_a_plain_function_as_an_edit_gets_a_message_that_says_so() -> None:
    model, params = decoder("gpt2")
    with pytest.raises(TypeError, match="resid_post"):
        model.apply({"params": params, "edits": {"resid_post": lambda value, context: value}}, TOKENS)


def test_placing_an_array_instead_of_an_edit_is_refused() -> None:
    with pytest.raises(TypeError, match="callable"):
        at(decoder("gpt2")[0].sites, "resid_post", jnp.ones(16), layer=1)


def test_the_table_prints_names_axes_and_sizes() -> None:
    lines = str(decoder("llama")[0].sites).splitlines()
    assert lines[0].split() == ["embed", "(B,", "T,", "D=16)", "float32"]
    assert "k             (L=3, B, T, H=2, K=4) float32" in lines
    assert "attn_pattern  (L=3, B, H=4, T, S) float32" in lines
    assert lines[-1] == "logits        (B, T, V=11) float32"
    assert len(lines) == len(decoder("llama")[0].sites) == 22


def test_the_table_has_the_shapes_of_the_inputs_at_hand() -> None:
    model, _ = decoder("gpt2")
    table = list_sites(model.module, jax.ShapeDtypeStruct((7, 9), jnp.int32))
    assert table["attn_scores"].value.shape == (7, 4, 9, 9)
    assert table["resid_mid"].context.positions.shape == (9,)
    assert table["mlp_act"].context.pre.shape == (7, 9, 24)
    assert table["mlp_act"].layers == 3 and table["logits"].layers is None
    assert "mlp_up" not in table and "mlp_up" in decoder("llama")[0].sites
    assert model.sites_for(jax.ShapeDtypeStruct((7, 9), jnp.int32)) is table
    per_row = model.sites_for(TOKENS, jnp.zeros((2, 5), jnp.int32))
    assert per_row["resid_mid"].context.positions.shape == (2, 5)


def test_the_table_is_a_mapping_in_the_order_of_a_forward_pass() -> None:
    table = decoder("gpt2")[0].sites
    assert list(table)[:3] == ["embed", "resid_pre", "attn_in"] and list(table)[-2:] == [
        "final_norm",
        "logits",
    ]
    assert dict(table)["q"] is table["q"] and "q" in table and "nope" not in table
    assert table.get("nope") is None
    assert table.named("q") == (table["q"],)


class _Repeated(nn.Module):
    """A user's own model: unscanned layers in a plain loop, and a scan over positions with a site inside."""

    same_name: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(2):
            x = _Step(name=f"step_{i}", site_name="hidden" if self.same_name else f"hidden.{i}")(x)
        return site(self, "logits", x, "B F")


class _Step(nn.Module):
    site_name: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return site(self, self.site_name, nn.Dense(3, name="hidden")(x), "B F")


def test_sites_of_a_model_of_ones_own() -> None:
    model = Model(_Repeated(), (jax.ShapeDtypeStruct((1, 3), jnp.float32),))
    params = model.init(jax.random.key(0))
    assert set(params) == {"step_0", "step_1"} and set(params["step_0"]) == {"hidden"}
    assert list(model.sites) == ["hidden.0", "hidden.1", "logits"]
    x = jnp.ones((2, 3))
    edits = combine(at(model.sites, "hidden", Replace(jnp.float32(0.0)), layer=0), at(model.sites, "logits", Add(1.0)))
    out, acts = model.capture({"params": params, "edits": edits}, x, sites=("hidden", "logits"))
    assert list(acts) == ["hidden.0", "hidden.1", "logits"]
    np.testing.assert_array_equal(acts["hidden.0"], jnp.zeros((2, 3)))
    bias = params["step_1"]["hidden"]["bias"]
    np.testing.assert_allclose(out, jnp.broadcast_to(bias, (2, 3)) + 1, rtol=1e-6)


def test_two_sites_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r'two sites are called "hidden": step_0/@hidden and step_1/@hidden'):
        list_sites(_Repeated(same_name=True), jnp.ones((2, 3)))


def test_a_site_declared_with_wrong_axes_is_refused() -> None:
    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return site(self, "hidden", x, "B T D")

    with pytest.raises(ValueError, match=r'site "hidden" is declared as \(B T D\).*\(2, 3\)'):
        Wrong().init(jax.random.key(0), jnp.ones((2, 3)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_apply_edit_keeps_the_dtype_of_the_site(dtype: Any) -> None:
    value = jnp.ones((2, 3), dtype)
    edited = apply_edit("hidden", Add(jnp.full(3, 0.5, jnp.float32)), value, Context(("B", "F")))
    assert edited.dtype == dtype
    np.testing.assert_array_equal(edited, jnp.full((2, 3), 1.5, dtype))


def test_capture_keeps_only_what_was_asked_for_and_after_the_edit() -> None:
    model, params = decoder("llama")
    edits = at(model.sites, "q", Replace(jnp.float32(0.25)), layer=1)
    output, acts = model.capture({"params": params, "edits": edits}, TOKENS, sites=["q", "logits", "q"])
    assert set(acts) == {"q", "logits"}
    np.testing.assert_array_equal(acts["q"][1], jnp.full((2, 5, 4, 4), 0.25))
    assert not np.allclose(acts["q"][0], 0.25)
    np.testing.assert_array_equal(acts["logits"], output)
    assert model.capture({"params": params}, TOKENS, sites=())[1] == {}


def test_a_noisy_edit_does_not_change_the_parameters_or_its_own_arrays() -> None:
    model, params = decoder("gpt2")
    edits = at(model.sites, "embed", Noise(jax.random.key(0), jnp.float32(1.0)))
    first, again = (model.apply({"params": params, "edits": edits}, TOKENS) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, model.apply({"params": params}, TOKENS))


@pytest.mark.parametrize(
    "tokens, message",
    [
        (jnp.ones((2, 3)), r"integers of shape \(B, T\), got float32\(2, 3\)"),
        (jnp.asarray([1, 2]), r"got int32\(2,\)"),
        (jnp.asarray([[0, 11]]), r"0\.\.10, got 0\.\.11"),
        (jnp.asarray([[-1, 3]]), r"0\.\.10, got -1\.\.3"),
        (jnp.zeros((1, 13), int), "13 tokens are longer than the model's context of 12"),
    ],
    ids=["float", "one axis", "too large", "negative", "too long"],
)
def test_tokens_that_do_not_fit_are_refused(tokens: jax.Array, message: str) -> None:
    model, params = decoder("gpt2")
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, tokens)
    edits = at(model.sites, "embed", Scale(2.0))
    with pytest.raises(ValueError, match=message if "0.." not in message else "tokens"):
        model.apply({"params": params, "edits": edits}, tokens)


@pytest.mark.parametrize(
    "inputs, message",
    [
        (([[1, 2, 3]],), "inputs must be arrays"),
        ((TOKENS, jnp.arange(7)), "positions must be"),
        ((TOKENS, jnp.arange(5.0)), "positions must be"),
        ((TOKENS, jnp.arange(5) + 100), "positions must be|context"),
    ],
    ids=["list", "shape", "float", "beyond the context"],
)
def test_inputs_that_do_not_fit_are_refused_by_name(inputs: Any, message: str) -> None:
    model, params = decoder("gpt2")
    with pytest.raises((ValueError, TypeError), match=message):
        model.apply({"params": params}, *inputs)
