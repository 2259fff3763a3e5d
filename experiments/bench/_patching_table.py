"""What ``bench patching`` and ``bench patching_maps`` print."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.bench._peers import VARIABLE
from experiments.bench._timing import describe


def print_record(record: dict[str, Any]) -> None:
    """The record of a run as a table."""
    found = record["flagship"]
    table = Table("measured", "value", title=f"patching on {record['machine']['device']}")
    table.add_row("largest difference from edited forwards", f"{found['largest difference']['edited forwards']:.1e}")
    for name in ("demo", "everywhere"):
        seconds = np.median(found["seconds for all cells"][name])
        table.add_row(f"{found['cells']} cells, prompts differ: {name}", f"{seconds:.2f} s")
        table.add_row("  share of the matmul peak", f"{found['arithmetic'][name]['share of matmul peak']:.0%}")
        for label, times in found["over ours"][name].items():
            table.add_row(f"  {label} over ours", describe(times))
    _say_if_alone(table, record)
    for cells, one in record["chunks"].items():
        memory = f"{one['temporary'] / 2**20:.0f} MiB"
        table.add_row(f"{cells} cells at once", f"{1e3 * one['seconds per cell']:.2f} ms per cell, {memory}")
    for depth, seconds in record["compile"].items():
        table.add_row(f"compile two positions, {depth} layers", f"{seconds:.1f} s")
    Console().print(table)


def print_maps(record: dict[str, Any]) -> None:
    """The record of the layer maps as a table."""
    table = Table("measured", "value", title=f"layer maps on {record['machine']['device']}")
    _say_if_alone(table, record)
    for length, both in record["maps"].items():
        for name, one in both.items():
            seconds = float(np.median(one["seconds per cell"]["ours"]))
            table.add_row(f"{name}, {length} tokens", f"{1e3 * seconds:.2f} ms per cell")
            for label, times in one["over ours"].items():
                table.add_row(f"  {label} over ours", describe(times))
    Console().print(table)


def _say_if_alone(table: Table, record: dict[str, Any]) -> None:
    if not record["machine"]["peers"]:
        table.add_row("peers", f"none: {VARIABLE} names no interpreter that has one")
