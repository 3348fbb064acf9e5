"""`pretrain watch` tells of any run what its files say, in any state, and changes none."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pretrain.cli.watched import view_of
from pretrain.runs.finished import is_complete
from pretrain.runs.folder import recipe_of
from tests.fake_runs import STEPS, recipe, write_run, write_study
from tests.tools import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", recipe(), np.random.default_rng(0))


def shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: object
) -> str:
    capfd.readouterr()
    assert run(monkeypatch, "watch", *map(str, words), "--once") == 0
    output = capfd.readouterr()
    assert not output.err
    return output.out


def with_layers(folder: Path, layers: int, step: int = 20) -> dict[str, float]:
    rng = np.random.default_rng(layers)
    by_layer = {f"{product}_layer_{layer:02d}": float(rng.random())
                for product in ("qk", "vp") for layer in range(layers)}  # fmt: skip
    row = {"kind": "ranks", "step": step, "pseudo_rank_qk": 0.25, "pseudo_rank_vp": 0.5}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**row, "rank_by_layer": by_layer}) + "\n")
    return by_layer


def state_of(folder: Path) -> dict[str, Any]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino, path.stat().st_size)
            for path in [folder, *folder.rglob("*")]}  # fmt: skip


def test_the_figures_of_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    by_layer = with_layers(folder, 3)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "train"][-1]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "event", "step": 7, "message": "\\u001b[31mred\\nλ"}\n{"kind": "tra')
    before = state_of(folder)
    text = shown(monkeypatch, capfd, folder)
    assert state_of(folder) == before
    assert f"step {STEPS}/{STEPS}" in text and f"loss {last['loss']:.4f}" in text
    for layer in range(3):
        line = next(one for one in text.splitlines() if one.split()[:1] == [str(layer)])
        for product in ("qk", "vp"):
            assert f"{by_layer[f'{product}_layer_{layer:02d}']:.3f}" in line
    assert "λ = 0.5 query" in text and "held-out 5.0000" in text
    assert "step 7: \\x1b[31mred λ" in text and "\x1b" not in text


def test_ranks_of_a_run_of_an_earlier_version(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its metrics have no ranks by layer: they are those of its table."""
    row = {"kind": "ranks", "step": STEPS, "pseudo_rank_qk": 0.25, "pseudo_rank_vp": 0.5}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    table = pq.read_table(folder / "ranks.parquet").to_pylist()
    text = shown(monkeypatch, capfd, folder)
    for layer in (0, 1):
        line = next(one for one in text.splitlines() if one.split()[:1] == [str(layer)])
        for product in ("qk", "vp"):
            values = [row["pseudo_rank"] for row in table
                      if (row["step"], row["layer"], row["product"]) == (STEPS, layer, product)
                      and row["level"] == "head"]  # fmt: skip
            assert f"{np.mean(values):.3f}" in line


def _no_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()


def _damaged_line(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("{}\nx\n" + '{"kind": "train", "step": -1}\n')


def _no_recipe(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: [")


def _not_finite(folder: Path) -> None:
    row = {"kind": "train", "step": STEPS, "loss": None, "weight_decay": None}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n" + json.dumps({**row, "weight_decay": {}}) + "\n")


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "has not begun": (_no_metrics, "nothing is logged yet"),
    "damaged lines": (_damaged_line, "3 damaged lines"),
    "no recipe": (_no_recipe, f"step {STEPS}/?"),
    "not finite": (_not_finite, "loss nan"),
    "not measured": (lambda folder: (folder / "ranks.parquet").unlink(), "nothing is measured yet"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_run_in_an_odd_state(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    change, words = ODD[case]
    change(folder)
    assert words in shown(monkeypatch, capfd, folder)


def test_a_lock_is_seen_and_not_touched(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("watch locks")

    lock = folder / ".lock"
    assert "stopped at step" in shown(monkeypatch, capfd, folder)
    lock.write_text(f"pid {os.getpid()} on {socket.gethostname()}")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(fcntl, "flock", refuse)
        assert "running" in shown(monkeypatch, capfd, folder)
    assert "stopped at step" in shown(monkeypatch, capfd, folder)
    lock.write_text("pid 7 on elsewhere")  # nothing here can ask: its last line was just written
    assert "running" in shown(monkeypatch, capfd, folder)
    os.utime(folder / "metrics.jsonl", (0, 0))
    assert "stopped at step" in shown(monkeypatch, capfd, folder)


def test_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path / "study", decays=(0.0, 1.0), seeds=(1, 2))
    plan = json.loads((study / "sweep.json").read_text())
    plan["runs"]["attention=9,seed=1"] = {}
    (study / "sweep.json").write_text(json.dumps(plan))
    with_layers(study / "attention=1,seed=2", 2)
    (study / "logs").mkdir()
    (study / "logs" / "attention=0,seed=1.log").write_text("x\nerror: no memory\n")
    text = shown(monkeypatch, capfd, study)
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "0.250/0.500" in lines["attention=1,seed=2"] and "0 of 5 done" in text
    assert "attention=0,seed=1: error: no memory" in text
    assert "waiting" in lines["attention=9,seed=1"]


@pytest.mark.parametrize(("words", "part"), [
    (["nowhere"], "no such folder"), (["."], "neither a run folder"), (["file"], "neither"),
])  # fmt: skip
def test_what_is_no_run_is_refused(
    words: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "watch", *words) == 2
    assert part in capfd.readouterr().err.splitlines()[-1]


def test_it_goes_on_until_the_run_is_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line for every change, where the output is no terminal; then it ends by itself."""
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            with_layers(folder, 2)
        if len(looks) == 4:
            monkeypatch.setattr("pretrain.cli.watched.is_complete", lambda *_: True)

    assert not is_complete(folder, recipe_of(folder))  # it has no checkpoint
    monkeypatch.setattr("pretrain.cli.watch.sleep", sleep)
    assert run(monkeypatch, "watch", str(folder), "--every", "7") == 0
    lines = capfd.readouterr().out.splitlines()
    assert looks == [7.0] * 4 and len(lines) == 3
    assert "rank QK/VP" not in lines[0] and "rank QK/VP 0.250/0.500" in lines[1]
    assert f"done {STEPS}/{STEPS}" in lines[2]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_ctrl_c_ends_it(
    is_terminal: bool, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("pretrain.cli.watch.sleep", lambda _: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    assert run(monkeypatch, "watch", str(folder)) == 130
    output = capfd.readouterr()
    assert "interrupted" in output.err and "Traceback" not in output.err
    assert str(folder.name) in output.out


def test_names_and_ranks_are_whole_on_a_narrow_terminal(tmp_path: Path) -> None:
    """80 columns; what is empty in all rows takes no room, and notes stand below."""
    names = [f"weight_decay.attention={decay},seed=1" for decay in ("0.1", "0.5")]
    for name in names:
        folder = write_run(tmp_path / name, recipe(), np.random.default_rng(0))
        with_layers(folder, 1)
        (folder / "evaluation.json").unlink()
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": {name: {} for name in names}}))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / f"{names[0]}.log").write_text("error: no room\n")
    view = view_of(tmp_path)
    view.look()
    screen = Console(width=80, file=io.StringIO())
    screen.print(view.draw(80, 40))
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    for name in names:
        (line,) = [line for line in lines if line.lstrip().startswith(name) and "stopped" in line]
        assert "0.250/0.500" in line
    (head,) = [line for line in lines if "rank QK/VP" in line]
    assert head.split() == ["run", "state", "step", "loss", "rank", "QK/VP"]
    assert f"{names[0]}: error: no room" in [line.rstrip() for line in lines]
