"""One static page of all runs: claims, metrics, figures. Plain HTML that opens from disk, no scripts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mechlab.reporting.results import STATUSES, read_record

STATUS_WORDS = {"holds": "✓ holds", "fails": "✗ fails", "not_judged": "– not judged"}
OTHER_FAMILY = "other"

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --quiet: #5c5c5c; --page: #fff; --line: #ddd;
  --link: #0b5cad; --holds: #00694c; --fails: #a83e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --quiet: #a5a5a5; --page: #15171a;
  --line: #363a40; --link: #7db7f0; --holds: #4fd1a5; --fails: #ff9a5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
a { color: var(--link); }
h1, h2, h3 { line-height: 1.2; }
h2 { margin: 2.5rem 0 .5rem; text-transform: capitalize; }
article { border-top: 2px solid var(--line); margin-top: 2.5rem; padding-top: .5rem; }
.quiet { color: var(--quiet); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .7rem .4rem 0;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: nowrap; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.key { overflow-wrap: anywhere; }
.status { white-space: nowrap; font-weight: 600; }
.holds { color: var(--holds); }
.fails { color: var(--fails); }
.not_judged { color: var(--quiet); }
.index { table-layout: fixed; overflow-wrap: anywhere; }
.index th:nth-child(1) { width: 32%; }
.index th:nth-child(2) { width: 38%; }
.figures { display: grid; margin: 1.2rem 0; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; }
figure img { width: 100%; max-width: 60rem; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 4px; }
figcaption { font-size: .9rem; color: var(--quiet); }
details { margin: .8rem 0; }
summary { cursor: pointer; }
@media (max-width: 40rem) {
  .claims thead { display: none; }
  .claims tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--line); }
  .claims td { display: block; border: 0; padding: .1rem 0; }
}
"""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A run's folder with its record, or with the reason why there is none."""

    folder: Path
    record: dict[str, Any] | None
    problem: str = ""

    @property
    def slug(self) -> str:
        return self.folder.parent.name

    @property
    def anchor(self) -> str:
        return f"{self.slug}-{self.folder.name}"


def build_gallery(runs: Path, out: Path, families: Mapping[str, str] | None = None) -> Path:
    """Write one HTML page of all runs in a folder.

    Args:
      runs: folder of runs, laid out as ``SLUG/PRESET-SEED/result.json``.
      out: the page to write; figures are not copied but referenced from where it lies.
      families: family of each slug, in the order to list them; slugs not in it are listed last.

    Returns:
      ``out``.

    Raises:
      FileNotFoundError: ``runs`` is not a folder.
      OSError: the page cannot be written.
    """
    if not runs.is_dir():
        raise FileNotFoundError(f"{runs} is not a folder of runs")
    families = families or {}
    slugs = list(families)
    order = {slug: place for place, slug in enumerate(slugs)}
    found = sorted(_find(runs), key=lambda run: (order.get(run.slug, len(order)), run.slug, run.folder.name))
    groups: dict[str, list[_Run]] = {family: [] for family in [*families.values(), OTHER_FAMILY]}
    for run in found:
        groups[families.get(run.slug, OTHER_FAMILY)].append(run)
    groups = {family: members for family, members in groups.items() if members}
    body = [_overview(found)]
    for family, members in groups.items():
        body.append(f"<h2>{escape(family)}</h2>" + _index(members))
    for members in groups.values():
        body += [_article(run, out.parent) for run in members if run.record is not None]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_page("\n".join(body)), encoding="utf-8")
    return out


def _find(runs: Path) -> Iterable[_Run]:
    folders = {path.parent for name in ("config.json", "result.json") for path in runs.glob(f"*/*/{name}")}
    for folder in folders:
        try:
            yield _Run(folder=folder, record=read_record(folder / "result.json"))
        except FileNotFoundError:
            yield _Run(folder=folder, record=None, problem="not finished")
        except (OSError, ValueError) as error:
            yield _Run(folder=folder, record=None, problem=f"unreadable: {error}")


