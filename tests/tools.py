"""Helpers of the tests: recipes, real processes, comparisons of run folders."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from launchers.local import start_environment, torchrun
from pretrain.__main__ import app, run_command
from pretrain.checkpoint.reader import Checkpoint, list_checkpoints
from pretrain.distributed.signals import SIGNALS
from pretrain.runs.folder import read_ranks
from pretrain.runs.metrics import read_metrics
from tests.warm import WarmProcess, run_warm

ROOT = Path(__file__).resolve().parent.parent
TIMED = ("seconds", "tokens_per_second", "time", "device")

DIALECTS: dict[str, dict[str, Any]] = {
    "gpt2": {"dialect": "gpt2"},
    "gpt_neox": {"dialect": "gpt_neox"},
    "llama": {"dialect": "llama", "num_key_value_heads": 2},
}


def base_recipe(data: Path) -> dict[str, Any]:
    """A recipe that trains in a second."""
    return {
        "seed": 7,
        "model": {
            "dialect": "gpt2",
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "context": 32,
        },
        "data": {"path": str(data)},
        "train": {"steps": 6, "global_batch": 8},
        "precision": "fp32",
        "optimizer": {
            "learning_rate": 3e-3,
            "weight_decay": {"default": 0.1, "attention": 0.5},
        },
        "evaluation": {"every": 3, "documents": 6, "batch": 24, "at_end": "sample"},
        "ranks": {"every": 3, "spectra": True},
        "checkpoint": {"every": 3, "keep": 0},
    }


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    """Write a recipe file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def environment() -> dict[str, str]:
    """What child processes need: the repository on the path, one thread each."""
    more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return {**start_environment(1), **more}


def launcher(processes: int) -> list[str]:
    """The words before a script that start it on so many processes."""
    return [sys.executable] if processes == 1 else torchrun(processes)


def run_workers(processes: int, task: str, cases: list[dict[str, Any]], folder: Path) -> list[Any]:
    """Run ``tests/worker.py`` on real processes; returns what rank 0 wrote for each case.

    Raises:
        AssertionError: with the end of the output, if a process failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    request, answer = folder / "cases.json", folder / "answer.json"
    request.write_text(json.dumps({"task": task, "cases": cases, "answer": str(answer)}))
    done = run_processes(
        [str(request)], processes, timeout=560, script=ROOT / "tests" / "worker.py"
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    answers: list[Any] = json.loads(answer.read_text())
    return answers


def write_library(folder: Path) -> Path:
    """A folder of sources, as many as a corpus needs."""
    folder.mkdir()
    for number in range(110):
        (folder / f"m{number}.py").write_text(f"value = {number}\n" + "# text\n" * 60)
    return folder


def assert_one_line(text: str, culprits: tuple[str, ...]) -> None:
    """Standard error ends with one line of ours, which names the culprits."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in text, text
    assert text.rstrip().endswith(errors[0])
    for culprit in culprits:
        assert culprit in errors[0], (culprit, errors[0])


