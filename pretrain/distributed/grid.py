"""The process grid: pipeline x data x tensor. The only place that knows process ranks.

In the order of process ranks, tensor-parallel neighbours are adjacent, then data, then pipeline.
This is the order of DeepSpeed's `PipeModelDataParallelTopology` and Megatron's default.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from models.parallel import TensorParallel
from pretrain.config.science import GridConfig
from pretrain.distributed.cores import fit_threads
from pretrain.distributed.devices import own_gpu, refuse_shared
from pretrain.distributed.failures import exit_code, is_of_machine
from pretrain.distributed.meeting import (
    Awaited,
    meeting,
    open_store,
    place_of_process,
    tell_connected,
)
from pretrain.errors import MachineError, RunError, UsageError

Group = Any
"""A torch process group (the stubs know several classes)."""
_PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others."""


@dataclass(frozen=True)
class Grid:
    """The sizes of the axes, this process's coordinates, and its groups."""

    tensor: int
    pipeline: int
    data: int
    rank: int
    device: torch.device
    tensor_group: Group
    pipeline_group: Group
    data_group: Group
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data

    @property
    def tensor_rank(self) -> int:
        """Position on the tensor axis."""
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        """Position on the data axis."""
        return self.rank // self.tensor % self.data

    @property
    def pipeline_rank(self) -> int:
        """Pipeline stage."""
        return self.rank // (self.tensor * self.data)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process has logits."""
        return self.pipeline_rank == self.pipeline - 1

    @property
    def tensor_parallel(self) -> TensorParallel:
        """The part of the grid that the model needs."""
        return TensorParallel(
            self.tensor_group, self.tensor_rank, self.tensor, self.sequence_parallel
        )

    def global_rank(self, *, pipeline: int, data: int, tensor: int) -> int:
        """Process rank at these coordinates."""
        return (pipeline * self.data + data) * self.tensor + tensor

    def describe(self) -> str:
        """A readable description in one line."""
        return (
            f"{self.world_size} process{'es' * (self.world_size > 1)} on {self.device.type}: "
            f"tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}"
        )

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Return, on every process, the picklable values of all processes in rank order."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Return, on every process, the value of process rank ``source``."""
        box = [value]
        dist.broadcast_object_list(box, src=source)
        return box[0]

    @contextmanager
    def together(self, label: str) -> Iterator[None]:
        """Run a block on every process; if it fails on one, all raise the same one-line error.

        Otherwise the processes that did not fail would wait for ever in their next collective.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        gathered = self.gather(None if failure is None else (_kind(failure), _line(failure, label)))
        problems = [problem for problem in gathered if problem]
        if not problems:
            return
        kind, text = problems[0]
        if failure is not None and exit_code(failure) is None:
            raise failure  # a bug: keep its traceback
        raise _KINDS[kind](text) from failure


_KINDS = {"usage": UsageError, "machine": MachineError, "run": RunError}


def _kind(error: Exception) -> str:
    if exit_code(error) == 2:
        return "usage"
    return "machine" if is_of_machine(error) else "run"


def _line(error: Exception, label: str) -> str:
    """One line with the file and the reason, for any exception."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = text.strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return f"{label}: {text}" if label and not text.startswith(label) else text


def process_count() -> int:
    """Number of processes that the launcher started (torchrun, deepspeed, mpirun or srun).

    Raises:
        UsageError: naming a variable of the launcher that is missing or wrong.
    """
    _adopt_launcher()
    return place_of_process(os.environ)[1]


def check_grid(config: GridConfig, processes: int) -> int:
    """The data-parallel size.

    Raises:
        UsageError: if the grid does not divide the processes.
    """
    model = config.tensor_parallel * config.pipeline_parallel
    if processes % model:
        raise UsageError(
            f"grid: tensor_parallel {config.tensor_parallel} x pipeline_parallel "
            f"{config.pipeline_parallel} = {model} does not divide {processes} process(es); add "
            f"--processes {model}, start it with torchrun or another launcher, or change the grid"
        )
    return processes // model


def connect() -> torch.device:
    """Join the process group that the launcher describes, or be a group of one.

    Returns:
        The device of this process: its GPU under NCCL, else the CPU under gloo.

    Raises:
        UsageError: naming a variable of the launcher that is missing or wrong.
    """
    _adopt_launcher()
    os.environ.setdefault("LOCAL_RANK", "0")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        device = torch.device("cuda", own_gpu(gpus))
        torch.cuda.set_device(device)
    else:
        # Otherwise DeepSpeed would look for CUDA if its toolkit is installed without a GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        device = torch.device("cpu")
    torch.set_num_threads(fit_threads(torch.get_num_threads()))
    if not dist.is_initialized():
        rank, size = place_of_process(os.environ)
        _meet(rank, size, device)
        tell_connected(rank)
    return device


def _meet(rank: int, size: int, device: torch.device) -> None:
    """Make the group of all processes, when all of them have come."""
    awaited = Awaited()

    def join() -> None:
        store = open_store(rank, size, _PATIENCE, awaited)
        if device.type == "cuda" and size > 1:
            gpu = str(torch.cuda.get_device_properties(device).uuid)
            refuse_shared(gpu, size, store, _PATIENCE)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)

    meeting(join, size, device, awaited)


def build_grid(config: GridConfig, device: torch.device) -> Grid:
    """Map the axes to the connected processes.

    Raises:
        UsageError: if the grid does not use all processes.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    data = check_grid(config, world)
    tensor, pipeline = config.tensor_parallel, config.pipeline_parallel
    ranks = torch.arange(world).view(pipeline, data, tensor)

    def group(rows: torch.Tensor) -> Group:
        mine = None
        for row in rows.tolist():
            created = dist.new_group(row)
            if rank in row:
                mine = created
        return mine

    def groups() -> tuple[Group, Group, Group]:
        return (
            group(ranks.reshape(-1, tensor)),
            group(ranks.permute(1, 2, 0).reshape(-1, pipeline)),
            group(ranks.permute(0, 2, 1).reshape(-1, data)),
        )

    tensor_group, pipeline_group, data_group = meeting(groups, world, device)
    return Grid(
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        rank=rank,
        device=device,
        tensor_group=tensor_group,
        pipeline_group=pipeline_group,
        data_group=data_group,
        sequence_parallel=config.sequence_parallel and tensor > 1,
    )


def disconnect() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


_LAUNCHERS = (
    # process rank, world size, local rank: the names of srun and Open MPI
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


def _adopt_launcher() -> None:
    """Translate srun's and mpirun's variables into torchrun's."""
    if "RANK" in os.environ:
        return
    for rank, size, local in _LAUNCHERS:
        # An interactive Slurm shell has these too; a step of several tasks also has MASTER_ADDR.
        if rank in os.environ and int(os.environ.get(size, "1")) > 1:
            if "MASTER_ADDR" not in os.environ:
                raise UsageError(
                    f"{size}={os.environ[size]} but MASTER_ADDR is not set: export MASTER_ADDR "
                    "(the first node) and MASTER_PORT before srun or mpirun"
                )
            os.environ.setdefault("MASTER_PORT", "29500")
            os.environ["RANK"] = os.environ[rank]
            os.environ["WORLD_SIZE"] = os.environ[size]
            os.environ["LOCAL_RANK"] = os.environ.get(local, "0")
            return
