"""A second report into the same folder, and reports of what is large."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import pretrain.report.printed
from pretrain.errors import RunError
from pretrain.ranks.columns import column_of
from pretrain.ranks.table import read_rank_columns, read_ranks
from pretrain.report import write_report
from pretrain.report.read_run import load_run
from pretrain.runs.metrics import read_all_metrics, read_metrics
from pretrain.runs.records import FIGURES
from tests.fake_runs import recipe, write_run, write_study
from tests.tools import ROOT, environment
from tests.tools import run as command


def figures(folder: Path) -> set[str]:
    return {one.name for one in folder.iterdir() if not one.name.startswith(".")}


def stems(folder: Path, form: str) -> set[str]:
    """Names of the files of a report of one run, without their endings."""
    one = write_run(folder / "one", recipe(), np.random.default_rng(0))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pretrain.report.printed, "draw", lambda *_: b"")
        write_report([one], folder / "r", form)
    return {Path(name).stem for name in figures(folder / "r")}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The figures of one run, in whatever format."""
    return stems(tmp_path_factory.mktemp("drawn"), "png")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The tables of one run."""
    return stems(tmp_path_factory.mktemp("tables"), "csv")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("form", ["csv", "png", "md", "latex"])
def test_figures_of_an_earlier_report_go(
    form: str, drawn: set[str], tables: set[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Of ours alone: not what somebody put there or changed, not those of another form."""
    many = write_study(tmp_path / "many", decays=(0.0, 1.0), seeds=(1, 2))
    one = write_run(tmp_path / "one", recipe(), np.random.default_rng(0))
    # Spectra are a figure that runs without stored singular values do not have.
    for run in many.iterdir():
        if (run / "ranks.parquet").exists():
            with_spectra(run / "ranks.parquet")
    out = tmp_path / "out/r"
    folder = out if form in ("csv", "png") else out.with_name("r-figures")
    ending = {"md": "png", "latex": "pdf"}.get(form, form)
    names = {f"{stem}.{ending}" for stem in (tables if form == "csv" else drawn)}
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    write_report([many], out, form)
    assert figures(folder) - names >= {f"spectra.{ending}", "mine.txt"}
    changed = folder / f"paired.{ending}"
    has_changed = changed.exists() and changed.name not in names
    if has_changed:
        changed.write_text("changed by a person")
    other = {"md": "latex", "latex": "md"}.get(form)
    if other:
        write_report([one], out.with_suffix(".other"), other)
        before = {name for name in figures(folder) if not name.endswith(ending)}
    write_report([one], out, form)
    left = {"mine.txt"} | ({changed.name} if has_changed else set()) | (before if other else set())
    assert figures(folder) == names | left
    assert ("changed since" in capsys.readouterr().err) == has_changed


def with_spectra(path: Path) -> None:
    table = pq.read_table(path)
    values = [[2.0, 1.0, 0.0]] * len(table)
    pq.write_table(table.append_column("singular_values", pa.array(values)), path)


