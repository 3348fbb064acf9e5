"""One mirror for many runs: each finds its own copies, and touches nobody else's."""

from __future__ import annotations

import asyncio
import errno
import random
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

import pretrain.checkpoint.pusher
from pretrain.checkpoint.manifest import MANIFEST
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.pusher import Pusher
from pretrain.checkpoint.reader import RUN_ID, Checkpoint, list_checkpoints, run_id_of
from pretrain.checkpoint.recover import find_whole
from pretrain.config.run import CheckpointConfig
from pretrain.config.urls import without_secrets
from pretrain.errors import RunError, UsageError
from pretrain.runs.folder import misfit
from tests.checkpoints import Alone, put_in_place_of, small_config, write_checkpoint, write_run

TASK: Any = SimpleNamespace(tokenizer="t", identity="d", eod=0)
ALL = CheckpointConfig(keep=0)


def fits(rate: float = 3e-3, task: Any = TASK) -> Any:
    return partial(misfit, config=small_config(rate), task=task)


def make_run(run: Path, steps: tuple[int, ...], run_id: str, rate: float = 3e-3) -> Path:
    for step in steps:
        write_checkpoint(run, step, run_id=run_id, rate=rate)
    (run / RUN_ID).write_text(run_id)
    return run


def push_all(run: Path, root: Path, settings: CheckpointConfig = ALL) -> Mirror:
    mirror = Mirror(f"file://{root}", run)
    for path in list_checkpoints(run / "checkpoints"):
        mirror.push(path, settings)
    return mirror


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "run.json")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pull(run: Path, root: Path, rate: float = 3e-3, task: Any = TASK) -> list[str]:
    return find_whole(run / "checkpoints", Alone(), f"file://{root}", fits(rate, task))  # type: ignore[arg-type]


def test_a_run_of_another_recipe_is_not_taken(tmp_path: Path) -> None:
    """Another rate, other data, under the same name: the run begins anew, and says why."""
    push_all(make_run(tmp_path / "a/run", (2, 4), "0000aaaa"), tmp_path / "mirror")
    told = pull(tmp_path / "b/run", tmp_path / "mirror", rate=1e-4)
    assert (
        len(told) == 1 and "learning_rate 0.003, here 0.0001" in told[0] and "left alone" in told[0]
    )
    other = SimpleNamespace(tokenizer="t", identity="e", eod=0)
    assert "other data" in pull(tmp_path / "b/run", tmp_path / "mirror", task=other)[0]
    assert pull(tmp_path / "b/other-name", tmp_path / "mirror") == []
    assert not list_checkpoints(tmp_path / "b/run/checkpoints")


def test_a_lost_folder_finds_its_own(tmp_path: Path) -> None:
    """With its id; what it pushes then prunes by its own rules, and with keep=0 nothing."""
    run, root = tmp_path / "run", tmp_path / "mirror"
    before = tree(make_run(run, (2, 4, 6), "0000aaaa"))
    push_all(run, root)
    shutil.rmtree(run)
    assert pull(run, root)[-1].startswith("step-00000006 was fetched from")
    assert run_id_of(run) == "0000aaaa"
    (path,) = list_checkpoints(run / "checkpoints")
    assert all(before[str(file)] == file.read_bytes() for file in path.iterdir())
    mirror = push_all(make_run(run, (8,), "0000aaaa"), root)
    place = root / "run-0000aaaa"
    assert names(place) == [f"step-{n:08d}" for n in (2, 4, 6, 8)]
    mirror.push(run / "checkpoints/step-00000008", CheckpointConfig(keep=1, keep_every=4))
    assert names(place) == ["step-00000004", "step-00000008"]


def test_a_run_without_its_id_pushes_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (2,), "0000aaaa")
    (run / RUN_ID).unlink()
    with pytest.raises(RunError, match="run-id does not exist"):
        push_all(run, tmp_path / "mirror")
    assert not (tmp_path / "mirror").exists()


