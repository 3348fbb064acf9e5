"""Which GPU a process takes: one machine with several, one shown to each, or one for two."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.distributed import grid
from pretrain.distributed.devices import refuse_shared
from pretrain.errors import UsageError

MINUTE = timedelta(minutes=1)


@pytest.fixture(autouse=True)
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with GPUs; `LOCAL_RANK` and the like are this test's alone."""
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)


def connected(
    monkeypatch: pytest.MonkeyPatch, visible: int, **variables: int | str
) -> torch.device:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return grid.connect()


@pytest.mark.parametrize("visible", [1, 2, 4, 8])
def test_every_process_of_a_node_takes_its_own(
    visible: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for local in range(visible):
        device = connected(monkeypatch, visible, LOCAL_RANK=local, LOCAL_WORLD_SIZE=visible)
        assert device == torch.device("cuda", local)
        assert os.environ["LOCAL_RANK"] == str(local)


@pytest.mark.parametrize("local", [0, 1, 3, 7])
def test_a_process_that_sees_one_gpu_takes_it(local: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `srun --gpus-per-task` shows them; DeepSpeed looks at the same variables."""
    variables = {"LOCAL_RANK": local, "LOCAL_WORLD_SIZE": 8, "OMPI_COMM_WORLD_LOCAL_RANK": local}
    assert connected(monkeypatch, 1, **variables) == torch.device("cuda", 0)
    assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "0"


@pytest.mark.parametrize("local", [0, 2])
def test_too_many_processes_are_told_all_of_them(
    local: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="local rank 2 has no GPU: this node has 2"):
        connected(monkeypatch, 2, LOCAL_RANK=local, LOCAL_WORLD_SIZE=3)


def meet(gpus: list[str], file: Path) -> list[str]:
    """What each process is told; empty where nothing is wrong."""
    told = [""] * len(gpus)

    def rank(number: int) -> None:
        store: Any = dist.FileStore(str(file), len(gpus))  # type: ignore[attr-defined]
        try:
            refuse_shared(gpus[number], len(gpus), store, MINUTE)
        except UsageError as error:
            told[number] = str(error)

    ranks = [threading.Thread(target=rank, args=(number,)) for number in range(len(gpus))]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(60)
    return told


@pytest.mark.parametrize("count", [2, 3, 8])
def test_two_processes_on_one_gpu_are_told_all_of_them(count: int, tmp_path: Path) -> None:
    own = [f"GPU-{number}" for number in range(count)]
    assert meet(own, tmp_path / "own") == [""] * count
    shared = meet([*own[:-1], own[0]], tmp_path / "shared")
    assert all("two processes use the same GPU (GPU-0)" in line for line in shared), shared


def test_a_second_start_counts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    for attempt in range(3):  # torchrun's agent may keep the store
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        refuse_shared("GPU-0", 1, store, MINUTE)


def test_the_gpu_is_asked_for_before_nccl_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: calls.append("nccl"))
    monkeypatch.setattr(grid, "open_store", lambda *_: "store")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-7")
    )
    monkeypatch.setattr(grid, "refuse_shared", lambda *found: calls.append(found[:3]))
    connected(
        monkeypatch, 1, RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, MASTER_ADDR="here", MASTER_PORT=29500
    )
    assert calls == [("GPU-7", 2, "store"), "nccl"]
