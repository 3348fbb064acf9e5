"""Writing checkpoints, beside the training that goes on.

The state is copied to host memory, and a thread of every rank brings its copy to disk. The ranks
meet in a process group of the threads' own; the first then writes the manifest and renames the
folder, so that a checkpoint is whole or not there, whatever dies meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.files import write_aside, write_synced
from pretrain.checkpoint import (
    LATEST,
    MANIFEST,
    MASTER,
    checkpoint_name,
    list_checkpoints,
    manifest,
    sealed,
    step_of,
)
from pretrain.engine import Engine
from pretrain.errors import RunError
from pretrain.grid import Grid
from pretrain.masters import Fragment, is_replicated
from pretrain.mirror import Mirror
from pretrain.run_config import CheckpointConfig
from pretrain.tensor_file import write_tensors

HELD_OUT_LOSS = "held_out_loss"
"""Key of a checkpoint's state: the loss by which the best one is kept."""
_AT_EXIT = 120.0
"""Seconds that a run which fails waits for a checkpoint under way."""


@dataclass(frozen=True)
class Piece:
    """What one rank owns, copied off the device."""

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
    """One line; empty: it is there."""
    note: str = ""
    """What went wrong beside it, such as at the mirror."""


@dataclass
class Saver:
    """Saves an engine's state into ``folder`` (``RUN/checkpoints``); made by all ranks together."""

    engine: Engine
    folder: Path
    settings: CheckpointConfig
    outcomes: list[Outcome] = field(default_factory=list)
    """Of writes that have ended, for whoever logs them (and takes them away)."""
    _last: Outcome | None = None
    _thread: threading.Thread | None = None
    _group: Any = None
    _buffers: dict[str, Tensor] = field(default_factory=dict)
    """Host memory of the last copy, taken again: fresh pages cost more than the copying."""

    def __post_init__(self) -> None:
        if self._grid.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        self._mirror = Mirror(self.settings.mirror) if self.settings.mirror else None

    @property
    def _grid(self) -> Grid:
        return self.engine.grid

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state after ``step`` updates and begin to write it; a collective call.

        Args:
            state: what else to remember (JSON), for example the data's identity.
        """
        self.wait()
        piece = snapshot(self.engine, self._buffers)
        described = _manifest(self.engine, step, state)
        self._thread = threading.Thread(
            target=self._write, args=(step, piece, described), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not self.settings.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            _schedule(self._thread.native_id, getattr(os, "SCHED_OTHER", None))
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            RunError: on every rank, if it could not be written; earlier ones are untouched.
        """
        self.wait()
        if self._last is not None and self._last.problem:
            raise RunError(
                f"{self._last.problem}; free space or fix {self.folder}, then start again: the run "
                "goes on from its last checkpoint"
            )

    def close(self) -> None:
        """Give a checkpoint under way a chance, where the run has failed already."""
        if self._thread is not None:
            self._thread.join(_AT_EXIT)

    # --- in the thread --------------------------------------------------------------------------

    def _write(self, step: int, piece: Piece | None, described: dict[str, Any]) -> None:
        began = time.monotonic()
        if self.settings.asynchronous:
            _give_way()
        aside = self.folder / f".{checkpoint_name(step)}.writing"
        note = ""
        try:
            entry, problem = _attempt(lambda: _write_piece(piece, aside))
            found = self._gather((entry, problem))
            problem = next((bad for _, bad in found if bad), "")
            if not problem and self._grid.is_main:
                described["files"] = dict(filter(None, (entry for entry, _ in found)))
                target, problem = _attempt(lambda: self._commit(aside, step, described))
                if target is not None and self._mirror is not None:
                    kept = [one.name for one in list_checkpoints(self.folder)]
                    _, note = _attempt(lambda: self._mirror.push(target, kept))
            problem = self._gather(problem)[0]
        except Exception as error:  # another rank is gone
            problem = f"the other ranks do not answer ({type(error).__name__})"
        if problem and self._grid.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        if problem:
            problem = f"checkpoint at step {step} not written: {problem}"
        self._last = Outcome(step, time.monotonic() - began, problem, note)
        self.outcomes.append(self._last)

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        found: list[Any] = [None] * self._grid.world_size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def _commit(self, aside: Path, step: int, described: dict[str, Any]) -> Path:
        target = self.folder / checkpoint_name(step)
        aside.mkdir(parents=True, exist_ok=True)
        write_synced(aside / MANIFEST, sealed(described))
        if target.exists():
            shutil.rmtree(target)
        os.rename(aside, target)
        _sync_folder(self.folder)
        write_aside(self.folder / LATEST, target.name.encode())
        for old in superseded(list_checkpoints(self.folder), self.settings):
            shutil.rmtree(old)
        return target


