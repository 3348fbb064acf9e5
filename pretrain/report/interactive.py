"""Figures for the page: plotly's JSON, one entry for every choice of a figure's controls."""

from __future__ import annotations

import html
import json
import math
from typing import Any

from pretrain.cli.console import plain
from pretrain.report.spec import Figure, Panel, Series, in_lines

_GRID, _INK = "#e3e3e3", "#222"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")


def figure_html(figure: Figure) -> str:
    """A figure with its controls, caption and data link, drawn by the page's script."""
    views = {"-".join(map(str, choice)): _view(figure.view(choice)) for choice in figure.choices()}
    controls = ""
    for index, control in enumerate(figure.controls):
        name = escape(control.name)
        if control.kind == "slider":
            controls += (
                f'<label>{name} <output></output><input type="range" min="0" '
                f'max="{len(control.options) - 1}" value="{control.default}" data-index="{index}" '
                f"data-options='{escape(json.dumps(control.options))}'></label>"
            )
        else:
            options = "".join(
                f'<option value="{i}"{" selected" * (i == control.default)}>{escape(o)}</option>'
                for i, o in enumerate(control.options)
            )
            controls += f'<label>{name} <select data-index="{index}">{options}</select></label>'
    return (
        f'<figure id="{figure.key}"><h2>{escape(figure.title)}</h2>'
        f'<div class="controls">{controls}</div>'
        f'<div class="plot" role="img" aria-label="{escape(figure.title)}"></div>'
        f'<script type="application/json">{_json(views)}</script>'
        f"<figcaption>{escape(f'{figure.caption} {figure.hint}'.rstrip())} "
        f'<a class="data" download="{figure.key}.csv" href="#{figure.key}">data</a>'
        "</figcaption></figure>"
    )


def escape(text: str) -> str:
    """Text for HTML, also in attributes."""
    return html.escape(plain(text))


def _for_plotly(text: str) -> str:
    """Escape a name for plotly, which interprets some HTML and ``%{...}``."""
    return escape(text).replace("%{", "%&#123;")


def data_link(name: str, text: str) -> str:
    """A link that saves a table's CSV, which is in the page; the script makes its address."""
    return (
        f'<a class="data" download="{name}.csv" href="#{name}">data</a>'
        f'<script type="text/csv">{html.escape(plain(text), quote=False)}</script>'
    )


def _json(value: Any) -> str:
    # "</" would end the script element that carries it, "<!--" keep it open.
    return json.dumps(_clean(value), separators=(",", ":")).replace("<", "\\u003c")


