"""What lies in a checkpoints folder: only damage is called so, only a run's own is touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import data_pipeline.disk
import pretrain.checkpoint.reader
from pretrain.checkpoint.manifest import MANIFEST, DamagedError, UnreadableError, sealed
from pretrain.checkpoint.reader import Checkpoint, list_checkpoints, step_of
from pretrain.checkpoint.recover import find_whole
from pretrain.checkpoint.saver import Saver, _free_name
from pretrain.config.run import CheckpointConfig
from pretrain.errors import RunError
from tests.checkpoints import Alone, values_of, write_checkpoint, write_run

STEPS = (2, 4, 6, 8)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further tries come at once."""
    monkeypatch.setattr(data_pipeline.disk, "_PAUSES", [0.0, 0.0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", STEPS)


def retain(folder: Path, **settings: int) -> None:
    """What a saver does to older checkpoints after a new one."""
    saver = SimpleNamespace(folder=folder, settings=CheckpointConfig(**settings), _pusher=None)
    Saver._retain(saver)  # type: ignore[arg-type]


def same_values(checkpoint: Checkpoint) -> None:
    for name, entry in checkpoint.parameters.items():
        numel = 1
        for length in entry["shape"]:
            numel *= length
        assert checkpoint.full(name).reshape(-1).equal(values_of(name, numel, checkpoint.step))


def contents(folder: Path) -> Counter[str]:
    """How often each content is there, under whatever name."""
    return Counter(
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )


# --- errors that are no damage ------------------------------------------------------------------

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
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, end: str
) -> None:
    """It is tried again, then said, and nothing is renamed; a moment's failure is not noticed."""
    before = sorted(folder.rglob("*"))
    with monkeypatch.context() as patch:
        tried = failing(patch, getattr(errno, name), end, 1)
        assert find_whole(folder, Alone()) == [] and len(tried) > 1  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        tried = failing(patch, getattr(errno, name), end, 10**9)
        with pytest.raises(UnreadableError, match="cannot be read") as error:
            find_whole(folder, Alone())  # type: ignore[arg-type]
        assert len(tried) < 10 and "\n" not in str(error.value) and end in str(error.value)
    assert sorted(folder.rglob("*")) == before


def test_a_folder_that_cannot_be_listed_is_not_empty(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run must not begin anew since its disk has a hiccup."""

    def fail(_: Path) -> Iterator[Path]:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(UnreadableError):
        list_checkpoints(folder)


def test_a_mount_that_vanishes_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = folder.with_name("away")
    real = pretrain.checkpoint.reader.read_manifest  # type: ignore[attr-defined]

    def vanish(path: Path) -> object:
        found = real(path)
        if folder.exists():
            folder.rename(away)
        return found

    monkeypatch.setattr(pretrain.checkpoint.reader, "read_manifest", vanish)
    with pytest.raises(UnreadableError, match="No such file"):
        find_whole(folder, Alone())  # type: ignore[arg-type]
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


def test_what_a_newer_version_wrote_is_not_damaged(folder: Path) -> None:
    path = folder / "step-00000008" / MANIFEST
    written = json.loads(path.read_bytes())
    del written["sha256"]
    path.write_bytes(sealed({**written, "version": 2, "more": {}}))
    with pytest.raises(RunError, match="newer version") as error:
        find_whole(folder, Alone())  # type: ignore[arg-type]
    assert "damaged" not in str(error.value) and "delete" not in str(error.value)
    assert (folder / "step-00000008").is_dir()


# --- what people and other runs put there -------------------------------------------------------


def copy_tree(source: Path, target: Path) -> None:
    """Links as links; without pipes and devices."""

    def odd(where: str, names: list[str]) -> list[str]:
        paths = {name: Path(where) / name for name in names}
        return [n for n, p in paths.items() if not (p.is_symlink() or p.is_dir() or p.is_file())]

    shutil.copytree(source, target, symlinks=True, ignore=odd)


def copy_as(name: str) -> Callable[[Path], Path]:
    def put(folder: Path) -> Path:
        copy_tree(folder / "step-00000004", folder / name)
        return folder / name

    return put


def put_file(folder: Path) -> Path:
    (folder / "step-00000010").write_text("notes")
    return folder / "step-00000010"


def put_folder(folder: Path) -> Path:
    (folder / "step-00000010").mkdir()
    (folder / "step-00000010/plan.txt").write_text("notes")
    return folder / "step-00000010"


def put_link(folder: Path) -> Path:
    (folder / "step-00000010").symlink_to(folder / "step-00000002")
    return folder / "step-00000010"


def put_dangling(folder: Path) -> Path:
    (folder / "step-00000010").symlink_to(folder / "nowhere")
    return folder / "step-00000010"


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
def test_what_is_not_the_runs_own_is_left_alone(folder: Path, what: str) -> None:
    """It stops neither the resume nor retention nor a save, and is neither used nor deleted."""
    path = FOREIGN[what](folder)
    inside = {one: one.read_bytes() for one in path.rglob("*") if one.is_file()}
    told = find_whole(folder, Alone())  # type: ignore[arg-type]
    assert list_checkpoints(folder)[-1].name == "step-00000008"
    assert len(told) == (0 if path.name == "backup" else 1)
    assert all(path.name in line and "\n" not in line for line in told)
    target = _free_name(folder, 10)
    assert not os.path.lexists(target) and step_of(target) == 10
    shutil.copytree(write_checkpoint(folder.parent.parent / "more", 10, run_id="0000aaaa"), target)
    retain(folder, keep=1)
    assert [one.name for one in list_checkpoints(folder)] == [target.name]
    assert os.path.lexists(path)
    assert (
        inside == {one: one.read_bytes() for one in path.rglob("*") if one.is_file()}
        or path.is_symlink()
    )


def test_a_retention_that_fails_is_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is still open on a network disk keeps its folder: ENOTEMPTY, or EBUSY."""
    with monkeypatch.context() as patch:

        def busy(*_: object, **__: object) -> None:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

        patch.setattr(Path, "rmdir", busy)
        retain(folder, keep=1)
    assert [one.name for one in list_checkpoints(folder)] == ["step-00000008"]
    assert len(list(folder.glob(".*.deleting"))) == 3
    retain(folder, keep=1)
    assert [one.name for one in folder.iterdir()] == ["step-00000008"]


# --- manifests ----------------------------------------------------------------------------------


def set_at(*keys: str) -> Callable[[dict[str, Any], object], None]:
    def put(manifest: dict[str, Any], value: object) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return put


FIRST, WEIGHT = "rank-00000.safetensors", "blocks.0.mlp.in.weight"
ODD: tuple[Any, ...] = (None, -1, 2**62, 1.5, True, "text", [], {}, [[]], "../../x", "\x00")


def damage(rng: random.Random, manifest: dict[str, Any]) -> None:
    """Something that a writer of this program never writes, somewhere in a manifest."""
    files, parameters = manifest["files"], manifest["parameters"]
    file = rng.choice(list(files))
    entry = files[file]
    name = rng.choice(list(entry["fragments"]))
    fragment = entry["fragments"][name]
    kind = rng.randrange(12)
    if kind == 0:
        files[rng.choice(("../a.safetensors", "/etc/passwd", "a/b.safetensors", ".", ""))] = (
            files.pop(file)
        )
    elif kind == 1:
        fragment[rng.randrange(2)] += rng.choice((-1, 1, 2**40))
    elif kind == 2:
        del entry["fragments"][name]
    elif kind == 3:
        fragment[2] = rng.choice(([], ["master", "master"], ["other"], "master", None, [1]))
    elif kind == 4:
        entry[rng.choice(list(entry))] = rng.choice([odd for odd in ODD if odd is not True])
    elif kind == 5:
        del entry[rng.choice(list(entry))]
    elif kind == 6:
        parameters[name]["shape"] = rng.choice(
            ([2**40, 2**20], [-1], [], None, "x", [1.5], [[1]], [7])
        )
    elif kind == 7:
        parameters[name]["partition_dim"] = rng.choice((9, -1, "x", 1.5))
    elif kind == 8:
        del manifest[rng.choice([key for key in manifest if key not in ("version", "run")])]
    elif kind == 9:
        manifest[rng.choice(("step", "state", "config", "grid", "parameters", "files"))] = (
            rng.choice([odd for odd in ODD if odd not in ({},)])
        )
    elif kind == 10:
        manifest["grid"]["tensor"] = rng.choice((0, -1, 3, 2**40, "x", None))
    else:
        manifest["version"] = rng.choice((0, -1, "1", None, [], 1.5))


def check_manifests(folder: Path, cases: int) -> None:
    """Sealed again, as by somebody who means harm: one line each, no file opened elsewhere."""
    path = folder / "step-00000008" / MANIFEST
    whole = json.loads(path.read_bytes())
    del whole["sha256"]
    for seed in range(cases):
        manifest = json.loads(json.dumps(whole))
        damage(random.Random(seed), manifest)
        path.write_bytes(sealed(manifest))
        with pytest.raises(RunError) as error:
            checkpoint = Checkpoint(path.parent)
            for name in checkpoint.parameters:
                checkpoint.full(name)
        assert "\n" not in str(error.value) and str(path.parent) in str(error.value), seed


def test_damaged_manifests(folder: Path) -> None:
    check_manifests(folder, 150)


@pytest.mark.long
def test_damaged_manifests_at_length(folder: Path) -> None:
    check_manifests(folder, 5000)


@pytest.mark.parametrize("kind", ["pipe", "zero", "folder", "loop"])
@pytest.mark.parametrize("name", [FIRST, MANIFEST])
def test_files_that_are_none(folder: Path, kind: str, name: str) -> None:
    """A pipe, a device, a folder, a link to itself: told at once, and the one before is taken."""
    file = folder / "step-00000008" / name
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "zero" else file)
    told = find_whole(folder, Alone())  # type: ignore[arg-type]
    assert len(told) == 1 and "step-00000008" in told[0] and "damaged" in told[0]
    assert list_checkpoints(folder)[-1].name == "step-00000006"


# --- fuzz ---------------------------------------------------------------------------------------


def spoil(rng: random.Random, folder: Path) -> None:
    """Something that happens to checkpoint folders."""
    steps = [path for path in sorted(folder.glob("step-0000000?")) if path.is_dir()]
    if not steps:
        return
    path = rng.choice([*steps, steps[-1], steps[-1]])
    files = [one for one in sorted(path.iterdir()) if one.is_file()]
    file = rng.choice(files) if files else path
    content = file.read_bytes() if file.is_file() else b""
    kind = rng.randrange(17)
    place = rng.randrange(max(1, len(content)))
    if kind <= 1 and content:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
    elif kind == 2 and content:
        file.write_bytes(content[:place])
    elif kind == 3 and content:
        file.write_bytes(content + rng.randbytes(rng.randint(1, 9)))
    elif kind == 4 and content:
        file.write_bytes(b"")
    elif kind == 5 and content:
        file.unlink()
    elif kind == 6 and content:
        file.rename(
            file.with_name(rng.choice(("x", "rank-00009.safetensors", "manifest.json.bak")))
        )
    elif kind == 7 and content:
        away = folder.parent / f"away-{rng.randrange(10**9)}"
        file.rename(away)
        file.symlink_to(away)
    elif kind == 8:
        name = rng.choice((f"{path.name}.bak", "step-8", "old", "step-00000019"))
        if not (folder / name).exists():
            path.rename(folder / name)
    elif kind == 9:
        away = folder.parent / f"moved-{rng.randrange(10**9)}"
        path.rename(away)
        path.symlink_to(away)
    elif kind == 10 and not (folder / "step-00000012").exists():
        copy_tree(path, folder / "step-00000012")
    elif kind == 11:
        (path / rng.choice(("notes.txt", ".DS_Store", "rank-00007.safetensors"))).write_text("x")
    elif kind == 12 and not (folder / "step-00000014").exists():
        copy_as("step-00000014")(folder) if (folder / "step-00000004").is_dir() else None
    elif kind == 13 and not os.path.lexists(folder / "step-00000010"):
        rng.choice((put_file, put_folder, put_link, put_dangling))(folder)
    elif kind == 14 and len(files) > 1:
        other = rng.choice(files)
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == 15 and content:
        file.unlink()
        rng.choice((lambda: os.mkfifo(file), file.mkdir, lambda: file.symlink_to("/dev/zero")))()
    else:
        (folder / rng.choice(("latest", "step-list.txt", ".step-00000008.writing"))).write_text("x")


def newest_whole(folder: Path, whole: dict[int, dict[str, bytes]]) -> int | None:
    """The step to go on from, by comparing every byte with what was written."""

    def same(path: Path, files: dict[str, bytes]) -> bool:
        return not path.is_symlink() and all(
            (path / name).is_file() and (path / name).read_bytes() == content
            for name, content in files.items()
        )

    steps = [n for n, files in whole.items() if same(folder / f"step-{n:08d}", files)]
    return max(steps, default=None)


def own_contents(path: Path) -> Counter[str]:
    """What a checkpoint consists of, without what others put into its folder."""
    return Counter(
        hashlib.sha256(one.read_bytes()).hexdigest()
        for one in path.iterdir()
        if (one.name == MANIFEST or one.suffix == ".safetensors")
        and one.is_file()
        and not one.is_symlink()
    )


def check_folders(origin: Path, work: Path, cases: int) -> None:
    whole = {
        step_of(path): {file.name: file.read_bytes() for file in path.iterdir()}
        for path in list_checkpoints(origin / "checkpoints")
    }
    for seed in range(cases):
        rng = random.Random(seed)
        run = work / str(seed)
        shutil.copytree(origin, run)
        folder = run / "checkpoints"
        for _ in range(rng.randint(1, 6)):
            spoil(rng, folder)
        wanted, before = newest_whole(folder, whole), contents(run)
        later = [one.name for one in folder.iterdir() if one.name.startswith("step-")
                 and (wanted is None or one.name > f"step-{wanted:08d}")]  # fmt: skip
        told, refused = list[str](), ""
        try:
            told = find_whole(folder, Alone())  # type: ignore[arg-type]
        except RunError as error:
            refused = str(error)
        assert contents(run) == before, seed
        assert "\n" not in refused and all("\n" not in line for line in told), seed
        found = list_checkpoints(folder)
        if wanted is None:
            assert not found, seed
        else:
            assert not refused and step_of(found[-1]) == wanted, (seed, wanted, refused)
            same_values(Checkpoint(found[-1]))
            said = " ".join(told)
            assert all(name in said or "more" in said for name in later), (seed, later, told)
            kept = before - sum((own_contents(path) for path in found[:-1]), Counter())
            retain(folder, keep=1)
            assert contents(run) == kept, seed
            assert list_checkpoints(folder) == found[-1:], seed
        shutil.rmtree(run)


def test_folders_that_were_spoilt(folder: Path, tmp_path: Path) -> None:
    check_folders(folder.parent, tmp_path / "work", 120)


@pytest.mark.long
def test_folders_that_were_spoilt_at_length(
    folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check_folders(folder.parent, tmp_path / "work", 4000)


def test_damage_is_an_error_of_a_run() -> None:
    assert issubclass(DamagedError, RunError) and issubclass(UnreadableError, RunError)
