"""Traces of some updates: what the processor and the GPU do in them, operation by operation."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from data_pipeline.files import replacing
from pretrain.config.run import ProfileConfig
from pretrain.distributed.grid import Grid

PROFILE = "profile"


class Profiler:
    """Traces the updates of a window with `torch.profiler`; outside it, an update costs nothing."""

    def __init__(self, config: ProfileConfig, run: Path, grid: Grid) -> None:
        """
        Args:
            run: the run folder; ``profile/rank-N.json.gz`` in it gets the trace of process rank N.
        """
        traces = grid.is_main or config.ranks == "all"
        self._window = config.window if traces else range(0)
        self._file = run / PROFILE / f"rank-{grid.rank}.json.gz"
        self._device = grid.device
        self._tracing: Any = None

    @contextmanager
    def update(self, step: int) -> Iterator[None]:
        """Trace an update if it is in the window, under the name ``update STEP``."""
        if step not in self._window:
            yield
            return
        if self._tracing is None:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._tracing = torch.profiler.profile(activities=kinds)
            self._tracing.start()
        with torch.profiler.record_function(f"update {step}"):
            yield

    def ended(self, step: int) -> Path | None:
        """The trace, which is written after the last update of the window; None otherwise."""
        return self._write() if self._window and step == self._window[-1] else None

    def close(self) -> None:
        """Write what was traced so far, if the run stops inside the window and its disk permits."""
        with suppress(OSError):
            self._write()

    def _write(self) -> Path | None:
        if self._tracing is None:
            return None
        tracing, self._tracing = self._tracing, None
        tracing.stop()
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "trace.json"
            tracing.export_chrome_trace(str(plain))
            if not _is_whole(plain):  # torch raises nothing
                raise _unwritten(Path(folder).parent)
            with (
                replacing(self._file) as aside,
                plain.open("rb") as source,
                gzip.open(aside, "wb") as packed,
            ):
                shutil.copyfileobj(source, packed)
        return self._file


def _is_whole(trace: Path) -> bool:
    """Whether the file is there to its end, the brace that closes its JSON."""
    if not trace.exists() or not trace.stat().st_size:
        return False
    with trace.open("rb") as file:
        file.seek(-min(64, trace.stat().st_size), os.SEEK_END)
        return file.read().rstrip().endswith(b"}")


def _unwritten(folder: Path) -> OSError:
    free = shutil.disk_usage(folder).free / 1e6
    reason = (
        f"torch could not write it there first, with {free:,.1f} MB free; TMPDIR names another "
        "folder"
    )
    return OSError(errno.ENOSPC, reason, str(folder))
