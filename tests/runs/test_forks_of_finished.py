"""What a refusal advises can be done: the fork of its hint trains, and no fork trains nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.recipe import Config, apply_overrides
from pretrain.errors import UsageError
from pretrain.runs.folder import recipe_of, resolve_checkpoint
from pretrain.training.origin import StartRequest, begin
from pretrain.training.setup import prepare
from tests.tools import run

CHANGES = {
    "seed": "seed=8",
    "model": "model.ffn_hidden_size=64",
    "batch": "train.global_batch=4",
    "fewer steps": "train.steps=4",
    "more steps": "train.steps=9",
    "learning rate": "optimizer.learning_rate=1e-4",
    "schedule": "optimizer.schedule.kind=linear",
    "decay": "optimizer.weight_decay.attention=0.9",
    "measurements": "ranks.every=2",
    "checkpoints": "checkpoint.keep=1",
    "sample": "evaluation.documents=4",
}
"""What may differ from the recipe of a finished run (6 steps, checkpoints of 3 and 6)."""


def start(config: Config, out: Path, fork: str = "", until: int | None = None) -> str:
    """Everything up to the first update: what is refused, or nothing."""
    source = resolve_checkpoint(fork) if fork else None
    try:
        begin(prepare(config, 1, None), StartRequest(out, source, until, config.precision))
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_fork_of_a_hint_has_something_to_train(
    change: str, trained: Path, tmp_path: Path
) -> None:
    config = apply_overrides(recipe_of(trained), [change])
    refused = start(config, trained)
    assert refused and "\n" not in refused
    hint = re.search(r"--fork (\S+)@(\d+)(?: and train\.steps above (\d+))?", refused)
    forks = {step: start(config, tmp_path / "new", f"{trained}@{step}") for step in (3, 6)}
    if hint is None:  # then no fork is possible, however long
        assert all(forks.values())
        longer = apply_overrides(config, ["train.steps=50"])
        assert start(longer, tmp_path / "new", f"{trained}@6"), refused
        return
    if hint[3]:
        assert forks[6] and "train.steps" in forks[6]
        config = apply_overrides(config, [f"train.steps={int(hint[3]) + 1}"])
    assert start(config, tmp_path / "new", f"{hint[1]}@{hint[2]}") == ""


@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize("last", range(1, 9))
@pytest.mark.parametrize("key", ["train.steps", "--until"])
def test_a_fork_that_would_train_nothing_is_refused(
    key: str, last: int, step: int, trained: Path, tmp_path: Path
) -> None:
    config = recipe_of(trained)
    until = None
    if key == "--until":
        config, until = apply_overrides(config, ["train.steps=9"]), last
    else:
        config = apply_overrides(config, [f"train.steps={last}"])
    refused = start(config, tmp_path / "new", f"{trained}@{step}", until)
    assert bool(refused) == (last <= step)
    if refused:
        assert refused.startswith(f"{key}: {last} ") and f"set {key} above {step}" in refused


def test_the_command_refuses_before_it_makes_a_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "new"
    recipe = str(trained / "config.yaml")
    assert run(monkeypatch, "train", recipe, "--fork", f"{trained}@6", "--out", str(out)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "set train.steps above 6" in error
    assert not out.exists()
