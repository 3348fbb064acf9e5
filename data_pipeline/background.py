"""Threads that the main thread can wait for although signals interrupt it.

A signal handler that raises may interrupt `threading.Thread.join`. Python 3.11 and 3.12 then take a
thread that still runs for one that has ended: the next `join` returns at once, and whatever the
thread was writing is lost when the process ends.
"""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable

_TURN = 0.5
"""Seconds between two looks at a running thread; its end wakes a waiting one at once."""
_BEGIN = 1.0
"""Seconds in which a thread begins, if a signal interrupted its start."""


class Background:
    """A daemon thread that calls a function once.

    It is not a `threading.Thread`, whose own locks stay taken if a signal comes at a bad moment.

    Args:
        action: the function. It handles its own errors.
        name: of the thread, for people who look at its stack.
    """

    def __init__(self, action: Callable[[], None], name: str) -> None:
        self._action, self._name = action, name
        self.native_id: int | None = None
        """The operating system's number of the thread; None before it begins."""
        self._asked = self._surely = self._begun = self._ended = False
        self._running = _thread.allocate_lock()

    def start(self) -> None:
        """Start the thread; a signal leaves either one that runs or one that never will."""
        self._asked = True
        _thread.start_new_thread(self._work, ())
        self._surely = True

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the function has returned, or some seconds have passed.

        Returns:
            Whether nothing runs any more. This is also true if the thread was never started.
        """
        if not self._asked:
            return True
        until = None if seconds is None else time.monotonic() + seconds
        if not self._surely and not self._begins():
            return True
        while not self._ended:
            left = _TURN if until is None else min(_TURN, until - time.monotonic())
            if left <= 0:
                return False
            if not self._begun:
                time.sleep(min(left, 0.001))
            elif self._running.acquire(timeout=left):
                self._running.release()
        return True

    def _begins(self) -> bool:
        """Whether the thread begins; it may not, if a signal interrupted `start`."""
        until = time.monotonic() + _BEGIN
        while not self._begun and time.monotonic() < until:
            time.sleep(0.001)
        return self._begun

    def _work(self) -> None:
        with self._running:
            self.native_id, self._begun = threading.get_native_id(), True
            try:
                threading.current_thread().name = self._name
                self._action()
            finally:
                self._ended = True
