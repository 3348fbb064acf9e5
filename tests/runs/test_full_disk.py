"""Every verb that writes, on a full disk: one line that names the file, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_every_signal import words_of
from tests.kit import Kit
from tests.runs.test_writing_pairs import VERBS
from tests.tools import environment
from tests.warm import run_warm

SAMPLE = ["train", "export", "report"]
ROOM = 48 << 10
"""Bytes of the disk, all of which are taken."""


@contextlib.contextmanager
def full_disk(place: Path) -> Iterator[Path]:
    """A file system without room for a byte, that still has room for names."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "none", str(place)]
    if os.geteuid() or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting takes root")
    try:
        with (place / "filler").open("wb") as file, contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), b"x" * 4096)
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def check(verb: str, kit: Kit, folder: Path) -> None:
    with full_disk(folder / "disk") as disk:
        outputs = folder / "outputs"
        outputs.mkdir()
        done = run_warm(words_of(verb, kit, disk / "x"), environment(), outputs)
        left = [one for one in disk.rglob("*") if one.is_file() and one.name != "filler"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert len(errors) == 1 and str(disk) in errors[0], errors
    assert "No space left on device" in errors[0], errors
    unfinished = [one for one in left if one.name.endswith((".tmp", ".writing"))]
    beside = [one for one in left if one.parent == disk]
    assert not unfinished and not beside, left


@pytest.mark.slow
@pytest.mark.parametrize("verb", SAMPLE)
def test_a_full_disk(verb: str, kit: Kit, tmp_path: Path) -> None:
    check(verb, kit, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_under_every_verb(verb: str, kit: Kit, tmp_path: Path) -> None:
    check(verb, kit, tmp_path)
