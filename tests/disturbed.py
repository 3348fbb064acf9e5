"""Commands in forks of one process, or started, each with a signal at one moment of its life.

A script of `tests.tools.run_processes`: ``disturbed.py REQUEST``. The request has ``trials``, each
``{"words": [...], "place": folder that it writes, "signal": number, "moment": share of its time,
"group": ..., "again": ..., "started": whether it is a started program}``, ``library`` as in
`tests.together`, and ``answer``, the file for a list of what became of them: ``{"code": exit code,
"stderr": ..., "sent": whether it lived until then, "after": CPU seconds that it used after it,
"cpu": all that it used, "orphans": [words of processes that it left], "again": exit code of the
same words without a signal, or null}``. A trial without a signal tells its time, ``seconds``, which
is that of the same verb's later trials. One that ends before its signal is made again, with a
shorter time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tests.forks import ROOT, STARTED, begin_anew, run_command, run_to_the_end
from tests.together import make_cheap

_ADOPT = 36
"""PR_SET_CHILD_SUBREAPER: what a child leaves becomes a child of this process."""
_LONGEST = 90.0
_TRIES = 8
_GRACE = 5.0
"""Seconds that helpers of a library have to see that their process has gone."""
_programs: list[subprocess.Popen[bytes]] = []


def main() -> None:
    """Make the trials of the request, one after the other."""
    request = json.loads(Path(sys.argv[1]).read_text())
    make_cheap(request["library"])
    assert ctypes.CDLL(None).prctl(_ADOPT, 1, 0, 0, 0) == 0
    gc.freeze()
    seconds: dict[str, float] = {}
    answers = []
    for trial in request["asked"]:
        answers.append(_trial(trial, seconds.get(trial["verb"], 0.0)))
        for _ in range(_TRIES if trial["signal"] is not None else 0):
            if answers[-1]["sent"]:
                break
            seconds[trial["verb"]] *= 0.8
            shutil.rmtree(trial["place"])
            Path(trial["place"]).mkdir()
            answers[-1] = _trial(trial, seconds[trial["verb"]])
        if trial["signal"] is None:
            seconds[trial["verb"]] = answers[-1]["seconds"]
        Path(request["answer"]).write_text(json.dumps(answers))


def _trial(trial: dict[str, Any], seconds: float) -> dict[str, Any]:
    process, output = _start(trial)
    began = time.monotonic()
    sent = False
    if trial["signal"] is not None:
        time.sleep(trial["moment"] * seconds)
        sent = _send(process, trial)
    before = _cpu(process)
    code, cpu = _ended(process, _LONGEST)
    took = time.monotonic() - began
    orphans = _orphans()
    stderr = output.read_text(errors="replace")
    output.unlink()
    again = None
    if sent and code and trial["again"]:
        once_more, output = _start(trial)
        again, _ = _ended(once_more, _LONGEST)
        if again:
            stderr += "\nAGAIN:\n" + output.read_text(errors="replace")
        output.unlink()
        orphans += _orphans()
    return {"code": code, "stderr": stderr, "sent": sent, "seconds": took, "cpu": cpu,
            "after": cpu - before, "orphans": orphans, "again": again}  # fmt: skip


def _start(trial: dict[str, Any]) -> tuple[int, Path]:
    """A process with this command, from the moment at which it takes signals over."""
    opened, name = tempfile.mkstemp()
    words = trial["words"]
    process = _program(words, opened) if trial["started"] else _fork(words, opened)
    os.close(opened)
    while not _listens(process):
        time.sleep(0.001)
    return process, Path(name)


def _program(words: list[str], opened: int) -> int:
    """Start a program, whose children are programs too.

    A fork of a process with threads may stand still, and what starts children has threads.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pretrain", *words]
    started = STARTED(command, stdout=opened, stderr=opened, env=environment, process_group=0)
    _programs.append(started)  # otherwise its end would be collected with it
    return started.pid


def _fork(words: list[str], opened: int) -> int:
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        os.closerange(3, 4096)
        begin_anew()
        run_to_the_end(lambda: run_command(words))
    return process


def _listens(process: int) -> bool:
    """Whether it has a handler for SIGTERM, or has ended."""
    text = Path(f"/proc/{process}/status").read_text()
    if "\nState:\tZ" in text:
        return True
    mask = int(text.split("SigCgt:")[1].split()[0], 16)
    return bool(mask >> (signal.SIGTERM - 1) & 1)


def _send(process: int, trial: dict[str, Any]) -> bool:
    """Send the signal, as the terminal does to all of a group or to one process."""
    if psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
        return False
    if trial["group"]:
        os.killpg(process, trial["signal"])
    else:
        os.kill(process, trial["signal"])
    return True


def _cpu(process: int) -> float:
    """CPU seconds of a process and its children so far."""
    main = psutil.Process(process)
    found = 0.0
    for one in (main, *main.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has just ended
            found += sum(one.cpu_times()[:4])  # the third and fourth are of ended children
    return found


def _ended(process: int, most: float) -> tuple[int | None, float]:
    """Its exit code, None if it had to be killed after so many seconds; its CPU seconds."""
    until = time.monotonic() + most
    while time.monotonic() < until:
        done, status, usage = os.wait4(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None, 0.0


def _orphans() -> list[str]:
    """The words of what was left, after some time to end by itself; ended now."""
    until = time.monotonic() + _GRACE
    left = psutil.Process().children(recursive=True)
    while left and time.monotonic() < until:
        _, left = psutil.wait_procs(left, timeout=0.2)
        left += [one for one in psutil.Process().children(recursive=True) if one not in left]
    words = []
    for one in left:
        words.append(" ".join(one.cmdline()))
        one.kill()
        one.wait()
    return words


if __name__ == "__main__":
    main()