def _clean(value: Any) -> Any:
    """JSON for plotly: null for NaN, which is a gap; seven digits, more than a plot shows."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _clean(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(part) for part in value]
    return value


def colour_of(place: float) -> str:
    """A colour of viridis: ordered in lightness, legible in print and to colour-blind readers."""
    from matplotlib import colormaps

    red, green, blue, _ = colormaps["viridis"](place)
    return f"rgb({round(red * 255)},{round(green * 255)},{round(blue * 255)})"


def _view(panels: list[Panel]) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"annotations": [], "shapes": []}
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    named: set[str] = set()
    for number, panel in enumerate(panels):
        suffix = "" if number == 0 else str(number + 1)
        row, column = divmod(number, columns)
        left, width = column / columns, 1 / columns
        top, height = 1 - row / rows, 1 / rows
        x_domain = [left + (0.09 if column else 0.0), left + width - 0.02]
        y_domain = [top - height + (0.14 if row < rows - 1 else 0.0), top - 0.07]
        layout[f"xaxis{suffix}"] = _axis(panel, "x", x_domain, f"y{suffix}")
        layout[f"yaxis{suffix}"] = _axis(panel, "y", y_domain, f"x{suffix}")
        layout["annotations"].append(
            {
                "text": f"<b>{_for_plotly(panel.title)}</b>",
                "x": sum(x_domain) / 2,
                "y": y_domain[1] + 0.01,
                "xref": "paper",
                "yref": "paper",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 13},
            }
        )
        if panel.heat:
            traces.append(_heat(panel, suffix))
        for index, series in enumerate(panel.series):
            traces += _traces(series, index, suffix, series.name not in named, panel.title)
            named.add(series.name)
        if panel.band and number == 0:
            traces.append(_band_entry(panel.band, suffix))
        if panel.diagonal and panel.series:
            traces.append(_diagonal(panel, suffix))
    layout["height"] = (
        60 + 330 * rows if not panels[0].heat else 160 + 34 * len(panels[0].heat.rows)
    )
    return {"data": traces, "layout": layout}


def _axis(panel: Panel, side: str, domain: list[float], anchor: str) -> dict[str, Any]:
    axis: dict[str, Any] = {
        "domain": domain,
        "anchor": anchor,
        "gridcolor": _GRID,
        "zeroline": False,
        # Title and legend have fixed places, so only the left margin grows: where the others may
        # too, a figure moves up and down, and Plotly may never find an end.
        "automargin": "left" if side == "y" else False,
    }
    if side == "x":
        axis["title"] = {"text": panel.x}
        values = [x for series in panel.series for x in series.x]
        if panel.log_x and values and min(values) <= 0:
            axis |= _symmetric(values)
        elif panel.log_x:
            axis |= {"type": "log", "exponentformat": "power"}
    else:
        axis["title"] = {"text": panel.y}
        if panel.log_y:
            axis |= {"type": "log", "exponentformat": "power"}
        if panel.y_range:
            axis["range"] = list(panel.y_range)
        if panel.heat:
            axis["autorange"] = "reversed"
    return axis


def symmetric(value: float, smallest: float) -> float:
    """Linear up to the smallest positive value, logarithmic (base 10) above it."""
    return value / smallest if value <= smallest else 1 + math.log10(value / smallest)


def _symmetric(values: list[float]) -> dict[str, Any]:
    """Ticks at the values themselves; the traces are moved to match in `_traces`."""
    ticks = sorted(set(values))
    smallest = min((value for value in ticks if value > 0), default=1.0)
    return {
        "tickvals": [symmetric(value, smallest) for value in ticks],
        "ticktext": [f"{value:.3g}" for value in ticks],
        "symmetric": smallest,
    }


def _traces(
    series: Series, index: int, suffix: str, legend: bool, panel: str
) -> list[dict[str, Any]]:
    colour = colour_of(series.colour)
    shared = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}", "legendgroup": series.name}
    name = "<br>".join(map(_for_plotly, in_lines(series.name)))
    traces: list[dict[str, Any]] = []
    area = colour.replace("rgb", "rgba").replace(")", f",{0.3 if series.is_point else 0.13})")
    if series.low and series.high:
        traces.append(
            {
                **shared,
                "x": [*series.x, *reversed(series.x)],
                "y": [*series.high, *reversed(series.low)],
                "fill": "toself",
                "fillcolor": area,
                # The area of one point is a line.
                "line": {"width": 2 if series.is_point else 0, "color": area},
                "mode": "lines",
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
    marked = series.is_point or (len(series.x) <= 40 and not series.dash)
    mode = "markers" if series.points else ("lines+markers" if marked else "lines")
    trace: dict[str, Any] = {
        **shared,
        "x": series.x,
        "y": series.y,
        "name": name,
        "mode": mode,
        "line": {"color": colour, "width": 2, "dash": "dot" if series.dash else "solid"},
        "marker": {"color": colour, "size": 6, "symbol": _SYMBOLS[index % len(_SYMBOLS)]},
        "showlegend": legend,
        "hovertemplate": f"%{{x}}: %{{y:.4g}}<extra>{name}</extra>",
        # For the data link.
        "meta": {"panel": panel, "series": series.name, "low": series.low, "high": series.high},
    }
    if series.points:
        trace["marker"]["opacity"] = 0.7
    if series.texts:
        trace["text"] = series.texts
        trace["hovertemplate"] = f"%{{text}}<br>%{{x:.4g}}, %{{y:.4g}}<extra>{name}</extra>"
    return [*traces, trace]


def _band_entry(words: str, suffix: str) -> dict[str, Any]:
    """An entry of the legend that says what bands span."""
    return {
        "x": [None],
        "y": [None],
        "name": words,
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
        "mode": "markers",
        "marker": {"color": "rgba(120,120,120,0.35)", "size": 12, "symbol": "square"},
        "hoverinfo": "skip",
    }


def _diagonal(panel: Panel, suffix: str) -> dict[str, Any]:
    values = [value for series in panel.series for value in (*series.x, *series.y) if value > 0]
    ends = [min(values), max(values)] if values else [1e-3, 1.0]
    return {
        "x": ends,
        "y": ends,
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
        "mode": "lines",
        "line": {"color": "#888", "width": 1, "dash": "dash"},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _heat(panel: Panel, suffix: str) -> dict[str, Any]:
    heat = panel.heat
    assert heat is not None
    return {
        "type": "heatmap",
        "x": heat.columns,
        "y": heat.rows,
        "z": heat.values,
        "zmin": heat.low,
        "zmax": heat.high,
        "colorscale": "Viridis",
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
        "hovertemplate": "%{y}, %{x}: %{z:.4f}<extra></extra>",
        "meta": {"panel": panel.title},
        "colorbar": {"title": {"text": "pseudo-rank"}, "thickness": 12},
    }


def plotly_script() -> str:
    """The library itself, to be part of the page."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


