"""The command line with a pause at a chosen moment, so that a test can kill it just there.

``interrupted.py MOMENT MARKER WORDS...``: at the moment, the marker file appears and the process
sleeps; everything else is `python -m pretrain WORDS...`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pretrain.checkpoint.saver
import pretrain.engine.engine
import pretrain.tasks.score
from pretrain.__main__ import main


def pause(marker: Path, seconds: float = 600.0) -> None:
    """Say that the moment has come, and wait to be killed."""
    marker.touch()
    time.sleep(seconds)


def paused(
    function: Callable[..., Any], number: int, before: Callable[[], None] | None = None,
    after: Callable[[], None] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """``function``, with something done before or after its call of that number."""
    calls = 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and before:
            before()
        found = function(*arguments, **named)
        if calls == number and after:
            after()
        return found

    return call


def arm(moment: str, marker: Path) -> None:
    """Put the pause where it is wanted."""
    stop = partial(pause, marker)
    if moment == "slow steps":  # the sixth step takes a while, and the later ones a little
        engine = pretrain.engine.engine.Engine
        slow = paused(engine.train_step, 6, before=partial(pause, marker, 3.0))
        for number in range(7, 11):
            slow = paused(slow, number, before=partial(time.sleep, 1.0))
        engine.train_step = slow  # type: ignore[method-assign]
    elif moment in ("step", "slow"):  # slow: the sixth step takes a while, and then goes on
        wait = partial(pause, marker, 3.0) if moment == "slow" else stop
        engine = pretrain.engine.engine.Engine
        engine.train_step = paused(engine.train_step, 6, before=wait)  # type: ignore[method-assign]
    elif moment == "checkpoint":
        saver = pretrain.checkpoint.saver
        saver._write_piece = paused(saver._write_piece, 2, after=stop)
    elif moment in ("before rename", "after rename"):
        when = {"before": stop} if moment == "before rename" else {"after": stop}
        system = pretrain.checkpoint.saver.os  # type: ignore[attr-defined]
        rename = paused(system.rename, 2, **when)
        pretrain.checkpoint.saver.os = SimpleNamespace(**{**vars(system), "rename": rename})  # type: ignore[assignment, attr-defined]
    elif moment == "evaluation":
        evaluate = pretrain.tasks.score
        evaluate._forward = paused(evaluate._forward, 2, before=stop)


if __name__ == "__main__":
    arm(sys.argv[1], Path(sys.argv[2]))
    sys.argv = ["pretrain", *sys.argv[3:]]
    main()
