"""Random recipes, overrides and sweeps: each is prepared, or refused by one line with its key."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import pretrain.__main__
from pretrain.config.recipe import Config
from pretrain.sweep.config import SweepConfig
from tests.recipe_fuzz import ODD, keys_of, put, spoil
from tests.tools import base_recipe, run

KEYS = keys_of(Config)
SWEEP_KEYS = keys_of(SweepConfig)
VERBS = get_command(pretrain.__main__.app)
"""Made once: reading the signatures of all verbs takes longer than most trials."""


def bases(data: Path) -> list[dict[str, Any]]:
    """Recipes that are prepared: every dialect and task."""
    text = base_recipe(data)
    found = [text]
    for model in ({"dialect": "llama", "num_key_value_heads": 2}, {"dialect": "gpt_neox"}):
        found.append({**text, "model": {**text["model"], **model}})
    recall = {**deepcopy(text), "data": {}, "task": {"kind": "recall", "pairs": 4, "symbols": 8}}
    recall["model"]["context"] = 9
    images = {**deepcopy(text), "data": {}, "task": {"kind": "images"}}
    images["model"] = {
        "dialect": "vit", "image_size": 8, "patch_size": 2, "image_channels": 1,
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
    }  # fmt: skip
    return [*found, recall, images]


def names_of(changed: list[str]) -> set[str]:
    """What a message may call a changed key by: itself, its last part, or its section."""
    parts = {part for key in changed for part in key.split(".") if not part.isdigit()}
    return {ascii(part)[1:-1] for part in parts} | parts


class Trial:
    """One command on files that nobody meant, in this process."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._folder, self._patch, self._output = folder, monkeypatch, capsys
        self.seen: Counter[int] = Counter()
        monkeypatch.chdir(folder)

    def __call__(self, changed: list[str], what: Any, *words: str) -> None:
        """Run it; `what` is shown where it went wrong."""
        before = set(self._folder.rglob("*"))
        code = run(self._patch, *words, command=VERBS)
        output = self._output.readouterr()
        self.seen[code] += 1
        errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
        told = (what, output.err[-1500:])
        assert "Traceback" not in output.err, told
        assert set(self._folder.rglob("*")) == before, told
        assert output.err.isprintable() or "\x1b" not in output.err, told
        if code == 0:
            assert not errors, told
            json.loads(output.out, parse_constant=lambda word: pytest.fail(f"{word} {told}"))
            return
        # 1: what the recipe says of its data is not so.
        of_data = any(key.startswith(("data", "task", "evaluation")) for key in changed)
        assert code == 2 or (code == 1 and of_data), told
        assert len(errors) == 1 and len(errors[0]) < 1000, told
        is_at_line = re.search(r"\.yaml:\d+: ", errors[0])
        assert is_at_line or any(name in errors[0] for name in names_of(changed)) or code == 1, told


@pytest.fixture
def trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Trial:
    return Trial(tmp_path, monkeypatch, capsys)


def check_recipes(trial: Trial, data: Path, folder: Path, seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        tree, changed = spoil(rng, rng.choice(bases(data)), KEYS)
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree))
        words = ["train", str(path), "--dry-run", "--json"]
        if rng.random() < 0.3:  # the last change by an override instead
            key, value = rng.choice(KEYS), rng.choice(ODD)
            dotted = ".".join(map(str, key.path))
            words.append(f"{dotted}={yaml.safe_dump(value, default_flow_style=True).strip()}")
            changed.append(dotted)
        trial(changed, (seed, tree, words), *words)