def test_a_copy_for_another_folder_is_another_run(tmp_path: Path) -> None:
    """Two folders of one name and recipe never write to one place."""
    push_all(make_run(tmp_path / "a/run", (2,), "0000aaaa"), tmp_path / "mirror")
    assert "fetched" in pull(tmp_path / "b/run", tmp_path / "mirror")[-1]
    mine = run_id_of(tmp_path / "b/run")
    (path,) = list_checkpoints(tmp_path / "b/run/checkpoints")
    assert mine not in ("", "0000aaaa") and Checkpoint(path).run == mine


def test_what_others_put_at_the_mirror_stays(tmp_path: Path) -> None:
    """Notes, copies, another run's checkpoints, and those of the first versions."""
    root = tmp_path / "mirror"
    for place in (root, root / "run-0000aaaa", root / "run-0000bbbb"):
        for name in ("step-by-step-notes", "step-00000002-good", "step-8", "step-00000001"):
            (place / name).mkdir(parents=True)
            (place / name / "notes.txt").write_text(name)
        (place / "step-00000099").write_text("a file")
    shutil.copytree(write_checkpoint(tmp_path / "old", 3), root / "step-00000003")
    before = tree(root)
    run = make_run(tmp_path / "run", (2, 4, 6), "0000aaaa")
    push_all(run, root, CheckpointConfig(keep=1))
    after = tree(root)
    assert before.items() <= after.items()
    new = {Path(path).parent.name for path in after.keys() - before.keys()}
    assert new == {"run-0000aaaa", "step-00000006"}


def test_copies_of_the_first_versions_are_read(tmp_path: Path) -> None:
    root = tmp_path / "mirror"
    for step, rate in ((2, 3e-3), (4, 3e-3), (6, 1e-4)):
        path = write_checkpoint(tmp_path / f"old{step}", step, rate=rate)
        shutil.copytree(path, root / path.name)
    before = tree(root)
    told = pull(tmp_path / "run", root)
    assert "another recipe" in told[0] and "step-00000004 was fetched" in told[-1]
    push_all(make_run(tmp_path / "run", (8,), run_id_of(tmp_path / "run")), root)
    assert before.items() <= tree(root).items()


def test_damage_at_the_mirror(tmp_path: Path) -> None:
    run, root = make_run(tmp_path / "run", (2, 4, 6, 8), "0000aaaa"), tmp_path / "mirror"
    push_all(run, root)
    place = root / "run-0000aaaa"
    file = place / "step-00000008/rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"xxxx")
    (place / "step-00000006/rank-00001.safetensors").unlink()
    (place / "step-00000004" / MANIFEST).write_text("{")
    shutil.rmtree(run)
    told = pull(run, root)
    assert sum("damaged there" in line for line in told) == 3 and "step-00000002 was" in told[-1]
    assert names(place) == [f"step-{n:08d}" for n in (2, 4, 6, 8)]


@pytest.mark.parametrize("kind", ["pipe", "zero", "folder", "dangling"])
@pytest.mark.parametrize("name", ["rank-00001.safetensors", MANIFEST])
def test_what_is_no_file_at_the_mirror(tmp_path: Path, kind: str, name: str) -> None:
    """Pipes and devices are not read: neither time nor the disk goes to them."""
    run, root = make_run(tmp_path / "run", (2, 4), "0000aaaa"), tmp_path / "mirror"
    push_all(run, root)
    put_in_place_of(root / "run-0000aaaa/step-00000004" / name, kind)
    shutil.rmtree(run)
    assert pull(run, root)[-1].startswith("step-00000002 was fetched")


