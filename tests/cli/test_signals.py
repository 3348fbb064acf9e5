"""Every verb at every moment: a signal ends it with one checkpoint at most, and no orphan."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest

import pretrain.checkpoint.saver
from pretrain.checkpoint.reader import Checkpoint, list_checkpoints
from pretrain.checkpoint.tensor_file import write_tensors
from pretrain.distributed.signals import SIGNALS as STOP_SIGNALS
from pretrain.errors import INTERRUPTED, TRY_AGAIN, Stopped
from pretrain.runs.lock import is_busy
from tests.signalled import MOMENTS
from tests.tools import (
    ROOT,
    base_recipe,
    environment,
    metrics_of,
    run,
    start_processes,
    sweep_words,
    weights_of,
    write_recipe,
    write_sweep,
)
from tests.warm import WarmProcess

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ALL = list(product(MOMENTS, SIGNALS, (1, 2)))
SAMPLE = [
    ("first update", signal.SIGINT, 2),
    ("update", signal.SIGTERM, 2),
    ("ranks", signal.SIGUSR1, 1),
    ("last evaluation", signal.SIGTERM, 1),
]
GRID = {1: ["grid.zero_stage=0"], 2: ["grid.zero_stage=0", "--processes", "2"]}


def code_of(number: signal.Signals) -> int:
    return INTERRUPTED if number == signal.SIGINT else TRY_AGAIN


Process = subprocess.Popen[str] | WarmProcess


def begin(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], env=environment(), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def signalled(process: Process, numbers: list[signal.Signals], gap: float = 0.3) -> tuple[int, str]:
    """Send signals to the one process; its code and standard error, once nobody is left."""
    family = psutil.Process(process.pid).children(recursive=True)
    for number in numbers:
        process.send_signal(number)
        time.sleep(gap)
    _, errors = process.communicate(timeout=120)
    _, left = psutil.wait_procs(family, timeout=5)
    for one in left:
        one.kill()
    assert not left, f"orphans: {left}"
    assert process.returncode is not None
    return process.returncode, errors


def check_ending(code: int, errors: str, wanted: set[int]) -> None:
    assert code in wanted, (code, errors)
    assert "Traceback" not in errors and "terminate called" not in errors, errors
    assert errors.count("error: ") <= 1, errors


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(folder / "recipe.yaml", base_recipe(data))
    with pytest.MonkeyPatch.context() as patch:
        words = ["train", str(recipe), "--out", str(folder / "run"), GRID[1][0]]
        assert run(patch, *words) == 0
    return folder / "run"


def trial(
    moment: str, number: signal.Signals, processes: int, data: Path, folder: Path,
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, forked: bool = False,
) -> None:  # fmt: skip
    """One signal (twice) at one moment; the next start goes on as if there had been none.

    Args:
        forked: the process and its ranks have everything imported, instead of being started.
    """
    recipe = write_recipe(folder / "recipe.yaml", base_recipe(data))
    out, marker = folder / "run", folder / "marker"
    words = ["train", str(recipe), "--out", str(out), *GRID[processes]]
    script, told = ROOT / "tests/signalled.py", [moment, str(marker), *words]
    process = start_processes(told, script=script) if forked else begin([str(script), *told])
    deadline = time.monotonic() + 120
    while not marker.exists():
        assert process.poll() is None and time.monotonic() < deadline, "never came to the moment"
        time.sleep(0.02)
    code, errors = signalled(process, [number, number])
    # Where the run was over but for its goodbye, either is true.
    late = moment in ("engine's end", "checkpoint") and {0}
    check_ending(code, errors, {code_of(number)} | (late or set()))
    found = list_checkpoints(out / "checkpoints")
    for one in found:
        Checkpoint(one)
    assert not list((out / "checkpoints").glob(".*.writing"))
    names = [one.name for one in found]
    if number != signal.SIGINT and moment == "update":
        assert names == ["step-00000003", "step-00000004"]
    if number != signal.SIGINT and moment == "first update":
        assert names == ["step-00000001"]
    elif moment.startswith("first") or moment in ("recipe", "data", "folder", "engine"):
        assert not names
    assert not is_busy(out)
    assert run(monkeypatch, *[word for word in words if word not in ("--processes", "2")]) == 0
    one_process = processes == 1
    assert len(metrics_of(out)) == len(metrics_of(undisturbed))
    if one_process:
        assert metrics_of(out) == metrics_of(undisturbed)
        weights = weights_of(undisturbed)
        assert all((weights[name] == value).all() for name, value in weights_of(out).items())


@pytest.mark.parametrize(("moment", "number", "processes"), SAMPLE)
def test_a_signal(
    moment: str, number: signal.Signals, processes: int, data: Path, tmp_path: Path,
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    trial(moment, number, processes, data, tmp_path, undisturbed, monkeypatch, forked=True)


def test_a_signal_to_a_started_program(
    data: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user starts it, of the long form's matrix."""
    trial("evaluation", signal.SIGUSR1, 1, data, tmp_path, undisturbed, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize(("moment", "number", "processes"), ALL)
def test_every_signal_at_every_moment(
    moment: str, number: signal.Signals, processes: int, data: Path, tmp_path: Path,
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    trial(moment, number, processes, data, tmp_path, undisturbed, monkeypatch)


# --- every verb ------------------------------------------------------------------------------


def verbs(folder: Path, data: Path, corpus: Path) -> dict[str, list[str]]:
    tokenizer = str(data / "tokenizer.model")
    return {
        "sweep": sweep_words(write_sweep(folder, data), folder / "runs"),
        "data tokenize": ["data", "tokenize", str(corpus), "--tokenizer", tokenizer,
                          "--out", str(folder / "tokens"), "--workers", "2"],
    }  # fmt: skip


def listens(process: subprocess.Popen[str]) -> bool:
    """Whether the process has a handler for SIGTERM."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    mask = int(text.split("SigCgt:")[1].split()[0], 16)
    return bool(mask >> (signal.SIGTERM - 1) & 1)


def disturb(words: list[str], number: signal.Signals, delay: float) -> None:
    process = begin(["-m", "pretrain", *words])
    while not listens(process) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(delay)
    if process.poll() is None:
        code, errors = signalled(process, [number])
        check_ending(code, errors, {0, code_of(number)})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("verb", ["sweep", "data tokenize"])
def test_a_verb(verb: str, data: Path, corpus: Path, tmp_path: Path) -> None:
    """As a user starts it; tests/cli/test_every_signal.py has every verb, in forks."""
    words = verbs(tmp_path, data, corpus)[verb]
    disturb(words, signal.SIGTERM, 3.0 if verb == "sweep" else 0.8)


def test_an_evaluation_that_is_owed_at_the_end(
    data: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Cut short at the last step, and again at the next start: each ends with 75, and the third
    start makes up for it."""
    import pretrain.tasks.text

    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    words = ["train", str(recipe), "--out", str(tmp_path / "run"), GRID[1][0]]
    score, calls = pretrain.tasks.text.score, 0  # type: ignore[attr-defined]

    def signal_at(number: int) -> None:
        nonlocal calls
        calls = 0

        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return score(*arguments, **more)

        monkeypatch.setattr(pretrain.tasks.text, "score", call)

    for number in (3, 1, 1):  # of step 6, after those of steps 0 and 3; then the one that is owed
        signal_at(number)
        assert run(monkeypatch, *words) == TRY_AGAIN
        check_ending(TRY_AGAIN, capfd.readouterr().err, {TRY_AGAIN})
        assert calls == number and not is_busy(tmp_path / "run")
        assert not (tmp_path / "run/evaluation.json").exists()
        assert len(metrics_of(tmp_path / "run")) == len(metrics_of(undisturbed)) - 1
    monkeypatch.setattr(pretrain.tasks.text, "score", score)
    assert run(monkeypatch, *words) == 0
    assert metrics_of(tmp_path / "run") == metrics_of(undisturbed)


class Odd:
    """A signal comes while its destructor runs."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_a_destructor_swallows(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    """Python drops what is raised there; the signal counts all the same, a moment later."""
    STOP_SIGNALS.listen()
    try:
        with pytest.raises(Stopped, match=number.name):
            Odd(number)
            time.sleep(5)
        assert STOP_SIGNALS.asked and "ignored" not in capfd.readouterr().err
        Odd(number)  # it was heard: nothing more happens
        time.sleep(0.1)
    finally:
        STOP_SIGNALS.restore()


@pytest.mark.parametrize(
    ("number", "wanted"),
    [(signal.SIGTERM, TRY_AGAIN), (signal.SIGUSR1, TRY_AGAIN), (signal.SIGINT, INTERRUPTED)],
)
def test_a_signal_that_was_held_back_ends_the_command(
    number: signal.Signals, wanted: int, tmp_path: Path
) -> None:
    """It comes at the moment at which the command begins to listen."""
    code = (
        "import os, signal, sys\n"
        f"signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])\n"
        f"os.kill(os.getpid(), {int(number)})\n"
        "from pretrain.__main__ import main\n"
        "sys.argv = ['pretrain', 'train', 'x.yaml']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=tmp_path, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == wanted
    assert done.stderr.count("rerun the same command") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_a_checkpoint_that_is_being_written_at_the_end_is_waited_for(
    number: signal.Signals,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Training is over, and the main thread waits for a slow disk when the signal comes."""

    def write(*words: Any) -> Any:
        time.sleep(0.2)
        os.kill(os.getpid(), number)
        time.sleep(0.3)
        return write_tensors(*words)

    monkeypatch.setattr(pretrain.checkpoint.saver, "write_tensors", write)
    path = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    words = ["train.steps=1", "checkpoint.every=1"]
    code = run(monkeypatch, "train", str(path), "--out", str(tmp_path / "run"), *words)
    assert [one.name for one in list_checkpoints(tmp_path / "run/checkpoints")] == ["step-00000001"]
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    if number == signal.SIGINT:
        assert code == INTERRUPTED
        assert "to continue from step 1" in capsys.readouterr().err
    else:  # training was over: nothing is left to stop
        assert code in (0, TRY_AGAIN)
