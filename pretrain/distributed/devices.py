"""Chooses the GPU of a process, and checks that no other process has it."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pretrain.errors import UsageError

_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
"""Variables from which DeepSpeed takes its GPU; they must agree."""


def own_gpu(visible: int) -> int:
    """Index of this process's GPU, among those that it sees.

    Some launchers show each process all GPUs of the node, others (`srun --gpus-per-task`) only its
    own.

    Args:
        visible: number of GPUs that this process sees, 1 or more.

    Raises:
        UsageError: on every process of a node that has more processes than GPUs.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if visible == 1:
        for name in _LOCAL_RANKS:
            if name in os.environ:
                os.environ[name] = "0"
        return 0
    processes = max(local + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if processes > visible:
        raise UsageError(
            f"local rank {processes - 1} has no GPU: this node has {visible}; start at most "
            f"{visible} processes on it, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return local


def refuse_shared(gpu: str, size: int, store: Any, timeout: timedelta) -> None:
    """Check that every process has its own GPU; otherwise NCCL would fail later with a long error.

    Every process of the job calls it.

    Args:
        gpu: an id of this process's GPU that no other GPU of the world has.
        store: where the processes meet.

    Raises:
        UsageError: on all of them, if two have one GPU.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    place = dist.PrefixStore(f"gpus/{attempt}", store)  # type: ignore[attr-defined]
    if place.add(f"of/{gpu}", 1) > 1:
        place.set("shared", gpu)
    _wait_for_all(place, "counted", size, timeout)
    if place.check(["shared"]):
        shared = place.get("shared").decode()
        _wait_for_all(place, "told", size, timeout)  # the store may end with this process
        raise UsageError(
            f"two processes use the same GPU ({shared}); start one process per GPU, or set "
            "CUDA_VISIBLE_DEVICES= to train on the CPU"
        )


def _wait_for_all(place: Any, counter: str, size: int, timeout: timedelta) -> None:
    if place.add(counter, 1) == size:
        place.set(f"{counter}/all", "yes")
    place.wait([f"{counter}/all"], timeout)
