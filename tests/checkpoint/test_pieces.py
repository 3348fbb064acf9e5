"""The short form of a manifest's pieces: nothing is lost, and many processes need few entries."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import pretrain.checkpoint.pieces
from pretrain.checkpoint.manifest import MANIFEST, DamagedError, read_manifest, sealed
from pretrain.checkpoint.pieces import compact, expand
from tests.checkpoints import write_checkpoint

KEYS = [["master"], ["exp_avg", "exp_avg_sq", "master"]]


def manifest(rng: random.Random) -> dict[str, Any]:
    """Files of a random grid, with equal, unequal and missing pieces."""
    tensor, data = rng.choice((1, 2, 3)), rng.choice((1, 2, 5, 12))
    files: dict[str, Any] = {}
    for process in range(tensor * data):
        name = f"rank-{process:05d}.safetensors"
        files[name] = {"size": 9, "tensor_rank": process % tensor, "fragments": {}}
    for number in range(rng.randrange(6)):
        split = rng.random() < 0.5
        for rank in range(tensor if split else 1):
            names = [name for name, entry in files.items() if entry["tensor_rank"] == rank]
            offset, width, keys = 0, rng.randrange(1, 9), rng.choice(KEYS)
            for name in names:
                if rng.random() < 0.2:
                    width = rng.randrange(1, 9)
                if rng.random() < 0.1:
                    continue
                files[name]["fragments"][f"p{number}"] = [offset, width, keys]
                offset += width
    return {"version": 2, "step": 1, "files": files, "other": [1]}


def test_nothing_is_lost() -> None:
    for seed in range(300):
        whole = manifest(random.Random(seed))
        short = json.loads(json.dumps(compact(whole)))
        assert "fragments" not in json.dumps(short)
        assert expand(short) == whole, seed


def test_a_thousand_processes_need_one_entry_for_a_parameter() -> None:
    files = {
        f"rank-{process:05d}.safetensors": {
            "tensor_rank": process % 8,
            "fragments": {f"p{one}": [process // 8 * 50, 50, KEYS[1]] for one in range(40)},
        }
        for process in range(1024)
    }
    short = compact({"files": files})
    assert all(len(rows) == 8 for rows in short["pieces"].values())
    assert expand(short)["files"] == files


def test_a_claim_of_many_pieces_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain.checkpoint.pieces, "MOST", 20)
    folder = write_checkpoint(tmp_path, 3)
    written = json.loads((folder / MANIFEST).read_bytes())
    del written["sha256"]
    (folder / MANIFEST).write_bytes(sealed(written))
    with pytest.raises(DamagedError, match="pieces of"):
        read_manifest(folder)


def test_a_manifest_of_the_first_version_is_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3)
    _, written = read_manifest(folder)
    (folder / MANIFEST).write_bytes(sealed({**written, "version": 1}))
    assert read_manifest(folder)[1]["files"] == written["files"]
