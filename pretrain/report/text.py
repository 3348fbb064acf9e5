"""Writes tables and reports as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re

from pretrain.cli.console import on_one_line
from pretrain.report.cells import DataTable
from pretrain.report.findings import findings, headline
from pretrain.report.load import Study
from pretrain.report.spec import Figure

_NUMBERS = "0123456789+-−–±≤<>∞["
"""First letters of numbers, of what stands for none, and of intervals."""
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "λ": r"$\lambda$", "η": r"$\eta$", "Σ": r"$\Sigma$", "∏": r"$\prod$",
    "‖": r"$\Vert$", "²": r"$^2$", "ᵀ": r"$^\top$", "½": r"$\frac12$", "√": r"$\surd$",
    "−": r"$-$", "–": "--", "≤": r"$\le$", "<": r"$<$", ">": r"$>$",
    "[": "{[}", "₁": r"$_1$", "₂": r"$_2$", "∇": r"$\nabla$", "α": r"$\alpha$", "·": r"$\cdot$",
}  # fmt: skip


def table_csv(table: DataTable) -> str:
    """The unrounded values as CSV."""
    text = io.StringIO()
    found = dict.fromkeys(name for row in table.raw for name in row)
    names = list(found) or table.names or table.head
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
    parts = [f"# {_md(headline(study))}", " ".join(map(_md, findings(study)))]
    parts += [f"> {_md(note)}" for note in notes]
    parts += [_markdown_table(table) for table in tables]
    for figure, image in figures:
        place = f"![{figure.title}](<{image}>)" if " " in image else f"![{figure.title}]({image})"
        parts.append(f"## {figure.title}\n\n{place}\n\n{_md(_caption(figure))}")
    return "\n\n".join(parts) + "\n"


def _caption(figure: Figure) -> str:
    """The caption of a still picture, with the choice that it shows."""
    return f"{figure.caption} Shown: {figure.shown}." if figure.shown else figure.caption


def _markdown_table(table: DataTable) -> str:
    def row_of(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rows = [row_of([_md(cell.text) + r"\*" * cell.mark for cell in row]) for row in table.rows]
    rule = "|" + "|".join(" ---: " if right else " --- " for right in _to_right(table)) + "|"
    body = "\n".join([row_of(list(map(_md, table.head))), rule, *rows])
    return f"## {_md(table.title)}\n\n{body}\n\n{_md(table.caption)}"


def _to_right(table: DataTable) -> list[bool]:
    """Whether each column has numbers, which are aligned to the right; the first has names."""
    columns = [[row[index].text for row in table.rows] for index in range(len(table.head))]
    return [
        index > 0 and all(not text or text[0] in _NUMBERS for text in column)
        for index, column in enumerate(columns)
    ]


def _md(text: str) -> str:
    """Escape text for Markdown: on one line, without effect as markup or HTML."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", on_one_line(text)).replace("<", "&lt;")


def latex(study: Study, tables: list[DataTable], figures: list[tuple[Figure, str]],
          notes: list[str]) -> str:  # fmt: skip
    """The report as a LaTeX document of booktabs tables and PDF figures."""
    parts = [
        r"\documentclass{article}",
        r"\usepackage[T1]{fontenc}\usepackage[utf8]{inputenc}",
        r"\usepackage{booktabs,graphicx,geometry}\geometry{margin=2cm}",
        r"\begin{document}",
        rf"\section*{{{escape(headline(study))}}}",
        rf"\noindent {escape(' '.join(findings(study)))}\par",
        *(rf"\noindent {escape(note)}\par" for note in notes),
    ]
    parts += [_latex_table(table) for table in tables]
    for figure, image in figures:
        parts.append(
            "\\begin{figure}[htbp]\\centering\n"
            f"\\sbox0{{\\includegraphics{{{image}}}}}"  # no higher than a page
            "\\ifdim\\ht0>0.85\\textheight\\resizebox{!}{0.85\\textheight}{\\usebox0}"
            "\\else\\usebox0\\fi\n"
            f"\\caption{{{escape(f'{figure.title}. {_caption(figure)}')}}}\n\\end{{figure}}"
        )
    return "\n".join([*parts, r"\end{document}", ""])


def _latex_table(table: DataTable) -> str:
    def row_of(cells: list[str]) -> str:
        return " & ".join(cells) + r" \\"

    rows = [row_of([escape(cell.text) + "*" * cell.mark for cell in row]) for row in table.rows]
    body = "\n".join(
        [r"\toprule", row_of(list(map(escape, table.head))), r"\midrule", *rows, r"\bottomrule"]
    )
    columns = "".join("r" if right else "l" for right in _to_right(table))
    return (
        "\\begin{table}[htbp]\\centering\n"
        f"\\caption{{{escape(table.title)}. {escape(table.caption)}}}\n"
        "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
        f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}}}\n\\end{{table}}"
    )


def escape(text: str) -> str:
    """Escape plain text for LaTeX; characters that LaTeX lacks are shown by their number."""
    escaped = "".join(_LATEX.get(letter, letter) for letter in on_one_line(text))
    return re.sub(r"[^\x20-\x7e]", lambda sign: f"(U+{ord(sign[0]):04X})", escaped)
