"""Training that begins the next update early, as a GPU does, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pretrain.ranks.later
from pretrain.engine.engine import Engine
from pretrain.ranks.later import LateRanks


@contextmanager
def looking_ahead(does: bool = True) -> Iterator[list[int]]:
    """Engines that are made here look ahead, unless told not to; yields the steps that are
    measured later."""
    made, begin, steps = Engine.__post_init__, LateRanks.begin, list[int]()
    updates, pretrain.ranks.later._UPDATES = pretrain.ranks.later._UPDATES, 2

    def look(engine: Engine) -> None:
        made(engine)
        engine.looks_ahead |= does

    def noted(late: LateRanks, step: int, *given: Any) -> None:
        steps.append(step)
        begin(late, step, *given)

    Engine.__post_init__ = look  # type: ignore[assignment, method-assign]
    LateRanks.begin = noted  # type: ignore[assignment, method-assign]
    try:
        yield steps
    finally:
        pretrain.ranks.later._UPDATES = updates
        Engine.__post_init__ = made  # type: ignore[method-assign]
        LateRanks.begin = begin  # type: ignore[method-assign]
