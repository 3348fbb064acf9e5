"""Draws figures for print and for text with matplotlib, at the choices that print shows.

For print (pdf) a figure is as wide as a column, its panels stand one above the other, and it has no
title: the document has a caption. For a screen (png) it is wide and has its title.
"""

from __future__ import annotations

import io
import math
from itertools import cycle
from typing import Any

from pretrain.cli.console import plain
from pretrain.report.spec import Control, Figure, Panel, Series, in_lines

_MARKERS = "osD^PX*v"
_COLUMN = 3.35
"""Width in inches of a column of a two-column page."""
_STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "axes.titlesize": 9,
    "pdf.fonttype": 42,  # publishers refuse type 3
}
_PRINT = {"font.size": 8, "axes.titlesize": 8, "lines.linewidth": 1.0}
_APART = 2.0
"""Pixels between two labels of an axis, at least."""
_FEW_ROUND = 5
"""From this ratio of its ends on, a logarithmic axis has two of 1, 2, 5, 10, … at least."""


def draw(figure: Figure, kind: str = "png") -> bytes:
    """Write the figure as an image file: ``png`` for a screen, ``pdf`` for a column in print.

    Title and caption are in the file's metadata.
    """
    plt = _pyplot()
    column = kind == "pdf"
    with plt.rc_context(_STYLE | (_PRINT if column else {})):
        page = _page(plt, figure, column)
        buffer = io.BytesIO()
        about: dict[str, Any] = {"Title": plain(figure.title)}
        if column:
            about |= {"Subject": plain(figure.caption), "CreationDate": None}
        page.savefig(buffer, format=kind, dpi=160, metadata=about)
        plt.close(page)
    return buffer.getvalue()


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _plain(text: str) -> str:
    """Escape text for matplotlib, which reads text between two dollars as a formula."""
    return plain(text).replace("$", r"\$")


def _page(plt: Any, figure: Figure, column: bool = False) -> Any:
    panels = figure.printed
    columns = 1 if column else min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (8.6 if columns > 1 else 6.0, 3.4 * rows)
    if column:
        size = (_COLUMN, sum(_height(panel) for panel in panels))
    page = plt.figure(figsize=size, layout="constrained")
    axes = list(page.subplots(rows, columns, squeeze=False).flat)
    for subplot, panel in zip(axes, panels, strict=False):
        _panel(page, subplot, panel)
    for unused in axes[len(panels) :]:
        unused.remove()
    if column and len({panel.x for panel in panels}) == 1:  # the lowest panel says it for all
        for subplot in page.axes[: len(panels) - 1]:
            subplot.set_xlabel("")
    _legend(page, panels, column)
    if not column:
        words = [
            _chosen(control, figure.printed_options(index)[0])
            for index, control in enumerate(figure.controls)
            # Panels name what differs between them.
            if control.name != "band" and len(figure.printed_options(index)) == 1
        ]
        title = ": ".join([figure.title, ", ".join(words)]) if words else figure.title
        page.suptitle(_plain(title))
    _part_labels(page)
    return page


def _chosen(control: Control, option: str) -> str:
    """What a figure without controls shows of one: ``step 60`` of a slider.

    The legend says what a band spans.
    """
    return f"{control.name} {option}" if control.kind == "slider" else option


def _height(panel: Panel) -> float:
    """Inches of a panel in a column."""
    return max(1.7, 0.8 + 0.14 * min(24, len(panel.heat.rows))) if panel.heat else 2.1


def _panel(page: Any, axes: Any, panel: Panel) -> None:
    import matplotlib

    axes.set_title(_plain(panel.title))
    if panel.heat:
        heat = panel.heat
        image = axes.imshow(heat.values, vmin=heat.low, vmax=heat.high, cmap="viridis",
                            aspect="auto")  # fmt: skip
        for axis, names in ((axes.xaxis, heat.columns), (axes.yaxis, heat.rows)):
            word, numbers = _in_common(names)
            axis.set_ticks(range(len(names)), list(map(_plain, numbers)))
            axis.set_label_text(_plain(word))
        axes.grid(False)
        bar = page.colorbar(image, ax=axes, label="pseudo-rank")
        bar.set_ticks([heat.low + share * (heat.high - heat.low) for share in (0, 0.5, 1)])
        return
    colours = matplotlib.colormaps["viridis"]
    marks = cycle(_MARKERS)
    for series in panel.series:
        colour = colours(series.colour)
        marker = None if series.dash else next(marks)  # a mark means one condition
        if series.points:
            axes.scatter(series.x, series.y, s=8, color=colour, marker=marker, alpha=0.7,
                         label=_label(series))  # fmt: skip
            continue
        few = len(series.x) <= 30 and not series.dash
        mark = marker if few else "_" if series.is_point else None
        axes.plot(series.x, series.y, ":" if series.dash else "-", color=colour,
                  marker=mark, markersize=3 if few else 9, label=_label(series))  # fmt: skip
        if series.low and series.high and series.is_point:
            axes.vlines(series.x, series.low, series.high, color=colour, alpha=0.3, linewidth=2)
        elif series.low and series.high:
            axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.13,
                              linewidth=0)  # fmt: skip
    _scales(axes, panel)
    axes.set(xlabel=panel.x, ylabel=panel.y)


