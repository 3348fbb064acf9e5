"""Indices of large data: built once on a machine, the same samples, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import shared_indices
from data_pipeline.shared_indices import shared_arrays
from tests.tools import environment

PROCESS = """
import hashlib, sys
from pathlib import Path
from data_pipeline import shared_indices
from data_pipeline.dataset import TrainingData
from data_pipeline.indexed import index_classes
from data_pipeline.manifest import load_manifest
shared_indices.LEAST = int(sys.argv[2])
base = index_classes().GPTDataset.__mro__[1]
build, built = base._build_document_sample_shuffle_indices, []
def counted(self):
    built.append(1)
    return build(self)
base._build_document_sample_shuffle_indices = counted
data = TrainingData(load_manifest(Path(sys.argv[1])), "proportional", 32, 7, 4000)
digest = hashlib.sha256()
for number in (*range(0, 200), *range(3900, 4000)):
    for part in data[number]:
        digest.update(part.tobytes())
print("RESULT", digest.hexdigest(), len(built), flush=True)
sys.stdin.read()  # a process that ends takes away what others have not mapped yet
"""


def sampled(data: Path, folder: Path, processes: int, least: int) -> list[tuple[str, int]]:
    """(hash of samples of two epochs, number of indices that were built) of each process."""
    folder.mkdir(exist_ok=True)
    more = {"LOCAL_WORLD_SIZE": str(processes), "TMPDIR": str(folder)}
    words = [sys.executable, "-c", PROCESS, str(data), str(least)]
    running = [
        subprocess.Popen(words, env=environment() | more, text=True, stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE)
        for _ in range(processes)
    ]  # fmt: skip
    lines = [one.stdout.readline() for one in running if one.stdout is not None]
    for one in running:
        one.communicate("", timeout=120)
    answers = [line.removeprefix("RESULT").split() for line in lines]
    return [(digest, int(built)) for digest, built in answers]


@pytest.mark.long
def test_one_process_of_three_builds(data: Path, tmp_path: Path) -> None:
    ((digest, built),) = sampled(data, tmp_path / "alone", 1, 0)
    assert built == 6 and not list((tmp_path / "alone").iterdir())  # three subsets, two epochs
    found = sampled(data, tmp_path / "shared", 3, 0)
    assert {one for one, _ in found} == {digest} and sum(count for _, count in found) == built
    (place,) = (tmp_path / "shared").iterdir()
    assert place.stat().st_mode & 0o777 == 0o700
    assert all(entry.suffix == ".lock" for entry in place.iterdir())


HASHING = """
import hashlib, sys
from pathlib import Path
from data_pipeline import checksums, shared_indices
from data_pipeline.records import DataError
shared_indices.LEAST = int(sys.argv[2])
file, read = Path(sys.argv[1]), []
original = checksums.sha256_of
checksums.sha256_of = lambda path: read.append(1) or original(path)
told = ""
for expected in (original(file), "0" * 64):  # the second time, nothing is read
    try:
        checksums.verify(file, {file: expected})
    except DataError as error:
        told += str(error)
print("RESULT", "damaged" in told, len(read), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("least", "reads"), [(1, 1), (1 << 30, 3)])
def test_one_process_of_three_reads_a_large_file(least: int, reads: int, tmp_path: Path) -> None:
    file = tmp_path / "large file\udcff.idx"  # whatever its name
    file.write_bytes(os.urandom(1000))
    (tmp_path / "shared").mkdir()
    more = {"LOCAL_WORLD_SIZE": "3", "TMPDIR": str(tmp_path / "shared")}
    running = [
        subprocess.Popen([sys.executable, "-c", HASHING, str(file), str(least)],
                         env=environment() | more, text=True, stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE)
        for _ in range(3)
    ]  # fmt: skip
    lines = [one.stdout.readline() for one in running if one.stdout is not None]
    for one in running:
        one.communicate("", timeout=120)
    told = [line.split() for line in lines]
    assert all(answer == "True" for _, answer, _ in told)
    assert sum(int(count) for *_, count in told) == reads
    left = [one for one in (tmp_path / "shared").rglob("*") if one.is_file()]
    assert all(one.suffix == ".lock" for one in left)


def arrays() -> tuple[np.ndarray, ...]:
    return np.arange(5, dtype=np.int32), np.arange(6, dtype=np.uint32).reshape(3, 2)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(shared_indices, "LEAST", 1)
    return tmp_path / f"rankdecay-indices-{os.getuid()}"


def test_what_a_killed_job_left_is_used_or_goes(place: Path) -> None:
    """Whole files are mapped; half-written ones are written again; old ones are deleted."""
    first = shared_arrays("a", 10, arrays, 3)
    assert isinstance(first[0], np.memmap) and (place / "a" / "count").read_text() == "1"
    second = shared_arrays("a", 10, lambda: pytest.fail("built twice"), 3)
    for one, other, wanted in zip(first, second, arrays(), strict=True):
        np.testing.assert_array_equal(one, wanted)
        np.testing.assert_array_equal(other, wanted)
        assert one.dtype == wanted.dtype
    (place / "a" / "count").unlink()
    assert len(shared_arrays("a", 10, arrays, 1000)) == 2
    old = time.time() - 2 * 24 * 3600
    os.utime(place / "a", (old, old))
    shared_arrays("b", 10, arrays, 2)
    assert not (place / "a").exists() and (place / "b").exists()
    shared_arrays("b", 10, lambda: pytest.fail("built twice"), 2)
    assert not (place / "b").exists()  # both have mapped it


def test_without_a_place_each_process_has_its_own(place: Path, tmp_path: Path) -> None:
    """Alone, small, a folder of others, a link, or a full disk."""
    assert not isinstance(shared_arrays("a", 10, arrays, 1)[0], np.memmap)
    assert not isinstance(shared_arrays("a", 0, arrays, 8)[0], np.memmap)
    assert not place.exists()
    place.mkdir(mode=0o755)
    place.chmod(0o755)
    assert not isinstance(shared_arrays("a", 10, arrays, 8)[0], np.memmap)
    assert not list(place.iterdir())
    place.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")
    assert not isinstance(shared_arrays("a", 10, arrays, 8)[0], np.memmap)
    place.unlink()
    with pytest.MonkeyPatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(np, "save", full)
        found = shared_arrays("a", 10, arrays, 8)
    np.testing.assert_array_equal(found[0], arrays()[0])
    assert not (place / "a").exists()
