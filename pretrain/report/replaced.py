"""Replaces a report's folder: removes files of an earlier report that the new one does not have.

Otherwise they would look like figures of the new one. A list in the folder names the files that a
report wrote; a file that is not in it, or was changed since, belongs to somebody and is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.files import read_json, read_small, write_aside
from data_pipeline.strict_json import to_json
from pretrain.cli.console import warn


class Written:
    """The files of one report in a folder, with their hashes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hashes: dict[str, str] = {}

    def write(self, name: str, data: bytes) -> None:
        """Write a file completely or not at all."""
        write_aside(self.path / name, data)
        self.hashes[name] = _hash(data)


@contextlib.contextmanager
def replaced(path: Path, kind: str) -> Iterator[Written]:
    """Provide a folder for a report's files; at the end, files of an earlier report are removed.

    Args:
        kind: of the files, such as ``png``; a report in Markdown and one in LaTeX share a folder.
    """
    path.mkdir(parents=True, exist_ok=True)
    listed = path / f".report-{kind}.json"
    before, written = _listed(listed, kind), Written(path)
    yield written
    stale = {name: sha for name, sha in before.items() if name not in written.hashes}
    for name, sha in stale.items():
        _remove(path / name, sha)
    write_aside(listed, to_json(written.hashes, indent=1).encode())


def _listed(path: Path, kind: str) -> dict[str, str]:
    """Files that an earlier report wrote, according to its list, without those of another kind."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        name: sha for name, sha in content.items()
        if Path(name).name == name and name.endswith(f".{kind}") and isinstance(sha, str)
    }  # fmt: skip


def _remove(path: Path, sha: str) -> None:
    try:
        if _hash(read_small(path)) == sha:
            path.unlink()
        else:
            warn(f"{path}: belongs to an earlier report and was changed since; kept")
    except OSError:  # deleted already, or not a file
        return


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
