"""Processes that die, stop, hang, or are asked to end."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from launchers.local import torchrun
from pretrain.errors import TRY_AGAIN
from pretrain.runs.metrics import read_metrics
from tests.faults.tools import (
    GRIDS,
    HERE,
    PROCESSES,
    faulty,
    newest_step,
    same_run,
    same_weights,
    started_until,
    wait_until,
    words_of,
)
from tests.tools import (
    STARTS,
    environment,
    losses_of,
    metrics_of,
    pretrain,
    run_processes,
    start_processes,
)
from tests.warm import WarmProcess


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of a process and all that it started."""
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "grid"),
    [
        ("step", "one"),
        ("checkpoint", "one"),
        ("before rename", "one"),
        ("step", "stages"),
        pytest.param("after rename", "one", marks=pytest.mark.long),
        pytest.param("evaluation", "one", marks=pytest.mark.long),
        pytest.param("checkpoint", "stages", marks=pytest.mark.long),
    ],
)
def test_all_are_killed(
    data: Path, tmp_path: Path, undisturbed: Callable[[str], Path], row: Callable[..., None],
    moment: str, grid: str,
) -> None:  # fmt: skip
    words = words_of(tmp_path, data, *GRIDS[grid])
    process = started_until(moment, tmp_path / "marker", words, PROCESSES[grid])
    process.kill()
    process.wait()
    run = tmp_path / "run"
    if moment in ("checkpoint", "before rename"):
        assert list((run / "checkpoints").glob(".*.writing")), "was not killed while writing"
    began = time.monotonic()
    again = pretrain(*words, processes=PROCESSES[grid])
    assert again.returncode == 0, again.stderr
    same_run(run, undisturbed(grid))
    where = {"step": "between updates", "evaluation": "in evaluation"}.get(moment, moment)
    row(f"kill -9 of all ({grid}), {where}", "the next start", f"{time.monotonic() - began:.0f} s")


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["one", "stages"])
def test_asked_to_stop(
    data: Path, tmp_path: Path, undisturbed: Callable[[str], Path], row: Callable[..., None],
    grid: str,
) -> None:  # fmt: skip
    """SIGTERM: one more checkpoint, exit code 75, and nothing is lost."""
    words = words_of(tmp_path, data, *GRIDS[grid], "checkpoint.every=4")
    run = tmp_path / "run"
    process = started_until("slow", tmp_path / "marker", words, PROCESSES[grid])
    began = time.monotonic()
    process.terminate()  # to every rank, as launchers hand it on
    _, stderr = process.communicate(timeout=240)
    lasted = time.monotonic() - began
    if grid == "one":
        assert process.returncode == TRY_AGAIN and "stopped by SIGTERM at step 6" in stderr
        assert "Traceback" not in stderr
    assert (run / "checkpoints" / "step-00000006").is_dir()
    assert not (run / "checkpoints" / "step-00000008").exists()
    again = pretrain(*words, processes=PROCESSES[grid])
    assert again.returncode == 0, again.stderr
    same_run(run, undisturbed(grid))
    row(f"SIGTERM ({grid})", "the same update", f"checkpoint and end in {lasted:.0f} s")


FORKED_TORCHRUN = """
import inspect, subprocess
import torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler as handler
from torch.distributed.run import main
handler.Popen = subprocess.Popen  # of tests.forks, also where torch was imported before
inspect.getmodule = lambda *_: None  # of torchrun's stack at each turn: slow with all that is here
main()
"""
"""torchrun itself in a fork, and its workers as forks of that: nobody imports anything again."""


def start_torchrun(
    how: str, folder: Path, words: list[str], restarts: int = 0
) -> subprocess.Popen[str] | WarmProcess:
    """torchrun with two workers that run a script with words, forked or as a user starts it."""
    command = torchrun(2, restarts)
    if how == "started":
        log = (folder / "stderr").open("w")
        return subprocess.Popen(
            [*command, *words], env=environment(), start_new_session=True, text=True,
            stdout=subprocess.DEVNULL, stderr=log,
        )  # fmt: skip
    script = folder / "torchrun.py"
    script.write_text(FORKED_TORCHRUN)
    return start_processes([*command[command.index("--standalone") :], *words], script=script)


