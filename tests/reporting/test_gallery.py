"""The gallery: every run on one page, from disk, safe against what records contain."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from mechlab.reporting.gallery import build_gallery
from mechlab.reporting.results import ClaimResult, Metric, Result, to_record, write_json

FAMILIES = {"dopamine": "adaptation", "kat": "architectures", "bone": "adaptation"}


class Page(HTMLParser):
    """Tags, their attributes and the text of a page; complains about tags that do not match."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag, attribute):
        return [attrs[attribute] for name, attrs in self.tags if name == tag and attribute in attrs]


def add_run(runs, slug, *, seed=0, text="It holds.", figure="loss_by_step"):
    folder = runs / slug / f"smoke-{seed}"
    statuses = ("holds", "fails", "not_judged")
    claims = tuple(
        ClaimResult(id=status, statement=text, source="Table 1", status=status, observed="0.5 of 1", criterion="> 0")
        for status in statuses
    )
    metrics = {"gain": Metric(0.125, ci95=(0.1, 0.2), n=7, unit="nats", per_seed=(0.1, 0.15))}
    record = to_record(
        Result(metrics=metrics, claims=claims),
        slug=slug,
        preset="smoke",
        seed=seed,
        config={"steps": 321, "note": text},
        device={"platform": "gpu", "kind": "H100", "count": 2},
        versions={"jax": "0.9.9"},
        seconds=12.5,
        figures=[f"figures/{figure}.png"],
    )
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / f"{figure}.png").write_bytes(b"png")
    write_json(folder / "config.json", {})
    write_json(folder / "result.json", record)
    return folder


def build(runs, out=None, families=FAMILIES):
    out = build_gallery(runs, out or runs / "index.html", families)
    return Page(out.read_text(encoding="utf-8"))


def test_a_run_is_shown_with_everything_its_record_holds(tmp_path):
    add_run(tmp_path, "bone")
    text = build(tmp_path).text
    claims = ("✓ holds", "✗ fails", "– not judged", "1 holds, 1 fails, 1 not judged", "Table 1", "0.5 of 1")
    metrics = ("gain", "0.125", "[0.1, 0.2]", "nats", "0.1, 0.15")
    rest = ("adaptation", "321", "0.9.9", "2 × H100", "12.5 s", "Loss by step")
    assert [part for part in (*claims, *metrics, *rest) if part not in text] == []


def test_links_inside_the_page_lead_somewhere(tmp_path):
    add_run(tmp_path, "bone")
    add_run(tmp_path, "bone", seed=1)
    page = build(tmp_path)
    targets = {identifier for _, attrs in page.tags if (identifier := attrs.get("id"))}
    inside = [link[1:] for link in page.all("a", "href") if link.startswith("#")]
    assert {"bone-smoke-0", "bone-smoke-1"} <= set(inside) <= targets


@pytest.mark.parametrize("place", ["index.html", "../pages/gallery.html", "deep/er/index.html"])
def test_figures_are_found_from_where_the_page_lies(tmp_path, place):
    runs = tmp_path / "my runs"
    add_run(runs, "bone")
    out = (runs / place).resolve()
    page = build(runs, out)
    (source,) = page.all("img", "src")
    assert not source.startswith(("/", "file:"))
    assert (out.parent / unquote(source)).is_file()


def test_runs_are_listed_by_family_in_the_order_given_and_strangers_last(tmp_path):
    for slug in ("stranger", "kat", "bone", "dopamine"):
        add_run(tmp_path, slug)
    text = build(tmp_path).text
    wanted = ("adaptation", "dopamine smoke-0", "bone smoke-0", "architectures", "kat smoke-0", "other")
    places = [text.index(word) for word in wanted]
    assert places == sorted(places)


def test_what_records_contain_is_text_not_html(tmp_path):
    add_run(tmp_path, "bone", text='<script>alert("x")</script><img src=x onerror=y>')
    page = build(tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert len(page.all("img", "src")) == 1
    assert '<script>alert("x")</script>' in page.text


@pytest.mark.parametrize(
    ("text", "shown"), [("{", "unreadable"), ('{"schema": 1}', "unreadable"), (None, "not finished")]
)
def test_a_run_that_cannot_be_shown_is_listed_as_such(tmp_path, text, shown):
    add_run(tmp_path, "bone")
    broken = add_run(tmp_path, "kat") / "result.json"
    broken.unlink() if text is None else broken.write_text(text)
    page = build(tmp_path)
    assert shown in page.text
    assert "1 finished, 1 without a readable result" in page.text
    assert "bone-smoke-0" in [attrs.get("id") for _, attrs in page.tags]


def test_other_files_among_the_runs_are_ignored(tmp_path):
    add_run(tmp_path, "bone")
    (tmp_path / "bench" / "x").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("x")
    assert "1 finished." in build(tmp_path).text


def test_no_runs_make_an_empty_page(tmp_path):
    assert "0 finished" in build(tmp_path).text


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build_gallery(tmp_path / "nowhere", tmp_path / "index.html")


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    add_run(tmp_path, "bone")
    text = Path(build_gallery(tmp_path, tmp_path / "index.html")).read_text(encoding="utf-8")
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
