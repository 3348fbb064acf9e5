"""Restarts a job when it dies or loses its peers.

On one machine all processes of the job are restarted together. For jobs on several machines whose
launcher does not restart them (mpirun, DeepSpeed's, one shell per host), each process has its own
supervisor, and the processes connect again as they did first.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.children import signals_held_back
from launchers.local import child_environment, program, start_environment
from launchers.team import run_team
from pretrain.distributed.signals import SIGNALS
from pretrain.errors import TRY_AGAIN

SUPERVISED = "RANKDECAY_SUPERVISED"
FINAL = (0, 1, 2)
"""Exit codes after which another start would end the same: complete, file trouble, usage error."""
_PAUSES = (1.0, 2.0, 5.0, 10.0, 30.0)


def is_supervised() -> bool:
    """Whether this process already has a supervisor."""
    return SUPERVISED in os.environ


def run_here(processes: int, words: list[str], run: Path | None = None, restarts: int = 0) -> int:
    """Run `pretrain WORDS...` on N processes of this machine.

    Args:
        run: the run folder, whose checkpoints show whether a start made progress.

    Returns:
        The exit code.
    """
    environment = {**start_environment(processes), SUPERVISED: "1"}
    command = [*program(), *words]

    def start() -> int:
        return run_team(command, processes, environment)

    return _again_and_again(start, run, restarts) if run and restarts else start()


def supervise(words: list[str], run: Path, restarts: int) -> int:
    """Run `pretrain WORDS...` as this process rank of a job that another launcher started.

    Returns:
        The exit code of the last start.
    """
    environment = {**child_environment(), SUPERVISED: "1"}

    def start() -> int:
        children: list[subprocess.Popen[bytes]] = []

        def hand_on(number: signal.Signals) -> None:
            for child in children:
                child.send_signal(number)

        with SIGNALS.handed_to(hand_on):
            with signals_held_back():  # until the process listens
                children.append(subprocess.Popen([*program(), *words], env=environment))
            (child,) = children
            if SIGNALS.asked:
                child.terminate()
            code = child.wait()
        return code if code >= 0 else 128 - code

    return _again_and_again(start, run, restarts)


def _again_and_again(
    start: Callable[[], int], run: Path, restarts: int, pauses: Sequence[float] = _PAUSES
) -> int:
    """Start until the job is complete, or made no progress in ``restarts`` starts.

    A signal is forwarded and ends the job: the scheduler will start it again.

    Args:
        pauses: seconds before each further start, by starts without progress.
    """
    failures = 0
    while True:
        before = _newest(run)
        code = start()
        if SIGNALS.asked or code in FINAL:
            return code
        failures = 0 if _newest(run) != before else failures + 1
        if failures > restarts:
            return TRY_AGAIN
        pause = pauses[min(failures, len(pauses) - 1)]
        print(
            f"supervisor: the process ended ({code}); restarting in {pause:g} s from "
            f"{_newest(run) or 'the beginning'} ({failures} of {restarts} without progress)",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(pause)


def _newest(run: Path) -> str:
    """The name of the newest checkpoint, from ``RUN/checkpoints/latest``."""
    try:
        return (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
