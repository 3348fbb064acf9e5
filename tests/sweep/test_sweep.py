"""Sweeps: expansion, kills, a point added later, two at once, forks, Slurm, mistakes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launchers.local import LocalExecutor, default_slots
from pretrain.config.recipe import Config, load_config
from pretrain.config.schedule import exposure
from pretrain.errors import UsageError
from pretrain.runs.folder import read_ranks
from pretrain.runs.identity import read_identity, read_trunks
from pretrain.runs.lock import BusyError, RunLock, is_busy
from pretrain.runs.metrics import read_metrics
from pretrain.sweep.config import load_sweep
from pretrain.sweep.run import is_done
from tests.tools import (
    ATTENTION,
    MLP,
    environment,
    metrics_of,
    pretrain,
    run,
    start_processes,
    sweep_words,
    weights_of,
    write_sweep,
)
from tests.warm import run_warm


def runs_of(out: Path) -> dict[str, Path]:
    return {path.name: path for path in out.iterdir() if (path / "config.yaml").exists()}


def changed_at(out: Path) -> dict[str, int]:
    """When each run last logged."""
    return {name: (one / "metrics.jsonl").stat().st_mtime_ns for name, one in runs_of(out).items()}


def same_runs(out: Path, reference: Path, names: set[str]) -> None:
    """Runs whose metrics, tables, weights and scores are the same bits."""
    mine, other = runs_of(out), runs_of(reference)
    for name in names:
        a, b = mine[name], other[name]
        assert metrics_of(a) == metrics_of(b), name
        assert repr(read_ranks(a)) == repr(read_ranks(b)), name
        assert read_identity(a) == read_identity(b), name
        weights, wanted = weights_of(a), weights_of(b)
        assert all((weights[key] == value).all() for key, value in wanted.items()), name
        scores = [json.loads((path / "evaluation.json").read_text()) for path in (a, b)]
        assert scores[0] == scores[1], name


# --- running -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_twice_then_a_point_more(
    data: Path, tmp_path: Path, swept: Path, request: pytest.FixtureRequest
) -> None:
    """kill -9 of the sweep and all its children, twice; then one run more, alone."""
    seeds = [1, 2] if request.config.getoption("--long") else [1]
    path, out, count = write_sweep(tmp_path, data, seeds=seeds), tmp_path / "runs", 4 * len(seeds)
    rng = random.Random(3)

    def logged() -> int:
        return sum(len(read_metrics(run)) for run in runs_of(out).values()) if out.exists() else 0

    for _ in range(2):
        before_it = logged()
        process = start_processes(sweep_words(path, out))
        while logged() <= before_it and process.poll() is None:  # a resumed run logs again
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.75 * len(seeds)))
        assert process.poll() is None, "over before it could be killed"
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for one in family:
            one.kill()
        process.wait()
    assert 0 < logged() < count * 50
    done = pretrain(*sweep_words(path, out, "--json"), timeout=500)
    assert done.returncode == 0, done.stderr
    states = json.loads(done.stdout)
    assert len(states) == count and {one["state"] for one in states.values()} == {"done"}
    same_runs(out, swept, set(states))
    # One point more, for one seed: it runs alone.
    before = {
        name: (run / "metrics.jsonl").stat().st_mtime_ns for name, run in runs_of(out).items()
    }
    values = yaml.safe_load(path.read_text())
    path.write_text(
        yaml.safe_dump({**values, "points": [{ATTENTION: 1.0, MLP: 0.1}], "seeds": [1]})
    )
    done = pretrain(*sweep_words(path, out), timeout=200)
    assert done.returncode == 0, done.stderr
    after = changed_at(out)
    assert {name for name in after if after[name] != before.get(name)} == {
        "attention=1,mlp=0.1,seed=1"
    }


@pytest.mark.slow
def test_two_sweeps_and_a_failing_run(data: Path, tmp_path: Path) -> None:
    """Two processes share the work of one folder; a run that cannot train is tried and reported."""
    grid = {ATTENTION: [0.5, 1.0], "optimizer.learning_rate": [3e-3]}
    bad = {ATTENTION: 0.5, "optimizer.learning_rate": 1e30}
    path = write_sweep(
        tmp_path, data, steps=20, grid=grid, points=[bad], seeds=1, retries=1, baseline=None
    )
    out = tmp_path / "runs"
    both = [start_processes(sweep_words(path, out, "--json"), timeout=500) for _ in range(2)]
    answers = [process.communicate(timeout=400) for process in both]
    for process, (stdout, stderr) in zip(both, answers, strict=True):
        assert process.returncode == 1, stderr
        states = json.loads(stdout)
        failed = {name for name, one in states.items() if one["state"] == "failed"}
        assert failed == {"learning_rate=1e+30,attention=0.5,seed=7"}
        assert "the loss is" in states[failed.pop()]["note"]
        assert sum(one["state"] == "done" for one in states.values()) == 2
    for name, one in runs_of(out).items():
        steps = [row["step"] for row in read_metrics(one)]
        assert steps == sorted(set(steps)), name  # nobody trained a step twice
        starts = json.loads((one / "environment.json").read_text())
        if "1e+30" not in name:
            assert len(starts) == 1, name


@pytest.mark.slow
def test_ctrl_c_and_fork(data: Path, tmp_path: Path) -> None:
    """Arms of one trunk share its weights; Ctrl-C stops everything and the same words go on.

    The first start is of new interpreters, as a user makes it.
    """
    path = write_sweep(
        tmp_path, data, steps=20, grid={ATTENTION: [0, 5.0]}, seeds=[1], fork={"step": 10},
        baseline={ATTENTION: 0},
    )  # fmt: skip
    out = tmp_path / "runs"
    command = [sys.executable, "-m", "pretrain", *sweep_words(path, out)]
    process = subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, text=True,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (out / "trunk,seed=1" / "config.yaml").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert not any("pretrain" in " ".join(one.cmdline()) and str(out) in " ".join(one.cmdline())
                   for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"])  # fmt: skip
    done = pretrain(*sweep_words(path, out), timeout=200)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_metrics(out / "trunk,seed=1")] == list(range(1, 11))
    arms = [out / f"attention={value},seed=1" for value in (0, 5)]
    assert all([r["step"] for r in read_metrics(arm)] == list(range(11, 21)) for arm in arms)
    first, second = (read_metrics(arm) for arm in arms)
    assert first[0]["loss"] == second[0]["loss"] and first[-1]["loss"] != second[-1]["loss"]
    assert read_identity(arms[0]) == read_identity(arms[1])
    assert read_identity(arms[0]) != read_identity(out / "trunk,seed=1")
    began = read_identity(out / "trunk,seed=1")
    assert began and [read_trunks(arm) for arm in arms] == [[began["initial_weights"]]] * 2


@pytest.mark.slow
def test_on_slurm(data: Path, tmp_path: Path, swept: Path, slurm: dict[str, str]) -> None:
    """One seed of the sweep as a job array over two nodes, two runs on each: the same numbers."""
    path, out = write_sweep(tmp_path, data, seeds=[1]), tmp_path / "runs"
    words = ["sweep", str(path), "--out", str(out), "--launcher", "slurm", "--slurm", "time=30"]
    done = run_warm([*words, "--json"], slurm, tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr
    states = json.loads(done.stdout)
    assert len(states) == 4 and {one["state"] for one in states.values()} == {"done"}
    same_runs(out, swept, set(states))
    jobs = json.loads((out / "slurm" / "jobs.json").read_text())
    assert len({number.partition("_")[0] for number in jobs.values()}) == 1  # one array


@pytest.mark.slow
def test_two_tasks_on_slurm(data: Path, tmp_path: Path, slurm: dict[str, str]) -> None:
    """A run of two processes, one on each node."""
    path = write_sweep(
        tmp_path, data, steps=10, grid={ATTENTION: [1.0]}, seeds=[1], baseline=None, processes=2,
        set={"grid.tensor_parallel": 2},
    )  # fmt: skip
    out = tmp_path / "runs"
    words = ["sweep", str(path), "--out", str(out), "--launcher", "slurm"]
    words += ["--slurm", "nodes=2", "--slurm", "tasks_per_node=1", "--slurm", "time=30"]
    done = run_warm(words, slurm, tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    starts = json.loads((out / "attention=1,seed=1" / "environment.json").read_text())
    assert "tensor 2" in starts[0]["grid"]


# --- expansion -----------------------------------------------------------------------------------


def test_expansion(data: Path, tmp_path: Path) -> None:
    ranges = {MLP: {"from": 0.01, "to": 1, "count": 3, "scale": "log"}}
    path = write_sweep(
        tmp_path, data, grid=ranges, exposure={ATTENTION: [0, 0.5]}, seeds=2,
        points=[{ATTENTION: "3e-1"}], baseline={MLP: 0.1, ATTENTION: 0.5},
    )  # fmt: skip
    sweep = load_sweep(path, tmp_path / "runs")
    assert len(sweep.points) == 7 and len(sweep.tasks) == 14
    assert {task.config.seed for task in sweep.tasks} == {7, 8}  # the recipe's and the next
    assert sweep.baseline and sweep.baseline.name == "mlp=0.1,attention=0.5"
    for task in sweep.tasks:
        assert task.point
        config: Config = task.config
        rates = [config.learning_rate(step) for step in range(config.train.steps)]
        decay = config.optimizer.weight_decay.attention or 0.0
        assert exposure(rates, decay) == pytest.approx(task.point.given[ATTENTION], rel=1e-5)
    assert [point.given[MLP] for point in sweep.points[:6:2]] == [0.01, 0.1, 1.0]
    assert not any(is_done(task) for task in sweep.tasks)
    forked = write_sweep(
        tmp_path, data, grid={}, exposure={ATTENTION: [0.5]}, baseline=None, fork={"step": 30}
    )
    arm = load_sweep(forked).tasks[1].config
    rates = [arm.learning_rate(step) for step in range(30, 50)]  # of the arm alone
    assert exposure(rates, arm.optimizer.weight_decay.attention or 0.0) == pytest.approx(
        0.5, rel=1e-5
    )


@pytest.mark.slow
def test_dry_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Timed in a process that is started."""
    path = write_sweep(tmp_path, data)
    words = sweep_words(path, tmp_path / "runs", "--dry-run", "--json", "--price", "2")
    assert run(monkeypatch, *words) == 0
    found = json.loads(capfd.readouterr().out)
    assert len(found["runs"]) == 8 and found["open"] == 8
    assert found["tokens"] == 8 * 50 * 8 * 32
    assert found["timing"]["step"] > 0 and found["seconds"] >= found["seconds_a_run"]
    assert found["cost"] == pytest.approx(2 * found["process_hours"])
    assert found["timing"]["peak_memory_gib"] > 0.05
    assert "per_gpu" not in found  # there is none
    assert not (tmp_path / "runs").exists()


