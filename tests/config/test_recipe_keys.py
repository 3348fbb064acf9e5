"""The page of every key of a recipe is what the classes that validate it say."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import yaml

from pretrain.config.mapping import apply_value_overrides
from pretrain.config.recipe import Config, apply_overrides, load_config
from pretrain.config.reference import KeyTable, markdown, tables
from pretrain.errors import UsageError
from tests.recipe_fuzz import keys_of

PAGE = Path(__file__).resolve().parent.parent.parent / "docs/recipe.md"


def sections() -> list[KeyTable]:
    """The tables of sections; those of lists' entries are left out."""
    return [table for table in tables() if ":" not in table.title]


def dotted(table: KeyTable, name: str) -> str:
    return name if table.title == "The top level" else f"{table.title}.{name}"


def test_the_page_is_made_from_the_classes() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), (
        "run: python -m pretrain.config.reference > docs/recipe.md"
    )


def test_every_key_is_there_once_and_says_what_it_means() -> None:
    shown = [dotted(table, key.name) for table in sections() for key in table.keys]
    assert len(set(shown)) == len(shown)
    wanted = {
        ".".join(map(str, key.path))
        for key in keys_of(Config)
        if key.good and not any(isinstance(part, int) for part in key.path)
    }
    assert {name for name in wanted if name.rpartition(".")[0] not in shown} <= set(shown)
    assert not [key.name for table in tables() for key in table.keys if not key.meaning]


def test_the_defaults_are_those_of_a_recipe_without_keys() -> None:
    tried = 0
    for table in sections():
        for key in table.keys:
            if key.default.startswith("`"):
                changed = apply_overrides(
                    Config(), [f"{dotted(table, key.name)}={key.default[1:-1]}"]
                )
                assert changed == Config(), key
                tried += 1
    assert tried > 80


def test_an_error_names_who_set_the_key(tmp_path: Path) -> None:
    """The command line for what an override sets, the file for all else."""
    recipe = tmp_path / "r.yaml"
    refused = 0
    for table in sections():
        for key in table.keys:
            section, name = table.title.split("."), dotted(table, key.name)
            recipe.write_text("seed: 1\n")
            error = problem_of(recipe, [f"{name}=[[1]]", "seed=2"])
            assert not error or error.startswith(f"command line: {name}"), error
            refused += bool(error)
            tree: Any = {key.name: [[1]]}
            for part in reversed(section if table.title != "The top level" else []):
                tree = {part: tree}
            recipe.write_text(yaml.safe_dump(tree))
            error = problem_of(recipe, ["data.prefetch=2"] if name != "data.prefetch" else [])
            assert not error or error.startswith(f"{recipe}: {name}"), error
    assert refused > 90


SETTINGS = (
    "grid.pipeline_parallel=2", "grid.zero_stage=0", "grid.zero_stage=2", "grid.zero_stage=3",
    "grid.tensor_parallel=4", "model.num_layers=1", "model.num_attention_heads=2",
    "model.num_attention_heads=5", "model.hidden_size=60", "model.hidden_size=48",
    "model.num_key_value_heads=3", "model.dialect=llama", "speed.compile=true", "precision=bf16",
    "speed.update=deepspeed", "optimizer.name=muon", "train.global_batch=6", "train.micro_batch=4",
)  # fmt: skip


def test_an_override_that_breaks_a_rule_over_two_keys_is_blamed(tmp_path: Path) -> None:
    """Whichever of the two keys the message names; the file is, where it is wrong by itself."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{}")
    alone = [one for one in SETTINGS if not problem_of(recipe, [one])]
    assert len(alone) > 12
    broken = 0
    for first, second in itertools.permutations(alone, 2):
        tree: dict[str, Any] = {}
        apply_value_overrides(tree, [first])
        recipe.write_text(yaml.safe_dump(tree))
        if error := problem_of(recipe, [second]):
            assert error.startswith("command line: "), (first, second, error)
            broken += 1
    assert broken >= 8
    recipe.write_text("grid: {pipeline_parallel: 2, zero_stage: 2}\n")
    assert problem_of(recipe, ["seed=2"]).startswith(f"{recipe}: ")


def problem_of(recipe: Path, overrides: list[str]) -> str:
    try:
        load_config(recipe, overrides)
    except UsageError as error:
        return str(error)
    return ""
