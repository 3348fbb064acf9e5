"""Lists the files of a folder of sources: follows links, and names what is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")

_NAMES = 16
"""Number of links to one folder that are followed."""


def suffix_of(path: Path) -> str | None:
    """The suffix of a readable file, in upper or lower case."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


@dataclass
class Listing:
    """The files of a folder that are sources, and the other files by the reason why they are
    not."""

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def leave_out(self, path: Path, reason: str) -> None:
        """Record a file or folder that is not read."""
        self.left_out.setdefault(reason, []).append(path)

    def lines(self) -> Iterator[str]:
        """One line for each reason, with some of the names."""
        for reason, paths in sorted(self.left_out.items()):
            some = ", ".join(str(path) for path in sorted(paths)[:3])
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            yield f"{len(paths)} {reason}: {some}{more}"


def list_folder(folder: Path) -> Listing:
    """Every file below a folder, including those behind links, in the order of their names.

    Raises:
        OSError: if a folder cannot be read.
    """
    listing = Listing()
    # Each folder with the real folders that lead to it: a link to one of them is a loop.
    waiting: list[tuple[Path, tuple[str, ...]]] = [(folder, (os.path.realpath(folder),))]
    seen: Counter[str] = Counter()
    while waiting:
        parent, above = waiting.pop()
        for entry in os.scandir(parent):
            path = Path(entry.path)
            if entry.name.startswith((".", "_")):
                listing.leave_out(path, "hidden (a name that begins with . or _)")
            elif _leads_nowhere(entry):
                listing.leave_out(path, "dangling link(s)")
            elif entry.is_dir():
                real = os.path.realpath(path)
                seen[real] += 1
                if real in above:
                    listing.leave_out(path, "link(s) back to a folder above")
                elif seen[real] > _NAMES:  # links to links multiply
                    listing.leave_out(path, f"link(s) to a folder that already has {_NAMES} names")
                else:
                    waiting.append((path, (*above, real)))
            else:
                _sort_in(listing, path, entry)
    listing.files.sort()
    return listing


def _sort_in(listing: Listing, path: Path, entry: os.DirEntry[str]) -> None:
    if not entry.is_file():
        listing.leave_out(path, "not a regular file")
    elif not suffix_of(path):
        listing.leave_out(path, f"of another kind than {', '.join(SUFFIXES)}")
    elif not entry.stat().st_size:
        listing.leave_out(path, "empty")
    else:
        listing.files.append(path)


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a link to nothing, or to itself."""
    return entry.is_symlink() and not Path(entry.path).exists()
