"""Files written aside, locks where there are none, waiting that is no hang."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import data_pipeline.disk
from data_pipeline.disk import count
from data_pipeline.files import is_leftover, replacing, write_aside, write_synced
from pretrain.distributed.watchdog import Watchdog
from pretrain.errors import RunError
from pretrain.runs.folder import create_run
from pretrain.runs.lock import LOCK, BusyError, RunLock, is_busy
from pretrain.runs.metrics import METRICS, _append
from tests.checkpoints import small_config


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Any number at once: each has a name of its own, and the file is one of theirs."""
    path = tmp_path / "jumps.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_aside(path, b"%d" % number * 50), range(300)))
    assert len(set(path.read_bytes().decode())) <= 3
    assert [one.name for one in tmp_path.iterdir()] == ["jumps.json"]


def test_what_lies_in_wait_is_not_written_through(tmp_path: Path) -> None:
    """Links prepared under the names that a writer uses, or might use."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("evaluation.json", "evaluation.json.tmp", "manifest.json", LOCK):
        (folder / name).symlink_to(victim)
    write_aside(folder / "evaluation.json", b"{}")
    assert not (folder / "evaluation.json").is_symlink()
    with pytest.raises(OSError, match="symbolic links"):
        write_synced(folder / "manifest.json", b"{}")
    with pytest.raises(OSError, match="a link, not a regular file"):
        RunLock(folder).acquire()
    (folder / METRICS).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        _append(folder / METRICS, "x")
    with pytest.raises(RunError, match="is a link"):
        create_run(folder, small_config(), {})
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("target", ["nowhere", "file", "x/y/z", "folder"])
def test_a_link_that_leads_nowhere_is_replaced(tmp_path: Path, target: str) -> None:
    """Also one to itself (``file``), and one to a folder that it must not fill."""
    (tmp_path / "folder").mkdir()
    path = tmp_path / "file"
    path.symlink_to(target)
    write_aside(path, b"x")
    assert path.read_bytes() == b"x" and not path.is_symlink()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_the_mode_stays(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    write_aside(path, b"x")
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EDQUOT", "EFBIG"])
def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text("before")

    def fail(_: int) -> None:
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"evaluation\.json"):
        write_aside(path, b"after")
    assert [one.name for one in tmp_path.iterdir()] == [
        "evaluation.json"
    ] and path.read_text() == "before"


def test_what_a_kill_leaves_is_known(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "config.yaml") as aside:
        name = aside.name
        raise KeyboardInterrupt
    assert is_leftover(name, "config.yaml") and not is_leftover(name, "metrics.jsonl")
    assert not is_leftover(".config.yaml.tmp", "config.yaml") and not list(tmp_path.iterdir())


# --- locks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """It is said in one line, and the run goes on; nobody is taken to be at work."""
    number = getattr(errno, name)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    for _ in range(2):
        lock = RunLock(tmp_path)
        lock.acquire()
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "no locks" in said and os.strerror(number) in said
        assert not is_busy(tmp_path)


@pytest.mark.parametrize("name", ["EWOULDBLOCK", "EACCES"])
def test_a_lock_that_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(getattr(errno, name), "held")

    (tmp_path / LOCK).touch()
    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(BusyError):
        RunLock(tmp_path, patience=0.1).acquire()
    assert is_busy(tmp_path)


# --- waiting ------------------------------------------------------------------------------------


class Looking(Watchdog):
    """A watchdog of 10 s whose clock is ``now``; ``others``: bytes of all ranks at each look."""

    def __init__(self, others: list[list[int | None]]) -> None:
        grid: Any = SimpleNamespace(rank=0, world_size=1)
        self.now = [0.0]
        super().__init__(grid, Path("nowhere"), 10.0, clock=lambda: self.now[0])
        self._looks, self._last = iter(others), others[-1]

    def _read_all(self) -> list[dict[str, Any] | None]:
        counts = next(self._looks, self._last)
        return [None if count is None else {"moved": count} for count in counts]


def hangs_after(dog: Looking, move: int = 0) -> float | None:
    """Seconds until it says so, looking once a second for two minutes."""
    dog._beat = (0.0, 1, "training")
    for second in range(1, 121):
        dog.now[0] = float(second)
        if move and second % move == 0:
            count(1)
        if dog._hangs():
            return float(second)
    return None


def test_waiting_for_a_disk_that_works_is_no_hang() -> None:
    """Of this rank or of another; one that stands still is seen in time, and so is a dead store."""
    assert hangs_after(Looking([[0]])) == 11.0
    assert hangs_after(Looking([[0]]), move=8) is None
    assert hangs_after(Looking([[0]]), move=30) == 11.0
    growing: list[list[int | None]] = [[0, number // 4] for number in range(200)]
    assert hangs_after(Looking(growing)) is None
    stops: list[list[int | None]] = [[0, min(number, 20)] for number in range(200)]
    assert 30 < (hangs_after(Looking(stops)) or 0) < 40
    gone: list[list[int | None]] = [[0, 5], [0, 5], *[[None, None]] * 200]  # type: ignore[list-item]
    assert hangs_after(Looking(gone)) == 11.0


def test_moved_only_grows() -> None:
    before = data_pipeline.disk.moved()
    threads = [threading.Thread(target=count, args=(3,)) for _ in range(4)]
    for thread in threads:
        thread.start()
        thread.join()
    assert data_pipeline.disk.moved() == before + 12
