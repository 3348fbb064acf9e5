"""`pretrain train --dry-run`: shows what would be trained, with λ, grid and memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from data_pipeline.strict_json import to_json
from pretrain.cli.console import plain, show_table, warn
from pretrain.cluster.plan_grids import accept
from pretrain.cluster.vocabulary import NoData, task_to_plan
from pretrain.config.recipe import Config
from pretrain.config.science import GridConfig
from pretrain.decay.control import DecayControl
from pretrain.decay.lengths import remarks
from pretrain.decay.plan import DecayGroup
from pretrain.decay.sites import Site, site_of
from pretrain.distributed.grid import check_grid, process_count
from pretrain.engine.engine import micro_batches
from pretrain.engine.layout import empty_grid, layout_of
from pretrain.engine.memory import memory_of, process_bytes
from pretrain.engine.micro_batch import (
    AUTO,
    MicroBatch,
    largest_micro_batch,
    memory_alone,
    with_size,
)
from pretrain.engine.optimizers import refuse_missing_optimizer
from pretrain.engine.precision import with_precision
from pretrain.engine.sizes import sizes_of
from pretrain.runs.metrics import refuse_missing_services
from pretrain.tasks.epochs import describe as describe_data
from pretrain.tasks.epochs import in_words
from pretrain.tasks.task import Task, Uses
from pretrain.training.setup import Setup, prepare


def dry_run(config: Config, as_json: bool, processes: int = 1) -> None:
    """Print parameter groups, grid and memory without building or training anything.

    Args:
        processes: the number that would be started on this machine.
    """
    task, missing = task_to_plan(config)
    if missing:
        warn(missing)
    setup = prepare(config, config.grid.tensor_parallel, task=task)
    summary = describe(setup, _data_parallel(config.grid, processes))
    if as_json:
        print(to_json(summary))
        return
    from rich.table import Table

    table = Table(title="parameter groups")
    for column in ("group", "role", "layers", "tensors", "parameters", "λ", "exposure Σηλ"):
        table.add_column(
            column, justify="left" if column in ("group", "role", "layers") else "right"
        )
    for group in summary["groups"]:
        table.add_row(
            group["name"],
            group["role"],
            group["layers"],
            str(group["tensors"]),
            f"{group['parameters']:,}",
            f"{group['weight_decay']:g}",
            "adaptive" if group["exposures"] is None else _range(group["exposures"]),
        )
    table.add_row("all", "", "", "", f"{summary['parameters']:,}", "", "")
    show_table(table, 120)
    grid, memory = summary["grid"], summary["memory_gib"]
    print(
        f"grid: tensor {grid['tensor_parallel']} x pipeline {grid['pipeline_parallel']} x data "
        f"{grid['data_parallel']}, ZeRO {grid['zero_stage']}, {summary['precision']}"
    )
    if summary["micro_batch"]["why"]:
        print(MicroBatch(**summary["micro_batch"]).in_words())
    parts = ", ".join(f"{name} {value:.2f}" for name, value in memory.items() if name != "total")
    print(f"memory per process, estimated: {memory['total']:.2f} GiB ({parts})")
    print(
        f"{summary['steps']:,} steps of {summary['tokens_per_step']:,} tokens: "
        f"{summary['tokens']:,} tokens"
    )
    print(plain(f"checkpoints: {summary['kept']}"))
    print(plain(f"evaluation: {summary['scored']}"))
    if summary["attention"]:
        print(f"attention: {summary['attention']}")
    for remark in summary["remarks"]:
        print(plain(f"note: {remark}"))
    data = summary["data"]
    if data["subsets"]:
        print(plain(f"data: {in_words(data['subsets'], data['unit'])}"))
        _print_subsets(data["subsets"], data["unit"])


def _print_subsets(uses: Uses, unit: str) -> None:
    from rich.table import Table

    table = Table(title=f"{unit} by subset")
    for column in ("subset", "in the data", "seen", "epochs"):
        table.add_column(column, justify="left" if column == "subset" else "right")
    for name, subset in uses.items():
        table.add_row(
            name,
            f"{int(subset['corpus']):,}",
            f"{int(subset['seen']):,}",
            f"{subset['epochs']:.3g}",
        )
    show_table(table, 120)


def _data_parallel(grid: GridConfig, processes: int) -> int:
    """The data-parallel size of a start; 1 if nobody says how many processes there will be.

    Raises:
        UsageError: if the grid does not divide the processes that would be started.
    """
    if processes > 1 and "RANK" not in os.environ:  # a launcher's number goes before
        return check_grid(grid, processes)
    return max(1, process_count() // (grid.tensor_parallel * grid.pipeline_parallel))


def describe(setup: Setup, data: int) -> dict[str, Any]:
    """The dry run as plain data, for a data-parallel size."""
    config = setup.config
    grid = config.grid
    model_ranks = grid.tensor_parallel * grid.pipeline_parallel
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accept(config, device.type, data * model_ranks)
    micro_batch = _micro_batch(config, device, data * model_ranks)
    config = with_size(config, micro_batch.size)
    setup = replace(setup, config=config)
    refuse_missing_optimizer(config.optimizer)
    refuse_missing_services(config.logging)
    if not isinstance(setup.task, NoData):
        setup.task.held_out(config)  # refuses data without the split, as a start does
    control = DecayControl(config, setup.plan)
    groups = [
        {
            "name": group.name,
            "role": group.role.value,
            "layers": group.layers,
            "tensors": len(group.parameters),
            "parameters": group.numel,
            "weight_decay": group.decay,
            "exposure": _mean(exposures),
            "exposures": exposures,
        }
        for group, exposures in zip(
            setup.plan.groups, _exposures(control, setup.plan.groups, config), strict=True
        )
    ]
    tokens = config.train.global_batch * config.model.context
    return {
        "groups": groups,
        "parameters": sum(group.numel for group in setup.plan.groups),
        "grid": {
            "tensor_parallel": grid.tensor_parallel,
            "pipeline_parallel": grid.pipeline_parallel,
            "data_parallel": data,
            "zero_stage": grid.zero_stage,
        },
        "precision": with_precision(config, device).precision,
        "memory_gib": memory(setup, data, device),
        "micro_batch": asdict(micro_batch),
        "steps": config.train.steps,
        "tokens_per_step": tokens,
        "tokens": tokens * config.train.steps,
        "kept": _kept(config),
        "scored": _scored(setup.task, config),
        "attention": _SEEN[config.data.attention] if config.task.kind == "text" else "",
        "data": describe_data(setup.task, config),
        "remarks": remarks(config),
    }


def _micro_batch(config: Config, device: torch.device, count: int) -> MicroBatch:
    """The recipe's micro batch, or what auto means on devices like this one."""
    if config.train.micro_batch == AUTO:
        memory = memory_alone(device, count)
        return largest_micro_batch(config, device.type, count, memory)
    return MicroBatch(micro_batches(config, empty_grid(config, device.type, count))[0], "")


