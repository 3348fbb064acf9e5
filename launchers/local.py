"""Several processes on this machine, by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys


def torchrun(processes: int) -> list[str]:
    """The words that start a Python script or module on ``processes`` processes here."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*run, "--nproc-per-node", str(processes)]


def share_cores(processes: int) -> dict[str, str]:
    """The environment with this machine's cores shared out, unless the user said otherwise."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"OMP_NUM_THREADS": str(max(1, (cores or 1) // processes)), **os.environ}


def launch(processes: int, words: list[str]) -> int:
    """Run `pretrain WORDS...` on ``processes`` processes; returns the exit code."""
    command = [*torchrun(processes), "-m", "pretrain", *words]
    return subprocess.run(command, env=share_cores(processes), check=False).returncode