def test_secrets_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any URL: what is written and said has no password; references stay, and are followed."""
    urls = (
        "sftp://me:hunter2@host/a",
        "s3://KEY:hu/nter2@x?token=hunter2&a=hunter2",
        "simplecache::sftp://me:hu@nter2@host/a",
        "https://:hunter2@h/?k=hunter2",
    )
    for url in urls:
        config = CheckpointConfig(mirror=url)
        shown = config.model_dump()["mirror"] + config.model_dump_json()
        assert config.mirror == url and "hunter2" not in shown and "nter2@" not in shown, shown
    kept = "sftp://me:${WORD}@host/a?k=${WORD}"
    assert CheckpointConfig(mirror=kept).model_dump()["mirror"] == kept
    for url in ("file:///a/b@c:d", "sftp://host:22/a@b", "abfs://box@account.host/a", "/a:b@c"):
        assert without_secrets(url) == url
    with pytest.raises(UsageError, match="WORD is not set"):
        Mirror(kept, tmp_path)
    with pytest.raises(UsageError, match="left out"):
        Mirror("sftp://me:***@host/a", tmp_path)
    monkeypatch.setenv("WORD", "mirror-hunter2")
    mirror = Mirror(f"file://{tmp_path}/${{WORD}}", tmp_path / "run")
    run = make_run(tmp_path / "run", (2,), "0000aaaa")
    mirror.push(run / "checkpoints/step-00000002", ALL)
    assert (tmp_path / "mirror-hunter2/run-0000aaaa/step-00000002").is_dir()

    def fail(*_: object, **__: object) -> None:
        raise OSError(f"sftp://me:mirror-hunter2@host: cannot open {tmp_path}/mirror-hunter2")

    monkeypatch.setattr(LocalFileSystem, "makedirs", fail)
    with pytest.raises(RunError) as error:
        mirror.push(run / "checkpoints/step-00000002", ALL)
    assert "hunter2" not in str(error.value) and "not copied" in str(error.value)


def test_a_run_that_went_back_replaces_its_future(tmp_path: Path) -> None:
    run, root = make_run(tmp_path / "run", (2, 4, 6, 8), "0000aaaa"), tmp_path / "mirror"
    mirror = push_all(run, root)
    mirror.push(run / "checkpoints/step-00000006", ALL)
    assert names(root / "run-0000aaaa") == [f"step-{n:08d}" for n in (2, 4, 6)]


def test_a_mirror_that_fails_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_all(make_run(tmp_path / "run", (2,), "0000aaaa"), tmp_path / "mirror")
    shutil.rmtree(tmp_path / "run")

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(LocalFileSystem, "ls", fail)
    with pytest.raises(RunError, match="cannot be read"):
        pull(tmp_path / "run", tmp_path / "mirror")


def test_many_runs_at_one_mirror(tmp_path: Path) -> None:
    """Any names, recipes and losses of folders: each takes its own newest, or nothing."""
    rng, root = random.Random(0), tmp_path / "mirror"
    runs: dict[Path, tuple[float, int]] = {}
    for number in range(12):
        run = (
            tmp_path / f"{number % 5}" / rng.choice(("run", "run-2", "a b", "a_b", "run-0000aaaa"))
        )
        if run not in runs:
            runs[run] = (rng.choice((1e-3, 2e-3)), rng.choice((2, 4, 6)))
            make_run(run, (runs[run][1],), f"{number:08x}", runs[run][0])
            push_all(run, root)
    for run, (rate, step) in runs.items():
        mine = run_id_of(run)
        shutil.rmtree(run / "checkpoints")
        assert pull(run, root, rate)[-1].startswith(f"step-{step:08d} was fetched"), run
        shutil.rmtree(run)
        pull(run, root, rate)
        (path,) = list_checkpoints(run / "checkpoints")
        found = Checkpoint(path)
        assert misfit(found, small_config(rate), TASK) == ""
        others = [r for r, (other, _) in runs.items() if r.name == run.name and other == rate]
        assert len(others) > 1 or (found.step, found.run) == (step, mine)


# --- beside training ----------------------------------------------------------------------------


def member(rank: int, size: int) -> Any:
    """A process's place, as far as a `Pusher` asks."""
    return SimpleNamespace(rank=rank, world_size=size, is_main=rank == 0)


def digests_of(path: Path, rank: int) -> dict[str, str]:
    """What a process knows of a checkpoint's files when it queues it."""
    if not path.is_dir():  # deleted meanwhile: nothing of it is read
        return {}
    own = f"rank-{rank:05d}.safetensors"
    found = Checkpoint(path).checksums
    return found if rank == 0 else {name: one for name, one in found.items() if name == own}


