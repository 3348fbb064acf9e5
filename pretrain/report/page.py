"""The HTML page: tables, figures, their data and the script that draws them, in one file."""

from __future__ import annotations

from pretrain.report.cells import Cell, DataTable
from pretrain.report.figure_parts import counted
from pretrain.report.findings import findings, headline
from pretrain.report.interactive import SCRIPT, data_link, escape, figure_html, plotly_script
from pretrain.report.load import Study
from pretrain.report.spec import Figure
from pretrain.report.text import table_csv

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:76rem;margin:1.5rem auto;padding:0 1rem;
color:#222;background:#fff}
h1{margin-bottom:.2rem}h2{font-size:1.15rem;margin:2rem 0 .3rem}
nav{display:flex;flex-wrap:wrap;gap:0 1rem;font-size:.9rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th{white-space:normal;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere;
min-width:8rem;max-width:20rem}.wide{overflow-x:auto}h1{overflow-wrap:anywhere;line-height:1.25}
:is(#differences,#data,#environment) :is(td,th):nth-child(2){text-align:left}
td.less{background:rgb(33 102 172/calc(var(--shade)*.35))}
td.more{background:rgb(178 24 43/calc(var(--shade)*.35))}
figure{margin:2.2rem 0;overflow:hidden}.plot{width:100%;min-height:8rem}
figcaption,.caption{color:#555;font-size:.85rem}
.controls label{margin-right:1.2rem;font-size:.9rem}
.controls input{vertical-align:middle;width:14rem}
.note{background:#fff6dd;padding:.3rem .7rem;margin:.2rem 0;font-size:.9rem}
@media print{.controls,nav{display:none}figure{break-inside:avoid}}
"""


def page(
    study: Study,
    tables: list[DataTable],
    figures: list[Figure],
    notes: list[str],
    again: float = 0.0,
) -> str:
    """The whole report as self-contained HTML.

    Args:
        again: seconds after which a browser loads the page again; 0: never.
    """
    warnings = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    places = [(part.key, part.title) for part in tables] + [
        (part.key, part.title) for part in figures
    ]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title in places)
    lead, rest = tables[:4], tables[4:]
    body = "".join(map(table_html, lead)) + "".join(map(figure_html, figures))
    body += "".join(map(table_html, rest))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(study.title)}: decay and rank</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(headline(study))}</h1><p>{escape(study.title)}: weight decay of "
        f"attention and the rank of its products, {counted(len(study.runs), 'run')} in "
        f"{counted(len(study.conditions), 'condition')}.</p>"
        f"{''.join(f'<p>{escape(sentence)}</p>' for sentence in findings(study))}"
        f"<nav>{links}</nav>{warnings}{body}{_reload(again)}"
        f"<script>{plotly_script()}</script><script>{SCRIPT}</script></body></html>"
    )


def waiting_page(title: str, why: str, again: float) -> str:
    """A page without figures yet, that a browser loads again."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="note">{escape(why)}</p>{_reload(again)}</body></html>'
    )


def _reload(again: float) -> str:
    """Text and script of a page that follows runs; empty for a page that does not."""
    if not again:
        return ""
    return (
        f'<p class="note" id="follows">This page follows runs that train; it is loaded again every '
        f"{again:g} s.</p><script>setTimeout(()=>location.reload(),{again * 1000:.0f})</script>"
    )


def table_html(table: DataTable) -> str:
    """A table with its caption and its data."""
    head = "".join(f"<th>{escape(title)}</th>" for title in table.head)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return (
        f'<section id="{table.key}"><h2>{escape(table.title)}</h2><div class="wide"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="caption">{escape(table.caption)} '
        f"{data_link(table.key, table_csv(table))}</p></section>"
    )


def _cell(cell: Cell) -> str:
    mark = "*" if cell.mark else ""
    if not cell.shade:
        return f"<td>{escape(cell.text)}{mark}</td>"
    kind = "more" if cell.shade > 0 else "less"
    return (
        f'<td class="{kind}" style="--shade:{abs(cell.shade):.2f}">{escape(cell.text)}{mark}</td>'
    )
