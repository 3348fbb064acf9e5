"""Disks that fail without damage, folders that others use too, and waiting that is no hang."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import pretrain.checkpoint.saver
import pretrain.training.loop
from pretrain.checkpoint.manifest import MANIFEST, sealed
from pretrain.checkpoint.reader import RUN_ID, list_checkpoints
from pretrain.errors import TRY_AGAIN
from pretrain.runs.metrics import read_metrics
from tests.faults.tools import HERE, events_of, same_weights
from tests.tools import assert_one_line, run, run_processes

Words = list[str]


@pytest.fixture
def interrupted(tmp_path: Path, undisturbed: Callable[[str], Path]) -> tuple[Path, Words]:
    """A run that was killed after step 8 of 10, and the words that go on with it."""
    shutil.copytree(undisturbed("one").parent, tmp_path / "copy")
    folder = tmp_path / "copy/run"
    (folder / "evaluation.json").unlink()
    shutil.rmtree(folder / "checkpoints/step-00000010")
    return folder, ["train", str(tmp_path / "copy/recipe.yaml"), "--out", str(folder)]


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EMFILE"])
def test_a_disk_that_does_not_answer(
    interrupted: tuple[Path, Words], undisturbed: Callable[[str], Path], row: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, hurry: None,
) -> None:  # fmt: skip
    """Nothing is renamed; when it answers again, the run is as if nothing had happened."""
    folder, words = interrupted
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    number, real = getattr(errno, name), os.open

    def fail(path: str, *more: int, **others: int) -> int:
        if str(path).endswith("rank-00000.safetensors"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *more, **others)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        assert run(monkeypatch, *words) == 1
    assert_one_line(capsys.readouterr().err, ("rank-00000.safetensors", os.strerror(number)))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before
    if name == "EIO":
        assert run(monkeypatch, *words) == 0
        same_weights(folder, undisturbed("one"))
        row("a disk that answers EIO, ESTALE, EMFILE", "2 s (asked four times)", "the next start")


def test_hand_made_copies(
    interrupted: tuple[Path, Words], undisturbed: Callable[[str], Path], row: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, words = interrupted
    place = folder / "checkpoints"
    for name in ("step-00000008.bak", "step-00000008-good", "step-8", "step-00000012"):
        shutil.copytree(place / "step-00000008", place / name)
    (place / "step-00000010").write_text("a note")
    (place / "step-00000009").symlink_to(place / "step-00000006")
    assert run(monkeypatch, *words, "checkpoint.keep=1") == 0
    same_weights(folder, undisturbed("one"))
    assert [path.name for path in list_checkpoints(place)] == ["step-000000010"]
    left = {path.name for path in place.iterdir()} - {"step-000000010", "latest"}
    assert left == {"step-00000008.bak", "step-00000008-good", "step-8", "step-00000012",
                    "step-00000010", "step-00000009"}  # fmt: skip
    assert any("left alone" in event for event in events_of(folder))
    row("copies, links and notes of people among checkpoints", "the next start", "not disturbed")


def test_no_locks_and_a_folder_that_stays(
    interrupted: tuple[Path, Words], undisturbed: Callable[[str], Path], row: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As on some network file systems: no flock, and a deleted folder that is not empty."""
    folder, words = interrupted

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def not_empty(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        patch.setattr(Path, "rmdir", not_empty)
        assert run(monkeypatch, *words, "checkpoint.keep=1") == 0
    assert "no locks" in capsys.readouterr().err
    same_weights(folder, undisturbed("one"))
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step-00000010"]
    row("a file system without locks", "the start", "not disturbed (said once)")
    row("retention fails (ENOTEMPTY)", "the same checkpoint", "the next checkpoint")


def test_a_mirror_with_another_recipe(
    interrupted: tuple[Path, Words], undisturbed: Callable[[str], Path], row: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """A new run of the same name does not take the other's finished checkpoint."""
    folder, words = interrupted
    mirror = f"checkpoint.mirror=file://{tmp_path}/mirror"
    assert run(monkeypatch, *words, mirror) == 0
    identity = (folder / RUN_ID).read_text()
    other = [words[1], "--out", str(tmp_path / "other/run")]
    assert run(monkeypatch, "train", *other, mirror, "optimizer.learning_rate=0.001",
               "--until", "2") == 0  # fmt: skip
    assert [one["step"] for one in read_metrics(tmp_path / "other/run")] == [1, 2]
    (event,) = events_of(tmp_path / "other/run")
    assert "another recipe (optimizer.learning_rate 0.003, here 0.001)" in event
    assert len(list((tmp_path / "mirror").iterdir())) == 2
    shutil.rmtree(folder)
    assert run(monkeypatch, *words, mirror) == 0
    assert (folder / RUN_ID).read_text() == identity
    same_weights(folder, undisturbed("one"))
    row("a mirror with runs of other recipes", "the start", "each finds its own")


@pytest.mark.parametrize("stopped", [False, True])
def test_who_is_waited_for_does_not_give_way(
    interrupted: tuple[Path, Words], monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """The last save and that of a signal: an idle thread never comes back for many users."""
    folder, words = interrupted
    idle: list[int] = []
    monkeypatch.setattr(pretrain.checkpoint.saver, "_give_way", lambda: idle.append(1))
    if stopped:
        monkeypatch.setattr(pretrain.training.loop.SIGNALS, "agreed_with", lambda *_: (True, False))  # type: ignore[attr-defined]
    done = run(monkeypatch, *words, "checkpoint.every=1")
    saved = [path.name for path in list_checkpoints(folder / "checkpoints")][-2:]
    if stopped:
        assert done == TRY_AGAIN and saved[-1] == "step-00000009" and idle == []
    else:
        assert done == 0 and saved == ["step-00000009", "step-00000010"] and idle == [1]


@pytest.mark.slow
def test_a_slow_disk_and_a_slow_mirror(
    interrupted: tuple[Path, Words], row: Callable[..., None], tmp_path: Path
) -> None:
    """Two ranks wait for the first one's disk, then for its mirror, twice the watchdog's time each.

    The run forks from one that jumped over samples: the first rank alone remembers that.
    """
    folder, words = interrupted
    path = folder / "checkpoints/step-00000008" / MANIFEST
    written = json.loads(path.read_bytes())
    del written["sha256"]
    written["state"]["jumped"] = [1]
    path.write_bytes(sealed(written))
    limit, pause, out = 10, 0.25, tmp_path / "fork"
    more = ["--fork", f"{folder}@8", f"checkpoint.mirror=slow://{tmp_path}/mirror",
            f"faults.watchdog={limit}", "checkpoint.every=10", "grid.zero_stage=0"]  # fmt: skip
    began = time.monotonic()
    slowly = ["0", str(pause), *words[:3], str(out), *more]
    done = run_processes(slowly, 2, 300, HERE / "slow_disk.py")
    lasted = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert lasted > 80 * pause + limit and not (out / "stacks").exists()
    assert json.loads((out / "jumps.json").read_text()) == [1]
    (copies,) = (tmp_path / "mirror").iterdir()
    assert sorted(path.name for path in copies.glob("step-*")) == ["step-00000008", "step-00000010"]
    what = f"a slow disk and mirror: {lasted:.0f} s for two checkpoints (watchdog {limit} s)"
    row(what, "-", "not disturbed", weights="-")
