"""Messages: the nearest name, all names, no quotes around them."""

from __future__ import annotations

import pytest

from mechlab.core.errors import UnknownName, UserError, did_you_mean, unknown


def test_did_you_mean_names_the_nearest_or_nothing() -> None:
    assert did_you_mean("resid_pots", ["resid_pre", "resid_post"]) == ' Did you mean "resid_post"?'
    assert did_you_mean("zzz", ["resid_pre"]) == ""
    assert did_you_mean("x", []) == ""


def test_unknown_is_a_key_error_that_prints_without_quotes() -> None:
    error = unknown("site", "reside", iter(["resid_pre", "logits"]))
    assert isinstance(error, KeyError) and isinstance(error, UnknownName)
    assert str(error) == 'unknown site "reside". Did you mean "resid_pre"? Known: resid_pre, logits.'
    assert str(unknown("site", "x", [])) == 'unknown site "x". Known: none.'


def test_unknown_shortens_a_long_list_but_says_how_long_it_is() -> None:
    names = [f"site{i:03}" for i in range(100)]
    message = str(unknown("site", "site0999", names))
    assert "site039" in message and "site041" not in message.partition("Known")[2]
    assert "(100 in all)" in message


def test_a_user_error_is_neither_a_value_nor_a_key_error() -> None:
    assert not issubclass(UserError, ValueError | KeyError)
    with pytest.raises(UserError, match="no such run"):
        raise UserError("no such run")
