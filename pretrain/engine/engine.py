"""Builds a DeepSpeed engine from (config, grid), with one small interface for every grid."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from models.initial import initial_of
from models.layers import Storage
from models.loss import Projection, mean_loss
from pretrain.config.recipe import Config
from pretrain.decay.control import DecayControl
from pretrain.decay.plan import DecayPlan
from pretrain.distributed.grid import Grid
from pretrain.engine.audit import audit_groups
from pretrain.engine.building import LayerDivider, build_model, working_type
from pretrain.engine.deepspeed_adapter import (
    ModelParallelUnit,
    adapt,
    deepspeed_settings,
    hooks_without_gathering,
    mark_for_norms,
    one_optimizer_for_every_stage,
    prepare_deepspeed,
    silent,
)
from pretrain.engine.flat_update import FlatUpdate
from pretrain.engine.forensics import Nonfinite, first_nonfinite
from pretrain.engine.layer_norms import NormMeter, largest_logits
from pretrain.engine.masters import (
    Fragment,
    fragments,
    is_replicated,
    local_shape,
    refresh_working,
)
from pretrain.engine.optimizers import build_optimizer, optimizer_groups
from pretrain.engine.passes import Batch, Passes
from pretrain.engine.precision import with_precision
from pretrain.engine.queues import Beside, to_host
from pretrain.engine.shrink import Shrinker
from pretrain.engine.speed import records_passes
from pretrain.engine.stopwatch import Stopwatch
from pretrain.errors import UsageError


@dataclass
class Engine:
    """A model in training, on this process."""

    _updater: Any
    """DeepSpeed's engine, or the `FlatUpdate` with the same calls."""
    module: nn.Module
    grid: Grid
    config: Config
    plan: DecayPlan
    micro_batches: int
    control: DecayControl
    shrinker: Shrinker
    norms: NormMeter
    """Norms by layer and role of the next update, once it is armed."""
    gradient_norm: float = float("nan")
    """Global norm of the last step's gradient, before clipping."""
    stopwatch: Stopwatch = field(init=False)
    """Seconds of the parts of updates."""
    looks_ahead: bool = field(init=False)
    """Whether a GPU begins the next update while the host waits for figures of this one."""
    beside: Beside = field(init=False)
    spans: dict[str, Any] = field(default_factory=dict)
    """Parts of tensors on other processes, once they are known (`pretrain.ranks.collect`)."""

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(self.grid.device)
        self.beside = Beside(self.grid.device)
        self.looks_ahead = self.grid.device.type == "cuda"
        self._passes = Passes(
            self._updater,
            self._loss_now,
            self.micro_batches,
            self.stopwatch,
            recorded=records_passes(self.config, self.grid),
            alone=self.grid.world_size == 1,
        )

    def train_step(self, batches: Iterator[Batch], more: bool = False) -> float:
        """Make one optimizer update from ``micro_batches`` batches of this data-parallel rank.

        Args:
            more: another update from ``batches`` follows. A GPU then begins with its first micro
                batch while the host waits for the loss of this one.

        Returns:
            Mean loss over the global batch, in nats per token, equal on every process.
        """
        self.module.train()
        self.shrinker.arm()
        if self.grid.pipeline > 1:
            with self.stopwatch.part("forward_backward"):  # and the update: it is one call
                loss = self._updater.train_batch(data_iter=batches)
        else:
            loss = self._mean(self._passes.update(batches))
        norm = self._updater.get_global_grad_norm()
        if isinstance(self._updater, FlatUpdate):
            figures = to_host(torch.stack([loss, norm]))
            self.beside.weights_are_made()
            if more and self.looks_ahead:
                self._passes.begin_next(batches)
            mean, self.gradient_norm = figures()  # the only wait for the device
            if self._updater.decides_on_device and not self.skipped:
                self.shrinker.record()
            return mean
        if norm is not None:
            self.gradient_norm = float(norm)
        return float(loss)

    @property
    def skipped(self) -> bool:
        """Whether the last update was skipped because its gradient was not finite."""
        return not (math.isfinite(self.gradient_norm) and self.gradient_norm >= 0)

    @property
    def has_begun_next(self) -> bool:
        """Whether a GPU computes a part of the next update already."""
        return self._passes.has_begun_next

    def beside_next_update(self, wait: bool = True) -> contextlib.AbstractContextManager[None]:
        """Let a GPU read weights beside the passes of the next update that it has begun.

        With ``wait`` the host waits for what the block computes; without, only the update does.
        """
        return self.beside(wait) if self.has_begun_next else contextlib.nullcontext()

    def forget_next_update(self) -> None:
        """Drop what was begun of the next update, before weights change otherwise."""
        self._passes.forget_next()

    @property
    def last_batches(self) -> list[Batch]:
        """Micro batches of the last update; none under a pipeline, which reads them by itself."""
        return self._passes.last

    def first_nonfinite(self) -> Nonfinite | None:
        """Where the last update's forward pass first had a value that is not finite.

        It is repeated for that; a collective call. None if all values are finite now.
        """
        return first_nonfinite(
            self.module,
            lambda batch: self._updater(batch[0], partial(self.loss, labels=batch[1])),
            self.last_batches,
        )

    def largest_logits(self) -> dict[int, float]:
        """The largest attention logit of each layer in the last update's first micro batch, with
        the weights of now; a collective call. Empty under a pipeline, which keeps no batches."""
        if not self.last_batches:
            return {}
        tokens, labels = self.last_batches[0]
        return largest_logits(
            self.module, lambda: self._updater(tokens, partial(self.loss, labels=labels)), self.grid
        )

    def _mean(self, loss: torch.Tensor) -> torch.Tensor:
        """Mean over the data-parallel processes."""
        if self.grid.data > 1:
            dist.all_reduce(loss, group=self.grid.data_group)
            loss /= self.grid.data
        return loss

    def _loss_now(self, projection: Projection, labels: torch.Tensor) -> torch.Tensor:
        """`loss` as it is when a pass is made, even if it was replaced since."""
        return self.loss(projection, labels)

    def loss(self, projection: Projection, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of a micro batch, in nats per token."""
        partly = self.config.task.kind != "text"
        return mean_loss(projection, labels, partly, self.config.train.z_loss)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the innermost optimizer on this process."""
        optimizer = self._updater.optimizer
        inner = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
        return list(inner.param_groups)

    def begin_step(self, step: int, learning_rate: float) -> None:
        """Set η and λ in every group, by name, for update number ``step`` (the first is 0)."""
        self.control.begin(step, learning_rate)
        for group in self.param_groups:
            group["lr"] = self.control.rate_of(self.plan.group(group["name"]).role)
            group["weight_decay"] = self._held(group["name"])

    def _held(self, name: str) -> float:
        """The λ that the optimizer itself must hold for a group; the shrinker applies the rest."""
        group = self.plan.group(name)
        native = self.shrinker.native and self.control.is_plain(group.role)
        return group.decay if native else 0.0

    @property
    def updates_by(self) -> str:
        """Name of the class that makes the updates."""
        return type(self._updater).__name__

    @property
    def is_replicated(self) -> bool:
        """Whether every data-parallel process holds all masters (no ZeRO)."""
        return is_replicated(self._updater)

    def fragments(self) -> list[Fragment]:
        """The fragments that this process's optimizer owns."""
        return fragments(self._updater)

    @torch.no_grad()
    def draw(self) -> None:
        """Set the weights to the initial values of the recipe's seed; a collective call."""
        rank, size = self.grid.tensor_rank, self.grid.tensor
        for fragment in self.fragments():
            initial = initial_of(fragment.parameter)
            for low, part in fragment.parts():
                part.copy_(initial.part(rank, size, low, low + part.numel()))
        self.refresh()

    def refresh(self) -> None:
        """Set the working weights of all processes from the masters; a collective call."""
        refresh_working(self._updater)

    def audit_decay(self) -> None:
        """Check that λ and η that this process's optimizer holds for each tensor are the plan's.

        Raises:
            RunError: naming the first tensor that would be decayed or updated wrongly.
        """
        names = self.plan.group_of
        audit_groups(
            self.fragments(),
            lambda info: self._held(names[info.name]),
            lambda info: self.control.rate_of(info.role),
        )

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        with contextlib.suppress(Exception):
            self._updater.destroy()


def build_engine(
    config: Config, grid: Grid, plan: DecayPlan, eod: int | None = None, draws: bool = True
) -> Engine:
    """Build model, optimizer groups and DeepSpeed engine for this process.

    Args:
        eod: the token between documents, if the task has documents.
        draws: set the initial values. Otherwise the weights are undefined until a checkpoint is
            read.

    Raises:
        UsageError: if the batch cannot be divided or a raw DeepSpeed key contradicts the recipe.
    """
    config = with_precision(config, grid.device)
    micro, count = micro_batches(config, grid)
    if config.data.attention == "within" and eod is None:
        raise UsageError(
            "data.attention: within needs data with a token between documents; use across"
        )

    def loss(projection: Projection, labels: torch.Tensor) -> torch.Tensor:
        return engine.loss(projection, labels)

    storage: Storage = "shape" if config.is_flat else "empty"
    divides = None
    if config.grid.zero_stage == 3:
        prepare_deepspeed()
        settings = deepspeed_settings(config, grid, micro, count, 1)
        divides = LayerDivider(settings, grid, working_type(config))
    module = build_model(config, grid, loss, eod, storage, divides)
    mark_for_norms(module, grid)
    control = DecayControl(config, plan)
    groups = optimizer_groups(module, plan)
    if config.is_flat:
        wrapped = _flat_update(config, grid, module, groups, count)
        optimizer = wrapped.optimizer
    else:
        optimizer = build_optimizer(config.optimizer, groups)
        wrapped = _deepspeed_engine(config, grid, module, optimizer, micro, count)
    decay = config.optimizer.weight_decay
    shrinker = Shrinker(
        wrapped,
        module,
        grid,
        control,
        config.model,
        slope=decay.adadecay_slope,
        nuclear_every=decay.nuclear_every,
        native=config.optimizer.name == "adamw",
    )
    if isinstance(wrapped, FlatUpdate):
        wrapped.decides_on_device = shrinker.is_left_to_optimizer
    parameters = [info for group in plan.groups for info in group.parameters]
    norms = NormMeter(parameters, fragments(wrapped), grid, is_replicated(wrapped))
    norms.attach(optimizer)  # first: it keeps the masters before decay
    shrinker.attach(optimizer)
    engine = Engine(wrapped, module, grid, config, plan, count, control, shrinker, norms)
    engine.begin_step(0, 0.0)
    engine.audit_decay()
    if draws:
        engine.draw()
    return engine


def _flat_update(
    config: Config, grid: Grid, module: nn.Module, groups: list[dict[str, Any]], count: int
) -> FlatUpdate:
    return FlatUpdate(
        module,
        grid,
        groups,
        partial(build_optimizer, config.optimizer),
        working_type(config),
        shared=config.grid.zero_stage == 1,
        micro_batches=count,
        clipping=config.optimizer.gradient_clipping,
    )


def _deepspeed_engine(
    config: Config,
    grid: Grid,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro: int,
    count: int,
) -> Any:
    prepare_deepspeed()
    import deepspeed

    numel = sum(local_shape(parameter).numel() for parameter in module.parameters())
    settings = deepspeed_settings(config, grid, micro, count, numel)
    pipeline = grid.pipeline > 1
    with silent(), one_optimizer_for_every_stage(), hooks_without_gathering(module):
        wrapped, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=settings,
            mpu=None if pipeline else ModelParallelUnit(grid),
        )
    adapt(wrapped, grid)
    return wrapped


