"""The table of the papers and the README's count agree with the catalogue."""

from __future__ import annotations

import re
from pathlib import Path

from experiments.catalogue import SYSTEMS

ROOT = Path(__file__).resolve().parents[2]
BUILT = [system.slug for system in SYSTEMS if system.ready]


def test_the_table_of_papers_is_the_catalogue():
    page = (ROOT / "docs/papers/index.md").read_text(encoding="utf-8")
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in re.findall(r"^\| \d.*$", page, re.M)]
    assert rows == [
        (
            str(system.number),
            f"[{system.slug}]({system.slug}.md)" if system.ready else system.slug,
            system.family,
            system.title,
            system.paper,
            "built" if system.ready else "planned",
        )
        for system in SYSTEMS
    ]


def test_every_built_system_has_its_page_in_the_contents():
    page = (ROOT / "docs/papers/index.md").read_text(encoding="utf-8")
    toctree = re.search(r"```\{toctree\}\n(?::.*\n)*\n(.*?)```", page, re.DOTALL)
    assert toctree and toctree[1].split() == BUILT


def test_the_counts_of_built_systems_are_right():
    for page in ("README.md", "docs/papers/index.md"):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert re.findall(r"(\d+) of 45 (?:is|are) built", text) == [str(len(BUILT))], page
