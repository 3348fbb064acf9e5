"""Forked processes of the tests behave as started ones: files, environment, signals, codes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import warm, warm_server
from tests.forks import started_by
from tests.tools import ROOT, run_processes, start_processes

SCRIPT = ROOT / "tests/started.py"


def test_what_a_forked_process_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own environment, folder, session, output and code; the parent's lock is not its own."""
    monkeypatch.chdir(tmp_path)
    done = run_processes(["start"], 1, 60, SCRIPT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["popen"] == "ForkingPopen" and found["program"] == "x\n"
    assert found["0"] == [0, "x False inner True\n", ""]
    assert found["7"] == [7, "x False inner True\n", ""]
    assert found["locked"] == 1


def test_which_commands_are_forked() -> None:
    here = str(ROOT / "tests/worker.py")
    for words in (["-m", "pretrain", "x"], ["-P", "-m", "pretrain"], ["-u", here, "a"]):
        assert started_by([sys.executable, *words]), words
    for words in (["-c", "1"], ["-m", "torch.distributed.run"], [], ["/tmp/x.py"]):
        assert started_by([sys.executable, *words]) is None, words
    assert started_by(["sh", "-c", "true"]) is None


def test_a_process_beside_the_test_is_signalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each signal goes to every rank; the code is a launcher's, and nobody is left."""
    monkeypatch.chdir(tmp_path)
    process = start_processes(["end", "3"], 1, SCRIPT)
    stdout, stderr = process.communicate(60)
    assert process.returncode == 3 and "True" in stdout and not stderr
    for number, processes, code in ((signal.SIGKILL, 1, -9), (signal.SIGTERM, 2, 1)):
        process = start_processes(["sleep", "1000"], processes, SCRIPT)
        assert process.poll() is None and len(process.pids) == processes
        process.send_signal(number)
        assert process.wait(30) == process.poll() == code
        for pid in process.pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_a_job_that_takes_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    """It ends, and every process has written where it was."""
    with pytest.raises(subprocess.TimeoutExpired):
        run_processes(["sleep", "1000"], 2, 0.5, SCRIPT)
    assert capsys.readouterr().out.count('started.py", line') == 2
    assert run_processes(["sleep", "0"], 1, 60, SCRIPT).returncode == 0  # the server goes on


def test_a_thread_of_gloo_that_never_rests_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warm_server, "LOOK", 0.1)
    monkeypatch.setattr(warm_server, "SPINNING", 0.3)
    for name, spins in (("pt_gloo_runloop", True), ("other", False)):
        started = [
            subprocess.Popen([sys.executable, str(SCRIPT), *words], env=os.environ | {"WORD": name})
            for words in (["sleep", "1000" if spins else "2"], ["spin", "1000" if spins else "1"])
        ]
        answer = warm_server._wait([process.pid for process in started], 100.0)
        assert (answer["spins"], answer["expired"]) == (spins, spins)


def test_a_job_that_gloo_keeps_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and only then."""
    good: dict[str, Any] = {"code": 0, "expired": False, "spins": False, "crashed": False}
    spins = good | {"code": 1, "expired": True, "spins": True}
    crashed = good | {"code": 1, "crashed": True}
    broken = good | {"code": 1, "stderr": "malloc(): unaligned\nFatal Python error: Aborted\n"}
    ended = good | {"code": 1, "stderr": "terminate called\nFatal Python error: Aborted\n"}
    answers = iter([spins, good, crashed, good, broken, good, spins, spins, ended, good])

    def ask(request: warm.Request, environment: dict[str, str]) -> dict[str, Any]:
        for path in (request.stdout, request.stderr):
            assert not Path(path).exists()  # nothing of an earlier run
            Path(path).touch()
        answer = next(answers)
        Path(request.stderr).write_text(answer.get("stderr", ""))
        return answer

    monkeypatch.setattr(warm, "_ask", ask)
    for _ in (spins, crashed, broken):
        with pytest.warns(UserWarning, match="run again: sleep 0"):
            assert run_processes(["sleep", "0"], 2, 60, SCRIPT).returncode == 0
    with pytest.warns(UserWarning), pytest.raises(subprocess.TimeoutExpired):
        run_processes(["sleep", "0"], 2, 60, SCRIPT)
    assert run_processes(["sleep", "0"], 2, 60, SCRIPT).returncode == 1
    assert run_processes(["sleep", "0"], 2, 60, SCRIPT).returncode == 0


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", ["timeout", "value"])
def test_an_exception_is_the_jobs_and_not_the_servers(kind: str, processes: int) -> None:
    done = run_processes(["fail", kind], processes, 60, SCRIPT)
    assert done.returncode == 1 and "Error: a rank failed" in done.stderr
    assert warm._SOCKET.exists()


def test_a_worker_notices_that_its_fork_of_the_server_was_killed(tmp_path: Path) -> None:
    """At once, although what that fork has started lives on."""
    process = start_processes(["sleep", "1000"], 1, SCRIPT)
    served = int(Path(f"/proc/{process._keeper}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(served, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="server of forked processes has ended"):
        run_processes(["sleep", "0"], 1, 60, SCRIPT)
    assert eventually(lambda: not Path(f"/proc/{process.pid}").exists())  # its keeper ends it
    assert run_processes(["sleep", "0"], 1, 60, SCRIPT).returncode == 0


CLIENT = """
from pathlib import Path
from tests.warm import WarmProcess, run_warm
words, environment, script = ["spin", "1000"], {"WORD": WORD}, Path(SCRIPT)
if BESIDE:
    WarmProcess(words, environment, script).wait(1000)
else:
    run_warm(words, environment, Path(FOLDER), script=script, timeout=1000)
"""


@pytest.mark.parametrize("beside", [False, True])
def test_a_job_ends_with_the_tests_that_were_killed(beside: bool, tmp_path: Path) -> None:
    """Also where another worker still uses the server."""
    assert run_processes(["sleep", "0"], 1, 60, SCRIPT).returncode == 0
    name = f"spin-{os.getpid()}"
    values = {"WORD": name, "SCRIPT": str(SCRIPT), "FOLDER": str(tmp_path), "BESIDE": beside}
    code = "".join(f"{key} = {value!r}\n" for key, value in values.items()) + CLIENT
    run = os.environ | {"PYTEST_XDIST_TESTRUNUID": warm.RUN}
    client = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=run)
    assert eventually(lambda: processes_called(name))
    client.kill()
    client.wait()
    assert eventually(lambda: not processes_called(name))
    assert run_processes(["sleep", "0"], 1, 60, SCRIPT).returncode == 0


def processes_called(name: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text().strip() == name:
                found.append(path.parent.name)
    return found


def eventually(holds: Callable[[], object], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(holds())