def test_random_recipes(trial: Trial, data: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    check_recipes(trial, data, tmp_path, range(150))
    assert trial.seen[0] > 10 < trial.seen[2]


@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_random_recipes_at_length(part: int, trial: Trial, data: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    check_recipes(trial, data, tmp_path, range(1000 + 500 * part, 1500 + 500 * part))


@pytest.mark.long
@pytest.mark.parametrize("key", KEYS, ids=lambda key: ".".join(map(str, key.path)))
def test_every_value_at_every_key(key: Any, trial: Trial, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for number, value in enumerate((*ODD, *key.good)):
        tree = deepcopy(bases(data)[number % 5])
        put(tree, key.path, deepcopy(value))
        path.write_text(yaml.safe_dump(tree))
        changed = [".".join(map(str, key.path))]
        trial(changed, (key, value), "train", str(path), "--dry-run", "--json")


# --- sweeps -----------------------------------------------------------------------------------


def sweep_of(rng: random.Random) -> dict[str, Any]:
    """A sweep file as it may be meant."""
    decay = "optimizer.weight_decay.attention"
    tree: dict[str, Any] = {"recipe": "base.yaml", "grid": {decay: [0, 1.0]}, "seeds": [1, 2]}
    if rng.random() < 0.3:
        tree["grid"]["optimizer.learning_rate"] = {"from": 1e-3, "to": 1e-2, "count": 3}
    if rng.random() < 0.3:
        tree["exposure"] = {"optimizer.weight_decay.mlp": [0.1, 0.2]}
    if rng.random() < 0.3:
        tree["fork"] = {"step": 2, "set": {}}
    return tree


ODD_KEYS = (
    "", ".", "..", "a.", ".a", "/", "seed", "model", "a/../../b", "é", "x" * 300, "\x1b[2J",
    "[red]", "grid.0",
)  # fmt: skip


def keyed(rng: random.Random, tree: dict[str, Any]) -> list[str]:
    """Put random values at random keys of recipes into a random part of a sweep."""
    chosen = rng.choice(KEYS)
    key = ".".join(map(str, chosen.path)) if rng.random() < 0.8 else rng.choice(ODD_KEYS)
    known = chosen.good if chosen.good and rng.random() < 0.6 else ODD
    values = [deepcopy(rng.choice(known)) for _ in range(rng.choice((1, 2, 3)))]
    part = rng.choice(("grid", "set", "exposure", "points", "baseline"))
    if part in ("grid", "exposure"):
        tree.setdefault(part, {})[key] = values
    elif part == "points":
        tree["points"] = [{key: value} for value in values]
    else:
        tree[part] = {key: values[0]}
    return [part, key]


def check_sweeps(trial: Trial, data: Path, folder: Path, seeds: range) -> None:
    (folder / "base.yaml").write_text(yaml.safe_dump(base_recipe(data)))
    for seed in seeds:
        rng = random.Random(seed)
        tree = sweep_of(rng)
        if rng.random() < 0.5:
            tree, changed = spoil(rng, tree, SWEEP_KEYS)
        else:
            changed = keyed(rng, tree)
        path = folder / "sweep.yaml"
        path.write_text(yaml.safe_dump(tree))
        words = ("--out", str(folder / "runs"), "--dry-run", "--no-timing", "--json")
        trial([*changed, "sweep", "base"], (seed, tree), "sweep", str(path), *words)


def test_random_sweeps(trial: Trial, data: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").touch()
    check_sweeps(trial, data, tmp_path, range(100))
    assert trial.seen[0] > 2 < trial.seen[2]


@pytest.mark.long
@pytest.mark.parametrize("part", range(10))
def test_random_sweeps_at_length(part: int, trial: Trial, data: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").touch()
    check_sweeps(trial, data, tmp_path, range(1000 + 300 * part, 1300 + 300 * part))


def test_names_of_runs_stay_in_their_folder() -> None:
    """Whatever a key or value is called: a sweep's run is a folder in ``--out``."""
    from pretrain.sweep.config import _text, short_names

    for value in ODD:
        if isinstance(value, bytes):  # which YAML may hold, and a recipe not
            continue
        name = f"{short_names(['a.b'])['a.b']}={_text(value)}"
        assert Path(name).name == name and name not in (".", ".."), name


@pytest.mark.parametrize("letter", ["a", "é", "語", "😀"])
def test_long_names_of_runs_fit_a_folder(letter: str) -> None:
    from pretrain.sweep.config import _fitting

    names = [letter * count + end for count in (1, 50, 57, 58, 230, 1000) for end in ("", "x", "y")]
    found = [_fitting(name) for name in names]
    assert len(set(found)) == len(names)
    assert all(len(f"{name},seed=4294967295.yaml".encode()) <= 255 for name in found)
    assert all(new == old for old, new in zip(names, found, strict=True) if len(old.encode()) < 231)
