"""The command line on slow disks: ``slow_disk.py RANK SECONDS WORDS...``.

On one rank, each of the first 80 blocks of checkpoints takes so many seconds to write, and each of
the first 80 to a mirror of the protocol ``slow``; everything else is `python -m pretrain WORDS...`.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

import pretrain.checkpoint.mirror
import pretrain.checkpoint.tensor_file
from pretrain.__main__ import main

PAUSE = 0.0
LEFT = {"disk": 80, "mirror": 80}


def linger(where: str) -> None:
    """Take the time of a block."""
    LEFT[where] -= 1
    if LEFT[where] >= 0:
        time.sleep(PAUSE)


class SlowFile(LocalFileOpener):  # type: ignore[misc]
    """A file that takes its time."""

    def write(self, data: Any) -> int:
        linger("mirror")
        written: int = super().write(data)
        return written


class SlowFileSystem(LocalFileSystem):  # type: ignore[misc]
    """A folder that takes its time."""

    protocol = "slow"

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return SlowFile(path, mode, fs=self)


def slow_down(function: Any) -> Any:
    def write(*arguments: Any) -> None:
        linger("disk")
        function(*arguments)

    return write


if __name__ == "__main__":
    PAUSE = float(sys.argv[2])
    fsspec.register_implementation("slow", SlowFileSystem)
    pretrain.checkpoint.mirror._BLOCK = pretrain.checkpoint.tensor_file._BLOCK = 16 << 10
    if os.environ.get("RANK", "0") == sys.argv[1]:
        pretrain.checkpoint.tensor_file._write = slow_down(pretrain.checkpoint.tensor_file._write)
    sys.argv = ["pretrain", *sys.argv[3:]]
    main()
