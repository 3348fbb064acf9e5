"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_aside(path: Path, data: bytes) -> None:
    """Write a file beside ``path`` and rename it, so that a kill leaves the old one or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    write_synced(aside, data)
    os.replace(aside, path)
