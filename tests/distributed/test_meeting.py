"""Processes that wait for each other: any signal ends them, and one that comes late is no harm."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_pipeline.children import _TURN
from pretrain.distributed.failures import exit_code
from pretrain.distributed.jobs import MEETING
from pretrain.distributed.meeting import Awaited, meeting, open_store, place_of_process
from pretrain.distributed.signals import SIGNALS
from pretrain.errors import INTERRUPTED, TRY_AGAIN, MachineError, Stopped, UsageError
from tests.tools import base_recipe, environment, losses_of, run, write_recipe
from tests.warm import WarmProcess

pytestmark = pytest.mark.slow

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
CPU = torch.device("cpu")
SECOND = timedelta(seconds=1)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def impatient(tmp_path: Path) -> Path:
    """The command line, as a script that soon says what it waits for."""
    script = tmp_path / "impatient.py"
    script.write_text(
        "from pretrain.distributed import meeting\n"
        "meeting._FIRST_LINE = 0.1\n"
        "from pretrain.__main__ import main\n"
        "main()\n"
    )
    return script


def begin(rank: int, port: int, script: Path, words: list[str]) -> WarmProcess:
    """One process rank of two, as mpirun, srun or a person starts it."""
    variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    return WarmProcess(words, {**environment(), **variables}, script)


def wait_for_line(process: WarmProcess) -> str:
    deadline = time.monotonic() + 60
    while "waiting for" not in process.errors():
        assert process.poll() is None and time.monotonic() < deadline, process.errors()
        time.sleep(0.02)
    return process.errors()


def test_a_signal_ends_a_process_whose_peers_do_not_come(
    impatient: Path, data: Path, tmp_path: Path
) -> None:
    """Rank 0 has the store and waits; rank 1 finds no store."""
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    words = ["train", str(recipe), "--out", str(tmp_path / "run")]
    cases = [(rank, number) for rank in (0, 1) for number in NUMBERS]
    waiting = [begin(rank, free_port(), impatient, words) for rank, _ in cases]
    for (rank, number), process in zip(cases, waiting, strict=True):
        text = wait_for_line(process)
        assert ("1 of 2 processes" if rank == 0 else "process rank 0 at 127.0.0.1:") in text
        began = time.monotonic()
        process.send_signal(number)
        code = process.wait(20)
        assert time.monotonic() - began < 5
        assert code == (INTERRUPTED if number == signal.SIGINT else TRY_AGAIN)
        said = process.errors().replace(text, "", 1)
        assert said.count("rerun the same command") == (rank == 0), said
        assert "Traceback" not in said and "C++" not in said and "frame #" not in said, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("first", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_peer_that_comes_late(
    first: int, impatient: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    port, words = free_port(), ["train", str(recipe), "train.steps=2", "evaluation.at_end=none"]
    early = begin(first, port, impatient, [*words, "--out", str(tmp_path / "two")])
    wait_for_line(early)
    late = begin(1 - first, port, impatient, [*words, "--out", str(tmp_path / "two")])
    assert (early.wait(), late.wait()) == (0, 0), early.errors() + late.errors()
    assert early.errors().count("waiting for") == 1  # the next line comes in a minute
    assert run(monkeypatch, *words, "--out", str(tmp_path / "one")) == 0
    np.testing.assert_allclose(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"), rtol=1e-6)


# --- within this process -----------------------------------------------------------------------


@pytest.fixture(params=["file", "network"])
def place(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processes meet that `launchers.team` starts, and others."""
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", MEETING):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    if request.param == "file":
        monkeypatch.setenv(MEETING, str(tmp_path))


def opened(rank: int, size: int, stores: list[Any], timeout: timedelta = 20 * SECOND) -> Any:
    def open_it() -> None:
        try:
            stores.append(open_store(rank, size, timeout))
        except Exception as error:
            stores.append(error)

    thread = threading.Thread(target=open_it, daemon=True)
    thread.start()
    return thread