def _in_common(names: list[str]) -> tuple[str, list[str]]:
    """``("layer", ["0", "1"])`` of ``layer 0`` and ``layer 1``: what an axis and its ticks say."""
    words = {name.rpartition(" ")[0] for name in names}
    if len(words) != 1:
        return "", names
    return words.pop(), [name.rpartition(" ")[2] for name in names]


def _label(series: Series) -> str:
    """The legend's entry; of a line named "CONDITION: WHAT", only WHAT."""
    text = _plain(series.name.rpartition(": ")[2] if series.dash else series.name)
    text = "\n".join(in_lines(text))
    return f" {text}" if text.startswith("_") else text  # matplotlib hides names that begin with it


def _legend(page: Any, panels: list[Panel], column: bool) -> None:
    """One legend below all panels: every name once, and what the bands span."""
    from matplotlib.patches import Patch

    entries: dict[str, Any] = {}
    for axes in page.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    # Conditions first, then what is dotted in all of them, such as a law.
    entries = dict(sorted(entries.items(), key=lambda entry: _is_dotted(entry[1])))
    for panel in panels:
        if panel.band and any(series.low for series in panel.series):
            entries.setdefault(panel.band, Patch(color="grey", alpha=0.3, linewidth=0))
    if entries:
        widest = max(len(line) for entry in entries for line in entry.splitlines())
        fitting = max(1, (55 if column else 140) // (widest + 7))
        page.legend(entries.values(), entries, loc="outside lower center",
                    ncols=min(fitting, len(entries)))  # fmt: skip


def _is_dotted(handle: Any) -> bool:
    return getattr(handle, "get_linestyle", str)() == ":"


def _few_ticks(axis: Any) -> None:
    """Label a logarithmic axis by decades; a shorter one by 1, 2 and 5, or by round numbers.

    Round numbers are evenly spaced: over more than half a decade they would all be at the top.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

    axis.set_minor_formatter(NullFormatter())
    low, high = sorted(axis.get_view_interval())
    if math.floor(math.log10(high)) > math.ceil(math.log10(low)):
        return
    is_short = high < _FEW_ROUND * low
    axis.set_major_locator(
        MaxNLocator(3, steps=[1, 2, 5, 10]) if is_short else LogLocator(subs=(1, 2, 5))
    )
    axis.set_major_formatter(ScalarFormatter())


def _part_labels(page: Any) -> None:
    """Leave out labels of ticks that would cover another one of their axis."""
    from matplotlib.ticker import FixedFormatter, FixedLocator

    page.draw_without_rendering()
    for axes in page.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [
                (tick.get_loc(), label.get_text(), label.get_window_extent())
                for tick in axis.get_major_ticks()
                # those of a colour bar stand on the other side
                for label in (tick.label1, tick.label2)
                if low <= tick.get_loc() <= high and label.get_visible() and label.get_text()
            ]
            kept = _apart(sorted(ticks, key=lambda tick: float(tick[0])))
            if len(kept) < len(ticks):
                axis.set_major_locator(FixedLocator([place for place, *_ in kept]))
                axis.set_major_formatter(FixedFormatter([text for _, text, _ in kept]))
    page.set_layout_engine("none")  # it is laid out, and would be at every drawing


def _apart(ticks: list[tuple[float, str, Any]]) -> list[tuple[float, str, Any]]:
    """The first and the last of some labels, and those between that cover no other one."""
    kept = ticks[:1]
    for tick in ticks[1:-1]:
        if not _touch(kept[-1], tick) and not _touch(tick, ticks[-1]):
            kept.append(tick)
    if len(ticks) > 1 and not _touch(kept[-1], ticks[-1]):
        kept.append(ticks[-1])
    return kept


def _touch(one: tuple[float, str, Any], other: tuple[float, str, Any]) -> bool:
    return bool(one[2].padded(_APART).overlaps(other[2].padded(_APART)))


def _scales(axes: Any, panel: Panel) -> None:
    points = [
        (x, y)
        for series in panel.series
        for x, y in zip(series.x, series.y, strict=True)
        if math.isfinite(x) and math.isfinite(y)  # matplotlib draws no other kind
    ]
    logarithmic = []
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
            logarithmic.append(axes.xaxis)
    if panel.log_y and any(y > 0 for _, y in points):  # matplotlib refuses an empty panel
        axes.set_yscale("log")
        logarithmic.append(axes.yaxis)
    if panel.y_range:
        axes.set_ylim(*panel.y_range)
    if panel.diagonal:
        coordinates = [value for point in points for value in point if value > 0]
        if coordinates:
            axes.plot([min(coordinates), max(coordinates)], [min(coordinates), max(coordinates)],
                      "--", color="grey", linewidth=1)  # fmt: skip
    for axis in logarithmic:  # the diagonal may have made them longer
        _few_ticks(axis)
