"""Rounds of a sweep with an executor that starts nothing: tries, preemptions, slots."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import launchers.sweeps
from launchers.local import LocalExecutor
from launchers.slurm import SlurmExecutor
from pretrain.checkpoint.manifest import MANIFEST
from pretrain.checkpoint.reader import CHECKPOINTS, checkpoint_name, list_checkpoints
from pretrain.distributed.jobs import Job
from pretrain.errors import TRY_AGAIN
from pretrain.sweep.config import load_sweep
from pretrain.sweep.run import run_sweep
from pretrain.sweep.status import Status
from tests.slurm import stand_in
from tests.tools import ATTENTION, run, write_recipe, write_sweep

STEPS = 50
End = tuple[int, str]
"""How a start ends: its exit code, and what it leaves: nothing, checkpoint or done."""


class Scripted:
    """An executor whose jobs end at once, each start as its run's script says.

    What a start leaves is a folder with a checkpoint's name and manifest in the run's.
    """

    def __init__(self, scripts: dict[str, list[End]], slots: int) -> None:
        self.slots = slots
        self.scripts = {name: iter(ends) for name, ends in scripts.items()}
        self.starts = dict.fromkeys(scripts, 0)
        self.most = 0
        self._ended: dict[str, int] = {}

    def submit(self, jobs: list[Job]) -> None:
        for job in jobs:
            code, leaves = next(self.scripts[job.name])
            self.starts[job.name] += 1
            folder = Path(job.words[job.words.index("--out") + 1]) / CHECKPOINTS
            if leaves != "nothing":
                step = STEPS if leaves == "done" else len(list_checkpoints(folder)) + 1
                (folder / checkpoint_name(step)).mkdir(parents=True)
                (folder / checkpoint_name(step) / MANIFEST).write_text("{}")
            self._ended[job.name] = code
        self.most = max(self.most, len(jobs))

    def poll(self) -> dict[str, int]:
        ended, self._ended = self._ended, {}
        return ended

    def stop(self) -> None:
        raise AssertionError("nothing was to be stopped")


def rounds(path: Path, out: Path, executor: Scripted, retries: int) -> dict[str, Status]:
    statuses = run_sweep(load_sweep(path, out), out, executor, retries, pause=0.0)
    return {status.task.name: status for status in statuses}


def expected(ends: Iterator[End], retries: int) -> tuple[str, int]:
    """State and starts: only a start that ends without 75 and a new checkpoint is a try."""
    tries = 0
    for starts, (code, leaves) in enumerate(ends, 1):
        if leaves == "done":
            return "done", starts
        tries += not (code == TRY_AGAIN and leaves == "checkpoint")
        if tries > retries:
            return "failed", starts
    raise AssertionError("a script without an end")


@pytest.mark.slow
def test_preemptions_are_no_tries(data: Path, tmp_path: Path) -> None:
    """Random histories: who gets further each time goes on for ever, another run does not."""
    path = write_sweep(tmp_path, data, STEPS)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["evaluation"]["at_end"] = "none"
    write_recipe(tmp_path / "recipe.yaml", recipe)
    names = [task.name for task in load_sweep(path, tmp_path / "runs").tasks]
    rng = random.Random(4)
    seen = set()
    for number, retries in enumerate((0, 0, 1, 2, 3) * 4):
        scripts = {}
        for name in names:
            kinds = [(TRY_AGAIN, "checkpoint")] * 6 + [
                (TRY_AGAIN, "nothing"), (1, "checkpoint"), (1, "nothing"), (-9, "nothing"),
                (0, "done"),
            ]  # fmt: skip
            scripts[name] = [*rng.choices(kinds, k=rng.randint(0, 9)), (0, "done")]
        executor = Scripted(scripts, rng.randint(1, 9))
        found = rounds(path, tmp_path / f"runs-{number}", executor, retries)
        for name, ends in scripts.items():
            wanted = expected(iter(ends), retries)
            assert (found[name].state, executor.starts[name]) == wanted, (ends, retries)
            seen.add((wanted[0], wanted[1] > retries + 1))
        assert executor.most <= executor.slots
    assert seen >= {("done", True), ("done", False), ("failed", True), ("failed", False)}


def test_a_job_that_left_the_queue_of_slurm_may_have_been_preempted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why it left is not known: whether it got further tells."""
    executor = SlurmExecutor.__new__(SlurmExecutor)
    executor._jobs = {"a": "12_0", "b": "12_1"}
    monkeypatch.setenv("PATH", stand_in(tmp_path, "squeue", "12_1 RUNNING"))
    assert executor.poll() == {"a": TRY_AGAIN} and list(executor._jobs) == ["b"]


@pytest.mark.parametrize(("parallel", "slots"), [(64, 3), (3, 3), (2, 2), (1, 1)])
def test_cores_are_shared_out_among_the_runs_that_there_are(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: int, slots: int
) -> None:
    path = write_sweep(tmp_path, data, grid={ATTENTION: [0, 1, 5]}, seeds=[1], baseline=None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(48)))
    monkeypatch.setattr("launchers.local.usable_cores", lambda: 48)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads: list[Any] = []

    def look(tasks: Any, out: Path, executor: LocalExecutor, tries: int) -> list[Status]:
        threads.append((executor.slots, executor._environment(0, 1)["OMP_NUM_THREADS"]))
        return []

    monkeypatch.setattr(launchers.sweeps, "run_sweep", look)
    words = ["sweep", str(path), "--out", str(tmp_path / "runs"), "--parallel", str(parallel)]
    assert run(monkeypatch, *words) == 0
    assert threads == [(slots, str(48 // slots))]
