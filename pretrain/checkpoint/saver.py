"""Writes checkpoints while training continues.

The state is copied to host memory, and a thread of every process writes its copy to disk. The
threads wait for each other in their own process group. Process rank 0 then writes the manifest and
renames the folder, so that a checkpoint is complete or absent, whatever fails meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.background import Background
from data_pipeline.disk import hide, remove, remove_hidden, sync_folder
from data_pipeline.files import write_aside, write_synced
from pretrain.checkpoint.manifest import (
    MANIFEST,
    MASTER,
    describe,
    piece_name,
    written_manifest,
)
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.pusher import Pusher
from pretrain.checkpoint.reader import LATEST, checkpoint_name, list_checkpoints, run_id_of, step_of
from pretrain.checkpoint.retention import superseded
from pretrain.checkpoint.tensor_file import write_tensors
from pretrain.config.run import CheckpointConfig
from pretrain.distributed.grid import Grid
from pretrain.distributed.main_process import MainProcess
from pretrain.engine.engine import Engine
from pretrain.engine.masters import Fragment, is_tied_copy
from pretrain.errors import RunError, attempt

_AT_EXIT = 120.0
"""Seconds that a failing run waits for a checkpoint that is being written."""


@dataclass(frozen=True)
class CheckpointPiece:
    """The state that one process owns, copied from the device."""

    name: str
    """File name."""
    tensor_rank: int
    tensors: dict[str, Tensor]
    index: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How the writing of a checkpoint ended."""

    step: int
    seconds: float
    problem: str = ""
    """One line; empty if the checkpoint was written."""
    note: str = ""
    """Other problems, such as at the mirror."""


