"""The report of a sweep: its numbers, its page in a browser, its other forms, what it refuses."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import pretrain.report.printed
from pretrain.errors import UsageError
from pretrain.report import write_report
from pretrain.report.compare import holm, unpaired
from pretrain.report.interactive import figure_html
from pretrain.report.load import load_study
from pretrain.report.printed import draw
from pretrain.report.spec import Figure, Panel, Series, to_csv
from tests.tools import base_recipe, draw_small, run, write_recipe

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.fixture(scope="module")
def page(swept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the sweep's report."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    write_report([swept], out)
    return out


@pytest.fixture(scope="module")
def tables(
    swept: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, str]]]:
    """The report as CSV."""
    out = tmp_path_factory.mktemp("csv")
    write_report([swept], out, "csv")
    return {path.stem: list(csv.DictReader(path.open())) for path in out.glob("*.csv")}


def by_hand(swept: Path) -> dict[tuple[float, float], dict[int, dict[str, float]]]:
    """(λ_attention, λ_mlp) -> seed -> figures, from the run folders with numpy alone."""
    found: dict[tuple[float, float], dict[int, dict[str, float]]] = {}
    for folder in swept.glob("attention=*"):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        decay = config["optimizer"]["weight_decay"]
        overall = json.loads((folder / "evaluation.json").read_text())["overall"]
        table = pq.read_table(folder / "ranks.parquet").to_pydict()
        last = np.array(table["step"]) == max(table["step"])
        rank = np.array(table["pseudo_rank"])
        product = np.array(table["product"])
        found.setdefault((decay["attention"], decay["mlp"]), {})[config["seed"]] = {
            "perplexity": overall["perplexity"],
            "bits/byte": overall["bits_per_byte"],
            "rank W_QK": float(rank[last & (product == "qk")].mean()),
            "rank W_VP": float(rank[last & (product == "vp")].mean()),
        }
    return found


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_table_one(swept: Path, tables: dict[str, list[dict[str, str]]], page: Path) -> None:
    wanted = by_hand(swept)
    assert len(wanted) == 4 and all(len(seeds) == 2 for seeds in wanted.values())
    for key, title in (("perplexity", "perplexity"), ("bits_per_byte", "bits/byte")):
        rows = tables[key]
        assert len(rows) == 4
        for row in rows:
            place = float(row["lambda_attention"]), float(row["lambda_mlp"])
            values = np.array([figures[title] for figures in wanted[place].values()])
            assert float(row["mean"]) == pytest.approx(values.mean(), rel=1e-12)
            error = values.std(ddof=1) / math.sqrt(2)
            assert float(row["standard_error"]) == pytest.approx(error, rel=1e-9)
            # What a reader sees, rounded.
            digits = 4 if values.mean() < 10 else 2
            cell = f"{values.mean():.{digits}f} ± {error:.{digits}f}"
            assert cell in page.read_text()


@pytest.mark.slow
def test_paired_differences(swept: Path, tables: dict[str, list[dict[str, str]]]) -> None:
    found = by_hand(swept)
    baseline = found[0.0, 0.1]
    assert len(tables["differences"]) == 4 * 3
    for figure in ("perplexity", "bits/byte", "rank W_QK", "rank W_VP"):
        rows = [row for row in tables["differences"] if row["figure"] == figure]
        ps = []
        for row in rows:
            attention, mlp = (float(part.split("=")[1]) for part in row["condition"].split(","))
            gaps = np.array(
                [found[attention, mlp][s][figure] - baseline[s][figure] for s in baseline]
            )
            mean, error = gaps.mean(), gaps.std(ddof=1) / math.sqrt(2)
            assert float(row["difference"]) == pytest.approx(mean, rel=1e-9)
            ps.append(float(row["p"]))
            if error < 1e-12:  # equal in both seeds: no variance, no test
                assert math.isnan(float(row["low"])) and math.isnan(float(row["high"]))
                assert math.isnan(ps[-1]) and row["clear"] == "False"
                continue
            # Student's t with one degree of freedom is Cauchy's distribution: closed forms.
            half = math.tan(math.pi * 0.475) * error
            assert float(row["low"]) == pytest.approx(mean - half, rel=1e-6)
            assert float(row["high"]) == pytest.approx(mean + half, rel=1e-6)
            p = 1 - 2 * math.atan(abs(mean) / error) / math.pi
            assert ps[-1] == pytest.approx(p, rel=1e-6)
        known = [index for index, p in enumerate(ps) if not math.isnan(p)]
        corrected = np.array([float(row["p_holm"]) for row in rows])
        assert np.isnan(np.delete(corrected, known)).all()
        order = sorted(known, key=lambda index: ps[index])
        factors = np.arange(len(known), 0, -1)
        steps = np.maximum.accumulate(np.minimum(1, factors * np.array(ps)[order]))
        assert corrected[order] == pytest.approx(steps)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([0.02, math.nan])[0] == 0.02 and math.isnan(holm([0.02, math.nan])[1])


@pytest.mark.slow
def test_figures_are_of_the_runs(swept: Path, tables: dict[str, list[dict[str, str]]]) -> None:
    """The law's line, the heads and the exposure axis, recomputed."""
    folder = swept / "attention=5,mlp=0.1,seed=1"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    left = math.prod(
        (1 - row["learning_rate"] * 5.0) ** 2 for row in metrics if row["kind"] == "train"
    )
    law = [
        row for row in tables["discrepancy"]
        if row["series"].startswith("attention = 5, mlp = 0.1:") and float(row["x"]) == 50
    ]  # fmt: skip
    assert law and all(float(row["y"]) == pytest.approx(left, rel=1e-6) for row in law)
    exposure = sum(row["learning_rate"] * 5 for row in metrics if row["kind"] == "train")
    axis = {
        float(row["x"]) for row in tables["rank-over-decay"] if row["axis"].startswith("exposure")
    }
    assert any(math.isclose(x, exposure, rel_tol=1e-9) for x in axis) and 0.0 in axis
    for row in tables["bound"]:
        assert float(row["y"]) <= float(row["x"]) * (1 + 1e-9)
    heat = [row for row in tables["rank-by-head"] if row["step"] == "50"]
    assert len(heat) == 4 * 2 * 2 * 4  # conditions, products, layers, heads
    assert all(0 < float(row["y"]) <= 1 for row in heat)


