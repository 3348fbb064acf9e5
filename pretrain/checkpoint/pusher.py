"""Copies checkpoints to a mirror beside training; each process copies the file that it wrote."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from data_pipeline.background import Background
from pretrain.checkpoint.manifest import piece_name
from pretrain.checkpoint.mirror import Mirror
from pretrain.config.run import CheckpointConfig
from pretrain.distributed.main_process import MainProcess
from pretrain.errors import attempt


class Pusher:
    """Copies checkpoints one after another, in a thread of each process.

    The main process writes the manifest when all files are there, so that a copy is complete or
    absent.
    """

    def __init__(
        self,
        mirror: Mirror,
        settings: CheckpointConfig,
        tell: Callable[[Path, float, str], None],
        main: MainProcess,
    ) -> None:
        """
        Args:
            tell: called on the main process after each copy with the checkpoint, seconds, and what
                went wrong.
            main: exchange that nobody else uses.
        """
        self._mirror, self._settings, self._tell = mirror, settings, tell
        self._main, self._grid = main, main.grid
        self._of_ranks = {piece_name(rank) for rank in range(main.grid.world_size)}
        self._waiting: list[Path] = []
        self._thread: Background | None = None
        self.lock = threading.Lock()
        """Lock for changing what is copied, or deleting a checkpoint."""
        self.current: Path | None = None
        """The checkpoint that is being copied, which must not be deleted."""

    def add(self, folder: Path) -> None:
        """Queue a checkpoint for copying; every process does so, in the same order."""
        with self.lock:
            self._waiting.append(folder)
            if self._thread is None:
                self._thread = Background(self._work, "mirror")
                self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until all is copied, or some seconds have passed."""
        thread = self._thread
        if thread is not None:
            thread.wait(seconds)

    # --- in the thread --------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self.lock:
                if not self._waiting:
                    self.current, self._thread = None, None
                    return
                self.current = self._waiting.pop(0)
                # One that was superseded while it waited may be deleted; this is not an error.
                there = self.current.is_dir()
            began = time.monotonic()
            try:
                told, problem = self._push(self.current, there)
            except Exception as error:
                told, problem = self._grid.is_main, f"the other processes do not answer ({error})"
            if told:
                self._tell(self.current, time.monotonic() - began, problem)

    def _push(self, folder: Path, there: bool) -> tuple[bool, str]:
        """Copy a checkpoint together with the other processes.

        Args:
            there: whether it exists; the main process's answer counts.

        Returns:
            Whether to tell of it, and what went wrong.
        """
        problem = ""
        if there and self._grid.is_main:
            _, problem = attempt(lambda: self._mirror.prepare(folder))
        there, problem = self._main.tell((there, problem))
        if not there:
            return False, ""
        if not problem:
            _, problem = attempt(lambda: self._mirror.copy(folder, self._is_mine))
        problem = next(filter(None, self._main.gather(problem)), "")
        if self._grid.is_main and not problem:
            _, problem = attempt(lambda: self._mirror.complete(folder, self._settings))
        return self._grid.is_main, problem

    def _is_mine(self, name: str) -> bool:
        """Whether this process copies a file: its own and, on the main one, those of nobody."""
        if name == piece_name(self._grid.rank):
            return True
        return self._grid.is_main and name not in self._of_ranks
