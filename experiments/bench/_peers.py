"""Peers of a benchmark as processes: each in an interpreter that has it, asked over a pipe, so that runs interleave."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

VARIABLE = "MECHLAB_PEERS"
"""Environment variable: the interpreters in which peers are looked for, separated as in PATH."""


class Peer:
    """A running peer; see ``_patching_peers.py`` for what it is asked and answers.

    Attributes:
      name: of the package, ``"torch.compile"`` apart.
      about: what it said about itself: versions, threads, seconds to start.
    """

    def __init__(self, script: Path, name: str, python: str, folder: Path) -> None:
        self.name = name
        self._said = folder / f"{name}-{abs(hash(python))}.txt"
        # What this process imports from must not leak into the peer, whose versions may differ.
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        with self._said.open("w") as errors:
            self._process = subprocess.Popen(
                [python, str(script), name, str(folder), device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=clean,
            )
        self.about = self._read()

    def ask(self, prompts: str, cells: list[Any]) -> dict[str, Any]:
        """``{"seconds": ..., "values": [...]}`` of these cells."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "cells": cells}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()  # waits, and closes the pipes
            code, said = self._process.returncode, self._said.read_text().strip().splitlines()
            raise RuntimeError(f"the peer {self.name} ended with exit code {code}: {said[-1] if said else 'no word'}")
        found: dict[str, Any] = json.loads(line)
        return found


@contextlib.contextmanager
def running(script: Path, names: tuple[str, ...], folder: Path) -> Iterator[dict[str, Peer]]:
    """The peers that are installed in the interpreters of ``MECHLAB_PEERS``, by name and version, each version once."""
    started: dict[str, Peer] = {}
    try:
        for python in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
            for name in names:
                label = _label(python, name)
                if label is not None and label not in started:
                    started[label] = Peer(script, name, python, folder)
        yield started
    finally:
        for peer in started.values():
            peer.stop()


def _label(python: str, name: str) -> str | None:
    """Name and version, or None where it is not installed."""
    question = f"from importlib.metadata import version; print(version('{name.partition('.')[0]}'))"
    answer = subprocess.run([python, "-c", question], check=False, capture_output=True, text=True)
    return f"{name} {answer.stdout.strip()}" if answer.returncode == 0 else None


def machine(peers: dict[str, Peer]) -> dict[str, Any]:
    """Where a benchmark runs, and against what, for its record."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": platform.machine(),
        "load before": os.getloadavg()[0],
        "jax": version("jax"),
        "peers": {label: peer.about for label, peer in peers.items()},
    }