# --- the page ------------------------------------------------------------------------------------

PROBE = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const found = {figures: [], errors: window.problems || []};
  for (const figure of document.querySelectorAll("figure")) {
    const plot = figure.querySelector(".plot"), before = figure.dataset.shown;
    const one = {id: figure.id, drawn: !!plot.querySelector("svg.main-svg"),
      traces: (plot.data || []).length, moved: []};
    for (const input of figure.querySelectorAll(".controls [data-index]")) {
      const old = input.value, was = JSON.stringify(plot.data);
      input.value = input.tagName === "SELECT" ? String(input.options.length - 1 - old) : "0";
      input.dispatchEvent(new Event("input"));
      one.moved.push([figure.dataset.shown !== before, JSON.stringify(plot.data) !== was]);
      input.value = old;
      input.dispatchEvent(new Event("input"));
    }
    const link = figure.querySelector("a.data");
    link.addEventListener("click", event => event.preventDefault());
    link.click();
    one.data = link.href.startsWith("blob:");
    found.figures.push(one);
  }
  const pre = document.createElement("pre");
  pre.id = "probe"; pre.textContent = JSON.stringify(found);
  document.body.append(pre);
}, 500));
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome here to open the page with")
@pytest.mark.parametrize("width", [1200, 400])
def test_in_a_browser(page: Path, tmp_path: Path, width: int) -> None:
    """From disk and without network: no errors, every figure drawn, every control at work."""
    text = page.read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text.split("<script>")[0])
    watch = "<script>window.problems=[];onerror=m=>window.problems.push(m);" \
        "console.error=(...m)=>window.problems.push(m.join(' '));</script>"  # fmt: skip
    copy = tmp_path / "page.html"
    copy.write_text(
        text.replace("<head>", f"<head>{watch}", 1).replace("</body>", f"{PROBE}</body>")
    )
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
         "--virtual-time-budget=20000", "--enable-logging=stderr", "--dump-dom",
         f"file://{copy}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert probe, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(probe.group(1)))
    assert found["errors"] == []
    assert len(found["figures"]) >= 7
    for figure in found["figures"]:
        assert figure["drawn"] and figure["traces"] and figure["data"], figure
        assert all(shown and changed for shown, changed in figure["moved"]), figure
    controls = {figure["id"]: len(figure["moved"]) for figure in found["figures"]}
    assert controls["rank-by-head"] == 3 and controls["rank-over-training"] == 2


