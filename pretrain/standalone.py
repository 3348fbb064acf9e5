"""Evaluation of checkpoints, without a training engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.dataset import held_out, load_manifest
from pretrain.checkpoint import Checkpoint, load_into_module
from pretrain.config import Config, apply_overrides
from pretrain.deepspeed_adapter import prepare_deepspeed, resolve_precision
from pretrain.engine import build_model
from pretrain.errors import UsageError
from pretrain.evaluate import score, summarize
from pretrain.grid import build_grid, check_grid, connect, process_count
from pretrain.run import resolve_checkpoint, write_text
from pretrain.tracking import Progress


def evaluate_checkpoint(
    target: str,
    overrides: list[str],
    data: Path | None,
    split: str,
    documents: int | None,
    batch: int,
    stride: int,
    out: Path | None,
) -> tuple[dict[str, Any], Path, bool]:
    """Score a checkpoint on the processes at hand; a collective call.

    Args:
        overrides: of the run's recipe, for example another grid.

    Returns:
        (figures, where they were written, whether this process is the main one).
    """
    checkpoint = Checkpoint(resolve_checkpoint(target))
    config = apply_overrides(_one_process(checkpoint.config), overrides)
    if stride > config.model.context:
        raise UsageError(f"--stride: {stride} is more than the context, {config.model.context}")
    check_grid(config.grid, process_count())
    manifest = load_manifest(data or Path(config.data.path))
    if manifest.tokenizer_sha256 != checkpoint.state["tokenizer"]:
        raise UsageError(
            f"{manifest.path}: was tokenised with another tokenizer than {checkpoint.path} was "
            f"trained with; tokenise it with {checkpoint.config.data.path}'s"
        )
    prepare_deepspeed()
    grid = build_grid(config.grid, connect())
    module = build_model(config, grid)
    load_into_module(checkpoint, module, grid)
    if resolve_precision(config.precision, grid.device, config.grid.zero_stage) == "bf16":
        module.bfloat16()
    chosen = held_out(manifest, split, documents)
    progress = Progress(1, "evaluate", grid.is_main)

    nats = score(
        module,
        grid,
        config.model,
        chosen,
        manifest.eod,
        batch,
        stride,
        lambda done, total: progress.update(done, total=total),
    )
    progress.close()
    figures = {
        "split": split,
        "step": checkpoint.step,
        "checkpoint": str(checkpoint.path),
        "data": str(manifest.path),
        "stride": stride or config.model.context,
        **summarize(chosen, nats),
    }
    path = out or _result_path(target, checkpoint, split)
    if grid.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(figures, indent=1))
    return figures, path, grid.is_main


def _one_process(config: Config) -> Config:
    """The recipe with the grid that one process can hold; overrides may set another."""
    single = {"tensor_parallel": 1, "pipeline_parallel": 1, "sequence_parallel": False}
    grid = config.grid.model_copy(update=single)
    return config.model_copy(update={"grid": grid})


def _result_path(target: str, checkpoint: Checkpoint, split: str) -> Path:
    name = "evaluation.json" if split == "test" else f"evaluation-{split}.json"
    run = checkpoint.path.parent.parent
    newest = Path(target) == run
    return run / name if newest else checkpoint.path / name
