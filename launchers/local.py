"""Processes on this machine: torchrun for one job, and several jobs side by side."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING

from data_pipeline.children import signals_held_back
from pretrain.distributed.cores import usable_cores

if TYPE_CHECKING:
    from pretrain.distributed.jobs import Job

OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""torchrun's variable that gives the job a store of its own. A store shared with the rendezvous
would keep addresses of dead processes, and restarted processes could not connect."""
_GRACE = 60.0
"""Seconds that a job has to end by itself."""
_ROOT = str(Path(__file__).resolve().parent.parent)


def torchrun(processes: int, restarts: int = 0) -> list[str]:
    """The command that starts a Python script or module as ``processes`` processes here.

    Args:
        restarts: how often all processes are restarted when one dies.
    """
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    again = ["--max-restarts", str(restarts)] if restarts else []
    return [*run, "--nproc-per-node", str(processes), *again]


def start_environment(processes: int) -> dict[str, str]:
    """The environment, with this machine's cores divided unless the user has set the threads."""
    return {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // processes)),
        **OWN_STORE,
        **child_environment(),
    }


def child_environment() -> dict[str, str]:
    """The environment in which a child imports this program, and nothing from the current folder.

    Otherwise a ``yaml.py`` or ``models/`` in the folder where a job starts would be imported.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    if not is_installed() and _ROOT not in paths:
        environment["PYTHONPATH"] = os.pathsep.join([*filter(None, paths), _ROOT])
    return environment


def is_installed() -> bool:
    """Whether Python finds this program from any folder, by its package's metadata."""
    try:
        metadata.distribution("rankdecay")
    except metadata.PackageNotFoundError:
        return False
    return True


def program(python: str = sys.executable) -> list[str]:
    """The command `pretrain` as a list; -P: no modules are imported from the current folder."""
    return [python, "-P", "-m", "pretrain"]


def command(words: list[str], processes: int, restarts: int = 0) -> list[str]:
    """The command `pretrain WORDS...` on N processes, as a list of arguments."""
    processes_option = ["--processes", str(processes)] if processes > 1 else []
    again = ["--restarts", str(restarts)] if restarts else []
    return [*program(), *words, *processes_option, *again]


class LocalExecutor:
    """Runs jobs at the same time on this machine and divides its cores (or GPUs) among them."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._running: dict[str, tuple[subprocess.Popen[bytes], int, IO[bytes]]] = {}

    def submit(self, jobs: list[Job]) -> None:
        """Start jobs, each in its own session, so that Ctrl-C reaches only the sweep."""
        for job in jobs:
            taken = {slot for _, slot, _ in self._running.values()}
            slot = next(number for number in range(len(taken) + 1) if number not in taken)
            job.log.parent.mkdir(parents=True, exist_ok=True)
            log = job.log.open("ab")
            with signals_held_back():  # until the process listens
                process = subprocess.Popen(
                    command(job.words, job.processes),
                    env=self._environment(slot, job.processes),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                self._running[job.name] = (process, slot, log)  # before a signal is handled

    def _environment(self, slot: int, processes: int) -> dict[str, str]:
        environment = start_environment(self.slots * processes)
        gpus = _gpus()
        if gpus:
            mine = [gpus[(slot * processes + index) % len(gpus)] for index in range(processes)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        return environment

    def poll(self) -> dict[str, int]:
        """Exit codes of the jobs that have ended since the last call."""
        ended = {}
        for name, (process, _, log) in list(self._running.items()):
            code = process.poll()
            if code is not None:
                log.close()
                ended[name] = code
                del self._running[name]
        return ended

    def stop(self) -> None:
        """Send SIGTERM to every job and its workers, then SIGKILL to those that are left."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process, _, _ in self._running.values():
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
            limit = time.monotonic() + _GRACE
            while time.monotonic() < limit and any(
                process.poll() is None for process, _, _ in self._running.values()
            ):
                time.sleep(0.1)
        self._running.clear()


def default_slots(processes: int) -> int:
    """The number of runs at once: one per GPU (or per N GPUs, for runs of N processes), else 1."""
    gpus = _gpus()
    return max(1, len(gpus) // processes) if gpus else 1


def _gpus() -> list[str]:
    """Names of the GPUs that a job may see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return []
    return answer.stdout.split() if answer.returncode == 0 else []
