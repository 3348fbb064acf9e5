"""`pretrain import`: makes a run whose step 0 is a model that was trained elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.files import read_tokenizer, write_synced
from models.hub import fetch, is_hub_name
from models.huggingface import is_pretrained
from models.importing import ForeignModel
from models.roles import ParameterInfo, Role
from pretrain.checkpoint.manifest import MANIFEST, MASTER, describe, written_manifest
from pretrain.checkpoint.reader import CHECKPOINTS, checkpoint_name
from pretrain.checkpoint.tensor_file import write_tensors
from pretrain.cli.console import Progress, warn
from pretrain.config.extension import folder_of
from pretrain.config.mapping import apply_value_overrides, read_mapping
from pretrain.config.recipe import Config, parse_config
from pretrain.decay.control import DecayControl
from pretrain.decay.plan import DecayPlan
from pretrain.errors import UsageError
from pretrain.runs.aside import whole_folder
from pretrain.runs.folder import CONFIG, create_run
from pretrain.tasks.text import Text
from pretrain.training.setup import Setup, prepare
from pretrain.training.state import GENERATION

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def import_model(
    source: str, recipe: Path, overrides: list[str], run: Path, allow_unused: bool = False
) -> Setup:
    """Make a run folder whose first checkpoint, at step 0, holds a pretrained model.

    The recipe's ``model`` section is replaced by the values of ``config.json`` (an override may
    make ``model.context`` shorter); everything else is the recipe's.

    Args:
        source: folder of a Hugging Face model, or a name on the Hub.
        allow_unused: leave out tensors that do not belong to the language model.

    Raises:
        UsageError, ModelError, RunError: one line.
    """
    folder = _folder(source)
    if run.exists() and any(run.iterdir()):
        raise UsageError(f"{run}: not empty; choose another --out")
    theirs = ForeignModel(folder, warn)
    values = read_mapping(recipe, "recipe", "sections, such as `model:`")
    values["model"] = theirs.values
    apply_value_overrides(values, overrides)
    setup = prepare(parse_config(values, str(recipe), folder_of(recipe)), 1)
    if not isinstance(setup.task, Text):
        raise UsageError(f"{recipe}: task.kind is not text")
    infos = [info for group in setup.plan.groups for info in group.parameters]
    theirs.check(setup.config.model, infos, allow_unused)
    _check_tokenizer(folder, setup.task)
    with whole_folder(run, "import") as aside:
        create_run(aside, setup.config, {"grid": "none", "imported": source})
        _write(setup, theirs, aside / CHECKPOINTS / checkpoint_name(0))
    return setup


def _folder(source: str) -> Path:
    path = Path(source)
    if is_pretrained(path):
        return path
    if path.exists() or source.startswith(".") or not is_hub_name(source):
        raise UsageError(f"{source}: no config.json with weights beside it")
    name, _, revision = source.partition("@")
    return fetch(name, revision)


def _check_tokenizer(folder: Path, task: Text) -> None:
    """Warn if the data seems to be made with another tokenizer."""
    tokenizers = [folder / name for name in _TOKENIZERS if (folder / name).is_file()]
    hashes = [hashlib.sha256(read_tokenizer(file)).hexdigest() for file in tokenizers]
    if tokenizers and task.tokenizer not in hashes:
        warn(
            f"{task.source} was tokenised with {task.manifest.tokenizer}, which differs from "
            f"{tokenizers[0].name} of {folder}: make sure that their tokens mean the same"
        )


def write_masters(
    folder: Path,
    config: Config,
    plan: DecayPlan,
    state: dict[str, Any],
    step: int,
    read: Callable[[ParameterInfo], Tensor],
) -> dict[str, Any]:
    """Write a checkpoint with only weights: a file per part of the model, one part in memory.

    Args:
        folder: of the checkpoint; this function makes it.
        state: further state to save (see `describe`).
        read: returns a parameter's whole tensor, float32.

    Returns:
        The files' entries.
    """
    parts: dict[str, list[ParameterInfo]] = {}
    for group in plan.groups:
        for info in group.parameters:
            part = "ends" if info.layer is None else f"layer-{info.layer:05d}"
            parts.setdefault(part, []).append(info)
    folder.mkdir(parents=True)
    progress = Progress(len(parts), "import", True)
    entries: dict[str, Any] = {}
    for number, (part, infos) in enumerate(sorted(parts.items())):
        tensors = {f"{info.name}/{MASTER}": read(info).reshape(-1) for info in infos}
        size, digest = write_tensors(folder / f"{part}.safetensors", tensors)
        index = {info.name: [0, info.numel, [MASTER]] for info in infos}
        entry = {"size": size, "sha256": digest, "tensor_rank": 0, "fragments": index}
        entries[f"{part}.safetensors"] = entry
        progress.update(number + 1)
    progress.close()
    state = {"initial_weights": hashlib.sha256(json.dumps(entries).encode()).hexdigest(), **state}
    grid = {"tensor": 1, "pipeline": 1, "data": 1, "zero_stage": 0}
    described = describe(config, plan, step, state, grid)
    write_synced(folder / MANIFEST, written_manifest({**described, "files": entries}))
    return entries


def _write(setup: Setup, theirs: ForeignModel, folder: Path) -> None:
    state = {
        "samples": 0,
        "tokenizer": setup.task.tokenizer,
        "eod": setup.task.eod,
        GENERATION: theirs.generation,
        "data": setup.task.identity,
        "decay": DecayControl(setup.config, setup.plan).state(),
        "jumped": [],
    }

    model = setup.config.model

    def read(info: ParameterInfo) -> Tensor:
        return fitted(theirs.tensor(model, info.name), info)

    write_masters(folder, setup.config, setup.plan, state, 0, read)
    theirs.files.close()


def fitted(values: Tensor, info: ParameterInfo) -> Tensor:
    """A tensor in the shape of ours: with the zero rows that pad the vocabulary, and without
    positions beyond the context."""
    if info.role in (Role.EMBEDDING, Role.HEAD):
        values = torch.nn.functional.pad(values, (0, 0, 0, info.shape[0] - values.shape[0]))
    if info.role is Role.POSITION:
        values = values[: info.shape[0]]
    return values.contiguous()


def next_words(run: Path) -> str:
    """The command that continues the run."""
    return f"pretrain train {run / CONFIG} --out {run}"
