"""The benchmarks run at smoke size, agree with their peers, and are all listed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from experiments.bench import run_all
from experiments.bench._peers import running


def run(name, folder):
    record = importlib.import_module(f"experiments.bench.{name}").bench("smoke", folder)
    assert set(json.loads((folder / f"{name}.json").read_text())) == set(record)
    return record


def test_core_sweeps_as_the_loop_does(tmp_path):
    record = run("core", tmp_path)
    assert record["sweep"]["5"]["largest difference"] < 1e-5
    assert set(record["compile"]) == {"2", "4"}


def test_training_ends_where_its_loop_ends(tmp_path):
    assert run("training", tmp_path)["largest difference in the trained parameters"] < 1e-5


def test_rational_gives_what_autodiff_gives_and_keeps_only_its_input(tmp_path):
    (found,) = run("rational", tmp_path)["shapes"].values()
    assert max(found["largest difference, relative"].values()) < 1e-4
    kept = found["kept for the backward pass (bytes)"]
    assert kept["rational"] == 4 * (6 * 64 + 6 + 8 * 4) < kept["autodiff"]
    assert found["backend"]["impl"] == "jnp"


def test_kernels_give_what_xla_gives_and_on_a_cpu_none_is_measured(tmp_path, capsys):
    record = run("kernels", tmp_path)
    assert not record["kernels are measured"]
    assert "says nothing about kernels: there is no kernel for cpu" in " ".join(capsys.readouterr().out.split())
    names = {name.split(",")[0] for name in record["cases"]}
    assert names == {"w8a8", "w4a16", "norm_int8", "statsq", "groups of 128", "lsq", "gradient of lsq", "sparse_matvec"}
    for found in record["cases"].values():
        assert max(found["largest difference, relative"].values()) == 0  # the reference twice
        assert found["floor (bytes)"] > 0 and len(found["over ours"]) == len(found["microseconds"]) - 1


@pytest.mark.slow
def test_patching_gives_what_edited_forwards_give(tmp_path, monkeypatch):
    monkeypatch.delenv("MECHLAB_PEERS", raising=False)
    record = run("patching", tmp_path)
    found = record["flagship"]
    assert found["largest difference"]["edited forwards"] < 1e-5 < found["largest effect"]["everywhere"]
    assert record["machine"]["peers"] == {}
    assert set(record["compile"]) == {"2"}


def test_layer_maps_run_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("MECHLAB_PEERS", raising=False)
    record = run("patching_maps", tmp_path)
    assert record["machine"]["peers"] == {}
    assert set(record["maps"]["4"]) == {"layer x position", "layer x head"}


def test_ibp_takes_the_steps_that_pytorch_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("MECHLAB_PEERS", sys.executable)
    record = run("ibp", tmp_path)
    for kind in ("IBP", "CROWN-IBP"):
        found = record[f"CNN-7, {kind}"]
        assert len(found["seconds per step"]["ours"]) == 2
        assert found["largest margin"] > 0.1
        for apart in found["largest difference of margins"].values():
            assert apart < 1e-5 * found["largest margin"]


def test_quantise_finds_what_pytorch_finds(tmp_path, monkeypatch):
    monkeypatch.setenv("MECHLAB_PEERS", sys.executable)
    record = run("quantise", tmp_path)
    assert list(record["cases"]) == ["rounding", "AWQ scales", "AWQ clip", "GPTQ"]
    for label, found in record["cases"].items():
        assert found["seconds per billion weights"]["ours"] > 0
        assert ("ours" in found["bytes"]) == (label != "GPTQ")
        # A group clipped on both sides has its zero at 7.5 steps, and the last bit decides which way it is rounded.
        for apart in found["largest difference, relative"].values():
            assert apart < (2e-2 if label == "AWQ clip" else 1e-4)


def test_steering_gives_what_edited_forwards_and_pytorch_give(tmp_path, monkeypatch):
    monkeypatch.setenv("MECHLAB_PEERS", sys.executable)
    found = run("steering", tmp_path)["grid"]
    assert found["cells"] == 6
    assert found["largest effect"] > 0.1
    assert max(found["largest difference"].values()) < 1e-4 * found["largest effect"] + 1e-4


def test_interpreters_without_a_peer_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("MECHLAB_PEERS", sys.executable)
    with running(tmp_path / "no_script.py", ("no_such_package",), tmp_path) as peers:
        assert peers == {}


def test_a_peer_that_ends_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MECHLAB_PEERS", sys.executable)
    script = tmp_path / "peer.py"
    script.write_text('print(\'{"version": "1"}\', flush=True)')
    with running(script, ("numpy",), tmp_path) as peers:
        (label,) = peers
        with pytest.raises((RuntimeError, BrokenPipeError)):
            peers[label].ask("demo", [])


def test_a_peer_that_cannot_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("MECHLAB_PEERS", sys.executable)
    script = tmp_path / "peer.py"
    script.write_text("raise ImportError('no such engine')")
    with pytest.raises(RuntimeError, match="numpy ended with exit code 1: ImportError: no such engine"):
        running(script, ("numpy",), tmp_path).__enter__()


@pytest.mark.slow
def test_device_checks_pass_on_the_cpu(tmp_path):
    record = run("device", tmp_path)
    assert record["passed"], record["checks"]


def test_every_benchmark_is_run_by_all_within_nine_minutes():
    folder = Path(run_all.__file__).parent
    modules = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")} - {"run_all"}
    assert modules == set(list(run_all.LIMITS))
    assert sum(run_all.LIMITS.values()) < 9 * 60


def test_without_an_accelerator_all_says_what_it_would_run(tmp_path, capsys):
    assert run_all.run_all("accel", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "No accelerator" in printed
    assert all(f"bench {name} --preset accel" in printed for name in list(run_all.LIMITS))
    assert not list(tmp_path.iterdir())


def test_a_benchmark_that_fails_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_all, "LIMITS", {"no_such": 60, "device": 1})
    assert run_all.run_all("smoke", tmp_path) == 1
    found = json.loads((tmp_path / "all.json").read_text())["benchmarks"]
    assert found["no_such"]["status"].startswith("failed")
    assert found["device"]["status"] == "stopped at its limit of 1 s"


@pytest.mark.slow
@pytest.mark.oracle
def test_adapters_take_the_steps_that_peft_takes(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setenv("MECHLAB_PEERS", sys.executable)
    record = run("adapters", tmp_path)
    (label,) = record["machine"]["peers"]
    for name, found in record["steps"].items():
        ours, theirs = found["losses"]["ours"], found["losses"][label]
        # LoRA's A is drawn, and differs; before the first step it has no effect.
        checked = 1 if name.removesuffix(", beside") in ("lora", "dora") else len(ours)
        assert ours[:checked] == pytest.approx(theirs[:checked], rel=1e-5), name
        assert ours[-1] < ours[0]
    serving = record["serving"]
    assert max(serving["largest difference of logits"].values()) < 1e-5 < serving["largest effect of the adapters"]
