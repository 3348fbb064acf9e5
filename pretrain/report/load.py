"""Sorts run folders into conditions and a baseline, and lists what is left out and why."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.config.compare import SCIENCE
from pretrain.config.explain import cut
from pretrain.errors import RunError, UsageError
from pretrain.ranks.table import measured_steps
from pretrain.report.comparable import check_same, mixed, with_comparable_scores
from pretrain.report.nested import deeper, nested, run_folders, some
from pretrain.report.read_run import load_run
from pretrain.report.runs import RunData
from pretrain.report.sample import steps_of_all
from pretrain.report.sums import total
from pretrain.report.varying import NO_EFFECT, in_order, meant, varying
from pretrain.runs.folder import CONFIG, FREE
from pretrain.runs.loop import NOT_RECORDED
from pretrain.runs.records import SweepRecord, read_record
from pretrain.sweep.config import by_numbers, kinds_of, short_names
from pretrain.sweep.run import SWEEP

__all__ = ["Condition", "RunData", "Study", "load_run", "load_study"]

_SETTINGS = tuple(section for section in SCIENCE if section != "seed")
"""Sections whose differences make two runs different conditions (the seed makes replicates)."""


EXPOSURE = "exposure of "
"""How the name of a condition begins whose sweep file gives an exposure; it is then that."""
_LONGEST = 90
"""Characters of a condition's name, without its notes."""
_MORE = "and {} more"
_Found = tuple[list[Path], dict[str, Any] | None, list[str]]
"""The run folders of a path, its sweep, and notes about missing runs and other runs."""


class NothingYetError(UsageError):
    """There is nothing to report; while runs train, there may be later."""


@dataclass(frozen=True)
class Condition:
    """Runs that differ only in their seed."""

    name: str
    values: dict[str, Any]
    """The values of the keys that vary between conditions, by dotted key."""
    runs: list[RunData]

    def mean_of(self, value: Callable[[RunData], float]) -> float:
        """Mean over the seeds."""
        return round(total(map(value, self.runs)) / len(self.runs), 12)

    @property
    def decay(self) -> float:
        """λ of attention, as applied."""
        return self.mean_of(lambda run: run.decay)

    @property
    def exposure(self) -> float:
        """Exposure of attention."""
        return self.mean_of(lambda run: run.exposure)


@dataclass(frozen=True)
class Study:
    """The runs of a report."""

    title: str
    conditions: list[Condition]
    baseline: Condition
    notes: list[str] = field(default_factory=list)
    """Notes for the reader: folders that were left out, runs that are not paired."""
    missing: int = 0
    """Number of run folders that are planned, or there, but not among the runs."""

    @property
    def runs(self) -> list[RunData]:
        """All runs, condition by condition."""
        return [run for condition in self.conditions for run in condition.runs]


def load_study(
    paths: Iterable[Path], baseline: str | None = None, unfinished: bool = False
) -> Study:
    """Read run folders, or folders of them, and sort them into conditions.

    Args:
        baseline: name of a condition; default: the sweep's, else that of the least exposure of
            attention to decay.
        unfinished: also include runs that are not finished.

    Raises:
        UsageError: if nothing is left to report, or the runs have different data.
    """
    paths = list(paths)
    notes: list[str] = []
    runs: list[RunData] = []
    named: str | None = None
    has_unfinished = False
    found = [_folders(path) for path in paths]
    for path in paths:
        notes += nested(path, paths)
    shown = _shown([folder for folders, _, _ in found for folder in folders])
    for folders, sweep, missing in found:
        named = named or (sweep or {}).get("baseline")
        notes += missing
        for folder in folders:
            try:
                run = load_run(folder, shown)
            except (UsageError, RunError) as error:
                notes.append(f"left out: {error}")
                continue
            if run.is_finished or unfinished:
                runs.append(run)
            if not run.is_finished:
                has_unfinished = True
                taken = "included although not finished" if unfinished else "left out"
                notes.append(f"{taken}: {folder}: {run.why_unfinished}")
    if not runs:
        first_note = f"; {notes[0]}" if notes else ""
        more = " (--unfinished includes the others)" if has_unfinished else ""
        raise NothingYetError(
            f"{', '.join(map(str, paths))}: no finished run to report{first_note}{more}"
        )
    check_same(runs)
    runs, odd = with_comparable_scores(runs)
    conditions = _conditions(runs, _exposures(found))
    title = paths[0].name if len(paths) == 1 else f"{len(runs)} runs"
    chosen, replaced = _choose(conditions, baseline, named)
    notes += [*odd, *replaced]
    for condition in conditions:
        notes += mixed(condition.name, condition.runs)
    planned = sum(len(sweep["runs"]) if sweep else len(folders) for folders, sweep, _ in found)
    return Study(title, conditions, chosen, notes, planned - len(runs))


