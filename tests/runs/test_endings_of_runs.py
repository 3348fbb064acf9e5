"""How a run that stops early says how it goes on; and what it says that it sees of its data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from pretrain.__main__ import _print_stop
from pretrain.cli.exits import report_stop
from pretrain.distributed.signals import SIGNALS
from pretrain.errors import INTERRUPTED, Stopped
from pretrain.tasks.text import _apportioned
from pretrain.training import loop


@pytest.mark.parametrize(("steps", "words"), [
    ([], "begin again (there is no checkpoint yet)"), ([40, 80], "continue from step 80"),
])  # fmt: skip
def test_ctrl_c_says_from_where_a_run_continues(
    steps: list[int], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stop(*_: Any) -> None:
        raise Stopped("SIGINT")

    for step in steps:
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    monkeypatch.setattr("pretrain.training.periodic.measure_if_due", stop)
    monkeypatch.setattr("pretrain.training.periodic.tell_saved", lambda _: None)
    monkeypatch.setattr(SIGNALS, "_asked", None)
    with pytest.raises(Stopped) as end:
        loop.run_training(MagicMock(run=tmp_path), MagicMock(kind="new", step=0))
    assert report_stop(end.value) == INTERRUPTED
    assert capsys.readouterr().err.strip() == f"interrupted; rerun the same command to {words}"


def test_a_run_that_goes_until_a_step_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    _print_stop(Path("runs/a"), 20, 60, as_json=False)
    assert capsys.readouterr().out == "trained to step 20 of 60 (--until): runs/a\n"
    _print_stop(Path("runs/a"), 20, 60, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"run": "runs/a", "step": 20, "steps": 60}


@pytest.mark.parametrize("seed", range(30))
def test_the_tokens_of_subsets_are_those_of_the_run(seed: int) -> None:
    rng = random.Random(seed)
    raw = [rng.random() ** 4 for _ in range(rng.randint(1, 22))]
    shares = {f"s{k}": value / sum(raw) for k, value in enumerate(raw)}
    tokens = rng.choice((1, 7, 512, 61_440, 10**12 + 1))
    parts = _apportioned(shares, tokens)
    assert sum(parts.values()) == tokens and parts.keys() == shares.keys()
    assert all(abs(parts[name] - shares[name] * tokens) <= 1 + 1e-3 for name in shares)
