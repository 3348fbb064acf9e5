"""Processes that begin with everything imported: a server forks them, so a start costs no import.

A job is a command line, or a script, on one or several ranks. A forked rank differs from a started
one in its imports alone: it has its own environment, files, process group, interpreter and end, and
what it starts by itself is forked too (`tests.forks`). `run_warm` waits for the end; a
`WarmProcess` runs beside the test, which may signal, kill and wait for it. Tests of starting, of
launchers and of memory start real processes instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.forks import ROOT


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
    keeper: str | None = None
    """With a file: the answer comes at the start, and the file gets the code at the end."""
    ended: int | None = None
    """A keeper that has ended: nothing is run, its processor time is counted."""


_line: _Line | None = None
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
    outputs = [folder / "stdout", folder / "stderr"]
    request = Request(
        words, environment, str(Path.cwd()), str(outputs[0]), str(outputs[1]),
        str(script) if script else None, processes, timeout,
    )  # fmt: skip
    answer = _ask(request, environment)
    if answer["spins"] or answer["crashed"] or (processes > 1 and _broke_memory(outputs[1])):
        # Not ours to mend: the same words once more, as a user would.
        warnings.warn(f"gloo failed, so this is run again: {' '.join(words)}", stacklevel=2)
        for output in outputs:
            output.unlink(missing_ok=True)
        answer = _ask(request, environment)
    texts = [path.read_text(errors="replace") for path in outputs]
    if answer["expired"]:
        print(*(text[-20_000:] for text in texts), sep="\n")  # with the frames of each process
        raise subprocess.TimeoutExpired(words, timeout, *texts)
    return subprocess.CompletedProcess(words, answer["code"], *texts)


_BROKEN = ("malloc():", "malloc_consolidate():", "free():", "double free", "corrupted ", "tcache_")
"""What glibc says of memory that was overwritten; no code of this project is compiled."""


def _broke_memory(stderr: Path) -> bool:
    """Whether a rank ended because of overwritten memory.

    A loop of functional reduce-scatters and gathers over gloo did that after some ten thousand
    rounds (torch 2.13 on CPUs; nothing but the groups was of this project).
    """
    text = stderr.read_text(errors="replace") if stderr.exists() else ""
    return "Fatal Python error: Aborted" in text and any(
        line.startswith(_BROKEN) for line in text.splitlines()
    )


class WarmProcess:
    """A forked job that runs beside the test; of several ranks, each signal goes to all.

    Attributes:
        pid: of rank 0; `pids` of all.
        returncode: as a launcher gives it; None until `poll` or `wait` has seen the end.
    """

    def __init__(
        self, words: list[str], environment: dict[str, str], script: Path | None = None,
        processes: int = 1, timeout: float = 240.0,
    ) -> None:  # fmt: skip
        self._folder = Path(tempfile.mkdtemp(prefix="warm-"))
        self._code = self._folder / "code"
        self._environment = environment
        self._outputs = [self._folder / "stdout", self._folder / "stderr"]
        for path in self._outputs:
            path.touch()
        answer = _ask(
            Request(words, environment, str(Path.cwd()), str(self._outputs[0]),
                    str(self._outputs[1]), str(script) if script else None, processes, timeout,
                    str(self._code)),
            environment,
        )  # fmt: skip
        self.args = words
        self.pids: list[int] = answer["pids"]
        self.pid = self.pids[0]
        self.returncode: int | None = None
        self._keeper: int = answer["keeper"]
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def errors(self) -> str:
        """Standard error so far."""
        return self._outputs[1].read_text(errors="replace")

    def poll(self) -> int | None:
        """The exit code, or None while a rank runs."""
        if self.returncode is None and self._code.exists():
            self.returncode = json.loads(self._code.read_text())["code"]
            _ask(Request([], {}, "", "", "", ended=self._keeper), self._environment)
        return self.returncode

    def wait(self, timeout: float = 240.0) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: if it does not come.
        """
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 240.0) -> tuple[str, str]:
        """Wait for the end; standard output and standard error."""
        self.wait(timeout)
        stdout, stderr = (path.read_text(errors="replace") for path in self._outputs)
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        """To every rank that is alive, as a launcher hands it on."""
        if self.poll() is None:
            signal_all(self.pids, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class _Line:
    """A connection to the server that all workers of a test run share."""

    def __init__(self, environment: dict[str, str]) -> None:
        with _LOCK.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self._socket = _connected()
            except OSError:  # there is no server, or it has ended
                _start_server(environment)
                self._socket = _connected()
        self._file = self._socket.makefile("rw")
        self.was_used = False

    def ask(self, request: Request) -> dict[str, Any] | None:
        """The answer; None if the server ends."""
        try:
            self._file.write(json.dumps(asdict(request)) + "\n")
            self._file.flush()
            answer = self._file.readline()
        except OSError:
            return None
        self.was_used = True
        return json.loads(answer) if answer else None


RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
"""Name of this test run, which all its workers know."""
_NAME = "warm-" + hashlib.sha256(f"{RUN} {ROOT}".encode()).hexdigest()[:16]
_FOLDER = Path(tempfile.gettempdir() if len(os.fsencode(tempfile.gettempdir())) < 80 else "/tmp")
_SOCKET, _LOCK = _FOLDER / _NAME, _FOLDER / f"{_NAME}.lock"
"""Where the server of this test run and this checkout listens, in at most 107 bytes."""


def _connected() -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    try:
        made.connect(str(_SOCKET))
    except OSError:
        made.close()
        raise
    return made


def _start_server(environment: dict[str, str]) -> None:
    """Start a server, which ends when nobody has been connected to it for a second.

    Ctrl-C does not reach it: it ends the jobs of a worker when that worker's connection closes.
    """
    _SOCKET.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(_SOCKET))
        listener.listen(64)  # who connects before it has imported everything waits for that
        # A pipe, as forks mostly have: a stream remembers whether its file can be wound back.
        reading, writing = os.pipe()
        subprocess.Popen(
            [sys.executable, "-m", "tests.warm_server", str(_SOCKET), str(_LOCK)], cwd=ROOT,
            env=environment, stdin=listener.fileno(), stdout=writing, start_new_session=True,
        )  # fmt: skip
        os.close(reading)
        os.close(writing)


def _ask(request: Request, environment: dict[str, str]) -> dict[str, Any]:
    """The server's answer; the server is started where there is none."""
    global _line, _seconds, _before  # noqa: PLW0603 - one connection for this process
    for _ in range(3):
        if _line is None:
            _line, _before = _Line(environment), _seconds
        was_used, answer = _line.was_used, _line.ask(request)
        if answer is not None:
            _seconds = _before + answer["seconds"]
            return answer
        _line = None
        if was_used:  # it may have begun the job
            break
    raise RuntimeError("the server of forked processes has ended")


def signal_all(processes: list[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
