"""Writes metrics as JSON lines, and to W&B and TensorBoard on request; failures never stop
training."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.disk import open_regular
from data_pipeline.files import write_aside
from data_pipeline.strict_json import not_finite, to_json
from pretrain.cli.console import warn
from pretrain.config.recipe import Config
from pretrain.config.run import LoggingConfig
from pretrain.errors import ENDS, RunError, UsageError
from pretrain.ranks.columns import Columns, Named
from pretrain.runs.norm_lines import norms_by_role
from pretrain.runs.records import FIGURES, LINES, Line, check_record
from pretrain.runs.service import SERVICES, Map, Service, ServiceSection, TrackedRun

METRICS = "metrics.jsonl"
_LARGEST, _LONGEST = 1 << 31, 1 << 20
"""Largest size in bytes of the file, and of a line."""
_ALWAYS_FINITE = ("train", "evaluation")
"""Kinds of lines in which NaN is a fault; in others it means that a figure does not apply."""


def refuse_missing_services(logging: LoggingConfig) -> None:
    """Refuse a service whose package is not installed.

    Raises:
        UsageError: naming the key and the package.
    """
    for key, section in logging.services_by_key():
        module, package = SERVICES.class_of(section).needs
        try:
            if module:
                import_module(module)
        except ImportError:
            raise UsageError(
                f"{key}: needs the package {package}, which is not installed: pip install {package}"
            ) from None


def read_metrics(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` of one kind: train, evaluation, ranks or event."""
    path = run / METRICS
    if not path.exists():
        return []
    return [_with_nan(row) for _, row in _rows(path) if row["kind"] == kind]


@dataclass(frozen=True)
class Metrics:
    """The contents of ``metrics.jsonl`` for a report."""

    updates: Columns
    """Loss, learning_rate, grad_norm, tokens_per_second and weight_decay by step."""
    held_out: list[dict[str, Any]]
    events: list[dict[str, Any]]
    norms: list[dict[str, float]]
    """Step, and norms by role (`pretrain.runs.norm_lines`)."""


def read_all_metrics(run: Path) -> Metrics:
    """Read every line of ``metrics.jsonl`` once; of updates, only the figures that a report shows.

    Raises:
        RunError: if the file does not contain metrics, or an update lacks a figure.
    """
    steps, decays = array("q"), Named()
    figures = {name: array("d") for name in FIGURES}
    by_kind: dict[str, list[dict[str, Any]]] = {"evaluation": [], "event": []}
    norms: list[dict[str, float]] = []
    path = run / METRICS
    for number, row in _rows(path) if path.exists() else ():
        if row["kind"] == "evaluation" and "loss" not in row:
            raise _damaged(path, number, "loss: field required")
        if row["kind"] in by_kind:
            by_kind[row["kind"]].append(_with_nan(row))
        if row["kind"] == "norms":
            try:
                norms.append({"step": row["step"], **norms_by_role(row)})
            except ValueError as error:
                raise _damaged(path, number, error) from None
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
    return Metrics(updates, by_kind["evaluation"], by_kind["event"], norms)


