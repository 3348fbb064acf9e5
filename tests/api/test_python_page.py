"""Every block of docs/python.md and every cell of its notebook runs; run folders as tables."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

import pretrain.api
from pretrain.api import commands, tables
from pretrain.errors import MachineError, RunError, UsageError
from pretrain.runs.metrics import read_metrics
from tests.api.test_lightning import callbacks as callbacks  # noqa: PLC0414 - a fixture
from tests.tools import ROOT
from tests.tools import pretrain as warm

PAGE = ROOT / "docs/python.md"
NOTEBOOK = ROOT / "docs/python.ipynb"


@pytest.fixture
def in_warm_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions start forked processes, which cost no import."""

    class Warm:
        """What `commands` needs of a process."""

        def __init__(self, words: list[str], **_: Any) -> None:
            done = warm(*words[4:])
            self.stdout, self.stderr = Text(done.stdout), Text(done.stderr)
            self.returncode = done.returncode

        def wait(self) -> int:
            return self.returncode

    monkeypatch.setattr(commands, "Popen", Warm)


class Text:
    def __init__(self, text: str) -> None:
        self._text = text

    def read(self) -> str:
        return self._text

    def __iter__(self) -> Iterator[str]:
        return iter(self._text.splitlines(keepends=True))


@pytest.mark.slow
def test_every_block_runs(
    in_warm_processes: None, callbacks: Any, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("pandas")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/text").symlink_to(data)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == PAGE.read_text().count("```python") == 8
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {"loop", "trainer", "ours"}
    assert names["mine"].decays["blocks.1.q.weight"] == 0.4
    assert 0 < names["figures"]["overall"]["loss"] < 20
    ours = pretrain.api.load_run("runs/ours")
    last = ours.ranks[ours.ranks["step"] == 6].drop(columns=["tokens", "step"])
    measured = names["table"]
    assert len(last) == len(measured)
    for name in ("pseudo_rank", "nuclear_norm", "balance"):
        mine, theirs = (
            frame.sort_values(["layer", "product", "level", "head"])[name].to_numpy()
            for frame in (last, measured)
        )
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    assert "query+key+value" in capsys.readouterr().out


@pytest.mark.long
def test_the_notebook_runs() -> None:
    pytest.importorskip("pandas")
    names: dict[str, Any] = {}
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 5
    for number, cell in enumerate(code):
        exec(compile(cell, f"cell {number}", "exec"), names)
    assert len(names["by_layer"]) == 5


@pytest.mark.slow
def test_a_run_as_tables(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pretrain.api.load_run(trained)
    rows = read_metrics(trained)
    assert list(run.metrics["loss"]) == [row["loss"] for row in rows]
    assert run.recipe["train"]["steps"] == 6 and not run.is_loop
    assert run.evaluation and run.evaluation["overall"]["loss"] > 0
    assert len(run.held_out) == len(read_metrics(trained, "evaluation")) > 0
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    plain = pretrain.api.load_run(trained)
    assert isinstance(plain.ranks, dict)
    for name, column in plain.ranks.items():
        assert isinstance(column, np.ndarray)
        if name != "singular_values":
            assert len(column) == len(run.ranks)
            np.testing.assert_array_equal(column, run.ranks[name].to_numpy())
    assert plain.metrics["step"].dtype == np.int64
    with pytest.raises(UsageError, match="not a run folder"):
        pretrain.api.load_run(trained / "checkpoints")


@pytest.mark.slow
def test_an_error_of_a_command_is_raised(in_warm_processes: None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no checkpoint|no such"):
        pretrain.api.evaluate(tmp_path / "nothing")
    with pytest.raises(UsageError, match="out="):
        pretrain.api.train({"train": {"steps": 1}})
    with pytest.raises(UsageError, match=r"train\.stepss"):
        pretrain.api.train({}, {"train.stepss": 1}, out=tmp_path / "run")


@pytest.mark.parametrize("code,kind", [(1, RunError), (2, UsageError), (75, MachineError)])
def test_exit_codes_are_kinds_of_errors(
    code: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["-c", f"import sys; print('error: gone', file=sys.stderr); sys.exit({code})"]
    monkeypatch.setattr(commands, "program", lambda: [sys.executable, *words])
    with pytest.raises(kind, match=r"^gone$"):
        pretrain.api.evaluate("run")


def test_every_public_name_is_there_and_on_the_page(callbacks: Any) -> None:
    page = PAGE.read_text()
    for name in pretrain.api.__all__:
        assert getattr(pretrain.api, name).__doc__, name
        if not name.endswith(("Groups", "Statistics", "Run")):
            assert f"`{name}" in page, name
    with pytest.raises(AttributeError, match="nothing"):
        _ = pretrain.api.nothing
