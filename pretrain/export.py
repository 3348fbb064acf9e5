"""`pretrain export`: a checkpoint as a Hugging Face model, layer by layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from data_pipeline.dataset import load_manifest
from models.export import class_of, config_json, has_free_heads, shards
from pretrain.checkpoint import Checkpoint
from pretrain.errors import RunError, UsageError
from pretrain.run import resolve_checkpoint, write_text
from pretrain.tracking import Progress
from pretrain.truncate import CutCheckpoint, RankChoice

_EOD = 0
"""Token that begins and ends documents, where the run's data is not at hand to say."""


def export_checkpoint(target: str, out: Path, choice: RankChoice | None) -> str:
    """Write ``config.json`` and sharded safetensors; one layer is in memory at a time.

    Args:
        choice: cut the attention products and write the smaller heads.

    Returns:
        One line on what was written.

    Raises:
        UsageError, ModelError: if no class computes the model, or none with smaller heads.
    """
    path = resolve_checkpoint(target)
    checkpoint = Checkpoint(path)
    model = checkpoint.config.model
    kind = class_of(model)
    if choice is not None:
        if not has_free_heads(model):
            raise UsageError(
                f"--attention-rank: the class {kind} ties a head's width to the model's or to its "
                "rotary positions, so smaller heads cannot be written; train with "
                "model.dialect=llama model.position=none, or score the cut model with `pretrain "
                "evaluate --attention-rank`"
            )
        checkpoint = CutCheckpoint(path, choice, smaller=True)
    head_size = getattr(checkpoint, "head_size", model.head_size)
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out}: not empty; choose another --out")
    aside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write(checkpoint, aside, head_size)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if out.exists():
        out.rmdir()
    aside.rename(out)
    width = "" if head_size == model.head_size else f", heads {model.head_size} -> {head_size} wide"
    return f"{out}: {kind}, step {checkpoint.step}{width}"


def _write(checkpoint: Checkpoint, folder: Path, head_size: int) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    model = checkpoint.config.model
    write_text(
        folder / "config.json",
        json.dumps(config_json(model, head_size, _end_of_document(checkpoint)), indent=1),
    )
    count = model.num_layers + 2
    progress = Progress(count, "export", True)
    where: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(shards(model, checkpoint.full, head_size)):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        try:
            save_file(tensors, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # how it reports a full disk
            raise RunError(f"{folder / name}: {error}") from None
        where |= dict.fromkeys(tensors, name)
        size += sum(one.nbytes for one in tensors.values())
        progress.update(number + 1)
    progress.close()
    index = {"metadata": {"total_size": size}, "weight_map": where}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1))


def _end_of_document(checkpoint: Checkpoint) -> int:
    try:
        return load_manifest(Path(checkpoint.config.data.path)).eod
    except (OSError, ValueError):
        return _EOD
