"""Numbers, memory, files and processes that fail: what is skipped, undone, named, and goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from launchers.local import torchrun
from pretrain.checkpoint import LATEST, Checkpoint, list_checkpoints
from pretrain.errors import TRY_AGAIN
from pretrain.faults import JUMPS, GoBackError, Judge, block_of, write_jumps
from pretrain.run_config import CheckpointConfig, FaultsConfig
from pretrain.saver import superseded
from pretrain.tracking import read_metrics
from tests.tools import (
    ROOT,
    base_recipe,
    environment,
    launcher,
    metrics_of,
    pretrain,
    weights_of,
    write_recipe,
)

STEPS = 10


def words_of(folder: Path, data: Path, *more: str) -> list[str]:
    values = base_recipe(data)
    values["train"]["steps"] = STEPS
    values["checkpoint"]["every"] = 2
    values["ranks"] = {"every": 5}
    values["evaluation"]["every"] = 5
    recipe = write_recipe(folder / "recipe.yaml", values)
    return ["train", str(recipe), "--out", str(folder / "run"), *more]


def faulty(
    fault: str, rank: int, updates: str, words: list[str], processes: int = 1, timeout: int = 240
) -> subprocess.CompletedProcess[str]:
    """The command line with a fault of ``tests/faulty.py``."""
    script = [str(ROOT / "tests/faulty.py"), fault, str(rank), updates]
    return subprocess.run(
        [*launcher(processes), *script, *words], env=environment(), capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip


def same_weights(run: Path, reference: Path) -> None:
    weights, wanted = weights_of(run), weights_of(reference)
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.array_equal(weights[name], value), name


def events_of(run: Path) -> list[str]:
    return [row["message"] for row in read_metrics(run, "event")]


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that nothing happens to, on one process and on two data-parallel ones."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp("whole")
        done = pretrain(*words_of(folder, data, "grid.zero_stage=0"), processes=processes)
        assert done.returncode == 0, done.stderr
        found[processes] = folder / "run"
    return found


# --- numbers ------------------------------------------------------------------------------------


def test_blocks_are_jumped_over() -> None:
    assert [block_of(update, ()) for update in range(3)] == [0, 1, 2]
    assert [block_of(update, (4, 5, 6)) for update in range(6)] == [0, 1, 2, 3, 7, 8]
    assert [block_of(update, (2, 0)) for update in range(3)] == [1, 3, 4]


def test_judge() -> None:
    judge = Judge(FaultsConfig(skip_limit=2, spike=4.0, spike_window=10))
    assert "skipped" in judge.observe(1, float("nan"), True)
    assert judge.is_skipping and judge.observe(2, 3.0, False) == ""
    assert "gradient" in judge.observe(3, 3.0, True)  # not in a row
    with pytest.raises(GoBackError) as caught:
        judge.observe(4, float("inf"), True)
    assert caught.value.step == 3 and caught.value.jump == (3, 4)
    judge = Judge(FaultsConfig(spike=4.0, spike_window=10))
    for step in range(1, 11):
        judge.observe(step, 3.0 + 0.1 * (step % 2), False)
    again = Judge(FaultsConfig(spike=4.0, spike_window=10))
    again.restore(json.loads(json.dumps(judge.state())))
    for one in (judge, again):
        assert one.observe(11, 3.2, False) == ""
        with pytest.raises(GoBackError, match="spike") as caught:
            one.observe(12, 4.0, False)
        assert caught.value.jump == (12,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "processes", "stage"),
    [("loss", 1, 0), ("loss", 2, 1), ("gradient", 2, 0), ("gradient", 2, 3)],
)
def test_one_bad_update_is_skipped(
    data: Path, tmp_path: Path, fault: str, processes: int, stage: int
) -> None:
    """NaN on one rank: no rank takes the step, and the run goes on."""
    words = words_of(tmp_path, data, "checkpoint.every=1", f"grid.zero_stage={stage}")
    done = faulty(fault, processes - 1, "5", words, processes)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert sum("update is skipped" in text for text in events_of(run)) == 1
    steps = [row["step"] for row in read_metrics(run)]
    assert steps == [step for step in range(1, STEPS + 1) if step != 5]
    before, bad, after = (Checkpoint(run / f"checkpoints/step-{n:08d}") for n in (4, 5, 6))
    for name in before.parameters:
        for key in before.keys(name):
            assert np.array_equal(before.full(name, key), bad.full(name, key)), (name, key)
    moved = [
        name for name in bad.parameters if not np.array_equal(bad.full(name), after.full(name))
    ]
    assert len(moved) > 10 and all(np.isfinite(after.full(name)).all() for name in moved)


@pytest.mark.slow
def test_several_bad_updates_send_the_run_back_and_past_their_samples(
    data: Path, tmp_path: Path
) -> None:
    words = words_of(tmp_path, data)
    done = faulty("loss", 0, "5,6,7", words)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert any(
        "went back to step 4 and past samples 32-39, 40-47, 48-55" in text
        for text in events_of(run)
    ), events_of(run)
    assert json.loads((run / JUMPS).read_text()) == [4, 5, 6]
    other = tmp_path / "other"
    write_jumps(other / "run", [4, 5, 6])
    (other / "run/config.yaml").write_text((run / "config.yaml").read_text())
    reference = pretrain(*words_of(other, data))
    assert reference.returncode == 0, reference.stderr
    same_weights(run, other / "run")
    assert [r["step"] for r in read_metrics(run)] == list(range(1, STEPS + 1))


def test_numbers_that_stay_bad_end_the_run(data: Path, tmp_path: Path) -> None:
    words = words_of(tmp_path, data, "faults.skip_limit=2", "faults.go_back_limit=1")
    done = faulty("loss", 0, ",".join(map(str, range(5, 40))), words)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "the loss is nan" in last and "learning_rate" in last and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_flipped_bit_is_found_and_undone(
    data: Path, tmp_path: Path, undisturbed: dict[int, Path]
) -> None:
    words = words_of(tmp_path, data, "grid.zero_stage=0", "faults.compare_every=1")
    done = faulty("flip", 1, "5", words, processes=2)
    assert done.returncode == 0, done.stderr
    (event,) = [text for text in events_of(tmp_path / "run") if "went back" in text]
    assert "differs over ranks 0, 1" in event and "to step 4" in event
    same_weights(tmp_path / "run", undisturbed[2])


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "manifest"])
def test_a_damaged_checkpoint_is_put_aside(
    damage: str, tmp_path: Path, data: Path, undisturbed: dict[int, Path]
) -> None:
    shutil.copytree(undisturbed[1].parent, tmp_path / "copy")
    run = tmp_path / "copy/run"
    (run / "evaluation.json").unlink()
    newest = list_checkpoints(run / "checkpoints")[-1]
    file = newest / ("manifest.json" if damage == "manifest" else "rank-00000.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-100])
    else:
        place = content.index(b'"decay": 0.5') + 9 if damage == "manifest" else len(content) - 10
        content[place] ^= 1
        file.write_bytes(content)
    recipe = tmp_path / "copy/recipe.yaml"
    done = pretrain("train", str(recipe), "grid.zero_stage=0", "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert str(newest) in done.stderr and "on from the one before" in done.stderr
    assert (run / "checkpoints" / f"damaged-{newest.name}").is_dir()
    same_weights(run, undisturbed[1])


def test_what_is_kept_and_mirrored(
    data: Path, tmp_path: Path, undisturbed: dict[int, Path]
) -> None:
    """Retention rules; a copy elsewhere, from which a lost run folder goes on."""
    mirror = tmp_path / "mirror"
    more = ["grid.zero_stage=0", "checkpoint.keep=1", "checkpoint.keep_every=4",
            f"checkpoint.mirror=file://{mirror}"]  # fmt: skip
    done = pretrain(*words_of(tmp_path, data, *more, "--until", "6"))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    names = ["step-00000004", "step-00000006"]
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == names
    assert sorted(path.name for path in mirror.iterdir()) == names
    assert (run / "checkpoints" / LATEST).read_text() == names[-1]
    shutil.rmtree(run)
    done = pretrain(*words_of(tmp_path, data, *more))
    assert done.returncode == 0, done.stderr
    assert any("was fetched from" in text for text in events_of(run))
    assert [row["step"] for row in read_metrics(run)] == [7, 8, 9, 10]
    same_weights(run, undisturbed[1])


def test_retention(tmp_path: Path) -> None:
    found = []
    for step, loss in ((2, 3.0), (4, 1.5), (6, None), (8, 2.0), (10, 2.5)):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        state = {} if loss is None else {"held_out_loss": loss}
        (path / "manifest.json").write_text(json.dumps({"state": state}))
        found.append(path)
    settings = CheckpointConfig(keep=1, keep_every=6, keep_best=True)
    assert [path.name[-2:] for path in superseded(found, settings)] == ["02", "08"]
    assert superseded(found, CheckpointConfig(keep=0)) == []


# --- processes ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dead_rank_is_started_again(
    data: Path, tmp_path: Path, undisturbed: dict[int, Path]
) -> None:
    """kill -9 of one rank: torchrun starts all again, and nothing is lost."""
    words = words_of(tmp_path, data, "grid.zero_stage=0")
    script = [str(ROOT / "tests/faulty.py"), "kill", "1", "6"]
    done = subprocess.run(
        [*torchrun(2, restarts=1), *script, *words], env=environment(), capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    same_weights(tmp_path / "run", undisturbed[2])
    assert metrics_of(tmp_path / "run") == metrics_of(undisturbed[2])
    assert len(json.loads((tmp_path / "run/environment.json").read_text())) == 2


@pytest.mark.slow
def test_a_rank_that_stands_still(data: Path, tmp_path: Path, undisturbed: dict[int, Path]) -> None:
    """SIGSTOP of one rank: the others say who it is and end; started again, the run goes on."""
    words = words_of(tmp_path, data, "grid.zero_stage=0", "faults.watchdog=15")
    began = time.monotonic()
    done = faulty("stop", 1, "6", words, processes=2)
    assert done.returncode != 0 and time.monotonic() - began < 200
    summary = (tmp_path / "run/stacks/summary.txt").read_text()
    assert "rank 1 (step" in summary and "gives no sign of life" in summary, summary
    assert "rank 0 (step 5): waits in" in summary
    assert "train_step" in (tmp_path / "run/stacks/rank-00000.txt").read_text()
    again = pretrain(*words, processes=2)
    assert again.returncode == 0, again.stderr
    same_weights(tmp_path / "run", undisturbed[2])
    assert metrics_of(tmp_path / "run") == metrics_of(undisturbed[2])


def test_a_process_that_hangs_alone(data: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "tests/interrupted.py"), "step", str(tmp_path / "marker")]
    words = words_of(tmp_path, data, "faults.watchdog=10")
    done = subprocess.run(
        [*script, *words], env=environment(), capture_output=True, text=True, timeout=150,
        check=False,
    )  # fmt: skip
    assert done.returncode == TRY_AGAIN
    assert "nothing was finished for 10 s (step 5, training)" in done.stderr
    assert "waits in" in done.stderr and "Traceback" not in done.stderr
