"""Every Python example of the README and the documentation runs, and prints what the page says that it prints.

The ``python`` blocks of a page run in order, in one namespace, in an empty folder. A ``text`` block right after one is
what it prints; ``...`` in it stands for any text. A block whose first line is a path, such as
``# experiments/compression/pruning.py``, is that file: the blocks after it can import it, and if the path is below
``tests/`` its test functions are run. An example that is not to be run is a ``text`` or ``console`` block.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(\n*```text\n(?P<printed>.*?)^```$)?", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (?P<path>\w[\w/]*\.py)\n")


class Snippet(NamedTuple):
    """One block: its code, the line of the page it starts on, and what it should print (None: not said)."""

    code: str
    line: int
    printed: str | None


def snippets(page: str) -> list[Snippet]:
    """The Python blocks of a page, in order."""
    found = BLOCK.finditer(page)
    return [Snippet(m["code"], page.count("\n", 0, m.start("code")) + 1, m["printed"]) for m in found]


def run_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the page's blocks; raises what a block raises, AssertionError where it prints something else."""
    monkeypatch.chdir(folder)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for snippet in snippets(page.read_text(encoding="utf-8")):
        # Blank lines in front make a traceback name the line of the page.
        code = compile("\n" * (snippet.line - 1) + snippet.code, str(page), "exec", dont_inherit=True)
        path = FILE.match(snippet.code)
        if path and not path["path"].startswith("tests/"):
            install(folder, Path(path["path"]), snippet.code, monkeypatch)
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
            if path:
                run_tests(namespace)
        if snippet.printed is not None:
            wanted, got = snippet.printed, printed.getvalue()
            same = doctest.OutputChecker().check_output(wanted, got, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            if not same:
                raise AssertionError(f"{page}:{snippet.line} prints\n{got}\nbut the page says\n{wanted}")


def install(folder: Path, path: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a module of the page below ``folder`` and let its package be found there too."""
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(code, encoding="utf-8")
    for parent in reversed(path.parents[:-1]):
        package = importlib.import_module(".".join(parent.parts))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder / parent)])
    importlib.invalidate_caches()


def run_tests(namespace: dict[str, object]) -> None:
    """Call the test functions of a page's test file."""
    tests = [value for name, value in namespace.items() if name.startswith("test_") and callable(value)]
    assert tests, "a block below tests/ has no test functions"
    for test in tests:
        test()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder; modules imported from it are forgotten afterwards."""
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_example_of_a_page_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not snippets(page.read_text(encoding="utf-8")):
        pytest.skip("no Python examples")
    run_page(page, folder, monkeypatch)


def test_a_block_that_raises_fails_its_page_at_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("Words.\n\n```python\nx = 1\ny = x / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run_page(page, tmp_path, monkeypatch)
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == (page, 5)


def test_wrong_output_fails_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")
    with pytest.raises(AssertionError, match="prints\n2"):
        run_page(page, tmp_path, monkeypatch)
    page.write_text("```python\nprint('a', 0.123)\n```\n\n```text\na 0.1...\n```\n")
    run_page(page, tmp_path, monkeypatch)


def test_a_block_with_a_path_can_be_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = folder / "page.md"
    page.write_text(
        "```python\n# mechlab/methods/invented/method.py\ndef twice(x):\n    return 2 * x\n```\n"
        "```python\nfrom mechlab.methods.invented.method import twice\nprint(twice(4))\n```\n\n```text\n8\n```\n"
        "```python\n# tests/methods/invented/test_method.py\n"
        "def test_twice():\n    print(twice(5))\n```\n\n```text\n10\n```\n"
    )
    run_page(page, folder, monkeypatch)
    page.write_text("```python\n# tests/test_it.py\ndef test_it():\n    assert 1 == 2\n```\n")
    with pytest.raises(AssertionError):
        run_page(page, folder, monkeypatch)
