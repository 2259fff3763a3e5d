"""The command line: ``python -m experiments list | run | report | bench``.

What only needs the catalogue (``list``, a misspelt name) answers without importing jax.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from experiments.catalogue import SYSTEMS, WORLDS, System, find, load
from mechlab.core.errors import UserError, did_you_mean

BENCHES = Path(__file__).parent / "bench"
USAGE_ERROR, INTERRUPTED = 2, 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of printing the usage first."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        near = did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2])) if choice else ""
        self.exit(USAGE_ERROR, f"error: {message}.{near} See {self.prog} --help.\n")


def main(argv: Sequence[str] | None = None, systems: Sequence[System] = SYSTEMS + WORLDS) -> int:
    """Run the command line.

    Args:
      argv: the arguments; None for those of the process.
      systems: the catalogue to work on.

    Returns:
      The exit code: 0 done, 1 a claim fails under ``--strict``, 2 a mistake in what was asked for, 130 or 143
      interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments, systems)
        sys.stdout.flush()
        return code
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; leave without flushing into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _list(arguments: argparse.Namespace, systems: Sequence[System]) -> int:
    from experiments.command_line.tables import print_catalogue, print_system

    if arguments.slug is None:
        print_catalogue(systems)
    else:
        system = find(arguments.slug, systems)
        print_system(system, load(system) if system.ready else None)
    return 0


def _run(arguments: argparse.Namespace, systems: Sequence[System]) -> int:
    system = find(arguments.slug, systems)
    if not system.ready:
        raise UserError(f'"{system.slug}" is planned; its experiment is not built yet')
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed must be from 0 to 4294967295, got {arguments.seed}")
    from experiments.command_line.run import run

    return run(
        system,
        preset=arguments.preset,
        seed=arguments.seed,
        assignments=arguments.assignments,
        out=arguments.out,
        strict=arguments.strict,
    )


def _report(arguments: argparse.Namespace, systems: Sequence[System]) -> int:
    from mechlab.reporting.gallery import build_gallery

    out = arguments.out or arguments.runs / "index.html"
    try:
        build_gallery(arguments.runs, out, {system.slug: system.family for system in systems})
    except OSError as error:
        raise UserError(f"cannot write the gallery: {error}") from error
    print(out)
    return 0


def _bench(arguments: argparse.Namespace, systems: Sequence[System]) -> int:
    if arguments.name == "all":
        _make(arguments.out)
        module = importlib.import_module("experiments.bench.run_all")
        code: int = module.run_all(arguments.preset, arguments.out)
        return code
    names = sorted(path.stem for path in BENCHES.glob("[!_]*.py") if path.stem != "run_all")
    if arguments.name not in names:
        near = did_you_mean(arguments.name, [*names, "all"])
        raise UserError(f'unknown benchmark "{arguments.name}".{near} Known: {", ".join(names) or "none"}.')
    _make(arguments.out)
    importlib.import_module(f"experiments.bench.{arguments.name}").bench(arguments.preset, arguments.out)
    return 0


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m experiments",
        description="Run the experiments of the 45 papers and judge what the papers claim.",
        epilog="For example: python -m experiments run dopamine --preset smoke",
    )
    commands = parser.add_subparsers(required=True, metavar="list | run | report | bench")

    listing = commands.add_parser("list", help="show the systems, or one of them with presets and claims")
    listing.add_argument("slug", nargs="?", help="show this system's presets, their fields and its claims")
    listing.set_defaults(command=_list)

    run = commands.add_parser(
        "run",
        help="run one experiment and judge its claims",
        description="Run one experiment and judge its claims. It writes OUT/SLUG/PRESET-SEED/ and nothing "
        "else. The same command again resumes an interrupted run, or shows the result of a finished one.",
        epilog="Exit code: 0 it ran, 1 a claim fails (with --strict), 2 a mistake in the command, 130 or 143 "
        "interrupted. Compiled programs are cached between runs; MECHLAB_NO_CACHE=1 switches that off.",
    )
    run.add_argument("slug", help="which system; see: python -m experiments list")
    run.add_argument("--preset", default="cpu", help="smoke, cpu, accel or paper (default: cpu)")
    run.add_argument("--seed", type=int, default=0, help="root of all randomness (default: 0)")
    run.add_argument(
        "--set",
        dest="assignments",
        metavar="FIELD=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change fields of the preset, such as: --set steps=200 widths=64,64 gate=none",
    )
    run.add_argument("--out", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    run.add_argument("--strict", action="store_true", help="exit with 1 when a claim fails")
    run.set_defaults(command=_run)

    report = commands.add_parser("report", help="write one HTML page of all runs")
    report.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    report.add_argument("--out", type=Path, help="the page to write (default: RUNS/index.html)")
    report.set_defaults(command=_report)

    bench = commands.add_parser("bench", help="measure speed, memory and scaling")
    bench.add_argument("name", help="a module of experiments/bench, or all")
    bench.add_argument("--preset", choices=("smoke", "cpu", "accel"), default="cpu", help="size (default: cpu)")
    out = Path("runs/bench")
    bench.add_argument("--out", type=Path, default=out, help=f"folder for its files (default: {out})")
    bench.set_defaults(command=_bench)
    return parser


if __name__ == "__main__":
    sys.exit(main())
