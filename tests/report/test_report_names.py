"""Names of subsets, runs, conditions and folders are shown as they are and never obeyed."""

from __future__ import annotations

import csv
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pretrain.cli.console import console, plain, show_table, warn
from pretrain.config.recipe import parse_config, value_at
from pretrain.report import print_summary, write_report
from pretrain.report.printed import draw
from pretrain.report.rank_figures import over_training
from pretrain.report.tables import tables_of
from pretrain.report.text import latex, markdown
from pretrain.runs.follow import Present
from pretrain.sweep.table import _rich_table
from tests.fake_runs import recipe, write_run
from tests.report.test_report import BROWSER, parses
from tests.tools import environment, run

NAMES = (
    "[/]",
    "[bold]x[/bold] [link=http://x]y",
    ":smile:",
    "<!--<script>",
    "</script><script>window.obeyed=1</script>",
    "<img src=x onerror=window.obeyed=1>",
    '"><svg onload=window.obeyed=1>',
    "</textarea><script>window.obeyed=1</script>",
    "\x1b]0;title\x07\x1b[31mred\x1b[2J",
    "\x9b31m",
    "a\rb\nc\td",
    "a|b||c",
    "$x$ \\frac$ $",
    "_hidden",
    "%{x} {{7*7}} ${y}",
    "日本 語 🙂",
    "\u202egnp.exe",
    "`code` **bold** ![i](x) [l](javascript:window.obeyed=1)",
    "\\ & # ~ ^ {",
    "not utf-8: \udcff",
    "a.b.c",
    "=1+1",
)


CONDITIONS = tuple(NAMES[i] for i in (0, 3, 5, 8, 11, 12, 13, 14, 19))


def write_named(folder: Path) -> Path:
    """A study whose subsets, runs, conditions and folder have these names."""
    rng = np.random.default_rng(0)
    folder = folder / "<!--<script> [b] \x1b[31m $"
    for number, name in enumerate(CONDITIONS):
        values = recipe(data__weights={name: 1.0 + number, "other": 1.0})
        path = folder / name.replace("/", "_")
        write_run(path, values, rng, subsets=("x", *(n for n in NAMES if "\udcff" not in n)))
    return folder


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_named(tmp_path_factory.mktemp("names"))


class Elements(HTMLParser):
    """Elements and attributes of a page, and the text of its scripts that are data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.data: list[str] = []
        self.cells: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        kind = dict(attrs).get("type") or ""
        self._in = kind if tag == "script" else tag
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "application/json":
            self.data.append(data)
        if self._in in ("td", "th"):
            self.cells[-1] += data


def test_a_page_shows_names(named: Path, tmp_path: Path) -> None:
    """Names are in cells as text; they add no element, attribute or script."""
    write_report([named], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    body, script, _ = text.partition("<script>/**")
    assert script and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", body)
    page = Elements(body + "</body></html>")
    assert set(page.tags) <= {
        "html", "head", "meta", "link", "title", "style", "body", "h1", "h2", "p", "nav", "a",
        "section", "div", "table", "thead", "tbody", "tr", "td", "th", "script", "figure", "label",
        "select", "option", "input", "output", "figcaption",
    }  # fmt: skip
    assert not [name for name in page.attributes if name.startswith("on")]
    assert page.tags.count("script") == len(page.data) + page.tags.count("section")
    for part in page.data:
        json.loads(part)
    cells = " ".join(page.cells)
    for name in NAMES:
        assert plain(name) in cells or plain(name.replace("\r", "\n")) in cells, name


def test_every_condition_is_its_own(named: Path, tmp_path: Path) -> None:
    """No two names become one row, in any form."""
    study = write_report([named], tmp_path / "csv", "csv")
    assert len(study.conditions) == len(CONDITIONS)
    rows = list(csv.DictReader((tmp_path / "csv" / "summary.csv").open(newline="")))
    assert len({row["condition"] for row in rows}) == len(CONDITIONS)
    tables, notes = tables_of(study), [f"left out: {name}" for name in NAMES]
    lines = markdown(study, tables, [], notes).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| condition |"))
    table = lines[start + 2 : start + 2 + len(CONDITIONS)]
    columns = len(re.findall(r"(?<!\\)\|", lines[start]))
    assert len(set(table)) == len(CONDITIONS)
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == columns for line in table), table
    assert not any("<" in line for line in lines)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\n".join(lines))
    parses(latex(study, tables, [], notes))
    assert draw(over_training(study))  # matplotlib reads formulas and hides names, too


@pytest.mark.parametrize("name", NAMES)
def test_a_terminal_obeys_no_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables, warnings and the sweep's own table print a name without its control characters."""
    from rich.table import Table

    if "\udcff" in name:
        assert plain(name) == r"not utf-8: \udcff"
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    show_table(table, 200)
    warn(name)
    found = capsys.readouterr()
    for text in (found.out, found.err):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text)
    assert plain(" ".join(name.split())) in found.err
    assert all(word in found.out for word in plain(name).expandtabs().split())
    stream = io.StringIO()
    task = SimpleNamespace(name=name, last=10)
    status: Any = SimpleNamespace(
        task=task, state="failed", step=1, present=Present(), seconds_left=None, note=name
    )
    console(file=stream, width=400, force_terminal=False).print(_rich_table(name, [status]))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", stream.getvalue())


