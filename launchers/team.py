"""The processes of one job on this machine: started, watched and ended together.

This does what torchrun does, without three of its properties: a store that is open to the network,
thirty seconds between SIGTERM and SIGKILL (a checkpoint may take longer), and exit code 1 for every
failure.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.children import signals_held_back
from pretrain.distributed.jobs import CONNECTED, MEETING
from pretrain.distributed.signals import SIGNALS
from pretrain.errors import INTERRUPTED, TRY_AGAIN

_FINAL = (2, 1)
"""Exit codes that take precedence over others: a usage error, file trouble."""
_PATIENCE = 30.0
"""Seconds that processes have to end by themselves after one of them has failed."""
_PATIENCE_ASKED = 180.0
"""The same after a signal: processes may be writing a checkpoint."""
_PATIENCE_UNCONNECTED = 2.0
"""The same for a process that has not met the others yet, so that it has nothing to write."""
_PATIENCE_STARTING = 60.0
"""Seconds that such a process has after a signal in any case."""
_PAUSE = 0.05


def run_team(
    command: list[str], processes: int, environment: dict[str, str], patience: float = _PATIENCE
) -> int:
    """Run ``command`` as N processes and forward every signal to them.

    Args:
        patience: seconds that the others have to end by themselves after one has failed.

    Returns:
        0 if all succeeded; else the most informative code: usage error, trouble, or "try again".
    """
    team: list[subprocess.Popen[bytes]] = []

    def hand_on(number: signal.Signals) -> None:
        for process in team:
            _send(process, number)

    # In this order, since a signal that is not handed on would leave the folder behind.
    with SIGNALS.handed_to(hand_on), _meeting_place() as folder:
        try:
            for rank in range(processes):
                variables = {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes), MEETING: str(folder),
                }  # fmt: skip
                with signals_held_back():  # until the process listens
                    team.append(subprocess.Popen(command, env={**environment, **variables}))
                if SIGNALS.asked:  # a signal may have arrived before this process existed
                    _send(team[-1], signal.SIGTERM)
            return _watch(team, folder, patience)
        finally:
            for process in team:
                if process.poll() is None:  # starting the others failed
                    process.kill()


@contextlib.contextmanager
def _meeting_place() -> Iterator[Path]:
    """A folder without access for other users: it is trusted as messages of the processes."""
    folder = tempfile.mkdtemp(prefix="rankdecay-")  # mode 0700
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _watch(team: list[subprocess.Popen[bytes]], folder: Path, patience: float) -> int:
    failed_at = asked_at = None
    while any(process.poll() is None for process in team):
        time.sleep(_PAUSE)
        now = time.monotonic()
        if failed_at is None and any(process.poll() for process in team):
            failed_at = now
        if asked_at is None and SIGNALS.asked:
            asked_at = now
        for rank, process in enumerate(team):
            ends = [] if failed_at is None else [failed_at + patience]
            if asked_at is not None:
                ends = [] if failed_at is None else [failed_at + _PATIENCE_ASKED]
                if not (folder / CONNECTED.format(rank)).exists():
                    # It starts, or is inside a library, where no signal is handled.
                    ends += [asked_at + _PATIENCE_STARTING]
                    ends += [] if failed_at is None else [failed_at + _PATIENCE_UNCONNECTED]
            if ends and now > min(ends):
                _send(process, signal.SIGKILL)
    _say_who_died(team)
    return _verdict([process.returncode for process in team])


def _say_who_died(team: list[subprocess.Popen[bytes]]) -> None:
    """Report a process that was ended by a signal, since it could not do so itself."""
    if SIGNALS.asked:
        return
    for rank, process in enumerate(team):
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            text = f"process rank {rank} (pid {process.pid}) was ended by {name}"
            print(f"launcher: {text}", file=sys.stderr, flush=True)


def _verdict(codes: list[int]) -> int:
    if not any(codes):
        return 0
    for code in _FINAL:
        if code in codes:
            return code
    if SIGNALS.asked:
        return SIGNALS.code
    if TRY_AGAIN in codes or INTERRUPTED in codes:
        return TRY_AGAIN if TRY_AGAIN in codes else INTERRUPTED
    worst = min(codes)
    return 128 - worst if worst < 0 else max(codes)


def _send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
