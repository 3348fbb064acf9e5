"""Shared fixtures: a small synthetic Pile-shaped corpus, its tokenizer and tokens."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zstandard

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# The suite starts some hundred processes, and compiling the program takes a second of each.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import torch

torch.set_num_threads(1)

import data_pipeline.disk
from data_pipeline.prepare import tokenize_sources, train_from_sources
from pretrain.config import mapping
from pretrain.config.recipe_yaml import load_yaml
from pretrain.runs.environment import environment as environment_of_run
from tests.checkpoints import STEPS, write_run
from tests.cpu_times import CpuTimes
from tests.forks import make_program_once
from tests.slurm import reason_to_skip, start_slurm, stop_slurm
from tests.tools import (
    ROOT,
    base_recipe,
    draw_small,
    environment,
    made_once,
    pretrain,
    pretrain_cold,
    sweep_words,
    write_recipe,
    write_sweep,
)

make_program_once()

if TYPE_CHECKING:
    from tests.kit import Kit


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--long``: the long form of the suite; ``--faults FILE``: the table of faults as JSON."""
    parser.addoption("--long", action="store_true", help="with the rows that make test leaves out")
    parser.addoption("--faults", default="", help="write the table of faults to this file (JSON)")
    parser.addoption("--cpu-times", default="", help="write each test's CPU seconds to this file")


def pytest_configure(config: pytest.Config) -> None:
    """What every process of the tests must know: the form, and whether times are measured."""
    if config.getoption("--long"):
        os.environ["TESTS_LONG"] = "1"
    if config.getoption("--cpu-times"):
        config.pluginmanager.register(CpuTimes(Path(config.getoption("--cpu-times"))))


