"""Standard streams on a full disk: messages are dropped, and a lost result is an error."""

from __future__ import annotations

import errno
import io
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from pretrain.cli.streams import MessageFile, ResultFile, prints_result
from pretrain.runs.metrics import read_metrics
from tests.cli.test_every_signal import READ_ONLY, words_of
from tests.kit import Kit
from tests.runs.test_writing_pairs import VERBS
from tests.tools import ROOT, STARTS, base_recipe, environment, run_processes, write_recipe
from tests.verbs import all_verbs
from tests.warm import run_warm

SAMPLE = ["train", "plan", "data check"]
SCRIPT = ROOT / "tests/full_stream.py"


class Disk:
    """A file that takes some bytes and refuses others."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 1 << 30
        self.error = errno.ENOSPC
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        self._path = path

        def write(_: Any, data: Any) -> int:
            taken = bytes(data)[: self.room]
            if not taken:
                raise OSError(self.error, os.strerror(self.error))
            self.room -= len(taken)
            return os.write(self.descriptor, taken)

        monkeypatch.setattr("pretrain.cli.streams._write_some", write)

    @property
    def text(self) -> str:
        return self._path.read_text()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path / "file", monkeypatch)


def stream_on(file: Any, buffered: bool) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(file) if buffered else file,
        "utf-8",
        line_buffering=True,
        write_through=True,
    )


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "ESTALE"])
def test_messages_that_are_refused(name: str, buffered: bool, disk: Disk) -> None:
    """Of a disk that fills and empties, the file has what it took, and how much is missing."""
    rng, missing = random.Random(name), 0
    disk.error = getattr(errno, name)
    stream = stream_on(MessageFile(disk.descriptor), buffered)
    whole = []
    for number in range(60):
        text = f"message {number} " + "x" * rng.randrange(30)
        disk.room = rng.choice([0, 0, 5, 1 << 20, 1 << 20])
        fits = disk.room > 1000
        print(text, file=stream, flush=True)
        (whole.append(text) if fits else None)
        missing += not fits
    lines = disk.text.splitlines()
    assert missing > 5 and all(text in lines for text in whole)
    assert sum("bytes of messages could not be written here" in line for line in lines) > 5


def test_other_errors_of_messages_are_told(disk: Disk) -> None:
    disk.room, disk.error = 0, errno.EPIPE
    with pytest.raises(BrokenPipeError):
        print("text", file=stream_on(MessageFile(disk.descriptor), True), flush=True)


@pytest.mark.parametrize("buffered", [True, False])
def test_results_are_whole_or_an_error(buffered: bool, disk: Disk) -> None:
    """Of one long text, a disk that fills takes a part: nobody else would tell."""
    stream = stream_on(ResultFile(disk.descriptor), buffered)
    disk.room = 1000
    print("x" * 900, file=stream, flush=True)
    with pytest.raises(OSError, match="standard output"):
        print("y" * 900, file=stream, flush=True)


def check(verb: str, kit: Kit, folder: Path) -> None:
    """A verb, its messages on a full disk, and then its results."""
    for place in ("whole", "messages", "results"):
        (folder / place).mkdir()
    words = words_of(verb, kit, folder / "whole/x")
    whole = run_warm(words, environment(), folder / "whole")
    assert "Traceback" not in whole.stderr  # it may fail: there is no sbatch here
    done = run_warm(
        ["2", *words_of(verb, kit, folder / "messages/x")], environment(), folder / "messages",
        script=SCRIPT,
    )  # fmt: skip
    assert done.returncode == whole.returncode and not done.stderr
    assert bool(done.stdout) == bool(whole.stdout)
    made = [sorted(one.name for one in (folder / place).rglob("*") if one.suffix != ".lock")
            for place in ("whole", "messages")]  # fmt: skip
    assert len(made[0]) == len(made[1])
    done = run_warm(
        ["1", *words_of(verb, kit, folder / "results/x")], environment(), folder / "results",
        script=SCRIPT,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    failed = whole.stdout and prints_result(words)
    assert done.returncode == (1 if failed else whole.returncode), done.stderr
    if whole.stdout and not whole.returncode:
        told = (
            "error: standard output: No space left on device"
            if failed
            else "warning: standard output cannot be written; the results are in their files"
        )
        assert told in done.stderr.splitlines()


@pytest.mark.parametrize("verb", SAMPLE)
def test_a_full_disk_under_a_stream(verb: str, kit: Kit, tmp_path: Path) -> None:
    check(verb, kit, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("verb", [*VERBS, "paper fig1", *READ_ONLY])
def test_a_full_disk_under_each_stream_of_every_verb(verb: str, kit: Kit, tmp_path: Path) -> None:
    check(verb, kit, tmp_path)


def test_a_pipe_that_does_not_make_its_writer_wait() -> None:
    """A slow reader gets all, and the writer does not turn in a loop meanwhile."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    text = "x" * 500_000
    got: list[bytes] = []

    def read() -> None:
        time.sleep(1.0)
        while part := os.read(reader, 1 << 16):
            got.append(part)

    thread = Thread(target=read)
    thread.start()
    began = time.thread_time()
    print(text, file=stream_on(MessageFile(writer), True), flush=True)
    assert time.thread_time() - began < 0.5
    os.close(writer)
    thread.join()
    os.close(reader)
    assert b"".join(got).decode() == text + "\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "latin-1", "cp500"])
