"""What is printed, or shown without a page, is legible and speaks of nothing that is not there."""

from __future__ import annotations

import math
import random

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import pytest

from pretrain.report.interactive import figure_html
from pretrain.report.load import Condition, Study
from pretrain.report.printed import _page
from pretrain.report.spec import Figure, Panel, Series
from pretrain.report.text import markdown

HINT = "Click a layer."


def figure_of(low: float, high: float, panels: int = 2) -> Figure:
    xs = [low * (high / low) ** (i / 20) for i in range(21)]
    series = Series("a", xs, [0.8 * x for x in xs], points=True)
    panel = Panel("W_QK", "bound", "norm", [series], log_x=True, log_y=True, diagonal=True)
    return Figure("key", "title", "caption.", [], lambda _: [panel] * panels, HINT)


@pytest.mark.parametrize(
    "seed", [0, 3, 5, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 4, 6, 7))]
)
def test_labels_of_logarithmic_axes_do_not_overlap(seed: int) -> None:
    draw = random.Random(seed)
    low = 10 ** draw.uniform(-6, 6)
    page = _page(plt, figure_of(low, low * 10 ** draw.choice((0.01, 0.1, 0.5, 1.2, 2.5, 8))))
    page.canvas.draw()
    renderer = page.canvas.get_renderer()
    for axes in page.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low_end, high_end = sorted(axis.get_view_interval())
            boxes = [
                tick.label1.get_window_extent(renderer)
                for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
                if low_end <= tick.get_loc() <= high_end and tick.label1.get_text()
            ]
            assert 2 <= len(boxes) <= 8
            assert not any(
                box.overlaps(other) for k, box in enumerate(boxes) for other in boxes[k + 1 :]
            )
    plt.close(page)


SPREAD = [
    pytest.param(ratio, low, column, marks=[pytest.mark.long] * (number % 2 == column))
    for number, ratio in enumerate((1.5, 4.9, 5.1, 12.0, 50.0, 90.0, 300.0))
    for low, column in ((0.04, False), (0.7, True))
]
"""The short form has each ratio once, and both sizes in turn."""


@pytest.mark.parametrize(("ratio", "low", "column"), SPREAD)
def test_labels_are_spread_over_a_logarithmic_axis(ratio: float, low: float, column: bool) -> None:
    """Every decade has one, unless the axis is so short that it has round numbers."""
    page = _page(plt, figure_of(low, low * ratio), column)
    page.canvas.draw()
    for axes in page.axes:
        for axis in (axes.xaxis, axes.yaxis):
            ends = sorted(axis.get_view_interval())
            ticks = axis.get_major_ticks()
            places = [tick.get_loc() for tick in ticks if tick.label1.get_text()]
            places = [math.log10(place) for place in places if ends[0] <= place <= ends[1]]
            first, last = map(math.log10, ends)
            for power in range(math.ceil(first), math.floor(last) + 1):
                assert ratio < 5 or any(
                    math.isclose(power, place, abs_tol=1e-9) for place in places
                )
            assert max(places) - min(places) > 0.25 * (last - first)
    plt.close(page)


def test_only_the_page_says_how_to_use_its_controls() -> None:
    figure = figure_of(1.0, 10.0)
    assert f"caption. {HINT}" in figure_html(figure)
    baseline = Condition("a", {}, [])
    text = markdown(Study("title", [baseline], baseline), [], [(figure, "key.png")], [])
    assert "caption." in text and HINT not in text
