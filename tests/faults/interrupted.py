"""The command line with a pause at a chosen moment, so that a test can kill it just there.

``interrupted.py MOMENT MARKER WORDS...``: at the moment, the marker file appears and the process
sleeps; everything else is `python -m pretrain WORDS...`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pretrain.engine
import pretrain.evaluate
import pretrain.saver
from pretrain.__main__ import main


def pause(marker: Path, seconds: float = 600.0) -> None:
    """Say that the moment has come, and wait to be killed."""
    marker.touch()
    time.sleep(seconds)


def arm(moment: str, marker: Path) -> None:
    """Put the pause where it is wanted."""
    if moment in ("step", "slow"):  # slow: the sixth step takes a while, and then goes on
        original = pretrain.engine.Engine.train_step
        count = 0

        def train_step(self: Any, batches: Any) -> float:
            nonlocal count
            count += 1
            if count == 6:
                pause(marker, 3.0 if moment == "slow" else 600.0)
            return original(self, batches)

        pretrain.engine.Engine.train_step = train_step
    elif moment == "checkpoint":
        write = pretrain.saver._write_piece
        saves = 0

        def write_rank(*arguments: Any) -> Any:
            nonlocal saves
            saves += 1
            found = write(*arguments)
            if saves == 2:
                pause(marker)
            return found

        pretrain.saver._write_piece = write_rank
    elif moment in ("before rename", "after rename"):
        rename = pretrain.saver.os.rename
        renames = 0

        def rename_slowly(*arguments: Any) -> None:
            nonlocal renames
            renames += 1
            if renames == 2 and moment == "before rename":
                pause(marker)
            rename(*arguments)
            if renames == 2:
                pause(marker)

        pretrain.saver.os = SimpleNamespace(**{**vars(pretrain.saver.os), "rename": rename_slowly})
    elif moment == "evaluation":
        forward = pretrain.evaluate._forward
        calls = 0

        def slow_forward(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 5:
                pause(marker)
            return forward(*arguments)

        pretrain.evaluate._forward = slow_forward


if __name__ == "__main__":
    arm(sys.argv[1], Path(sys.argv[2]))
    sys.argv = ["pretrain", *sys.argv[3:]]
    main()
