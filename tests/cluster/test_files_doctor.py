"""The doctor's checks of files: three ranks, as threads, on file systems with one fault each."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.cluster import files_doctor
from pretrain.cluster.files_doctor import Finding, file_system, open_files
from tests.tools import base_recipe, run, write_recipe

RANKS = 3


class Thread:
    """A grid whose processes are threads."""

    world_size = RANKS

    def __init__(self, rank: int, meeting: threading.Barrier, answers: list[Any]) -> None:
        self.rank, self.is_main = rank, rank == 0
        self._meeting, self._answers = meeting, answers

    def barrier(self) -> None:
        self._meeting.wait(20)

    def gather(self, mine: Any) -> list[Any]:
        self._answers[self.rank] = mine
        self.barrier()
        found = list(self._answers)
        self.barrier()
        return found

    def broadcast(self, mine: Any) -> Any:
        return self.gather(mine)[0]


def on_ranks(look: Callable[[Any], Any]) -> list[Any]:
    """What each rank finds; all must find the same."""
    meeting, answers = threading.Barrier(RANKS), [None] * RANKS
    found: list[Any] = [None] * RANKS

    def work(rank: int) -> None:
        found[rank] = look(Thread(rank, meeting, answers))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[0] == found[1] == found[2]
    return list(found)


def examined(folder: Path) -> dict[str, Finding]:
    findings = on_ranks(lambda grid: file_system(grid, folder, "x"))[0]
    assert not list(folder.iterdir())  # nothing is left
    return {finding.check: finding for finding in findings}


def test_a_good_file_system(tmp_path: Path) -> None:
    found = examined(tmp_path)
    assert found.keys() == {"append", "rename", "folders", "locks"}
    assert {one.state for one in found.values()} == {"ok"}


def no_locks(*_: Any) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def closed_folder(*_: Any) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def losing(self: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
    """Appends replace, as on some object stores."""
    return io.open(self, mode.replace("a", "w"), *more, **options)  # noqa: UP020


@pytest.mark.parametrize(
    ("owner", "name", "fault", "check", "state", "words"),
    [
        (fcntl, "flock", no_locks, "locks", "warn", ("has no locks", "-o flock")),
        (fcntl, "flock", lambda *_: None, "locks", "warn", ("ranks [0, 1, 2] took a lock",)),
        (Path, "rename", closed_folder, "folders", "fail", ("cross-device", "--out")),
        (Path, "replace", closed_folder, "rename", "fail", ("cannot replace", "--out")),
        (Path, "replace", lambda *_: None, "rename", "fail", ("ranks [0, 1, 2] still", "actimeo")),
        (Path, "open", losing, "append", "fail", ("loses what was in it", "--out")),
        (os, "truncate", lambda *_: None, "append", "fail", ("cannot be cut", "--out")),
    ],
)
def test_one_fault(
    owner: Any, name: str, fault: Any, check: str, state: str, words: tuple[str, ...],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It is found, named with its mend, and nothing else is blamed."""
    monkeypatch.setattr(files_doctor, "_SEEN_WITHIN", 0.2)
    monkeypatch.setattr(owner, name, fault)
    found = examined(tmp_path)
    monkeypatch.undo()
    assert {one.check for one in found.values() if one.state != "ok"} == {check}
    assert found[check].state == state
    assert all(word in found[check].text for word in words), found[check].text


def test_limits_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(soft: int, hard: int, world: int) -> Finding:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
        monkeypatch.setattr(Thread, "world_size", world)
        one: Finding = on_ranks(open_files)[0]
        return one

    assert found(65_536, 65_536, 8).state == "ok"
    few = found(1024, 4096, 8)
    assert few.state == "warn" and "ulimit -n 4096" in few.text
    many = found(1024, 1 << 20, 512)  # a process holds connections to all others
    assert many.state == "fail" and "needs 4224: ulimit -n 65536" in many.text
    low = found(256, 1024, 512)
    assert low.state == "fail" and "hard limit of 4224" in low.text


def test_exit_codes_by_severity(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.cluster import doctor

    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    words = ("doctor", str(recipe), "--out", str(tmp_path / "run"))
    for state, code, strict in (("ok", 0, 0), ("warn", 0, 3), ("fail", 1, 1)):
        monkeypatch.setattr(doctor, "examine", lambda *_, s=state: [Finding("one", s, "a text")])
        assert run(monkeypatch, *words) == code
        assert run(monkeypatch, *words, "--strict") == strict
        assert f"{state:5} one" in capsys.readouterr().out