def _kept(config: Config) -> str:
    """When checkpoints are made and which stay, since others cannot be forked or evaluated."""
    rules, text = config.checkpoint, f"every {config.interval('checkpoint'):,} steps"
    if not rules.keep:
        return f"{text}; all are kept (checkpoint.keep)"
    more = f", those at multiples of {rules.keep_every:,}" * bool(rules.keep_every)
    more += ", the best" * rules.keep_best
    return f"{text}; the last {rules.keep}{more} are kept (checkpoint.keep)"


_SEEN = {
    "across": "a token sees all earlier documents of its sequence (data.attention)",
    "within": "a token sees only its own document (data.attention)",
}


def _scored(task: Task, config: Config) -> str:
    """What is evaluated while it trains and at the end, which are different things."""
    section = config.evaluation
    unit = "documents" if config.task.kind == "text" else "samples"
    sample = f"a sample of {section.documents:,} {unit} of {task.split(config)}"
    text = f"{sample} every {config.interval('evaluation'):,} steps"
    at_end = {
        "none": "nothing at the end",
        "sample": "the same at the end",
        "all": f"at the end all of {task.split(config, everything=True)}",
    }[section.at_end]
    return f"{text}; {at_end} (evaluation.at_end)"


_LOOKED_AT = 20_000
"""Number of updates whose λ is examined; in longer runs, they are evenly spaced."""


def _exposures(
    control: DecayControl, groups: Sequence[DecayGroup], config: Config
) -> list[list[float] | None]:
    """Σ rate·λ over the run, of each tensor of each group; None if λ depends on measurements."""
    found: list[list[float] | None] = [None] * len(groups)
    by_stride: dict[int, dict[int, list[Site]]] = {}
    for number, group in enumerate(groups):
        if control.is_adaptive(group.role):
            continue
        sites = [site_of(info) for info in group.parameters]
        if not control.moves_layers_apart(group.role):
            sites = sites[:1]
        stride = -(-config.train.steps * len(sites) // _LOOKED_AT)
        by_stride.setdefault(stride, {})[number] = sites
    for stride, members in by_stride.items():
        totals = _summed(control, config, stride, {s for sites in members.values() for s in sites})
        for number, sites in members.items():
            found[number] = [totals[site] for site in sites]
    return found


def _summed(
    control: DecayControl, config: Config, stride: int, sites: Iterable[Site]
) -> dict[Site, float]:
    """Σ rate·λ of each site, from the middle of every ``stride`` updates."""
    keys = {site: control.alike(site) for site in sites}
    firsts = {key: site for site, key in keys.items()}
    totals = dict.fromkeys(firsts, 0.0)
    for start in range(0, config.train.steps, stride):
        stop = min(start + stride, config.train.steps)
        middle = (start + stop) // 2
        control.begin(middle, config.learning_rate(middle))
        for key, site in firsts.items():
            totals[key] += control.now(site).shrink * (stop - start)
    return {site: totals[key] for site, key in keys.items()}


def _mean(exposures: list[float] | None) -> float | None:
    return None if exposures is None else sum(exposures) / len(exposures)


def _range(exposures: list[float]) -> str:
    """``0.0086`` or, where a policy moves layers apart, ``0.0086-0.026``."""
    low, high = f"{min(exposures):.3g}", f"{max(exposures):.3g}"
    return low if low == high else f"{low}-{high}"


def memory(setup: Setup, data: int, device: torch.device) -> dict[str, float]:
    """GiB per process by part, estimated as `pretrain plan` does."""
    config, grid = setup.config, setup.config.grid
    count = data * grid.tensor_parallel * grid.pipeline_parallel
    base, slack = process_bytes(device.type)
    on = layout_of(config, device.type, count, base, slack)
    parts = {name: value / 2**30 for name, value in memory_of(sizes_of(config), on).items()}
    return {**parts, "total": sum(parts.values())}
