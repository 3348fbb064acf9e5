"""Held-out figures of a model in Hugging Face's format, with its own tokenizer.

The classes that `pretrain import` knows are computed by our own model, tensor by tensor from the
files. Other causal classes of known families are computed by `transformers`, if it is installed. No
code of the model's authors runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.dataset import HeldOut, held_out
from data_pipeline.manifest import load_manifest
from data_pipeline.own_tokenizer import OwnTokenizer, hashes_of
from data_pipeline.raw_documents import encode_documents, is_tokenised, read_documents
from data_pipeline.records import Fields
from models.families import known_families
from models.foreign_config import KINDS
from models.importing import ForeignModel
from models.quantised import refuse_quantised
from models.roles import ModelError, ParameterInfo, declared_parameters, info_of
from models.tensor_files import TensorFiles, read_json
from pretrain.checkpoint.manifest import MASTER
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.restore import load_into_module
from pretrain.cli.console import Progress, warn
from pretrain.config.recipe import Config, apply_overrides, parse_config
from pretrain.distributed.grid import Grid
from pretrain.engine.building import build_model
from pretrain.engine.precision import with_precision
from pretrain.errors import UsageError
from pretrain.offline.connected import open_grid
from pretrain.offline.import_model import fitted
from pretrain.offline.targets import Found
from pretrain.offline.truncate import CutCheckpoint, RankChoice, settings_of
from pretrain.tasks.score import Shape, score, summarize

_LOGITS = 1 << 28
"""Elements of logits in one forward pass of a model of `transformers`."""
_NOT_CAUSAL = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "vit", "deit", "dinov2",
               "beit", "clip")  # fmt: skip
_PART = ("grid.", "precision=", "speed.", "model.context=")
"""Keys that an override may set: a model from elsewhere has no recipe."""


class ForeignCheckpoint(Checkpoint):
    """The files of a Hugging Face model, read like a checkpoint of ours."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: the model's folder.

        Raises:
            ModelError: naming what our models cannot compute.
        """
        self.path, self.step, self.state = path, 0, {}
        self.theirs = ForeignModel(path, warn)
        values = {"model": self.theirs.values, "precision": "fp32"}
        self.config: Config = parse_config(values, f"{path}/config.json")

    def full(self, name: str, key: str = MASTER) -> Tensor:
        """As `Checkpoint.full`."""
        return self.theirs.tensor(self.config.model, name)

    def local(self, info: ParameterInfo, key: str, rank: int, size: int) -> Tensor:
        """As `Checkpoint.local`."""
        values = fitted(self.full(info.name, key), info)
        if info.partition_dim is not None and size > 1:
            values = values.chunk(size, info.partition_dim)[rank]
        return values.reshape(-1)


class CutForeign(CutCheckpoint, ForeignCheckpoint):
    """The same with cut attention products."""


@dataclass(frozen=True)
class Opened:
    """A model that can be scored."""

    module: nn.Module
    shape: Shape
    precision: str
    vocabulary_size: int
    settings: dict[str, Any]
    """Of the cut, for the figures."""


@dataclass(frozen=True)
class _LibraryShape:
    context: int
    hidden_size: int


class _Library(nn.Module):
    """A model of `transformers` that is called as ours."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
        """``finish`` of the logits ``[sequence, batch, vocabulary]``."""
        return finish(self.model(input_ids=tokens, use_cache=False).logits.transpose(0, 1))


def evaluate_pretrained(
    found: Found,
    overrides: list[str],
    data: Sequence[Path],
    split: str | None,
    documents: int | None,
    batch: int,
    stride: int,
    choices: Sequence[RankChoice | None],
    fields: Fields | None = None,
    hold: Callable[[Grid], None] = lambda _: None,
) -> tuple[list[dict[str, Any]], bool]:
    """Score a model on all processes, once for each choice; a collective call.

    Args:
        fields: where records of text files have their text; None: where `data tokenize` expects it.
        hold: called with the processes before anything is scored.

    Returns:
        (figures for each choice, whether this process is the main one).

    Raises:
        UsageError, DataError, ModelError: one line.
    """
    if not data:
        raise UsageError(
            f"{found.path}: give --data: files of text (.jsonl, .jsonl.zst, .parquet, .txt), a "
            "folder of them, or a tokenised folder"
        )
    for word in overrides:
        if not word.startswith(_PART):
            raise UsageError(
                f"{word}: {found.path} has no recipe; keys that apply are precision, grid.*, "
                "speed.* and model.context"
            )
    values = read_json(found.path / "config.json")
    chosen, prefix, name = _documents(found.path, values, data, split, documents, fields)
    largest = max((int(one.tokens.max(initial=0)) for one in chosen), default=0)
    rows = []
    is_main = True
    for choice in choices:
        opened, grid = _open(found.path, values, overrides, choice)
        is_main = grid.is_main
        hold(grid)
        if largest >= opened.vocabulary_size:
            raise UsageError(
                f"{found.path}: its tokenizer makes token {largest}, but the model has only "
                f"{opened.vocabulary_size}; this is not the model's tokenizer"
            )
        context = opened.shape.context
        if stride > context:
            raise UsageError(f"--stride: {stride} is more than the context, {context}")
        nats = _score(found, opened, grid, chosen, prefix, batch, stride)
        rows.append({
            "model": found.name, "folder": str(found.path), "split": name,
            "sample": documents is not None, "data": ", ".join(map(str, data)),
            "precision": opened.precision, "context": context, **opened.settings,
            "stride": stride or context, **summarize(chosen, nats),
        })  # fmt: skip
    return rows, is_main


