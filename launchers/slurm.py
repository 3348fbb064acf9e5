"""Runs of a sweep as one Slurm job array, by submitit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.files import write_aside
from data_pipeline.strict_json import to_json
from launchers.local import child_environment, program
from pretrain.errors import TRY_AGAIN, RunError, UsageError

if TYPE_CHECKING:
    from pretrain.distributed.jobs import Job

_PLAIN = ("nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb")
_PORTS = 20_000
"""The first rendezvous port; the job number is added to it."""


def run_job(words: list[str], log: str) -> int:
    """One task of one array element: `pretrain WORDS...` as this process rank of its job.

    Returns:
        The exit code; 0 also if the run was already complete.
    """
    import submitit

    task = submitit.JobEnvironment()
    digits = int("".join(filter(str.isdigit, task.job_id)) or 0)
    environment = dict(os.environ)
    if task.num_tasks > 1:
        environment |= {
            "MASTER_ADDR": _address(task.hostnames[0]),
            "MASTER_PORT": str(_PORTS + digits % 20_000),
            "RANK": str(task.global_rank),
            "WORLD_SIZE": str(task.num_tasks),
            "LOCAL_RANK": str(task.local_rank),
        }
    environment.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    path = Path(log)
    if task.global_rank:
        path = path.with_suffix(f".rank{task.global_rank}.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        command = [*program(), *words]
        return subprocess.run(
            command,
            env={**child_environment(), **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode


def _address(node: str) -> str:
    """The address of a node: its name if that resolves, else the address that Slurm uses.

    On the node itself, its name may resolve to a loopback address (127.0.1.1 on Debian).
    """
    try:
        addresses = {str(address[4][0]) for address in socket.getaddrinfo(node, None)}
    except OSError:
        addresses = set()
    if any(not (address.startswith("127.") or address == "::1") for address in addresses):
        return node
    command = ["scontrol", "--oneliner", "show", "node", node]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    words = dict(word.partition("=")[::2] for word in shown.split())
    return words.get("NodeAddr", node)


class SlurmExecutor:
    """Runs jobs as elements of one array; they continue if the sweep's process dies.

    Args:
        folder: for submitit's files and the list of submitted jobs.
        settings: ``key=value`` for submitit: partition, account, time (minutes), nodes,
            tasks_per_node, cpus_per_task, gpus_per_node, mem_gb, qos, ...
        parallel: elements of the array that run at once; 0: no limit.

    Raises:
        UsageError: if submitit is not installed, or a setting is unknown.
    """

    slots = 10**6

    def __init__(self, folder: Path, settings: list[str], parallel: int) -> None:
        try:
            import submitit
        except ImportError:
            raise UsageError("--launcher slurm needs submitit: pip install submitit") from None
        self._folder, self._settings, self._parallel = folder, settings, parallel
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._executor = submitit.AutoExecutor(folder, cluster="slurm")
        except RuntimeError as error:
            raise UsageError(f"--launcher slurm: {error}") from None
        self._jobs: dict[str, str] = {}

    def submit(self, jobs: list[Job]) -> None:
        """Adopt jobs that an earlier sweep left in the queue, and submit the rest as one array."""
        queued = _queued()
        recorded = self._known()
        for job in jobs:
            if recorded.get(job.name) in queued:
                self._jobs[job.name] = recorded[job.name]
        fresh = [job for job in jobs if job.name not in self._jobs]
        if not fresh:
            return
        self._configure(fresh)
        try:
            elements = self._executor.map_array(
                run_job, [job.words for job in fresh], [str(job.log) for job in fresh]
            )
        except Exception as error:  # submitit wraps sbatch's message in several classes
            raise RunError(f"sbatch: {_first_line(error)}") from None
        self._jobs |= {
            job.name: element.job_id for job, element in zip(fresh, elements, strict=True)
        }
        text = to_json({**recorded, **self._jobs})
        write_aside(self._folder / "jobs.json", text.encode())

    def _known(self) -> dict[str, str]:
        try:
            numbers: dict[str, str] = json.loads((self._folder / "jobs.json").read_text("utf-8"))
            return numbers
        except (OSError, ValueError):
            return {}

    def _configure(self, jobs: list[Job]) -> None:
        settings: dict[str, Any] = {"nodes": 1, "tasks_per_node": jobs[0].processes}
        for text in self._settings:
            key, separator, value = text.partition("=")
            if not separator:
                raise UsageError(f"--slurm: {text!r} is not KEY=VALUE")
            number: Any = int(value) if value.isdigit() else value
            if key == "time":
                settings["timeout_min"] = number
            else:
                settings[key if key in _PLAIN else f"slurm_{key}"] = number
        tasks = settings["nodes"] * settings["tasks_per_node"]
        if tasks != jobs[0].processes:
            raise UsageError(
                f"--slurm: {settings['nodes']} nodes of {settings['tasks_per_node']} tasks are "
                f"{tasks} processes, but the sweep's `processes:` is {jobs[0].processes}"
            )
        limit = self._parallel or len(jobs)
        try:
            self._executor.update_parameters(
                name="rankdecay", slurm_array_parallelism=limit, **settings
            )
        except (NameError, TypeError, AssertionError) as error:
            raise UsageError(f"--slurm: {_first_line(error)}") from None

    def poll(self) -> dict[str, int]:
        """Jobs that have left the queue; their run folders and logs show how they ended."""
        if not self._jobs:
            return {}
        queued = _queued()
        ended = [name for name, number in self._jobs.items() if number not in queued]
        for name in ended:
            del self._jobs[name]
        # The reason is not known here; progress of the run tells a lost node from a failure.
        return dict.fromkeys(ended, TRY_AGAIN)

    def stop(self) -> None:
        """Cancel all jobs that were submitted or adopted."""
        if self._jobs:
            subprocess.run(["scancel", *self._jobs.values()], check=False)
        self._jobs.clear()


def _queued() -> set[str]:
    """Numbers of this user's jobs that wait or run (array elements as ``12_3``).

    Raises:
        RunError: if the scheduler does not answer; a job must not be considered ended then.
    """
    command = ["squeue", "--noheader", "--array", "--me", "--format=%i %T"]
    for _ in range(5):
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            rows = [line.split() for line in answer.stdout.splitlines()]
            gone = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
            return {row[0] for row in rows if len(row) == 2 and row[1] not in gone}
        time.sleep(2.0)
    raise RunError(f"squeue: {answer.stderr.strip() or 'no answer'}; rerun the sweep later")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
