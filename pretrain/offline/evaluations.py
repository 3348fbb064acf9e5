"""`pretrain evaluate`: one model or several, with or without a cut, in one table."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files import held
from data_pipeline.records import Fields
from data_pipeline.strict_json import to_json
from pretrain.distributed.grid import Grid
from pretrain.errors import RunError, UsageError
from pretrain.offline.evaluate import evaluate_checkpoint
from pretrain.offline.pretrained import evaluate_pretrained
from pretrain.offline.targets import Found, find_models
from pretrain.offline.truncate import RankChoice, parse_ranks
from pretrain.runs.folder import write_text

Row = dict[str, Any]
"""The figures of one model, as in ``evaluation.json``, with its name in `model`."""


@dataclass(frozen=True)
class Asked:
    """The options of the command."""

    data: Sequence[Path] = ()
    split: str | None = None
    """None: test; all documents of files of text whose names mean no split."""
    documents: int | None = None
    batch: int = 16
    stride: int = 0
    out: Path | None = None
    attention_rank: str | None = None
    attention_product: str = "both"
    fields: Fields | None = None
    """Where records of text files have their text; None: where `data tokenize` expects it."""


def split_words(first: str, more: Sequence[str]) -> tuple[list[str], list[str]]:
    """Models and overrides from the words of the command line.

    A word after the first is a model unless it has the form key=value; a folder whose name has a
    ``=`` is a model too.
    """
    models, overrides = [first], list[str]()
    for word in more:
        is_model = not re.match(r"[\w.]+=", word) or Path(word).exists()
        (models if is_model else overrides).append(word)
    return models, overrides


def evaluate_models(
    targets: list[str], overrides: list[str], asked: Asked
) -> tuple[list[Row], Path | None, bool]:
    """Score every model that is named, once for each attention rank; a collective call.

    The figures of a single evaluation of a run are written into its folder, or to ``asked.out``;
    those of several only to ``asked.out``.

    Returns:
        (figures, the file that was written, whether this process is the main one).
    """
    choices = parse_ranks(asked.attention_rank, asked.attention_product)
    found = [model for target in targets for model in find_models(target)]
    if len(found) == len(choices) == 1 and not found[0].is_pretrained:
        figures, path, is_main = _run(found[0], overrides, asked, choices[0], asked.out, True)
        return [figures], path, is_main
    if asked.out and not os.access(asked.out.parent, os.W_OK):
        raise RunError(f"{asked.out.parent}: cannot be written; give another --out FILE")
    rows: list[Row] = []
    is_main = True
    with _Held(asked.out) as place:
        for model in found:
            new, is_main = _rows(model, overrides, asked, choices, place)
            rows += new
        if asked.out and is_main:
            body = rows[0] if len(rows) == 1 else {"evaluations": rows}
            write_text(asked.out, to_json(body, indent=1))
    return rows, asked.out, is_main


class _Held(contextlib.ExitStack):
    """Holds the name of ``--out`` from the first evaluation until the file is written."""

    def __init__(self, out: Path | None) -> None:
        super().__init__()
        self._out = out

    def take(self, grid: Grid) -> None:
        """Take the name on the main process; a collective call.

        Raises:
            RunError: on every process, if another command holds it.
        """
        with grid.together(""):
            if grid.is_main and self._out:
                self.enter_context(held(self._out))
        self._out = None  # it is taken once


def _rows(
    model: Found,
    overrides: list[str],
    asked: Asked,
    choices: list[RankChoice | None],
    place: _Held,
) -> tuple[list[Row], bool]:
    if model.is_pretrained:
        return evaluate_pretrained(
            model, overrides, asked.data, asked.split, asked.documents, asked.batch,
            asked.stride, choices, asked.fields, place.take,
        )  # fmt: skip
    rows, is_main = [], True
    for choice in choices:
        figures, _, is_main = _run(model, overrides, asked, choice, None, False, place.take)
        rows.append({"model": _name(model), **figures})
    return rows, is_main


def _run(
    model: Found,
    overrides: list[str],
    asked: Asked,
    choice: RankChoice | None,
    out: Path | None,
    keep: bool,
    hold: Callable[[Grid], None] = lambda _: None,
) -> tuple[Row, Path | None, bool]:
    if asked.fields is not None:
        raise UsageError(
            f"--text-field, --subset-field: {model.path} is a checkpoint, which is scored on "
            "tokens; `pretrain data tokenize` makes them of your files, or score the model that "
            "`pretrain export` writes"
        )
    if len(asked.data) > 1 or any(path.is_file() for path in asked.data):
        raise UsageError(
            f"--data: {model.path} is a checkpoint, which is scored on one tokenised folder; "
            "`pretrain export` makes a model that can be scored on files of text"
        )
    data = asked.data[0] if asked.data else None
    return evaluate_checkpoint(
        model.path, overrides, data, asked.split or "test", asked.documents, asked.batch,
        asked.stride, out, choice, keep, hold,
    )  # fmt: skip


def _name(model: Found) -> str:
    """RUN@STEP of a checkpoint in a run folder."""
    run = model.path.resolve().parent.parent
    return f"{run.name}@{int(model.name.split('-')[1])}" if "-" in model.name else model.name