@pytest.mark.parametrize(
    ("form", "taken"),
    [
        ("csv", "r.md"),
        ("png", "r.md"),
        ("pdf", "r.md"),
        ("md", "r-figures"),
        ("latex", "r-figures"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_refused_at_once(
    form: str, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Before anything is read: these runs do not exist."""
    (tmp_path / taken).write_text("mine")
    words = ["report", "runs", "--format", form, "--out", str(tmp_path / "r.md")]
    assert command(monkeypatch, *words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{taken}: is a file, but --format {form} needs a folder there" in said
    assert [one.name for one in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text() == "mine"


def test_columns_are_the_rows(trained: Path, tmp_path: Path) -> None:
    """Row by row, also where two files have a step, and where a figure is missing."""
    rows, columns = read_ranks(trained), read_rank_columns(trained)
    assert len(rows) == len(columns) and columns.names == list(rows[0])
    for row, found in zip(rows, columns, strict=True):
        for name, value in row.items():
            same = value == found[name] or (value is None and np.isnan(found[name]))
            assert same or np.isnan(value), (name, value, found[name])
    assert "step" in columns[0] and "nothing" not in columns[0]
    for kind, name in (("train", "weight_decay"), ("train", "loss"), ("evaluation", "loss")):
        metrics = read_all_metrics(trained)
        part = metrics.updates if kind == "train" else metrics.held_out
        assert list(column_of(part, name)) == [row[name] for row in read_metrics(trained, kind)]
    (tmp_path / ".ranks").mkdir()
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "ranks.parquet")
    late = [{**row, "pseudo_rank": 0.25} for row in rows if row["step"] == 3]
    pq.write_table(pa.Table.from_pylist(late[::-1]), tmp_path / ".ranks/00000003.parquet")
    wanted = {tuple(map(row.get, KEYS)): row["pseudo_rank"] for row in read_ranks(tmp_path)}
    found_rows = read_rank_columns(tmp_path)
    assert {tuple(row[k] for k in KEYS): row["pseudo_rank"] for row in found_rows} == wanted
    assert len(found_rows) == len(wanted)
    steps = list(column_of(found_rows, "step"))
    assert steps == sorted(steps)


KEYS = ("step", "layer", "product", "level", "head")


def large(folder: Path, updates: int, measured: int) -> Path:
    """A run of so many updates and measurements."""
    run = write_run(folder, recipe(model__num_layers=4), np.random.default_rng(0))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    update = next(row for row in rows if row["kind"] == "train")
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, updates + 1):
            file.write(json.dumps({**update, "step": step, "loss": 5 + 1 / step}) + "\n")
        file.write(json.dumps({"kind": "evaluation", "step": updates, "loss": 5.0}) + "\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train"]["steps"] = updates
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps({**evaluation, "step": updates}))
    table = pq.read_table(run / "ranks.parquet")
    first = table.filter(pa.compute.equal(table["step"], 40))
    first = first.append_column("singular_values", pa.array([[1.0] * 16] * len(first)))
    steps = sorted({round(updates * i / (measured - 1)) for i in range(measured)})
    index = first.schema.get_field_index("step")
    with pq.ParquetWriter(run / "ranks.parquet", first.schema) as writer:
        for step in steps:
            writer.write_table(first.set_column(index, "step", pa.array([step] * len(first))))
    return run


def memory_of_a_report(run: Path, out: Path) -> int:
    """MiB at the most, in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from pretrain.report import write_report;"
        "write_report([Path(sys.argv[1])], Path(sys.argv[2]));"
        "print([x for x in open('/proc/self/status') if x.startswith('VmHWM')][0].split()[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), str(out)], env=environment(), cwd=ROOT, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    return int(done.stdout.split()[-1]) >> 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.long
def test_memory_of_a_large_report(tmp_path: Path) -> None:
    """Of 1.5 million updates (300 MB) and 448,000 rows of ranks: under 1 GB, in two minutes."""
    big = large(tmp_path / "big", 1_500_000, 14_000)
    began = time.monotonic()
    most = memory_of_a_report(big, tmp_path / "big.html")
    size = (big / "metrics.jsonl").stat().st_size >> 20
    print(f"\nmetrics.jsonl {size} MiB: {most} MiB in {time.monotonic() - began:.0f} s")
    assert most < 1000


def test_a_run_is_read_into_little_memory(tmp_path: Path) -> None:
    """Bytes that an update and a row of ranks take: as dictionaries both take a kilobyte."""
    updates, measured = 4000, 100
    run = large(tmp_path / "run", updates, measured)
    load_run(run)  # what is imported or compiled
    tracemalloc.start()
    try:
        found = load_run(run)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    rows = len(found.ranks)
    assert (len(found.metrics), rows) == (updates, 32 * measured)
    assert kept < 80 * updates + 250 * rows + 100_000, kept
    assert most < 2 * kept + (36 << 20), most  # a small file is read with room for the largest


@pytest.mark.parametrize("kind", ["train", "evaluation", "event"])
def test_a_line_of_metrics_without_a_figure(kind: str, trained: Path, tmp_path: Path) -> None:
    """Each figure in turn: the file, the line and the figure are named."""
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    lines.append(json.dumps({"kind": "event", "step": 1, "message": "x"}))
    number = next(i for i, line in enumerate(lines) if json.loads(line)["kind"] == kind)
    needed = {"train": (*FIGURES, "weight_decay"), "evaluation": ("loss",), "event": ("message",)}
    for name in (*needed[kind], "step"):
        row = json.loads(lines[number])
        del row[name]
        changed = [*lines[:number], json.dumps(row), *lines[number + 1 :]]
        (tmp_path / "metrics.jsonl").write_text("\n".join(changed) + "\n")
        with pytest.raises(RunError, match=rf"metrics\.jsonl:{number + 1}: .*{name}"):
            read_all_metrics(tmp_path)