# --- other forms ---------------------------------------------------------------------------


@pytest.mark.slow
def test_other_forms(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """In the short form, the first figure of each kind of file is drawn whole, the others small."""
    drawn: dict[tuple[str, str], bytes] = {}
    whole = request.config.getoption("--long")

    def draw_once(figure: Figure, kind: str) -> bytes:  # png is in md too, pdf in latex
        if (figure.key, kind) not in drawn:
            with pytest.MonkeyPatch.context() as patch:
                if not whole and kind in {kind for _, kind in drawn}:
                    draw_small(patch.setattr)
                drawn[figure.key, kind] = draw(figure, kind)
        return drawn[figure.key, kind]

    monkeypatch.setattr(pretrain.report.printed, "draw", draw_once)
    for form, name in (("md", "r.md"), ("latex", "r.tex"), ("png", "images"), ("pdf", "pdfs")):
        write_report([swept], tmp_path / name, form)
    images = list((tmp_path / "images").glob("*.png"))
    assert len(images) >= 7 and all(one.read_bytes()[1:4] == b"PNG" for one in images)
    printed = [one.stem for one in (tmp_path / "pdfs").glob("*.pdf")]
    assert sorted(printed) == sorted(one.stem for one in images)
    markdown = (tmp_path / "r.md").read_text()
    for image in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (tmp_path / image).is_file()
    assert "± " in markdown and "| condition |" in markdown
    latex = (tmp_path / "r.tex").read_text()
    if shutil.which("pdflatex"):
        done = subprocess.run(
            ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "r.tex"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:]
    parses(latex)


@pytest.mark.parametrize("kind", ["png", "pdf"])
def test_an_empty_panel_is_drawn(kind: str) -> None:
    """Under QK-norm some figures do not apply: no values, and logarithmic axes."""
    panel = Panel("nothing", "x", "y", [Series("a", [], [])], log_x=True, log_y=True, diagonal=True)
    figure = Figure("key", "title", "caption", [], lambda _: [panel])
    assert draw(figure, kind)
    assert "nothing" in figure_html(figure)
    assert to_csv(figure).count("\n") == 1


def test_conditions_with_policies(few: Path, tmp_path: Path) -> None:
    """Conditions whose short names are the same stay apart, and are no table of λ x λ."""
    for index, folder in enumerate(sorted(few.iterdir())):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        decay = config["optimizer"]["weight_decay"]
        decay |= {"attention": 5.0, "mlp": 0.1}
        decay["policies"] = [{"kind": "rank_target", "target": 0.5 + 0.1 * index}]
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    study = write_report([few], tmp_path / "r.html")
    names = [condition.name for condition in study.conditions]
    assert len(names) == len(set(names)) == 3
    assert all(name.startswith("policies = rank_target") for name in names)
    assert "λ_mlp" not in (tmp_path / "r.html").read_text().split("<figure")[0]


def parses(latex: str) -> None:
    """Braces and environments close, rows have the columns of their table, all is ASCII."""
    plain = re.sub(r"\\[{}\\]", "", latex)
    assert plain.count("{") == plain.count("}")
    stack: list[str] = []
    for verb, name in re.findall(r"\\(begin|end)\{(\w+)\}", latex):
        if verb == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack and latex.isascii()
    for columns, body in re.findall(
        r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", latex, re.S
    ):
        for row in re.findall(r"^(.*) \\\\$", body, re.M):
            assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1
    assert len(re.sub(r"\\\$", "", latex).split("$")) % 2 == 1


# --- what it refuses -----------------------------------------------------------------------


@pytest.fixture
def few(swept: Path, tmp_path: Path) -> Path:
    """Copies of three runs."""
    for name in ("attention=0,mlp=0.1,seed=1", "attention=5,mlp=0.1,seed=1",
                 "attention=5,mlp=1,seed=1"):  # fmt: skip
        shutil.copytree(swept / name, tmp_path / "runs" / name)
    return tmp_path / "runs"


@pytest.mark.slow
def test_corrupt_and_unfinished_folders_are_named(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "r.html")
    bad, short, fine = sorted(few.iterdir())
    (bad / "ranks.parquet").write_bytes(b"not a table")
    lines = (short / "metrics.jsonl").read_text().splitlines()
    (short / "metrics.jsonl").write_text("\n".join(lines[: len(lines) // 2]))
    assert run(monkeypatch, "report", str(few), "--out", out) == 0
    said = capfd.readouterr().err
    assert bad.name in said and short.name in said and "not finished" in said
    text = Path(out).read_text()
    assert "1 run in 1 condition" in text and html.escape(bad.name) in text
    assert run(monkeypatch, "report", str(few), "--out", out, "--unfinished") == 0
    assert "2 runs in 2 conditions" in Path(out).read_text()
    (fine / "evaluation.json").write_text("{")
    capfd.readouterr()
    assert run(monkeypatch, "report", str(few), "--out", out) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert "no finished run" in lines[-1] and "Traceback" not in "".join(lines)


@pytest.mark.slow
def test_other_data_is_refused(few: Path, tmp_path: Path) -> None:
    odd = few / "attention=5,mlp=1,seed=1"
    identity = odd / "identity.json"
    manifest = next((odd / "checkpoints").glob("step-*")) / "manifest.json"
    values, state = json.loads(identity.read_text()), json.loads(manifest.read_text())
    for key in ("tokenizer", "data"):
        identity.write_text(json.dumps({**values, key: "0" * 64}))
        with pytest.raises(UsageError, match=f"another {key}") as error:
            load_study([few])
        assert str(few) in str(error.value)
        # Without its hashes, a run's checkpoint still knows.
        identity.unlink()
        load_study([few])
        changed = {**state, "state": {**state["state"], key: "0" * 64}}
        manifest.write_text(json.dumps(changed))
        with pytest.raises(UsageError, match=f"another {key}"):
            load_study([few])
        manifest.write_text(json.dumps(state))
    identity.write_text(json.dumps(values))
    load_study([few])


@pytest.mark.slow
def test_unequal_starts_are_not_paired(few: Path, tmp_path: Path) -> None:
    whole = write_report([few], tmp_path / "a.html")
    assert unpaired(whole) == []
    path = few / "attention=5,mlp=0.1,seed=1" / "identity.json"
    identity = json.loads(path.read_text())
    path.write_text(json.dumps({**identity, "initial_weights": "0" * 64}))
    study = write_report([few], tmp_path / "csv", "csv")
    assert any("initial weights" in note for note in unpaired(study))
    rows = list(csv.DictReader((tmp_path / "csv" / "differences.csv").open()))
    pairs = {row["condition"]: row["pairs"] for row in rows}
    assert pairs["attention = 5, mlp = 0.1"] == "0" and pairs["attention = 5, mlp = 1"] == "1"


@pytest.mark.slow
def test_wrong_words(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(tmp_path))
    for words, part in (
        ([str(few), "--format", "docx"], "--format"),
        ([str(few), "--baseline", "attention = 9"], "is not one of the conditions"),
        ([str(tmp_path / "empty")], "no run folder"),
        ([str(tmp_path / "nowhere")], "nowhere"),
        ([str(recipe.parent / "recipe.yaml")], "recipe.yaml"),
        ([str(next(few.iterdir())), str(next(few.iterdir()))], "report only one of them"),
    ):
        assert run(monkeypatch, "report", *words, "--out", str(tmp_path / "x.html")) == 2, words
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert part in error and error.startswith("error: "), error
    assert not (tmp_path / "x.html").exists()
