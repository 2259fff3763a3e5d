"""What an experiment hands back, how its claims are judged, and the one schema its record is stored in.

``run(key, config, log)`` of an experiment returns a :class:`Result`. :func:`to_record` turns it into the
plain dictionary that is written as ``result.json``; :func:`validate` is its schema, for reading too.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mechlab.reporting.films import Film

SCHEMA = 1
STATUSES = ("holds", "fails", "not_judged")


@dataclass(frozen=True)
class Metric:
    """One measured number with its spread. A number that could not be measured is left out, never NaN.

    Attributes:
      value: the number; arrays of one element are converted.
      ci95: bounds ``(low, high)`` of its 95 % interval, or None where there is none.
      n: how many seeds or items the number is over.
      unit: unit of ``value``; empty for a pure number.
      per_seed: the number of every seed, in seed order.
    """

    value: float
    _: KW_ONLY
    ci95: tuple[float, float] | None = None
    n: int = 1
    unit: str = ""
    per_seed: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _finite("value", self.value))
        if self.ci95 is not None:
            if len(self.ci95) != 2:
                raise ValueError(f"ci95 must be (low, high), got {self.ci95!r}")
            low, high = (_finite("ci95", bound) for bound in self.ci95)
            if low > high:
                raise ValueError(f"ci95 must be (low, high) with low <= high, got ({low}, {high})")
            object.__setattr__(self, "ci95", (low, high))
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        object.__setattr__(self, "n", int(self.n))
        if self.per_seed is not None:
            object.__setattr__(self, "per_seed", tuple(_finite("per_seed", value) for value in self.per_seed))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of a paper and the rule it is judged by.

    Attributes:
      id: short name, unique in its experiment.
      statement: what the paper says, as a sentence.
      source: where in the paper: section, table or figure.
      criterion: the rule in words, with its numbers.
      judge: the rule as code: maps the metrics to True, False or None (for "not judged") and the observed
        numbers in words. Asking ``metrics[name]`` for a metric that was not measured is "not judged" too.
    """

    id: str
    statement: str
    source: str
    criterion: str
    judge: Callable[[Mapping[str, Metric]], tuple[bool | None, str]]


