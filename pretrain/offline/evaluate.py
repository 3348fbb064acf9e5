"""Evaluates checkpoints without a training engine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.dataset import held_out
from data_pipeline.files import held, read_json
from data_pipeline.manifest import load_manifest
from data_pipeline.strict_json import to_json
from pretrain.checkpoint.reader import CHECKPOINTS, Checkpoint
from pretrain.checkpoint.restore import load_into_module
from pretrain.cli.console import Progress
from pretrain.config.compare import differences
from pretrain.config.recipe import Config, apply_overrides
from pretrain.distributed.grid import Grid, check_grid, process_count
from pretrain.engine.building import build_model
from pretrain.engine.precision import with_precision
from pretrain.errors import RunError, UsageError
from pretrain.offline.connected import open_grid
from pretrain.offline.moved import data_of
from pretrain.offline.truncate import CutCheckpoint, RankChoice, settings_of
from pretrain.runs.folder import CONFIG, EVALUATION, read_starts, write_text
from pretrain.tasks.score import score, summarize
from pretrain.tasks.task import Task
from pretrain.tasks.tasks import open_task
from pretrain.tasks.text import Text


def evaluate_checkpoint(
    source: Path,
    overrides: list[str],
    data: Path | None,
    split: str,
    documents: int | None,
    batch: int,
    stride: int,
    out: Path | None,
    choice: RankChoice | None = None,
    keep: bool = True,
    hold: Callable[[Grid], None] = lambda _: None,
) -> tuple[dict[str, Any], Path | None, bool]:
    """Score a checkpoint on all processes; a collective call.

    Args:
        overrides: to the run's recipe, for example another grid.
        choice: cut the attention products before scoring.
        keep: write the figures to a file.
        hold: called with the processes before anything is scored.

    Returns:
        (figures, where they were written, whether this process is the main one).
    """
    checkpoint = CutCheckpoint(source, choice) if choice else Checkpoint(source)
    config = apply_overrides(_one_process(checkpoint.config), overrides)
    if stride > config.model.context:
        raise UsageError(f"--stride: {stride} is more than the context, {config.model.context}")
    check_grid(config.grid, process_count())
    task = _task(checkpoint, config, data, stride)
    grid = open_grid(config)
    hold(grid)
    with contextlib.ExitStack() as ours:
        with grid.together(""):
            if grid.is_main and out:
                ours.enter_context(held(out))
            elif keep and grid.is_main and not os.access(_place(checkpoint)[0], os.W_OK):
                raise RunError(f"{_place(checkpoint)[0]}: cannot be written; give --out FILE")
        figures = _measure(checkpoint, config, task, grid, split, documents, batch, stride, choice)
        with grid.together(""):
            path = out
            if keep and grid.is_main:
                words = _words(checkpoint, config, task, documents)
                path = _write(checkpoint, figures, words, out)
    return figures, grid.broadcast(path), grid.is_main


def _measure(
    checkpoint: Checkpoint,
    config: Config,
    task: Task,
    grid: Grid,
    split: str,
    documents: int | None,
    batch: int,
    stride: int,
    choice: RankChoice | None,
) -> dict[str, Any]:
    """The figures and their settings, in the form of the file; a collective call."""
    config = with_precision(config, grid.device)
    module = build_model(config, grid)
    load_into_module(checkpoint, module, grid)
    if config.precision == "bf16":
        module.bfloat16()
    progress = Progress(1, "evaluate", grid.is_main)
    header = {
        "split": split,
        "sample": documents is not None,
        "step": checkpoint.step,
        "checkpoint": str(checkpoint.path),
        "data": task.source,
        "precision": config.precision,
        "context": config.model.context,
    }
    header |= settings_of(checkpoint, choice)

    def report(done: int, total: int) -> None:
        progress.update(done, total=total)

    if isinstance(task, Text):
        chosen = held_out(task.manifest, split, documents, config.model.vocabulary_size)
        eod = task.manifest.eod
        nats = score(module, grid, config.model, chosen, eod, batch, stride, report)
        body = {"stride": stride or config.model.context, **summarize(chosen, nats)}
    else:
        everything = documents is None
        if documents is not None:
            fewer = {"evaluation": config.evaluation.model_copy(update={"documents": documents})}
            config = config.model_copy(update=fewer)
        body = task.figures(module, grid, config, task.held_out(config, everything), report)
    progress.close()
    return {**header, **body}


def _write(
    checkpoint: Checkpoint, figures: dict[str, Any], words: list[str], out: Path | None
) -> Path:
    """Write the file without replacing one of other settings, and return its path."""
    if out:
        write_text(out, to_json(figures, indent=1))
        return out
    # If several end at once, each sees the files of the previous ones.
    with held(_place(checkpoint)[0] / EVALUATION, patience=60):
        path = result_path(checkpoint, figures, words)
        write_text(path, to_json(figures, indent=1))
    return path


def _task(checkpoint: Checkpoint, config: Config, data: Path | None, stride: int) -> Task:
    """The data on which the checkpoint is scored."""
    if config.task.kind != "text":
        if data or stride:
            raise UsageError(f"--data, --stride: only for text, not for {config.task.kind}")
        return open_task(config)
    task = Text(load_manifest(data or data_of(checkpoint, config)))
    if task.tokenizer != checkpoint.state["tokenizer"]:
        raise UsageError(
            f"{task.source}: was tokenised with another tokenizer than {checkpoint.path} was "
            f"trained with; tokenise it with {checkpoint.config.data.path}'s"
        )
    return task


def _one_process(config: Config) -> Config:
    """The recipe with the grid of one process; overrides can set another."""
    single = {"tensor_parallel": 1, "pipeline_parallel": 1, "sequence_parallel": False}
    grid = config.grid.model_copy(update=single)
    return config.model_copy(update={"grid": grid})


def _words(checkpoint: Checkpoint, config: Config, task: Task, documents: int | None) -> list[str]:
    """Settings that differ from the run's own data, model and task, for the file's name."""
    words = [] if documents is None else [f"documents={documents}"]
    if task.identity != checkpoint.state["data"]:
        name = re.sub(r"[^\w.+-]", "_", Path(task.source).name)
        words.append(f"data={name}-{task.identity[:4]}")
    for key, (_, value) in differences(checkpoint.config, config, ("model", "task")).items():
        words.append(f"{key.rpartition('.')[2]}={re.sub(r'[^a-zA-Z0-9_.+-]', '_', str(value))}")
    return words


_SETTINGS = ("split", "step", "stride", "context", "precision", "documents_sha256",
             "attention_rank", "attention_products")  # fmt: skip
"""Keys of an evaluation that describe its settings."""


def result_path(checkpoint: Checkpoint, figures: dict[str, Any], words: list[str]) -> Path:
    """The default file of some figures: one for each combination of settings.

    ``evaluation.json`` is for the run's own settings: its last step, all documents of the test
    split, in windows without overlap, in the precision of training.

    Nothing is added to a checkpoint's folder: the figures go into the run folder, or beside a
    checkpoint that is in no run folder.

    Args:
        figures: the contents of the file.
        words: further settings, for the name.
    """
    run = checkpoint.path.parent.parent
    folder, parts = _place(checkpoint)
    if figures["split"] != "test":
        parts.append(figures["split"])
    if checkpoint.step != checkpoint.config.train.steps:
        parts.append(f"step={checkpoint.step}")
    parts += words
    if figures.get("stride", figures["context"]) != figures["context"]:
        parts.append(f"stride={figures['stride']}")
    if figures["precision"] != (_trained_in(run) or figures["precision"]):
        parts.append(figures["precision"])
    if "attention_rank" in figures:
        share = figures["attention_rank"]
        share = share if isinstance(share, str) else f"{share:g}"
        parts.append(f"{'+'.join(figures['attention_products'])}-rank-{share}")
    path = folder / f"{'-'.join(['evaluation', *parts])}.json"
    if _is_of_others(path, figures):  # because the run's own may be for a sample of another split
        settings = to_json([figures.get(key) for key in _SETTINGS])
        digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
        path = path.with_name(f"{path.stem}-{figures['split']}-{digest}.json")
    return path


def _place(checkpoint: Checkpoint) -> tuple[Path, list[str]]:
    """The folder for a checkpoint's figures, and the part of their name for the checkpoint."""
    run = checkpoint.path.parent.parent
    if checkpoint.path.parent.name == CHECKPOINTS and (run / CONFIG).is_file():
        return run, []
    return checkpoint.path.parent, [checkpoint.path.name]


def _trained_in(run: Path) -> str | None:
    """The precision of the run's last start; None if it is not known."""
    try:
        return str(read_starts(run)[-1]["precision"])
    except (RunError, KeyError, IndexError):
        return None


def _is_of_others(path: Path, figures: dict[str, Any]) -> bool:
    """Whether a file has figures of other settings (missing settings count as the same)."""
    try:
        stored = read_json(path)
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True  # unknown contents: do not replace it
    same = isinstance(stored, dict) and all(
        stored.get(key, figures.get(key)) == figures.get(key) for key in _SETTINGS
    )
    return not same