def test_the_summary_of_named_runs(
    named: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pretrain.report.load
    from pretrain.report.load import load_study

    monkeypatch.setattr(pretrain.report.load, "_LONGEST", 10**6)  # every name whole
    print_summary(load_study([named]))
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[/]" in out and "<!--<script>" in out


def test_values_at_names_with_dots() -> None:
    config = parse_config(recipe(data__weights={"a.b": 0.25, "a": 0.5, "a.b.c": 0.75}))
    for name, value in (("a.b", 0.25), ("a", 0.5), ("a.b.c", 0.75)):
        assert value_at(config, f"data.weights.{name}") == value
    assert value_at(config, "data.weights.b") is None and value_at(config, "seed.x") is None


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(e, marks=pytest.mark.long) for e in ("latin-1", "utf-8"))]
)
def test_any_encoding_and_any_folder(tmp_path: Path, encoding: str) -> None:
    """A report that was written is never followed by a traceback."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/runs \xff\xfe \xc3\xa9"))
    for seed in (1, 2):
        values = recipe(seed=seed)
        write_run(folder / f"λ {seed}", values, np.random.default_rng(seed), subsets=("日本", "x"))
    out = tmp_path / "r.html"
    words = [sys.executable, "-m", "pretrain", "report", str(folder), "--out", str(out)]
    done = subprocess.run(
        [os.fsencode(word) for word in words],
        env={**environment(), "PYTHONIOENCODING": encoding},
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert "日本" in out.read_text(encoding="utf-8")


@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome here to open the page with")
def test_a_browser_obeys_no_name(named: Path, tmp_path: Path) -> None:
    """Every figure is drawn, nothing of a name ran, and the tables are whole."""
    write_report([named], tmp_path / "r.html")
    probe = """<script>addEventListener("load", () => setTimeout(() => {
      const pre = document.createElement("pre"); pre.id = "probe";
      pre.textContent = JSON.stringify({obeyed: window.obeyed || 0, problems: window.problems,
        rows: document.querySelectorAll("#summary tbody tr").length,
        figures: document.querySelectorAll("figure").length,
        drawn: document.querySelectorAll("figure svg.main-svg").length,
        foreign: document.querySelectorAll("table img, table svg, table script, h1 *").length,
        data: [...document.querySelectorAll("section a.data")].every(
          a => a.href.startsWith("blob:"))});
      document.body.append(pre);
    }, 500));</script>"""
    watch = "<script>window.problems=[];onerror=m=>window.problems.push(m);</script>"
    copy = tmp_path / "copy.html"
    text = (tmp_path / "r.html").read_text()
    copy.write_text(
        text.replace("<head>", f"<head>{watch}", 1).replace("</body>", f"{probe}</body>")
    )
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
         "--dump-dom", f"file://{copy}"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    values = json.loads(html.unescape(found.group(1)))
    assert values["obeyed"] == 0 and values["problems"] == [] and values["foreign"] == 0, values
    assert values["rows"] == len(CONDITIONS) and values["data"], values
    assert values["drawn"] >= values["figures"] >= 7, values


def test_the_command_on_named_runs(
    named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The whole command, with a run left out under each name."""
    folder = tmp_path / "some"
    for path in sorted(named.iterdir())[:6]:
        shutil.copytree(path, folder / path.name)
        (folder / path.name / "ranks.parquet").write_bytes(b"damaged")
    shutil.copytree(sorted(named.iterdir())[-1], folder / "good")
    assert run(monkeypatch, "report", str(folder), "--out", str(tmp_path / "r.html")) == 0
    found = capfd.readouterr()
    assert found.err.count("left out") == 6 and "\x1b" not in found.err + found.out
