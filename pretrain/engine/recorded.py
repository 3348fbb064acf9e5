"""Records the forward and backward passes of micro batches as CUDA graphs, and replays them.

The host needs about a millisecond for each layer to start its operations. A small model's GPU needs
less to compute them, and waits. A graph is started by one call. Only the passes are recorded: norm,
clipping, decay and optimizer are a few operations, which the host starts meanwhile, so that every
optimizer and policy works as without graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.cli.console import warn
from pretrain.engine.flat_update import FlatUpdate

_WARM = 3
"""Micro batches of each kind that run first, while kernels are chosen and compiled."""
_MOST = 0.5
"""Share of the GPU's memory that training may use: a graph keeps what its passes need, also while
an evaluation needs memory."""


@dataclass
class _Recording:
    """A graph, and the tensors that it reads and writes."""

    graph: Any
    inputs: Tensor
    labels: Tensor
    loss: Tensor


class RecordedPasses:
    """Runs the passes of a micro batch, from the fourth of a kind on as a graph.

    There are two kinds: the first micro batch of an update sets the gradients, others add to them.
    If a pass cannot be recorded, this is said once, and passes run as without graphs.

    Args:
        update: counts the micro batches of an update; it must not communicate.
        run: computes a micro batch: adds its gradient, and returns its loss.
    """

    def __init__(self, update: FlatUpdate, run: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._update, self._run = update, run
        update.keeps_gradients = True  # a graph writes to the same memory each time
        self._seen = {True: 0, False: 0}
        self._recordings: dict[bool, _Recording] = {}
        self._gave_up = False

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Add the gradient of a micro batch, and return its loss, a scalar on the device."""
        first = self._update.is_at_first
        recording = self._recordings.get(first)
        if recording is None and not self._gave_up:
            self._seen[first] += 1
            if self._seen[first] > _WARM:
                recording = self._recorded(first, inputs, labels)
        if recording is None:
            return self._run(inputs, labels)
        recording.inputs.copy_(inputs, non_blocking=True)
        recording.labels.copy_(labels, non_blocking=True)
        recording.graph.replay()
        self._update.micro_batches_done += 1
        return recording.loss

    def _recorded(self, first: bool, inputs: Tensor, labels: Tensor) -> _Recording | None:
        if _used_share(inputs.device) > _MOST:
            self._give_up("they need more than half of the GPU's memory, which a graph would keep")
            return None
        graph = torch.cuda.CUDAGraph()
        places = inputs.clone(), labels.clone()
        done = self._update.micro_batches_done
        try:
            # Thread-local: meanwhile, the loader's thread may pin memory.
            with torch.cuda.graph(graph, pool=self._pool(), capture_error_mode="thread_local"):
                loss = self._run(*places)
        except RuntimeError as error:
            self._give_up(str(error).strip().splitlines()[0])
            return None
        finally:
            self._update.micro_batches_done = done  # nothing was computed
        self._recordings[first] = _Recording(graph, *places, loss)
        return self._recordings[first]

    def _give_up(self, reason: str) -> None:
        self._gave_up = True
        warn(f"speed.graph: passes are not recorded: {reason}")

    def _pool(self) -> Any:
        """Memory that graphs share, because they never run at the same time."""
        for recording in self._recordings.values():
            return recording.graph.pool()
        return None


def _used_share(device: torch.device) -> float:
    """Share of the memory of a GPU that PyTorch's tensors took at most."""
    _, total = torch.cuda.mem_get_info(device)
    return torch.cuda.max_memory_allocated(device) / total
