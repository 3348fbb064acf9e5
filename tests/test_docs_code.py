"""The code of README and docs: commands that exist, files that load; the long form runs them."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.sources import find_sources
from launchers.site import load_site
from pretrain.config.recipe import Config, apply_overrides, load_config
from pretrain.decay.registry import POLICIES
from pretrain.sweep.config import load_sweep
from tests.docs_code import LANGUAGES, Block, Reader, blocks_of, commands_in, parse
from tests.own_code import write_example
from tests.test_docs_links import NAMES
from tests.tools import ROOT

BLOCKS = [block for name in NAMES if name != "SECURITY.md" for block in blocks_of(name)]
SHELL = [block for block in BLOCKS if block.language == "sh"]
MADE = {name for block in BLOCKS if (name := block.file)}
"""Files that a page asks the reader to write."""


def identity(block: Block) -> str:
    return f"{block.page}:{block.line}"


def test_every_block_has_a_language() -> None:
    text = {name: (ROOT / name).read_text("utf-8") for name in NAMES}
    assert [identity(block) for block in BLOCKS if block.language not in LANGUAGES] == []
    fences = sum(len(re.findall(r"^```", one, re.M)) for one in text.values())
    assert fences == 2 * sum(len(blocks_of(name)) for name in NAMES)


def problem_of(words: list[str]) -> str:
    """What is wrong with a command of a page; empty if nothing is."""
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        named = [word for word in words[1:] if "=" not in word]
        return "" if set(named) <= set(targets) else f"no target {named}"
    if words[0] != "pretrain":
        return ""
    try:
        values = parse(words[1:])
        recipe = values.get("recipe")
        if recipe is None or str(recipe) in MADE:
            apply_overrides(Config(), values.get("overrides") or [])
        else:
            load_config(ROOT / recipe, values.get("overrides"), [])
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


@pytest.mark.parametrize("block", SHELL, ids=identity)
def test_commands_are_those_of_the_program(block: Block) -> None:
    wrong = {" ".join(words): problem_of(words) for words in commands_in(block.text)}
    assert {words: problem for words, problem in wrong.items() if problem} == {}


@pytest.mark.parametrize("line", [
    "pretrain nothing", "pretrain train", "pretrain train x.yaml --dryrun", "make nothing",
    "pretrain train configs/no.yaml", "pretrain train configs/gpt-tiny.yaml train.step=3",
    "pretrain data tokenize texts.jsonl --out x", "pretrain evaluate runs/x --stride many",
    "pretrain train configs/gpt-tiny.yaml optimizer.weight_decay.policies=[{kind: none}]",
])  # fmt: skip
def test_a_wrong_command_is_seen(line: str) -> None:
    (words,) = commands_in(line)
    assert problem_of(words)


def own_files(folder: Path) -> None:
    """The files that the pages name, beside the recipe."""
    write_example(folder)
    for block in BLOCKS:
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "yaml"], ids=identity
)
def test_files_of_the_pages_load(block: Block, tmp_path: Path) -> None:
    """As recipe, sweep, site file or list of policies: as what its keys say."""
    own_files(tmp_path)
    (tmp_path / "gpt-tiny.yaml").write_text((ROOT / "configs/gpt-tiny.yaml").read_text())
    values: dict[str, Any] = yaml.safe_load(block.text)
    if set(values) == {"policies"}:
        values = {"optimizer": {"weight_decay": values}}
    path = tmp_path / (block.file or "block.yaml")
    path.write_text(yaml.safe_dump(values))
    if "seeds" in values:
        assert load_sweep(path)
    elif "nodes" in values:
        assert load_site(path, {})
    else:
        assert load_config(path, [], []) != Config()


def test_the_entry_points_of_a_package_are_those_that_are_asked_for() -> None:
    (block,) = [block for block in BLOCKS if block.language == "toml"]
    (group,) = re.findall(r'project\.entry-points\."(.*)"', block.text)
    assert group == POLICIES.group
    assert metadata.entry_points(group=group) is not None


def rows_of(page: str, head: str) -> list[list[str]]:
    """The cells of the table of a page that begins with a head."""
    text = (ROOT / page).read_text("utf-8")
    table = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def test_the_table_of_splits_is_what_the_sources_mean(tmp_path: Path) -> None:
    rows = rows_of("docs/data.md", "| sources | their splits |")
    assert len(rows) > 6
    for number, (given, wanted) in enumerate(rows):
        files = [tmp_path / f"r{number}" / name for name in re.findall(r"`(.*?)`", given)]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text('{"text": "a"}\n')
        sources = find_sources([str(file) for file in files])
        found = ", ".join(source.split or "by hash" for source in sources)
        assert found == wanted, given


@pytest.mark.long
def test_the_readme_and_what_follows_it(tmp_path: Path) -> None:
    """The same folder serves the pages that go on from README's data."""
    reader = Reader(tmp_path / "reader")
    for page in ("README.md", "docs/training.md"):
        reader.read(page)


@pytest.mark.long
def test_the_guide(tmp_path: Path) -> None:
    reader = Reader(tmp_path / "reader")
    reader.write_texts("texts.jsonl", 500)
    reader.read("docs/guide.md")
    assert len(list((reader.folder / "figures").glob("*.pdf"))) > 3
