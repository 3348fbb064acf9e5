"""The command line with a slow moment, so that a test can send a signal just there.

``signalled.py MOMENT MARKER WORDS...``: at the moment the marker appears, and for some seconds
nothing else happens; then all goes on. With ``--processes`` every rank has the moment.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launchers.supervise
from pretrain.__main__ import main

PAUSE = 2.0
MOMENTS = {
    # moment: (module, name, number of the call that is slow)
    "recipe": ("pretrain.config.recipe", "load_config", 1),
    "data": ("pretrain.training.start", "prepare", 1),
    "folder": ("pretrain.training.start", "create_run", 1),
    "engine": ("pretrain.training.start", "build_engine", 1),
    "first ranks": ("pretrain.training.periodic", "measure", 1),
    "first evaluation": ("pretrain.tasks.text", "score", 1),
    "first update": ("pretrain.engine.engine", "Engine.train_step", 1),
    "update": ("pretrain.engine.engine", "Engine.train_step", 4),
    "ranks": ("pretrain.training.periodic", "measure", 2),
    "evaluation": ("pretrain.tasks.score", "_forward", 2),
    "checkpoint": ("pretrain.checkpoint.saver", "_write_piece", 1),
    "last evaluation": ("pretrain.training.periodic", "finish", 1),
    "engine's end": ("pretrain.engine.engine", "Engine.close", 1),
}


def slow(function: Callable[..., Any], number: int, marker: Path) -> Callable[..., Any]:
    """``function``, which takes its time in its call of that number."""
    calls = 0

    def call(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            marker.touch()
            time.sleep(PAUSE)
        return function(*arguments, **more)

    return call


def arm(moment: str, marker: Path) -> None:
    """Make the moment slow."""
    module, name, number = MOMENTS[moment]
    owner: Any = importlib.import_module(module)
    *inner, last = name.split(".")
    for part in inner:
        owner = getattr(owner, part)
    setattr(owner, last, slow(getattr(owner, last), number, marker))


if __name__ == "__main__":
    moment, marker, *words = sys.argv[1:]
    if "--processes" in words and "RANK" not in os.environ:
        ranks = [sys.executable, __file__, moment, marker]
        launchers.supervise.program = lambda *_: ranks  # type: ignore[attr-defined]
    elif moment in MOMENTS:
        arm(moment, Path(marker))
    sys.argv = ["pretrain", *words]
    main()