def _score(
    found: Found,
    opened: Opened,
    grid: Grid,
    chosen: list[HeldOut],
    prefix: int,
    batch: int,
    stride: int,
) -> np.ndarray:
    if isinstance(opened.module, _Library):  # all logits of a batch are in memory
        batch = max(1, min(batch, _LOGITS // (opened.shape.context * opened.vocabulary_size)))
    progress = Progress(1, f"evaluate {found.name}", grid.is_main)

    def report(done: int, total: int) -> None:
        progress.update(done, total=total)

    nats = score(opened.module, grid, opened.shape, chosen, prefix, batch, stride, report)
    progress.close()
    return nats


def _documents(
    folder: Path,
    config: dict[str, Any],
    data: Sequence[Path],
    split: str | None,
    limit: int | None,
    fields: Fields | None,
) -> tuple[list[HeldOut], int, str]:
    """Documents in the model's own tokens, the token before each, and the split's name."""
    if is_tokenised(data):
        if fields is not None:
            raise UsageError(
                f"--text-field, --subset-field: {data[0]} is tokenised, so it has no records any "
                "more; leave them out"
            )
        manifest = load_manifest(data[0])
        if manifest.tokenizer_sha256 in hashes_of(folder):
            name = split or "test"
            return held_out(manifest, name, limit), manifest.eod, name
    tokenizer = OwnTokenizer(folder, config)
    raw, name = read_documents(data, split, limit, warn, fields)
    return encode_documents(raw, tokenizer.encode), tokenizer.prefix, name


def _open(
    folder: Path, values: dict[str, Any], overrides: list[str], choice: RankChoice | None
) -> tuple[Opened, Grid]:
    kind = values.get("model_type")
    if kind in KINDS:
        return _open_ours(folder, overrides, choice)
    if kind not in known_families() or kind in _NOT_CAUSAL:
        raise ModelError(
            f"{folder}: model_type {kind!r} is not a causal model of a known family; known: "
            f"{', '.join(sorted(set(known_families()) - set(_NOT_CAUSAL)))}"
        )
    if choice is not None:
        raise UsageError(
            f"--attention-rank: a {kind} is computed by transformers, whose attention cannot be "
            f"cut here; possible for {', '.join(KINDS)}"
        )
    return _open_library(folder, values, overrides)


def _open_ours(
    folder: Path, overrides: list[str], choice: RankChoice | None
) -> tuple[Opened, Grid]:
    checkpoint = CutForeign(folder, choice) if choice else ForeignCheckpoint(folder)
    config = apply_overrides(checkpoint.config, overrides)
    if config.grid.pipeline_parallel > 1:
        raise UsageError("grid.pipeline_parallel: not for a model in Hugging Face's format")
    grid = open_grid(config)
    config = with_precision(config, grid.device)
    module = build_model(config, grid)
    infos = [info_of(parameter) for parameter in declared_parameters(module)]
    checkpoint.theirs.check(config.model, infos, allow_unused=True)
    load_into_module(checkpoint, module, grid)
    checkpoint.theirs.files.close()
    if config.precision == "bf16":
        module.bfloat16()
    settings = settings_of(checkpoint, choice)
    opened = Opened(module, config.model, config.precision, config.model.vocabulary_size, settings)
    return opened, grid


def _open_library(
    folder: Path, values: dict[str, Any], overrides: list[str]
) -> tuple[Opened, Grid]:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UsageError(
            f"{folder}: a {values['model_type']} is computed by transformers, which is not "
            "installed: pip install transformers"
        ) from None
    refuse_quantised(folder, values, TensorFiles(folder, warn))
    config = apply_overrides(parse_config({"precision": "fp32"}, str(folder)), overrides)
    if config.grid.tensor_parallel > 1 or config.grid.pipeline_parallel > 1:
        raise UsageError(f"grid: a {values['model_type']} is computed whole in each process")
    grid = open_grid(config)
    config = with_precision(config, grid.device)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, local_files_only=True
    )
    about = model.config.get_text_config()
    context = next(
        (int(word.split("=", 1)[1]) for word in overrides if word.startswith("model.context=")),
        int(getattr(about, "max_position_embeddings", 2048)),
    )
    shape = _LibraryShape(context, int(about.hidden_size))
    module = _Library(model).to(grid.device).eval()
    return Opened(module, shape, config.precision, int(about.vocab_size), {}), grid
