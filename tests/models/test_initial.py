"""Initial values: any part of any shard is the same part of one global tensor."""

from __future__ import annotations

import math
import random

import pytest
import torch

import models.initial
from models.initial import TILE, Initial, boxes, matrix_shape
from models.layers import ParameterFactory, Storage
from models.parallel import TensorParallel
from models.roles import ParameterInfo, Role

SHAPES = [(1, 1), (5,), (37,), (16, 512), (17, 513), (48, 1030), (90, 7), (3, 2000), (640, 96)]


def initial(shape: tuple[int, ...], dim: int | None, std: float | None = 0.5) -> Initial:
    info = ParameterInfo("blocks.0.x.weight", Role.MLP_IN, 0, shape, dim)
    return Initial(3, info, shape[0], std, 0.0 if std else 1.5)


def global_by_tiles(one: Initial) -> torch.Tensor:
    """The whole matrix from its tiles, by another loop."""
    rows, columns = matrix_shape(one.info.shape)
    strips = []
    for row in range(math.ceil(rows / TILE[0])):
        tiles = [one._tile(row, column) for column in range(math.ceil(columns / TILE[1]))]
        strips.append(torch.cat(tiles, 1))
    return torch.cat(strips)[:rows, :columns].reshape(one.info.shape)


@pytest.mark.parametrize("block", [1, 100, 1 << 21])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_part_is_a_part_of_the_whole(
    shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random ranges of the shards of random sizes of tensor parallelism."""
    monkeypatch.setattr(models.initial, "_BLOCK", block)
    rng = random.Random(str((shape, block)))
    for dim in (None, *range(len(shape))):
        one = initial(shape, dim)
        whole = global_by_tiles(one)
        sizes = [size for size in (1, 2, 3, 4, 5, 8) if dim is None or shape[dim] % size == 0]
        for size in sizes:
            for rank in range(size):
                shard = whole if dim is None else whole.chunk(size, dim)[rank]
                flat = shard.reshape(-1)
                assert torch.equal(one.part(rank, size), flat)
                for _ in range(3):
                    low, high = sorted(rng.choices(range(flat.numel() + 1), k=2))
                    assert torch.equal(one.part(rank, size, low, high), flat[low:high])


def test_boxes_hold_little() -> None:
    """However large the shard is, one box has few elements more than asked for."""
    info = ParameterInfo("x", Role.MLP_IN, 0, (1 << 20, 8192), 1)
    for size in (1, 8):
        columns = 8192 // size
        low, high = 12345, 12345 + (1 << 24)
        found = list(boxes(info, size - 1, size, low, high))
        assert sum(box.high - box.low for box in found) == high - low
        for box in found:
            held = (box.rows[1] - box.rows[0]) * (box.columns[1] - box.columns[0])
            assert held <= models.initial._BLOCK + TILE[0] * columns


def test_values_do_not_depend_on_padding() -> None:
    """A vocabulary is padded as the grid needs."""
    parts = []
    for padded in (304, 384):
        info = ParameterInfo("embedding.weight", Role.EMBEDDING, None, (padded, 24), 0)
        one = Initial(1, info, 300, 0.02)
        whole = one.part().view(padded, 24)
        assert not whole[300:].any()
        again = torch.cat([one.part(rank, 8) for rank in range(8)]).view(padded, 24)
        assert torch.equal(whole, again)
        parts.append((whole[:300], one.fingerprint))
    assert torch.equal(parts[0][0], parts[1][0]) and parts[0][1] == parts[1][1]


def test_values_are_gaussian_and_tiles_differ() -> None:
    one = initial((640, 2048), None, 0.5)
    values = one.part().double()
    assert abs(float(values.mean())) < 3e-3 and abs(float(values.std()) / 0.5 - 1) < 3e-3
    fourth = float((values / 0.5).pow(4).mean())
    assert abs(fourth - 3.0) < 0.03
    tiles = values.view(40, 16, 4, 512).transpose(1, 2).reshape(160, -1)
    correlation = torch.corrcoef(tiles) - torch.eye(160)
    assert float(correlation.abs().max()) < 6 / math.sqrt(TILE[0] * TILE[1])


def test_a_fingerprint_tells_values_apart() -> None:
    base = initial((8, 8), 0)
    same = Initial(3, ParameterInfo(base.info.name, Role.MLP_IN, 0, (8, 8), None), 8, 0.5)
    assert same.fingerprint == base.fingerprint and torch.equal(same.part(), base.part())
    name = ParameterInfo("blocks.1.x.weight", Role.MLP_IN, 1, (8, 8), 0)
    others = [
        Initial(4, base.info, 8, 0.5),
        Initial(3, name, 8, 0.5),
        Initial(3, base.info, 8, 0.25),
        Initial(3, base.info, 7, 0.5),
        initial((8, 8), 0, None),
    ]
    for other in others:
        assert other.fingerprint != base.fingerprint and not torch.equal(other.part(), base.part())
    assert len({other.fingerprint for other in others}) == len(others)


@pytest.mark.parametrize("storage", ["drawn", "empty", "shape"])
def test_what_a_new_parameter_holds(storage: Storage) -> None:
    tp = TensorParallel(None, 1, 2)
    factory = ParameterFactory(1, tp, storage, dtype=torch.bfloat16)
    made = factory.normal("x", (64, 32), Role.MLP_IN, 0, 0.1, 1)
    assert made.shape == (64, 16) and made.dtype == torch.bfloat16
    held = made.untyped_storage().nbytes()
    assert held == (2 if storage == "shape" else 2 * made.numel())
    if storage == "drawn":
        expected = models.initial.initial_of(made).part(1, 2).view(64, 16).bfloat16()
        assert torch.equal(made, expected)
