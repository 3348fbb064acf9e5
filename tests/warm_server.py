"""The server of `tests.warm`: it has everything imported, and forks what it is asked for.

``python -m tests.warm_server SOCKET LOCK`` listens on standard input, a Unix socket, and removes
both files at its end. Each connection has a fork of its own, which reads requests as JSON lines and
answers each with one line.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.forks import (
    ForkingPopen,
    begin_anew,
    make_program_once,
    run_command,
    run_script,
    run_to_the_end,
)
from tests.warm import Request, signal_all


def serve(socket_path: Path, lock_path: Path) -> None:
    """Answer every connection in a fork; end when none has been open for a second."""
    _import_everything()
    assert _threads() <= 1, "a fork would lose a thread"
    gc.collect()
    gc.freeze()  # what the collector would write to, forks would have to copy
    listener = socket.socket(fileno=0)
    listener.settimeout(1.0)
    until = time.monotonic() + 30.0  # for the first connection
    while _has_children() or time.monotonic() < until:
        try:
            line, _ = listener.accept()
        except TimeoutError:
            continue
        until = 0.0
        if os.fork() == 0:
            run_to_the_end(partial(_answer, line))  # does not return
        line.close()
    with lock_path.open("w") as lock:  # nobody connects between the look and the removal
        fcntl.flock(lock, fcntl.LOCK_EX)
        socket_path.unlink(missing_ok=True)
        lock_path.unlink(missing_ok=True)


_line: socket.socket | None = None
"""The connection of this process, which the jobs that it forks must not keep open."""


def _has_children() -> bool:
    """Whether a child lives."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return True
    return False


def _answer(line: socket.socket) -> None:
    """Answer requests until the other end closes."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    line.settimeout(None)
    global _line  # noqa: PLW0603 - one for this process
    _line = line
    closed = select.poll()
    closed.register(line, select.POLLRDHUP)
    with line.makefile("rw") as file:
        for text in file:
            request = Request(**json.loads(text))
            if request.ended:
                os.waitpid(request.ended, 0)
                answer: dict[str, Any] = {}
            elif request.keeper:
                answer = _keep(request)
            else:
                ranks = _fork_ranks(request)
                answer = _wait(ranks, request.timeout, lambda: bool(closed.poll(0)))
            file.write(json.dumps({**answer, "seconds": sum(os.times()[:4])}) + "\n")
            file.flush()


LATER = ("torch._dynamo", "pandas", "pyarrow.parquet", "matplotlib.pyplot", "scipy.stats",
         "sklearn.datasets")  # fmt: skip
"""What libraries import when it is first needed, in every process: a second for the first two."""


def _import_everything() -> None:
    import matplotlib
    import torch
    import typer.main

    torch.set_num_threads(1)
    matplotlib.use("Agg")
    for name in ("__main__", "training.start", "offline.evaluate", "report.page", "report.printed"):
        importlib.import_module(f"pretrain.{name}")
    from pretrain.engine.deepspeed_adapter import prepare_deepspeed
    from pretrain.engine.libraries import load_libraries

    load_libraries()
    prepare_deepspeed()  # compiles something to find out what it can
    for name in LATER:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    make_program_once()
    typer.main.get_command(importlib.import_module("pretrain.__main__").app)


def _threads() -> int:
    """How many this process has, but for jemalloc's own, which forks are no concern to."""
    names = [one.read_text().strip() for one in Path("/proc/self/task").glob("*/comm")]
    return len([name for name in names if name != "jemalloc_bg_thd"])


def _keep(request: Request) -> dict[str, Any]:
    """Let a fork start the ranks, wait for them at once when they end, and write the code."""
    reading, writing = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        os.close(reading)
        _drop_line()
        ranks = _fork_ranks(request, writing)
        os.write(writing, json.dumps(ranks).encode())
        os.close(writing)
        assert request.keeper
        whole = Path(request.keeper)
        aside = whole.with_name("code.tmp")
        aside.write_text(json.dumps(_wait(ranks, request.timeout)))
        aside.rename(whole)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return {"keeper": keeper, "pids": json.loads(pipe.read())}