def errors_of(process: subprocess.Popen[str] | WarmProcess, folder: Path) -> str:
    """Standard error of what `start_torchrun` started, so far."""
    if isinstance(process, WarmProcess):
        return process.errors()
    return (folder / "stderr").read_text(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("how", STARTS)
def test_the_launcher_is_killed(
    how: str, data: Path, tmp_path: Path, undisturbed: Callable[[str], Path],
    row: Callable[..., None],
) -> None:  # fmt: skip
    """kill -9 of torchrun alone: its workers go on to the end."""
    marker, words = tmp_path / "marker", words_of(tmp_path, data, *GRIDS["data"])
    script = [str(HERE / "interrupted.py"), "slow", str(marker)]
    process = start_torchrun(how, tmp_path, [*script, *words])
    wait_until(lambda: marker.exists() or process.poll() is not None, 300, "the moment")
    assert process.poll() is None, errors_of(process, tmp_path)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, living = psutil.wait_procs(workers, timeout=300)
    assert not living
    same_run(tmp_path / "run", undisturbed("data"))
    row("kill -9 of the launcher", "-", "not disturbed")


@pytest.mark.slow
@pytest.mark.parametrize("how", STARTS)
def test_a_dead_rank_is_started_again(
    how: str, data: Path, tmp_path: Path, undisturbed: Callable[[str], Path],
    row: Callable[..., None],
) -> None:  # fmt: skip
    """kill -9 of one rank: torchrun starts all again, and nothing is lost."""
    words = words_of(tmp_path, data, "grid.zero_stage=0")
    script = [str(HERE / "faulty.py"), "kill", "1", "6"]
    began = time.monotonic()
    process = start_torchrun(how, tmp_path, [*script, *words], restarts=1)
    code = process.wait(timeout=240)
    said = errors_of(process, tmp_path)
    assert code == 0, said
    same_weights(tmp_path / "run", undisturbed("data"))
    assert metrics_of(tmp_path / "run") == metrics_of(undisturbed("data"))
    starts = json.loads((tmp_path / "run/environment.json").read_text())
    assert len(starts) == 2, f"{len(starts)} starts made the run folder or went on:\n{said}"
    row("kill -9 of one rank of two", "torchrun's next look",
        f"{time.monotonic() - began:.0f} s for both starts together")  # fmt: skip


@pytest.mark.slow
def test_a_rank_that_stands_still(
    data: Path, tmp_path: Path, undisturbed: Callable[[str], Path], row: Callable[..., None]
) -> None:
    """SIGSTOP of one rank: the others say who it is and end; started again, the run goes on."""
    words = words_of(tmp_path, data, "grid.zero_stage=0", "faults.watchdog=10")
    began = time.monotonic()
    done = faulty("stop", 1, "6", words, processes=2)
    lasted = time.monotonic() - began
    assert done.returncode != 0 and lasted < 200
    summary = (tmp_path / "run/stacks/summary.txt").read_text()
    assert "rank 1 (step" in summary and "gives no sign of life" in summary, summary
    assert "rank 0 (step 5): waits in" in summary
    assert "train_step" in (tmp_path / "run/stacks/rank-00000.txt").read_text()
    again = pretrain(*words, processes=2)
    assert again.returncode == 0, again.stderr
    same_weights(tmp_path / "run", undisturbed("data"))
    assert metrics_of(tmp_path / "run") == metrics_of(undisturbed("data"))
    row("SIGSTOP of one rank of two", "its 10 s, and the process is named", "the next start")


def test_a_process_that_hangs_alone(data: Path, tmp_path: Path) -> None:
    words = words_of(tmp_path, data, "faults.watchdog=10")
    words = ["step", str(tmp_path / "marker"), *words]
    done = run_processes(words, 1, 150, HERE / "interrupted.py")
    assert done.returncode == TRY_AGAIN
    assert "nothing was finished for 10 s (step 5, training)" in done.stderr
    assert "waits in" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.long
def test_a_machine_is_gone_and_the_job_goes_on_smaller(
    data: Path, tmp_path: Path, undisturbed: Callable[[str], Path], row: Callable[..., None]
) -> None:
    """Two torchrun agents, one is killed with its worker: the other goes on with one process."""
    words = words_of(tmp_path, data, "ranks.every=100", "evaluation.every=200", steps=200)
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1",
        "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "smaller",
        "--rdzv-endpoint", f"127.0.0.1:{port}",
        "--rdzv-conf", "last_call_timeout=5", "-m", "pretrain", *words,
    ]  # fmt: skip
    agents = []
    for number in range(2):  # the first hosts the store
        log = (tmp_path / f"agent{number}.log").open("wb")
        agents.append(subprocess.Popen(meeting, env=environment(), stdout=log, stderr=log))
        time.sleep(2.0)
    try:
        wait_until(lambda: newest_step(run) > 20, 300, "both to train")
        kill_all(agents[1])
        killed, at = time.monotonic(), newest_step(run)
        wait_until(lambda: len(json.loads((run / "environment.json").read_text())) > 1, 300)
        wait_until(lambda: newest_step(run) > at, 300, "the other to go on")
        lasted = time.monotonic() - killed
        assert agents[0].wait(timeout=300) == 0, (tmp_path / "agent0.log").read_text()[-3000:]
    finally:
        for agent in agents:
            if agent.poll() is None:
                kill_all(agent)
    starts = json.loads((run / "environment.json").read_text())
    assert "data 2" in starts[0]["grid"] and "data 1" in starts[-1]["grid"]
    assert [one["step"] for one in read_metrics(run)] == list(range(1, 201))
    whole = words_of(tmp_path / "whole", data, "ranks.every=100", "evaluation.every=200", steps=200)
    done = pretrain(*whole)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses_of(run), losses_of(tmp_path / "whole/run"), rtol=1e-3)
    row("one machine of two is gone for good", "the next collective",
        f"{lasted:.0f} s, with one data-parallel rank", weights="losses to 1e-3")  # fmt: skip


