"""Sphinx configuration. Build with ``python -m sphinx -W -b html docs docs/_build/html``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mechlab import __version__

project = "mechlab"
author = "the mechlab authors"
copyright = "2026, the mechlab authors"
release = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_parser"]
exclude_patterns = ["_build", "notebooks"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
# Shapes in annotations are for type checkers; the docstrings say them in words.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"mechlab {release}"


def absolute_values(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """A bar in a docstring is an absolute value or an "or", never reStructuredText's substitution."""
    literal: int | None = None
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indent <= literal:
            literal = None
        if literal is None:
            lines[number] = re.sub(r"(``.*?``)|\|", lambda found: found[1] or r"\|", line)
            literal = indent if line.endswith("::") else None


def setup(app: Any) -> None:
    # Before napoleon, which numbers its handler 500 as every default does and comes first in the list.
    app.connect("autodoc-process-docstring", absolute_values, priority=400)