class Copies:
    """Pushers of some processes of one run, which note what each one opens."""

    def __init__(self, run: Path, root: Path, size: int, patience: float = 30.0) -> None:
        self.opened: dict[int, list[str]] = {rank: [] for rank in range(size)}
        self.told: list[tuple[str, str]] = []
        self.broken: dict[tuple[int, str], BaseException] = {}
        self.pushers = []
        for rank in range(size):
            mirror = Mirror(f"file://{root}", run)
            mirror._copy = partial(self._copy, rank, mirror._copy)  # type: ignore[method-assign]
            self.pushers.append(Pusher(
                mirror, ALL, lambda path, _, problem: self.told.append((path.name, problem)),
                member(rank, size), patience,
            ))  # fmt: skip

    def _copy(self, rank: int, copy: Any, source: Path, target: str) -> None:
        name = f"{source.parent.name}/{source.name}"
        self.opened[rank].append(name)
        if error := self.broken.get((rank, name)):
            Path(target).write_bytes(b"a part")
            raise error
        copy(source, target)

    def push(self, paths: list[Path], ranks: list[int] | None = None) -> None:
        living = list(ranks or range(len(self.pushers)))
        for path in paths:
            for rank in random.sample(living, len(living)):
                self.pushers[rank].add(path, digests_of(path, rank))
        for rank in living:
            self.pushers[rank].wait(60)


def make_parts(run: Path, steps: tuple[int, ...], size: int) -> list[Path]:
    """Checkpoints of a job of some processes, each with a file."""
    for step in steps:
        write_checkpoint(run, step, parts=size, run_id="0000aaaa")
    (run / RUN_ID).write_text("0000aaaa")
    return list_checkpoints(run / "checkpoints")


def assert_whole(copy: Path, source: Path) -> None:
    assert {file.name for file in copy.iterdir()} == {file.name for file in source.iterdir()}
    assert not Checkpoint(copy).problem()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain.checkpoint.pusher, "_LOOK", 0.01)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_process_copies_its_own_file(size: int, tmp_path: Path) -> None:
    """Also where one checkpoint is deleted meanwhile; a second push copies nothing."""
    run, place = tmp_path / "run", tmp_path / "mirror/run-0000aaaa"
    paths = make_parts(run, (2, 4, 6), size)
    copies = Copies(run, tmp_path / "mirror", size)
    shutil.rmtree(paths[1])
    copies.push(paths)
    kept = [paths[0], paths[2]]
    assert copies.told == [(path.name, "") for path in kept]
    for path in kept:
        assert_whole(place / path.name, path)
    for rank, names in copies.opened.items():
        own = [f"{path.name}/rank-{rank:05d}.safetensors" for path in kept]
        assert sorted(names) == sorted([*own, *(f"{path.name}/manifest.json" for path in kept)]
                                       if rank == 0 else own)  # fmt: skip
    before = tree(tmp_path / "mirror")
    copies.opened = {rank: [] for rank in range(size)}
    began = time.monotonic()
    copies.push(kept[1:])
    assert tree(tmp_path / "mirror") == before and not any(copies.opened.values())
    assert copies.told[2:] == [(kept[1].name, "")]
    assert time.monotonic() - began < 20, "waited for marks of a complete copy"