def _give_way() -> None:
    """Take only what the threads that train leave: Linux schedules each thread by itself."""
    _schedule(threading.get_native_id(), getattr(os, "SCHED_IDLE", None))


def _schedule(thread: int | None, policy: int | None) -> None:
    if thread is not None and policy is not None:
        with contextlib.suppress(OSError):  # not allowed here: as it was, then
            os.sched_setscheduler(thread, policy, os.sched_param(0))


def _attempt(action: Any) -> tuple[Any, str]:
    """(what it returns, "") or (None, one line on what went wrong)."""
    try:
        return action(), ""
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            return None, f"{error.filename or ''}: {error.strerror}".removeprefix(": ")
        return None, (str(error).strip().splitlines() or [type(error).__name__])[0]


def superseded(found: list[Path], settings: CheckpointConfig) -> list[Path]:
    """Checkpoints that the retention rules do not keep, of all whole ones, oldest first."""
    if not settings.keep:
        return []
    kept = set(found[-settings.keep :])
    if settings.keep_every:
        kept |= {one for one in found if step_of(one) % settings.keep_every == 0}
    if settings.keep_best:
        losses = [(loss, one) for one in found if (loss := _held_out_loss(one)) is not None]
        if losses:
            kept.add(min(losses)[1])
    return [one for one in found if one not in kept]


def _held_out_loss(path: Path) -> float | None:
    try:
        found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        loss: float | None = found["state"].get(HELD_OUT_LOSS)
        return loss
    except (OSError, ValueError, KeyError):
        return None


def snapshot(engine: Engine, buffers: dict[str, Tensor] | None = None) -> Piece | None:
    """A copy of what this rank writes, in host memory; None where another holds the same.

    Args:
        buffers: memory of an earlier copy, by name, which is overwritten, and added to.
    """
    grid = engine.grid
    if is_replicated(engine.deepspeed) and grid.data_rank > 0:
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
    return Piece(f"rank-{grid.rank:05d}.safetensors", grid.tensor_rank, tensors, index)


def _copied(value: Tensor, buffers: dict[str, Tensor], name: str) -> Tensor:
    """``value`` in host memory (on the way there, from a GPU), flat or not as it is."""
    buffer = buffers.get(name)
    if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
        pinned = value.device.type == "cuda"
        buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        buffers[name] = buffer
    return buffer.copy_(value, non_blocking=True)


def _writes(fragment: Fragment, grid: Grid) -> bool:
    """Whether this rank's copy is the one that is kept, where several ranks hold the same."""
    if getattr(fragment.parameter, "ds_pipe_replicated", False):
        return False
    return fragment.info.partition_dim is not None or grid.tensor_rank == 0


def _write_piece(piece: Piece | None, aside: Path) -> tuple[str, dict[str, Any]] | None:
    """Bring a piece to disk; returns (file name, its entry in the manifest)."""
    if piece is None:
        return None
    aside.mkdir(parents=True, exist_ok=True)
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
    return manifest(engine.config, engine.plan, step, state, shape)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
