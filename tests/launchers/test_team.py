"""Processes of one machine: their code, their end, their meeting place; torchrun with patience."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from launchers import supervise, team
from launchers.local import child_environment, command, start_environment
from pretrain.distributed import meeting
from pretrain.distributed.jobs import CONNECTED, MEETING
from pretrain.distributed.signals import SIGNALS
from pretrain.errors import INTERRUPTED, TRY_AGAIN
from pretrain.runs.metrics import read_metrics
from tests.tools import ROOT, base_recipe, environment, write_recipe


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    SIGNALS.listen()
    yield
    SIGNALS.restore()


LISTEN = (
    "import os, signal, sys; signal.pthread_sigmask(signal.SIG_SETMASK, []);"
    "os.execvp('bash', ['bash', '-c', sys.argv[1]])"
)
"""Ranks get no signal before they ask for it, which a shell cannot."""


def ranks(script: str, count: int = 3, **more: float) -> int:
    """The code of a team whose ranks run a line of shell (RANK is their own)."""
    return team.run_team([sys.executable, "-SEc", LISTEN, script], count, dict(os.environ), **more)


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        ((0, 0, 0), 0), ((0, 2, 75), 2), ((75, 1, 137), 1), ((2, 1, 0), 2), ((75, 75, 0), 75),
        ((0, 0, 139), 139), ((130, 130, 130), INTERRUPTED),
    ],
)  # fmt: skip
def test_the_code_that_says_most(codes: tuple[int, ...], wanted: int) -> None:
    assert ranks(f"codes=({' '.join(map(str, codes))}); exit ${{codes[$RANK]}}") == wanted


def test_a_killed_rank_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert ranks("[ $RANK = 1 ] && kill -9 $$; exit 0") == 137
    assert "rank 1 (pid " in (text := capfd.readouterr().err) and "SIGKILL" in text


def test_a_rank_that_was_killed_at_once_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also if every process has ended before the launcher looks for the first time."""
    start = subprocess.Popen

    def ended(*words: Any, **more: Any) -> subprocess.Popen[bytes]:
        process = start(*words, **more)
        process.wait()
        return process

    monkeypatch.setattr(subprocess, "Popen", ended)
    assert ranks("[ $RANK = 1 ] && kill -9 $$; exit 0") == 137
    assert "rank 1 (pid " in capfd.readouterr().err


def test_ranks_that_hang_after_a_failure_are_ended() -> None:
    began = time.monotonic()
    assert ranks("[ $RANK = 2 ] && exit 75; sleep 100", patience=0.3) == TRY_AGAIN
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("number", "wanted"), [(signal.SIGTERM, 75), (signal.SIGINT, 130),
                                                (signal.SIGUSR1, 75)])  # fmt: skip
def test_a_signal_reaches_every_rank_and_no_deadline_follows(
    number: signal.Signals, wanted: int, tmp_path: Path
) -> None:
    """They write for longer than a failed team would be given, and nobody is killed."""
    threading.Timer(0.7, lambda: os.kill(os.getpid(), number)).start()
    name = number.name.removeprefix("SIG")
    # The first to end starts the clock; the others write for longer than one that never connected
    # would be given.
    script = (
        f"touch ${MEETING}/{CONNECTED.format('$RANK')}; trap 'sleep $((1 + 2 * RANK));"
        f" touch {tmp_path}/$RANK; exit {wanted}' {name}; sleep 30 & wait; wait"
    )
    assert ranks(script, patience=0.1) == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_starts_without_progress_are_counted(tmp_path: Path) -> None:
    def starts(action: str, restarts: int = 2) -> tuple[int, int]:
        count = tmp_path / "count"
        count.unlink(missing_ok=True)
        script = f"echo x >> {count}; n=$(wc -l < {count}); {action}"
        run = tmp_path / "run"
        code = supervise._again_and_again(lambda: ranks(script, 1), run, restarts, pauses=(0.0,))
        return code, len(count.read_text().splitlines())

    latest = tmp_path / "run/checkpoints/latest"
    latest.parent.mkdir(parents=True)
    assert starts("exit 2") == (2, 1) and starts("exit 1") == (1, 1)
    assert starts("exit 75") == (TRY_AGAIN, 3)
    assert starts("kill -9 $$") == (TRY_AGAIN, 3)
    assert starts(f"echo $n > {latest}; [ $n -lt 6 ] && exit 75; exit 0") == (0, 6)