def _page(body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>mechlab runs</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _overview(found: Sequence[_Run]) -> str:
    finished = [run for run in found if run.record is not None]
    counts: Counter[str] = Counter()
    for run in finished:
        counts += _counts(run)
    rest = len(found) - len(finished)
    return (
        f'<h1 id="top">mechlab runs</h1>\n<p>{len(finished)} finished'
        + (f", {rest} without a readable result" if rest else "")
        + f". Claims: {_count_words(counts)}.</p>"
    )


def _counts(run: _Run) -> Counter[str]:
    return Counter(claim["status"] for claim in (run.record or {})["claims"])


def _count_words(counts: Mapping[str, int]) -> str:
    words = (f'<span class="{s}">{counts.get(s, 0)} {s.replace("_", " ")}</span>' for s in STATUSES)
    return ", ".join(words)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already; a cell that starts with "<td" brings its own tag."""
    cells = "\n".join(
        "<tr>" + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    titles = "".join(f"<th>{title}</th>" for title in head)
    return (
        f'<div class="scroll"><table class="{kind}">\n<thead><tr>{titles}</tr></thead>\n'
        f"<tbody>\n{cells}\n</tbody></table></div>"
    )


def _index(members: Sequence[_Run]) -> str:
    rows = []
    for run in members:
        name = f"{escape(run.slug)} {escape(run.folder.name)}"
        if run.record is None:
            rows.append([name, f'<td class="quiet" colspan="3">{escape(run.problem)}</td>'])
        else:
            link = f'<a href="#{quote(run.anchor)}">{name}</a>'
            device = escape(run.record["device"]["kind"])
            rows.append([link, _count_words(_counts(run)), device, _duration(run.record["seconds"])])
    return _table(("run", "claims", "device", "time"), rows, kind="index")


def _article(run: _Run, base: Path) -> str:
    record = run.record
    assert record is not None
    device = record["device"]
    lead = (
        f"preset {record['preset']}, seed {record['seed']}, on {device['count']} × {device['kind']} "
        f"({device['platform']}), {_duration(record['seconds'])}"
    )
    parts = [
        f'<article id="{escape(run.anchor)}">',
        f"<h3>{escape(run.slug)} {escape(run.folder.name)}</h3>",
        f'<p class="quiet">{escape(lead)} · <a href="#top">all runs</a></p>',
        _claims(record["claims"]),
        _figures(run.folder, base, record["figures"]),
        _details(f"Metrics ({len(record['metrics'])})", _metrics(record["metrics"]), shown=True),
        _details("Configuration", _pairs(record["config"])),
        _details("Versions", _pairs(record["versions"])),
        "</article>",
    ]
    return "\n".join(part for part in parts if part)


def _claims(claims: Sequence[Mapping[str, str]]) -> str:
    if not claims:
        return '<p class="quiet">No claims.</p>'
    rows = (
        [
            f'<span class="status {claim["status"]}">{STATUS_WORDS[claim["status"]]}</span>',
            f'{escape(claim["statement"])} <span class="quiet">({escape(claim["source"])})</span>',
            escape(claim["observed"]),
            f'<span class="quiet">{escape(claim["criterion"])}</span>',
        ]
        for claim in claims
    )
    return _table(("status", "the paper says", "observed", "criterion"), rows, kind="claims")


def _figures(folder: Path, base: Path, figures: Sequence[str]) -> str:
    cells = []
    for figure in figures:
        target = quote(Path(os.path.relpath(folder / figure, base)).as_posix())
        caption = escape(Path(figure).stem.replace("_", " ").capitalize())
        cells.append(
            f'<figure><a href="{target}"><img src="{target}" alt="{caption}" loading="lazy"></a>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f'<div class="figures">{"".join(cells)}</div>' if cells else ""


def _metrics(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, metric in metrics.items():
        interval = "" if metric["ci95"] is None else "[{:.4g}, {:.4g}]".format(*metric["ci95"])
        seeds = ", ".join(f"{value:.4g}" for value in metric.get("per_seed", ()))
        numbers = (f"{metric['value']:.4g}", interval, str(metric["n"]))
        rows.append(
            [
                f'<td class="key">{escape(name)}</td>',
                *(f'<td class="number">{number}</td>' for number in numbers),
                escape(metric["unit"]),
                f'<span class="quiet">{seeds}</span>',
            ]
        )
    return _table(("metric", "value", "95 % interval", "n", "unit", "every seed"), rows)


def _pairs(values: Mapping[str, Any]) -> str:
    rows = ([escape(str(name)), escape(str(value))] for name, value in values.items())
    return _table(("name", "value"), rows)


def _details(title: str, content: str, shown: bool = False) -> str:
    return f"<details{' open' if shown else ''}><summary>{escape(title)}</summary>\n{content}\n</details>"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
