"""Run and data folders that are damaged, or made by a stranger: one line, no traceback, no harm.

A case damages one or two files of a folder at random, as bytes or as what they mean (a manifest
gets the seal that its forger would put on it), and gives it to a verb that reads it.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.main import get_command

import pretrain.__main__
from pretrain.checkpoint.manifest import SEAL, sealed
from pretrain.config.recipe import Config
from tests.recipe_fuzz import ODD, keys_of, misspelt, spoil
from tests.source_fuzz import DAMAGES
from tests.tools import assert_one_line, base_recipe, run, write_recipe

VERBS = get_command(pretrain.__main__.app)
KEYS = keys_of(Config)
PLAIN = [one for one in ODD if not isinstance(one, bytes)]

Damage = Callable[[random.Random, Path], None]


def as_bytes(rng: random.Random, path: Path) -> None:
    path.write_bytes(rng.choice(DAMAGES)(path.read_bytes() or b"x", rng))


def gone(rng: random.Random, path: Path) -> None:
    path.unlink()
    if rng.random() < 0.3:
        path.mkdir()
    elif rng.random() < 0.3:
        path.symlink_to("/nowhere")


def emptied(rng: random.Random, path: Path) -> None:
    path.write_bytes(rng.choice((b"", b"\n", b"{}", b"[]", b"null", b"0", b'""', b"[{}]")))


def change(rng: random.Random, tree: Any) -> Any:
    """A JSON value with one node of it replaced, renamed, doubled or taken away."""
    if isinstance(tree, dict) and tree and rng.random() < 0.85:
        key = rng.choice(list(tree))
        act = rng.random()
        if act < 0.15:
            del tree[key]
        elif act < 0.25:
            tree[misspelt(rng, key)] = tree.pop(key)
        else:
            tree[key] = change(rng, tree[key])
        return tree
    if isinstance(tree, list) and tree and rng.random() < 0.85:
        index, act = rng.randrange(len(tree)), rng.random()
        if act < 0.15:
            del tree[index]
        elif act < 0.25:
            tree.append(deepcopy(tree[index]))
        else:
            tree[index] = change(rng, tree[index])
        return tree
    return deepcopy(rng.choice(PLAIN))


def _json(value: Any) -> str:
    """JSON as a careless writer makes it: NaN and keys of any type included."""
    return json.dumps(value, default=str)


def in_json(rng: random.Random, path: Path) -> None:
    tree = json.loads(path.read_text())
    for _ in range(rng.choice((1, 1, 2))):
        tree = change(rng, tree)
    if isinstance(tree, dict) and SEAL in tree and "files" in tree:
        tree.pop(SEAL)
        path.write_bytes(sealed(json.loads(_json(tree))))
        return
    if isinstance(tree, dict):
        tree.pop("checksum", None)
    path.write_text(_json(tree))


def in_lines(rng: random.Random, path: Path) -> None:
    lines = path.read_text().splitlines()
    for _ in range(rng.choice((1, 3))):
        index = rng.randrange(len(lines))
        lines[index] = _json(change(rng, json.loads(lines[index])))
    path.write_text("\n".join(lines) + "\n")


def in_recipe(rng: random.Random, path: Path) -> None:
    tree, _ = spoil(rng, yaml.safe_load(path.read_text()), KEYS)
    path.write_text(yaml.safe_dump(tree))


def in_table(rng: random.Random, path: Path) -> None:
    table = pq.read_table(path)
    name = rng.choice(table.column_names)
    index, rows = table.column_names.index(name), table.num_rows
    odd = rng.choice((
        pa.nulls(rows), pa.array(["x"] * rows), pa.array([b"\xff"] * rows),
        pa.array([[1.0]] * rows),
        pa.array([math.nan] * rows), pa.array([math.inf] * rows), pa.array([-1] * rows),
        pa.array([2**62] * rows), pa.array([0.0] * rows), pa.array([True] * rows),
        pa.array([None, *[1.0] * (rows - 1)]), pa.array([1e308] * rows),
        pa.array([{"a": 1}] * rows),
    ))  # fmt: skip
    act = rng.random()
    if act < 0.2:
        table = table.remove_column(index)
    elif act < 0.3:
        table = table.slice(0, rng.choice((0, 1, rows // 2)))
    elif act < 0.4:
        table = pa.concat_tables([table, table])
    elif act < 0.5:
        table = table.replace_schema_metadata(
            {b"rankdecay.ranks": rng.choice((b"{", b"[]", b"1", b"{}"))}
        )
    else:
        table = table.set_column(index, name, odd)
    pq.write_table(table, path)


MEANT: dict[str, Damage] = {
    ".json": in_json, ".jsonl": in_lines, ".yaml": in_recipe, ".parquet": in_table,
}  # fmt: skip


def damage(rng: random.Random, path: Path) -> str:
    """Damage a file; returns how."""
    meant = MEANT.get(path.suffix, as_bytes)
    chosen = rng.choice((meant, meant, meant, as_bytes, gone, emptied))
    chosen(rng, path)
    return f"{path.name}: {chosen.__name__}"


class Trial:
    """Verbs on damaged copies of a stage, in this process."""

    def __init__(
        self, stage: Path, work: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        self._stage, self._work = stage, work
        self._patch, self._output = monkeypatch, capsys
        self.seen: Counter[int] = Counter()

    def __call__(self, seed: int, verbs: tuple[str, ...], files: list[str]) -> None:
        """Damage one or two of the files by the seed, and run one of the verbs."""
        rng = random.Random(seed)
        folder = self._work / "deep" / "folder"
        shutil.copytree(self._stage, folder, symlinks=True)
        self._patch.chdir(folder)
        chosen = rng.sample(files, rng.choice((1, 1, 2)))
        how = [damage(rng, folder / name) for name in chosen]
        words = rng.choice(verbs).split()
        code = run(self._patch, *words, command=VERBS)
        self._patch.chdir(self._work)
        err = self._output.readouterr().err
        self.seen[code] += 1
        told = (seed, how, words, err[-2500:])
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in err and code in (0, 1, 2), told
        assert len(errors) == (code != 0) or words[0] == "data", told
        assert all(len(line) < 1200 for line in errors) and "\x1b" not in err, told
        assert {one.name for one in self._work.iterdir()} == {"deep"}, told
        assert {one.name for one in (self._work / "deep").iterdir()} == {"folder"}, told
        shutil.rmtree(self._work / "deep")


@pytest.fixture(scope="module")
def stage(trained: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its data, by relative names."""
    folder = tmp_path_factory.mktemp("damaged") / "stage"
    shutil.copytree(data, folder / "data")
    write_recipe(folder / "recipe.yaml", base_recipe(Path("data")))
    for name in ("run", "study/run"):
        shutil.copytree(trained, folder / name)
        config = folder / name / "config.yaml"
        config.write_text(config.read_text().replace(str(data), "data"))
        (folder / name / "jumps.json").write_text("[1]")
    values = {
        "name": "s",
        "keys": [],
        "baseline": "run",
        "runs": {"run": {"point": "a", "given": {}}},
    }
    (folder / "study/sweep.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def trial(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Trial:
    return Trial(stage, tmp_path / "work", monkeypatch, capsys)


SMALL = ["config.yaml", "metrics.jsonl", "ranks.parquet", "evaluation.json", "identity.json",
         "environment.json", "jumps.json", "run-id"]  # fmt: skip
NEWEST = "checkpoints/step-00000006"
KEPT = [*SMALL, f"{NEWEST}/manifest.json", f"{NEWEST}/rank-00000.safetensors", "checkpoints/latest"]
DATA = ["data/manifest.json", "data/tokenizer.model", *(
    f"data/{split}/Github{end}" for split in ("train", "val", "test")
    for end in (".bin", ".idx", ".docs.npy", ".crc")
)]  # fmt: skip

REPORTS = (
    "report run --out out.html",
    "report run --format csv --out out",
    "report run --unfinished",
)
STUDIES = ("report study --out out.html", "report study --format csv --out out")
MODELS = ("evaluate run", "evaluate run@3 --out x.json", "export run --out out", "ranks run",
          "ranks run@* --out r.parquet", "train recipe.yaml --out run")  # fmt: skip
DATAS = ("data check data", "data info data", "data info data --json", "evaluate run --out x.json",
         "train recipe.yaml --dry-run", "export run --out out")  # fmt: skip
CASES: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "report": (REPORTS, [f"run/{name}" for name in SMALL]),
    "study": (STUDIES, ["study/sweep.json", *(f"study/run/{name}" for name in SMALL)]),
    "models": (MODELS, [f"run/{name}" for name in KEPT]),
    "data": (DATAS, DATA),
}


@pytest.mark.parametrize(
    ("what", "count"), [("report", 14), ("study", 6), ("models", 14), ("data", 12)]
)
def test_damaged(what: str, count: int, trial: Trial) -> None:
    for seed in range(count):
        trial(seed, *CASES[what])
    assert trial.seen[0] or trial.seen[1] + trial.seen[2] < count


@pytest.mark.long
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("what", CASES)
def test_damaged_at_length(what: str, part: int, trial: Trial) -> None:
    for seed in range(1000 + 200 * part, 1200 + 200 * part):
        trial(seed, *CASES[what])


def test_all_checkpoints_of_a_run_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "ranks", f"{tmp_path}@*") == 2
    assert_one_line(capsys.readouterr().err, (str(tmp_path), "no checkpoint"))
