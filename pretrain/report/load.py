"""Run folders -> what a report needs, and what may be compared with what."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pretrain.checkpoint import list_checkpoints
from pretrain.config import SCIENCE, Config, differences, load_config, value_at
from pretrain.errors import RunError, UsageError
from pretrain.identity import read_identity
from pretrain.manifest import MANIFEST
from pretrain.probe import Row
from pretrain.run import CHECKPOINTS, CONFIG, FREE, read_ranks
from pretrain.sweep import SWEEP
from pretrain.sweep_config import kinds_of, short_names
from pretrain.tracking import METRICS, read_metrics

_SETTINGS = tuple(section for section in SCIENCE if section != "seed")
"""Sections whose differences make two runs different conditions (the seed makes replicates)."""


@dataclass(frozen=True)
class RunData:
    """What the report needs of one run folder."""

    path: Path
    config: Config
    ranks: list[Row]
    metrics: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    identity: dict[str, str] | None
    """Hashes of first weights and order of data."""
    source: tuple[str, str] | None
    """Hashes of the data and of its tokenizer."""
    environment: dict[str, Any]

    @property
    def seed(self) -> int:
        """The seed: what tells replicates apart."""
        return self.config.seed

    @property
    def is_finished(self) -> bool:
        """Whether it trained to its last step and was evaluated, if it should be."""
        scored = self.evaluation is not None or self.config.evaluation.at_end == "none"
        return self.last_step >= self.config.train.steps and scored

    @property
    def last_step(self) -> int:
        """The last step in the metrics: a skipped update has none, but its evaluation has."""
        return max((int(row["step"]) for row in [*self.metrics, *self.held_out]), default=0)

    @cached_property
    def heads(self) -> list[Row]:
        """Rows of single heads."""
        return [row for row in self.ranks if row["level"] == "head"]

    @cached_property
    def final(self) -> list[Row]:
        """Rows of the last measurement, heads only."""
        last = max(row["step"] for row in self.ranks)
        return [row for row in self.heads if row["step"] == last]

    @property
    def decay(self) -> float:
        """λ of the attention matrices at the last measurement; their mean, should they differ."""
        values = [(row["decay_a"] + row["decay_b"]) / 2 for row in self.final]
        return round(sum(values) / max(1, len(values)), 12)

    @property
    def exposure(self) -> float:
        """Σ rate·λ of the attention matrices over the run, their mean."""
        values = [(row["exposure_a"] + row["exposure_b"]) / 2 for row in self.final]
        return sum(values) / max(1, len(values))

    @property
    def mlp_decay(self) -> float:
        """λ of the MLP at the last logged step, its mean."""
        used = self.metrics[-1]["weight_decay"] if self.metrics else {}
        values = [value for name, value in used.items() if name.startswith("mlp_")]
        return round(math.fsum(values) / max(1, len(values)), 12)

    def mean(self, product: str, column: str) -> float:
        """Mean over the heads of all layers at the last measurement."""
        values = [row[column] for row in self.final if row["product"] == product]
        return sum(values) / max(1, len(values))

    def score(self, key: str, subset: str | None = None) -> float | None:
        """``perplexity``, ``bits_per_byte`` or ``loss`` on the held-out split, or None."""
        if self.evaluation is None:
            return None
        part = self.evaluation["overall"]
        if subset is not None:
            part = self.evaluation["subsets"].get(subset, {})
        return part.get(key)


@dataclass(frozen=True)
class Condition:
    """Runs that differ in their seed alone."""

    name: str
    values: dict[str, Any]
    """What varies between the conditions, by dotted key."""
    runs: list[RunData]

    def mean_of(self, value: Callable[[RunData], float]) -> float:
        """Mean over the seeds."""
        return round(math.fsum(map(value, self.runs)) / len(self.runs), 12)

    @property
    def decay(self) -> float:
        """λ of attention."""
        return self.mean_of(lambda run: run.decay)

    @property
    def exposure(self) -> float:
        """Exposure of attention."""
        return self.mean_of(lambda run: run.exposure)


@dataclass(frozen=True)
class Study:
    """What a report is about."""

    title: str
    conditions: list[Condition]
    baseline: Condition
    notes: list[str] = field(default_factory=list)
    """What a reader must know: folders left out, runs not paired."""

    @property
    def runs(self) -> list[RunData]:
        """All runs, condition by condition."""
        return [run for condition in self.conditions for run in condition.runs]


def load_study(
    paths: Iterable[Path], baseline: str | None = None, unfinished: bool = False
) -> Study:
    """Read run folders, or folders of them, and sort them into conditions.

    Args:
        baseline: name of a condition; default: the sweep's, else that of least attention decay.
        unfinished: take runs that are not finished too.

    Raises:
        UsageError: if nothing is left to report, or the runs are of different data.
    """
    paths = list(paths)
    notes: list[str] = []
    runs: list[RunData] = []
    named: str | None = None
    for path in paths:
        folders, sweep = _folders(path)
        named = named or (sweep or {}).get("baseline")
        for folder in folders:
            try:
                run = load_run(folder)
            except (UsageError, RunError) as error:
                notes.append(f"left out: {error}")
                continue
            if run.is_finished or unfinished:
                runs.append(run)
            else:
                notes.append(
                    f"left out: {folder}: not finished ({run.last_step} of "
                    f"{run.config.train.steps} steps)"
                )
    if not runs:
        many = f"; {notes[0]}" if notes else ""
        raise UsageError(
            f"{', '.join(map(str, paths))}: no finished run to report{many} (--unfinished takes "
            "those under way)"
        )
    _check_data(runs)
    conditions = _conditions(runs)
    title = paths[0].name if len(paths) == 1 else f"{len(runs)} runs"
    return Study(title, conditions, _choose(conditions, baseline, named), notes)


def _folders(path: Path) -> tuple[list[Path], dict[str, Any] | None]:
    """The run folders that a path stands for."""
    if (path / CONFIG).is_file() or not path.is_dir():
        return [path], None
    sweep = None
    if (path / SWEEP).is_file():
        try:
            sweep = json.loads((path / SWEEP).read_text(encoding="utf-8"))
        except ValueError:
            raise RunError(f"{path / SWEEP}: damaged; run the sweep again to write it") from None
    wanted = set(sweep["runs"]) if sweep else None
    found = sorted(
        one
        for one in path.iterdir()
        if one.is_dir() and ((one / CONFIG).exists() or (one / METRICS).exists())
    )
    found = [one for one in found if wanted is None or one.name in wanted]
    if not found:
        raise UsageError(f"{path}: no run folder in it; let its runs start")
    return found, sweep


def load_run(path: Path) -> RunData:
    """Read a run folder.

    Raises:
        UsageError, RunError: naming what is missing or damaged.
    """
    if not (path / CONFIG).is_file():
        raise UsageError(f"{path}: not a run folder (no {CONFIG})")
    config = load_config(path / CONFIG)
    ranks = read_ranks(path)
    if not ranks:
        raise UsageError(f"{path}: nothing measured yet; let it train")
    if "exposure_a" not in ranks[0]:
        raise RunError(f"{path}: its table of ranks is of an older version; train it again")
    environment = _json(path / "environment.json")
    return RunData(
        path,
        config,
        ranks,
        read_metrics(path),
        read_metrics(path, "evaluation"),
        _json(path / "evaluation.json"),
        read_identity(path),
        _source(path),
        environment[-1] if environment else {},
    )


def _json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise RunError(f"{path}: damaged (not JSON); delete it and start the run again") from None


def _source(path: Path) -> tuple[str, str] | None:
    """Hashes of data and tokenizer, also from the newest checkpoint."""
    identity = read_identity(path, ("data", "tokenizer"))
    if identity:
        return identity["data"], identity["tokenizer"]
    checkpoints = list_checkpoints(path / CHECKPOINTS)
    if not checkpoints:
        return None
    state = _json(checkpoints[-1] / MANIFEST)["state"]
    return state["data"], state["tokenizer"]


def _check_data(runs: list[RunData]) -> None:
    known = [run for run in runs if run.source]
    for run in known[1:]:
        for index, what in ((1, "tokenizer"), (0, "data")):
            if run.source[index] != known[0].source[index]:  # type: ignore[index]
                raise UsageError(
                    f"{run.path}: is of another {what} than {known[0].path}; their figures do not "
                    "compare: report them apart"
                )
    scored = [run for run in runs if run.evaluation]
    for run in scored[1:]:
        for key in ("documents_sha256", "split"):
            if run.evaluation[key] != scored[0].evaluation[key]:  # type: ignore[index]
                raise UsageError(
                    f"{run.path}: was evaluated on other documents than {scored[0].path}; evaluate "
                    "both on one split"
                )


def _conditions(runs: list[RunData]) -> list[Condition]:
    """Runs by what varies between their recipes, least decay of attention first."""
    keys: dict[str, None] = {}
    for run in runs[1:]:
        for key in differences(runs[0].config, run.config, _SETTINGS):
            if key not in FREE:
                keys[key] = None
    order = _flat(runs[0].config.model_dump(mode="json"))
    keys = dict.fromkeys(sorted(keys, key=lambda key: order.get(key, len(order))))
    short = short_names(list(keys))
    groups: dict[str, Condition] = {}
    for run in sorted(runs, key=lambda one: (one.seed, str(one.path))):
        values = {key: value_at(run.config, key) for key in keys}
        name = ", ".join(f"{short[key]} = {_text(value)}" for key, value in values.items())
        whole = json.dumps(values, sort_keys=True)
        if whole not in groups and any(group.name == name for group in groups.values()):
            name += f" ({hashlib.sha256(whole.encode()).hexdigest()[:4]})"
        group = groups.setdefault(whole, Condition(name or "all runs", values, []))
        if any(other.seed == run.seed for other in group.runs):
            other = next(one for one in group.runs if one.seed == run.seed)
            raise UsageError(
                f"{run.path}: has the recipe and the seed of {other.path}; report one of them"
            )
        group.runs.append(run)
    return sorted(groups.values(), key=lambda one: (one.decay, one.exposure, one.name))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, int]:
    """Dotted keys of a tree, numbered in their order."""
    found: list[str] = []
    for key, value in tree.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return {key: index for index, key in enumerate(found)}


def _text(value: Any) -> str:
    if isinstance(value, float | int) and not isinstance(value, bool):
        return f"{value:.4g}"
    if isinstance(value, list | dict):
        return kinds_of(value) or json.dumps(value)
    return str(value)


def _choose(conditions: list[Condition], wanted: str | None, named: str | None) -> Condition:
    if wanted is not None:
        for condition in conditions:
            if wanted.replace(" ", "") == condition.name.replace(" ", ""):
                return condition
        names = "; ".join(condition.name for condition in conditions)
        raise UsageError(f"--baseline: {wanted!r} is none of the conditions: {names}")
    for condition in conditions:
        if named and any(run.path.name.startswith(f"{named},seed=") for run in condition.runs):
            return condition
    return conditions[0]
