"""Networks, clocks and services that fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.runs.metrics import read_metrics
from tests.faults.network import Hosts, reason_to_skip
from tests.faults.tools import (
    faulty,
    newest_step,
    same_run,
    same_weights,
    wait_until,
    words_of,
)
from tests.tools import metrics_of, pretrain


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Two hosts with a cable between them, which takes ``request.param`` milliseconds."""
    reason = reason_to_skip()
    if reason:
        pytest.skip(reason)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    with Hosts(int(worker.removeprefix("gw")), getattr(request, "param", 0)) as made:
        yield made


def train_on_both(hosts: Hosts, words: list[str], folder: Path) -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "pretrain", *words]
    return [hosts.start(host, command, folder / f"host{host}.log") for host in (0, 1)]


def logs_of(folder: Path) -> str:
    return "\n".join((folder / f"host{host}.log").read_text() for host in (0, 1))


def end_all(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.long
def test_the_cable_is_pulled(
    data: Path, tmp_path: Path, hosts: Hosts, undisturbed: Callable[[str], Path],
    row: Callable[..., None],
) -> None:  # fmt: skip
    """The job ends within the watchdog's time, and goes on by itself when the cable is back."""
    limit, steps = 10, 200
    words = words_of(
        tmp_path, data, "grid.zero_stage=0", f"faults.watchdog={limit}", "checkpoint.every=50",
        "checkpoint.keep=2", "ranks.every=100", "evaluation.every=200", "--restarts", "5",
        steps=steps,
    )  # fmt: skip
    run = tmp_path / "run"
    processes = train_on_both(hosts, words, tmp_path)
    try:
        wait_until(lambda: len(read_metrics(run)) > 55, 300, logs_of(tmp_path))
        hosts.pull()
        pulled = time.monotonic()
        logs = [tmp_path / f"host{host}.log" for host in (0, 1)]
        wait_until(
            lambda: all("supervisor: the process ended" in log.read_text() for log in logs),
            3 * limit + 30, "both hosts to end",
        )  # fmt: skip
        ended = time.monotonic() - pulled
        time.sleep(5.0)
        before = newest_step(run)
        hosts.plug()
        plugged = time.monotonic()
        wait_until(lambda: newest_step(run) > before, 300, "the job to go on")
        back = time.monotonic() - plugged
        for process in processes:
            assert process.wait(timeout=240) == 0, logs_of(tmp_path)
    finally:
        end_all(processes)
    assert [one["step"] for one in read_metrics(run)] == list(range(1, steps + 1))
    whole = words_of(
        tmp_path / "whole", data, "grid.zero_stage=0", "checkpoint.every=50", "checkpoint.keep=2",
        "ranks.every=100", "evaluation.every=200", steps=steps,
    )  # fmt: skip
    done = pretrain(*whole, processes=2)
    assert done.returncode == 0, done.stderr
    same_run(run, tmp_path / "whole/run")
    row("network cut between two hosts", f"{ended:.0f} s (watchdog {limit} s)",
        f"{back:.0f} s after the cable was back, by itself")  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("hosts", [200], indirect=True)
def test_a_slow_network(
    data: Path, tmp_path: Path, hosts: Hosts, undisturbed: Callable[[str], Path],
    row: Callable[..., None],
) -> None:  # fmt: skip
    """200 ms one way: slow, and the same numbers."""
    words = words_of(tmp_path, data, "grid.zero_stage=0", "--until", "4")
    began = time.monotonic()
    processes = train_on_both(hosts, words, tmp_path)
    try:
        for process in processes:
            assert process.wait(timeout=400) == 0, logs_of(tmp_path)
    finally:
        end_all(processes)
    lasted = time.monotonic() - began
    done = pretrain(*words_of(tmp_path, data, "grid.zero_stage=0"), processes=2)
    assert done.returncode == 0, done.stderr
    same_weights(tmp_path / "run", undisturbed("data"))
    row("200 ms latency between two hosts", "-", f"not disturbed (4 updates in {lasted:.0f} s)")


@pytest.mark.slow
def test_a_clock_that_jumps(
    data: Path, tmp_path: Path, undisturbed: Callable[[str], Path], row: Callable[..., None]
) -> None:
    """One rank's clock goes back by an hour: nothing here is timed by it."""
    words = words_of(tmp_path, data, "grid.zero_stage=0", "faults.watchdog=60")
    done = faulty("clock", 1, "5", words, processes=2)
    assert done.returncode == 0, done.stderr
    same_run(tmp_path / "run", undisturbed("data"))
    row("clock set back by an hour", "-", "not disturbed")


@pytest.mark.long
def test_wandb_is_dead(
    data: Path, tmp_path: Path, undisturbed: Callable[[str], Path], row: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nobody answers at the server's address: told once, and metrics are on disk."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    words = words_of(tmp_path, data, "logging.wandb=nowhere")
    began = time.monotonic()
    done = pretrain(*words)
    lasted = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B is not available") == 1 and "0123456789" not in done.stderr
    assert metrics_of(tmp_path / "run") == metrics_of(undisturbed("one"))
    same_weights(tmp_path / "run", undisturbed("one"))
    row("W&B server dead", "its start (30 s)", f"not disturbed ({lasted:.0f} s in all)")
