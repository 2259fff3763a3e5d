"""The directory of a run: what state it is in, and holding it so that nobody else runs in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TextIO

from mechlab.core.errors import UserError
from mechlab.reporting.results import read_record, write_json

try:
    import fcntl
except ImportError:  # not a POSIX system: directories are not guarded there
    fcntl = None  # type: ignore[assignment]

CONFIG = "config.json"
RESULT = "result.json"
CHECKPOINTS = "checkpoints"
_LOCK = ".lock"

State = Literal["new", "unfinished", "finished"]


def examine(directory: Path, identity: Mapping[str, Any]) -> State:
    """What a run's directory holds; nothing is written.

    Args:
      directory: the directory, which need not exist.
      identity: ``slug``, ``preset``, ``seed`` and ``config`` of the run to be, as JSON values.

    Returns:
      "new" (nothing there), "unfinished" (the same run was begun) or "finished" (it has a valid result).

    Raises:
      UserError: it holds something else, a run of another configuration, or a result that cannot be read.
    """
    advice = "choose another --out or --seed"
    try:
        if not directory.exists() or not any(path.name[:1] != "." for path in directory.iterdir()):
            return "new"
        kept = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        kept = {name: kept[name] for name in identity}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory} exists and is not a run of this command line; {advice}") from error
    if kept != identity:
        raise UserError(f"{directory} holds another configuration ({_differences(kept, identity)}); {advice}")
    if not (directory / RESULT).exists():
        return "unfinished"
    try:
        read_record(directory / RESULT)
    except (OSError, ValueError) as error:
        raise UserError(f"the result there cannot be read: {error}; {advice}") from error
    return "finished"


@contextmanager
def hold(directory: Path, identity: Mapping[str, Any], version: str) -> Iterator[State]:
    """Make a run's directory, write what it is for, and keep others out of it for the duration of the block.

    Args:
      directory: the directory.
      identity: as for :func:`examine`.
      version: version of mechlab, kept beside the identity.

    Yields:
      The state the directory was in.

    Raises:
      UserError: it cannot be written, is in use by another process, or holds something else.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock: AbstractContextManager[Any] = nullcontext() if fcntl is None else _take(directory / _LOCK)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error
    with lock:
        try:
            state = examine(directory, identity)
            if state == "new":
                _write_identity(directory, {**identity, "mechlab": version})
            yield state
        finally:
            (directory / _LOCK).unlink(missing_ok=True)


def _take(path: Path) -> TextIO:
    """Open the lock file and lock it. The lock dies with its process, so none is ever stale."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise UserError(f"{path.parent} is in use by process {holder}; wait for it to end") from error
        except OSError:
            pass  # a file system without locks, such as some network drives: go on unguarded
        if os.fstat(file.fileno()).st_nlink:  # else its last holder removed it between open and lock
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            return file
        file.close()


def _write_identity(directory: Path, identity: Mapping[str, Any]) -> None:
    try:
        write_json(directory / CONFIG, identity)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error


def _differences(kept: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The first few differing fields of two identities."""
    old, new = ({**sides, **sides["config"]} for sides in (kept, asked))
    names = [name for name in {**old, **new} if name != "config" and old.get(name) != new.get(name)]
    shown = [f"{name}: {old.get(name)!r} there, {new.get(name)!r} asked for" for name in names[:3]]
    return "; ".join(shown) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
