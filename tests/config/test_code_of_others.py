"""Code runs where the user names it, and never because a folder of others does."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config.extension import Foreign, folder_of
from pretrain.config.recipe import load_config
from pretrain.errors import UsageError
from pretrain.sweep.config import load_sweep
from pretrain.sweep.run import describe
from tests.own_code import COSINE, EXAMPLE, FILE, recipe_with, write_example
from tests.tools import ATTENTION, ROOT, assert_one_line, pretrain, run, write_recipe

EVIL = """
from pathlib import Path

Path({sentinel!r}).write_text("ran")
""" + EXAMPLE  # fmt: skip
ENTRY = {"kind": "layer_cosine.py:LayerCosine", "roles": ["attention"]}


@pytest.fixture(scope="module")
def honest(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the page's policy, and the recipe beside it."""
    folder = tmp_path_factory.mktemp("honest")
    write_example(folder)
    values = recipe_with(data, COSINE, train={"steps": 2, "global_batch": 8})
    recipe = write_recipe(folder / "r.yaml", values)
    done = pretrain("train", str(recipe), "--out", str(folder / "run"))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def entry_of(tree: dict[str, Any]) -> dict[str, Any]:
    policy: dict[str, Any] = tree["optimizer"]["weight_decay"]["policies"][0]
    return policy


