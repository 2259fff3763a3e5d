"""The command line on a toy experiment: what it writes, resumes and refuses, and how it is interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import experiments
from experiments.__main__ import main
from experiments.catalogue import SYSTEMS, System
from mechlab.reporting.results import read_record

ROOT = Path(experiments.__file__).parents[1]
TOYS = (
    System(number=1, slug="counter", family="toys", title="Counting", paper="arXiv 0000.00000 (2000)"),
    System(number=2, slug="counted", family="toys", title="Being counted", paper="2001"),
    System(number=3, slug="hungry", family="toys", title="Needs a package", paper="2002"),
)
TOY = '''
"""A toy experiment that counts to ``steps`` and keeps each step; with ``hang`` it stops at the first."""

import dataclasses, time
from typing import Literal

import jax
from matplotlib.figure import Figure
from mechlab.core.errors import UserError
from mechlab.reporting.results import Claim, Metric, Result, judge_claims


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 3
    rate: float = 0.5
    bias: bool = False
    note: str = ""
    gate: Literal["soft", "hard"] = "soft"
    cap: float | None = None
    widths: tuple[int, ...] = (4, 4)
    span: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()
    table: dict = dataclasses.field(default_factory=dict)
    mode: str = ""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


PRESETS = {"smoke": Config(), "cpu": Config(steps=5)}
CLAIMS = (
    Claim(id="counts", statement="It [really] counts.", source="section 1", criterion="steps > 2",
          judge=lambda m: (m["steps"].value > 2, f"{m['steps'].value:.0f} steps")),
    Claim(id="flies", statement="It flies.", source="section 2", criterion="height > 0",
          judge=lambda m: (m["height"].value > 0, "it does")),
)


def run(key, config, log):
    if config.mode == "refuse":
        raise UserError("the data set is not here;\\nask for it")
    if config.mode == "bug":
        raise RuntimeError("a bug")
    kept = log.directory / "steps"
    start = int(kept.read_text()) if kept.exists() else 0
    log.say(f"from step {start}")
    with log.track("count", config.steps) as update:
        for step in range(start + 1, config.steps + 1):
            log.directory.mkdir(exist_ok=True)
            kept.write_text(str(step))
            update(step, rate=config.rate)
            while config.mode == "hang" and start == 0:
                time.sleep(0.02)
    metrics = {"steps": Metric(config.steps), "start": Metric(start), "draw": Metric(jax.random.uniform(key))}
    figure = Figure()
    figure.subplots().plot([0, 1])
    return Result(metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures={"line": figure})
'''
DRIVER = """
import signal, sys
import experiments
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the suite runs in the background
experiments.__path__.append({toys!r})
sys.path.insert(0, {root!r})
from experiments.__main__ import main
from experiments.catalogue import System
sys.exit(main(sys.argv[1:], systems=(System(number=1, slug="counter", family="toys", title="t", paper="p"),)))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory with the toy experiments within reach of ``experiments``."""
    toys = tmp_path / "code" / "toys"
    toys.mkdir(parents=True)
    (toys / "counter.py").write_text(TOY)
    (toys / "hungry.py").write_text("import a_package_nobody_has")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(tmp_path / "code")])
    monkeypatch.setenv("MECHLAB_NO_CACHE", "1")
    yield work
    for name in [name for name in sys.modules if name.startswith("experiments.toys")]:
        del sys.modules[name]


@pytest.fixture
def start(folder):
    """Starts the command line as a process of its own; what is left running is ended."""
    driver = folder.parent / "driver.py"
    driver.write_text(DRIVER.format(toys=str(folder.parent / "code"), root=str(ROOT)))
    processes = []

    def start(*arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, str(driver), *arguments]
        process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def call(*arguments):
    """Run in this process; the exit code, also where argparse exits by itself."""
    with contextlib.suppress(SystemExit):
        return main(arguments, systems=TOYS)
    return 2


def run(*arguments):
    return call("run", "counter", "--preset", "smoke", *arguments)


def refused(capsys, code):
    """The one line that a refusal prints."""
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    return captured.err


def wait_for(path):
    for _ in range(3000):
        if path.exists() and path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not appear")


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_catalogue_holds_the_45_systems_in_order():
    assert [system.number for system in SYSTEMS] == list(range(1, 46))
    assert len({system.slug for system in SYSTEMS}) == 45
    assert {system.family for system in SYSTEMS} == set(
        "steering introspection circuits compression adaptation architectures neuro body".split()
    )
    assert all(system.title and system.paper for system in SYSTEMS)


def test_a_run_writes_a_valid_record_with_its_figures(folder, capsys):
    assert run("--seed", "7", "--set", "rate=0.25") == 0
    directory = folder / "runs" / "counter" / "smoke-7"
    record = read_record(directory / "result.json")
    assert (record["slug"], record["preset"], record["seed"]) == ("counter", "smoke", 7)
    assert record["config"]["rate"] == 0.25
    assert record["config"]["widths"] == [4, 4]
    assert [claim["status"] for claim in record["claims"]] == ["holds", "not_judged"]
    assert record["figures"] == ["figures/line.png"]
    assert (directory / "figures" / "line.png").read_bytes().startswith(b"\x89PNG")
    assert record["device"]["platform"] == "cpu"
    assert set(record["versions"]) == {"python", "jax", "jaxlib", "flax", "optax", "numpy", "mechlab"}
    kept = json.loads((directory / "config.json").read_text())
    assert kept["config"] == record["config"]
    assert set(kept) == {"slug", "preset", "seed", "config", "mechlab"}
    assert sorted(path.name for path in directory.iterdir()) == [
        "checkpoints",
        "config.json",
        "figures",
        "result.json",
    ]


def test_a_run_ends_with_its_claims_readable_at_80_columns(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run()
    captured = capsys.readouterr()
    wanted = ("holds", "not judged", "It [really] counts.", "3 steps", "steps > 2", "runs/counter/smoke-0")
    assert [part for part in wanted if part not in captured.out] == []
    assert "metric height" in " ".join(captured.out.split())
    assert max(map(len, captured.out.splitlines())) <= 80
    assert "\x1b" not in captured.out
    assert "count: 3/3  rate 0.5" in captured.err


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(folder):
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        run("--out", out, "--seed", seed)
    draws = [
        read_record(folder / out / "counter" / f"smoke-{seed}" / "result.json")["metrics"]["draw"]["value"]
        for out, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_finished_run_is_shown_not_repeated(folder, capsys):
    run()
    before = snapshot(folder)
    capsys.readouterr()
    assert run() == 0
    captured = capsys.readouterr()
    assert "nothing was run" in captured.out
    assert "3 steps" in captured.out
    assert "from step" not in captured.err
    assert snapshot(folder) == before


def test_strict_fails_when_a_claim_fails_also_for_a_finished_run(folder):
    assert run("--set", "steps=2") == 0
    assert run("--set", "steps=2", "--strict") == 1
    assert run("--set", "steps=2", "--strict", "--seed", "1") == 1
    assert run("--strict", "--seed", "2") == 0


def test_another_configuration_in_the_directory_is_refused(folder, capsys):
    run()
    before = snapshot(folder)
    capsys.readouterr()
    line = refused(capsys, run("--set", "rate=0.25"))
    assert "rate: 0.5 there, 0.25 asked for" in line
    assert "--out" in line
    assert "--seed" in line
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "result.json"])
def test_a_directory_of_somebody_else_is_refused_and_left_alone(folder, capsys, name):
    directory = folder / "runs" / "counter" / "smoke-0"
    directory.mkdir(parents=True)
    (directory / name).write_text("mine")
    assert "is not a run of this command line" in refused(capsys, run())
    assert snapshot(folder) == {Path("runs/counter/smoke-0") / name: b"mine"}


def test_a_file_in_place_of_the_directory_is_refused(folder, capsys):
    (folder / "runs" / "counter").mkdir(parents=True)
    (folder / "runs" / "counter" / "smoke-0").write_text("mine")
    assert "smoke-0" in refused(capsys, run())


def test_a_spoilt_result_is_refused_not_overwritten(folder, capsys):
    run()
    result = folder / "runs" / "counter" / "smoke-0" / "result.json"
    result.write_text("{")
    capsys.readouterr()
    assert "cannot be read" in refused(capsys, run())
    assert result.read_text() == "{"


def test_an_unwritable_out_is_refused_before_the_run(folder, capsys):
    (folder / "file").write_text("x")
    line = refused(capsys, run("--out", "file"))
    assert "cannot write to file/counter/smoke-0" in line


def test_a_full_disk_at_the_end_is_one_line_and_the_run_can_go_on(folder, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("experiments.command_line.run.write_json", full)
        assert run() == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert run() == 0
    assert "resuming" in capsys.readouterr().err


BAD = {
    "slug": (["run", "conter"], 'Did you mean "counter"?'),
    "hopeless slug": (["run", "zzz"], "python -m experiments list"),
    "planned": (["run", "counted"], "planned"),
    "missing package": (["run", "hungry"], '"a_package_nobody_has"'),
    "preset": (["run", "counter", "--preset", "smok"], 'Did you mean "smoke"?'),
    "field": (["run", "counter", "--set", "step=3"], 'Did you mean "steps"?'),
    "hopeless field": (["run", "counter", "--set", "qqq=3"], "Known: steps, rate"),
    "no value": (["run", "counter", "--set", "steps"], "field=value"),
    "twice": (["run", "counter", "--set", "steps=3", "steps=4"], "twice"),
    "integer": (["run", "counter", "--set", "steps=3.5"], "wanted an integer"),
    "number": (["run", "counter", "--set", "rate=fast"], "wanted a finite number"),
    "nan": (["run", "counter", "--set", "rate=nan"], "wanted a finite number"),
    "boolean": (["run", "counter", "--set", "bias=1"], "wanted true or false"),
    "literal": (["run", "counter", "--set", "gate=sofd"], 'of soft, hard, got "sofd". Did you mean "soft"?'),
    "optional": (["run", "counter", "--set", "cap=all"], "wanted a finite number or none"),
    "tuple": (["run", "counter", "--set", "widths=4,x"], "comma-separated list, each an integer"),
    "pair": (["run", "counter", "--set", "span=1"], "2 comma-separated values"),
    "unreadable type": (["run", "counter", "--set", "table=1"], "cannot be set from the command line"),
    "own check": (["run", "counter", "--set", "steps=0"], "steps must be at least 1, got 0"),
    "seed": (["run", "counter", "--seed", "-1"], "--seed"),
    "seed text": (["run", "counter", "--seed", "x"], "--seed"),
    "option": (["run", "counter", "--sed", "1"], "--sed"),
    "command": (["rum", "counter"], "rum"),
    "nothing": ([], "required"),
    "bench": (["bench", "nothing_like_it"], "unknown benchmark"),
    "report": (["report", "--runs", "nowhere"], "nowhere"),
    "list": (["list", "conter"], 'Did you mean "counter"?'),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_writes_nothing(folder, capsys, case):
    arguments, message = BAD[case]
    assert message in refused(capsys, call(*arguments))
    assert snapshot(folder) == {}


def test_all_bad_overrides_are_reported_together(folder, capsys):
    line = refused(capsys, run("--set", "stepz=1", "rate=x", "--set", "bias=maybe"))
    assert all(name in line for name in ("stepz", "rate", "bias"))


def test_overrides_take_the_type_of_their_field(folder):
    scalars = ("steps=4", "rate=1e-3", "bias=TRUE", "note=a=b c", "gate=hard", "cap=2")
    assert run("--set", *scalars, "widths=1,2, 3", "names=", "span=-1,1.5") == 0
    config = read_record(folder / "runs" / "counter" / "smoke-0" / "result.json")["config"]
    assert config == {
        "steps": 4,
        "rate": 0.001,
        "bias": True,
        "note": "a=b c",
        "gate": "hard",
        "cap": 2.0,
        "widths": [1, 2, 3],
        "span": [-1.0, 1.5],
        "names": [],
        "table": {},
        "mode": "",
    }
    assert run("--seed", "1", "--set", "cap=none", "names=x,y") == 0


def test_a_refusal_by_the_experiment_is_one_line(folder, capsys):
    assert run("--set", "mode=refuse") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: the data set is not here; ask for it"


def test_a_bug_in_the_experiment_keeps_its_traceback_and_frees_the_directory(folder):
    with pytest.raises(RuntimeError, match="a bug"):
        run("--set", "mode=bug")
    assert not (folder / "runs" / "counter" / "smoke-0" / ".lock").exists()
    with pytest.raises(RuntimeError, match="a bug"):
        run("--set", "mode=bug")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_so_and_is_resumed(folder, start, sent, code):
    command = ("run", "counter", "--preset", "smoke", "--set", "mode=hang")
    directory = folder / "runs" / "counter" / "smoke-0"
    process = start(*command)
    wait_for(directory / "checkpoints" / "steps")
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in out + err
    assert err.splitlines()[-1] == (
        "interrupted; what was trained is kept in runs/counter/smoke-0; the same command goes on from there"
    )
    assert not (directory / "result.json").exists()
    assert not (directory / ".lock").exists()

    process = start(*command)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "resuming" in err
    assert read_record(directory / "result.json")["metrics"]["start"]["value"] == 1


def test_two_processes_do_not_run_in_one_directory(folder, start, capsys):
    command = ("--set", "mode=hang")
    directory = folder / "runs" / "counter" / "smoke-0"
    process = start("run", "counter", "--preset", "smoke", *command)
    wait_for(directory / "checkpoints" / "steps")
    assert f"in use by process {process.pid}" in refused(capsys, run(*command))
    process.kill()
    process.communicate()
    assert (directory / ".lock").exists()
    assert run(*command) == 0
    assert not (directory / ".lock").exists()


def test_list_shows_what_is_ready_and_one_system_in_full(folder, capsys):
    assert call("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["state", "ready", "planned", "ready"]
    assert call("list", "counter") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("Counting", "smoke", "cpu", "steps", "4,4", "It [really] counts.", "steps > 2"):
        assert part in shown
    assert call("list", "counted") == 0
    assert "planned" in capsys.readouterr().out


def test_report_makes_a_page_of_the_runs(folder, capsys):
    run()
    capsys.readouterr()
    assert call("report") == 0
    assert capsys.readouterr().out == "runs/index.html\n"
    page = (folder / "runs" / "index.html").read_text()
    assert "toys" in page
    assert "counter/smoke-0/figures/line.png" in page


def test_bench_runs_a_module_of_the_bench_folder(folder, capsys, monkeypatch):
    bench = folder.parent / "code" / "bench"
    bench.mkdir()
    (bench / "quick.py").write_text("def bench(preset, out): print(preset, out, out.is_dir())")
    (bench / "run_all.py").write_text("def run_all(preset, out): return 3")
    (bench / "__init__.py").write_text("")
    monkeypatch.setattr("experiments.__main__.BENCHES", bench)
    monkeypatch.setattr(experiments, "__path__", [str(folder.parent / "code"), *experiments.__path__])
    for name in [name for name in sys.modules if name.startswith("experiments.bench")]:
        monkeypatch.delitem(sys.modules, name)
    try:
        assert call("bench", "quick", "--out", "there") == 0
        assert capsys.readouterr().out == "cpu there True\n"
        assert call("bench", "all") == 3
        assert 'Did you mean "quick"? Known: quick.' in refused(capsys, call("bench", "quik"))
    finally:
        for name in [name for name in sys.modules if name.startswith("experiments.bench")]:
            del sys.modules[name]


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["list", "bnoe"], ["run", "bnoe"], ["run", "bone", "--sed", "1"], ["bench", "x"], ["--help"]],
)
def test_what_needs_the_catalogue_only_does_not_import_jax(arguments):
    code = f"""
        import sys
        from experiments.__main__ import main
        try:
            main({arguments!r})
        except SystemExit:
            pass
        sys.exit("jax" in sys.modules or "matplotlib" in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert process.returncode == 0, process.stderr


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m experiments list | true; exit ${{PIPESTATUS[0]}}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize(("setting", "wanted"), [({}, "mechlab/xla"), ({"MECHLAB_NO_CACHE": "1"}, "None")])
def test_compiled_programs_are_kept_in_the_cache_of_the_user(tmp_path, setting, wanted):
    code = (
        "from experiments.command_line.run import _use_compilation_cache as use; use();"
        "import jax; print(jax.config.jax_compilation_cache_dir)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MECHLAB_NO_CACHE"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), **setting}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == (wanted if wanted == "None" else str(tmp_path / wanted))
