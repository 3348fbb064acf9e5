"""Files that are damaged, cut, gone, refused: named, put aside, fetched, waited for."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.checkpoint.reader import LATEST, RUN_ID, Checkpoint, list_checkpoints
from pretrain.checkpoint.retention import superseded
from pretrain.config.run import CheckpointConfig
from pretrain.runs.metrics import read_metrics
from tests.faults.tools import (
    events_of,
    same_run,
    same_weights,
    started_until,
    wait_until,
    words_of,
)
from tests.tools import (
    assert_one_line,
    base_recipe,
    metrics_of,
    pretrain,
    run_processes,
    small_disk,
    write_recipe,
)


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "manifest"])
def test_a_damaged_checkpoint_is_put_aside(
    damage: str,
    tmp_path: Path,
    data: Path,
    undisturbed: Callable[[str], Path],
    row: Callable[..., None],
) -> None:
    shutil.copytree(undisturbed("one").parent, tmp_path / "copy")
    run = tmp_path / "copy/run"
    (run / "evaluation.json").unlink()
    newest = list_checkpoints(run / "checkpoints")[-1]
    file = newest / ("manifest.json" if damage == "manifest" else "rank-00000.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-100])
    else:
        place = content.index(b'"decay": 0.5') + 9 if damage == "manifest" else len(content) - 10
        content[place] ^= 1
        file.write_bytes(content)
    recipe = tmp_path / "copy/recipe.yaml"
    began = time.monotonic()
    done = pretrain("train", str(recipe), "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert str(newest) in done.stderr and "from the one before" in done.stderr
    assert (run / "checkpoints" / f"damaged-{newest.name}").is_dir()
    same_weights(run, undisturbed("one"))
    what = {"bit": "flipped bit in a checkpoint", "cut": "truncated checkpoint file",
            "gone": "missing checkpoint file", "manifest": "flipped bit in a manifest"}  # fmt: skip
    row(what[damage], "the next start", f"{time.monotonic() - began:.0f} s (one checkpoint back)")


def test_what_is_kept_and_mirrored(
    data: Path, tmp_path: Path, undisturbed: Callable[[str], Path], row: Callable[..., None]
) -> None:
    """Retention rules; a copy elsewhere, from which a lost run folder goes on."""
    mirror = tmp_path / "mirror"
    more = ["checkpoint.keep=1", "checkpoint.keep_every=4",
            f"checkpoint.mirror=file://{mirror}"]  # fmt: skip
    done = pretrain(*words_of(tmp_path, data, *more, "--until", "6"))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    names = ["step-00000004", "step-00000006"]
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == names
    identity = (run / RUN_ID).read_text()
    copies = mirror / f"run-{identity}"
    assert [path.name for path in mirror.iterdir()] == [copies.name]
    assert sorted(path.name for path in copies.glob("step-*")) == names
    assert (run / "checkpoints" / LATEST).read_text() == names[-1]
    shutil.rmtree(run)
    done = pretrain(*words_of(tmp_path, data, *more))
    assert done.returncode == 0, done.stderr
    assert any("was fetched from" in text for text in events_of(run))
    assert (run / RUN_ID).read_text() == identity
    assert [one["step"] for one in read_metrics(run)] == [7, 8, 9, 10]
    same_weights(run, undisturbed("one"))
    row("run folder lost, with a mirror", "the next start", "the mirror's newest checkpoint")


def test_retention(tmp_path: Path) -> None:
    found = []
    for step, loss in ((2, 3.0), (4, 1.5), (6, None), (8, 2.0), (10, 2.5)):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        state = {} if loss is None else {"held_out_loss": loss}
        (path / "manifest.json").write_text(json.dumps({"state": state}))
        found.append(path)
    settings = CheckpointConfig(keep=1, keep_every=6, keep_best=True)
    assert [path.name[-2:] for path in superseded(found, settings)] == ["02", "08"]
    assert superseded(found, CheckpointConfig(keep=0)) == []


# --- tokens -------------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_tokens(
    data: Path, tmp_path: Path, undisturbed: Callable[[str], Path], row: Callable[..., None]
) -> None:
    """Found when the block is first read; with the file brought back, the run is as if it was."""
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    words = words_of(tmp_path, copy)
    done = pretrain(*words, "--until", "4")
    assert done.returncode == 0, done.stderr
    files = sorted((copy / "train").glob("*.bin"))
    whole = {file: file.read_bytes() for file in files}
    for file, content in whole.items():
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 4
        file.write_bytes(flipped)
    done = pretrain(*words)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert ".bin: damaged between bytes 0 and 65536" in last and "its last checkpoint" in last
    checked = pretrain("data", "check", str(copy))
    assert checked.returncode == 1 and checked.stderr.count("damaged between") == len(files)
    for file, content in whole.items():
        file.write_bytes(content)
    assert pretrain("data", "check", str(copy)).returncode == 0
    began = time.monotonic()
    done = pretrain(*words)
    assert done.returncode == 0, done.stderr
    same_weights(tmp_path / "run", undisturbed("one"))
    lasted = f"{time.monotonic() - began:.0f} s (file brought back, started again)"
    row("flipped bit in a .bin", "the first read of its block", lasted)


# --- disks --------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    with small_disk(folder, "24m"):
        yield folder


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while(
    data: Path, tmp_path: Path, disk: Path, undisturbed: Callable[[str], Path],
    row: Callable[..., None],
) -> None:  # fmt: skip
    """A checkpoint and its metrics find no room; with room again, nothing is missing."""
    words = [*words_of(tmp_path, data)[:-1], str(disk / "run")]
    process = started_until("slow steps", tmp_path / "marker", words, 1)
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:  # the run writes meanwhile: no size is known
        for size in (2**20, 4096, 512):  # the last pages too
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    began = time.monotonic()
    wait_until(lambda: "not written" in process.errors() or process.poll() is not None, 120)
    seen = time.monotonic()
    ballast.unlink()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert any("not written" in event for event in events_of(disk / "run"))
    assert metrics_of(disk / "run") == metrics_of(undisturbed("one"))
    same_weights(disk / "run", undisturbed("one"))
    row("disk full (tmpfs)", f"{seen - began:.1f} s (the next checkpoint)", "the next checkpoint")


def test_a_folder_that_is_read_only(
    data: Path, tmp_path: Path, disk: Path, undisturbed: Callable[[str], Path],
    row: Callable[..., None],
) -> None:  # fmt: skip
    words = [*words_of(tmp_path, data)[:-1], str(disk / "run")]
    done = pretrain(*words, "--until", "4")
    assert done.returncode == 0, done.stderr
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    began = time.monotonic()
    done = pretrain(*words)
    lasted = time.monotonic() - began
    assert done.returncode == 1 and "Read-only file system" in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    done = pretrain(*words)
    assert done.returncode == 0, done.stderr
    same_weights(disk / "run", undisturbed("one"))
    row("read-only run folder", f"{lasted:.0f} s (the start refuses)", "the next start")


def brought_back(away: Path, run: Path) -> None:
    """Move a folder back, with what was written in its absence, such as a checkpoint on its way."""
    passing = shutil.ignore_patterns(".*.tmp")  # a file that is being written right now
    for turn in itertools.count():
        try:
            os.rename(away, run)
        except OSError as error:
            assert error.errno == errno.ENOTEMPTY and turn < 20, error
            meanwhile = away.with_name(f"meanwhile{turn}")
            os.rename(run, meanwhile)  # nothing is written into it any more
            shutil.copytree(meanwhile, away, dirs_exist_ok=True, ignore=passing)
        else:
            return


@pytest.mark.slow
def test_a_run_folder_that_vanishes_for_a_while(
    data: Path, tmp_path: Path, undisturbed: Callable[[str], Path], row: Callable[..., None]
) -> None:
    """Moved away under the run (an unmounted disk), and brought back before its end."""
    words = words_of(tmp_path, data)
    process = started_until("slow", tmp_path / "marker", words, 1)
    run, away = tmp_path / "run", tmp_path / "away"
    os.rename(run, away)
    time.sleep(4.0)  # the slow step has passed meanwhile
    brought_back(away, run)
    _, stderr = process.communicate(timeout=120)
    again = pretrain(*words) if process.returncode else None
    assert again is None or again.returncode == 0, stderr
    same_weights(run, undisturbed("one"))
    how = "the run continues" if again is None else "the next start"
    row("run folder gone for 4 s", "the next write", how)


@pytest.mark.slow
def test_two_jobs_on_one_folder(
    data: Path, tmp_path: Path, undisturbed: Callable[[str], Path], row: Callable[..., None]
) -> None:
    words = words_of(tmp_path, data)
    process = started_until("slow", tmp_path / "marker", words, 1)
    process.send_signal(19)  # SIGSTOP: it holds the folder, whatever the other's speed
    began = time.monotonic()
    second = pretrain(*words)
    lasted = time.monotonic() - began
    process.send_signal(18)
    assert second.returncode == 1 and "another process is training here" in second.stderr
    process.communicate(timeout=120)
    assert process.returncode == 0
    same_run(tmp_path / "run", undisturbed("one"))
    row("two jobs on one run folder", f"{lasted:.0f} s (the second refuses)", "not disturbed")


def full_disk_words(folder: Path, data: Path) -> tuple[list[str], Path]:
    recipe = write_recipe(folder / "recipe.yaml", base_recipe(data))
    return ["train", str(recipe), "checkpoint.every=2", "ranks.spectra=false"], folder / "run"


def test_full_disk_at_a_checkpoint(data: Path, tmp_path: Path) -> None:
    """A real file system with room for one checkpoint and not for two."""
    disk = tmp_path / "disk"
    words, _ = full_disk_words(tmp_path, data)
    with small_disk(disk, "900k"):
        done = pretrain(*words, "--out", str(disk / "run"))
        assert done.returncode == 1, done.stderr
        assert "step 4: checkpoint at step 4 not written" in done.stderr
        assert "training continues" in done.stderr
        culprits = ("checkpoint at step 6", "No space left", "free space")
        assert_one_line(done.stderr, culprits)
        left = list_checkpoints(disk / "run" / "checkpoints")
        assert [path.name for path in left] == ["step-00000002"]
        Checkpoint(left[0]).full("embedding.weight")  # verifies the checksum
        subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
        again = pretrain(*words, "--out", str(disk / "run"))
        assert again.returncode == 0, again.stderr
        steps = [row["step"] for row in metrics_of(disk / "run") if row["kind"] == "train"]
        assert steps == [1, 2, 3, 4, 5, 6]


LIMITED = """
import resource
from pretrain.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
main()
"""


def test_file_limit_at_a_checkpoint(data: Path, tmp_path: Path) -> None:
    """The same where the system refuses large files; no root needed."""
    words, out = full_disk_words(tmp_path, data)
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    done = run_processes([*words, "--out", str(out)], 1, 240, script)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("training continues") == 2  # after steps 2 and 4
    assert_one_line(done.stderr, ("checkpoint at step 6", "too large"))
    assert not list((out / "checkpoints").iterdir())
