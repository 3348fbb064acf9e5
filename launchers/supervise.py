"""A process of a job that is started again when it dies or loses its peers.

For jobs whose launcher does not do it (mpirun, DeepSpeed's, one shell a host): each process has a
supervisor of its own, and they meet again as they met first. On one machine torchrun does it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from pretrain.errors import TRY_AGAIN

SUPERVISED = "RANKDECAY_SUPERVISED"
_FINAL = (0, 1, 2)
"""Complete; trouble with files; a mistake: another start would end the same."""
_PAUSES = (1.0, 2.0, 5.0, 10.0, 30.0)


def is_supervised() -> bool:
    """Whether this process has a supervisor already."""
    return SUPERVISED in os.environ


def supervise(words: list[str], run: Path, restarts: int) -> int:
    """Run `pretrain WORDS...` until it is complete, or got no further for ``restarts`` starts.

    A SIGTERM or SIGUSR1 is handed on, and is the end: the scheduler will start the job again.

    Returns:
        The exit code of the last start.
    """
    child: subprocess.Popen[bytes] | None = None
    asked = False

    def hand_on(number: int, _: FrameType | None) -> None:
        nonlocal asked
        asked = True
        if child is not None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, hand_on)
    environment = {**os.environ, SUPERVISED: "1"}
    failures = 0
    while True:
        before = _newest(run)
        child = subprocess.Popen([sys.executable, "-m", "pretrain", *words], env=environment)
        code = child.wait()
        if asked or code in _FINAL:
            return code if code >= 0 else 128 - code
        failures = 0 if _newest(run) != before else failures + 1
        if failures > restarts:
            return TRY_AGAIN
        pause = _PAUSES[min(failures, len(_PAUSES) - 1)]
        print(
            f"supervisor: the process ended ({code}); started again in {pause:g} s from "
            f"{_newest(run) or 'the beginning'} ({failures} of {restarts} without progress)",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(pause)


def _newest(run: Path) -> str:
    """Name of the newest checkpoint, as ``RUN/checkpoints/latest`` says."""
    try:
        return (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
