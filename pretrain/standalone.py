"""Evaluation of checkpoints, without a training engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.dataset import held_out
from data_pipeline.manifest import load_manifest
from pretrain.checkpoint import Checkpoint, load_into_module
from pretrain.config import Config, apply_overrides
from pretrain.deepspeed_adapter import prepare_deepspeed, resolve_precision
from pretrain.engine import build_model
from pretrain.errors import UsageError
from pretrain.evaluate import score, summarize
from pretrain.grid import build_grid, check_grid, connect, process_count
from pretrain.libraries import load_libraries
from pretrain.run import resolve_checkpoint, write_text
from pretrain.speed import keep_freed_memory
from pretrain.tasks import Task, Text, open_task
from pretrain.tracking import Progress
from pretrain.truncate import CutCheckpoint, RankChoice


def evaluate_checkpoint(
    target: str,
    overrides: list[str],
    data: Path | None,
    split: str,
    documents: int | None,
    batch: int,
    stride: int,
    out: Path | None,
    choice: RankChoice | None = None,
) -> tuple[dict[str, Any], Path, bool]:
    """Score a checkpoint on the processes at hand; a collective call.

    Args:
        overrides: of the run's recipe, for example another grid.
        choice: cut the attention products before scoring.

    Returns:
        (figures, where they were written, whether this process is the main one).
    """
    source = resolve_checkpoint(target)
    checkpoint = CutCheckpoint(source, choice) if choice else Checkpoint(source)
    config = apply_overrides(_one_process(checkpoint.config), overrides)
    if stride > config.model.context:
        raise UsageError(f"--stride: {stride} is more than the context, {config.model.context}")
    check_grid(config.grid, process_count())
    task = _task(checkpoint, config, data, stride)
    device = connect()
    keep_freed_memory(device)
    load_libraries()
    prepare_deepspeed()
    grid = build_grid(config.grid, device)
    module = build_model(config, grid)
    load_into_module(checkpoint, module, grid)
    if resolve_precision(config.precision, grid.device, config.grid.zero_stage) == "bf16":
        module.bfloat16()
    progress = Progress(1, "evaluate", grid.is_main)
    header = {
        "split": split,
        "step": checkpoint.step,
        "checkpoint": str(checkpoint.path),
        "data": task.source,
    }
    if choice is not None:
        share = "measured" if choice.share is None else choice.share
        header |= {"attention_rank": share, "attention_products": list(choice.products)}

    def report(done: int, total: int) -> None:
        progress.update(done, total=total)

    if isinstance(task, Text):
        chosen = held_out(task.manifest, split, documents)
        eod = task.manifest.eod
        nats = score(module, grid, config.model, chosen, eod, batch, stride, report)
        body = {"stride": stride or config.model.context, **summarize(chosen, nats)}
    else:
        body = task.figures(module, grid, config, task.held_out(config, everything=True), report)
    progress.close()
    figures = {**header, **body}
    path = out or _result_path(target, checkpoint, split, choice)
    if grid.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(figures, indent=1))
    return figures, path, grid.is_main


def _task(checkpoint: Checkpoint, config: Config, data: Path | None, stride: int) -> Task:
    """What the checkpoint is scored on."""
    if config.task.kind != "text":
        if data or stride:
            raise UsageError(f"--data, --stride: are for text, not for {config.task.kind}")
        return open_task(config)
    task = Text(load_manifest(data or Path(config.data.path)))
    if task.tokenizer != checkpoint.state["tokenizer"]:
        raise UsageError(
            f"{task.source}: was tokenised with another tokenizer than {checkpoint.path} was "
            f"trained with; tokenise it with {checkpoint.config.data.path}'s"
        )
    return task


def _one_process(config: Config) -> Config:
    """The recipe with the grid that one process can hold; overrides may set another."""
    single = {"tensor_parallel": 1, "pipeline_parallel": 1, "sequence_parallel": False}
    grid = config.grid.model_copy(update=single)
    return config.model_copy(update={"grid": grid})


def _result_path(
    target: str, checkpoint: Checkpoint, split: str, choice: RankChoice | None
) -> Path:
    name = "evaluation.json" if split == "test" else f"evaluation-{split}.json"
    if choice is not None:
        share = "measured" if choice.share is None else f"{choice.share:g}"
        name = f"{Path(name).stem}-{'+'.join(choice.products)}-rank-{share}.json"
    run = checkpoint.path.parent.parent
    newest = Path(target) == run
    return run / name if newest else checkpoint.path / name
