"""How a running experiment speaks: messages and progress, on a terminal or into a file, or not at all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_FRAMES = 0.1


class Update(Protocol):
    """Tells a track how far it is: ``update(done, loss=0.3)``."""

    def __call__(self, done: int, **numbers: float) -> None:
        """Args: done: steps done so far. numbers: what to show beside them, by name."""


class Log:
    """Where an experiment reports while it runs, and where it may keep what it has trained.

    On a terminal a track is a progress bar; elsewhere it is a plain line at most every 10 s, and a last one.
    Everything goes to standard error, so that standard output holds results only.

    Attributes:
      directory: folder for the checkpoints of this run, made by whoever writes one; None to keep none.
      quiet: show nothing.
    """

    def __init__(self, directory: Path | None = None, quiet: bool = True) -> None:
        self.directory = directory
        self.quiet = quiet
        self._console = Console(stderr=True, quiet=quiet, highlight=False, markup=False, emoji=False)
        self._progress: Progress | None = None

    def say(self, message: str) -> None:
        """Show a message, above the progress bars where there are some.

        Args:
          message: the text.
        """
        self._console.print(message, soft_wrap=True)

    @contextmanager
    def track(self, name: str, total: int) -> Iterator[Update]:
        """Show the progress of work that takes ``total`` steps. Tracks may follow or contain one another.

        Args:
          name: what is going on, such as ``"train gain_only"``.
          total: how many steps it takes.

        Yields:
          ``update(done, **numbers)``, to be called as often as is convenient.
        """
        shown = self._bar(name, total) if self._console.is_terminal else self._lines(name, total)
        with shown as update:
            yield update

    @contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Update]:
        outermost = self._progress is None
        progress = self._progress or Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=self._console,
            auto_refresh=False,
        )
        if outermost:
            self._progress = progress
            progress.start()
        task = progress.add_task(name, total=total, numbers="")
        drawn = -float("inf")
        shown: dict[str, float] = {}

        def draw() -> None:
            progress.update(task, numbers=_spell(shown))
            progress.refresh()

        def update(done: int, **numbers: float) -> None:
            nonlocal drawn, shown
            shown = numbers
            progress.update(task, completed=done)
            if time.monotonic() - drawn >= SECONDS_BETWEEN_FRAMES:
                drawn = time.monotonic()
                draw()

        try:
            yield update
        finally:
            draw()
            if outermost:
                progress.stop()
                self._progress = None
            else:
                progress.remove_task(task)
                progress.refresh()

    @contextmanager
    def _lines(self, name: str, total: int) -> Iterator[Update]:
        written = time.monotonic()
        pending: tuple[int, dict[str, float]] | None = None

        def write() -> None:
            nonlocal written, pending
            if pending is not None:
                done, numbers = pending
                self.say(f"{name}: {done}/{total}  {_spell(numbers)}".rstrip())
                written, pending = time.monotonic(), None

        def update(done: int, **numbers: float) -> None:
            nonlocal pending
            pending = done, numbers
            if time.monotonic() - written >= SECONDS_BETWEEN_LINES:
                write()

        try:
            yield update
        finally:
            write()


def _spell(numbers: dict[str, float]) -> str:
    """The numbers as text. Reading a device array waits for it, so this is called for what is shown only."""
    return "  ".join(f"{name} {float(number):.4g}" for name, number in numbers.items())