@pytest.fixture
def foreign(honest: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run folder whose recipe, checkpoints and copies name code that writes a file; that file."""
    run, sentinel = tmp_path / "foreign", tmp_path / "sentinel"
    shutil.copytree(honest / "run", run)
    evil = EVIL.format(sentinel=str(sentinel))
    digest = hashlib.sha256(evil.encode()).hexdigest()
    for place in (run, run / "code" / digest[:16], *(run / "code").iterdir(),
                  *(run / "checkpoints").glob("step-*")):  # fmt: skip
        place.mkdir(exist_ok=True)
        (place / FILE).write_text(evil)
    config = yaml.safe_load((run / "config.yaml").read_text())
    entry_of(config)["sha256"] = digest
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for path in run.glob("checkpoints/*/manifest.json"):
        manifest = json.loads(path.read_text())
        entry_of(manifest["config"])["sha256"] = digest
        manifest.pop("sha256")
        seal = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
        path.write_text(json.dumps({**manifest, "sha256": seal}))
    return run, sentinel


def test_a_run_folder_of_others_runs_nothing(
    foreign: tuple[Path, Path], honest: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Verbs that read it do their work; those that would train refuse in one line."""
    folder, sentinel = foreign
    out = str(tmp_path / "out")
    reads: tuple[tuple[str, ...], ...] = (
        ("report", str(folder), "--out", f"{out}.html"),
        ("evaluate", str(folder), "--documents", "2", "--out", f"{out}.json"),
        ("ranks", str(folder), "--out", f"{out}.parquet"),
        ("export", str(folder), "--out", f"{out}-export"),
    )
    for words in reads:
        assert run(monkeypatch, *words) == 0, (words, capfd.readouterr().err)
        assert not sentinel.exists(), words
    own = str(honest / "r.yaml")
    refused: tuple[tuple[str, ...], ...] = (
        ("train", str(folder / "config.yaml"), "--out", str(folder)),
        ("train", str(folder / "config.yaml"), "--out", out),
        ("train", str(folder / "config.yaml"), "--dry-run"),
        ("train", own, "--out", str(folder)),
        ("train", own, "--out", str(folder), "resume.decay=checkpoint"),
        ("launch", str(folder / "config.yaml"), "--print"),
        ("plan", str(folder / "config.yaml"), "--gpus", "1"),
        ("train", str(folder / "config.yaml"), "--dry-run", "--code", str(honest / FILE)),
    )
    capfd.readouterr()
    for words in refused:
        # What this process runs may have been named by an earlier test.
        assert run(monkeypatch, *words) == 2, words
        assert_one_line(capfd.readouterr().err, ("SHA-256",))
        assert not sentinel.exists() and not Path(out).exists(), words
    # To fork from its weights is no reason to run its code.
    assert run(monkeypatch, "train", own, "--out", out, "--fork", f"{folder}@2",
               "train.steps=3") == 0  # fmt: skip
    assert not sentinel.exists()
    # Named, it runs: whoever names it has read it.
    evil = folder / FILE
    assert run(monkeypatch, "train", str(folder / "config.yaml"), "--dry-run", "--code",
               str(evil)) == 0  # fmt: skip
    assert sentinel.read_text() == "ran"


MARKS: dict[str, Callable[[Path], object]] = {
    "a run": lambda path: (path / "run-id").write_text("0" * 8),
    "a run that has just begun": lambda path: (path / "environment.json").write_text("[]"),
    "a mirror's copy": lambda path: (path / "run.json").write_text("{}"),
    "a sweep": lambda path: (path / "sweep.json").write_text("{}"),
    "a run with checkpoints alone": lambda path: (path / "checkpoints/step-00000002").mkdir(
        parents=True, exist_ok=True
    ),
    "a run with metrics alone": lambda path: (path / "metrics.jsonl").write_text(""),
    "a run with hashes alone": lambda path: (path / "identity.json").write_text("{}"),
    "a checkpoint, or data": lambda path: (path / "manifest.json").write_text("{}"),
    "an exported model": lambda path: [
        (path / name).write_text("{}") for name in ("config.json", "model.safetensors")
    ],
}


@pytest.mark.parametrize("below", ["", "recipes", "a/b/c"])
@pytest.mark.parametrize("mark", MARKS)
def test_a_recipe_in_a_folder_of_this_program_runs_nothing(
    mark: str, below: str, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "found" / below
    folder.mkdir(parents=True)
    (folder / FILE).write_text(EVIL.format(sentinel=str(tmp_path / "sentinel")))
    for entry in (ENTRY, {**ENTRY, "kind": f"{folder / FILE}:LayerCosine"}):
        recipe = write_recipe(folder / "r.yaml", recipe_with(data, entry))
        MARKS[mark](tmp_path / "found")
        home = folder_of(recipe)
        assert isinstance(home, Foreign) and home.mark.is_relative_to(tmp_path / "found")
        (tmp_path / "link.yaml").unlink(missing_ok=True)
        (tmp_path / "link.yaml").symlink_to(recipe)
        for path in (recipe, tmp_path / "link.yaml"):
            with pytest.raises(UsageError, match=r"policies\[0\]\.kind: .*--code") as error:
                load_config(path, code=[])
            assert f"({home.mark} shows it)" in str(error.value)
    # Elsewhere it is a recipe of the user's, as any.
    moved = tmp_path / "mine"
    shutil.copytree(folder, moved, ignore=lambda *_: ["run-id", "environment.json", "run.json",
                    "sweep.json", "manifest.json", "config.json", "model.safetensors",
                    "checkpoints", "metrics.jsonl", "identity.json"])  # fmt: skip
    assert not (tmp_path / "sentinel").exists()
    assert load_config(moved / "r.yaml", ["seed=3"], code=[moved / FILE]).seed == 3
    assert (tmp_path / "sentinel").exists()


OTHERS = (
    {"manifest_version": 3, "name": "an extension", "version": "1.0"},
    {"name": "a page", "icons": [{"src": "icon.png"}]},
    {"main.js": "main.4f2.js"},
    [{"Config": "4a1.json", "Layers": ["1/layer.tar"]}],
    {"schemaVersion": 2, "layers": [], "config": {"size": 1}},
    {"production": {"url": "https://example.org"}},
    {"id": 1, "command": "make", "status": "done", "files": []},
)
"""Contents of JSON files of other programs."""
NAMES = ("manifest.json", "environment.json", "run.json", "sweep.json", "identity.json")


@pytest.mark.parametrize("below", ["", "recipes", "a/b/c"])
@pytest.mark.parametrize("name", NAMES)
def test_files_of_other_programs_show_nothing(name: str, below: str, tmp_path: Path) -> None:
    """A user's own recipe runs its code though a folder above has a file of such a name."""
    home = tmp_path / below
    home.mkdir(parents=True, exist_ok=True)
    for other in OTHERS:
        (tmp_path / name).write_text(json.dumps(other))
        assert folder_of(home / "r.yaml") == home, other


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_cannot_be_judged_shows_it(name: str, tmp_path: Path) -> None:
    """Empty, cut, huge, nested, a pipe: whatever may have been made of this program's own."""
    path = tmp_path / name
    odd = b'{"a": 1} ' + b" " * (1 << 20), b"[" * 100_000, b"\xff\xfe"
    for content in (b"", b"{", b"{}", b"[]", b"null", b"[{}]", b"[1]", *odd):
        path.write_bytes(content)
        assert folder_of(tmp_path / "r.yaml") == Foreign(path), content[:20]
    path.unlink()
    os.mkfifo(path)
    assert folder_of(tmp_path / "r.yaml") == Foreign(path)


def test_files_that_this_program_writes_show_it(honest: Path, data: Path, tmp_path: Path) -> None:
    """Each alone, as it is written now."""
    run = honest / "run"
    found = [run / "environment.json", run / "identity.json", data / "manifest.json",
             next(run.glob("checkpoints/*/manifest.json"))]  # fmt: skip
    about = {"run": "0" * 8, "folder": str(run)}
    (tmp_path / "run.json").write_text(json.dumps(about))
    recipe = write_recipe(tmp_path / "s/r.yaml", recipe_with(data))
    body = {"recipe": recipe.name, "seeds": [1], "grid": {ATTENTION: [0, 1]}}
    sweep = write_recipe(tmp_path / "s/s.yaml", body)
    (tmp_path / "sweep.json").write_text(json.dumps(describe(load_sweep(sweep))))
    for number, file in enumerate([*found, tmp_path / "run.json", tmp_path / "sweep.json"]):
        place = tmp_path / f"place{number}"
        place.mkdir()
        shutil.copy(file, place)
        assert folder_of(place / "r.yaml") == Foreign(place / file.name), file


def test_a_sweep_file_of_others_runs_nothing(data: Path, tmp_path: Path) -> None:
    """Its `set:`, grid and points can name no file, though its recipe is the user's."""
    theirs, sentinel = tmp_path / "theirs", tmp_path / "sentinel"
    theirs.mkdir()
    (theirs / FILE).write_text(EVIL.format(sentinel=str(sentinel)))
    values = recipe_with(data, ENTRY)
    values["optimizer"]["weight_decay"].pop("policies")
    recipe = write_recipe(tmp_path / "mine" / "r.yaml", values)
    key = "optimizer.weight_decay.policies"
    entry = [{**ENTRY, "kind": f"{theirs / FILE}:LayerCosine"}]
    for body in (
        {"set": {key: entry}, "grid": {"seed": [1]}},
        {"grid": {key: [entry, []]}},
        {"points": [{key: entry}]},
    ):
        path = write_recipe(theirs / "s.yaml", {"recipe": str(recipe), **body})
        (theirs / "sweep.json").unlink(missing_ok=True)
        (theirs / "sweep.json").write_text("{}")
        with pytest.raises(UsageError, match=r"sweep\.json shows it.*--code"):
            load_sweep(path)
        assert not sentinel.exists(), body
    (theirs / "sweep.json").unlink()
    load_sweep(path)
    assert sentinel.exists()


def test_only_verbs_that_train_let_recipes_run_code() -> None:
    """`load_config` runs nothing unless it is asked to: by these modules, of recipes that are
    named on the command line."""
    callers = set()
    for package in ("pretrain", "launchers", "models", "data_pipeline"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                name = ast.unparse(node.func).rpartition(".")[2]
                given = len(node.args) + len(node.keywords)
                if name == "load_config" and given > 2:
                    callers.add(str(file.relative_to(ROOT)))
                if name == "load_config" and any(one.arg == "code" for one in node.keywords):
                    callers.add(str(file.relative_to(ROOT)))
                if name in ("run_file", "run_code", "folder_of"):
                    callers.add(str(file.relative_to(ROOT)))
    assert callers == {
        "pretrain/__main__.py", "pretrain/cli/cluster.py", "launchers/launch.py",
        "pretrain/sweep/config.py", "pretrain/offline/import_model.py", "pretrain/cli/models.py",
        "pretrain/config/extension.py", "pretrain/config/recipe.py",
    }  # fmt: skip


def test_copies_are_written_through_no_link(
    honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A run folder of others with a link in the place of `code` gets nothing written elsewhere."""
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copytree(honest / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/code")
    (tmp_path / "run/code").symlink_to(outside)
    words = ("train", str(honest / "r.yaml"), "--out", str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000002")
    assert run(monkeypatch, *words) == 1
    assert_one_line(capfd.readouterr().err, ("code", "is a link"))
    assert not list(outside.iterdir())