def test_the_notice_has_the_stream_s_encoding(encoding: str, tmp_path: Path, disk: Disk) -> None:
    disk.room = 0
    stream = io.TextIOWrapper(MessageFile(disk.descriptor, encoding), encoding, write_through=True)
    print("lost", file=stream)
    disk.room = 1 << 20
    print("kept", file=stream)
    text = (tmp_path / "file").read_bytes().decode(encoding).replace("\ufeff", "")
    assert "bytes of messages could not be written here\nkept" in text


def test_which_verbs_print_their_result() -> None:
    for verb in all_verbs():
        words = verb.split()
        own = words[0] in ("plan", "doctor", "watch", "ranks", "evaluate")
        assert prints_result([*words, "x"]) == (own or verb in ("data check", "data info")), verb
        assert prints_result([*words, "x", "--json"])
    assert prints_result([]) and prints_result(["--version"])


CLOSED = """
import os, sys
from pretrain.__main__ import main
for number, name in enumerate(("stdin", "stdout", "stderr")):
    if str(number) in sys.argv[1]:
        os.close(number)
        setattr(sys, name, None)  # as Python finds it
del sys.argv[1]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", STARTS)
@pytest.mark.parametrize("closed", ["2>&-", "<&- >&-"])
def test_training_with_closed_streams(
    closed: str, how: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of the run gets the number of a closed stream, and nothing is printed elsewhere."""
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    script = tmp_path / "closed.py"
    script.write_text(CLOSED)
    monkeypatch.chdir(tmp_path)
    for words in (f"train {recipe} --out run", "watch run --once"):
        if how == "forked":
            numbers = {"2>&-": "2", "<&- >&-": "01"}[closed]
            done = run_processes([numbers, *words.split()], 1, 240, script)
        else:
            done = subprocess.run(
                ["bash", "-c", f'"{sys.executable}" -m pretrain {words} {closed}'],
                env=environment(), capture_output=True, text=True, timeout=240, check=False,
            )  # fmt: skip
        assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr
        assert "parameters" not in done.stdout
    assert len(read_metrics(tmp_path / "run")) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stream", "buffered"),
    [
        ("1", False),
        ("2-", False),
        *(pytest.param(one, True, marks=pytest.mark.long) for one in ("1", "2", "1-")),
    ],
)
def test_a_started_program(stream: str, buffered: bool, tmp_path: Path) -> None:
    """With its own streams, closed (-) or on a full disk."""
    words = {"1": ">/dev/full", "2": "2>/dev/full", "1-": ">&-", "2-": "2>&-"}[stream]
    told = environment() | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    recipe = ROOT / "configs/gpt-tiny.yaml"
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m pretrain plan "{recipe}" --json {words}'],
        env=told, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.returncode == (1 if stream == "1" else 0), done.stderr