def _with_nan(row: dict[str, Any]) -> dict[str, Any]:
    """Convert null in the file, which means not finite, to NaN."""
    return {key: math.nan if value is None else value for key, value in row.items()}


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every line with its number, without lines that a kill cut short.

    Raises:
        RunError: if the file does not contain metrics.
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
    return RunError(f"{path}:{number}: damaged ({why}); remove the line")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a file; of a line that is longer than any valid one, only its end."""
    while line := file.readline(_LONGEST):
        if len(line) < _LONGEST:
            yield line


def _row(line: bytes) -> Any:
    try:
        return json.loads(line.decode())  # detecting the encoding would take a third more time
    except (ValueError, RecursionError):
        return None


def rewind_metrics(run: Path, step: int) -> None:
    """Remove lines after ``step``: the resumed run will log them again."""
    path = run / METRICS
    if not path.exists():
        return
    rows = [row for _, row in _rows(path) if row["step"] <= step]
    write_aside(path, "".join(to_json(row) + "\n" for row in rows).encode("utf-8"))


def _append(path: Path, line: str) -> None:
    """Add a whole line to a file or nothing; a disk that fills takes a part first."""
    data = line.encode("utf-8")
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            while data:  # the second time, the system says why it took no more
                data = data[os.write(descriptor, data) :]
        except OSError as error:
            os.ftruncate(descriptor, size)
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


class Tracker:
    """Writes metrics on process rank 0; does nothing on the others."""

    def __init__(self, run: Path, config: Config, active: bool, first: int = 0) -> None:
        """
        Args:
            active: whether this process writes.
            first: the step from which training continues; TensorBoard hides later ones.
        """
        self.active = active
        self._services: list[tuple[str, ServiceSection, Service]] = []
        if not active:
            return
        self._run = run
        self._waiting: list[tuple[int, str]] = []
        self._refused = False
        about = TrackedRun(run, first, config.model_dump(mode="json"))
        for section in config.logging.services():
            self._start(section, about)

    def _start(self, section: ServiceSection, about: TrackedRun) -> None:
        """Start a service; if it cannot start, the run continues without it."""
        service = SERVICES.class_of(section)
        name = service.name or section.kind
        started: list[Service] = []
        # missing package, dead network, bad key, a user's mistake
        if reason := _failure(section, lambda: started.append(service(section, about))):
            warn(f"{name} is not available ({reason}); metrics go to {METRICS} without it")
        self._services += [(name, section, tracker) for tracker in started]

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one line: ``kind``, ``step`` and ``values``.

        A number that is not finite is null; if it should be finite, an event reports it.
        """
        if not self.active:
            return
        self._write(step, to_json({"kind": kind, "step": step, **values}))
        missing = not_finite(values) if kind in _ALWAYS_FINITE else []
        if missing:
            message = f"{kind}: {', '.join(missing)} not finite, null in {METRICS}"
            self._write(step, to_json({"kind": "event", "step": step, "message": message}))
        numbers = _named(kind, values)
        self._tell(lambda service: service.log(numbers, step))

    def show(self, maps: dict[str, Map], step: int) -> None:
        """Give maps of a measurement to the services; the file does not have them."""
        if self.active:
            self._tell(lambda service: service.show(maps, step))

    def _tell(self, what: Callable[[Service], None]) -> None:
        """Call every service; one that fails must not stop the run, and is called no more."""
        for entry in list(self._services):
            name, section, service = entry
            if reason := _failure(section, partial(what, service)):
                warn(f"{name} stopped ({reason}); metrics go on in {METRICS}")
                self._services.remove(entry)

    def _write(self, step: int, line: str) -> None:
        """Write a line to the file; lines that a full or lost disk refuses wait for the next
        one."""
        self._waiting.append((step, line + "\n"))
        reason = self.write_waiting()
        if reason and not self._refused:
            warn(f"{reason}; lines wait in memory")
        self._refused = bool(reason)

    def write_waiting(self) -> str:
        """Write the lines that wait in memory, and return why the disk refuses them, or nothing."""
        if not self.active:
            return ""
        try:
            while self._waiting:
                _append(self._run / METRICS, self._waiting[0][1])
                self._waiting.pop(0)
        except OSError as error:
            return f"{self._run / METRICS}: {error.strerror}"
        return ""

    def rewind(self, step: int) -> None:
        """Remove what was logged after ``step``, because the run goes back there."""
        if not self.active:
            return
        rewind_metrics(self._run, step)
        self._waiting = [waiting for waiting in self._waiting if waiting[0] <= step]
        self._tell(lambda service: service.rewind(step))

    def close(self) -> None:
        """Write the lines that wait in memory, and finish all services."""
        if reason := self.write_waiting():
            warn(f"{reason}; its last lines are lost: {len(self._waiting)}")
        for name, section, service in self._services:
            if reason := _failure(section, service.close):
                warn(f"{name} did not finish ({reason})")


def _failure(section: ServiceSection, call: Callable[[], None]) -> str:
    """Call a service; one line of its error with the place in the user's file, or nothing."""
    try:
        call()
    except ENDS:
        raise
    except BaseException as error:
        extension = SERVICES.own_of(section)
        if extension is not None and extension.code is not None:
            return extension.code.place_of(error)
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _named(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by name: ``KIND/loss``, and ``weight_decay/query`` of a group."""
    groups = {key: part for key, part in values.items() if isinstance(part, dict)}
    single = {f"{kind}/{key}": part for key, part in values.items() if key not in groups}
    return _flatten(single) | _flatten(groups)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[prefix + key] = value
    return flat
