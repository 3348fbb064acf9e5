"""Metrics: JSON lines always; W&B and TensorBoard when asked for; never in the way of training."""

from __future__ import annotations

import errno
import json
import math
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.disk import open_regular
from data_pipeline.files import write_aside
from data_pipeline.strict_json import not_finite, to_json
from pretrain.config.recipe import Config
from pretrain.console import warn
from pretrain.errors import RunError
from pretrain.ranks.columns import Columns, Named
from pretrain.runs.records import FIGURES, LINES, Line, check_record
from pretrain.runs.service import SERVICES, Service, ServiceSection, TrackedRun

METRICS = "metrics.jsonl"
_LARGEST, _LONGEST = 1 << 31, 1 << 20
"""Bytes of the file, and of a line."""
_ALWAYS_FINITE = ("train", "evaluation")
"""Kinds of lines in which NaN is a fault; in others it says that a figure does not apply."""


def read_metrics(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` of one kind: train, evaluation, ranks or event."""
    path = run / METRICS
    if not path.exists():
        return []
    return [_with_nan(row) for _, row in _rows(path) if row["kind"] == kind]


@dataclass(frozen=True)
class Metrics:
    """What ``metrics.jsonl`` holds for a report."""

    updates: Columns
    """Loss, learning_rate, grad_norm, tokens_per_second and weight_decay by step."""
    held_out: list[dict[str, Any]]
    events: list[dict[str, Any]]


def read_all_metrics(run: Path) -> Metrics:
    """Every line of ``metrics.jsonl``, read once; of updates the figures that a report shows.

    Raises:
        RunError: if the file is none of metrics, or an update lacks a figure.
    """
    steps, decays = array("q"), Named()
    figures = {name: array("d") for name in FIGURES}
    others: dict[str, list[dict[str, Any]]] = {"evaluation": [], "event": []}
    path = run / METRICS
    for number, row in _rows(path) if path.exists() else ():
        if row["kind"] in others:
            others[row["kind"]].append(_with_nan(row))
        if row["kind"] != "train":
            continue
        if missing := [name for name in (*FIGURES, "weight_decay") if name not in row]:
            raise _damaged(path, number, f"{missing[0]}: field required")
        try:
            steps.append(row["step"])
            decays.append({name: float(value) for name, value in row["weight_decay"].items()})
            for name, column in figures.items():
                column.append(math.nan if row[name] is None else float(row[name]))
        except (ValueError, OverflowError) as error:
            raise _damaged(path, number, error) from None
    updates = Columns({"step": steps, **figures, "weight_decay": decays})
    return Metrics(updates, others["evaluation"], others["event"])


def _with_nan(row: dict[str, Any]) -> dict[str, Any]:
    """A number that was not finite is null in the file and NaN to whoever reads it."""
    return {key: math.nan if value is None else value for key, value in row.items()}


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every line but those that a kill cut short, with its number.

    Raises:
        RunError: if the file is none of metrics.
    """
    try:
        with open_regular(path, _LARGEST) as file:
            for number, line in enumerate(_lines(file), 1):
                row = _row(line)
                if row is None:
                    continue
                try:
                    check_record(row, _kind_of(row))
                except ValueError as error:
                    raise _damaged(path, number, error) from None
                yield number, row
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None


def _kind_of(row: Any) -> type[Line]:
    kind = row.get("kind") if isinstance(row, dict) else None
    return LINES.get(kind, Line) if isinstance(kind, str) else Line


def _damaged(path: Path, number: int, why: object) -> RunError:
    return RunError(f"{path}:{number}: damaged ({why}); take the line out")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a file; of one that is longer than any of ours, only its end."""
    while line := file.readline(_LONGEST):
        if len(line) < _LONGEST:
            yield line


def _row(line: bytes) -> Any:
    try:
        return json.loads(line.decode())  # found out by itself, the encoding takes a third more
    except (ValueError, RecursionError):
        return None


def rewind_metrics(run: Path, step: int) -> None:
    """Drop what was logged after ``step``: the resumed run will log it again."""
    path = run / METRICS
    if not path.exists():
        return
    kept = [row for _, row in _rows(path) if row["step"] <= step]
    write_aside(path, "".join(to_json(row) + "\n" for row in kept).encode("utf-8"))


def _append(path: Path, line: str) -> None:
    """Add a line to a file, whole or not at all: a disk that fills up takes a part."""
    data = line.encode("utf-8")
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if os.write(descriptor, data) < len(data):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


class Tracker:
    """Writes metrics on the main rank; silent on the others."""

    def __init__(self, run: Path, config: Config, active: bool, first: int = 0) -> None:
        """
        Args:
            active: whether this process writes.
            first: the step that training goes on from; TensorBoard hides what is after it.
        """
        self.active = active
        self._services: list[tuple[str, ServiceSection, Service]] = []
        if not active:
            return
        self._run = run
        self._waiting: list[str] = []
        self._refused = False
        about = TrackedRun(run, first, config.model_dump(mode="json"))
        for section in config.logging.services():
            self._start(section, about)

    def _start(self, section: ServiceSection, about: TrackedRun) -> None:
        """Start a service; where it cannot start, the run goes on without it."""
        service = SERVICES.class_of(section)
        name = service.name or section.kind
        try:
            self._services.append((name, section, service(section, about)))
        except Exception as error:  # missing package, dead network, bad key, a user's mistake
            reason = _reason(section, error)
            warn(f"{name} is not available ({reason}); metrics go to {METRICS} without it")

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line: ``kind``, ``step`` and ``values``.

        A number that is not finite is null; where it should be, an event says so.
        """
        if not self.active:
            return
        self._write(to_json({"kind": kind, "step": step, **values}) + "\n")
        missing = not_finite(values) if kind in _ALWAYS_FINITE else []
        if missing:
            message = f"{kind}: {', '.join(missing)} not finite, null in {METRICS}"
            self._write(to_json({"kind": "event", "step": step, "message": message}) + "\n")
        numbers = {f"{kind}/{k}": v for k, v in _flatten(values).items()}
        for one in list(self._services):
            name, section, service = one
            try:
                service.log(numbers, step)
            except Exception as error:  # a dead service must not stop a run
                reason = _reason(section, error)
                warn(f"{name} stopped ({reason}); metrics go on in {METRICS}")
                self._services.remove(one)

    def _write(self, line: str) -> None:
        """A line in the file; what a full or vanished disk refuses waits for the next one."""
        self._waiting.append(line)
        try:
            while self._waiting:
                _append(self._run / METRICS, self._waiting[0])
                self._waiting.pop(0)
        except OSError as error:
            if not self._refused:
                warn(f"{self._run / METRICS}: {error.strerror}; lines wait in memory")
            self._refused = True
        else:
            self._refused = False

    def rewind(self, step: int) -> None:
        """Drop what was logged after ``step``, as the run goes back there."""
        if self.active:
            rewind_metrics(self._run, step)
        for one in list(self._services):
            name, section, service = one
            try:
                service.rewind(step)
            except Exception as error:
                reason = _reason(section, error)
                warn(f"{name} stopped ({reason}); metrics go on in {METRICS}")
                self._services.remove(one)

    def close(self) -> None:
        """Flush everything."""
        for name, section, service in self._services:
            try:
                service.close()
            except Exception as error:
                warn(f"{name} did not finish ({_reason(section, error)})")


def _reason(section: ServiceSection, error: Exception) -> str:
    """One line of an error, with the place in a user's own file."""
    own = SERVICES.own_of(section)
    if own is not None and own.code is not None:
        return own.code.place_of(error)
    return " ".join(str(error).split())


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[prefix + key] = value
    return flat
