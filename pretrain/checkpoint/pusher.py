"""Copies checkpoints to a mirror beside training; each process copies the file that it wrote.

The processes do not talk to each other: one that is lost must not keep the others' copies from
being completed. A process marks each file that it has copied. The main process writes the manifest
when all files have their marks, and copies those itself for which it has waited long enough.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from data_pipeline.background import Background
from pretrain.checkpoint.manifest import piece_name
from pretrain.checkpoint.mirror import Mirror
from pretrain.config.run import CheckpointConfig
from pretrain.distributed.grid import Grid
from pretrain.distributed.signals import SIGNALS
from pretrain.errors import first_line

_LOOK = 1.0
"""Seconds between two looks at what the other processes have copied."""
_ASKED_TO_END = 5.0
"""Seconds of patience after a signal."""


class Pusher:
    """Copies checkpoints one after another, in a thread of each process."""

    def __init__(
        self,
        mirror: Mirror,
        settings: CheckpointConfig,
        tell: Callable[[Path, float, str], None],
        grid: Grid,
        patience: float = 10.0,
    ) -> None:
        """
        Args:
            tell: called on the main process after each copy with the checkpoint, seconds, and what
                went wrong.
            patience: seconds for which the main process waits for the next file of another one, at
                least; it also waits three times as long as it took for its own file.
        """
        self._mirror, self._settings, self._tell = mirror, settings, tell
        self._grid, self._patience = grid, patience
        self._waiting: list[tuple[Path, dict[str, str]]] = []
        self._thread: Background | None = None
        self._hurry = threading.Event()
        self._given_up: set[str] = set()
        """Files of other processes that did not come the last time."""
        self.lock = threading.Lock()
        """Lock for changing what is copied, or deleting a checkpoint."""
        self.current: Path | None = None
        """The checkpoint that is being copied, which must not be deleted."""

    def add(self, folder: Path, digests: dict[str, str]) -> None:
        """Queue a checkpoint for copying; every process does so.

        Args:
            digests: the sha256 of the files that this process wrote; on the main process, of all.
        """
        with self.lock:
            self._waiting.append((folder, digests))
            if self._thread is None:
                self._thread = Background(self._work, "mirror")
                self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until all is copied, or some seconds have passed."""
        thread = self._thread
        if thread is not None:
            thread.wait(seconds)

    def hurry(self) -> None:
        """Wait no longer for files of other processes: the run has failed, and they may never
        come."""
        self._hurry.set()

    def wait_alone(self, seconds: float) -> None:
        """Wait some seconds after the run has failed; only the main process has something to
        complete."""
        self.hurry()
        if self._grid.is_main:
            self.wait(seconds)

    # --- in the thread --------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self.lock:
                # One that was superseded while it waited may be deleted; this is not an error.
                self._waiting = [one for one in self._waiting if one[0].is_dir()]
                if not self._waiting:
                    self.current, self._thread = None, None
                    return
                self.current, digests = self._waiting.pop(0)
            began, problem = time.monotonic(), ""
            try:
                problem = self._push(self.current, digests)
            except Exception as error:
                problem = first_line(error)
            except BaseException as error:  # libraries of object stores cancel their tasks so
                problem = f"{self.current.name} not copied ({type(error).__name__})"
            if self._grid.is_main:
                self._tell(self.current, time.monotonic() - began, problem)

    def _push(self, folder: Path, digests: dict[str, str]) -> str:
        """Copy the own file; on the main process, also complete the copy.

        Returns:
            What a user should know, or nothing.
        """
        began, own = time.monotonic(), piece_name(self._grid.rank)
        mine = {name: digest for name, digest in digests.items() if name == own}
        self._mirror.deliver(folder, mine)
        if not self._grid.is_main:
            return ""
        others = {name: digest for name, digest in digests.items() if name != own}
        if self._grid.world_size > 1:
            others = self._missing(folder, others, 3 * (time.monotonic() - began))
        self._mirror.deliver(folder, others)
        self._mirror.complete(folder, self._settings)
        if not others or self._grid.world_size == 1 or self._hurry.is_set():
            return ""
        return (
            f"{self._mirror.url}: {folder.name}: rank 0 copied {len(others)} file(s) that other "
            "processes did not copy"
        )

    def _missing(self, folder: Path, digests: dict[str, str], seconds: float) -> dict[str, str]:
        """The files that other processes have not copied, after waiting for them."""
        patience, moved = max(seconds, self._patience), time.monotonic()
        missing = self._mirror.unmarked(folder, digests)
        while set(missing) - self._given_up:
            # A launcher that asks for the end, perhaps because a process died, soon kills.
            longest = min(patience, _ASKED_TO_END) if SIGNALS.asked else patience
            if time.monotonic() > moved + longest or self._hurry.wait(_LOOK):
                break
            left = self._mirror.unmarked(folder, digests)
            if len(left) < len(missing):
                moved = time.monotonic()
            missing = left
        self._given_up = set(missing)
        return missing
