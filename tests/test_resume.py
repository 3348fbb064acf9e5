"""kill -9 at any moment, start again with the same words: as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from pretrain.run import read_ranks
from tests.tools import (
    DIALECTS,
    ROOT,
    base_recipe,
    environment,
    launcher,
    losses_of,
    metrics_of,
    pretrain,
    run_workers,
    weights_of,
    write_recipe,
)


def recipe_words(folder: Path, data: Path, processes: int) -> list[str]:
    values = base_recipe(data)
    values["train"]["steps"] = 10
    values["checkpoint"]["every"] = 4
    values["grid"] = {"pipeline_parallel": processes}
    return ["train", str(write_recipe(folder / "recipe.yaml", values))]


def started_until(
    moment: str, marker: Path, words: list[str], processes: int
) -> subprocess.Popen[str]:
    """The command line in a session of its own, come to a moment of ``tests/interrupted.py``."""
    script = [str(ROOT / "tests/interrupted.py"), moment, str(marker)]
    process = subprocess.Popen(
        [*launcher(processes), *script, *words],
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not marker.exists():
        assert time.monotonic() < deadline and process.poll() is None, "never came to the moment"
        time.sleep(0.02)
    return process


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run that nobody interrupts, on one process and on two pipeline stages."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp("undisturbed")
        words = recipe_words(folder, data, processes)
        done = pretrain(*words, "--out", str(folder / "run"), processes=processes)
        assert done.returncode == 0, done.stderr
        found[processes] = folder / "run"
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "processes"),
    [("step", 1), ("checkpoint", 1), ("evaluation", 1), ("step", 2), ("checkpoint", 2)],
)
def test_killed_and_started_again(
    data: Path, tmp_path: Path, undisturbed: dict[int, Path], moment: str, processes: int
) -> None:
    words = [*recipe_words(tmp_path, data, processes), "--out", str(tmp_path / "run")]
    process = started_until(moment, tmp_path / "marker", words, processes)
    for child in psutil.Process(process.pid).children(recursive=True):  # torchrun's workers
        child.kill()
    process.kill()
    process.wait()
    run = tmp_path / "run"
    if moment == "checkpoint":
        assert list((run / "checkpoints").glob(".*.writing")), "was not killed while writing"
    again = pretrain(*words, processes=processes)
    assert again.returncode == 0, again.stderr
    reference = undisturbed[processes]
    assert metrics_of(run) == metrics_of(reference)
    # As text: a statistic that does not apply is NaN, which equals nothing.
    assert repr(read_ranks(run)) == repr(read_ranks(reference))
    weights, wanted = weights_of(run), weights_of(reference)
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.array_equal(weights[name], value), name
    assert (run / "evaluation.json").read_bytes() == (reference / "evaluation.json").read_bytes()
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_asked_to_stop(
    data: Path, tmp_path: Path, undisturbed: dict[int, Path], processes: int
) -> None:
    """SIGTERM between checkpoints: one more checkpoint, exit code 75, and nothing is lost."""
    words = [*recipe_words(tmp_path, data, processes), "--out", str(tmp_path / "run")]
    run = tmp_path / "run"
    process = started_until("slow", tmp_path / "marker", words, processes)
    process.terminate()  # torchrun hands it on to its workers
    _, stderr = process.communicate(timeout=60)
    if processes == 1:
        assert process.returncode == 75 and "stopped by SIGTERM at step 6" in stderr
        assert "Traceback" not in stderr
    assert (run / "checkpoints" / "step-00000006").is_dir()
    assert not (run / "checkpoints" / "step-00000008").exists()
    again = pretrain(*words, processes=processes)
    assert again.returncode == 0, again.stderr
    reference = undisturbed[processes]
    assert metrics_of(run) == metrics_of(reference)
    assert repr(read_ranks(run)) == repr(read_ranks(reference))
    weights, wanted = weights_of(run), weights_of(reference)
    assert all(np.array_equal(weights[name], value) for name, value in wanted.items())


@pytest.mark.slow
def test_goes_on_on_another_grid(data: Path, tmp_path: Path, undisturbed: dict[int, Path]) -> None:
    """A checkpoint of two pipeline stages is read by one process."""
    a, b = weights_of(undisturbed[2]), weights_of(undisturbed[1])
    assert a.keys() == b.keys()
    for name, value in b.items():
        if "key.bias" in name or not name.endswith("master"):
            continue  # softmax ignores a key bias: its gradient is rounding noise
        scale = np.abs(value).max() + 1e-12
        assert np.abs(a[name] - value).max() / scale < 1e-3, name
    target = str(undisturbed[2])
    done = pretrain("evaluate", target, "--split", "val", "--out", str(tmp_path / "e.json"))
    assert done.returncode == 0, done.stderr


GRIDS = [
    {"tensor_parallel": 2, "zero_stage": 2},
    {"pipeline_parallel": 2, "zero_stage": 0},
    {"zero_stage": 3},
]
"""Two processes each; the last is data parallel."""


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_a_run_moves_between_grids(data: Path, tmp_path: Path, dialect: str) -> None:
    """Begun on one process, gone on on three grids of two, ended on one: the same losses."""
    values = base_recipe(data)
    values["model"] |= DIALECTS[dialect]
    values["train"]["steps"] = 10
    still = {"recipe": {**values, "checkpoint": {"every": 10}}, "run": str(tmp_path / "still")}
    run_workers(1, "train", [still], tmp_path / "w")
    moving = str(tmp_path / "moving")

    def leg(grid: dict, stop: int) -> dict:
        return {"recipe": {**values, "grid": grid, "checkpoint": {"every": 2, "keep": 0}},
                "run": moving, "stop": stop}  # fmt: skip

    run_workers(1, "train", [leg({"zero_stage": 1}, 2)], tmp_path / "w")
    legs = [leg(grid, 4 + 2 * index) for index, grid in enumerate(GRIDS)]
    run_workers(2, "train", legs, tmp_path / "w")
    run_workers(1, "train", [leg({"zero_stage": 2}, 0)], tmp_path / "w")
    steps = [row["step"] for row in metrics_of(Path(moving)) if row["kind"] == "train"]
    assert steps == list(range(1, 11))
    np.testing.assert_allclose(losses_of(Path(moving)), losses_of(Path(still["run"])), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["grid.pipeline_parallel=2", "grid.tensor_parallel=2"])
def test_evaluation_of_a_checkpoint_on_another_grid(
    undisturbed: dict[int, Path], tmp_path: Path, grid: str
) -> None:
    target, out = str(undisturbed[1]), tmp_path / "e.json"
    words = ["evaluate", target, grid, "--split", "val", "--out", str(out)]
    done = pretrain(*words, processes=2)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    done = pretrain("evaluate", target, "--split", "val", "--json", "--out", str(tmp_path / "1"))
    wanted = json.loads(done.stdout)
    assert found["documents_sha256"] == wanted["documents_sha256"]
    assert abs(found["overall"]["loss"] / wanted["overall"]["loss"] - 1) < 1e-5


def test_finished_run_is_left_alone(undisturbed: dict[int, Path], data: Path) -> None:
    run = undisturbed[1]
    before = metrics_of(run)
    done = pretrain("train", str(run.parent / "recipe.yaml"), "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert metrics_of(run) == before
    assert len(json.loads((run / "environment.json").read_text())) == 1