def _shown(folders: list[Path]) -> set[int]:
    """The steps of all runs that the report shows; what cannot be read is reported later."""
    measured = []
    for folder in folders:
        with suppress(UsageError, RunError, OSError):
            measured.append(measured_steps(folder))
    return steps_of_all(measured)


def _folders(path: Path) -> _Found:
    """The run folders of a path, its sweep, and notes about missing runs and other runs."""
    if (path / CONFIG).is_file() or not path.is_dir():
        return [path], None, []
    sweep = None
    with suppress(FileNotFoundError):
        sweep = read_record(path / SWEEP, SweepRecord)
    folders = run_folders(path)
    notes: list[str] = []
    if sweep:
        wanted, present = set(sweep["runs"]), {folder.name for folder in folders}
        notes += [
            f"left out: {path / name}: planned by {SWEEP}, but the run does not exist"
            for name in sorted(wanted - present, key=by_numbers)
        ]
        notes += [
            f"left out: {path / name}: not a run of {SWEEP}"
            for name in sorted(present - wanted, key=by_numbers)
            if not name.startswith("trunk,")
        ]
        folders = [folder for folder in folders if folder.name in wanted]
    if not folders:
        others = deeper(path)
        mend = f"give {some(others)}" if others else "wait until its runs have started"
        raise NothingYetError(f"{path}: contains no run folder; {mend}")
    return folders, sweep, notes


