"""`pretrain report --follow`: writes the page again and again while its runs train."""

from __future__ import annotations

import sys
from pathlib import Path
from time import sleep

from data_pipeline.files import held, refuse_busy, refuse_run, write_aside
from pretrain.cli.console import on_one_line, warn
from pretrain.errors import UsageError
from pretrain.ranks.table import RANKS
from pretrain.report import checked_band, notes_of
from pretrain.report.figures import figures_of
from pretrain.report.load import NothingYetError, Study, load_study
from pretrain.report.page import page, waiting_page
from pretrain.report.tables import tables_of
from pretrain.runs.folder import EVALUATION
from pretrain.runs.metrics import METRICS
from pretrain.sweep.run import SWEEP

_PATIENCE = 60.0
"""Seconds to wait for another report that writes the same file."""
_SIGNS = (METRICS, RANKS, EVALUATION, SWEEP)
"""Files whose change makes another page necessary."""


def follow_runs(
    paths: list[Path], out: Path, form: str, baseline: str | None, band: str, every: float
) -> Study:
    """Write the page now and after every change, until all runs are finished.

    Args:
        every: seconds between two pages; a browser loads the page again as often.

    Raises:
        UsageError: if the paths are no runs, or the runs cannot be compared.
    """
    if form != "html":
        raise UsageError(f"--follow: writes the page (html), not {form}; leave out --format")
    _check(paths, out, band)
    before: object = None
    told: set[str] = set()
    while True:
        now = _signs(paths)
        if now != before:
            study = _write(paths, out, baseline, band, every, told)
            if study is not None and _is_finished(study):
                return study
            before = now
        sleep(every)


def _check(paths: list[Path], out: Path, band: str) -> None:
    checked_band(band)
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"{path}: no such run folder; start the run first")
    if out.is_dir():
        refuse_run(out)
        refuse_busy(out)


def _signs(paths: list[Path]) -> object:
    """Sizes and times of the files that a page is made from."""
    found = []
    for path in paths:
        for folder in (path, *sorted(one for one in path.iterdir() if one.is_dir())):
            for name in _SIGNS:
                try:
                    about = (folder / name).stat()
                except OSError:
                    continue
                found.append((str(folder / name), about.st_size, about.st_mtime_ns))
    return found


def _write(
    paths: list[Path], out: Path, baseline: str | None, band: str, every: float, told: set[str]
) -> Study | None:
    """Write the page; one that says what it waits for, if nothing was measured yet.

    Args:
        told: notes that were printed already.
    """
    with held(out, _PATIENCE):
        try:
            study = load_study(paths, baseline, unfinished=True)
        except NothingYetError as error:
            why = f"Waiting: nothing was measured yet ({on_one_line(str(error))})."
            write_aside(out, _encoded(waiting_page(paths[0].name, why, every)))
            _tell("nothing was measured yet", told, out)
            return None
        notes = notes_of(study)
        again = 0.0 if _is_finished(study) else every
        text = page(study, tables_of(study), figures_of(study, band), notes, again)
        write_aside(out, _encoded(text))
    for note in notes:
        if note not in told and not note.startswith("included although not finished"):
            warn(note)
            told.add(note)
    steps = max(run.last_step for run in study.runs)
    _tell(f"written with {len(study.runs)} runs, up to step {steps}", told, out)
    return study


def _tell(what: str, told: set[str], out: Path) -> None:
    if what not in told:
        print(on_one_line(f"{out}: {what}"), file=sys.stderr, flush=True)
        told.add(what)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _is_finished(study: Study) -> bool:
    """Whether every run is finished, those that are planned but not there included."""
    return all(run.is_finished for run in study.runs) and not study.missing
