"""What lies in a checkpoints folder: only damage is called so, only a run's own is touched."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import pretrain.checkpoint.reader
from pretrain.checkpoint.manifest import MANIFEST, VERSION, UnreadableError, sealed
from pretrain.checkpoint.reader import Checkpoint, list_checkpoints, step_of
from pretrain.checkpoint.recover import find_whole
from pretrain.checkpoint.saver import _free_name
from pretrain.errors import RunError
from tests.checkpoints import (
    STEPS,
    Alone,
    copy_as,
    put_dangling,
    put_file,
    put_folder,
    put_link,
    retain,
    same_values,
    write_checkpoint,
    write_run,
)

pytestmark = pytest.mark.usefixtures("hurry")


# --- errors that are no damage -------------------------------------------------------------------


ERRORS = ("EIO", "ESTALE", "EACCES", "EMFILE", "ENFILE", "ETIMEDOUT", "EHOSTDOWN", "ENXIO",
          "ENODEV", "EPERM", "EBUSY", "ENOMEM", "EINTR")  # fmt: skip


def failing(monkeypatch: pytest.MonkeyPatch, number: int, end: str, times: int) -> list[str]:
    """Opening files whose names end so fails the first times; returns what was tried."""
    real, tried = os.open, list[str]()

    def open_(path: str, flags: int, *more: int, **others: int) -> int:
        if str(path).endswith(end):
            tried.append(str(path))
            if len(tried) <= times:
                raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *more, **others)

    monkeypatch.setattr(os, "open", open_)
    return tried


@pytest.mark.parametrize("end", ["rank-00001.safetensors", MANIFEST])
@pytest.mark.parametrize("name", ERRORS)
def test_a_disk_that_fails_is_no_damage(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, name: str, end: str
) -> None:
    """It is tried again, then said, and nothing is renamed; a moment's failure is not noticed."""
    before = sorted(checkpoints.rglob("*"))
    with monkeypatch.context() as patch:
        tried = failing(patch, getattr(errno, name), end, 1)
        assert find_whole(checkpoints, Alone()) == [] and len(tried) > 1  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        tried = failing(patch, getattr(errno, name), end, 10**9)
        with pytest.raises(UnreadableError, match="cannot be read") as error:
            find_whole(checkpoints, Alone())  # type: ignore[arg-type]
        assert len(tried) < 10 and "\n" not in str(error.value) and end in str(error.value)
    assert sorted(checkpoints.rglob("*")) == before


def test_a_folder_that_cannot_be_listed_is_not_empty(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run must not begin anew since its disk has a hiccup."""

    def fail(_: Path) -> Iterator[Path]:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(UnreadableError):
        list_checkpoints(checkpoints)


def test_a_mount_that_vanishes_is_no_damage(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = checkpoints.with_name("away")
    real = pretrain.checkpoint.reader.read_manifest  # type: ignore[attr-defined]

    def vanish(path: Path) -> object:
        found = real(path)
        if checkpoints.exists():
            checkpoints.rename(away)
        return found

    monkeypatch.setattr(pretrain.checkpoint.reader, "read_manifest", vanish)
    with pytest.raises(UnreadableError, match="No such file"):
        find_whole(checkpoints, Alone())  # type: ignore[arg-type]
    assert sorted(path.name for path in away.iterdir()) == [f"step-{n:08d}" for n in STEPS]


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    """400 files are read with a hundred descriptors, and with three to spare."""
    folder = write_run(tmp_path / "run", (2,), parts=400)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, hard))
    try:
        assert find_whole(folder, Alone()) == []  # type: ignore[arg-type]
        (path,) = list_checkpoints(folder)
        same_values(Checkpoint(path))
        write_checkpoint(tmp_path / "other", 2, parts=20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_a_newer_version_wrote_is_not_damaged(checkpoints: Path) -> None:
    path = checkpoints / "step-00000008" / MANIFEST
    written = json.loads(path.read_bytes())
    del written["sha256"]
    path.write_bytes(sealed({**written, "version": VERSION + 1, "more": {}}))
    with pytest.raises(RunError, match="newer version") as error:
        find_whole(checkpoints, Alone())  # type: ignore[arg-type]
    assert "damaged" not in str(error.value) and "delete" not in str(error.value)
    assert (checkpoints / "step-00000008").is_dir()


# --- what people and other runs put there --------------------------------------------------------


def put_other_run(folder: Path) -> Path:
    path = write_checkpoint(folder.parent.parent / "other", 10, run_id="0000bbbb")
    shutil.copytree(path, folder / path.name)
    return folder / path.name


def put_weights(folder: Path) -> Path:
    """Files of a checkpoint that a person keeps with notes, under a checkpoint's name."""
    path = folder / "step-00000012"
    shutil.copytree(folder / "step-00000008", path)
    (path / "manifest.json").unlink()
    (path / "notes.txt").write_text("mine")
    return path


def put_model(folder: Path) -> Path:
    """A model of another program under a checkpoint's name."""
    path = folder / "step-00000012"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    return path


FOREIGN = {
    **{name: copy_as(name) for name in (
        "step-00000008.bak", "step-00000008-good", "step-8", "step-00000008 (copy)", "step-00x",
        "step-by-step-notes", "step-", "step-٠٠٠٠٠٠٠٨", "step-00000010", "backup")},
    "file": put_file, "folder": put_folder, "link": put_link, "dangling": put_dangling,
    "other run": put_other_run, "weights": put_weights, "model": put_model,
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_not_the_runs_own_is_left_alone(checkpoints: Path, what: str) -> None:
    """It stops neither the resume nor retention nor a save, and is neither used nor deleted."""
    path = FOREIGN[what](checkpoints)
    inside = {one: one.read_bytes() for one in path.rglob("*") if one.is_file()}
    told = find_whole(checkpoints, Alone())  # type: ignore[arg-type]
    assert list_checkpoints(checkpoints)[-1].name == "step-00000008"
    assert len(told) == (0 if path.name == "backup" else 1)
    assert all(path.name in line and "\n" not in line for line in told)
    target = _free_name(checkpoints, 10)
    assert not os.path.lexists(target) and step_of(target) == 10
    shutil.copytree(
        write_checkpoint(checkpoints.parent.parent / "more", 10, run_id="0000aaaa"), target
    )
    retain(checkpoints, keep=1)
    assert [one.name for one in list_checkpoints(checkpoints)] == [target.name]
    assert os.path.lexists(path)
    assert (
        inside == {one: one.read_bytes() for one in path.rglob("*") if one.is_file()}
        or path.is_symlink()
    )


def test_a_retention_that_fails_is_tried_again(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is still open on a network disk keeps its folder: ENOTEMPTY, or EBUSY."""
    with monkeypatch.context() as patch:

        def busy(*_: object, **__: object) -> None:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

        patch.setattr(Path, "rmdir", busy)
        retain(checkpoints, keep=1)
    assert [one.name for one in list_checkpoints(checkpoints)] == ["step-00000008"]
    assert len(list(checkpoints.glob(".*.deleting"))) == 3
    retain(checkpoints, keep=1)
    assert [one.name for one in checkpoints.iterdir()] == ["step-00000008"]