@dataclass(frozen=True, kw_only=True)
class ClaimResult:
    """A claim with its outcome: ``status`` is one of ``STATUSES``, ``observed`` the numbers in words."""

    id: str
    statement: str
    source: str
    status: str
    observed: str
    criterion: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an experiment returns.

    Attributes:
      metrics: every measured number by name, such as ``"accuracy/gain_only"``.
      claims: the judged claims, see :func:`judge_claims`.
      figures: figures and films by name; the name is the file's stem and, in the gallery, the caption.
    """

    metrics: dict[str, Metric]
    claims: tuple[ClaimResult, ...] = ()
    figures: Mapping[str, Figure | Film] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bad = [name for name in self.figures if not re.fullmatch(r"\w[\w-]*", name)]
        if bad:
            raise ValueError(f"figure names may hold letters, digits, _ and - only, got {bad}")


class _NotMeasured(KeyError):
    """The metric asked for is absent; told apart from a KeyError inside a judge, which is a bug."""


class _Measured(dict[str, Metric]):
    def __missing__(self, name: str) -> Metric:
        raise _NotMeasured(name)


def judge_claims(claims: Sequence[Claim], metrics: Mapping[str, Metric]) -> tuple[ClaimResult, ...]:
    """Judge every claim by its own criterion.

    Args:
      claims: the claims of an experiment, with distinct ids.
      metrics: what was measured.

    Returns:
      One result per claim, in order. A claim that asks for an absent metric is "not_judged" and says which.

    Raises:
      ValueError: two claims share an id.
    """
    ids = [claim.id for claim in claims]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise ValueError(f"claim ids must be distinct, got more than one {twice}")
    return tuple(_judge(claim, _Measured(metrics)) for claim in claims)


def _judge(claim: Claim, metrics: _Measured) -> ClaimResult:
    try:
        holds, observed = claim.judge(metrics)
    except _NotMeasured as absent:
        holds, observed = None, f"not measured at this preset (metric {absent.args[0]})"
    return ClaimResult(
        id=claim.id,
        statement=claim.statement,
        source=claim.source,
        status="not_judged" if holds is None else "holds" if holds else "fails",
        observed=observed,
        criterion=claim.criterion,
    )


def to_record(
    result: Result,
    *,
    slug: str,
    preset: str,
    seed: int,
    config: Mapping[str, Any],
    device: Mapping[str, Any],
    versions: Mapping[str, str],
    seconds: float,
    figures: Sequence[str],
) -> dict[str, Any]:
    """The record of a finished run, ready to be written as JSON.

    Args:
      result: what the experiment returned.
      slug: name of the experiment.
      preset: name of its preset.
      seed: root seed of the run.
      config: the configuration that ran, as plain JSON values.
      device: ``platform``, ``kind`` and ``count`` of the devices.
      versions: version by package.
      seconds: wall time of the experiment, s.
      figures: paths of the figures, relative to the record's folder.

    Returns:
      The record; it passes :func:`validate`.

    Raises:
      ValueError: the record would not be valid; every problem is listed.
    """
    metrics = {name: asdict(metric) for name, metric in result.metrics.items()}
    for metric in metrics.values():
        metric["ci95"] = metric["ci95"] and list(metric["ci95"])
        if metric["per_seed"] is None:
            del metric["per_seed"]
        else:
            metric["per_seed"] = list(metric["per_seed"])
    record = {
        "schema": SCHEMA,
        "slug": slug,
        "preset": preset,
        "seed": seed,
        "config": dict(config),
        "device": dict(device),
        "versions": dict(versions),
        "seconds": seconds,
        "metrics": metrics,
        "claims": [asdict(claim) for claim in result.claims],
        "figures": list(figures),
    }
    validate(record)
    return record


def validate(record: Any) -> None:
    """Check a record against the schema.

    Args:
      record: what ``result.json`` holds, as parsed.

    Raises:
      ValueError: it is not a valid record; the message lists all problems, each with its place.
    """
    problems = _check("record", record, _RECORD)
    parts = record if isinstance(record, dict) else {}
    if "device" in parts:
        problems += _check("device", parts["device"], _DEVICE)
    for name, metric in _items(parts.get("metrics")):
        problems += _check(f"metrics.{name}", metric, _METRIC, optional=("per_seed",))
    for index, claim in _items(parts.get("claims")):
        problems += _check(f"claims[{index}]", claim, _CLAIM)
    for name, version in _items(parts.get("versions")):
        problems += [] if _text(version) else [f"versions.{name} must be a string, got {version!r:.60}"]
    for index, figure in _items(parts.get("figures")):
        problems += [] if _path(figure) else [f"figures[{index}] must be a relative path, got {figure!r:.60}"]
    if problems:
        raise ValueError("not a valid result record: " + "; ".join(problems))


def read_record(path: Path) -> dict[str, Any]:
    """Read and validate a ``result.json``.

    Args:
      path: the file.

    Returns:
      The record.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not JSON or not a valid record; the message names the file.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        validate(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return record


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write JSON so that the file is either complete or absent, whatever interrupts the writing.

    Args:
      path: the file; an existing one is replaced.
      record: plain JSON values.

    Raises:
      OSError: the file cannot be written.
      ValueError: a number is NaN or infinite.
    """
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _items(value: Any) -> list[tuple[Any, Any]]:
    """Keys and values of an object, indices and values of a list, nothing for anything else."""
    if isinstance(value, list):
        return list(enumerate(value))
    return list(value.items()) if isinstance(value, dict) else []


def _finite(name: str, value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}; leave out what could not be measured")
    return number


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_number, value))


def _interval(value: Any) -> bool:
    return value is None or (_numbers(value) and len(value) == 2 and value[0] <= value[1])


def _path(value: Any) -> bool:
    return _text(value) and value != "" and not value.startswith("/") and ".." not in value.split("/")


_Kind = tuple[str, Callable[[Any], bool]]
_TEXT: _Kind = ("a string", _text)
_COUNT: _Kind = ("an integer >= 0", _count)
_POSITIVE: _Kind = ("an integer >= 1", lambda value: _count(value) and value >= 1)
_NUMBER: _Kind = ("a finite number", _number)
_OBJECT: _Kind = ("an object", lambda value: isinstance(value, dict))
_LIST: _Kind = ("a list", lambda value: isinstance(value, list))

_RECORD: dict[str, _Kind] = {
    "schema": (str(SCHEMA), lambda value: _count(value) and value == SCHEMA),
    "slug": _TEXT,
    "preset": _TEXT,
    "seed": _COUNT,
    "config": _OBJECT,
    "device": ("an object", lambda value: True),
    "versions": _OBJECT,
    "seconds": ("a finite number >= 0", lambda value: _number(value) and value >= 0),
    "metrics": _OBJECT,
    "claims": _LIST,
    "figures": _LIST,
}
_DEVICE: dict[str, _Kind] = {"platform": _TEXT, "kind": _TEXT, "count": _POSITIVE}
_METRIC: dict[str, _Kind] = {
    "value": _NUMBER,
    "ci95": ("null or [low, high]", _interval),
    "n": _POSITIVE,
    "unit": _TEXT,
    "per_seed": ("a list of finite numbers", _numbers),
}
_CLAIM: dict[str, _Kind] = {
    "id": _TEXT,
    "statement": _TEXT,
    "source": _TEXT,
    "status": ("one of " + ", ".join(STATUSES), lambda value: value in STATUSES),
    "observed": _TEXT,
    "criterion": _TEXT,
}


def _check(where: str, value: Any, kinds: Mapping[str, _Kind], optional: Sequence[str] = ()) -> list[str]:
    """Every problem of one object: not an object, missing keys, unknown keys, values of the wrong kind."""
    if not isinstance(value, dict):
        return [f"{where} is not an object"]
    problems = [f"{where}.{key} is missing" for key in kinds if key not in value and key not in optional]
    problems += [f"{where}.{key} is not a known key" for key in value if key not in kinds]
    for key, (wanted, accepts) in kinds.items():
        if key in value and not accepts(value[key]):
            problems.append(f"{where}.{key} must be {wanted}, got {value[key]!r:.60}")
    return problems
