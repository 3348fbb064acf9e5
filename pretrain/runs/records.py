"""Schemas of the small files of a run folder, which may be damaged or from somebody else.

The values are those of the file; keys that a schema does not name are kept unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from data_pipeline.files import read_json
from pretrain.errors import RunError

Step = Annotated[int, Field(ge=0, lt=10**18, strict=True)]
Count = Annotated[int, Field(ge=0, lt=10**18)]
Figure = float | None
"""A number, or null, which means not finite."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class Score(_Record):
    """Held-out figures of a subset, or of all subsets."""

    documents: Count = 0
    samples: Count = 0
    tokens: Count = 0
    bytes: Count = 0
    loss: Figure = None
    perplexity: Figure = None
    bits_per_byte: Figure = None
    accuracy: Figure = None


class Evaluation(_Record):
    """``evaluation.json``."""

    split: str = ""
    step: Step | None = None
    overall: Score
    subsets: dict[str, Score] = {}
    pile_weighted: Score | None = None
    pile_subsets_present: list[str] = []
    documents_sha256: str = ""
    precision: str | None = None
    stride: Count | None = None
    context: Count | None = None


class Identity(_Record):
    """A checkpoint's record of its training data."""

    data: str
    tokenizer: str


class Sealed(_Record):
    """The part of a checkpoint's manifest that a report reads."""

    state: Identity


class Use(_Record):
    """How much of a subset a run sees."""

    corpus: float
    seen: float
    epochs: float


class Data(_Record):
    """What a run sees of its data."""

    unit: str
    subsets: dict[str, Use] | None = None


class Trunk(_Record):
    """The record of the checkpoint from which a run was forked."""

    run: str
    step: Step


class Start(_Record):
    """One start of a run: machine, versions and setting."""

    forked: Trunk | None = None
    precision: str = ""
    imported: str = ""
    versions: dict[str, str | None] = {}
    data: Data | None = None


class Line(_Record):
    """A line of ``metrics.jsonl``."""

    kind: str
    step: Step


class Update(Line):
    """A line about an update."""

    loss: Figure = None
    learning_rate: Figure = None
    grad_norm: Figure = None
    tokens_per_second: Figure = None
    weight_decay: dict[str, float] = {}


FIGURES = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
"""A line about an update: the figures that a report needs, and its weight_decay."""


class HeldOutLoss(Line):
    """A line about an evaluation."""

    loss: Figure = None


class Event(Line):
    """A line about an event."""

    message: str


LINES: dict[str, type[Line]] = {"train": Update, "evaluation": HeldOutLoss, "event": Event}


class SweepRecord(_Record):
    """``sweep.json``."""

    baseline: str | None = None
    runs: dict[str, Any]


def shown(row: Mapping[str, Any], name: str, form: str) -> str:
    """A figure of a record in a format; ``n/a`` if it is missing or not finite."""
    value = row.get(name)
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return format(value, form) if is_number else "n/a"


def read_record(path: Path, kind: Any) -> Any:
    """The value of a JSON file, unchanged.

    Args:
        kind: the type that it must have.

    Raises:
        FileNotFoundError: if there is none.
        RunError: naming the file, and the place in it that has another type.
    """
    try:
        content = read_json(path)
        check_record(content, kind)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"{path}: damaged ({reason}); restore it from a copy, or delete it"
        ) from None
    return content


def check_record(value: Any, kind: Any) -> None:
    """Check that a value has a type.

    Raises:
        ValueError: naming the place in it that has another type.
    """
    try:
        _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"{place}: {first['msg'].lower()}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