def train_models(folder: Path, data: Path, models: dict[str, dict[str, Any]]) -> dict[str, Path]:
    """A short run of each model, by name, trained in one process."""
    cases = []
    for name, model in models.items():
        recipe = deepcopy(base_recipe(data))
        recipe["model"] |= model
        recipe["optimizer"]["learning_rate"] = 1e-2
        cases.append({"recipe": recipe, "run": str(folder / name)})
    run_workers(1, "train", cases, folder / "workers")
    return {name: folder / name for name in models}


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that one process of the tests fills and all of them read.

    Args:
        name: of the folder, beside those of the tests.
        make: fills the empty folder; the others wait for it.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # that of all workers
    folder, made = base / f"once-{name}", base / f"once-{name}.made"
    with (base / f"once-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own at ``folder`` (tmpfs); the test is skipped where that takes root."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def pretrain(
    *words: str, processes: int = 1, timeout: int = 240
) -> subprocess.CompletedProcess[str]:
    """The command line in processes of its own, forked with everything imported."""
    return run_processes(list(words), processes, timeout)


def pretrain_cold(
    *words: str, processes: int = 1, timeout: int = 240
) -> subprocess.CompletedProcess[str]:
    """The command line as a user starts it: new interpreters, torchrun for several."""
    command = [*launcher(processes), "-m", "pretrain", *words]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def run_processes(
    words: list[str], processes: int, timeout: float, script: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The command line, or a script, on forked processes of a warm server."""
    with tempfile.TemporaryDirectory() as folder:
        return run_warm(
            words, environment(), Path(folder), script=script, processes=processes, timeout=timeout
        )


def start_processes(
    words: list[str], processes: int = 1, script: Path | None = None, timeout: float = 240.0
) -> WarmProcess:
    """The same beside the test, which may signal it and waits for its end."""
    return WarmProcess(words, environment(), script, processes, timeout)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Every logged line without what a clock decides."""
    rows = [row for kind in ("train", "ranks", "evaluation") for row in read_metrics(run, kind)]
    return [{key: row[key] for key in row if key not in TIMED} for row in rows]


def weights_of(run: Path) -> dict[str, np.ndarray]:
    """Masters and moments of the newest checkpoint, by name."""
    checkpoint = Checkpoint(list_checkpoints(run / "checkpoints")[-1])
    return {
        f"{name}/{key}": checkpoint.full(name, key).numpy()
        for name in checkpoint.parameters
        for key in checkpoint.keys(name)
    }


def losses_of(run: Path) -> np.ndarray:
    """Training losses, one per step."""
    return np.array([row["loss"] for row in read_metrics(run)])


def spectra_of(run: Path) -> dict[tuple[Any, ...], np.ndarray]:
    """Singular values by (step, layer, product, level, head)."""
    keys = ("step", "layer", "product", "level", "head")
    return {
        tuple(row[key] for key in keys): np.array(row["singular_values"]) for row in read_ranks(run)
    }


def check_theory(run: Path) -> int:
    """nuclear ≤ bound and gap ≤ ceiling for every measured head; returns how many."""
    rows = read_ranks(run)
    for row in rows:
        bound, nuclear = row["frobenius_bound"], row["nuclear_norm"]
        if not math.isnan(bound):  # not marked as not applicable
            assert nuclear <= bound * (1 + 1e-9), row
            assert bound - nuclear <= row["theory_ceiling"] + 1e-7 * bound, row
    assert rows
    return len(rows)


def run(monkeypatch: pytest.MonkeyPatch, *words: str, command: Callable[..., object] = app) -> int:
    """The command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["pretrain", *words])
    try:
        return run_command(command)
    finally:
        SIGNALS.restore()


def draw_small(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Draw figures in few points, without a search for the places of their texts.

    That search takes most of the time. Everything else is drawn and written as ever.

    Args:
        put: `setattr`, or that of a monkeypatch.
    """
    from matplotlib.figure import Figure

    save, lay_out = Figure.savefig, Figure.set_layout_engine

    def save_small(self: Figure, *words: Any, **more: Any) -> None:
        save(self, *words, **{**more, "dpi": 20})

    put(Figure, "savefig", save_small)
    put(Figure, "set_layout_engine", lambda self, *_, **more: lay_out(self, "none"))


STARTS = ["forked", pytest.param("started", marks=pytest.mark.long)]
"""How a program begins: as a fork that has everything imported, or as a user starts it."""


def by_form(short: int, long: int) -> int:
    """A size that the short form of the suite makes smaller (`--long`)."""
    return long if "TESTS_LONG" in os.environ else short


ATTENTION = "optimizer.weight_decay.attention"
MLP = "optimizer.weight_decay.mlp"


def write_sweep(folder: Path, data: Path, steps: int = 50, **more: Any) -> Path:
    """A sweep over attention x MLP decay and two seeds, with its recipe beside it."""
    recipe = deepcopy(base_recipe(data))
    recipe["train"]["steps"] = steps
    recipe["checkpoint"] = {"every": 10, "keep": 1}
    recipe["ranks"] = {"every": 10}
    recipe["evaluation"] = {"every": 25, "documents": 6, "batch": 24, "at_end": "all"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    values = {
        "recipe": "recipe.yaml",
        "grid": {ATTENTION: [0, 5.0], MLP: [0.1, 1.0]},
        "seeds": [1, 2],
        "baseline": {ATTENTION: 0, MLP: 0.1},
        **more,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def sweep_words(path: Path, out: Path, *more: str) -> list[str]:
    return ["sweep", str(path), "--out", str(out), "--parallel", "2", *more]