LONG_FILES = (
    "report/test_paper", "decay/test_policies", "engine/test_flat_update", "engine/test_grid",
    "engine/test_speed", "sweep/test_sweep", "decay/test_decay_applied", "faults/test_processes",
    "checkpoint/test_resume", "tasks/test_tasks", "cluster/test_plan_truth", "report/test_report",
    "report/test_report_notes", "models/test_bf16", "cli/test_signals",
    "data_pipeline/test_source_limits", "engine/test_norms", "offline/test_exchange",
    "launchers/test_team", "engine/test_grid_sums", "distributed/test_main_process",
    "engine/test_initial_weights", "cli/test_bombs", "engine/test_raw_deepspeed",
    "ranks/test_later", "engine/test_layer_norms", "engine/test_grid_gradients",
    "runs/test_writing_pairs", "faults/test_files", "faults/test_numbers",
    "offline/test_evaluate_pretrained", "report/test_report_numbers", "engine/test_skipped",
    "data_pipeline/test_data", "cli/test_streams", "report/test_report_names",
    "offline/test_truncate", "decay/test_extending", "cluster/test_plan", "runs/test_asked",
    "distributed/test_replicas", "engine/test_private_deepspeed", "test_warm",
    "report/test_norm_figures", "report/test_print", "offline/test_import_meaning",
    "data_pipeline/test_children", "tasks/test_own_task", "ranks/test_cut_rank_tables",
    "report/test_findings", "config/test_shipped_recipes", "runs/test_owed_evaluation",
    "runs/test_finished", "config/test_code_of_others", "engine/test_passes", "cli/test_printed",
    "data_pipeline/test_spelling", "decay/test_rates_by_role", "cli/test_secrets",
    "config/test_recipe_fuzz", "runs/test_damaged_folders", "offline/test_exports",
    "faults/test_storage", "offline/test_evaluate_files", "faults/test_refused",
    "cli/test_every_signal", "cluster/test_announce", "api/test_python_page", "config/test_lengths",
    "data_pipeline/test_chapters", "runs/test_two_at_once", "models/test_models",
    "cli/test_mistakes", "cli/test_exits", "runs/test_folder_taken", "launchers/test_launch",
    "launchers/test_elastic", "report/test_report_again", "faults/test_machines",
    "runs/test_lock_files",
)  # fmt: skip
"""Files that take more than three seconds of CPU, about the longest first (`--cpu-times` tells)."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files begin first, so that workers end together; ``-m "not slow"`` leaves them out.

    Tests of the long form are skipped in the short one, and counted.
    """
    places = {f"tests/{name}.py": place for place, name in enumerate(LONG_FILES)}
    skip = pytest.mark.skip(reason="long form: make test-long")
    for item in items:
        if _file_of(item) in places:
            item.add_marker("slow")
        # Not `item.keywords`, which hold the names of cases too.
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(skip)
    items.sort(key=lambda item: places.get(_file_of(item), len(places)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Each worker first compiles a share of the test files, and then finds those of the others.

    Pytest rewrites the assertions of each file, which takes seconds, and keeps the result.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    paths = [ROOT / argument for argument in session.config.args]
    files = sorted({file for path in paths for file in path.rglob("test_*.py")})
    for file in files[number::count]:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        with contextlib.suppress(Exception, pytest.skip.Exception):  # collecting it tells
            importlib.import_module(name)


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What was injected, in how much time it was seen and mended, and what was lost."""
    rows = [
        found
        for report in terminalreporter.stats.get("passed", [])
        for name, found in report.user_properties
        if name == "fault"
    ]
    if not rows:
        return
    columns = list(rows[0])
    widths = [max(len(str(row[name])) for row in [dict(zip(columns, columns, strict=True)), *rows])
              for name in columns]  # fmt: skip
    terminalreporter.section("faults")
    for row in [
        dict(zip(columns, columns, strict=True)),
        *sorted(rows, key=lambda row: row["fault"]),
    ]:
        cells = (str(row[name]).ljust(width) for name, width in zip(columns, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
    if config.getoption("--faults"):
        whole = {
            "command": "make faults",
            "rows": sorted(rows, key=lambda row: row["fault"]),
            "environment": environment_of_run(),
        }
        Path(config.getoption("--faults")).write_text(json.dumps(whole, indent=1) + "\n")


WORDS = """
rank decay attention weight matrix head layer query key value singular spectrum balance the of and
a to in is that with for on as by it from at tensor pipeline grid loss step batch
""".split()  # noqa: SIM905


def make_text(rng: random.Random, sentences: int) -> str:
    """Some sentences from a small vocabulary, with the odd newline, tab and emoji."""
    parts = []
    for _ in range(sentences):
        words = [rng.choice(WORDS) for _ in range(rng.randint(4, 14))]
        parts.append(
            " ".join(words).capitalize() + rng.choice([". ", ".\n", "!\n\n", " 🙂 ", ".\t"])
        )
    return "".join(parts)


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Write .jsonl or .jsonl.zst."""
    data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress(data) if path.suffix == ".zst" else data)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three subsets in the Pile's format, split in train, val and test."""
    return made_once(tmp_path_factory, "corpus", write_corpus)


def write_corpus(folder: Path) -> None:
    """Documents of three subsets in turn."""
    rng = random.Random(0)
    for split, documents in (("train", 240), ("val", 24), ("test", 24)):
        records = [
            {
                "text": make_text(rng, rng.randint(2, 40)),
                "meta": {"pile_set_name": ("Github", "ArXiv", "Wikipedia (en)")[i % 3]},
            }
            for i in range(documents)
        ]
        write_jsonl(folder / f"{split}.jsonl.zst", records)


@pytest.fixture(scope="session")
def kit(data: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """Two of whatever the verbs read; nobody writes there."""
    from tests.kit import make_kit  # it imports other tests

    return make_kit(tmp_path_factory.mktemp("kit"), data, tokenizer)


@pytest.fixture(scope="session")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece model of the corpus."""

    def make(folder: Path) -> None:
        train_from_sources([str(corpus)], folder / "small.model", 400, "bpe")

    return made_once(tmp_path_factory, "tokenizer", make) / "small.model"


@pytest.fixture(scope="session")
def data(corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus, tokenised."""

    def make(folder: Path) -> None:
        tokenize_sources([str(corpus)], tokenizer, folder)

    return made_once(tmp_path_factory, "data", make)


@pytest.fixture
def recipe(data: Path) -> dict[str, Any]:
    """A recipe that trains in a second."""
    return base_recipe(data)


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, of a process that was started; tests must leave it as it is."""

    def make(folder: Path) -> None:
        recipe = write_recipe(folder / "recipe.yaml", base_recipe(data))
        done = pretrain_cold("train", str(recipe), "--out", str(folder / "run"))
        assert done.returncode == 0, done.stderr

    # A copy for this process: some tests lock it, or look whether it has changed.
    folder = tmp_path_factory.mktemp("cli")
    shutil.copytree(made_once(tmp_path_factory, "cli", make), folder, dirs_exist_ok=True)
    return folder / "run"


@pytest.fixture(scope="session")
def swept(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep, undisturbed; the report's tests read it too."""

    def make(folder: Path) -> None:
        words = sweep_words(write_sweep(folder, data), folder / "runs")
        done = pretrain(*words, timeout=500)
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "swept", make) / "runs"


@pytest.fixture
def small_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn small: for tests that do not look at them."""
    draw_small(monkeypatch.setattr)


_parse = cache(load_yaml)


@pytest.fixture
def parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text of a recipe is parsed only once: a report parses those of all its runs."""
    monkeypatch.setattr(mapping, "load_yaml", lambda text: deepcopy(_parse(text)))


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that failed is tried again at once."""
    monkeypatch.setattr(data_pipeline.disk, "_PAUSES", [0.0, 0.0])


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """The ``checkpoints`` of a small run: whole ones at `STEPS`."""
    return write_run(tmp_path / "run", STEPS)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a real two-node Slurm; skipped where it cannot be started."""
    reason = reason_to_skip()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    try:
        start_slurm(folder)
        yield {**environment(), "SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        stop_slurm(folder)


def pytest_collection_finish() -> None:
    """What exists by now stays: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()
