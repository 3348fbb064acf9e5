"""`pretrain export`: writes a checkpoint as a Hugging Face model, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.manifest import Manifest, load_manifest
from data_pipeline.sources import DataError
from data_pipeline.strict_json import to_json
from models.export import class_of, config_json, has_free_heads, shards
from models.generation import GENERATION_CONFIG, ends_with
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.tensor_file import write_tensors
from pretrain.cli.console import Progress
from pretrain.errors import UsageError
from pretrain.offline.model_card import name_of, write_card
from pretrain.offline.moved import data_of
from pretrain.offline.tokenizer_files import no_tokenizer, write_tokenizer
from pretrain.offline.truncate import CutCheckpoint, RankChoice
from pretrain.runs.aside import whole_folder
from pretrain.runs.folder import resolve_checkpoint, was_imported, write_text
from pretrain.training.state import GENERATION

_SHARD = 256 << 20
"""Bytes of a file of weights, at least, if there are several; a layer may be larger."""


def export_checkpoint(
    target: str, out: Path, choice: RankChoice | None, data: Path | None = None
) -> str:
    """Write ``config.json`` and safetensors; one file is in memory at a time.

    Args:
        choice: cut the attention products and write the smaller heads.
        data: the present place of the run's data; None: its place in the recipe.

    Returns:
        One line about what was written.

    Raises:
        UsageError, ModelError: if no class computes the model, or none with smaller heads, or
            the token that ends documents is not known.
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
    manifest, problem = _manifest(checkpoint, data)
    eod = _eod(checkpoint, manifest, problem)
    generation = checkpoint.state.get(GENERATION)
    with whole_folder(out, "export") as aside:
        _write_settings(checkpoint, aside, head_size, eod)
        _write_weights(checkpoint, aside, head_size)
        tokenizer = no_tokenizer(problem)
        if manifest:
            tokenizer = write_tokenizer(aside, manifest, model.context, _pad(generation))
        write_card(aside, checkpoint, kind, name_of(checkpoint), width, tokenizer)
    lines = [
        f"{out}: {kind}, step {checkpoint.step}{width}, {tokenizer.described}",
        *_differs(checkpoint, eod),
    ]
    return "; ".join(lines)


def _write_settings(checkpoint: Checkpoint, folder: Path, head_size: int, eod: int | None) -> None:
    generation = checkpoint.state.get(GENERATION)
    ids = generation["config"] if generation else None
    config = config_json(checkpoint.config.model, head_size, eod, ids)
    write_text(folder / "config.json", to_json(config, indent=1))
    if generation and generation["generation_config"] is not None:
        write_text(folder / GENERATION_CONFIG, to_json(generation["generation_config"], indent=1))


def _write_weights(checkpoint: Checkpoint, folder: Path, head_size: int) -> None:
    """Write one file, or several of at least `_SHARD` bytes with an index of their tensors."""
    model = checkpoint.config.model
    progress = Progress(model.num_layers + 2, "export", True)
    names: list[list[str]] = []
    size = 0
    for tensors in _joined(shards(model, checkpoint.full, head_size), progress):
        write_tensors(folder / f"part-{len(names)}", tensors, {"format": "pt"})
        names.append(list(tensors))
        size += _bytes(tensors)
        tensors.clear()  # before the next part is read
    progress.close()
    if len(names) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    file_of: dict[str, str] = {}
    for number, part in enumerate(names):
        name = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / name)
        file_of |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": size}, "weight_map": file_of}
    write_text(folder / "model.safetensors.index.json", to_json(index, indent=1))


def _joined(parts: Iterable[dict[str, Tensor]], progress: Progress) -> Iterator[dict[str, Tensor]]:
    """Parts of a model, small ones joined until they have `_SHARD` bytes."""
    group: dict[str, Tensor] = {}
    for number, tensors in enumerate(parts):
        group |= tensors
        tensors.clear()
        if _bytes(group) >= _SHARD:
            yield group
            group.clear()
        progress.update(number + 1)
    if group:
        yield group


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _manifest(checkpoint: Checkpoint, data: Path | None) -> tuple[Manifest | None, str]:
    """The manifest of the run's data if it is available, else the reason why it is not.

    Raises:
        UsageError, DataError: if ``data`` is not the run's.
    """
    if checkpoint.config.task.kind != "text":
        if data:
            raise UsageError(f"--data: only for text, not for {checkpoint.config.task.kind}")
        return None, "its task has no text"
    place = data or data_of(checkpoint, checkpoint.config)
    try:
        manifest = load_manifest(place)
    except (OSError, ValueError, DataError):
        if data:
            raise
        return None, f"{place} does not exist"
    of_run = (checkpoint.state["tokenizer"], checkpoint.state.get("eod", manifest.eod))
    if (manifest.tokenizer_sha256, manifest.eod) == of_run:
        return manifest, ""
    problem = f"{place} has another tokenizer or end-of-document token than the run's data had"
    if data:
        raise UsageError(f"--data: {problem}; give the run's own data")
    return None, problem


def _eod(checkpoint: Checkpoint, manifest: Manifest | None, problem: str) -> int | None:
    """The token that begins and ends documents; None if the data has no documents."""
    if checkpoint.config.task.kind != "text":
        return None
    token: int | None = checkpoint.state.get("eod", manifest.eod if manifest else None)
    if token is None:
        raise UsageError(
            f"{checkpoint.path}: an earlier version wrote it without the token that ends documents "
            f"(state.eod), and {problem}; give the run's data with --data"
        )
    return token


def _pad(generation: dict[str, Any] | None) -> int | None:
    """The padding token of an imported model."""
    token = generation["config"].get("pad_token_id") if generation else None
    return token if isinstance(token, int) and token >= 0 else None


def _differs(checkpoint: Checkpoint, eod: int | None) -> list[str]:
    """Notes about the ids of special tokens in ``config.json``."""
    generation = checkpoint.state.get(GENERATION)
    if generation is None:
        if was_imported(checkpoint.path.parent.parent) and checkpoint.config.task.kind == "text":
            return [
                "the ids of bos, eos and pad are those of the data: an earlier version imported "
                "the model and did not keep the model's own"
            ]
        return []
    if eod is None or ends_with(generation, eod):
        return []
    return [
        f"config.json has the imported model's eos_token_id; documents of the run end with {eod}, "
        "as tokenizer_config.json says"
    ]
