"""The tasks that a recipe can name, one module each."""

from __future__ import annotations

from collections.abc import Callable

from pretrain.config.recipe import Config
from pretrain.tasks.images import ImageClasses
from pretrain.tasks.own import OwnTask
from pretrain.tasks.recall import Recall
from pretrain.tasks.task import Task
from pretrain.tasks.text import Text

TASKS: dict[str, Callable[[Config], Task]] = {
    "text": Text.open, "recall": Recall, "images": ImageClasses, "own": OwnTask
}  # fmt: skip
"""By ``task.kind``."""


def open_task(config: Config) -> Task:
    """The task of a recipe, its data opened.

    Raises:
        UsageError, DataError: if the data is missing.
    """
    return TASKS[config.task.kind](config)
