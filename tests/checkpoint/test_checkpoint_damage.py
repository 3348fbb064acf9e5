"""Damaged manifests and spoilt folders of checkpoints: the newest whole one is found."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.manifest import MANIFEST, DamagedError, UnreadableError, sealed
from pretrain.checkpoint.pieces import expand
from pretrain.checkpoint.reader import Checkpoint, list_checkpoints, step_of
from pretrain.checkpoint.recover import find_whole
from pretrain.errors import RunError
from tests.checkpoints import (
    Alone,
    contents,
    copy_as,
    copy_tree,
    put_dangling,
    put_file,
    put_folder,
    put_in_place_of,
    put_link,
    retain,
    same_values,
)

pytestmark = pytest.mark.usefixtures("hurry")


# --- manifests -----------------------------------------------------------------------------------


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


def damage_rows(rng: random.Random, manifest: dict[str, Any]) -> None:
    """The same in the short form, where rows of pieces are one entry."""
    name = rng.choice(list(manifest["pieces"]))
    rows = manifest["pieces"][name]
    kind = rng.randrange(6)
    if kind == 0:
        rows[rng.randrange(len(rows))][rng.randrange(6)] += rng.choice((-1, 1, 7, 2**40))
    elif kind == 1:
        rows[0][rng.randrange(6)] = rng.choice(ODD)
    elif kind == 2:
        rows.append(rng.choice((*rows, [], None, [0] * 5, [0, 0, 0, 0, 1, 0])))
    elif kind == 3:
        del manifest[rng.choice(("keys", "pieces"))]
    elif kind == 4:
        manifest["keys"][0] = rng.choice((None, "master", [1], ["other"], [], ["master"] * 2))
    else:
        manifest[rng.choice(("keys", "pieces"))] = rng.choice([odd for odd in ODD if odd != {}])


def check_manifests(folder: Path, cases: int) -> None:
    """Sealed again, as by somebody who means harm: one line each, no file opened elsewhere."""
    path = folder / "step-00000008" / MANIFEST
    short = json.loads(path.read_bytes())
    del short["sha256"]
    whole = {**expand(short), "version": 1}
    for seed in range(cases):
        manifest = json.loads(json.dumps(whole if seed % 2 else short))
        (damage if seed % 2 else damage_rows)(random.Random(seed), manifest)
        path.write_bytes(sealed(manifest))
        with pytest.raises(RunError) as error:
            checkpoint = Checkpoint(path.parent)
            for name in checkpoint.parameters:
                checkpoint.full(name)
        assert "\n" not in str(error.value) and str(path.parent) in str(error.value), seed


def test_damaged_manifests(checkpoints: Path) -> None:
    check_manifests(checkpoints, 150)


@pytest.mark.long
def test_damaged_manifests_at_length(checkpoints: Path) -> None:
    check_manifests(checkpoints, 5000)


@pytest.mark.parametrize("kind", ["pipe", "zero", "folder", "loop"])
@pytest.mark.parametrize("name", [FIRST, MANIFEST])
def test_files_that_are_none(checkpoints: Path, kind: str, name: str) -> None:
    """A pipe, a device, a folder, a link to itself: told at once, and the one before is taken."""
    put_in_place_of(checkpoints / "step-00000008" / name, kind)
    told = find_whole(checkpoints, Alone())  # type: ignore[arg-type]
    assert len(told) == 1 and "step-00000008" in told[0] and "damaged" in told[0]
    assert list_checkpoints(checkpoints)[-1].name == "step-00000006"


# --- fuzz ----------------------------------------------------------------------------------------


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
    if content and (kind <= 7 or kind == 15):
        spoil_file(rng, file, kind, place)
    elif kind == 14 and len(files) > 1:
        other = rng.choice(files)
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif not (8 <= kind <= 13 and spoil_folder(rng, path, kind)):
        (folder / rng.choice(("latest", "step-list.txt", ".step-00000008.writing"))).write_text("x")


def spoil_file(rng: random.Random, file: Path, kind: int, place: int) -> None:
    """Something that happens to one file of a checkpoint, perhaps at a place in it."""
    content = file.read_bytes()
    if kind <= 1:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
    elif kind == 2:
        file.write_bytes(content[:place])
    elif kind == 3:
        file.write_bytes(content + rng.randbytes(rng.randint(1, 9)))
    elif kind == 4:
        file.write_bytes(b"")
    elif kind == 5:
        file.unlink()
    elif kind == 6:
        file.rename(
            file.with_name(rng.choice(("x", "rank-00009.safetensors", "manifest.json.bak")))
        )
    elif kind == 7:
        away = file.parents[2] / f"away-{rng.randrange(10**9)}"
        file.rename(away)
        file.symlink_to(away)
    else:
        put_in_place_of(file, rng.choice(("pipe", "folder", "zero")))


def spoil_folder(rng: random.Random, path: Path, kind: int) -> bool:
    """Something that happens to a checkpoint as a whole; whether it could."""
    folder = path.parent
    if kind == 8:
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
    else:
        return False
    return True


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


@pytest.mark.slow
def test_folders_that_were_spoilt(checkpoints: Path, tmp_path: Path) -> None:
    check_folders(checkpoints.parent, tmp_path / "work", 120)


@pytest.mark.long
def test_folders_that_were_spoilt_at_length(
    checkpoints: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check_folders(checkpoints.parent, tmp_path / "work", 4000)


def test_damage_is_an_error_of_a_run() -> None:
    assert issubclass(DamagedError, RunError) and issubclass(UnreadableError, RunError)