def _exposures(found: list[_Found]) -> dict[Path, dict[str, float]]:
    """The exposure that a sweep file gives at some keys, by run folder."""
    given: dict[Path, dict[str, float]] = {}
    for folders, sweep, _ in found:
        keys = sweep.get("exposure") if sweep else None
        if sweep is None or not isinstance(keys, list):
            continue
        for folder in folders:
            about = sweep["runs"].get(folder.name)
            values = about.get("given") if isinstance(about, dict) else None
            if isinstance(values, dict):
                given[folder] = {key: values[key] for key in keys if _is_number(values.get(key))}
    return given


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _conditions(runs: list[RunData], given: dict[Path, dict[str, float]]) -> list[Condition]:
    """Group runs by the keys that vary between recipes, least exposure of attention first."""
    keys = [key for key in varying(runs, _SETTINGS) if key not in FREE]
    short = short_names(keys)
    loops = [run.recorded for run in runs if run.recorded is not None]
    told = frozenset[str]().union(*loops) - {"seed", *keys}
    forks = {run.forked_at for run in runs}
    groups: dict[str, Condition] = {}
    exposed = [key for key in keys if all(key in given.get(run.path, {}) for run in runs)]
    variety = {key: len({json.dumps(meant(run, key)) for run in runs}) for key in keys}
    for run in sorted(runs, key=lambda item: (item.seed, by_numbers(str(item.path)))):
        values = {key: meant(run, key) for key in keys}
        words = {key: _named(short[key], value) for key, value in values.items()
                 if value != NO_EFFECT}  # fmt: skip
        for key in exposed:  # as in the names of the folders
            words[key] = _named(f"{EXPOSURE}{short[key]}", given[run.path][key])
        parts = _cut(words, variety)
        if run.recorded is not None:
            parts += ["another loop"] * (len(loops) < len(runs))
            parts += _lacking(in_order(told - run.recorded, run.config))
        name = ", ".join(parts)
        if run.forked_at and len(forks) > 1:
            name = f"{name or 'the same recipe'} (from step {run.forked_at})"
        known = sorted((run.recorded or frozenset()) - {"seed"})
        whole = json.dumps([values, known, run.forked_at], sort_keys=True)
        if whole not in groups and any(group.name == name for group in groups.values()):
            name += f" ({hashlib.sha256(whole.encode()).hexdigest()[:4]})"
        group = groups.setdefault(whole, Condition(name or "all runs", values, []))
        if any(member.seed == run.seed for member in group.runs):
            earlier = next(member for member in group.runs if member.seed == run.seed)
            if not run.records("seed"):
                raise UsageError(
                    f"{run.path}: has the same recipe as {earlier.path}, and no seed is recorded; "
                    "give seed= to the probe, or report only one of them"
                )
            raise UsageError(
                f"{run.path}: has the same recipe and seed as {earlier.path}; report only one "
                "of them"
            )
        group.runs.append(run)
    return sorted(
        groups.values(),
        key=lambda condition: (
            *(
                math.inf if math.isnan(value) else float(f"{value:.9g}")
                for value in (condition.exposure, condition.decay)
            ),
            by_numbers(condition.name),
        ),
    )


def _cut(words: dict[str, str], variety: dict[str, int]) -> list[str]:
    """The parts of a name; of a long one those about decay, then those that tell most conditions
    apart, and a count of the others.

    Args:
        variety: the number of values that each key has among all conditions.
    """
    if len(", ".join(words.values())) <= _LONGEST:
        return list(words.values())
    kept: list[str] = []
    decay = "optimizer.weight_decay."
    for key in sorted(words, key=lambda key: (not key.startswith(decay), -variety[key])):
        if kept and len(", ".join(words[one] for one in (*kept, key))) > _LONGEST - len(_MORE):
            break
        kept.append(key)
    left = len(words) - len(kept)
    return [*(words[key] for key in words if key in kept), *([_MORE.format(left)] if left else [])]


def _lacking(keys: list[str]) -> list[str]:
    """A part of the name of a condition that does not record what others of its kind do."""
    words = [key.rpartition(".")[2] for key in keys]
    some = f"{len(words)} keys" if len(words) > 2 else " and ".join(words)
    return [f"{some} {NOT_RECORDED}"] if words else []


def _named(key: str, value: Any) -> str:
    """A part of a condition's name."""
    return f"{key} {value}" if value == NOT_RECORDED else f"{key} = {_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, float | int) and not isinstance(value, bool):
        return f"{value:.4g}"
    if isinstance(value, list | dict):
        return kinds_of(value) or cut(json.dumps(value), 40)
    return str(value)


def _choose(
    conditions: list[Condition], wanted: str | None, named: str | None
) -> tuple[Condition, list[str]]:
    """The baseline, and a note if it is not the one that the sweep names."""
    if wanted is not None:
        for condition in conditions:
            if wanted.replace(" ", "") == condition.name.replace(" ", ""):
                return condition, []
        names = "; ".join(condition.name for condition in conditions)
        raise UsageError(f"--baseline: {wanted!r} is not one of the conditions: {names}")
    if named is None:
        return conditions[0], []
    for condition in conditions:
        if any(run.path.name.startswith(f"{named},seed=") for run in condition.runs):
            return condition, []
    return conditions[0], [
        f"baseline: the sweep's is {named}, but none of its runs is reported; compared with "
        f"{conditions[0].name} instead, which has the least exposure (--baseline changes this)"
    ]