@pytest.mark.usefixtures("place")
def test_all_go_on_when_the_last_one_has_come() -> None:
    stores: list[Any] = []
    threads = [opened(rank, 3, stores) for rank in (0, 2, 2)]  # rank 2 was started again
    time.sleep(0.5)
    assert not stores
    threads.append(opened(1, 3, stores))
    for thread in threads:
        thread.join(20)
    assert len(stores) == 4 and not [one for one in stores if isinstance(one, Exception)], stores


@pytest.mark.usefixtures("place")
def test_a_peer_that_never_comes_is_told_in_one_line() -> None:
    with pytest.raises(MachineError, match=r"2 of 3 processes did not come within 0\.0\d+ minutes"):
        open_store(0, 3, timedelta(seconds=1.5))
    assert exit_code(dist.DistStoreError("wait timeout")) == TRY_AGAIN


@pytest.fixture
def listening() -> Iterator[None]:
    SIGNALS.listen()
    yield
    SIGNALS.restore()


def end_wait(store: Path) -> None:
    """End the thread that waits there: Python cannot end while it is inside compiled code."""
    dist.FileStore(str(store), 2).set("never", "after all")  # type: ignore[attr-defined]
    until = time.monotonic() + 10
    while library_threads() and time.monotonic() < until:
        time.sleep(0.01)


def library_threads() -> list[int | None]:
    """The threads inside a library that exist now; a list of `threading` may hold others' names."""
    alive = sys._current_frames()
    named = (one for one in threading.enumerate() if one.name == "library")
    return [one.ident for one in named if one.ident in alive]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.usefixtures("listening")
def test_a_signal_is_handled_while_a_library_waits(number: signal.Signals, tmp_path: Path) -> None:
    """As `init_process_group` and `new_group` do for a peer that has gone."""
    store = dist.FileStore(str(tmp_path / "store"), 2)  # type: ignore[attr-defined]
    threading.Timer(0.2, lambda: os.kill(os.getpid(), number)).start()
    began = time.monotonic()
    try:
        with pytest.raises(Stopped, match=number.name):
            meeting(lambda: store.wait(["never"], 4 * SECOND), 2, CPU)
        assert time.monotonic() - began < 2
    finally:
        end_wait(tmp_path / "store")


def test_what_it_returns_and_raises(capsys: pytest.CaptureFixture[str]) -> None:
    assert meeting(lambda: 7, 2, CPU) == meeting(lambda: 7, 1, CPU) == 7
    with pytest.raises(KeyError, match="NO_SUCH"):
        meeting(lambda: os.environ["NO_SUCH"], 2, CPU)
    began = time.monotonic()
    meeting(lambda: None, 2, CPU, Awaited("others"))
    assert time.monotonic() - began < _TURN and not capsys.readouterr().err


GIVEN = {"WORLD_SIZE": "3", "RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}
WRONG = {
    "WORLD_SIZE": ("two", "0", "-1", "", "1.5"),
    "RANK": ("", "3", "-1", "first"),
    "MASTER_ADDR": ("",),
    "MASTER_PORT": ("", "abc", "0", "65536"),
}


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, texts in WRONG.items() for t in texts])
def test_a_wrong_variable_of_the_launcher_is_named(name: str, text: str) -> None:
    assert place_of_process(GIVEN) == (1, 3)
    changes = [{**GIVEN, name: text}]
    if not text:
        changes.append({key: value for key, value in GIVEN.items() if key != name})
    for changed in changes:
        if name == "WORLD_SIZE" and name not in changed:
            assert place_of_process(changed) == (0, 1)  # nobody has said that there are several
            continue
        with pytest.raises(UsageError, match=rf"^{name}( is not set|=)") as told:
            place_of_process(changed)
        assert "\n" not in str(told.value)


def test_what_one_process_or_one_machine_does_not_need() -> None:
    assert place_of_process({}) == (0, 1)
    assert place_of_process({"WORLD_SIZE": "1", "RANK": "nonsense"}) == (0, 1)
    assert place_of_process({"WORLD_SIZE": "2", "RANK": "1", MEETING: "/folder"}) == (1, 2)


def test_two_first_processes_are_told_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MEETING, raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(MachineError, match=rf"MASTER_PORT={port} is in use here: .* RANK=0"):
            open_store(0, 2, timedelta(seconds=5))
