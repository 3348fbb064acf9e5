"""Rank statistics of a run, a checkpoint, or any pretrained model, in one table.

The columns are those of a run's own ``ranks.parquet``, so that a run can be compared with a model
from elsewhere, or with the checkpoints of its training.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.files import held
from data_pipeline.strict_json import to_json
from models.factors import AttentionShape, Factors
from models.families import EXAMPLE, Family, family_of
from models.hub import by_number
from models.huggingface import is_pretrained, open_pretrained
from pretrain.checkpoint.reader import Checkpoint
from pretrain.cli.console import Progress, show_table, warn
from pretrain.config.mapping import read_mapping
from pretrain.config.run import RanksConfig
from pretrain.decay.sites import DecayRecord, DecayRecords
from pretrain.errors import UsageError
from pretrain.offline.scatter import Scatter
from pretrain.offline.targets import find_models
from pretrain.ranks.probe import Row, layer_rows
from pretrain.ranks.probe import lawful as lawful_rows
from pretrain.ranks.table import read_ranks, write_rows
from pretrain.runs.folder import CONFIG, recipe_of
from pretrain.runs.loop import LOOP, recorded_keys

_CHUNK = 1 << 22
"""Number of elements of a matrix that are converted to float64 at once."""


@dataclass(frozen=True)
class Stack:
    """One stack of attention layers of a stored model."""

    name: str
    """Empty, or the name of one of several stacks in a model."""
    shape: AttentionShape
    layer: Callable[[int], Factors]
    shape_of: Callable[[int], AttentionShape]
    """Returns the factors of one layer."""
    books: DecayRecords | None


@dataclass(frozen=True)
class Weights:
    """A model at one moment of its training."""

    name: str
    step: int
    tokens: int | None
    open: Callable[[], list[Stack]]
    ranks: RanksConfig | None = None
    """The definition of rank of a run; None for other models."""


def find_weights(
    target: str, family: Path | None = None, batch_tokens: int = 0, allow_unused: bool = False
) -> list[Weights]:
    """The models that ``target`` names, in order of steps.

    Args:
        target: as in `find_models`.
        family: describes a model's files if its family is not known.
        batch_tokens: tokens per step of pretrained models, for the table; 0: not known.
        allow_unused: continue if a pretrained model has attention that is not measured.

    Raises:
        UsageError, ModelError: one line that names what was not found.
    """
    described = None
    if family:
        values = read_mapping(family, "family", f"keys, such as: {EXAMPLE}")
        described = family_of(values, str(family))

    def pretrained(folder: Path, name: str) -> Weights:
        return _pretrained(folder, name, described, batch_tokens, allow_unused)

    base, _, version = target.rpartition("@") if "@" in target else (target, "", "")
    if (Path(base) / LOOP).is_file():
        return _saved_by_loop(Path(base), version, pretrained)
    return [
        pretrained(found.path, found.name) if found.is_pretrained else _checkpoint(found.path)
        for found in find_models(target)
    ]


def _saved_by_loop(
    run: Path, version: str, pretrained: Callable[[Path, str], Weights]
) -> list[Weights]:
    """The models in the run folder of another loop: its last, those of some steps, or none."""
    recipe = recipe_of(run)
    folders = sorted(
        (folder for folder in run.iterdir() if folder.is_dir() and is_pretrained(folder)),
        key=lambda path: by_number(path.name),
    )
    found = [pretrained(folder, folder.name) for folder in folders]
    if is_pretrained(run) and not version:
        known = recorded_keys(run, run / CONFIG) or ()
        step = recipe.train.steps if "train.steps" in known else 0
        found = [replace(pretrained(run, run.name), step=step)]
    elif version.isdigit():
        found = [weights for weights in found if weights.step == int(version)]
        if not found:
            raise UsageError(f"{run}@{version}: no such step; a loop saved {len(folders)} models")
    elif version != "*":
        found = found[-1:]
    return [replace(weights, ranks=recipe.ranks) for weights in found]


def _pretrained(
    folder: Path, name: str, family: Family | None, batch_tokens: int, allow_unused: bool
) -> Weights:
    match = re.search(r"(?:step|checkpoint)[-_]?(\d+)", name)
    step = int(match.group(1)) if match else 0

    def stacks() -> list[Stack]:
        return [
            Stack(tower.name, tower.shape, tower.layer, tower.shape_of, None)
            for tower in open_pretrained(folder, family, warn, allow_unused)
        ]

    return Weights(name, step, step * batch_tokens if batch_tokens else None, stacks)


def _checkpoint(path: Path) -> Weights:
    checkpoint = Checkpoint(path)
    model = checkpoint.config.model
    batch = checkpoint.config.train.global_batch * model.context

    def stacks() -> list[Stack]:
        saved = checkpoint.state["decay"]["books"]
        books = {name: DecayRecord(*figures) for name, figures in saved.items()}
        shape = model.attention_shape
        return [Stack("", shape, checkpoint.attention, lambda layer: shape, books)]

    ranks = checkpoint.config.ranks
    return Weights(path.name, checkpoint.step, checkpoint.step * batch, stacks, ranks)


def measure_weights(models: list[Weights], config: RanksConfig) -> tuple[list[Row], Scatter]:
    """Statistics of every head, one layer in memory at a time, with progress.

    Returns:
        Rows in the columns of ``ranks.parquet`` (and ``tower`` for a model that has several,
        ``revision`` for several models), and the points of Figure 4 for the last of the weights.
    """
    rows: list[Row] = []
    scatter = Scatter()
    for weights in models:
        scatter = Scatter()
        of_model = {"revision": weights.name} if len(models) > 1 else {}
        stacks = weights.open()
        total = sum(stack.shape.num_layers for stack in stacks)
        progress = Progress(total, f"ranks of {weights.name}", True)
        done = 0
        for stack in stacks:
            label = {**of_model, "tower": stack.name} if stack.name else of_model
            for layer in range(stack.shape.num_layers):
                factors = stack.layer(layer)
                measured = measure_layer(factors, layer, stack, config)
                for row in measured:
                    row.update(step=weights.step, tokens=weights.tokens, **label)
                rows += measured
                scatter.add(stack.name, layer, factors, measured)
                done += 1
                progress.update(done)
        progress.close()
    return rows, scatter


def measure_layer(factors: Factors, layer: int, stack: Stack, config: RanksConfig) -> list[Row]:
    """The rows of one layer, some heads at a time."""
    shape = stack.shape_of(layer)
    unit_size = shape.group * shape.head_size * shape.hidden_size
    at_once = max(1, _CHUNK // unit_size)
    rows: list[Row] = []
    for start in range(0, shape.key_value_heads, at_once):
        stop = min(start + at_once, shape.key_value_heads)
        units = list(range(start, stop))
        rows += layer_rows(factors.units(start, stop), units, layer, shape, stack.books, config)
    return rows


_COLUMNS = {
    "pseudo_rank_qk": "rank W_QK",
    "balance_qk": "balance",
    "discrepancy_qk": "discrepancy / bound",
    "pseudo_rank_vp": "rank W_VP",
    "balance_vp": "balance",
    "discrepancy_vp": "discrepancy / bound",
}


def means(rows: list[Row]) -> dict[str, float]:
    """Means over heads: pseudo-rank, balance, and discrepancy as a share of the bound.

    If heads share keys, balance and discrepancy are those of the groups, to which the balance law
    applies; they are NaN if queries are normalised, because sizes then have no meaning.
    """
    averages = {}
    for product in ("qk", "vp"):
        chosen = [row for row in rows if row["product"] == product]
        heads = [row for row in chosen if row["level"] == "head"]
        lawful = lawful_rows(chosen)
        averages[f"pseudo_rank_{product}"] = _mean([row["pseudo_rank"] for row in heads])
        averages[f"balance_{product}"] = _mean([row["balance"] for row in lawful])
        averages[f"discrepancy_{product}"] = _mean(
            [row["discrepancy"] / (row["frobenius_bound"] or 1.0) for row in lawful]
        )
    return averages


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def print_ranks(rows: list[Row], as_json: bool) -> None:
    """Print means per layer, or per step for several checkpoints, to standard output."""
    step = rows[0]["step"]
    series = "revision" in rows[0]
    parts: dict[str, list[Row]] = {}
    for row in rows:
        name = row["revision"] if series else f"{row.get('tower', '')} {row['layer']}".strip()
        parts.setdefault(name, []).append(row)
    lines = {name: means(part) for name, part in parts.items()}
    if as_json:
        plain = {name: _finite(line) for name, line in lines.items()}
        body: dict[str, Any] = {"revisions": plain}
        if not series:
            body = {"step": step, "layers": plain, "all": _finite(means(rows))}
        print(to_json(body))
        return
    from rich.table import Table

    title = "attention over training" if series else "attention"
    title += f" at step {step}" if step and not series else ""  # many models tell none
    table = Table(title=f"{title}: means over heads")
    for column in ("revision" if series else "layer", *_COLUMNS.values()):
        table.add_column(column, justify="right")
    if not series:
        lines["all"] = means(rows)
    for name, line in lines.items():
        cells = ["n/a" if math.isnan(line[key]) else f"{line[key]:.4f}" for key in _COLUMNS]
        table.add_row(name, *cells)
    show_table(table, 110)
    for why in _why_missing(rows):
        print(f"n/a: {why}")


def _why_missing(rows: list[Row]) -> list[str]:
    """The reasons for missing values in the table."""
    reasons = []
    heads = [row for row in rows if row["level"] == "head"]
    lost = [row for row in heads if row["nonfinite"]]
    if lost:
        first = lost[0]
        reasons.append(
            f"{len(lost)} of {len(heads)} products have weights that are not finite, the first in "
            f"layer {first['layer']}, {first['product']}, head {first['head']}"
        )
    if any(math.isnan(row["balance"]) and not row["nonfinite"] for row in heads):
        reasons.append(
            "queries and keys are normalised, so the sizes of their factors have no meaning"
        )
    return reasons


def _finite(line: dict[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in line.items()}


def rank_command(
    target: str,
    settings: dict[str, Any],
    family: Path | None,
    batch_tokens: int,
    out: Path | None,
    figures: Path | None,
    as_json: bool,
    allow_unused: bool,
) -> None:
    """Run `pretrain ranks`.

    Args:
        settings: keys of `RanksConfig`; the others are those of the run, so that the table
            continues its own.
    """
    models = find_weights(target, family, batch_tokens, allow_unused)
    if not models:
        _show_measured(target, settings, out, figures, as_json)
        return
    config = RanksConfig.model_validate(
        {**(models[-1].ranks or RanksConfig()).model_dump(), **settings}
    )
    with contextlib.ExitStack() as ours:
        for path in filter(None, (out, figures / "scatter" if figures else None)):
            ours.enter_context(held(path))
        rows, scatter = measure_weights(models, config)
        print_ranks(rows, as_json)
        if out:
            write_rows(out, rows)
            print(f"written: {out}", file=sys.stderr)
        if figures:
            scatter.write(figures)
            print(f"written: {figures}/scatter.png, .csv", file=sys.stderr)


def _show_measured(
    target: str, settings: dict[str, Any], out: Path | None, figures: Path | None, as_json: bool
) -> None:
    """Print what a loop measured last, because it saved no model in its run folder.

    Raises:
        UsageError: for an option that needs weights.
    """
    if any(settings.values()) or figures:
        raise UsageError(
            f"{target}: holds measurements of another loop but no model, which these options need; "
            "leave them out"
        )
    rows = read_ranks(Path(target.partition("@")[0]))
    if not rows:
        raise UsageError(f"{target}: nothing was measured yet; let it train")
    rows = [row for row in rows if row["step"] == rows[-1]["step"]]
    print_ranks(rows, as_json)
    if out:
        with held(out):
            write_rows(out, rows)
        print(f"written: {out}", file=sys.stderr)
