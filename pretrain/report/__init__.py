"""`pretrain report`: makes tables and figures from run folders, as a page, text or images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_pipeline.files import held, refuse_busy, refuse_run, write_aside
from pretrain.cli.console import show_table, warn
from pretrain.errors import UsageError
from pretrain.report.cells import DataTable
from pretrain.report.compare import uncounted, unpaired
from pretrain.report.context_tables import notes_table
from pretrain.report.figures import figures_of
from pretrain.report.load import Study, load_study
from pretrain.report.rank_figures import BANDS
from pretrain.report.replaced import Written, replaced
from pretrain.report.spec import Figure, to_csv
from pretrain.report.tables import summary, tables_of

Writer = Callable[[Study, list[DataTable], list[Figure], list[str], Path], None]
FORMATS = ("html", "md", "latex", "csv", "png", "pdf")
_FOLDERS = ("csv", "png", "pdf")
"""Formats that are a folder; the images of ``md`` and ``latex`` are in one beside the file."""


def write_report(
    paths: list[Path],
    out: Path,
    form: str = "html",
    baseline: str | None = None,
    unfinished: bool = False,
    band: str = "heads",
) -> Study:
    """Write the report of some runs.

    Args:
        paths: run folders, or folders of them (a sweep's).
        out: the file to write; for ``csv``, ``png`` and ``pdf`` a folder. ``md`` and ``latex`` put
            their images into a folder beside it.
        form: html, md, latex, csv, png or pdf (only figures: for a screen, and for print).
        band: what bands span at first and in print, ``heads`` or ``seeds``.

    Raises:
        UsageError: if there is nothing to report, or the runs cannot be compared.
    """
    if form not in FORMATS:
        raise UsageError(f"--format: {form!r} is not one of {', '.join(FORMATS)}")
    checked_band(band)
    _refuse_file(out, form)
    with held(out):
        return _write(paths, out, form, baseline, unfinished, band)


def _refuse_file(out: Path, form: str) -> None:
    """Refuse a file where the report needs a folder, before any run is read.

    Raises:
        UsageError: naming the file.
    """
    if form == "html":
        return
    folder = out if form in _FOLDERS else _folder_beside(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(
            f"{folder}: is a file, but --format {form} needs a folder there; choose another --out"
        )


def checked_band(band: str) -> None:
    """Refuse an unknown word for bands.

    Raises:
        UsageError: naming the option.
    """
    if band not in BANDS:
        raise UsageError(f"--band: {band!r} is not one of {', '.join(BANDS)}")


def notes_of(study: Study) -> list[str]:
    """Everything that is left out or not compared, with the reason."""
    return [*study.notes, *unpaired(study), *uncounted(study)]


def _write(
    paths: list[Path], out: Path, form: str, baseline: str | None, unfinished: bool, band: str
) -> Study:
    if out.is_dir():
        refuse_run(out)
        refuse_busy(out)
    study = load_study(paths, baseline, unfinished)
    tables, figures = tables_of(study), figures_of(study, band)
    if form != "csv":  # whose files have their columns also without any row
        tables = [table for table in tables if table.rows]
    notes = notes_of(study)
    for note in notes:
        warn(note)
    _WRITERS[form](study, tables, figures, notes, out)
    return study


def _html(
    study: Study, tables: list[DataTable], figures: list[Figure], notes: list[str], out: Path
) -> None:
    from pretrain.report.page import page

    write_aside(out, page(study, tables, figures, notes).encode("utf-8", "backslashreplace"))


def _md(
    study: Study, tables: list[DataTable], figures: list[Figure], notes: list[str], out: Path
) -> None:
    from pretrain.report.text import markdown

    with replaced(_folder_beside(out), "png") as folder:
        images = _images(figures, folder, "png")
    write_aside(out, markdown(study, tables, images, notes).encode("utf-8", "backslashreplace"))


def _latex(
    study: Study, tables: list[DataTable], figures: list[Figure], notes: list[str], out: Path
) -> None:
    from pretrain.report.text import latex

    with replaced(_folder_beside(out), "pdf") as folder:
        images = _images(figures, folder, "pdf")
    write_aside(out, latex(study, tables, images, notes).encode("utf-8", "backslashreplace"))


def _folder_beside(out: Path) -> Path:
    return out.with_name(f"{out.stem}-figures")


def _images(figures: list[Figure], folder: Written, kind: str) -> list[tuple[Figure, str]]:
    from pretrain.report.printed import draw

    images = []
    for figure in figures:
        folder.write(f"{figure.key}.{kind}", draw(figure, kind))
        images.append((figure, f"{folder.path.name}/{figure.key}.{kind}"))
    return images


def _csv(
    study: Study, tables: list[DataTable], figures: list[Figure], notes: list[str], out: Path
) -> None:
    from pretrain.report.text import table_csv

    with replaced(out, "csv") as folder:
        for table in (*tables, notes_table(notes)):
            folder.write(f"{table.key}.csv", table_csv(table).encode("utf-8", "backslashreplace"))
        for figure in figures:
            folder.write(f"{figure.key}.csv", to_csv(figure).encode("utf-8", "backslashreplace"))


def _only_images(kind: str) -> Writer:
    def write(
        study: Study, tables: list[DataTable], figures: list[Figure], notes: list[str], out: Path
    ) -> None:
        with replaced(out, kind) as folder:
            _images(figures, folder, kind)

    return write


_WRITERS: dict[str, Writer] = {
    "html": _html,
    "md": _md,
    "latex": _latex,
    "csv": _csv,
    "png": _only_images("png"),
    "pdf": _only_images("pdf"),
}


def print_summary(study: Study) -> None:
    """Print one row per condition to standard output."""
    from rich.table import Table

    table = summary(study)
    shown = Table(title="attention decay and rank")
    for index, title in enumerate(table.head):
        shown.add_column(title, justify="right" if index else "left")
    for row in table.rows:
        shown.add_row(*(cell.text for cell in row))
    show_table(shown, 160)
