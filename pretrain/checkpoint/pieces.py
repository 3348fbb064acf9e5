"""Where the elements of a checkpoint are, in a short form for manifests of many processes.

In memory, each file has its ``fragments``: {parameter: [first element, number of elements, stored
keys]}. With a thousand processes these are a million entries. But ZeRO divides a parameter
equally, so that consecutive files hold consecutive pieces of one size: in a manifest such a row of
pieces is one entry.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

MOST = 4_000_000
"""Largest number of pieces: 1,000 processes with 4,000 parameters each. A manifest that claims more
would fill the memory."""


def compact(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest to be written: ``fragments`` of all files become ``pieces`` and ``keys``.

    ``pieces``: {parameter: [[tensor-parallel rank, first file, first element, number of elements,
    number of files, index of the stored keys], ...]}. Files count among those of the rank, by name.
    """
    files, keys = manifest["files"], list[list[str]]()
    place = {
        name: number for names in _by_rank(files).values() for number, name in enumerate(names)
    }
    found: dict[str, list[tuple[int, int, int, int, int]]] = defaultdict(list)
    for name, entry in files.items():
        for parameter, (offset, numel, stored) in entry["fragments"].items():
            if list(stored) not in keys:
                keys.append(list(stored))
            kind = keys.index(list(stored))
            found[parameter].append((entry["tensor_rank"], place[name], offset, numel, kind))
    bare = {
        name: {key: value for key, value in entry.items() if key != "fragments"}
        for name, entry in files.items()
    }
    rows = {parameter: _rows(sorted(pieces)) for parameter, pieces in found.items()}
    return {**manifest, "keys": keys, "pieces": rows, "files": bare}


def _rows(pieces: list[tuple[int, int, int, int, int]]) -> list[list[int]]:
    """Join pieces of one size that follow each other in consecutive files."""
    rows: list[list[int]] = []
    for rank, file, offset, numel, kind in pieces:
        last = rows[-1] if rows else [-1, 0, 0, 0, 0, 0]
        follows = [rank, file, offset] == [last[0], last[1] + last[4], last[2] + last[3] * last[4]]
        if follows and (numel, kind) == (last[3], last[5]):
            last[4] += 1
        else:
            rows.append([rank, file, offset, numel, 1, kind])
    return rows


def expand(written: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `compact`.

    Raises:
        ValueError: if the pieces are not such, or name files that are not there.
    """
    written = dict(written)
    keys, rows = written.pop("keys", None), written.pop("pieces", None)
    files = {name: {**entry, "fragments": {}} for name, entry in written["files"].items()}
    names, pieces = _by_rank(files), 0
    for parameter, of_parameter in rows.items():
        for row in of_parameter:
            if len(row) != 6 or not all(type(one) is int and one >= 0 for one in row):
                raise ValueError(f"pieces of {parameter}: {row!r:.60}")
            rank, first, offset, numel, count, kind = row
            pieces += count
            of_rank = names.get(rank, [])
            if pieces > MOST or kind >= len(keys) or first + count > len(of_rank):
                raise ValueError(f"pieces of {parameter}: {row}")
            for number in range(count):
                fragments = files[of_rank[first + number]]["fragments"]
                if parameter in fragments:
                    raise ValueError(f"pieces of {parameter}: two in {of_rank[first + number]}")
                fragments[parameter] = [offset + number * numel, numel, keys[kind]]
    return {**written, "files": files}


def _by_rank(files: dict[str, Any]) -> dict[int, list[str]]:
    """Names of files by the tensor-parallel rank whose elements they hold, in order."""
    names: dict[int, list[str]] = defaultdict(list)
    for name in sorted(files):
        names[files[name]["tensor_rank"]].append(name)
    return names
