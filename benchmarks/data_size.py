"""Data at the size of the Pile and of 10¹² tokens, simulated.

    python benchmarks/data_size.py --out benchmarks/results/data_size-cpu.json

First the progress of a tokenisation: files, waits for the disk and seconds for one saving, with the
22 subsets of the Pile in three splits, and how many the 825 GB of the Pile take; beside the earlier
form of three files for every subset and split. Then the start of training on a sparse folder of
tokens: seconds and private memory of each of some processes that read the same data, with and
without shared indices.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.data import write_sparse
from benchmarks.results_file import finish
from data_pipeline.encode import DOCUMENT_TYPE, Encoded
from data_pipeline.files import write_synced
from data_pipeline.part_file import write_part
from data_pipeline.pile import PILE_WEIGHTS
from data_pipeline.splits import SPLITS
from data_pipeline.tokenize import PART_BYTES

PILE = 825 * 2**30
"""Bytes of its text."""
_EARLIER_PART = 64 << 20
_BYTES_PER_TOKEN, _BYTES_PER_DOCUMENT = 4.0, 5900


class Waits:
    """Counts waits for the disk while it is entered."""

    def __enter__(self) -> Waits:
        self.count, self._sync = 0, os.fsync

        def counted(file: Any) -> None:
            self.count += 1
            self._sync(file)

        os.fsync = counted  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync = self._sync


def results_of(size: int) -> dict[tuple[str, str], Encoded]:
    """Tokens of ``size`` bytes of text, in all subsets and splits."""
    found = {}
    for split, part in zip(SPLITS, (0.98, 0.01, 0.01), strict=True):
        for subset, weight in PILE_WEIGHTS.items():
            text = size * part * weight
            documents = max(1, round(text / _BYTES_PER_DOCUMENT))
            tokens = max(documents, round(text / _BYTES_PER_TOKEN))
            found[split, subset] = Encoded(
                [np.zeros(tokens, np.uint16)],
                [np.full(documents, tokens // documents, np.int32)],
                [np.zeros(documents, DOCUMENT_TYPE)],
            )
    return found


def write_earlier(folder: Path, results: dict[tuple[str, str], Encoded]) -> None:
    """A part as it was: three files for each split and subset."""
    folder.mkdir()
    for number, encoded in enumerate(results.values()):
        for end in ("tokens", "lengths", "documents"):
            values = np.concatenate(getattr(encoded, end))
            write_synced(folder / f"{number}.{end}", values.tobytes())


def saving(folder: Path) -> dict[str, Any]:
    """Files, waits and seconds of one part, and of the Pile."""
    figures = {}
    for name, size in (("earlier", _EARLIER_PART), ("now", PART_BYTES)):
        results, place = results_of(size), folder / name
        place.mkdir()
        began = time.monotonic()
        with Waits() as waits:
            if name == "now":
                write_part(place / "000000.part", results)
            else:
                write_earlier(place / "000000", results)
        seconds = time.monotonic() - began
        files = sum(path.is_file() for path in place.rglob("*"))
        parts = -(-PILE // size)
        figures[name] = {
            "part_mib": size >> 20, "parts": parts, "files": parts * files,
            "waits": parts * (waits.count + 1),  # and one for the state
            "hours_of_saving": round(parts * seconds / 3600, 2),
        }  # fmt: skip
        print(f"{name}: {figures[name]}")
    return figures


_START = """
import sys, time
from pathlib import Path
from data_pipeline import shared_indices
from data_pipeline.dataset import TrainingData
from data_pipeline.indexed import index_classes
from data_pipeline.manifest import load_manifest
shared_indices.LEAST = int(sys.argv[2])
index_classes()
def private():
    text = open("/proc/self/smaps_rollup").read()
    return sum(int(text.split(key)[1].split()[0]) for key in ("Private_Clean:", "Private_Dirty:"))
before, began = private(), time.monotonic()
data = TrainingData(load_manifest(Path(sys.argv[1])), "proportional", 2048, 1, 1_000_000)
data[0], data[999_999]
seconds = time.monotonic() - began
print("READY", flush=True)
sys.stdin.readline()  # the memory of a mapped page is private while one process alone has it
print("RESULT", seconds, (private() - before) * 1024)
"""


def start(folder: Path, tokens: int, processes: int) -> dict[str, Any]:
    """From nothing to the first and the millionth sample, in each of some processes at once."""
    write_sparse(folder / "huge", 2 * tokens, 10_000)
    figures: dict[str, Any] = {"tokens": tokens, "processes": processes}
    for name, least in (("own", 1 << 60), ("shared", 0)):
        environment = {**os.environ, "LOCAL_WORLD_SIZE": str(processes), "TMPDIR": str(folder)}
        words = [sys.executable, "-c", _START, str(folder / "huge"), str(least)]
        running = [
            subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
            for _ in range(processes if least == 0 else 1)
        ]  # fmt: skip
        for one in running:
            assert one.stdout is not None
            one.stdout.readline()
        for one in running:
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.flush()
        found = [one.communicate()[0].split("RESULT")[1].split() for one in running]
        figures[name] = {
            "seconds": [round(float(seconds), 1) for seconds, _ in found],
            "private_gb": [round(float(size) / 1e9, 3) for _, size in found],
        }
        print(f"start of {tokens:.0e} tokens, {name} indices: {figures[name]}")
    return figures


def main() -> None:
    """Measure and print; JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=float, default=1e12)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        figures = {
            "saving": saving(folder),
            "start": start(folder, int(options.tokens), options.processes),
        }
    finish(figures, options.out, show=False)


if __name__ == "__main__":
    main()
