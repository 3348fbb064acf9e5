"""Figures for print: one file each, as wide as a column, nothing that only a page can do, and no
label over another one, whatever the runs are called and however many there are."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.text import Text

import pretrain.report
from pretrain.report import write_report
from pretrain.report.figures import figures_of
from pretrain.report.interactive import _traces
from pretrain.report.load import Study, load_study
from pretrain.report.printed import _page, draw
from pretrain.report.rank_figures import over_decay, over_training
from pretrain.report.spec import Figure, Heat, Panel, Series
from tests.fake_runs import recipe, write_run, write_study

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("print") / "runs"
    return load_study([write_study(folder, decays=(0.0, 0.1, 0.11, 1.0), seeds=(1, 2))])


def figure_of(panels: list[Panel]) -> Figure:
    return Figure("key", "title", "caption.", [], lambda _: panels)


def colliding(page: Any) -> list[tuple[str, str]]:
    """Labels of one axis of which one covers another."""
    page.canvas.draw()
    found = []
    for axes in page.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            labels = [
                label
                for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
                for label in (tick.label1, tick.label2)
                if low <= tick.get_loc() <= high and label.get_visible() and label.get_text()
            ]
            boxes = [(label.get_text(), label.get_window_extent()) for label in labels]
            found += [(a, b) for k, (a, one) in enumerate(boxes) for b, other in boxes[k + 1 :]
                      if one.overlaps(other)]  # fmt: skip
    return found


def words_of(page: Any) -> str:
    return "\n".join(one.get_text() for one in page.findobj(Text) if one.get_visible())


def test_one_file_of_a_columns_width_for_each_figure(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = figures_of(study)[1:4:2]  # fonts in a file take most of a second
    monkeypatch.setattr(pretrain.report, "figures_of", lambda *_: made)
    folder = study.runs[0].path.parent
    write_report([folder], tmp_path / "figures", "pdf")
    files = sorted(one.name for one in (tmp_path / "figures").glob("[!.]*"))
    assert files == sorted(f"{figure.key}.pdf" for figure in made)
    for name in files:
        data = (tmp_path / "figures" / name).read_bytes()
        width = float(re.findall(rb"/MediaBox \[ ?0 0 ([\d.]+)", data)[0])
        assert data.startswith(b"%PDF") and width == pytest.approx(3.35 * 72, abs=1)
        assert data.count(b"/Type /Page\n") + data.count(b"/Type /Page ") == 1
        assert b"/Type3" not in data  # publishers refuse it


@pytest.mark.long  # its sample is the first figure, below
def test_no_caption_and_no_word_of_controls(study: Study) -> None:
    for figure in figures_of(study):
        page = _page(plt, figure, column=True)
        words = words_of(page)
        for part in (figure.title, figure.caption[:20], figure.hint or "Click"):
            assert part not in words, (figure.key, part)
        assert not re.search(r"\b(click|choose|slider|hide|above)\b", words, re.I), words
        assert colliding(page) == [], figure.key
        plt.close(page)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_no_label_covers_another(seed: int) -> None:
    rng = random.Random(seed)
    places = sorted(10 ** rng.uniform(-4, 4) for _ in range(rng.randint(1, 12)))
    places = [0.0] * rng.randint(0, 1) + places
    series = [Series(f"{'n' * rng.randint(1, 40)} {k}", places, [rng.random() for _ in places])
              for k in range(rng.randint(1, 7))]  # fmt: skip
    line = Panel("W_QK", "x", "y", series, log_x=True, y_range=(0, 1))
    rows, columns = rng.choice((1, 3, 80)), rng.choice((1, 12, 128))
    heat = Heat([f"layer {k}" for k in range(rows)], [f"head {k}" for k in range(columns)],
                np.random.default_rng(seed).random((rows, columns)).tolist(), 0.0, 1.0)  # fmt: skip
    for panels in ([line, line], [Panel("heads", "", "", heat=heat)]):
        figure = figure_of(panels)
        for column in (True, False):
            page = _page(plt, figure, column)
            assert colliding(page) == []
            assert all(axes.get_window_extent().width > 20 for axes in page.axes[: len(panels)])
            plt.close(page)
    assert draw(figure, "pdf") == draw(figure, "pdf")  # a figure has no date


@pytest.mark.parametrize("make", [over_decay, over_training])
@pytest.mark.parametrize("band", ["heads", "seeds"])
def test_bands_say_what_they_span_and_span_it(make: Any, band: str, study: Study) -> None:
    figure = make(study, band)
    page = _page(plt, figure, column=True)
    words = words_of(page)
    assert f"band: least to greatest {band[:-1]}" in words and colliding(page) == []
    assert figure.title not in words and figure.caption[:20] not in words
    plt.close(page)
    panel = figure.view(figure.default)[0]
    if make is over_decay:  # the first layer's line, at the first condition
        line, condition, layers = panel.series[0], study.conditions[0], {0}
        index = line.x.index(condition.decay)
    else:
        line, condition, layers, index = panel.series[0], study.conditions[0], {0, 1}, -1
    values: dict[Any, list[float]] = {}
    for run in condition.runs:
        for row in run.final:
            if row["product"] == "qk" and row["layer"] in layers:
                key = run.seed if band == "seeds" else (row["layer"], row["head"])
                values.setdefault(key, []).append(row["pseudo_rank"])
    means = [float(np.mean(one)) for one in values.values()]
    assert line.low and line.high
    assert (line.low[index], line.high[index]) == pytest.approx((min(means), max(means)))
    assert line.y[index] == pytest.approx(np.mean(means))


def test_one_seed_has_no_band_of_seeds(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/a", recipe(), np.random.default_rng(0))
    lone = load_study([tmp_path / "runs"])
    for panel in over_training(lone, "seeds").view((0, 1)):
        assert panel.series[0].low == panel.series[0].high == panel.series[0].y


def test_a_colour_bar_has_labels_and_a_mark_is_one_conditions() -> None:
    heat = Heat(["layer 0", "layer 1"], ["head 0"], [[0.2], [0.4]], 0.0, 0.8)
    page = _page(plt, figure_of([Panel("heads", "", "", heat=heat)]))
    bar = page.axes[1].yaxis
    assert [label.get_text() for label in bar.get_ticklabels(which="major")] == [
        "0.0",
        "0.4",
        "0.8",
    ]
    plt.close(page)
    lines = [Series(name, [1.0, 2.0], [1.0, 2.0], place) for place, name in enumerate("ab")]
    laws = [Series(f"{one.name}: law", one.x, one.y, one.colour, dash=True) for one in lines]
    marks = []
    for series in (lines, [lines[0], laws[0], lines[1], laws[1]]):
        page = _page(plt, figure_of([Panel("", "x", "y", series)]))
        drawn = page.axes[0].get_lines()
        marks.append(
            {
                line.get_label(): line.get_marker()
                for line in drawn
                if line.get_label() in ("a", "b")
            }
        )
        plt.close(page)
    assert marks[0] == marks[1] == {"a": "o", "b": "s"}
    page = _page(plt, figure_of([Panel("", "x", "y", [lines[0], laws[0], lines[1], laws[1]])]))
    (legend,) = page.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "law"]
    plt.close(page)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_no_place_without_a_panel_is_drawn(count: int) -> None:
    panels = [Panel(f"{k}", "x", "y", [Series("a", [1.0, 2.0], [1.0, 2.0])]) for k in range(count)]
    page = _page(plt, figure_of(panels))
    assert [axes.get_title() for axes in page.axes] == [panel.title for panel in panels]
    plt.close(page)


def test_what_the_legend_has_of_one_condition_is_drawn(tmp_path: Path) -> None:
    """A line and an area of one point would show nothing."""
    write_run(tmp_path / "runs/a", recipe(), np.random.default_rng(0))
    figure = over_decay(load_study([tmp_path / "runs"]))
    (panel, *_) = panels = figure.view((0, 0))
    page = _page(plt, figure_of(panels))
    axes = page.axes[0]
    assert len(axes.get_lines()) == len(panel.series) >= 3
    assert all(line.get_marker() not in (None, "None", "") for line in axes.get_lines())
    heights = [path.get_extents().height for one in axes.collections for path in one.get_paths()]
    assert len(heights) == sum(series.low is not None for series in panel.series) >= 2
    assert min(heights) > 0
    plt.close(page)
    traces = [trace for series in panel.series for trace in _traces(series, 0, "", True, "")]
    drawn = [trace for trace in traces if trace["showlegend"]]
    assert all("markers" in trace["mode"] for trace in drawn)
    areas = [trace for trace in traces if not trace["showlegend"]]
    assert len(areas) == len(heights) and all(area["line"]["width"] for area in areas)
