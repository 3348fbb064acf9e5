"""`pretrain export`: a checkpoint as a Hugging Face model, layer by layer."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.manifest import Manifest, load_manifest
from data_pipeline.sources import DataError
from data_pipeline.strict_json import to_json
from models.export import class_of, config_json, has_free_heads, shards
from pretrain.aside import whole_folder
from pretrain.checkpoint import Checkpoint
from pretrain.errors import UsageError
from pretrain.model_card import name_of, write_card, write_tokenizer
from pretrain.run import resolve_checkpoint, write_text
from pretrain.tensor_file import write_tensors
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
    width = "" if head_size == model.head_size else f", heads {model.head_size} -> {head_size} wide"
    manifest = _manifest(checkpoint)
    with whole_folder(out, "export") as aside:
        _write(checkpoint, aside, head_size, manifest.eod if manifest else _EOD)
        write_card(aside, checkpoint, kind, name_of(checkpoint), width)
        tokenizer = (
            write_tokenizer(aside, manifest, model.context)
            if manifest
            else f"no tokenizer ({checkpoint.config.data.path} is not here)"
        )
    return f"{out}: {kind}, step {checkpoint.step}{width}, {tokenizer}"


def _write(checkpoint: Checkpoint, folder: Path, head_size: int, eod: int) -> None:
    model = checkpoint.config.model
    write_text(
        folder / "config.json",
        to_json(config_json(model, head_size, eod), indent=1),
    )
    count = model.num_layers + 2
    progress = Progress(count, "export", True)
    where: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(shards(model, checkpoint.full, head_size)):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        write_tensors(folder / name, tensors, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        size += sum(one.nbytes for one in tensors.values())
        tensors.clear()  # before the next part is read
        progress.update(number + 1)
    progress.close()
    index = {"metadata": {"total_size": size}, "weight_map": where}
    write_text(folder / "model.safetensors.index.json", to_json(index, indent=1))


def _manifest(checkpoint: Checkpoint) -> Manifest | None:
    """Of the run's data, if it is at hand."""
    try:
        return load_manifest(Path(checkpoint.config.data.path))
    except (OSError, ValueError, DataError):
        return None
