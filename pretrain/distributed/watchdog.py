"""Ends a job that hangs, with every process's stack on disk and a summary of who waits where.

A thread of every process watches the main thread's progress and tells the others, through the
launcher's store, that its process is alive. If no step was finished for too long, the living
processes write their stacks; the first of them reports which process waits where, and which gives
no sign of life. While bytes of any process's checkpoint move to a disk or a mirror, waiting does
not count as a hang.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.disk import moved
from pretrain.distributed.grid import Grid
from pretrain.distributed.meeting import open_board
from pretrain.errors import TRY_AGAIN

STACKS = "stacks"
"""Folder in a run folder: one file per process, and summary.txt."""
_STORE_TIMEOUT = timedelta(seconds=5)


class Watchdog:
    """Ends the process if nothing was finished for ``limit`` seconds (0: never).

    Args:
        clock: seconds by which waiting is measured.
    """

    def __init__(
        self, grid: Grid, run: Path, limit: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._grid, self._folder, self._limit = grid, run / STACKS, limit
        self._turn = max(0.05, min(limit / 8, 5.0))
        self._beat = (clock(), 0, "start")
        self._done = threading.Event()
        self._main = threading.get_ident()
        self._store: Any = None
        self._count = 0
        self._traffic: tuple[float, list[Any]] = (0.0, [])
        """When bytes of checkpoints last moved, and how many had moved, by process rank."""
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._limit:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(_STORE_TIMEOUT.total_seconds())

    def beat(self, step: int, phase: str = "training") -> None:
        """Report that something was finished; cheap enough for every batch."""
        self._beat = (self._clock(), step, phase)

    # --- in the thread --------------------------------------------------------------------------

    def _watch(self) -> None:
        self._store = open_board(self._grid.world_size, _STORE_TIMEOUT)
        self._tell({})
        while not self._done.wait(self._turn):
            self._tell({})
            if self._hangs():
                self._end()

    def _hangs(self) -> bool:
        """Whether nothing was finished, and no checkpoint moved on any process, for too long."""
        beat, now = self._beat[0], self._clock()
        if now - beat <= self._limit / 2:
            self._traffic = (beat, [])
            return False
        counts = [moved(), *(message and message["moved"] for message in self._read_all())]
        moved_at, earlier = self._traffic  # the first count is only compared with later ones
        if any(
            None not in (old, new) and old != new for old, new in zip(earlier, counts, strict=False)
        ):
            moved_at = now
        self._traffic = (moved_at, counts)
        return now - max(beat, moved_at) > self._limit

    def _tell(self, extra: dict[str, Any]) -> None:
        _, step, phase = self._beat
        self._count += 1
        message = {"count": self._count, "step": step, "phase": phase, "moved": moved(),
                   "pid": os.getpid(), "host": socket.gethostname(), **extra}  # fmt: skip
        self._try_store(lambda: self._store.set(str(self._grid.rank), json.dumps(message)))

    def _try_store(self, action: Callable[[], Any]) -> Any:
        """The store's answer; None after it has failed to answer.

        The call runs in a separate thread: if a cable is unplugged, it may never return, whatever
        its timeout, and the watchdog's own thread must be able to end the process.
        """
        if self._store is None:
            return None
        answers: list[Any] = []

        def ask() -> None:
            with contextlib.suppress(Exception):  # the launcher or the network is lost
                answers.append(action())

        asking = threading.Thread(target=ask, name="watchdog-store", daemon=True)
        asking.start()
        asking.join(min(_STORE_TIMEOUT.total_seconds() + 1.0, max(1.0, self._limit / 8)))
        if not answers:
            self._store = None  # local information can still be reported
            return None
        return answers[0]

    def _get(self, rank: int) -> Any:
        return self._store.get(str(rank))

    def _read_all(self) -> list[dict[str, Any] | None]:
        """The last message of each process."""
        messages: list[dict[str, Any] | None] = []
        for rank in range(self._grid.world_size):
            text = self._try_store(partial(self._get, rank))
            messages.append(json.loads(text) if text else None)
        return messages

    def _end(self) -> None:
        where = _where(self._main)
        limited = threading.Thread(target=self._write_stacks, args=(where,), daemon=True)
        limited.start()
        limited.join(5.0)  # a hanging disk may be the reason for this
        before = self._read_all()
        for _ in range(3):
            time.sleep(self._turn)
            self._tell({"where": where})
        lines = self._summary(before, self._read_all(), where)
        if lines:
            print("\n".join(lines), file=sys.stderr, flush=True)
            writer = threading.Thread(target=self._write_summary, args=(lines,), daemon=True)
            writer.start()
            writer.join(5.0)
        os._exit(TRY_AGAIN)

    def _summary(
        self,
        before: list[dict[str, Any] | None],
        after: list[dict[str, Any] | None],
        where: str,
    ) -> list[str]:
        """The report of the first living process; empty on the others."""
        own_rank, step = self._grid.rank, self._beat[1]
        head = f"error: nothing was finished for {self._limit:g} s (step {step}, {self._beat[2]})"
        advice = (
            f"stacks are in {self._folder}; rerun the same command to continue from the checkpoint"
        )
        if after[own_rank] is None and self._grid.world_size > 1:
            why = "the launcher's store does not answer: its machine or the network was lost"
            return [f"{head}; process rank {own_rank} waits {where}; {why}; {advice}"]
        living: list[int] = []
        silent: list[int] = []
        for rank, (old, new) in enumerate(zip(before, after, strict=True)):
            alive = rank == own_rank or (
                new is not None and (old is None or new["count"] > old["count"])
            )
            (living if alive else silent).append(rank)
        if own_rank != living[0]:
            return []
        lines = [f"{head}; {advice}"]
        for rank in living:
            message = after[rank] or {}
            remote = message.get("where", "no process: it is still working")
            place = where if rank == own_rank else remote
            lines.append(f"process rank {rank} (step {message.get('step', step)}): waits {place}")
        for rank in silent:
            message = after[rank] or {}
            process = f"{message.get('host', 'unknown host')}, pid {message.get('pid', 'unknown')}"
            lines.append(
                f"process rank {rank} (step {message.get('step', '?')}; {process}): gives no sign "
                "of life; the others wait for it"
            )
        return lines

    def _write_stacks(self, where: str) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"rank-{self._grid.rank:05d}.txt"
            with path.open("w", encoding="utf-8") as file:
                host = socket.gethostname()
                file.write(
                    f"process rank {self._grid.rank}, pid {os.getpid()} on {host}, waits {where}\n"
                )
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"warning: stacks not written ({error})", file=sys.stderr, flush=True)

    def _write_summary(self, lines: list[str]) -> None:
        try:
            (self._folder / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError:
            return


def _where(thread: int) -> str:
    """The innermost function of a thread, and the line of this program that called it."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "nowhere"
    stack = traceback.extract_stack(frame)
    root = Path(__file__).resolve().parent.parent
    ours = [call for call in stack if Path(call.filename).is_relative_to(root)]
    place = ours[-1] if ours else stack[-1]
    waiting = next(
        (call.name for call in stack if "distributed_c10d" in call.filename and call.name[0] != "_"
         and call.name != "wrapper"), stack[-1].name,
    )  # fmt: skip
    name = Path(place.filename).name
    return f"in {waiting}, called from {name}:{place.lineno} ({place.name})"
