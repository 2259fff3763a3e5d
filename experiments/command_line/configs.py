"""An experiment's configuration: chosen by preset, changed by ``field=value``, kept as JSON.

A configuration is a frozen dataclass. Its annotations say how a value is read: ``int``, ``float``, ``bool``,
``str``, ``Literal[...]``, tuples of these (``1,2,3``) and any of them with ``| None`` (``none``).
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mechlab.core.errors import UserError, did_you_mean

_NAMES = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}


def choose(presets: Mapping[str, Any], name: str, slug: str) -> Any:
    """The configuration called ``name`` among ``presets``.

    Args:
      presets: configurations by name.
      name: the preset asked for.
      slug: whose presets they are, for the message.

    Returns:
      The configuration.

    Raises:
      UserError: there is no such preset.
    """
    if name not in presets:
        known = ", ".join(presets)
        raise UserError(f'unknown preset "{name}" of {slug}.{did_you_mean(name, presets)} Known: {known}.')
    return presets[name]


def override(config: Any, assignments: Sequence[str]) -> Any:
    """A configuration with some fields changed.

    Args:
      config: the dataclass instance to start from.
      assignments: ``field=value`` texts, read by the field's annotation.

    Returns:
      The changed configuration; ``config`` itself if there is nothing to change.

    Raises:
      UserError: a text is no assignment, a field unknown or set twice, a value cannot be read, or the
        configuration refuses its values; all bad assignments are reported together.
    """
    if not assignments:
        return config
    hints = get_type_hints(type(config))
    fields = {field.name: hints[field.name] for field in dataclasses.fields(config) if field.init}
    values: dict[str, Any] = {}
    problems = []
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals:
            problems.append(f'"{assignment}" is not of the form field=value')
        elif name not in fields:
            hint = did_you_mean(name, fields) or f" Known: {', '.join(fields)}."
            problems.append(f'unknown field "{name}".{hint}')
        elif name in values:
            problems.append(f'"{name}" is set twice')
        else:
            try:
                values[name] = read_value(text.strip(), fields[name])
            except TypeError:
                problems.append(f'"{name}" cannot be set from the command line')
            except ValueError:
                options = [str(option) for option in get_args(fields[name]) if isinstance(option, str)]
                near = did_you_mean(text, options)
                problems.append(f'{name}={text}: wanted {describe(fields[name])}, got "{text}".{near}')
    if problems:
        raise UserError("; ".join(problem.rstrip(".") for problem in problems))
    try:
        return dataclasses.replace(config, **values)
    except ValueError as error:
        raise UserError(f"{' '.join(assignments)}: {error}") from error


def read_value(text: str, kind: Any) -> Any:
    """Read a value of an annotated type from text.

    Args:
      text: what was typed.
      kind: the annotation, resolved.

    Returns:
      The value.

    Raises:
      ValueError: the text is no value of this type; :func:`describe` says what would be.
      TypeError: values of this type cannot be read from text.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {str(option): option for option in parts}[text] if text in map(str, parts) else _refuse(text)
    if origin in (Union, types.UnionType):
        if type(None) in parts and text.lower() == "none":
            return None
        return _first([part for part in parts if part is not type(None)], text)
    if origin is tuple:
        texts = [part.strip() for part in text.split(",")] if text else []
        kinds = [parts[0]] * len(texts) if parts[1:] == (...,) else list(parts)
        if len(kinds) != len(texts):
            raise ValueError(text)
        return tuple(read_value(each, wanted) for each, wanted in zip(texts, kinds, strict=True))
    if kind is bool:
        return text.lower() == "true" if text.lower() in ("true", "false") else _refuse(text)
    if kind is float:
        return float(text) if math.isfinite(float(text)) else _refuse(text)
    if kind is int or kind is str:
        return kind(text)
    raise TypeError(kind)


def describe(kind: Any) -> str:
    """What texts :func:`read_value` accepts for a type, in words.

    Args:
      kind: the annotation, resolved.

    Returns:
      A phrase such as ``"an integer or none"``.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " or ".join("none" if part is type(None) else describe(part) for part in parts)
    if origin is tuple and parts[1:] == (...,):
        return f"a comma-separated list, each {describe(parts[0])}"
    if origin is tuple:
        return f"{len(parts)} comma-separated values ({', '.join(map(describe, parts))})"
    return _NAMES.get(kind, str(kind))


def plain(value: Any) -> Any:
    """A configuration, or a part of it, as JSON values.

    Args:
      value: a dataclass instance, a container or a plain value.

    Returns:
      The same as dicts, lists, strings, numbers, booleans and None; whatever JSON has no form for is spelled.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, int | str) else str(value)


def _first(kinds: Sequence[Any], text: str) -> Any:
    """The value of the first of the types that can read the text."""
    for kind in kinds:
        try:
            return read_value(text, kind)
        except ValueError:
            continue
    return _refuse(text)


def _refuse(text: str) -> Any:
    raise ValueError(text)