@dataclass
class Saver:
    """Saves an engine's state to ``folder`` (``RUN/checkpoints``); all processes make one
    together."""

    engine: Engine
    folder: Path
    settings: CheckpointConfig
    outcomes: list[Outcome] = field(default_factory=list)
    """Results of finished writes; the code that logs them removes them."""
    urgent: bool = False
    """Whether the job waits for the next one: its thread then runs at normal priority."""
    _last: Outcome | None = None
    _thread: Background | None = None
    _pusher: Pusher | None = None
    _buffers: dict[str, Tensor] = field(default_factory=dict)
    """Host memory of the last copy, used again: new pages cost more than the copying."""

    def __post_init__(self) -> None:
        self._main = MainProcess(self._grid)
        if self.settings.mirror:
            mirror = Mirror(self.settings.mirror, self.folder.parent)
            self._pusher = Pusher(mirror, self.settings, self._tell_copied, self._grid)

    @property
    def _grid(self) -> Grid:
        return self.engine.grid

    def save(
        self,
        step: int,
        state: dict[str, Any],
        beside: Callable[[], None] | None = None,
        refused: str = "",
    ) -> None:
        """Copy the state after ``step`` updates and start to write it; a collective call.

        Args:
            state: further state to save (JSON), for example the data's identity.
            beside: a function that the main process's thread calls first; its failure does not
                stop a checkpoint.
            refused: why there must not be a checkpoint of this step, on the main process; it is
                reported like a disk's refusal.
        """
        self.wait()
        piece = snapshot(self.engine, self._buffers)
        described = _manifest(self.engine, step, state)
        self._thread = Background(
            lambda: self._write(step, piece, described, beside, refused), "checkpoint"
        )
        self._thread.start()
        if not self.settings.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            _schedule(self._thread.native_id, getattr(os, "SCHED_OTHER", None))
            self._thread.wait()
            self._thread = None

    @property
    def refused(self) -> str:
        """Why the last checkpoint could not be written, on every process alike; else nothing."""
        return self._last.problem if self._last else ""

    def finish(self) -> None:
        """Wait for the last checkpoint, and for its copy at the mirror, on every process.

        Raises:
            RunError: on every process, if it could not be written; earlier ones are untouched.
        """
        self.wait()
        if (
            self.settings.mirror
        ):  # a launcher kills a job if some processes end much later than others
            self._thread = Background(self._drain, "checkpoint")
            self._thread.start()
            self.wait()
        if self.refused:
            raise RunError(
                f"{self.refused}; free space or mend that, then rerun the same command: the "
                "run continues from its last checkpoint"
            )

    def close(self) -> None:
        """Wait a limited time for a checkpoint and its copy after the run has failed."""
        until = time.monotonic() + _AT_EXIT
        if self._pusher is not None:
            self._pusher.hurry()  # its thread may be what the other one waits for
        if self._thread is not None:
            self._thread.wait(_AT_EXIT)
        if self._pusher is not None:
            self._pusher.wait_alone(max(0.0, until - time.monotonic()))

    # --- in the thread --------------------------------------------------------------------------

    def _write(
        self,
        step: int,
        piece: CheckpointPiece | None,
        described: dict[str, Any],
        beside: Callable[[], None] | None,
        refused: str,
    ) -> None:
        began = time.monotonic()
        if self.settings.asynchronous and not self.urgent:
            _give_way()  # permanent, because a user may not be allowed to raise the priority again
        aside = self.folder / f".{checkpoint_name(step)}.writing"
        notes: list[str] = []
        if beside is not None and self._grid.is_main:
            _, problem = attempt(beside)
            notes += [f"ranks.parquet waits: {problem}"] if problem else []
        try:
            entry, target, problem = None, None, refused
            if not refused:
                entry, problem = attempt(lambda: _write_piece(piece, aside))
            results = self._main.gather((entry, problem))
            problem = next((reason for _, reason in results if reason), "")
            if not problem and self._grid.is_main:
                described["files"] = dict(filter(None, (entry for entry, _ in results)))
                target, problem = attempt(lambda: self._commit(aside, step, described))
                if target is not None:
                    notes += self._follow_up(target, step)
            problem, target = self._main.tell((problem, target))
            if target is not None and self._pusher is not None:
                files = described["files"] if self._grid.is_main else dict(filter(None, [entry]))
                self._pusher.add(target, {name: one["sha256"] for name, one in files.items()})
        except Exception as error:  # another rank is gone
            problem = f"the other processes do not answer ({type(error).__name__})"
        if problem and self._grid.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        if problem:
            problem = f"checkpoint at step {step} not written: {problem}"
        self._last = Outcome(step, time.monotonic() - began, problem, "; ".join(notes))
        self.outcomes.append(self._last)

    def _drain(self) -> None:
        if self._pusher is not None:
            self._pusher.wait()
        with contextlib.suppress(Exception):  # another rank is gone
            self._main.tell(self._main.gather(None))

    def _tell_copied(self, target: Path, seconds: float, problem: str) -> None:
        """Report a copy; called in the mirror's thread."""
        if problem:
            self.outcomes.append(Outcome(step_of(target), seconds, "", problem))

    def _commit(self, aside: Path, step: int, described: dict[str, Any]) -> Path:
        """Turn the written files into a checkpoint; it exists from the rename on."""
        _make_own(aside)
        described["run"] = run_id_of(self.folder.parent)
        write_synced(aside / MANIFEST, written_manifest(described))
        target = _free_name(self.folder, step)
        replaced = hide(target) if target.exists() else None
        os.rename(aside, target)
        sync_folder(self.folder)
        if replaced is not None:
            remove(replaced)
        return target

    def _follow_up(self, target: Path, step: int) -> list[str]:
        """Do the work after a checkpoint exists; its failures do not undo the checkpoint.

        Returns:
            One line for each failure.
        """
        notes: list[str] = []
        if target.name != checkpoint_name(step):
            notes.append(
                f"{checkpoint_name(step)} exists but is not a checkpoint of this run: left alone; "
                f"this one is named {target.name}"
            )
        _, problem = attempt(lambda: write_aside(self.folder / LATEST, target.name.encode()))
        notes.append(problem)
        _, problem = attempt(self._retain)
        notes.append(problem and f"older checkpoints not deleted: {problem}")
        return [note for note in notes if note]

    def _retain(self) -> None:
        remove_hidden(self.folder)
        for old in superseded(list_checkpoints(self.folder), self.settings):
            with self._pusher.lock if self._pusher is not None else contextlib.nullcontext():
                if self._pusher is not None and old == self._pusher.current:
                    continue  # tried again after the next checkpoint
                hidden = hide(old)
            remove(hidden)