@pytest.mark.usefixtures("quick")
def test_a_process_that_comes_while_the_manifest_is_written(tmp_path: Path) -> None:
    """The main process has given it up; a part of a manifest is not one of another checkpoint."""
    run, place = tmp_path / "run", tmp_path / "mirror/run-0000aaaa"
    (path,) = make_parts(run, (4,), 2)
    copies = Copies(run, tmp_path / "mirror", 2, patience=0.1)
    copy = copies.pushers[0]._mirror._copy

    def slow(source: Path, target: str) -> None:
        if source.name != MANIFEST:
            copy(source, target)
            return
        with Path(target).open("wb") as file:
            file.write(source.read_bytes()[:9])
            file.flush()
            copies.pushers[1].add(path, digests_of(path, 1))
            copies.pushers[1].wait(60)
            file.write(source.read_bytes()[9:])

    copies.pushers[0]._mirror._copy = slow  # type: ignore[method-assign]
    copies.pushers[0].add(path, digests_of(path, 0))
    copies.pushers[0].wait(60)
    assert_whole(place / path.name, path)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("lost", ["gone", "error", "cancelled", "ends in haste"])
def test_a_lost_process_loses_no_copy(lost: str, size: int, tmp_path: Path) -> None:
    """The main process copies what others did not; a part of a file is copied again."""
    run, place = tmp_path / "run", tmp_path / "mirror/run-0000aaaa"
    (path,) = make_parts(run, (4,), size)
    copies = Copies(run, tmp_path / "mirror", size, patience=300.0 if "haste" in lost else 0.1)
    name = f"{path.name}/rank-{size - 1:05d}.safetensors"
    errors = {"error": OSError(5, "no"), "cancelled": asyncio.CancelledError()}
    if lost in errors:
        copies.broken[size - 1, name] = errors[lost]
        copies.push([path])
    elif lost == "gone":
        copies.push([path], list(range(size - 1)))
    else:
        for rank, pusher in enumerate(copies.pushers[:-1]):
            pusher.add(path, digests_of(path, rank))
        for pusher in reversed(copies.pushers[:-1]):
            pusher.wait_alone(30)
        for pusher in copies.pushers[:-1]:  # one that was late may still be at work
            pusher.wait(30)
    assert_whole(place / path.name, path)
    assert name in copies.opened[0]
    if lost == "gone":  # the next time it is not waited for
        copies.pushers[0]._patience = 300.0
        (_, later) = make_parts(run, (6,), size)
        copies.push([later], list(range(size - 1)))
        assert_whole(place / later.name, later)
        del copies.told[1:]
    ((told, why),) = copies.told
    assert told == path.name and ("rank 0 copied 1 file" in why) == ("haste" not in lost)


@pytest.mark.usefixtures("quick")
def test_another_checkpoint_of_a_step_replaces_the_copy(tmp_path: Path) -> None:
    """On fewer processes, and with marks that a killed job has left of other contents."""
    run, place = tmp_path / "run", tmp_path / "mirror/run-0000aaaa"
    copies = Copies(run, tmp_path / "mirror", 4)
    copies.push(make_parts(run, (4,), 4))
    shutil.rmtree(run / "checkpoints")
    write_checkpoint(run, 4, parts=2, run_id="0000aaaa", rate=7e-3)
    (path,) = list_checkpoints(run / "checkpoints")
    stale = place / path.name / "rank-00001.safetensors.0123456789abcdef.copied"
    stale.touch()
    Copies(run, tmp_path / "mirror", 2).push([path])
    assert not stale.exists() and not Checkpoint(place / path.name).problem()
    manifests = [(folder / path.name / MANIFEST).read_bytes() for folder in (place, path.parent)]
    assert manifests[0] == manifests[1]


