"""Parts of stored tensors: what a process owns, read from files of any other grid."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import models.initial
from models.roles import ParameterInfo, Role
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.stored import StoredTensors
from pretrain.checkpoint.tensor_file import write_tensors
from pretrain.errors import RunError

VOCABULARY = 24
TENSORS: dict[str, tuple[Role, tuple[int, ...], int | None]] = {
    "embedding": (Role.EMBEDDING, (VOCABULARY, 6), 0),
    "rows": (Role.MLP_IN, (40, 6), 0),
    "columns": (Role.MLP_OUT, (6, 40), 1),
    "whole": (Role.POSITION, (9, 5), None),
    "split vector": (Role.BIAS, (40,), 0),
    "vector": (Role.NORM, (7,), None),
}


def padded(shape: tuple[int, ...], role: Role, size: int) -> tuple[int, ...]:
    """The shape of a tensor on a grid: a vocabulary has rows for 16 tokens a process."""
    if role != Role.EMBEDDING:
        return shape
    unit = 16 * size
    return (-(-shape[0] // unit) * unit, *shape[1:])


def written(folder: Path, size: int, rng: random.Random) -> tuple[Checkpoint, dict[str, Tensor]]:
    """A checkpoint of tensor-parallel ``size``, its elements spread over files at random."""
    files: dict[str, Any] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    parameters, whole = {}, {}
    for name, (role, bare, dim) in TENSORS.items():
        shape = padded(bare, role, size)
        value = torch.zeros(shape)
        value[: bare[0]] = torch.randn(bare)
        whole[name] = value[: bare[0]]
        parameters[name] = {"shape": list(shape), "partition_dim": dim}
        for rank in range(size if dim is not None else 1):
            flat = (value if dim is None else value.chunk(size, dim)[rank]).reshape(-1)
            cuts = sorted({0, flat.numel(), *rng.choices(range(flat.numel()), k=rng.randrange(4))})
            for number, (low, high) in enumerate(itertools.pairwise(cuts)):
                file = f"rank-{rank}-{number}.safetensors"
                tensors.setdefault(file, {})[f"{name}/master"] = flat[low:high].clone()
                entry = files.setdefault(file, {"tensor_rank": rank, "fragments": {}})
                entry["fragments"][name] = [low, high - low, ["master"]]
    for file, named in tensors.items():
        files[file]["size"], files[file]["sha256"] = write_tensors(folder / file, named)
    checkpoint = Checkpoint.__new__(Checkpoint)
    checkpoint.path, checkpoint.parameters, checkpoint.tensor_parallel = folder, parameters, size
    checkpoint.config = SimpleNamespace(model=SimpleNamespace(vocabulary_size=VOCABULARY))  # type: ignore[assignment]
    checkpoint.stored = StoredTensors(folder, files)
    return checkpoint, whole


@pytest.mark.parametrize("stored", [1, 2, 4])
@pytest.mark.parametrize("block", [1, 1 << 21])
def test_any_part_on_any_grid(
    stored: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: little more is read than is wanted, where the split stays the same."""
    monkeypatch.setattr(models.initial, "_BLOCK", block)
    rng = random.Random(stored)
    checkpoint, whole = written(tmp_path, stored, rng)
    plain, read = StoredTensors.region, 0

    def region(self: StoredTensors, name: str, key: str, rank: int, low: int, high: int) -> Tensor:
        nonlocal read
        read += high - low
        return plain(self, name, key, rank, low, high)

    monkeypatch.setattr(StoredTensors, "region", region)
    for name, (role, bare, dim) in TENSORS.items():
        for size in (1, 2, 4, 8):
            if dim is not None and role != Role.EMBEDDING and bare[dim] % size:
                continue
            shape = padded(bare, role, size)
            info = ParameterInfo(name, role, None, shape, dim)
            value = torch.zeros(shape)
            value[: bare[0]] = whole[name]
            for rank in range(size):
                local = (value if dim is None else value.chunk(size, dim)[rank]).reshape(-1)
                assert checkpoint.local(info, "master", rank, size).equal(local)
                for _ in range(4):
                    low, high = sorted(rng.choices(range(local.numel() + 1), k=2))
                    read = 0
                    part = checkpoint.part(info, "master", rank, size, low, high)
                    assert part.equal(local[low:high]), (name, size, rank, low, high)
                    columns = shape[1] // (size if dim == 1 else 1) if len(shape) == 2 else 1
                    if dim is None or size == stored:
                        assert read <= high - low + 2 * columns


def test_holes_and_other_shapes_are_refused(tmp_path: Path) -> None:
    checkpoint, _ = written(tmp_path, 2, random.Random(0))
    info = ParameterInfo("rows", Role.MLP_IN, None, (40, 6), 0)
    fragments = [entry["fragments"] for entry in checkpoint.stored.files.values()]
    first = next(one for one in fragments if one.get("rows", [1])[0] == 0)
    del first["rows"]
    holed = StoredTensors(tmp_path, checkpoint.stored.files)
    checkpoint.stored = holed
    with pytest.raises(RunError, match=r"rows .* is incomplete"):
        checkpoint.local(info, "master", 0, 1)
    for name, shape in (("rows", (40, 7)), ("rows", (48, 6)), ("embedding", (32, 7))):
        role = Role.EMBEDDING if name == "embedding" else Role.MLP_IN
        with pytest.raises(RunError, match="but the model needs"):
            checkpoint.local(ParameterInfo(name, role, None, shape, 0), "master", 0, 1)
    with pytest.raises(RunError, match="belongs to another model"):
        checkpoint.local(ParameterInfo("else", Role.MLP_IN, None, (40, 6), 0), "master", 0, 1)