def _make_own(folder: Path) -> None:
    """Make a folder for this program's files; a link in its place is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        raise RunError(f"{folder}: is a link; remove it")


def _free_name(folder: Path, step: int) -> Path:
    """The path for the checkpoint of a step; it replaces the run's own checkpoint of that step.

    Anything else with that name is left alone: one more zero gives a name that is still recognised.
    """
    checkpoints = list_checkpoints(folder)
    digits = 8
    while True:
        path = folder / f"step-{step:0{digits}d}"
        if path in checkpoints or not os.path.lexists(path):
            return path
        digits += 1


def _give_way() -> None:
    """Use only the processor time that training leaves; Linux schedules each thread separately."""
    _schedule(threading.get_native_id(), getattr(os, "SCHED_IDLE", None))


def _schedule(thread: int | None, policy: int | None) -> None:
    if thread is not None and policy is not None:
        with contextlib.suppress(OSError):  # not allowed: keep the old priority
            os.sched_setscheduler(thread, policy, os.sched_param(0))


def snapshot(engine: Engine, buffers: dict[str, Tensor] | None = None) -> CheckpointPiece | None:
    """A copy in host memory of what this process writes; None if another process writes the same.

    Args:
        buffers: memory of an earlier copy, by name, which is overwritten and extended.
    """
    grid = engine.grid
    if engine.is_replicated and grid.data_rank > 0:
        return None
    buffers = {} if buffers is None else buffers
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    index: dict[str, Any] = {}
    for fragment in engine.fragments():
        if not _writes(fragment, grid):
            continue
        values = {MASTER: fragment.master, **fragment.moments()}
        for key, value in values.items():
            name = f"{fragment.info.name}/{key}"
            tensors[name] = _copied(value.detach(), buffers, name)
        index[fragment.info.name] = [fragment.offset, fragment.master.numel(), sorted(values)]
    if grid.device.type == "cuda":
        torch.cuda.synchronize(grid.device)
    return CheckpointPiece(piece_name(grid.rank), grid.tensor_rank, tensors, index)


def _copied(value: Tensor, buffers: dict[str, Tensor], name: str) -> Tensor:
    """``value`` in host memory (from a GPU, still being copied), in its own shape."""
    buffer = buffers.get(name)
    if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
        pinned = value.device.type == "cuda"
        buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        buffers[name] = buffer
    return buffer.copy_(value, non_blocking=True)


def _writes(fragment: Fragment, grid: Grid) -> bool:
    """Whether this process's copy is the one that is written, if several hold the same."""
    if is_tied_copy(fragment.parameter):
        return False
    return fragment.info.partition_dim is not None or grid.tensor_rank == 0


def _write_piece(piece: CheckpointPiece | None, aside: Path) -> tuple[str, dict[str, Any]] | None:
    """Write a piece to disk, and return (file name, its entry in the manifest)."""
    if piece is None:
        return None
    _make_own(aside)
    path = aside / piece.name
    size, digest = write_tensors(path, piece.tensors)
    return piece.name, {
        "size": size,
        "sha256": digest,
        "tensor_rank": piece.tensor_rank,
        "fragments": piece.index,
    }


def _manifest(engine: Engine, step: int, state: dict[str, Any]) -> dict[str, Any]:
    grid = engine.grid
    shape = {
        "tensor": grid.tensor,
        "pipeline": grid.pipeline,
        "data": grid.data,
        "zero_stage": engine.config.grid.zero_stage,
    }
    return describe(engine.config, engine.plan, step, state, shape)
