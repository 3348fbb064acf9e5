"""Whatever a user's code raises, at any place: one line with the place in the user's file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.config.recipe import Config, load_config
from pretrain.errors import Stopped, UsageError
from pretrain.runs.metrics import METRICS, Tracker
from pretrain.training.setup import prepare
from tests.own_code import EXAMPLE, FILE, TASK, TRACKER, recipe_with
from tests.tools import base_recipe, write_recipe

RAISED = {
    "ZeroDivisionError": "1 / 0",
    "SystemExit": "raise SystemExit(0)",
    "GeneratorExit": "raise GeneratorExit",
    "CancelledError": "import asyncio; raise asyncio.CancelledError('late')",
    "Own": "raise type('Own', (BaseException,), {})('mine')",
    "BaseExceptionGroup": "raise BaseExceptionGroup('two', [GeneratorExit(), ValueError()])",
    "StopIteration": "raise StopIteration",
    "RecursionError": "f = lambda: f(); f()",
    "MemoryError": "raise MemoryError",
}
ENTRY = {"kind": f"{FILE}:LayerCosine", "roles": ["attention"]}
VALIDATOR = """
    class Config(PolicySection):
        @pydantic.field_validator("deepest")
        def no(cls, value):
            {raised}
"""
POLICY: dict[str, Callable[[str], str]] = {
    "the file": lambda raised: f"{raised}\n{EXAMPLE}",
    "a validator": lambda raised: "import pydantic\n" + EXAMPLE.replace(
        "    class Config(PolicySection):\n", VALIDATOR.format(raised=raised)),
    "the constructor": lambda raised: EXAMPLE.replace(
        "    def move(", f"    def __init__(self, *given):\n        {raised}\n\n    def move("),
    "move": lambda raised: EXAMPLE.replace(
        "    def move(self, site, decay, step):\n",
        f"    def move(self, site, decay, step):\n        {raised}\n"),
}  # fmt: skip
SAMPLES = {
    "answers": "    def answers(self):\n",
    "training": "    def training(self, seed, count, model):\n",
    "a sample": "    def __getitem__(self, number):\n",
}


@pytest.mark.parametrize("name", RAISED)
@pytest.mark.parametrize("place", POLICY)
def test_a_policy_raises(place: str, name: str, data: Path, tmp_path: Path) -> None:
    text = POLICY[place](RAISED[name])
    assert RAISED[name] in text
    (tmp_path / FILE).write_text(text)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_with(data, {**ENTRY, "deepest": 1.5}))
    with pytest.raises(UsageError, match=r"policies[.\[]0") as error:
        prepare(load_config(recipe, code=[]), 1)
    said = str(error.value)
    assert "\n" not in said and f"{FILE}:" in said and f": {name}" in said, said


@pytest.mark.parametrize("name", RAISED)
@pytest.mark.parametrize("place", SAMPLES)
def test_samples_raise(place: str, name: str, data: Path, tmp_path: Path) -> None:
    text = TASK.replace(SAMPLES[place], f"{SAMPLES[place]}        {RAISED[name]}\n")
    (tmp_path / "parity.py").write_text(text)
    values = base_recipe(data) | {"data": {}}
    values["task"] = {"kind": "own", "own": {"kind": "parity.py:Parity"}}
    recipe = write_recipe(tmp_path / "r.yaml", values)
    with pytest.raises(UsageError, match=r"task\.own") as error:
        setup = prepare(load_config(recipe, code=[]), 1)
        setup.task.training(setup.config)[0]
    said = str(error.value)
    assert "\n" not in said and "parity.py:" in said and f": {name}" in said, said


@pytest.mark.parametrize("name", RAISED)
@pytest.mark.parametrize("method", ["__init__", "log", "rewind", "close"])
def test_a_tracker_raises(
    method: str, name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stops, with one line, and the run goes on."""
    body = f"\n\n    def {method}(self, *given):\n        {RAISED[name]}\n"
    (tmp_path / "table.py").write_text(TRACKER + body)
    values = base_recipe(data) | {"logging": {"trackers": [{"kind": "table.py:Table"}]}}
    config = load_config(write_recipe(tmp_path / "r.yaml", values), code=[])
    tracker = Tracker(tmp_path, config, active=True)
    for step in range(2):
        tracker.log("train", step, {"loss": 1.0})
    tracker.rewind(0)
    tracker.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert "table.py:" in line and name in line, line
    assert (tmp_path / METRICS).exists()


@pytest.mark.parametrize("ends", [KeyboardInterrupt, Stopped])
def test_a_signal_is_no_fault_of_the_code(
    ends: type[BaseException], data: Path, tmp_path: Path
) -> None:
    """It passes through the file, a policy, and a tracker."""
    word = {KeyboardInterrupt: "KeyboardInterrupt", Stopped: "Stopped"}[ends]
    raised = f"from pretrain.errors import Stopped; raise {word}"
    for change in POLICY.values():
        (tmp_path / FILE).write_text(change(raised))
        recipe = write_recipe(tmp_path / "r.yaml", recipe_with(data, {**ENTRY, "deepest": 1.5}))
        with pytest.raises(ends):
            prepare(load_config(recipe, code=[]), 1)
    (tmp_path / "table.py").write_text(
        f"{TRACKER}\n\n    def log(self, *given):\n        {raised}\n"
    )
    values = base_recipe(data) | {"logging": {"trackers": [{"kind": "table.py:Table"}]}}
    config: Config = load_config(write_recipe(tmp_path / "r.yaml", values), code=[])
    tracker = Tracker(tmp_path, config, active=True)
    with pytest.raises(ends):
        tracker.log("train", 1, {"loss": 1.0})
