"""Processes that begin with everything imported: a server forks them, so a start costs no import.

``python -m tests.warm`` reads requests as JSON lines on standard input and answers each with one
line. A request is a command line, or a script, on one or several ranks. A forked rank differs
from a started one in its imports alone: it has its own environment, files, process group,
interpreter and end. Tests of starting, of launchers and of memory start real processes instead.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Request:
    """What a forked job runs; `script` None stands for the command line itself."""

    words: list[str]
    environment: dict[str, str]
    folder: str
    stdout: str
    stderr: str
    script: str | None = None
    processes: int = 1
    timeout: float = 240.0


# --- the server ------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until standard input ends."""
    _import_everything()
    threads = Path("/proc/self/task")
    assert not threads.exists() or len(list(threads.iterdir())) == 1, "a fork would lose a thread"
    for line in sys.stdin:
        request = Request(**json.loads(line))
        ranks = _fork_ranks(request)
        print(json.dumps(_wait(ranks, request.timeout)), flush=True)


def _import_everything() -> None:
    import torch

    torch.set_num_threads(1)
    for name in ("__main__", "training.start", "offline.evaluate"):
        importlib.import_module(f"pretrain.{name}")
    from pretrain.engine.libraries import load_libraries

    load_libraries()


def _fork_ranks(request: Request) -> list[int]:
    port = _free_port()
    ranks = []
    for rank in range(request.processes):
        process = os.fork()
        if process == 0:
            _become(request, rank, port)  # does not return
        ranks.append(process)
    return ranks


def _become(request: Request, rank: int, port: int) -> None:
    """Turn this fork into the rank: files, environment, words; run it and end the process."""
    os.setpgid(0, 0)
    for number, path in ((1, request.stdout), (2, request.stderr)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    if request.processes > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request.processes),
            LOCAL_WORLD_SIZE=str(request.processes), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )  # fmt: skip
    if request.script is None:
        from pretrain.__main__ import main

        sys.argv = ["pretrain", *request.words]
        run = main
    else:
        path = request.script
        sys.argv = [path, *request.words]

        def run() -> None:
            runpy.run_path(path, run_name="__main__")

    run()
    sys.exit(0)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait(ranks: list[int], timeout: float) -> dict[str, Any]:
    """The code as a launcher gives it: 1 where one of several ranks failed, the others ended."""
    deadline, parent = time.monotonic() + timeout, os.getppid()
    codes: dict[int, int] = {}
    expired = False
    while len(codes) < len(ranks):
        for process in ranks:
            if process not in codes:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    codes[process] = os.waitstatus_to_exitcode(status)
        left = [process for process in ranks if process not in codes]
        if os.getppid() != parent:  # the tests were killed: nobody waits for the job
            _signal(left, signal.SIGKILL)
        failed = any(codes.values())
        if failed and left:
            _signal(left, signal.SIGTERM)
            deadline = min(deadline, time.monotonic() + 10)
        if left and time.monotonic() > deadline:
            expired = expired or not failed
            _signal(left, signal.SIGKILL)
        time.sleep(0.01)
    code = codes[ranks[0]] if len(ranks) == 1 else int(any(codes.values()))
    return {"code": code, "expired": expired, "seconds": sum(os.times()[:4])}


def _signal(processes: list[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


# --- the client ------------------------------------------------------------------------------

_server: subprocess.Popen[str] | None = None
_seconds = _before = 0.0


def seconds_of_server() -> float:
    """Processor time of the servers of this process and of what they forked, so far."""
    return _seconds


def run_warm(
    words: list[str], environment: dict[str, str], folder: Path, *, script: Path | None = None,
    processes: int = 1, timeout: float = 240.0,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run the command line, or a script, on forked processes; as `subprocess.run` with text.

    Args:
        folder: where the outputs are kept, and nothing else; the job runs in the current folder.
    """
    global _server, _seconds, _before  # noqa: PLW0603 - one server for this process
    if _server is None or _server.poll() is not None:
        _server, _before = _start(environment), _seconds
    outputs = [folder / "stdout", folder / "stderr"]
    request = Request(
        words, environment, str(Path.cwd()), str(outputs[0]), str(outputs[1]),
        str(script) if script else None, processes, timeout,
    )  # fmt: skip
    _line_to(_server).write(json.dumps(asdict(request)) + "\n")
    _line_to(_server).flush()
    assert _server.stdout
    answer = json.loads(_server.stdout.readline())
    _seconds = _before + answer["seconds"]
    texts = [path.read_text(errors="replace") for path in outputs]
    if answer["expired"]:
        raise subprocess.TimeoutExpired(words, timeout, *texts)
    return subprocess.CompletedProcess(words, answer["code"], *texts)


def _line_to(server: subprocess.Popen[str]) -> IO[str]:
    assert server.stdin
    return server.stdin


def _start(environment: dict[str, str]) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.warm"], cwd=ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(_line_to(server).close)
    return server


if __name__ == "__main__":
    serve()