def test_cores_and_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,5")
    assert default_slots(1) == 4 and default_slots(2) == 2 and default_slots(8) == 1
    executor = LocalExecutor(2)
    seen = [executor._environment(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(2)]
    assert seen == ["0,1", "2,5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert default_slots(1) == 1
    assert LocalExecutor(4)._environment(0, 2)["OMP_NUM_THREADS"] == "2"
    assert LocalExecutor(1)._environment(0, 1)["OMP_NUM_THREADS"] == "16"


def test_lock(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    assert not is_busy(tmp_path)
    first.acquire()
    assert is_busy(tmp_path)
    with pytest.raises(BusyError, match="another process"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


# --- mistakes -----------------------------------------------------------------------------

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"grid": {"optimizer.weight_decay.atention": [0, 1]}}, "did you mean attention"),
    ({"grid": {"nothing.here": [0, 1]}}, "unknown key"),
    ({"grid": {ATTENTION: [-1.0]}, "baseline": None}, "greater than or equal to 0"),
    ({"grid": {ATTENTION: []}}, "no values"),
    ({"grid": {}, "baseline": None}, "nothing varies"),
    ({"grid": {"seed": [1, 2]}, "baseline": None}, "belongs to seeds"),
    ({"baseline": {ATTENTION: 0.7, MLP: 0.1}}, "is not a point of the sweep"),
    ({"seeds": [1, 1]}, "seeds"),
    ({"seeds": []}, "seeds"),
    ({"exposure": {ATTENTION: [1]}}, "in grid and in exposure"),
    ({"fork": {"step": 50}}, "fork.step"),
    ({"recipe": "missing.yaml"}, "missing.yaml"),
    ({"retrys": 3}, "did you mean retries"),
    ({"grid": {MLP: {"from": 0, "to": 1, "count": 3, "scale": "log"}}}, "positive ends"),
    ({"set": {"train.stepps": 4}}, "did you mean steps"),
]


@pytest.mark.parametrize(("change", "words"), MISTAKES)
def test_mistakes(data: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write_sweep(tmp_path, data, **change)
    with pytest.raises(UsageError, match=words) as error:
        load_sweep(path)
    assert str(error.value).startswith((str(path), str(path.parent)))
    assert "\n" not in str(error.value)


def test_words_that_are_wrong(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(write_sweep(tmp_path, data))
    assert run(monkeypatch, "sweep", path, "--launcher", "cloud") == 2
    assert "is not local or slurm" in capfd.readouterr().err
    assert run(monkeypatch, "sweep", str(tmp_path / "no.yaml")) == 2
    assert "cannot read the sweep" in capfd.readouterr().err
    assert load_config(tmp_path / "recipe.yaml").train.steps == 50
