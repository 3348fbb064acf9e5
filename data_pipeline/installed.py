"""The text of every installed package, for a corpus of tens of millions of tokens.

All text of a package is in one split. Copies of other packages inside it (``_vendor`` and the like)
and its tests are left out, so that no split contains text of another.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

LARGEST = 1 << 20
"""Bytes of the largest file that is read: larger ones are tables and generated code."""
SOURCES, DOCUMENTS = (".py",), (".md", ".rst", ".txt")
_COPIES = {"_vendor", "vendor", "_vendored", "vendored", "third_party", "thirdparty", "extern",
           "externals"}  # fmt: skip
_TESTS = {"test", "tests", "testing", "__pycache__"}
_NO_TEXT = {
    "top_level.txt",
    "entry_points.txt",
    "requires.txt",
    "SOURCES.txt",
    "dependency_links.txt",
}


def installed_files(folders: list[str] | None = None) -> Iterator[tuple[str, Path]]:
    """Every package's name with each of its sources and documents, in a fixed order.

    Args:
        folders: where packages are looked for; by default everywhere that Python imports from.

    A file that two packages name belongs to the first. Packages that are not installed as files
    (editable ones) have none.
    """
    seen: set[Path] = set()
    places = sys.path if folders is None else folders
    packages = {
        package.name.lower(): package
        for package in metadata.distributions(path=places)
        if package.name
    }
    for name in sorted(packages):
        root = Path(str(packages[name].locate_file(""))).resolve()
        for file in sorted(packages[name].files or [], key=str):
            if file.suffix not in SOURCES + DOCUMENTS or file.name in _NO_TEXT:
                continue
            if ".." in file.parts or (_COPIES | _TESTS).intersection(file.parts[:-1]):
                continue
            path = root / file
            if path not in seen and _is_readable(path):
                seen.add(path)
                yield name, path


def _is_readable(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size <= LARGEST
    except OSError:
        return False
