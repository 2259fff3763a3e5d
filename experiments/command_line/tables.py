"""What the command line prints: the catalogue, one system, the outcome of a run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.catalogue import System
from experiments.command_line.configs import plain

METRICS_SHOWN = 12
_STYLES = {"holds": "green", "fails": "red", "not_judged": "dim"}


def print_catalogue(systems: Sequence[System]) -> None:
    """Print the systems, one a line.

    Args:
      systems: the catalogue.
    """
    widths = [max(len(getattr(system, name)) for system in systems) for name in ("slug", "family", "paper")]
    slug, family, paper = widths
    print(f"{'no':>2}  {'slug':<{slug}}  {'family':<{family}}  {'paper':<{paper}}  state")
    for system in systems:
        name = f"{system.number:>2}  {system.slug:<{slug}}  {system.family:<{family}}"
        print(f"{name}  {system.paper:<{paper}}  {'ready' if system.ready else 'planned'}")


def print_system(system: System, module: ModuleType | None) -> None:
    """Print one system: its paper, and its presets and claims where it is built.

    Args:
      system: the system.
      module: its experiment; None where it is not built.
    """
    console = _console()
    console.print(Text(f"{system.slug} ({system.family}, no. {system.number})", style="bold"))
    console.print(f"{system.title}. {system.paper}.")
    if module is None:
        console.print("planned: its experiment is not built yet")
        return
    console.print(_presets(module.PRESETS))
    claims = Table("claim", "the paper says", "holds when", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for claim in module.CLAIMS:
        claims.add_row(claim.id, f"{claim.statement} ({claim.source})", claim.criterion)
    console.print(claims)


def print_record(record: Mapping[str, Any]) -> None:
    """Print a finished run: every claim with its outcome, then the first metrics.

    Args:
      record: the run's valid record.
    """
    console = _console()
    console.print(_claims(record["claims"]))
    metrics = record["metrics"]
    table = Table("metric", "value", "95 % interval", "n", "unit", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, metric in list(metrics.items())[:METRICS_SHOWN]:
        interval = "" if metric["ci95"] is None else "[{:.4g}, {:.4g}]".format(*metric["ci95"])
        table.add_row(name, f"{metric['value']:.4g}", interval, str(metric["n"]), metric["unit"])
    console.print(table)
    if len(metrics) > METRICS_SHOWN:
        console.print(f"and {len(metrics) - METRICS_SHOWN} more metrics in result.json")


def _console() -> Console:
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def _presets(presets: Mapping[str, Any]) -> Table:
    """Fields with their types down, presets across; nothing is cut off, so that it can be typed after --set."""
    values = {name: plain(config) for name, config in presets.items()}
    fields = [field for config in presets.values() for field in dataclasses.fields(config)]
    kinds = {field.name: str(field.type) for field in fields}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("field", min_width=max(map(len, kinds)), overflow="fold")
    for preset in values:
        table.add_column(preset, overflow="fold")
    for field, kind in kinds.items():
        cells = [_spell(config[field]) if field in config else "" for config in values.values()]
        table.add_row(Text.assemble(field, "\n", (kind, "dim")), *cells)
    return table


def _spell(value: Any) -> str:
    """A JSON value the way it is typed after ``--set field=``."""
    if isinstance(value, list):
        return ",".join(map(_spell, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _claims(claims: Sequence[Mapping[str, str]]) -> Table:
    """Two texts to a row side by side, so that it is readable at 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_lines=False)
    table.add_column("status", no_wrap=True)
    table.add_column("the paper says", ratio=1)
    table.add_column("observed", ratio=1)
    for number, claim in enumerate(claims):
        if number:
            table.add_row()
        table.add_row(
            Text(claim["status"].replace("_", " "), style=_STYLES[claim["status"]]),
            f"{claim['id']}: {claim['statement']} ({claim['source']})",
            Text.assemble(claim["observed"], "\n", (f"criterion: {claim['criterion']}", "dim")),
        )
    return table
