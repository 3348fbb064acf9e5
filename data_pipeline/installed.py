"""The text of every installed package, for a corpus of tens of millions of tokens.

All text of a package is in one split. Copies of other packages inside it (``_vendor`` and the like)
and its tests are left out, so that no split contains text of another.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

LARGEST = 1 << 20
"""Bytes of the largest file that is read: larger ones are tables and generated code."""
SOURCES, DOCUMENTS = (".py",), (".md", ".rst", ".txt")
_COPIES = {"_vendor", "vendor", "_vendored", "vendored", "third_party", "thirdparty", "extern",
           "externals", "_distutils"}  # fmt: skip
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

    A file that two packages name belongs to the first. A package whose record cannot be read is
    left out and said to be.
    """
    packages: dict[str, list[Path]] = {}
    for package in metadata.distributions(path=sys.path if folders is None else folders):
        try:
            name = re.sub(r"[-_.]+", "-", package.name).lower()
            root = Path(str(package.locate_file(""))).resolve()
            files = [root / file for file in package.files or [] if _is_text(file)]
        except (TypeError, ValueError, AttributeError) as error:
            print(f"left out: a package whose record cannot be read ({error})", file=sys.stderr)
            continue
        packages.setdefault(name, sorted(files))  # Python imports the first one, too
    seen: set[Path] = set()
    for name in sorted(packages):
        for path in packages[name]:
            if path not in seen and _is_readable(path):
                seen.add(path)
                yield name, path


def _is_text(file: metadata.PackagePath) -> bool:
    """Whether a file of a package is one of its own sources or documents."""
    if file.suffix not in SOURCES + DOCUMENTS or file.name in _NO_TEXT:
        return False
    inside = not (file.is_absolute() or ".." in file.parts)
    return inside and not (_COPIES | _TESTS).intersection(file.parts[:-1])


def _is_readable(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size <= LARGEST
    except OSError:
        return False
