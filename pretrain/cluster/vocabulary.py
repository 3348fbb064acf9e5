"""The vocabulary of a recipe whose data may not be there yet: planning needs a size."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from data_pipeline.manifest import MANIFEST
from models.config import GPTConfig
from pretrain.config.recipe import Config
from pretrain.errors import UsageError
from pretrain.tasks.task import Samples, Task, Uses
from pretrain.tasks.tasks import open_task

ASSUMED = 50_304
"""The tokens of GPT-NeoX's tokenizer, which Pythia uses, padded to a multiple of 128."""
CLASSES = 1_000
"""The classes of ImageNet."""


class NoData:
    """Stands for the data of a recipe whose folder is not there; it can only be planned with."""

    source = identity = tokenizer = ""
    eod: int | None = None

    def uses(self, config: Config) -> Uses:
        """Nothing is known of the data."""
        return {}

    def complete(self, model: GPTConfig) -> GPTConfig:
        """The model, with the assumed number of tokens or classes if it has none."""
        size = model.vocabulary_size or (CLASSES if model.image_size else ASSUMED)
        return model.model_copy(update={"vocabulary_size": size})

    def training(self, config: Config) -> Samples:
        """There are no samples."""
        raise UsageError("there is no data to train on")

    def held_out(self, config: Config, everything: bool = False) -> NoReturn:
        """There is nothing to score."""
        raise UsageError("there is no data to score")

    def split(self, config: Config, everything: bool = False) -> str:
        """The recipe's split, or all of ``test``, which data usually has."""
        return "test" if everything else config.evaluation.split

    def figures(self, *arguments: Any) -> NoReturn:
        """There is nothing to score."""
        raise UsageError("there is no data to score")


def task_to_plan(config: Config) -> tuple[Task, str]:
    """The task of a recipe, and a remark if its data is not there.

    Raises:
        UsageError, DataError: if the data is there and does not fit.
    """
    task = config.task
    if task.kind == "text":
        key, path, assumed = "data.path", config.data.path, f"{ASSUMED:,} tokens (GPT-NeoX's)"
        there = bool(path) and _exists(Path(path) / MANIFEST)
    elif task.kind == "images" and task.source == "folder":
        key, path, assumed = "task.path", task.path, f"{CLASSES:,} classes (ImageNet's)"
        there = bool(path) and _exists(Path(path))
    else:
        return open_task(config), ""
    if there:
        return open_task(config), ""
    remark = f"{key}: {path or 'not set'}: there is no data"
    if not config.model.vocabulary_size:
        remark += f", so {assumed} are assumed; model.vocabulary_size sets another number"
    return NoData(), remark


def _exists(path: Path) -> bool:
    """Whether a path leads somewhere; not if it is too long, or in a closed folder."""
    try:
        return path.exists()
    except OSError:
        return False


def with_vocabulary(config: Config) -> tuple[Config, str]:
    """A recipe with the size of its vocabulary, and a remark if that is an assumption.

    Raises:
        UsageError, DataError: if the data is there and does not fit.
    """
    if config.model.vocabulary_size:
        return config, ""
    task, remark = task_to_plan(config)
    return config.model_copy(update={"model": task.complete(config.model)}), remark
