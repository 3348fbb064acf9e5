"""`pretrain sweep`: the commands of a sweep's runs, their executor, and the final summary."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from data_pipeline.strict_json import to_json
from launchers.local import LocalExecutor, command, default_slots, start_environment
from pretrain.cli.console import plain
from pretrain.decay.lengths import check_lengths, say_remarks
from pretrain.distributed.jobs import Executor
from pretrain.errors import UsageError
from pretrain.sweep.config import Sweep, load_sweep
from pretrain.sweep.estimate import plan, print_plan
from pretrain.sweep.run import run_sweep, summary


def run(
    file: Path,
    out: Path | None,
    launcher: str,
    parallel: int,
    retries: int | None,
    slurm: list[str],
    dry_run: bool,
    timing: bool,
    price: float,
    as_json: bool,
) -> int:
    """Run or plan a sweep and return the exit code: 1 if a run failed.

    Raises:
        UsageError: if the sweep, a key of its grid or a launcher option is wrong.
    """
    if launcher not in ("local", "slurm"):
        raise UsageError(f"--launcher: {launcher!r} is not local or slurm")
    out = out or Path("runs") / file.stem
    sweep = load_sweep(file, out)
    _check_folders(sweep, launcher)
    say_remarks(task.config for task in sweep.tasks)
    processes = sweep.config.processes
    # Cores are divided among the runs that exist, not among the largest possible number.
    slots = min(parallel or default_slots(processes), max(1, len(sweep.tasks)))

    def start(words: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(words, processes),
            env=start_environment(processes * slots),
            capture_output=True,
            text=True,
            check=False,
        )

    if dry_run:
        on_gpus = launcher == "local" and torch.cuda.is_available()
        estimate = plan(sweep, slots, start if timing else None, price, on_gpus)
        if as_json:
            print(to_json(estimate))
        else:
            print_plan(estimate, slots)
        return 0
    executor: Executor
    if launcher == "slurm":
        from launchers.slurm import SlurmExecutor

        executor = SlurmExecutor(out / "slurm", slurm, parallel)
    else:
        executor = LocalExecutor(slots)
    tries = sweep.config.retries if retries is None else retries
    statuses = run_sweep(sweep, out, executor, tries)
    failed = [status for status in statuses if status.state == "failed"]
    for status in failed:
        print(plain(f"failed: {status.task.name}: {status.note}"), file=sys.stderr)
    if as_json:
        print(to_json(summary(statuses)))
    else:
        print(f"{len(statuses) - len(failed)} of {len(statuses)} runs complete: {out}")
        print(f"report: pretrain report {out} --out {out}/report.html")
    return 1 if failed else 0


def _check_folders(sweep: Sweep, launcher: str) -> None:
    """Refuse a sweep whose folders hold other runs; without such folders, nothing is imported."""
    if not any(task.run.exists() for task in sweep.tasks):
        for task in sweep.tasks:
            check_lengths(task.config)
        return
    import torch

    from pretrain.sweep.check import check_runs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_runs(sweep, device if launcher == "local" else None)