def test_random_kills(
    data: Path, tmp_path: Path, row: Callable[..., None], request: pytest.FixtureRequest
) -> None:
    """kill -9 at random moments of one run, again and again: the weights of an undisturbed one."""
    times, each = (50, 60) if request.config.getoption("--long") else (3, 30)
    steps = each * times
    words = words_of(tmp_path, data, "evaluation.every=1000", "faults.watchdog=0", steps=steps)
    whole = words_of(tmp_path / "whole", data, "evaluation.every=1000", steps=steps)
    done = pretrain(*whole, timeout=1200)
    assert done.returncode == 0, done.stderr
    rng = random.Random(7)
    run = tmp_path / "run"
    for number in range(times):
        killed = start_and_kill(words, run, rng)
        assert killed, f"ended by itself after {number} kills"
    done = pretrain(*words, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert [one["step"] for one in read_metrics(run)] == list(range(1, steps + 1))
    same_run(run, tmp_path / "whole/run")
    row("kill -9 at random moments of one run", "the next start", "the last checkpoint", times)


def start_and_kill(words: list[str], run: Path, rng: random.Random) -> bool:
    """Start, wait for a moment by chance, kill -9; whether there was something to kill."""
    process = start_processes(words)
    if rng.random() < 0.8:  # while it trains; else while it starts
        at = newest_step(run)
        wait_until(lambda: newest_step(run) > at or process.poll() is not None, 300)
        time.sleep(0.3 * rng.random())
    else:
        time.sleep(rng.random())
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive
