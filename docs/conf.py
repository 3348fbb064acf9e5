"""The pages as a site: `make docs` builds it with Sphinx from this repository's top folder.

The pages are plain Markdown, as a reader of the repository sees them. The list of docs/index.md
becomes the navigation.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

project = "rankdecay"
author = "the rankdecay authors"
extensions = ["myst_parser"]
include_patterns = ["*.md", "docs/**.md"]
exclude_patterns = ["**/.*", "build", "data", "demo", "paper", "runs"]
root_doc = "docs/index"
html_theme = "furo"
html_title = "rankdecay"
html_copy_source = False
html_show_sphinx = False
myst_heading_anchors = 4

_ROOT = Path(__file__).resolve().parent.parent


def _with_navigation(app: Any, name: str, source: list[str]) -> None:
    """Turn each list of the index into a part of the navigation, under its heading."""
    if name != root_doc:
        return
    parts = ["", *re.split(r"^## (.*)$", source[0], flags=re.M)]
    for title, text in zip(parts[::2], parts[1::2], strict=True):
        pages = dict.fromkeys(re.findall(r"\]\(([\w./-]+)\.md\)", text))
        listed = "\n".join(f"/{_page(one)}" for one in pages)
        caption = f":caption: {title}\n" if title else ""
        source[0] += f"\n```{{toctree}}\n:hidden:\n{caption}\n{listed}\n```\n"


def _page(link: str) -> str:
    """A link of the index as the name of a page."""
    return str((_ROOT / "docs" / link).resolve().relative_to(_ROOT))


def _lead_to_index(app: Any, error: Exception | None) -> None:
    """Make the site's top page lead to the index, which has the address that it has here."""
    if error is None:
        page = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _with_navigation)
    app.connect("build-finished", _lead_to_index)
