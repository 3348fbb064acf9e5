"""A real two-node Slurm on this machine, for tests; several may run side by side."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch")


def which(name: str) -> str | None:
    """Daemons live outside a user's PATH."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin:/usr/local/sbin")


def reason_to_skip() -> str:
    """Why Slurm cannot be started here, or nothing."""
    missing = [name for name in DAEMONS if not which(name)]
    if missing:
        return f"Slurm is not installed here ({', '.join(missing)})"
    return "" if os.geteuid() == 0 else "starting Slurm's daemons takes root"


def stand_in(folder: Path, name: str, prints: str) -> str:
    """Put a program in ``folder`` that prints a line; returns the PATH that finds it first."""
    program = folder / name
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!/bin/sh\necho '{prints}'\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def start_slurm(folder: Path) -> None:
    """One controller and two nodes of one CPU."""
    host = os.uname().nodename.partition(".")[0]
    port = _free_ports()
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": port,
        "SlurmUser": "root",
        "MpiDefault": "none",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "ReturnToService": 2,
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": f"{folder}/spool.%n",
        "SlurmctldPidFile": folder / "ctld.pid",
        "SlurmdPidFile": f"{folder}/d.%n.pid",
        "SlurmctldLogFile": folder / "ctld.log",
        "SlurmdLogFile": f"{folder}/d.%n.log",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "AccountingStorageType": "accounting_storage/none",
        "JobCompType": "jobcomp/none",
        # A requeued job waits until its credential has run out.
        "AuthInfo": "cred_expire=10",
        "SchedulerParameters": "bf_interval=2,sched_interval=2",
    }
    lines = [f"{key}={value}" for key, value in settings.items()]
    lines.append(
        f"NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{port + 1}-{port + 2}] "
        "CPUs=1 RealMemory=4000 State=UNKNOWN"
    )
    lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    variables = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    if not _runs("munged"):
        Path("/run/munge").mkdir(exist_ok=True)
        subprocess.run(["chown", "munge", "/run/munge"], check=True)
        subprocess.run(["runuser", "-u", "munge", "--", str(which("munged"))], check=True)
        (folder / "munge").touch()
    subprocess.run([str(which("slurmctld"))], env=variables, check=True)
    time.sleep(2)
    for node in ("n1", "n2"):
        subprocess.run([str(which("slurmd")), "-N", node], env=variables, check=True)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        shown = subprocess.run(["sinfo", "-h", "-o", "%T"], env=variables, capture_output=True,
                               text=True, check=False).stdout  # fmt: skip
        if shown.strip() == "idle":
            return
        time.sleep(0.5)
    raise AssertionError("Slurm's nodes did not come up")


def _free_ports() -> int:
    """The first of three free ports; with a port in use, jobs would go to another suite's Slurm."""
    while True:
        first = random.randrange(16_000, 30_000)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + 3):
                held.enter_context(socket.socket()).bind(("", port))
            return first


def stop_slurm(folder: Path) -> None:
    """End the daemons of `start_slurm`, and munge if it was started for them alone."""
    for file in folder.glob("*.pid"):
        with contextlib.suppress(ValueError, ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)
    time.sleep(0.5)
    if (folder / "munge").exists() and not _runs("slurmctld"):
        subprocess.run(["pkill", "-x", "munged"], check=False)


def _runs(name: str) -> bool:
    return subprocess.run(["pgrep", "-x", name], capture_output=True, check=False).returncode == 0
