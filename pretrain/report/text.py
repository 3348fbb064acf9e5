"""Tables as Markdown, LaTeX and CSV, and reports made of them."""

from __future__ import annotations

import csv
import io
import re

from pretrain.report.load import Study
from pretrain.report.spec import Figure
from pretrain.report.tables import Cell, DataTable

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "λ": r"$\lambda$", "η": r"$\eta$", "Σ": r"$\Sigma$", "∏": r"$\prod$",
    "‖": r"$\Vert$", "²": r"$^2$", "ᵀ": r"$^\top$", "½": r"$\frac12$", "√": r"$\surd$",
    "−": r"$-$", "–": "--", "≤": r"$\le$", "<": r"$<$", ">": r"$>$",
    "₁": r"$_1$", "₂": r"$_2$", "∇": r"$\nabla$", "α": r"$\alpha$",
}  # fmt: skip


def table_csv(table: DataTable) -> str:
    """The unrounded values."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in table.raw for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.raw)
    return text.getvalue()


def markdown(study: Study, tables: list[DataTable], figures: list[tuple[Figure, str]],
             notes: list[str]) -> str:  # fmt: skip
    """The report as Markdown.

    Args:
        figures: each with the address of its image.
    """
    parts = [f"# {study.title}", *(f"> {note}" for note in notes)]
    parts += [_markdown_table(table) for table in tables]
    for figure, image in figures:
        parts.append(f"## {figure.title}\n\n![{figure.title}]({image})\n\n{figure.caption}")
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: DataTable) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    rows = [line([_starred(cell, r"\*") for cell in row]) for row in table.rows]
    rule = "|" + "|".join([" --- ", *([" ---: "] * (len(table.head) - 1))]) + "|"
    body = "\n".join([line(table.head), rule, *rows])
    return f"## {table.title}\n\n{body}\n\n{table.caption}"


def _starred(cell: Cell, star: str) -> str:
    return cell.text + star * cell.mark


def latex(study: Study, tables: list[DataTable], figures: list[tuple[Figure, str]],
          notes: list[str]) -> str:  # fmt: skip
    """The report as a LaTeX document of booktabs tables and PDF figures."""
    parts = [
        r"\documentclass{article}",
        r"\usepackage[T1]{fontenc}\usepackage[utf8]{inputenc}",
        r"\usepackage{booktabs,graphicx,geometry}\geometry{margin=2cm}",
        r"\begin{document}",
        rf"\section*{{{escape(study.title)}}}",
        *(rf"\noindent {escape(note)}\par" for note in notes),
    ]
    parts += [_latex_table(table) for table in tables]
    for figure, image in figures:
        parts.append(
            "\\begin{figure}[htbp]\\centering\n"
            f"\\includegraphics[width=\\linewidth]{{{image}}}\n"
            f"\\caption{{{escape(figure.caption)}}}\n\\end{{figure}}"
        )
    return "\n".join([*parts, r"\end{document}", ""])


def _latex_table(table: DataTable) -> str:
    def line(cells: list[str]) -> str:
        return " & ".join(cells) + r" \\"

    rows = [line([escape(cell.text) + "*" * cell.mark for cell in row]) for row in table.rows]
    body = "\n".join(
        [r"\toprule", line(list(map(escape, table.head))), r"\midrule", *rows, r"\bottomrule"]
    )
    columns = "l" + "r" * (len(table.head) - 1)
    return (
        "\\begin{table}[htbp]\\centering\n"
        f"\\caption{{{escape(table.title)}. {escape(table.caption)}}}\n"
        "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
        f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}}}\n\\end{{table}}"
    )


def escape(text: str) -> str:
    """Plain text for LaTeX; what it has no sign for is left out."""
    found = "".join(_LATEX.get(letter, letter) for letter in text)
    return re.sub(r"[^\x00-\x7f]", "", found)
