"""Recipes and overrides are read as people mean them, or refused in one line."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config.recipe import Config, dump_config, load_config, parse_config
from pretrain.config.recipe_yaml import RecipeError, load_yaml
from pretrain.errors import UsageError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", "010"), ("1:30", "1:30"), ("on", "on"), ("no", "no"), ("true", True), ("0x10", 16),
        ("-7", -7), ("1_000", 1000), ("3e-4", "3e-4"), ("1.5E+3", 1500.0), (".5", 0.5),
        ("null", None),
        ("", None), ("~", None), (".inf", float("inf")), ("2020-01-01", "2020-01-01"), ("0", 0),
        ("[1, 2.0, a]", [1, 2.0, "a"]), ("1.2.3", "1.2.3"), ("+3", 3), ("0o17", "0o17"),
    ],
)  # fmt: skip
def test_plain_values(text: str, value: Any) -> None:
    found = load_yaml(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_dumped_is_read_back(seed: int) -> None:
    draw = random.Random(seed)
    words = ["010", "1:30", "yes", "null", "1e5", "~", "", "0x1f", "a: b", "true", "é", "<<", ".5"]
    value = {
        word: draw.choice([draw.random() * 10 ** draw.randint(-9, 9), draw.randint(-9, 9**9), word])
        for word in draw.sample(words, 6)
    }
    assert load_yaml(yaml.safe_dump(value)) == value


def test_a_recipe_is_read_back() -> None:
    config = Config()
    assert parse_config(load_yaml(dump_config(config))) == config


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("flow", [True, False])
def test_a_key_given_twice_is_refused_with_both_lines(depth: int, flow: bool) -> None:
    inner = "{a: 1, b: 2, a: 3}" if flow else "a: 1\nb: 2\na: 3"
    lines = [f"{'  ' * level}k{level}:" for level in range(depth)]
    lines += ["  " * depth + line for line in inner.splitlines()]
    first = depth + 1
    with pytest.raises(RecipeError, match=f"a: is given on line {first} and again on line") as told:
        load_yaml("\n".join(lines))
    assert told.value.line == (first if flow else first + 2)


def test_merged_keys_may_be_given_again() -> None:
    text = "base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  a: 3\n"
    assert load_yaml(text)["other"] == {"a": 3, "b": 2}


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        (b"seed: 1\noptimizer: {learning_rate: 1}\nseed: 2\n", "line 1 and again on line 3"),
        (b"[" * 5000, "nested too deeply"),
        ("seed: 1".encode("utf-16"), "not UTF-8"),
        ("# caf\u00e9\nseed: 1".encode("latin-1"), "not UTF-8"),
        (b"seed: true\n", "seed: must be a number, got true"),
        (b"train: {steps: true}\n", "train.steps: must be a number"),
        (b"train: {steps: 1:30}\n", "train.steps"),
        (b"seed: " + b"9" * 5000, "not valid YAML"),
    ],
)
def test_recipes_that_are_refused(tmp_path: Path, text: bytes, culprit: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    with pytest.raises(UsageError, match=culprit) as told:
        load_config(path)
    assert str(path) in str(told.value) and "\n" not in str(told.value)


def test_a_pipe_is_refused_with_its_mend(tmp_path: Path) -> None:
    """What a shell gives for `<(...)`; a file that is not there has another mend."""
    os.mkfifo(tmp_path / "pipe")
    for path, mend in ((tmp_path / "pipe", "; save it as a file"), (tmp_path / "none", ")")):
        with pytest.raises(UsageError) as told:
            load_config(path)
        said = str(told.value)
        assert said.startswith(f"{path}: cannot read the recipe (") and said.endswith(mend)


@pytest.mark.parametrize(
    "override", ["seed=true", "train.steps=1:30", "train.steps=[" + "[" * 4000]
)
def test_overrides_that_are_refused(tmp_path: Path, override: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 3\n")
    with pytest.raises(UsageError):
        load_config(path, [override])


def test_a_leading_zero_is_decimal(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes("\ufeffseed: 3\n".encode())
    assert load_config(path).seed == 3
    assert load_config(path, ["seed=010"]).seed == 10
    assert load_config(path, ["optimizer.learning_rate=3e-4"]).optimizer.learning_rate == 3e-4
