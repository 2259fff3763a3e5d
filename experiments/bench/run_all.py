"""``python -m experiments bench all``: every device check and benchmark, one process each, within a time limit each.

On an accelerator the limits add up to less than nine minutes. A benchmark that fails or runs out of time is reported as
such and does not stop the others. Peers in other interpreters (of ``bench patching``, ``ibp``, ``adapters``,
``quantise`` and ``steering``) are left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.bench._peers import VARIABLE
from mechlab.reporting.results import write_json

LIMITS: dict[str, int] = {
    "device": 105,
    "core": 110,
    "training": 60,
    "patching": 80,
    "patching_maps": 20,
    "rational": 30,
    "kernels": 60,
    "quantise": 15,
    "ibp": 25,
    "adapters": 10,
    "steering": 24,
}
"""Seconds for each benchmark, in the order in which they run; 539 in all."""

ON_CPU: dict[str, int] = {
    "device": 150,
    "core": 240,
    "training": 120,
    "patching": 480,
    "patching_maps": 300,
    "rational": 120,
    "kernels": 120,
    "quantise": 120,
    "ibp": 240,
    "adapters": 240,
    "steering": 240,
}
"""The same for the preset "cpu"."""


def run_all(preset: str, out: Path) -> int:
    """Run them all, write ``all.json`` and one JSON file each, and print a short table last.

    Args:
      preset: "smoke", "cpu" or "accel".
      out: folder for the JSON files.

    Returns:
      0 if all ran and all device checks passed, or if "accel" was asked for and there is no accelerator; else 1.
    """
    console = Console()
    if preset == "accel" and not _accelerator():
        console.print("No accelerator on this machine. On one with a GPU or TPU this would run:")
        for name, limit in LIMITS.items():
            console.print(f"  python -m experiments bench {name} --preset accel   (at most {limit} s)", highlight=False)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name in LIMITS:
        limit = ON_CPU[name] if preset == "cpu" else LIMITS[name]
        start = time.monotonic()
        status = _run(name, preset, out, limit)
        found[name] = {"status": status, "seconds": round(time.monotonic() - start, 1), "limit": limit}
        write_json(out / "all.json", {"preset": preset, "benchmarks": found})
    table = Table("benchmark", "status", "seconds", "limit (s)", title=f"bench all, preset {preset}")
    for name, x in found.items():
        table.add_row(name, x["status"], f"{x['seconds']:.0f}", str(x["limit"]))
    console.print(table)
    return 0 if all(x["status"] == "ran" for x in found.values()) else 1


def _run(name: str, preset: str, out: Path, limit: int) -> str:
    command = [sys.executable, "-m", "experiments", "bench", name, "--preset", preset, "--out", str(out)]
    try:
        alone = {key: value for key, value in os.environ.items() if key != VARIABLE}
        finished = subprocess.run(command, timeout=limit, check=False, env=alone)
    except subprocess.TimeoutExpired:
        return f"stopped at its limit of {limit} s"
    return "ran" if finished.returncode == 0 else f"failed with exit code {finished.returncode}"


def _accelerator() -> bool:
    # Asked in a process of its own: once this one holds the device, the benchmarks could not have it.
    question = "import jax; raise SystemExit(jax.default_backend() == 'cpu')"
    return subprocess.run([sys.executable, "-c", question], check=False, capture_output=True).returncode == 0