@pytest.mark.parametrize(("said", "threads"), [(None, {1: "6", 4: "1", 8: "1"}), ("5", {4: "5"})])
def test_ranks_share_the_cores_of_a_quota(
    said: str | None, threads: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launchers.local.usable_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    for processes, wanted in threads.items():
        assert start_environment(processes)["OMP_NUM_THREADS"] == wanted


def test_the_meeting_place_is_closed_to_others(tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    assert ranks(f'stat -c %a "${MEETING}" > {shown}; echo "${MEETING}" >> {shown}', 1) == 0
    mode, folder = shown.read_text().split()
    assert mode == "700" and not Path(folder).exists()


TRAPS = ("yaml.py", "typer.py", "sitecustomize.py", "models/__init__.py", "torch.py",
         "pretrain/__init__.py")  # fmt: skip


@dataclass(frozen=True)
class OneMachine:
    """What was seen of a job of two ranks while it trained."""

    folder: Path
    family: int
    """Number of processes."""
    heard: set[str]
    """Addresses at which any of them listened."""
    code: int
    errors: str


@pytest.fixture(scope="module")
def job(data: Path, tmp_path_factory: pytest.TempPathFactory) -> OneMachine:
    """Started in a folder of traps, looked at, and asked to end."""
    folder = tmp_path_factory.mktemp("job")
    trap = "import os, pathlib; pathlib.Path(__file__).with_suffix('.ran').touch(); os._exit(66)\n"
    for name in TRAPS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(trap)
    recipe = write_recipe(folder / "recipe.yaml", base_recipe(data))
    words = ["train", str(recipe), "--out", str(folder / "run"), "train.steps=100000"]
    process = subprocess.Popen(
        command(words, 2), env=start_environment(2), cwd=folder, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 90
        while not read_metrics(folder / "run") and time.monotonic() < deadline:
            time.sleep(0.1)
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        heard = {
            one.laddr.ip
            for member in family
            for one in psutil.Process(member.pid).net_connections("inet")
            if one.status == psutil.CONN_LISTEN
        }
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=60)
    return OneMachine(folder, len(family), heard, process.returncode, errors)


def test_a_job_of_one_machine_listens_to_no_other(job: OneMachine) -> None:
    assert job.family == 3 and job.heard <= {"127.0.0.1", "::1"}, (job.heard, job.errors)
    assert job.code == TRY_AGAIN, job.errors


def test_modules_of_the_folder_are_not_run(job: OneMachine) -> None:
    """A ``yaml.py``, a ``models/`` and the like where a job starts stay what they are: files."""
    assert job.code == TRY_AGAIN, job.errors
    assert read_metrics(job.folder / "run"), job.errors
    assert not list(job.folder.rglob("*.ran"))
    assert all((job.folder / name).is_file() for name in TRAPS)


def test_a_program_that_is_not_installed_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launchers.local.is_installed", lambda: False)
    monkeypatch.setenv("PYTHONPATH", f":{tmp_path}:")
    paths = child_environment()["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(tmp_path), str(ROOT)]  # and no empty one, which is the current folder


# --- between machines ------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def own_address() -> str:
    """An address of this machine that is not the loopback's, or a skipped test."""
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family == socket.AF_INET and not one.address.startswith("127."):
                address: str = one.address
                return address
    pytest.skip("this machine has the loopback interface alone")


def listener_of(host: str) -> str | None:
    """The address that rank 0 of a job over machines binds its store to; None: all of them."""
    found = meeting._listen(host, free_port())
    if found is None:
        return None
    with contextlib.closing(found):
        return str(found.getsockname()[0])


def test_the_store_is_bound_to_the_address_that_others_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    address = own_address()
    assert listener_of(address) == address
    assert listener_of("127.0.0.1") == "127.0.0.1" and listener_of("localhost") == "127.0.0.1"
    assert listener_of("203.0.113.7") is None  # a service in front of this machine
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *more, **other: real("127.0.1.1", *more, **other)
    )
    assert listener_of("node1") is None  # this machine's own name, as it knows itself
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert listener_of("node1") == "127.0.1.1"


def test_ranks_meet_on_that_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MEETING, raising=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    limit = timedelta(seconds=30)
    stores = []
    other = threading.Thread(target=lambda: stores.append(meeting.open_store(1, 2, limit)))
    other.start()
    stores.append(meeting.open_store(0, 2, limit))
    other.join()
    stores[0].set("a", "1")
    assert stores[1].get("a") == b"1"
    heard = [
        one.laddr
        for one in psutil.Process().net_connections("inet")
        if one.status == psutil.CONN_LISTEN
    ]
    port = int(os.environ["MASTER_PORT"])
    assert {one.ip for one in heard if one.port == port} == {"127.0.0.1"}
    board = meeting.open_board(2, limit)
    assert board is not None
    board.set("0", "{}")
    assert board.get("0") == b"{}"


def test_a_board_in_a_folder_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MEETING, str(tmp_path))
    board = meeting.open_board(2, timedelta(seconds=1))
    assert board is not None and board.get("1") == b""
    for turn in range(50):
        board.set("1", "x" * turn)
    assert board.get("1") == b"x" * 49
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 49


@pytest.mark.long
def test_torchrun_waits_for_a_slow_checkpoint(tmp_path: Path) -> None:
    """SIGTERM, and a write of 35 s: torchrun by itself would kill it after 30."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import signal, sys, time, pathlib\n"
        "def write(*_):\n"
        f"    time.sleep(35); pathlib.Path({str(tmp_path)!r}, 'whole').touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, write)\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready').touch()\n"
        "time.sleep(300)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "launchers.elastic", "--standalone", "--nproc-per-node", "1",
         str(script)],
        env={**environment(), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}, cwd=ROOT,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert (tmp_path / "whole").exists(), errors
    assert process.returncode == TRY_AGAIN, errors


def test_a_rank_that_waits_for_one_that_left_is_ended() -> None:
    """Inside a library, where no signal is handled, and before it has anything to write."""
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    script = "trap 'exit 75' TERM; [ $RANK = 0 ] && trap '' TERM; sleep 60 & wait; sleep 60"
    began = time.monotonic()
    assert ranks(script, 2) == TRY_AGAIN
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_waits_until_a_rank_listens(number: signal.Signals, tmp_path: Path) -> None:
    """A rank that starts, or imports something for long, is not killed and prints no traceback."""
    began, late = tmp_path / "began", tmp_path / "late.py"
    late.write_text(
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(began)!r}).write_text('')\n"
        "until = time.monotonic() + 0.5\n"
        "while time.monotonic() < until: pass\n"
        "from pretrain.distributed.signals import SIGNALS\n"
        "from pretrain.errors import Stopped\n"
        "try:\n"
        "    SIGNALS.listen()\n"
        "    time.sleep(60)\n"
        "except Stopped:\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'ended-' + os.environ['RANK']).touch()\n"
        "    sys.exit(SIGNALS.code)\n"
    )

    def send() -> None:
        while not began.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    code = team.run_team([sys.executable, str(late)], 2, environment())
    sender.join()
    assert code == (INTERRUPTED if number == signal.SIGINT else TRY_AGAIN)
    assert len(list(tmp_path.glob("ended-*"))) == 2