def _drop_line() -> None:
    """Close this process's copy of the connection, and forget its number."""
    number = _line.detach() if _line is not None else -1
    if number >= 0:
        os.close(number)


def _fork_ranks(request: Request, unwanted: int | None = None) -> list[int]:
    port = _free_port()
    ranks = []
    for rank in range(request.processes):
        process = os.fork()
        if process == 0:
            if unwanted is not None:
                os.close(unwanted)
            _become(request, rank, port)  # does not return
        ranks.append(process)
    return ranks


def _become(request: Request, rank: int, port: int) -> None:
    """Turn this fork into the rank: files, environment, words; run it and end the process."""
    os.setpgid(0, 0)
    _drop_line()
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
    begin_anew()
    faulthandler.enable(file=2)
    subprocess.Popen = ForkingPopen  # type: ignore[misc]
    if request.script is None:
        run_command(request.words)
    else:
        run_script(request.script, request.words)
    sys.exit(0)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait(
    ranks: list[int], timeout: float, unwanted: Callable[[], bool] | None = None
) -> dict[str, Any]:
    """The code as a launcher gives it: 1 where one of several ranks failed, the others ended.

    ``expired`` tells that the job took too long, ``spins`` that gloo is why (`_spins`), and
    ``crashed`` that one of several ranks had a segmentation fault. Once the job is ``unwanted``
    (by default: once the parent of this process has ended), the ranks are killed.
    """
    parent = os.getppid()
    unwanted = unwanted or (lambda: os.getppid() != parent)
    deadline = time.monotonic() + timeout
    look = time.monotonic() + LOOK
    codes: dict[int, int] = {}
    expired = spins = False
    while len(codes) < len(ranks):
        for process in ranks:
            if process not in codes:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    codes[process] = os.waitstatus_to_exitcode(status)
        left = [process for process in ranks if process not in codes]
        if unwanted():  # the tests were killed: nobody waits for the job
            signal_all(left, signal.SIGKILL)
        failed = any(codes.values())
        if failed and left:
            signal_all(left, signal.SIGTERM)
            signal_all([process for process in left if _stopped(process)], signal.SIGKILL)
            deadline = min(deadline, time.monotonic() + 10)
        if len(ranks) > 1 and time.monotonic() > look:
            look += LOOK
            spins = spins or any(_spins(process) for process in left)
        if left and (time.monotonic() > deadline or (spins and not failed)):
            if not (expired or failed):
                expired = True
                for process in left:  # each writes where it is, then ends
                    signal_all([process], signal.SIGABRT)
                    time.sleep(0.5)
            signal_all(left, signal.SIGKILL)
        time.sleep(0.01)
    code = codes[ranks[0]] if len(ranks) == 1 else int(any(codes.values()))
    crashed = len(ranks) > 1 and not expired and -signal.SIGSEGV in codes.values()
    return {"code": code, "expired": expired, "spins": spins, "crashed": crashed}


def _stopped(process: int) -> bool:
    """Whether it stands still (SIGSTOP), so that no other signal would end it."""
    return "\nState:\tT" in Path(f"/proc/{process}/status").read_text()


LOOK = 10.0
"""Seconds between looks for a thread that spins."""
SPINNING = 20.0
"""Seconds of a processor that no thread of gloo needs in a test."""


def _spins(process: int) -> bool:
    """Whether a thread of gloo waits for ever, as it rarely does (torch 2.13, on CPUs).

    The destructor of its buffers (`gloo::transport::tcp::UnboundBuffer`) yields until the last
    reference is gone. Seen twice in some thousand jobs: an all-reduce had ended, the reference
    never went, and the job stood still with one thread busy.
    """
    for task in Path(f"/proc/{process}/task").glob("*"):
        with contextlib.suppress(OSError):
            name, _, fields = (task / "stat").read_text().rpartition(")")
            ticks = sum(map(int, fields.split()[11:13]))
            if "pt_gloo_runloop" in name and ticks > SPINNING * os.sysconf("SC_CLK_TCK"):
                return True
    return False


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
