"""A dry run tells what each run of a sweep has left to do."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

import pretrain.sweep.estimate
from pretrain.sweep.config import load_sweep
from pretrain.sweep.estimate import plan, print_plan
from tests.tools import write_sweep


def test_states_and_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = load_sweep(write_sweep(tmp_path, tmp_path / "data"), tmp_path / "runs")
    done, running, saved, begun, *others = sweep.tasks
    for task in (running, saved, begun):
        task.run.mkdir(parents=True)
        (task.run / "metrics.jsonl").write_text("")
    for task, step in ((running, 20), (saved, 30)):
        folder = task.run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    (running.run / ".lock").write_text("pid 1 on here")
    monkeypatch.setattr(pretrain.sweep.estimate, "is_done", lambda task: task is done)
    with (running.run / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        estimate = plan(sweep, 1, None, 0.0)
    found = [(one["state"], one["step"]) for one in estimate["runs"]]
    assert found == [("done", 0), ("running", 20), ("stopped", 30), ("stopped", 0),
                     *[("waiting", 0)] * len(others)]  # fmt: skip
    each = done.tokens // 50
    assert estimate["tokens"] == each * (30 + 20 + 50 * (1 + len(others)))
    print_plan(estimate, 1)
    shown = capsys.readouterr().out
    assert "running at step 20" in shown and "stopped at step 30" in shown
    assert "per GPU" not in shown
    print_plan({**estimate, "per_gpu": {"runs": 2, "why": "the host limits one run"}}, 1)
    assert "runs at once per GPU: 2, the host limits one run" in capsys.readouterr().out
