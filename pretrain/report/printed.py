"""Draws figures for print with matplotlib, at their default choice."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

from pretrain.cli.console import plain
from pretrain.report.spec import Figure, Panel, Series

_MARKERS = "osD^PX*v"
_STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "axes.titlesize": 9,
}


def draw(figure: Figure, kind: str = "png") -> bytes:
    """Write the figure as an image file."""
    plt = _pyplot()
    with plt.rc_context(_STYLE):
        page = _page(plt, figure)
        buffer = io.BytesIO()
        page.savefig(buffer, format=kind, dpi=160)
        plt.close(page)
    return buffer.getvalue()


def booklet(figures: Iterable[Figure]) -> bytes:
    """Write all figures to one PDF, one page each, with their captions."""
    plt = _pyplot()
    from matplotlib.backends.backend_pdf import PdfPages

    buffer = io.BytesIO()
    with PdfPages(buffer) as book, plt.rc_context(_STYLE):
        for figure in figures:
            page = _page(plt, figure)
            page.supxlabel(_wrapped(figure.caption), fontsize=7, x=0.02, ha="left")
            book.savefig(page)
            plt.close(page)
    return buffer.getvalue()


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(_plain(text), 150))


def _plain(text: str) -> str:
    """Escape text for matplotlib, which reads text between two dollars as a formula."""
    return plain(text).replace("$", r"\$")


def _page(plt: Any, figure: Figure) -> Any:
    panels = figure.view(figure.default)
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    page = plt.figure(figsize=(8.6 if columns > 1 else 6.0, 3.4 * rows), layout="constrained")
    axes = page.subplots(rows, columns, squeeze=False).flat
    for subplot, panel in zip(axes, panels, strict=False):
        _panel(page, subplot, panel)
    choice = [c.options[i] for c, i in zip(figure.controls, figure.default, strict=True)]
    title = ": ".join([figure.title, ", ".join(choice)]) if choice else figure.title
    page.suptitle(_plain(title))
    return page


def _panel(page: Any, axes: Any, panel: Panel) -> None:
    import matplotlib

    axes.set_title(_plain(panel.title))
    if panel.heat:
        heat = panel.heat
        image = axes.imshow(heat.values, vmin=heat.low, vmax=heat.high, cmap="viridis",
                            aspect="auto")  # fmt: skip
        axes.set_xticks(range(len(heat.columns)), heat.columns, rotation=45)
        axes.set_yticks(range(len(heat.rows)), heat.rows)
        axes.grid(False)
        page.colorbar(image, ax=axes, label="pseudo-rank")
        return
    colours = matplotlib.colormaps["viridis"]
    named: set[str] = set()
    for index, series in enumerate(panel.series):
        label = _label(series, named)
        colour, marker = colours(series.colour), _MARKERS[index % len(_MARKERS)]
        if series.points:
            axes.scatter(series.x, series.y, s=8, color=colour, marker=marker, label=label,
                         alpha=0.7)  # fmt: skip
            continue
        few = len(series.x) <= 30 and not series.dash
        axes.plot(series.x, series.y, ":" if series.dash else "-", color=colour,
                  marker=marker if few else None, markersize=3, linewidth=1.3,
                  label=label)  # fmt: skip
        if series.low and series.high:
            axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.13,
                              linewidth=0)  # fmt: skip
    _scales(axes, panel)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    if panel.series:
        axes.legend(ncols=2 if len(panel.series) > 4 else 1)


def _label(series: Series, named: set[str]) -> str | None:
    """The legend's entries; for lines named "CONDITION: WHAT", WHAT is shown only once."""
    entry = series.name.rpartition(": ")[2] if series.dash else series.name
    if entry in named:
        return None
    named.add(entry)
    text = _plain(entry)
    return f" {text}" if text.startswith("_") else text  # matplotlib hides names that begin with it


def _few_ticks(axis: Any, values: list[float]) -> None:
    """Label a logarithmic axis without overlaps: matplotlib labels 2, 3, 4 … of a short one."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

    axis.set_minor_formatter(NullFormatter())
    if max(values) < 100 * min(values):
        axis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(ScalarFormatter())


def _scales(axes: Any, panel: Panel) -> None:
    points = [
        (x, y)
        for series in panel.series
        for x, y in zip(series.x, series.y, strict=True)
        if math.isfinite(x) and math.isfinite(y)  # matplotlib draws no other kind
    ]
    values = sorted({x for x, _ in points})
    if panel.log_x and any(x > 0 for x in values):
        positive = [value for value in values if value > 0]
        if values[0] <= 0:
            axes.set_xscale("symlog", linthresh=positive[0] if positive else 1.0)
            axes.set_xticks(values)
            axes.set_xticklabels([f"{value:.3g}" for value in values])
            axes.set_xticks([], minor=True)
        else:
            axes.set_xscale("log")
            _few_ticks(axes.xaxis, positive)
    heights = [y for _, y in points]
    if panel.log_y and any(y > 0 for y in heights):  # matplotlib refuses an empty panel
        axes.set_yscale("log")
        _few_ticks(axes.yaxis, [y for y in heights if y > 0])
    if panel.y_range:
        axes.set_ylim(*panel.y_range)
    if panel.diagonal:
        coordinates = [value for point in points for value in point if value > 0]
        if coordinates:
            axes.plot([min(coordinates), max(coordinates)], [min(coordinates), max(coordinates)],
                      "--", color="grey", linewidth=1)  # fmt: skip