@pytest.mark.usefixtures("quick")
def test_parts_of_a_copy_that_was_never_completed_are_deleted(tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "mirror/run-0000aaaa"
    first, second = make_parts(run, (2, 4), 2)
    copies = Copies(run, tmp_path / "mirror", 2)
    copies.push([first], [1])  # and then all are killed
    assert (place / first.name).is_dir() and not (place / first.name / MANIFEST).exists()
    copies.push([second])
    assert names(place) == [second.name]


class Gate(LocalFileSystem):  # type: ignore[misc]
    """A mirror that takes what is written to it when it is opened."""

    protocol = "gate"
    cachable = False
    opened = threading.Event()

    def open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        if "w" in mode:
            assert self.opened.wait(20)
        return super().open(path, mode, **more)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    fsspec.register_implementation("gate", Gate, clobber=True)
    Gate.opened.clear()
    yield Gate.opened
    Gate.opened.set()


def test_the_mirror_is_nobodys_wait(tmp_path: Path, gate: threading.Event) -> None:
    """Copies go on beside training; one that retention has deleted meanwhile is not missed."""
    run = make_run(tmp_path / "run", (2, 4, 6), "0000aaaa")
    done: list[tuple[str, str]] = []
    pusher = Pusher(
        Mirror(f"gate://{tmp_path}/mirror", run), ALL,
        lambda path, _, problem: done.append((path.name, problem)),
        member(0, 1),
    )  # fmt: skip
    began = time.monotonic()
    for path in list_checkpoints(run / "checkpoints"):
        pusher.add(path, digests_of(path, 0))
    assert time.monotonic() - began < 5 and not done
    while pusher.current is None:
        time.sleep(0.01)
    shutil.rmtree(run / "checkpoints/step-00000004")
    gate.set()
    pusher.wait(20)
    assert done == [("step-00000002", ""), ("step-00000006", "")]
    assert names(tmp_path / "mirror/run-0000aaaa") == ["step-00000002", "step-00000006"]


def test_write_run_is_a_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", (2,))
    assert find_whole(folder, Alone()) == [] and run_id_of(tmp_path / "run") == "0000aaaa"  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick")
def test_a_process_that_comes_after_the_end_leaves_no_mark(tmp_path: Path) -> None:
    """The main process has copied its file and completed the copy before it could."""
    run, place = tmp_path / "run", tmp_path / "mirror/run-0000aaaa"
    (path,) = make_parts(run, (4,), 2)
    copies = Copies(run, tmp_path / "mirror", 2, patience=0.0)
    copy = copies.pushers[1]._mirror._copy

    def late(source: Path, target: str) -> None:
        copies.pushers[0].add(path, digests_of(path, 0))
        copies.pushers[0].wait(60)
        copy(source, target)

    copies.pushers[1]._mirror._copy = late  # type: ignore[method-assign]
    copies.pushers[1].add(path, digests_of(path, 1))
    copies.pushers[1].wait(60)
    assert_whole(place / path.name, path)


def test_a_file_system_that_cannot_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mounted object store."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    run, place = tmp_path / "run", tmp_path / "mirror/run-0000aaaa"
    (path,) = make_parts(run, (4,), 2)
    monkeypatch.setattr("pretrain.checkpoint.mirror.os.replace", refuse)
    Mirror(str(tmp_path / "mirror"), run).push(path, ALL)
    assert_whole(place / path.name, path)


def test_only_parts_of_its_own_are_removed(tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "mirror/run-0000aaaa"
    (path,) = make_parts(run, (4,), 2)
    (place / path.name).mkdir(parents=True)
    (place / "step-00000002").mkdir()
    own = [f"{name}.0123abcd.part" for name in ("rank-00001.safetensors", MANIFEST)]
    for name in (*own, "movie.part"):
        (place / path.name / name).touch()
    (place / "step-00000002/movie.part").touch()
    Mirror(str(tmp_path / "mirror"), run).push(path, ALL)
    assert (place / "step-00000002/movie.part").exists()
    (place / path.name / "movie.part").unlink()
    assert_whole(place / path.name, path)


def test_a_manifest_that_another_process_removes_just_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, place = tmp_path / "run", tmp_path / "mirror/run-0000aaaa"
    (path,) = make_parts(run, (4,), 1)
    mirror = Mirror(str(tmp_path / "mirror"), run)
    (place / path.name).mkdir(parents=True)
    (place / path.name / MANIFEST).write_text("of another checkpoint")
    plain = mirror._system.cat_file

    def late(name: str, **more: object) -> bytes:
        Path(name).unlink(missing_ok=True)
        read: bytes = plain(name, **more)
        return read

    monkeypatch.setattr(mirror._system, "cat_file", late)
    mirror.deliver(path, digests_of(path, 0))
    assert (place / path.name / "rank-00000.safetensors").exists()
