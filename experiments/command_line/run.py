"""``run``: one experiment at one preset and seed, in a directory of its own that is never overwritten."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import mechlab
from experiments.catalogue import System, load
from experiments.command_line.configs import choose, override, plain
from experiments.command_line.directories import CHECKPOINTS, RESULT, examine, hold
from experiments.command_line.tables import print_record
from mechlab.core.errors import UserError
from mechlab.reporting import figures
from mechlab.reporting.log import Log
from mechlab.reporting.results import Result, read_record, to_record, write_json

INTERRUPTED, TERMINATED = 130, 143
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class _Terminated(KeyboardInterrupt):
    """The process was asked to end; handled as an interruption."""


def run(system: System, *, preset: str, seed: int, assignments: Sequence[str], out: Path, strict: bool = False) -> int:
    """Run an experiment, or resume it, or show its result where it has finished.

    Args:
      system: a system that is ready.
      preset: name of one of its presets.
      seed: root seed, 0 to 2**32 - 1.
      assignments: changes to the preset, ``field=value``.
      out: folder of all runs; this one goes to ``SLUG/PRESET-SEED`` in it.
      strict: count a claim that fails as a failure.

    Returns:
      The exit code: 0 when it ran, 1 when a claim fails and ``strict`` is set, 130 or 143 when interrupted.

    Raises:
      UserError: what was asked for cannot be run; the message is one line.
    """
    module = load(system)
    config = override(choose(module.PRESETS, preset, system.slug), assignments)
    if hasattr(module, "resolve"):  # what depends on the machine, such as which data are here, becomes explicit
        config = module.resolve(config)
    identity = {"slug": system.slug, "preset": preset, "seed": seed, "config": plain(config)}
    directory = out / system.slug / f"{preset}-{seed}"
    if examine(directory, identity) == "finished":
        print(f"{directory} is finished; nothing was run. Its result:")
        return _outcome(directory, strict)
    try:
        with _sigterm_raises(), hold(directory, identity, mechlab.__version__) as state:
            log = Log(directory / CHECKPOINTS, quiet=False)
            if state != "finished":
                log.say(_opening(directory, state))
                _use_compilation_cache()
                _run_and_save(module, config, identity, directory, log)
    except KeyboardInterrupt as interruption:
        print(_closing(directory), file=sys.stderr)
        return TERMINATED if isinstance(interruption, _Terminated) else INTERRUPTED
    return _outcome(directory, strict)


def _run_and_save(module: ModuleType, config: Any, identity: Mapping[str, Any], directory: Path, log: Log) -> None:
    import jax

    began = time.monotonic()
    result: Result = module.run(jax.random.key(identity["seed"]), config, log)
    seconds = time.monotonic() - began
    paths = [f"figures/{figures.file_name(*item)}" for item in result.figures.items()]
    record = to_record(result, **identity, device=_device(), versions=_versions(), seconds=seconds, figures=paths)
    try:
        for path, figure in zip(paths, result.figures.values(), strict=True):
            figures.save(figure, directory / path, overwrite=True)
        write_json(directory / RESULT, record)
    except OSError as error:
        raise UserError(f"the experiment ran, but {directory} could not be written: {error}") from error


def _outcome(directory: Path, strict: bool) -> int:
    record = read_record(directory / RESULT)
    print_record(record)
    print(f"in {directory}")
    return int(strict and any(claim["status"] == "fails" for claim in record["claims"]))


def _opening(directory: Path, state: str) -> str:
    if state == "new":
        return f"running in {directory}"
    if (directory / CHECKPOINTS).exists():
        return f"resuming the unfinished run in {directory}"
    return f"resuming the unfinished run in {directory}, which kept no checkpoint: it starts anew"


def _closing(directory: Path) -> str:
    if (directory / CHECKPOINTS).exists():
        return f"interrupted; what was trained is kept in {directory}; the same command goes on from there"
    return f"interrupted; nothing trained was kept yet in {directory}; the same command starts it anew"


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _use_compilation_cache() -> None:
    """Keep compiled programs between runs, unless MECHLAB_NO_CACHE=1 or jax was given a cache of its own."""
    import jax

    if os.environ.get("MECHLAB_NO_CACHE") == "1" or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "mechlab" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _device() -> dict[str, Any]:
    import jax

    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages, "mechlab": mechlab.__version__}
