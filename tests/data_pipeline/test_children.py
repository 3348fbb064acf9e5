"""Helper processes and the signals that a terminal or a scheduler sends to every process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from data_pipeline.children import leave_signals_to_parent, signals_held_back
from pretrain.training.loader import Loader
from tests.tools import ROOT, environment

SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)


@pytest.mark.parametrize("early", [False, True])
def test_a_worker_leaves_signals_to_its_parent(early: bool) -> None:
    others = set(active_children())  # of earlier tests
    with signals_held_back(workers=True):
        pool = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=leave_signals_to_parent, initargs=(600.0,)
        )
        first = pool.submit(os.getpid)
    (process,) = set(active_children()) - others
    assert process.pid
    if not early:
        assert first.result() == process.pid
    for number in SIGNALS:
        os.kill(process.pid, number)
    assert first.result() == process.pid == pool.submit(os.getpid).result()
    os.kill(process.pid, signal.SIGTERM)  # the second one ends it
    with pytest.raises(BrokenProcessPool):
        pool.submit(time.sleep, 60).result()
    pool.shutdown()


@pytest.mark.slow
def test_a_worker_ends_some_time_after_its_first_sigterm() -> None:
    context = get_context("spawn")
    with signals_held_back(workers=True):
        process = context.Process(target=_wait, args=(0.2,))
        process.start()
    process.terminate()
    process.join(30)
    assert process.exitcode == 1


def _wait(seconds: float) -> None:
    leave_signals_to_parent(seconds)
    time.sleep(60)


def test_the_command_gets_its_signal_after_the_block() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
    try:
        with signals_held_back():
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            assert not came
        assert came == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


class Numbers:
    """Samples that are their number."""

    def __init__(self) -> None:
        self.shares: dict[str, float] = {}

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([number]), np.array([number])


@pytest.mark.slow
def test_workers_that_load_batches_outlive_a_signal_to_all() -> None:
    """A scheduler's warning must not end them: the run goes on to its next checkpoint.

    In a process of its own, whose first worker starts multiprocessing's other helpers.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.data_pipeline.test_children"], cwd=ROOT, env=environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def main() -> None:
    """Read batches, signal every helper, and read more than were read ahead."""
    grid: Any = SimpleNamespace(device=torch.device("cpu"), data=1, data_rank=0)
    loader = Loader(Numbers(), grid, 2, 1, 0, 0, workers=1)
    read = [int(next(loader)[0]) for _ in range(3)]
    helpers = psutil.Process().children(recursive=True)  # the tracker and the fork server, too
    assert len(helpers) >= 3
    for child in helpers:
        for number in SIGNALS:
            child.send_signal(number)
    time.sleep(0.3)
    assert [child.status() for child in helpers].count(psutil.STATUS_ZOMBIE) == 0
    read += [int(next(loader)[0]) for _ in range(20)]
    assert read == list(range(23))


if __name__ == "__main__":
    main()
