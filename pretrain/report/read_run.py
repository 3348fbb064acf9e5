"""Reads what a report needs from one run folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pretrain.checkpoint.manifest import MANIFEST
from pretrain.checkpoint.reader import CHECKPOINTS, list_checkpoints
from pretrain.errors import RunError, UsageError
from pretrain.ranks.columns import Columns
from pretrain.ranks.schema import NEEDED
from pretrain.ranks.table import RANKS, read_rank_columns
from pretrain.report.runs import PAIRS, RunData
from pretrain.report.sample import shown_steps
from pretrain.runs.folder import CONFIG, EVALUATION, forked_from, read_starts, recipe_of
from pretrain.runs.identity import line_of, read_identity, read_trunks
from pretrain.runs.loop import recorded_keys
from pretrain.runs.metrics import read_all_metrics
from pretrain.runs.records import Evaluation, Sealed, read_record
from pretrain.training.faults import SKIPPED, read_jumps


def load_run(path: Path, shown: set[int] | None = None) -> RunData:
    """Read a run folder.

    Args:
        shown: steps whose measurements are read, if there are any; default: `shown_steps`.

    Raises:
        UsageError, RunError: naming what is missing or damaged.
    """
    if not (path / CONFIG).is_file():
        why = f"not a run folder (no {CONFIG})" if path.exists() else "no such folder"
        raise UsageError(f"{path}: {why}")
    config = recipe_of(path)
    outline = read_rank_columns(path, ["decay_a", "decay_b"])
    if not outline:
        raise UsageError(f"{path}: nothing was measured yet; let it train")
    ranks = read_rank_columns(path, choose=partial(_chosen, shown))
    missing = [name for name in NEEDED if name not in ranks.names]
    if missing:
        raise RunError(
            f"{path}: its rank table has no {missing[0]}, as in an older version; train it again"
        )
    _check_steps(path, outline)
    metrics = read_all_metrics(path)
    return RunData(
        path,
        config,
        ranks,
        metrics.updates,
        metrics.held_out,
        _evaluation(path),
        read_identity(path),
        _source(path),
        read_starts(path),
        tuple(read_jumps(path)),
        tuple(row["step"] for row in metrics.events if str(row["message"]).endswith(SKIPPED)),
        _is_constant(outline),
        len(set(outline.column("step"))),
        recorded_keys(path, path / CONFIG),
        tuple(read_trunks(path) or _trunks(path)),
        metrics.norms,
    )


def _trunks(path: Path) -> list[str]:
    """The trunks of a fork that does not record them, as earlier versions made it."""
    before = forked_from(path)
    for trunk in (Path(before["run"]), path.parent / Path(before["run"]).name) if before else ():
        identity = read_identity(trunk)
        if identity:
            return line_of(trunk, identity["initial_weights"])
    return []


def _chosen(shown: set[int] | None, steps: list[int]) -> list[int]:
    if shown is None:
        return shown_steps(steps)
    return [step for step in steps if step in shown or step in (steps[0], steps[-1])]


def _is_constant(outline: Columns) -> bool:
    """Whether each factor of attention has one λ in all rows of heads."""
    names = ("level", "layer", "product", "decay_a", "decay_b")
    decays: dict[tuple[Any, ...], tuple[float, float]] = {}
    for level, layer, product, *both in zip(*map(outline.column, names), strict=True):
        if level == "head" and decays.setdefault((layer, product), tuple(both)) != tuple(both):
            return False
    return True


def _check_steps(path: Path, ranks: Columns) -> None:
    """Refuse a table that was cut: every step has heads of both products.

    Raises:
        RunError: naming the table, the step and the product.
    """
    columns = (ranks.column(name) for name in ("step", "product", "level"))
    heads = {(step, product) for step, product, level in zip(*columns, strict=True)
             if level == "head"}  # fmt: skip
    for step in sorted(set(ranks.column("step"))):
        lacking = [product for product in PAIRS if (step, product) not in heads]
        if lacking:
            raise RunError(
                f"{path / RANKS}: damaged (step {step} has no heads of {lacking[0]}); restore it "
                f"from a copy, or measure again with `pretrain ranks`"
            )


def _evaluation(run: Path) -> dict[str, Any] | None:
    try:
        evaluation: dict[str, Any] = read_record(run / EVALUATION, Evaluation)
        return evaluation
    except FileNotFoundError:
        return None


def _source(path: Path) -> tuple[str, str] | None:
    """Hashes of data and tokenizer, also from the newest checkpoint."""
    identity = read_identity(path, ("data", "tokenizer"))
    if identity:
        return identity["data"], identity["tokenizer"]
    checkpoints = list_checkpoints(path / CHECKPOINTS)
    if not checkpoints:
        return None
    state = read_record(checkpoints[-1] / MANIFEST, Sealed)["state"]
    return state["data"], state["tokenizer"]
