"""Signals in helper processes: the command that started them decides, not they.

Ctrl-C in a terminal, and a scheduler's SIGTERM or SIGUSR1, reach every process of a job. A helper
that died of them, or printed a traceback, would turn an orderly end into an error.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from data_pipeline.background import Background

_Result = TypeVar("_Result")
_TURN = 0.05
"""Seconds between two looks whether a signal came; the end of a wait is seen at once."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def signals_held_back(workers: bool = False) -> Iterator[None]:
    """Start processes that get no signal until they unblock them (`leave_signals_to_parent`).

    A signal to this process is delivered after the block, so the block should be short.

    Args:
        workers: whether they are workers of multiprocessing.
    """
    if workers:
        _start_tracker()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_tracker() -> None:
    """Start multiprocessing's tracker of resources before its first worker does.

    Starting it unblocks SIGTERM in this process, so that a fork server started next would get it.
    """
    from multiprocessing import resource_tracker

    with signals_held_back():
        resource_tracker.ensure_running()


def leave_signals_to_parent(seconds: float) -> None:
    """Ignore the signals that end a command, in a helper process that its parent ends.

    Args:
        seconds: how long this process lives on after a first SIGTERM. A second one, which the
            parent sends to a helper that hangs, ends it at once.
    """

    def end_later(*_: int | FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        timer = threading.Timer(seconds, os._exit, (1,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def hearing_signals(action: Callable[[], _Result], meanwhile: Callable[[], None]) -> _Result:
    """Do something that is long inside a library, and handle signals meanwhile.

    It runs in a thread of its own, because Python handles signals only in the main thread, and only
    while no compiled code runs there. After a signal, the thread goes on until the process ends.

    Args:
        meanwhile: is called several times a second.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = Background(work, "library")
    thread.start()
    while not thread.wait(_TURN):
        meanwhile()
    if errors:
        raise errors[0]
    return results[0]
