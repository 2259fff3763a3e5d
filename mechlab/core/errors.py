"""Errors that a user can act on: what was wrong, what was given, what is accepted, and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what was asked for, not in the program: the command line prints it as one line."""


class UnknownName(KeyError):
    """A name that does not exist. Unlike a plain ``KeyError`` it prints its message without quotes."""

    def __str__(self) -> str:
        return str(self.args[0])


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """The nearest of ``options`` as a sentence to append to a message, or ``""`` when nothing is near.

    >>> did_you_mean("resid_pots", ["resid_pre", "resid_post"])
    ' Did you mean "resid_post"?'
    >>> did_you_mean("qqq", ["resid_pre"])
    ''
    """
    folded = {option.casefold(): option for option in options}
    near = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.5)
    return f' Did you mean "{folded[near[0]]}"?' if near else ""


def unknown(kind: str, word: str, options: Iterable[str]) -> UnknownName:
    """The error for an unknown ``word`` of a ``kind``: names the word, the nearest option and all of them.

    Args:
      kind: what the word was to be, e.g. ``"site"``.
      word: what came.
      options: every valid name.

    Returns:
      The error, for the caller to raise.
    """
    options = list(options)
    shown = ", ".join(options[:40]) + (f" ... ({len(options)} in all)" if len(options) > 40 else "")
    return UnknownName(f'unknown {kind} "{word}".{did_you_mean(word, options)} Known: {shown or "none"}.')
