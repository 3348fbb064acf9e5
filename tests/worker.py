"""Runs cases on the processes that a test started: ``worker.py REQUEST.json``."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

import pretrain.engine.engine
import pretrain.training.periodic
from benchmarks.operations import Operations
from data_pipeline.dataset import TrainingData
from models.gpt import whole_model
from models.initial import initial_of
from models.loss import mean_loss
from models.roles import info_of
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.restore import load_into_engine
from pretrain.config.recipe import Config, parse_config
from pretrain.decay.plan import plan_decay
from pretrain.decay.sites import site_of
from pretrain.distributed.grid import Grid, build_grid, connect, disconnect
from pretrain.distributed.replicas import disagreement, drift
from pretrain.engine.building import LayerDivider, build_model, working_type
from pretrain.engine.engine import build_engine
from pretrain.engine.layer_norms import as_figures
from pretrain.engine.libraries import load_libraries
from pretrain.tasks.text import Text
from pretrain.training.loader import Loader
from pretrain.training.setup import prepare
from pretrain.training.start import train
from tests.ahead import looking_ahead
from tests.counting import Counting
from tests.moved import moved_constants
from tests.private_deepspeed import run_private
from tests.stage_work import run_stage_work


class Interrupted(Exception):  # noqa: N818 - not an error
    """Stands for a kill."""


def interrupt_after(step: int) -> None:
    """Stop the next training in this process once it has saved ``step``."""
    save = pretrain.training.periodic.save

    def save_and_stop(job: Any, at: int) -> None:
        save(job, at)
        if at == step:
            pretrain.training.periodic.save = save
            raise Interrupted

    pretrain.training.periodic.save = save_and_stop  # type: ignore[assignment]


def lose(updates: list[int]) -> Any:
    """In training from now on, the losses of these updates are NaN; returns what undoes it."""
    plain = pretrain.engine.engine.Engine.train_step

    def train_step(engine: Any, batches: Any, more: bool = False) -> float:
        struck = engine.control.step + 1 in updates
        measured = engine.loss
        if struck:
            engine.loss = lambda *given, **more: measured(*given, **more) * float("nan")
        try:
            return plain(engine, batches, more)
        finally:
            if struck:
                del engine.loss

    pretrain.engine.engine.Engine.train_step = train_step  # type: ignore[assignment]

    def undo() -> None:
        pretrain.engine.engine.Engine.train_step = plain  # type: ignore[method-assign]

    return undo


def run_train(case: dict[str, Any], grid: Grid, config: Config) -> list[int]:
    """Train a case into its run folder; returns the steps whose ranks were measured later."""
    if case.get("stop"):  # as if killed just after the checkpoint of that step
        interrupt_after(case["stop"])
    undo = lose(case["lost"]) if case.get("lost") else None
    moved = moved_constants() if case.get("moved") else contextlib.nullcontext()
    ahead = looking_ahead(bool(case.get("ahead")))
    try:
        with contextlib.suppress(Interrupted), moved, ahead as steps:
            train(config, Path(case["run"]), grid, Path(case["fork"]) if case.get("fork") else None)
    finally:
        if undo:
            undo()
    return steps


def run_decay(case: dict[str, Any], grid: Grid, config: Config) -> dict[str, float]:
    """Steps with zero gradients: how far each rank's tensors are from Π(1 − η λ) times the start.

    Returns:
        The largest relative deviation on any rank, and the number of fragments and groups.
    """
    setup = prepare(config, grid.tensor)
    engine = build_engine(setup.config, grid, setup.plan)
    if case.get("checkpoint"):
        load_into_engine(Checkpoint(Path(case["checkpoint"])), engine)
        for fragment in engine.fragments():
            for moment in fragment.moments().values():
                moment.zero_()  # what is left then is decay alone
    measured = engine.loss
    engine.loss = lambda projection, labels: 0.0 * measured(projection, labels)  # type: ignore[method-assign]
    samples = config.train.steps * config.train.global_batch
    assert isinstance(setup.task, Text)
    data = TrainingData(setup.task.manifest, "proportional", config.model.context, 1, samples)
    micro = config.train.global_batch // grid.data // engine.micro_batches
    loader = Loader(data, grid, config.train.global_batch, micro, 0, 0)
    start = [fragment.master.double().clone() for fragment in engine.fragments()]
    rates = [3e-3, 1e-2, 2e-2, 1e-2, 5e-3]
    for number, rate in enumerate(rates):
        engine.begin_step(number, rate)
        engine.train_step(loader)
    engine.audit_decay()
    wanted = case["decays"]
    worst = 0.0
    for before, fragment in zip(start, engine.fragments(), strict=True):
        factor = 1.0
        role = fragment.info.role.value
        for number in range(len(rates)):
            every = case.get("rates", {}).get(role, rates)[number]
            factor *= 1.0 - every * wanted[role]
        deviation = (fragment.master.double() - factor * before).abs().max()
        worst = max(worst, float(deviation / before.abs().max().clamp_min(1e-12)))
    groups = len(engine.param_groups)
    engine.close()
    found = grid.gather((worst, len(start), groups))
    return {
        "worst": max(one[0] for one in found),
        "fragments": [one[1] for one in found],
        "groups": [one[2] for one in found],
    }


def run_traffic(case: dict[str, Any], grid: Grid, config: Config) -> dict[str, float]:
    """Bytes that rank 0 sends in one update, by collective, once every update sends the same.

    The first one exchanges shapes; ZeRO 3 then uses the next one to learn the order of its tensors.
    """
    infos = whole_model(config.model, grid.tensor)
    engine = build_engine(config, grid, plan_decay(infos, config.optimizer.weight_decay))
    micro = config.train.global_batch // grid.data // engine.micro_batches
    tokens = torch.arange(micro * config.model.context).view(micro, -1) % 100
    counted = Counting()
    raw = config.deepspeed.get("zero_optimization", {})
    before = 2 if raw.get("stage", config.grid.zero_stage) == 3 else 1
    for step in range(before + 1):
        engine.begin_step(step, 1e-3)
        with counted if step == before else contextlib.nullcontext():
            engine.train_step(itertools.repeat((tokens, tokens)))
    engine.close()
    return counted.bytes


def run_both_updates(case: dict[str, Any], grid: Grid, config: Config) -> dict[str, Any]:
    """The same updates by DeepSpeed and on flat buffers.

    Returns:
        The names of the engines, and for each update and parameter the largest difference of
        (loss, gradient norm) and of the working weights on any rank.
    """
    found: dict[str, tuple[list[Any], dict[str, torch.Tensor]]] = {}
    for kind in ("deepspeed", "flat"):
        speed = config.speed.model_copy(update={"update": kind})
        chosen = config.model_copy(update={"speed": speed})
        infos = whole_model(config.model, grid.tensor)
        engine = build_engine(chosen, grid, plan_decay(infos, config.optimizer.weight_decay))
        micro = config.train.global_batch // grid.data // engine.micro_batches
        draw = torch.Generator().manual_seed(grid.data_rank)
        shape = (micro, config.model.context)

        def batches(shape: Any = shape, draw: Any = draw) -> Any:
            while True:
                tokens = torch.randint(0, 90, shape, generator=draw)
                yield tokens, tokens.roll(-1, 1)

        figures = []
        data = batches()
        for step in range(config.train.steps):
            engine.begin_step(step, 3e-3)
            figures.append((engine.train_step(data), engine.gradient_norm))
        weights = {info_of(one).name: one.detach().clone() for one in engine.module.parameters()}
        found[engine.updates_by] = (figures, weights)
        engine.close()
    (first, before), (second, after) = found.values()
    figures = [
        abs(a - b)
        for one, two in zip(first, second, strict=True)
        for a, b in zip(one, two, strict=True)
    ]
    apart = {
        name: float((before[name] - after[name]).abs().max())
        for name in before
        # Softmax ignores it: its gradient is rounding alone, which AdamW makes as large as others'.
        if not name.endswith("attention.key.bias")
    }
    every = grid.gather((max(figures), max(apart.values())))
    return {
        "engines": list(found),
        "figures": max(one[0] for one in every),
        "weights": max(one[1] for one in every),
        "moved": float(first[-1][0] - first[0][0]),
    }


def run_operations(case: dict[str, Any], grid: Grid, config: Config) -> dict[str, dict[str, int]]:
    """ATen operations of an update of each kind, and of forward and backward pass alone."""
    infos = whole_model(config.model, grid.tensor)
    tokens = torch.arange(8 * config.model.context).view(8, -1) % 90
    found = {}
    for kind in ("deepspeed", "flat"):
        speed = config.speed.model_copy(update={"update": kind})
        chosen = config.model_copy(update={"speed": speed})
        engine = build_engine(chosen, grid, plan_decay(infos, config.optimizer.weight_decay))
        for step in range(3):
            counted = Operations()
            engine.begin_step(step, 1e-3)
            with counted:
                engine.train_step(itertools.repeat((tokens, tokens)))
        found[kind] = dict(counted.counts)
        engine.close()
    module = build_model(config, grid)
    counted = Operations()
    with counted:
        module(tokens, partial(mean_loss, labels=tokens)).backward()
    return {**found, "model": dict(counted.counts)}


def gathered(parameter: Any, config: Config) -> Any:
    """A block in which a parameter is whole on this process."""
    if config.grid.zero_stage < 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def run_initial(case: dict[str, Any], grid: Grid, config: Config) -> dict[str, Any]:
    """Compare the masters and working weights of a new engine with the values of the seed.

    Returns:
        The largest differences on any rank; the number of elements of all fragments and of the
        model; how often tensors were gathered; the most elements that were whole while the model
        was built, beside what is allowed.
    """
    infos = whole_model(config.model, grid.tensor)
    held, largest = [0], [0]
    plain = LayerDivider.__call__

    def divide(self: LayerDivider, layer: Any) -> None:
        numbers = [one.numel() for one in layer.parameters()]
        held.append(sum(one.numel() for one in seen) + sum(numbers))
        largest.append(sum(numbers))
        plain(self, layer)
        seen.extend(layer.parameters())

    seen: list[Any] = []
    LayerDivider.__call__ = divide  # type: ignore[method-assign]
    counted = Operations()
    try:
        with counted:
            engine = build_engine(config, grid, plan_decay(infos, config.optimizer.weight_decay))
    finally:
        LayerDivider.__call__ = plain  # type: ignore[method-assign]
    rank, size = grid.tensor_rank, grid.tensor
    masters, elements = 0.0, 0
    for fragment in engine.fragments():
        low, high = fragment.offset, fragment.offset + fragment.master.numel()
        expected = initial_of(fragment.parameter).part(rank, size, low, high)
        masters = max(masters, float((fragment.master - expected).abs().max()))
        elements += high - low
    working = 0.0
    for parameter in engine.module.parameters():
        values = initial_of(parameter).part(rank, size)
        with gathered(parameter, config):
            flat = parameter.detach().reshape(-1)
            assert flat.dtype == working_type(config)
            working = max(working, float((flat - values.to(flat.dtype)).abs().max()))
    engine.close()
    every = grid.gather((masters, working, elements))
    return {
        "masters": max(one[0] for one in every),
        "working": max(one[1] for one in every),
        "elements": sum(one[2] for one in every),
        "parameters": sum(info.numel for info in infos),
        "gathers": sum(n for name, n in counted.counts.items() if "allgather" in name),
        "held": max(held),
        "largest layer": max(largest),
        "small": sum(info.numel for info in infos if len(info.shape) == 1),
    }


def run_norms(case: dict[str, Any], grid: Grid, config: Config) -> dict[str, Any]:
    """Norms of the third update, from the meter; on one process also by hand.

    Returns:
        What the meter says, the largest logits, and the same by hand (None on several processes).
    """
    infos = whole_model(config.model, grid.tensor)
    engine = build_engine(config, grid, plan_decay(infos, config.optimizer.weight_decay))
    draw = torch.Generator().manual_seed(1)
    total, context = config.train.global_batch, config.model.context
    micro = total // grid.data // engine.micro_batches
    for step in range(3):
        tokens = torch.randint(0, 90, (total, context), generator=draw)
        own = tokens.view(engine.micro_batches, grid.data, micro, context)[:, grid.data_rank]
        engine.begin_step(step, 3e-3)
        if step == 2:
            engine.norms.arm()
            before = {id(one.parameter): one.master.clone() for one in engine.fragments()}
            by_hand = _norms_by_hand(engine, tokens) if grid.world_size == 1 else None
        engine.train_step(iter([(one, one.roll(-1, 1)) for one in own]))
    norms = engine.norms.take()
    assert norms is not None and engine.norms.take() is None
    logits = engine.largest_logits()
    if by_hand is not None:
        shrink = min(1.0, config.optimizer.gradient_clipping / (engine.gradient_norm + 1e-6))
        gradients = {site: shrink * value.sqrt().item() for site, value in by_hand.items()}
        sums: dict[str, dict[Any, float]] = {"weights": {}, "updates": {}}
        for one in engine.fragments():
            site = site_of(one.info)
            for kind, value in (
                ("weights", one.master),
                ("updates", one.master - before[id(one.parameter)]),
            ):
                sums[kind][site] = sums[kind].get(site, 0.0) + value.double().square().sum().item()
        found = {kind: {k: v**0.5 for k, v in of.items()} for kind, of in sums.items()}
        by_hand = as_figures({**found, "gradients": gradients})
    engine.close()
    return {"norms": as_figures(norms), "logits": logits, "by hand": by_hand}


def _norms_by_hand(engine: Any, tokens: torch.Tensor) -> dict[Any, torch.Tensor]:
    """Squares of the gradient of a batch by site, by autograd alone."""
    parameters = list(engine.module.parameters())
    loss = engine.module(tokens, partial(mean_loss, labels=tokens.roll(-1, 1)))
    gradients = torch.autograd.grad(loss, parameters)
    found: dict[Any, torch.Tensor] = {}
    for parameter, gradient in zip(parameters, gradients, strict=True):
        site = site_of(info_of(parameter))
        found[site] = found.get(site, torch.zeros(())) + gradient.double().square().sum()
    return found


def run_drift(case: dict[str, Any], grid: Grid, config: Config) -> dict[str, Any]:
    """What comparisons of copies say after three updates, and once bits of the last rank flipped.

    Returns:
        ``clean``, and by the name of the flipped parameter: (between data-parallel, between
        tensor-parallel processes).
    """
    infos = whole_model(config.model, grid.tensor)
    engine = build_engine(config, grid, plan_decay(infos, config.optimizer.weight_decay))
    draw = torch.Generator().manual_seed(grid.data_rank)
    micro = config.train.global_batch // grid.data // engine.micro_batches
    shape = (micro, config.model.context)

    def batches() -> Any:
        while True:
            tokens = torch.randint(0, 90, shape, generator=draw)
            yield tokens, tokens.roll(-1, 1)

    for step in range(3):
        engine.begin_step(step, 3e-3)
        engine.train_step(batches())

    def said() -> list[str]:
        return [
            compare(engine.module, grid) if size > 1 else ""
            for compare, size in ((disagreement, grid.data), (drift, grid.tensor))
        ]

    found: dict[str, Any] = {"clean": said()}
    named = {info_of(one).name: one for one in engine.module.parameters()}
    for name in case["flips"]:
        flips = grid.rank == grid.world_size - 1 and name in named
        bits = named[name].data.view(-1)[:1].view(torch.uint8) if flips else torch.zeros(1)
        bits[0] = int(bits[0]) ^ 4
        found[name] = said()
        bits[0] = int(bits[0]) ^ 4
    engine.close()
    return found


TASKS = {
    "drift": run_drift,
    "norms": run_norms,
    "initial": run_initial,
    "both": run_both_updates,
    "operations": run_operations,
    "train": run_train,
    "decay": run_decay,
    "traffic": run_traffic,
    "private": run_private,
    "stage_work": run_stage_work,
}


def main() -> None:
    """Run every case and let rank 0 write the answers."""
    request = json.loads(Path(sys.argv[1]).read_text())
    device = connect()
    load_libraries()
    answers = []
    grids: dict[Any, Grid] = {}  # shared: each has process groups, and each group has threads
    for case in request["cases"]:
        config = parse_config(case["recipe"])
        axes = (config.grid.tensor_parallel, config.grid.pipeline_parallel)
        shape = (*axes, config.grid.sequence_parallel)
        if shape not in grids:
            grids[shape] = build_grid(config.grid, device)
        grid = grids[shape]
        answers.append(TASKS[case.get("task", request["task"])](case, grid, config))
        grid.barrier()
    if grid.is_main:
        Path(request["answer"]).write_text(json.dumps(answers))
    disconnect()


if __name__ == "__main__":
    main()