SCRIPT = r"""
"use strict";
const narrow = () => window.innerWidth < 700;
// Where an axis has zero and a logarithm, values are moved and ticks say what they were.
function move(view) {
  const data = view.data.map(trace => {
    const axis = view.layout["xaxis" + (trace.xaxis || "x").slice(1)] || {};
    if (!axis.symmetric || trace.x[0] === null) return trace;
    const least = axis.symmetric;
    const at = v => v <= least ? v / least : 1 + Math.log10(v / least);
    return {...trace, x: trace.x.map(at), customdata: trace.x,
      hovertemplate: (trace.hovertemplate || "").replace("%{x}", "%{customdata:.4g}")};
  });
  const layout = {...view.layout};
  for (const key of Object.keys(layout)) {
    if (key.startsWith("xaxis")) { layout[key] = {...layout[key]}; delete layout[key].symmetric; }
  }
  return {data, layout};
}
// On a phone the panels stand one above the other.
function stack(layout) {
  const keys = Object.keys(layout).filter(key => key.startsWith("xaxis"));
  if (!narrow() || keys.length < 2) return layout;
  const count = keys.length, result = {...layout, height: 330 * count + 110};
  keys.forEach((key, index) => {
    const suffix = key.slice(5), top = 1 - index / count;
    result[key] = {...layout[key], domain: [0, 1]};
    const domain = [top - 1 / count + 0.12, top - 0.05];
    result["yaxis" + suffix] = {...layout["yaxis" + suffix], domain};
    result.annotations = result.annotations.map((one, at) => at === index ?
      {...one, x: 0.5, y: domain[1] + 0.005} : one);
  });
  return result;
}
function draw(figure) {
  const inputs = [...figure.querySelectorAll(".controls [data-index]")];
  const views = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
  const plot = figure.querySelector(".plot");
  const show = () => {
    const choice = inputs.map(input => input.value).join("-");
    for (const input of inputs) if (input.type === "range")
      input.previousElementSibling.textContent = JSON.parse(input.dataset.options)[input.value];
    const view = move(views[choice]), placed = stack(view.layout);
    // Room for the buttons, which a phone always shows, and for the title of a colour bar.
    const top = narrow() || view.data.some(one => one.type === "heatmap") ? 34 : 10;
    const layout = {font: {family: "system-ui, sans-serif", size: 12, color: "#222"},
      margin: {l: 55, r: 15, t: top, b: 45}, paper_bgcolor: "white", plot_bgcolor: "white",
      hovermode: "closest",
      legend: {orientation: "h", y: -62 / (placed.height - 45 - top), yanchor: "top"}, ...placed};
    Plotly.react(plot, view.data, layout, {responsive: true, displaylogo: false,
      modeBarButtonsToRemove: ["select2d", "lasso2d"]});
    figure.dataset.shown = choice || "-";
  };
  // A page that follows runs is loaded again: what was chosen stays.
  const kept = (index, value) => { try {
    const name = location.pathname + "#" + figure.id + index;
    if (value !== undefined) sessionStorage.setItem(name, value);
    return sessionStorage.getItem(name);
  } catch { return null; } };
  const follows = document.getElementById("follows");
  inputs.forEach((input, index) => {
    const most = input.type === "range" ? Number(input.max) : input.options.length - 1;
    const before = follows && kept(index);
    if (before !== null && before !== undefined && before !== "" && Number(before) <= most)
      input.value = before;
    input.addEventListener("input", () => { if (follows) kept(index, input.value); show(); });
  });
  let before = narrow();
  window.addEventListener("resize", () => {
    if (narrow() !== before) { before = narrow(); show(); }
  });
  show();
}
// The data link of a figure: every value of every choice, as a long table.
function table(figure) {
  const inputs = [...figure.querySelectorAll(".controls [data-index]")];
  const options = inputs.map(input => input.type === "range" ? JSON.parse(input.dataset.options) :
    [...input.options].map(option => option.textContent));
  const names = inputs.map(input => input.parentNode.firstChild.textContent.trim());
  const quote = v => v === null || v === undefined ? "" : /[",\n]/.test(v) ?
    '"' + String(v).replace(/"/g, '""') + '"' : String(v);
  const rows = [[...names, "panel", "series", "x", "y", "low", "high", "text"]];
  const views = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
  for (const [key, view] of Object.entries(views)) {
    const words = inputs.length ? key.split("-").map((at, index) => options[index][at]) : [];
    for (const trace of view.data) {
      if (!trace.meta) continue;
      if (trace.type === "heatmap") {
        trace.z.forEach((line, r) => line.forEach((value, c) => rows.push(
          [...words, trace.meta.panel, trace.y[r], trace.x[c], value, null, null, null])));
        continue;
      }
      const {panel, series, low, high} = trace.meta;
      trace.x.forEach((x, at) => rows.push([...words, panel, series, x, trace.y[at],
        low && low[at], high && high[at], trace.text && trace.text[at]]));
    }
  }
  return rows.map(row => row.map(quote).join(",")).join("\n") + "\n";
}
for (const link of document.querySelectorAll("figure a.data")) {
  link.addEventListener("click", () => {
    const text = table(link.closest("figure"));
    link.href = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
  });
}
for (const link of document.querySelectorAll("section a.data")) {
  const area = document.createElement("textarea");
  area.innerHTML = link.nextElementSibling.textContent;
  link.href = URL.createObjectURL(new Blob([area.value], {type: "text/csv"}));
}
document.querySelectorAll("figure").forEach(draw);
"""
"""Draws every figure and answers its controls."""
