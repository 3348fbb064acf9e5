"""Losses, gradients and weights that go wrong: skipped, undone, and the run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.checkpoint.reader import Checkpoint
from pretrain.config.run import FaultsConfig
from pretrain.runs.metrics import read_metrics
from pretrain.training.faults import JUMPS, FaultDetector, GoBackError, block_of, write_jumps
from tests.faults.tools import STEPS, events_of, faulty, same_weights, words_of
from tests.tools import pretrain


def test_blocks_are_jumped_over() -> None:
    assert [block_of(update, ()) for update in range(3)] == [0, 1, 2]
    assert [block_of(update, (4, 5, 6)) for update in range(6)] == [0, 1, 2, 3, 7, 8]
    assert [block_of(update, (2, 0)) for update in range(3)] == [1, 3, 4]


def test_judge() -> None:
    judge = FaultDetector(FaultsConfig(skip_limit=2, spike=4.0, spike_window=10))
    assert "skipped" in judge.observe(1, float("nan"), True)
    assert judge.is_skipping and judge.observe(2, 3.0, False) == ""
    assert "gradient" in judge.observe(3, 3.0, True)  # not in a row
    with pytest.raises(GoBackError) as caught:
        judge.observe(4, float("inf"), True)
    assert caught.value.step == 3 and caught.value.jump == (3, 4)
    judge = FaultDetector(FaultsConfig(spike=4.0, spike_window=10))
    for step in range(1, 11):
        judge.observe(step, 3.0 + 0.1 * (step % 2), False)
    again = FaultDetector(FaultsConfig(spike=4.0, spike_window=10))
    again.restore(json.loads(json.dumps(judge.state())))
    for one in (judge, again):
        assert one.observe(11, 3.2, False) == ""
        with pytest.raises(GoBackError, match="spike") as caught:
            one.observe(12, 4.0, False)
        assert caught.value.jump == (12,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "processes", "stage", "precision"),
    [
        ("loss", 1, 0, "fp32"),
        ("gradient", 2, 3, "fp32"),
        ("loss", 1, 1, "bf16"),
        ("label", 2, 1, "fp32"),
        pytest.param("loss", 2, 1, "fp32", marks=pytest.mark.long),
        pytest.param("label", 1, 0, "fp32", marks=pytest.mark.long),
        pytest.param("label", 2, 2, "bf16", marks=pytest.mark.long),
        pytest.param("label", 2, 3, "fp32", marks=pytest.mark.long),
        pytest.param("gradient", 2, 0, "fp32", marks=pytest.mark.long),
        pytest.param("gradient", 2, 2, "bf16", marks=pytest.mark.long),
    ],
)
def test_one_bad_update_is_skipped(
    data: Path, tmp_path: Path, row: Callable[..., None], fault: str, processes: int, stage: int,
    precision: str,
) -> None:  # fmt: skip
    """NaN on one rank: no rank takes the step, and the run goes on."""
    last = 7
    more = ["checkpoint.every=1", f"grid.zero_stage={stage}", f"precision={precision}",
            "evaluation.at_end=none"]  # fmt: skip
    words = words_of(tmp_path, data, *more, steps=last)
    done = faulty(fault, processes - 1, "5", words, processes)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert sum("update is skipped" in text for text in events_of(run)) == 1
    steps = [row["step"] for row in read_metrics(run)]
    assert steps == [step for step in range(1, last + 1) if step != 5]
    before, bad, after = (Checkpoint(run / f"checkpoints/step-{n:08d}") for n in (4, 5, 6))
    for name in before.parameters:
        for key in before.keys(name):
            assert np.array_equal(before.full(name, key), bad.full(name, key)), (name, key)
    moved = [
        name for name in bad.parameters if not np.array_equal(bad.full(name), after.full(name))
    ]
    assert len(moved) > 10 and all(np.isfinite(after.full(name)).all() for name in moved)
    where = f"rank {processes - 1} of {processes}, ZeRO {stage}, {precision}"
    what = {
        "loss": "NaN in the loss",
        "label": "infinite loss with a finite gradient",
        "gradient": "Inf in a gradient",
    }[fault]
    row(f"{what}, {where}", "the same update", "the next update", samples="one update's, skipped",
        weights="bitwise untouched")  # fmt: skip


@pytest.mark.slow
def test_several_bad_updates_send_the_run_back_and_past_their_samples(
    data: Path, tmp_path: Path, row: Callable[..., None]
) -> None:
    words = words_of(tmp_path, data)
    done = faulty("loss", 0, "5,6,7", words)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert any(
        "went back to step 4 and left out samples 32-39, 40-47, 48-55" in text
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
    row("NaN in three losses in a row", "the third update", "back at a checkpoint, 2 updates",
        samples="three updates', jumped over", weights="bitwise (never had them)")  # fmt: skip


def test_numbers_that_stay_bad_end_the_run(data: Path, tmp_path: Path) -> None:
    words = words_of(tmp_path, data, "faults.skip_limit=2", "faults.go_back_limit=1")
    done = faulty("loss", 0, ",".join(map(str, range(5, 40))), words)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "the loss is nan" in last and "learning_rate" in last and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_flipped_bit_is_found_and_undone(
    data: Path, tmp_path: Path, undisturbed: Callable[[str], Path], row: Callable[..., None]
) -> None:
    words = words_of(tmp_path, data, "grid.zero_stage=0", "faults.compare_every=1")
    done = faulty("flip", 1, "5", words, processes=2)
    assert done.returncode == 0, done.stderr
    (event,) = [text for text in events_of(tmp_path / "run") if "went back" in text]
    assert "differs between process ranks 0, 1" in event and "to step 4" in event
    same_weights(tmp_path / "run", undisturbed("data"))
    row("flipped bit in a replicated weight", "the same update", "back at a checkpoint, 1 update")
