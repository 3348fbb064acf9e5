"""Runs the points of a sweep: keeps finished runs, continues interrupted ones, reports failures.

All state is in the run folders and their locks. The loop checks each folder, starts missing runs
through an executor, and repeats; it can be killed at any moment and started again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_pipeline.strict_json import to_json
from pretrain.checkpoint.reader import CHECKPOINTS, newest_checkpoint
from pretrain.config.recipe import code_of, dump_config
from pretrain.distributed.jobs import Executor, Job
from pretrain.errors import ENDS, TRY_AGAIN
from pretrain.runs.finished import is_complete
from pretrain.runs.lock import is_busy, shared
from pretrain.runs.unfit import SWEEP as SWEEP  # noqa: PLC0414 - tools read it from here
from pretrain.sweep.config import Sweep, SweepRun
from pretrain.sweep.status import Status
from pretrain.sweep.table import Table

_STOPPED = re.compile(r"^(.*: )?(stopped by \w+|interrupted)\b")
"""The last line of a run that a signal ended."""
_PAUSE = 0.5


def is_done(task: SweepRun) -> bool:
    """Whether the run folder holds a finished run."""
    return is_complete(task.run, task.config, task.until)


def run_sweep(
    sweep: Sweep, out: Path, executor: Executor, retries: int, pause: float = _PAUSE
) -> list[Status]:
    """Run all tasks that are not done.

    Args:
        pause: seconds between two looks at the folders.

    Returns:
        The state of every task; failed tasks have the last line of their log as a note.

    Raises:
        Stopped: by a signal, after a clean stop.
    """
    with shared(out, _files(sweep, out), "sweep"):
        return _run(sweep, out, executor, retries, pause)


def _files(sweep: Sweep, out: Path) -> dict[Path, bytes]:
    """Write the files about the sweep before its runs start."""
    recipes = {_recipe(out, task): dump_config(task.config).encode() for task in sweep.tasks}
    return {out / SWEEP: to_json(describe(sweep), indent=1).encode(), **recipes}


def _run(sweep: Sweep, out: Path, executor: Executor, retries: int, pause: float) -> list[Status]:
    statuses = [Status(task) for task in sweep.tasks]
    table = Table(sweep.name)
    try:
        while not _settled(statuses):
            _round(statuses, out, executor, sweep.config.processes, retries)
            table.show(statuses)
            time.sleep(pause)
    except ENDS:
        executor.stop()
        raise
    finally:
        table.close(statuses)
    return statuses


def describe(sweep: Sweep) -> dict[str, Any]:
    """The information that a reader of the folder needs: the varied keys and the baseline."""
    return {
        "name": sweep.name,
        "keys": sweep.keys,
        "exposure": sorted(sweep.config.exposure),
        "baseline": sweep.baseline.name if sweep.baseline else None,
        "runs": {
            task.run.name: {"point": task.point.name, "given": task.point.given}
            for task in sweep.tasks
            if task.point
        },
    }


def _settled(statuses: list[Status]) -> bool:
    return all(status.state in ("done", "failed") for status in statuses)


def _round(
    statuses: list[Status], out: Path, executor: Executor, processes: int, retries: int
) -> None:
    """Check jobs that ended and every folder, and start what can start."""
    by_name = {status.task.name: status for status in statuses}
    for name, code in executor.poll().items():
        _ended(by_name[name], code, out, retries)
    for status in statuses:
        _look(status, by_name)
    running = sum(status.state in ("running", "elsewhere") for status in statuses)
    ready = [
        status for status in statuses if status.state == "waiting" and _can_start(status, by_name)
    ]
    chosen = ready[: max(0, executor.slots - running)]
    for status in chosen:
        status.state, status.tries = "running", status.tries + 1
        status.look()
        status.first_step, status.started = status.step, time.monotonic()
        status.checkpoint = _newest(status.task.run)
    if chosen:
        executor.submit([_job(status.task, out, processes) for status in chosen])


def _ended(status: Status, code: int, out: Path, retries: int) -> None:
    if is_done(status.task):
        status.state = "done"
    elif is_busy(status.task.run):  # another sweep was faster
        status.state, status.tries = "elsewhere", status.tries - 1
    elif code == TRY_AGAIN and _newest(status.task.run) != status.checkpoint:
        # Preempted, or its machine failed, but it made progress: this is not a failure of the run.
        status.state, status.tries, status.note = "waiting", status.tries - 1, "continues"
    elif status.tries > retries:
        status.state = "failed"
        status.note = last_line(log_of(out, status.task)) or f"exit code {code}"
    else:
        status.state, status.note = "waiting", f"try {status.tries + 1}"


def _newest(run: Path) -> str:
    checkpoint = newest_checkpoint(run / CHECKPOINTS)
    return checkpoint.name if checkpoint else ""


def _look(status: Status, by_name: dict[str, Status]) -> None:
    if status.state in ("done", "failed"):
        return
    if status.state != "running":
        if is_busy(status.task.run):
            status.state = "elsewhere"
        elif is_done(status.task):
            status.state = "done"
        elif status.task.trunk and by_name[status.task.trunk.name].state == "failed":
            status.state, status.note = "failed", f"{status.task.trunk.name} failed"
        else:
            status.state = "waiting"
    if status.state in ("running", "elsewhere", "done"):
        status.look()


def _can_start(status: Status, by_name: dict[str, Status]) -> bool:
    trunk = status.task.trunk
    return trunk is None or by_name[trunk.name].state == "done"


def _job(task: SweepRun, out: Path, processes: int) -> Job:
    words = ["train", str(_recipe(out, task)), "--out", str(task.run)]
    if task.until is not None:
        words += ["--until", str(task.until)]
    if task.trunk is not None:
        words += ["--fork", f"{task.trunk.run}@{task.trunk.last}"]
    return Job(task.name, [*words, *code_words(task)], processes, log_of(out, task))


def code_words(task: SweepRun) -> list[str]:
    """The words that let a run have the files of code that the sweep's recipe names."""
    return [word for code in code_of(task.config) for word in ("--code", str(code.path))]


def _recipe(out: Path, task: SweepRun) -> Path:
    return out / "recipes" / f"{task.name}.yaml"


def log_of(out: Path, task: SweepRun) -> Path:
    """The log of a run's processes."""
    return out / "logs" / f"{task.name}.log"


def last_line(path: Path) -> str:
    """The last error in a log, else its last line; empty without a log."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    words = [line.strip() for line in lines if line.strip()]
    ends = [line for line in words if line.startswith("error: ") or _STOPPED.search(line)]
    return (ends or words or [""])[-1]


def summary(statuses: Iterable[Status]) -> dict[str, Any]:
    """The result of a sweep as plain data."""
    return {
        status.task.name: {
            "state": status.state,
            "run": str(status.task.run),
            "step": status.step,
            **({"note": status.note} if status.note else {}),
        }
        for status in statuses
    }
