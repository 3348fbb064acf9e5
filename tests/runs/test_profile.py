"""`profile.steps`: a trace of some updates that changes no number."""

from __future__ import annotations

import gzip
import json
import tempfile
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.config.recipe import parse_config
from pretrain.config.run import ProfileConfig
from pretrain.errors import UsageError
from pretrain.training.profiling import Profiler
from tests.tools import base_recipe, losses_of, run, run_workers, small_disk, write_recipe


def recipe_for(data: Path, profile: dict[str, Any]) -> dict[str, Any]:
    values = deepcopy(base_recipe(data))
    values["train"] = {"steps": 5, "global_batch": 4, "micro_batch": 2}
    values["evaluation"] |= {"documents": 1, "at_end": "none"}
    return values | {"profile": profile}


def updates_of(trace: Path) -> tuple[set[str], int]:
    """The updates that a trace names, and its number of matrix products."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [str(event.get("name")) for event in events]
    return {name for name in names if name.startswith("update ")}, names.count("aten::mm")


def test_a_trace_of_two_updates(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, profile in (("plain", {}), ("traced", {"steps": "2-3"})):
        recipe = write_recipe(tmp_path / f"{name}.yaml", recipe_for(data, profile))
        assert run(monkeypatch, "train", str(recipe), "--out", str(tmp_path / name)) == 0
    assert list(losses_of(tmp_path / "plain")) == list(losses_of(tmp_path / "traced"))
    (trace,) = (tmp_path / "traced/profile").iterdir()
    assert trace.name == "rank-0.json.gz"
    updates, products = updates_of(trace)
    assert updates == {"update 2", "update 3"} and products > 20
    assert not (tmp_path / "plain/profile").exists()


def test_a_window_beyond_the_end_writes_what_there_was(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", recipe_for(data, {"steps": "5-9"}))
    assert run(monkeypatch, "train", str(recipe), "--out", str(tmp_path / "run")) == 0
    assert updates_of(tmp_path / "run/profile/rank-0.json.gz")[0] == {"update 5"}


def test_a_trace_that_cannot_be_written_stops_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", recipe_for(data, {"steps": 2}))
    words = ["train", str(recipe), "--out", str(tmp_path / "run")]
    assert run(monkeypatch, *words, "--until", "1") == 0
    (tmp_path / "run/profile").write_text("in the way")
    assert run(monkeypatch, *words) == 0
    assert "step 2: the trace could not be written" in capsys.readouterr().err


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_full_disk_of_temporary_files_is_named(
    real: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain trace is written there before it is packed; torch says nothing if that fails."""
    silent: Any = SimpleNamespace(start=int, stop=int, export_chrome_trace=len)
    if not real:
        monkeypatch.setattr(torch.profiler, "profile", lambda **_: silent)
    alone: Any = SimpleNamespace(is_main=True, rank=0, device=torch.device("cpu"))
    profiler = Profiler(ProfileConfig(steps="1"), tmp_path / "run", alone)
    with small_disk(tmp_path / "small", "64k"):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "small"))
        (tmp_path / "small/taken").write_bytes(b"x" * 65_536)
        with profiler.update(1):
            torch.ones(3)
        with pytest.raises(OSError, match=r"with 0\.0 MB free; TMPDIR names another") as raised:
            profiler.ended(1)
    assert raised.value.filename == str(tmp_path / "small")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "count"), [("main", 1), ("all", 2)])
def test_traces_of_processes(ranks: str, count: int, data: Path, tmp_path: Path) -> None:
    values = recipe_for(data, {"steps": "2", "ranks": ranks})
    values["grid"] = {"tensor_parallel": 2}
    run_workers(2, "train", [{"recipe": values, "run": str(tmp_path / "run")}], tmp_path / "w")
    traces = sorted((tmp_path / "run/profile").iterdir())
    assert len(traces) == count
    assert all(updates_of(trace)[0] == {"update 2"} for trace in traces)


@pytest.mark.parametrize(
    "steps", ["0", "3-2", "a", "1-", "-1", "1-2-3", "1-101", "²", "1.5", True, 1.5, [1], "1e3"]
)
def test_a_window_that_is_none_is_refused(steps: Any) -> None:
    with pytest.raises(UsageError, match=r"profile\.steps"):
        parse_config({"profile": {"steps": steps}})


@pytest.mark.parametrize(("steps", "window"), [
    ("", range(0)), (7, range(7, 8)), ("7", range(7, 8)), ("100-103", range(100, 104)),
    (" 5 - 6 ", range(5, 7)),
])  # fmt: skip
def test_windows(steps: Any, window: range) -> None:
    assert parse_config({"profile": {"steps": steps}}).profile.window == window