def refuse_unfit(config: Config, grid: Grid) -> None:
    """Refuse a recipe that `build_engine` would refuse, without building anything.

    Raises:
        UsageError: naming the key.
    """
    micro, count = micro_batches(config, grid)
    deepspeed_settings(with_precision(config, grid.device), grid, micro, count, 1)


def micro_batches(config: Config, grid: Grid) -> tuple[int, int]:
    """Sequences per forward pass, and passes per update, of each data-parallel rank.

    ``auto`` counts as one sequence until `micro_batch.largest_micro_batch` has replaced it.

    Raises:
        UsageError: if the global batch cannot be divided.
    """
    total, micro = config.train.global_batch, config.train.micro_batch
    if total % grid.data:
        raise UsageError(
            f"train.global_batch: {total} sequences cannot be divided among {grid.data} "
            f"data-parallel ranks; use a multiple of {grid.data}"
        )
    share = total // grid.data
    if micro == "auto":
        micro = 1
    if not micro:
        # As few passes as possible, but at least one per stage, to fill the pipeline.
        passes = next(n for n in range(min(grid.pipeline, share), 0, -1) if share % n == 0)
        micro = share // passes
    if share % micro:
        raise UsageError(
            f"train.micro_batch: {micro} does not divide the {share} sequences of each "
            f"data-parallel rank (global_batch {total} / {grid.data}); use a divisor of {share}"
        )
    return micro, share // micro
