"""Metrics, claims and the schema of result.json."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from mechlab.reporting.results import (
    Claim,
    Metric,
    Result,
    judge_claims,
    read_record,
    to_record,
    validate,
    write_json,
)


def claim(name="better", judge=lambda metrics: (metrics["gain"].value > 0, f"{metrics['gain'].value:.2f}")):
    return Claim(id=name, statement="It is better.", source="Table 1", criterion="gain > 0", judge=judge)


def record(metrics=None, claims=()):
    return to_record(
        Result(metrics=metrics or {"gain": Metric(0.5)}, claims=claims),
        slug="toy",
        preset="smoke",
        seed=0,
        config={"steps": 3},
        device={"platform": "cpu", "kind": "cpu", "count": 1},
        versions={"python": "3.11"},
        seconds=1.5,
        figures=["figures/x.png"],
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_metric_refuses_what_is_not_finite(value):
    with pytest.raises(ValueError, match="value must be finite"):
        Metric(value)
    with pytest.raises(ValueError, match="ci95 must be finite"):
        Metric(0.0, ci95=(value, 1.0))
    with pytest.raises(ValueError, match="per_seed must be finite"):
        Metric(0.0, per_seed=(0.0, value))


def test_metric_refuses_a_reversed_interval_and_no_items():
    with pytest.raises(ValueError, match="low <= high"):
        Metric(0.5, ci95=(1.0, 0.0))
    with pytest.raises(ValueError, match="at least 1"):
        Metric(0.5, n=0)


def test_metric_turns_array_scalars_into_numbers_json_can_hold():
    metric = Metric(np.float32(0.5), ci95=(np.float32(0.25), np.array(0.75)), n=np.int64(3))
    assert json.dumps([metric.value, metric.ci95, metric.n]) == "[0.5, [0.25, 0.75], 3]"


@pytest.mark.parametrize(("gain", "status"), [(0.5, "holds"), (-0.5, "fails")])
def test_claim_is_judged_from_the_metrics(gain, status):
    (result,) = judge_claims([claim()], {"gain": Metric(gain)})
    assert (result.status, result.observed, result.id) == (status, f"{gain:.2f}", "better")


def test_claim_without_its_metric_is_not_judged_and_says_which():
    (result,) = judge_claims([claim()], {})
    assert result.status == "not_judged"
    assert result.observed == "not measured at this preset (metric gain)"


def test_claim_may_abstain():
    (result,) = judge_claims([claim(judge=lambda metrics: (None, "0.5 of 1"))], {})
    assert (result.status, result.observed) == ("not_judged", "0.5 of 1")


def test_a_key_error_of_the_judge_itself_is_not_hidden():
    with pytest.raises(KeyError, match="typo"):
        judge_claims([claim(judge=lambda metrics: (True, {}["typo"]))], {"gain": Metric(1.0)})


def test_claims_with_one_id_are_refused():
    with pytest.raises(ValueError, match="better"):
        judge_claims([claim(), claim()], {"gain": Metric(1.0)})


@pytest.mark.parametrize("name", ["../x", "a/b", "", "a b"])
def test_figure_names_cannot_leave_the_folder(name):
    with pytest.raises(ValueError, match="figure names"):
        Result(metrics={}, figures={name: None})


def test_record_has_exactly_the_documented_keys_and_survives_json():
    gain = Metric(0.5, ci95=(0.4, 0.6), n=3, unit="nats", per_seed=(0.4, 0.5, 0.6))
    metrics = {"gain": gain, "n": Metric(2.0)}
    made = record(metrics, judge_claims([claim()], metrics))
    assert list(made) == ("schema slug preset seed config device versions seconds metrics claims figures".split())
    assert made["metrics"]["gain"] == {
        "value": 0.5,
        "ci95": [0.4, 0.6],
        "n": 3,
        "unit": "nats",
        "per_seed": [0.4, 0.5, 0.6],
    }
    assert made["metrics"]["n"] == {"value": 2.0, "ci95": None, "n": 1, "unit": ""}
    assert set(made["claims"][0]) == {"id", "statement", "source", "status", "observed", "criterion"}
    assert json.loads(json.dumps(made, allow_nan=False)) == made


def spoil(path, value):
    """A valid record with one value replaced, or removed where ``value`` is ``...``."""
    made = copy.deepcopy(record(claims=judge_claims([claim()], {"gain": Metric(1.0)})))
    *parents, last = path
    place = made
    for name in parents:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return made


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("schema",), 2, "record.schema must be 1"),
        (("seed",), True, "record.seed must be an integer"),
        (("seed",), -1, "record.seed must be an integer"),
        (("seconds",), None, "record.seconds must be a finite number"),
        (("config",), [], "record.config must be an object"),
        (("extra",), 1, "record.extra is not a known key"),
        (("slug",), ..., "record.slug is missing"),
        (("device", "count"), 0, "device.count must be an integer >= 1"),
        (("device",), None, "device is not an object"),
        (("versions", "jax"), 1, "versions.jax must be a string"),
        (("metrics", "gain", "value"), None, "metrics.gain.value must be a finite number"),
        (("metrics", "gain", "value"), float("nan"), "metrics.gain.value must be a finite number"),
        (("metrics", "gain", "ci95"), [1.0, 0.0], "metrics.gain.ci95 must be null or"),
        (("metrics", "gain", "ci95"), [float("inf"), 0.0], "metrics.gain.ci95 must be null or"),
        (("metrics", "gain", "n"), ..., "metrics.gain.n is missing"),
        (("metrics", "gain", "per_seed"), [None], "metrics.gain.per_seed must be a list of finite numbers"),
        (("metrics", "gain"), 0.5, "metrics.gain is not an object"),
        (("claims", 0, "status"), "passed", "claims[0].status must be one of holds, fails, not_judged"),
        (("claims", 0, "status"), ["holds"], "claims[0].status must be one of holds"),
        (("figures",), ["/etc/x.png"], "figures[0] must be a relative path"),
        (("figures",), ["../x.png"], "figures[0] must be a relative path"),
    ],
)
def test_every_departure_from_the_schema_is_named(path, value, problem):
    with pytest.raises(ValueError) as caught:
        validate(spoil(path, value))
    assert problem in str(caught.value)


def test_all_problems_are_reported_at_once():
    made = record()
    del made["slug"]
    made["seed"] = "zero"
    made["metrics"]["gain"]["unit"] = 3
    with pytest.raises(ValueError) as caught:
        validate(made)
    message = str(caught.value)
    assert all(problem in message for problem in ("record.slug", "record.seed", "metrics.gain.unit"))


@pytest.mark.parametrize("record", [None, [], "text", 3])
def test_what_is_no_object_is_refused(record):
    with pytest.raises(ValueError, match="record is not an object"):
        validate(record)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', ""])
def test_reading_names_the_file(tmp_path, text):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"result\.json: "):
        read_record(path)


def test_written_record_is_read_back(tmp_path):
    write_json(tmp_path / "result.json", record())
    assert read_record(tmp_path / "result.json") == record()
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_write_that_fails_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
