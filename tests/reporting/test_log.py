"""Progress: plain lines at most every 10 s off a terminal, bars on one, nothing when quiet."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mechlab.reporting import log as module
from mechlab.reporting.log import Log


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def terminal():
    """A log that draws into memory as if on a terminal."""
    log = Log(quiet=False)
    log._console = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False, markup=False)
    return log, log._console.file


def test_lines_come_every_ten_seconds_and_at_the_end(clock, capsys):
    with Log(quiet=False).track("train", 100) as update:
        for done in range(1, 101):
            clock.now += 0.3
            update(done, loss=1 / done)
    assert capsys.readouterr().err.splitlines() == [
        "train: 34/100  loss 0.02941",
        "train: 68/100  loss 0.01471",
        "train: 100/100  loss 0.01",
    ]


def test_a_quick_track_is_one_line(clock, capsys):
    with Log(quiet=False).track("train", 3) as update:
        for done in (1, 2, 3):
            update(done)
    assert capsys.readouterr().err == "train: 3/3\n"


def test_the_last_state_is_shown_when_a_track_breaks_off(clock, capsys):
    with pytest.raises(KeyboardInterrupt), Log(quiet=False).track("train", 9) as update:
        update(4, loss=2.5)
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "train: 4/9  loss 2.5\n"


def test_numbers_not_shown_are_not_read(clock, capsys):
    class Lazy:
        """A device array: reading it would wait for it."""

        def __float__(self):
            raise AssertionError("read although not shown")

    with Log(quiet=False).track("train", 3) as update:
        update(1, loss=Lazy())
        update(2, loss=Lazy())
        update(3, loss=1.0)
    assert capsys.readouterr().err == "train: 3/3  loss 1\n"


def test_tracks_nest_and_follow_one_another(clock, capsys):
    log = Log(quiet=False)
    with log.track("arms", 2) as outer:
        for arm in (1, 2):
            with log.track(f"arm {arm}", 5) as inner:
                inner(5)
            outer(arm)
    with log.track("after", 1) as update:
        update(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["arm 1: 5/5", "arm 2: 5/5", "arms: 2/2", "after: 1/1"]


def test_everything_goes_to_standard_error_as_it_is(capsys):
    Log(quiet=False).say("[red]not markup[/red] :smile: " + "long " * 60)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "[red]not markup[/red] :smile: " + "long " * 60 + "\n"


def test_quiet_says_nothing(capsys):
    log = Log()
    log.say("hello")
    with log.track("train", 1) as update:
        update(1)
    assert capsys.readouterr() == ("", "")
    assert log.directory is None


def test_bars_on_a_terminal_nest_with_messages_between(clock):
    log, screen = terminal()
    with log.track("arms", 2) as outer:
        with log.track("arm one", 5) as inner:
            inner(5, loss=0.25)
        log.say("one done")
        outer(2)
    with log.track("after", 7) as update:
        update(7)
    shown = screen.getvalue()
    for text in ("arms", "arm one", "5/5", "loss 0.25", "one done", "2/2", "after", "7/7"):
        assert text in shown


def test_a_broken_bar_leaves_the_terminal_usable(clock):
    log, screen = terminal()
    with pytest.raises(RuntimeError), log.track("train", 2) as update:
        update(1)
        raise RuntimeError
    assert screen.getvalue().rstrip().endswith("\x1b[?25h")
    with log.track("again", 2) as update:
        update(2)
    assert "again" in screen.getvalue()
