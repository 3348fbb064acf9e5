"""docs/cli.md is the help of the verbs; every verb has `-h` and `--version`."""

from __future__ import annotations

import os
import re

import pytest

from pretrain.cli.program import version
from pretrain.cli.reference import markdown
from tests.docs_code import blocks_of, commands_in
from tests.test_docs_code import problem_of
from tests.tools import ROOT, run
from tests.verbs import all_verbs

PAGE = ROOT / "docs/cli.md"
GROUPS = ("", "data", "paper")
VERBS = sorted(all_verbs())


def test_the_page_is_made_from_the_help() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), (
        "run: python -m pretrain.cli.reference > docs/cli.md"
    )
    assert re.findall(r"^## pretrain (.*)$", markdown(), re.M) == re.findall(
        r"^\| \[`(.*?)`\]", markdown(), re.M
    )
    assert set(re.findall(r"^## pretrain (.*)$", markdown(), re.M)) == set(VERBS)


@pytest.mark.parametrize("verb", [*VERBS, *GROUPS])
def test_every_verb_has_help_and_version(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_, **__: os.terminal_size((80, 24)))
    assert run(monkeypatch, *verb.split(), "-h") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("Usage: ") and "-h, --help" in shown.out and not shown.err
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "..." not in re.sub(r"\w\.\.\.|\]\.\.\.|\}\.\.\.", "", shown.out), "cut short"
    assert run(monkeypatch, *verb.split(), "--version") == 0
    assert capsys.readouterr().out == f"rankdecay {version()}\n"


def test_the_version_is_found_among_other_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "train", "no.yaml", "--out", "x", "--version") == 0
    assert capsys.readouterr().out == f"rankdecay {version()}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", version())


@pytest.mark.parametrize("group", GROUPS)
def test_without_a_word_the_help_is_shown_and_is_no_error(
    group: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *group.split()) == 2
    shown = capsys.readouterr()
    assert run(monkeypatch, *group.split(), "-h") == 0
    assert shown.err == capsys.readouterr().out and not shown.out


def test_examples_of_the_help_are_commands_that_work() -> None:
    """As far as words can tell; files that nobody ships are not opened."""
    examples = [words for block in blocks_of("docs/cli.md") for words in commands_in(block.text)]
    assert len(examples) > 5 and all(words[0] == "pretrain" for words in examples)
    assert [words for words in examples if problem_of(words)] == []


def test_help_is_as_wide_as_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_, **__: os.terminal_size((300, 24)))
    assert run(monkeypatch, "train", "-h") == 0
    assert 100 < max(map(len, capsys.readouterr().out.splitlines())) <= 110
