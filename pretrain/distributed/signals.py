"""Handles signals to this process, from its start to its end.

SIGTERM, SIGUSR1 (a scheduler's warning) and SIGINT raise `Stopped` in the main thread, so that
every command can end at any moment with the exit code that launchers read. While updates run, the
first two are only recorded: the loop then writes a checkpoint and ends by itself. Signals after the
first one change nothing, so that they do not interrupt a checkpoint that is being written.

Compiled libraries may call Python code in which `Stopped` is raised, and drop it (destructors) or
raise an error of their own instead (pydantic's serializers, modules that are being imported). So
the error that ends a command after `Stopped` was `raised` is reported as the signal, and if the
command goes on, the signal is sent again. While a library is imported, a signal waits.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from pretrain.errors import INTERRUPTED, TRY_AGAIN, RunError, Stopped

if TYPE_CHECKING:
    from pretrain.distributed.grid import Grid

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_AGAIN = 10.0
"""Seconds after which a signal counts again: a library may have swallowed the first one."""
_LATER = 0.02
"""Seconds between two looks whether anybody handles `Stopped`."""
_COMPUTED, _WAITED = 0.05, 1.0
"""CPU seconds of this process, and seconds, after which nobody will handle it: it was swallowed."""
_IMPATIENT = 1.0
"""Seconds after which a second Ctrl-C ends the process at once."""

Answer = Callable[[signal.Signals], None]


class StopRequestedError(RunError):
    """The run stopped because it was asked to; rerunning the same command continues it."""


class StopSignals:
    """The signal that arrived, and how the process reacts to signals now."""

    def __init__(self) -> None:
        self._asked: signal.Signals | None = None
        self._at = 0.0
        self._answer: Answer | None = None
        self._remembers = False
        self._before: dict[signal.Signals, Any] = {}
        self._hook: Any = None
        self._raised = False
        self._dropped = False
        self._turn = 0
        """Changes when nobody needs to look after `Stopped` any more."""

    # --- for the process --------------------------------------------------------------------------

    def listen(self) -> None:
        """Install the handlers; does nothing outside the main thread or a second time."""
        if self._before:
            return
        self._asked, self._raised = None, False
        try:
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread: the caller decides about signals
            self._before.clear()
            return
        if sys.unraisablehook != self._swallowed:  # a fork has its parent's
            self._hook, sys.unraisablehook = sys.unraisablehook, self._swallowed
        self._hook = self._hook or sys.__unraisablehook__
        # A launcher holds signals back until this process can handle them: one may come now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def restore(self) -> None:
        """Restore the previous handlers."""
        self._turn += 1
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            sys.unraisablehook = self._hook
        self._before.clear()

    def ignore(self) -> None:
        """Ignore all signals from now on, because the process is about to end."""
        self._turn += 1
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    @property
    def code(self) -> int:
        """Exit code of a process that ends because of the signal."""
        return TRY_AGAIN if self.asked and self._asked != signal.SIGINT else INTERRUPTED

    @property
    def raised(self) -> bool:
        """Whether `Stopped` was raised, which may have become another error on its way."""
        return self._raised

    # --- for what runs in it ----------------------------------------------------------------------

    def handed_to(self, answer: Answer) -> AbstractContextManager[None]:
        """During a block, every signal calls ``answer`` instead of raising `Stopped`."""
        return self._while(answer)

    def remembered(self) -> AbstractContextManager[None]:
        """During a block that checks `agreed` by itself, only Ctrl-C raises."""
        return self._while(None)

    @contextmanager
    def _while(self, answer: Answer | None) -> Iterator[None]:
        ours = not self._before
        if ours:
            self.listen()
        previous = self._answer, self._remembers
        self._answer, self._remembers = answer, answer is None
        try:
            yield
        finally:
            self._answer, self._remembers = previous
            if ours:
                self.restore()

    @property
    def asked(self) -> bool:
        """Whether this process received a signal."""
        return self._asked is not None

    @property
    def name(self) -> str:
        """The name of the signal, or a general term if another process received it."""
        return self._asked.name if self._asked else "a signal"

    def agreed(self, grid: Grid) -> bool:
        """Whether any process was asked to stop; a collective call."""
        return self.agreed_with(grid, False)[0]

    def agreed_with(self, grid: Grid, other: bool) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether something else holds for any; one
        collective call."""
        if grid.world_size == 1:
            return self.asked, other
        import torch
        import torch.distributed as dist

        flags = torch.tensor([self.asked, other], dtype=torch.int64, device=grid.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        asked, any_other = flags.tolist()
        return bool(asked), bool(any_other)

    def _swallowed(self, unraisable: Any) -> None:
        """A destructor ran when a signal came: Python drops its exceptions.

        Objects whose making a signal cut may fail when they are destroyed; that is not shown.
        """
        if isinstance(unraisable.exc_value, Stopped):
            self._dropped = True
        elif not self._raised:
            self._hook(unraisable)

    def _stop(self, came: signal.Signals) -> NoReturn:
        self._raised, self._dropped = True, False
        self._turn += 1
        # Not a Thread: the signal may have come while a lock of `threading` was held.
        _thread.start_new_thread(self._look_after, (came, self._turn))
        raise Stopped(came.name)

    def _look_after(self, came: signal.Signals, turn: int) -> None:
        """Send a signal again whose exception was swallowed."""
        main = threading.main_thread().ident
        began, computed = time.monotonic(), time.process_time()
        while not self._dropped:
            time.sleep(_LATER)
            if self._turn != turn:
                return
            if _handles_an_exception(main):
                began, computed = time.monotonic(), time.process_time()
            elif time.monotonic() - began > _WAITED or time.process_time() - computed > _COMPUTED:
                break
        time.sleep(_LATER)
        if self._turn == turn:
            self._asked, self._raised = None, False
            os.kill(os.getpid(), came)

    def _wait_for_import(self, came: signal.Signals) -> None:
        """Send a signal again in a moment, as if it had not come yet."""
        self._asked = None

        def send_again() -> None:
            time.sleep(_LATER)
            os.kill(os.getpid(), came)

        _thread.start_new_thread(send_again, ())

    def _note(self, number: int, frame: FrameType | None) -> None:
        received, now = signal.Signals(number), time.monotonic()
        repeated = self._asked is not None and now - self._at < _AGAIN
        interrupted = self._asked == received == signal.SIGINT
        late = now - self._at > _IMPATIENT
        if self._asked is None:
            self._asked, self._at = received, now
        if self._answer is not None:
            self._answer(received)
        elif repeated and interrupted and late:
            os._exit(INTERRUPTED)
        elif self._remembers and (interrupted or received != signal.SIGINT):
            return
        elif self._remembers or not repeated:
            if _imports_a_library(frame):
                self._wait_for_import(received)
            else:
                self._stop(received)


def _imports_a_library(frame: FrameType | None) -> bool:
    """Whether the interrupted code belongs to the import of an installed package.

    Compiled parts of PyTorch call Python while they are imported; an exception there aborts the
    process.
    """
    while frame is not None:
        code, caller = frame.f_code, frame.f_back
        # `python -m` runs a module, too, but not by an import.
        imported = caller is not None and "importlib" in caller.f_code.co_filename
        if imported and code.co_name == "<module>" and "site-packages" in code.co_filename:
            return True
        frame = caller
    return False


def _handles_an_exception(thread: int | None) -> bool:
    """Whether a thread is in an ``except`` or ``finally`` because of an exception."""
    active = sys._current_exceptions().get(thread or 0)
    return active is not None and active != (None, None, None)


SIGNALS = StopSignals()
"""Of this process."""
