"""The blocks of code of the pages: what they are, and how they are run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main

from pretrain.__main__ import app
from tests.tools import ROOT, environment

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_FILE = re.compile(r"# ([\w./-]+\.(?:yaml|py))\n")
LANGUAGES = {"sh", "yaml", "python", "toml", "text"}
"""`text` is what nobody runs: output, trees of files, commands with names to fill in."""


@dataclass(frozen=True)
class Block:
    """A block of a page: its language, its text, and the line where it begins."""

    page: str
    line: int
    language: str
    text: str

    @property
    def file(self) -> str:
        """The file that a block is, by the comment in its first line; empty if it has none."""
        found = _FILE.match(self.text)
        return found[1] if found else ""


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(page, text[: found.start()].count("\n") + 1, found[1], found[2])
        for found in _FENCE.finditer(text)
    ]


def commands_in(text: str) -> Iterator[list[str]]:
    """The words of each command of a block of shell: no comments, joined over lines."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s&&\s|\s;\s", line):
            if words := shlex.split(part, comments=True):
                yield words


def parse(words: list[str]) -> dict[str, Any]:
    """Read the words after `pretrain` as the program does, without running anything.

    Raises:
        Exception: Typer's, for an unknown verb or option, or a value that it does not take.
    """
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    values: dict[str, Any] = command.make_context(command.name, list(words)).params
    return values


class Reader:
    """Somebody who does what a page says, in a folder that looks like this repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "configs", folder / "configs")
        program = folder / "bin/pretrain"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m pretrain "$@"\n')
        program.chmod(0o755)
        path = f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = {**environment(), "PATH": path}
        del self._environment["OMP_NUM_THREADS"]

    def read(self, page: str) -> None:
        """Run every block of a page, in order.

        Raises:
            AssertionError: with what was said, if one fails.
        """
        for block in blocks_of(page):
            if block.language == "sh":
                self._run(block, ["bash", "-euo", "pipefail", "-c", _without_setup(block.text)])
            elif block.language in ("yaml", "python") and block.file:
                (self.folder / block.file).write_text(block.text, encoding="utf-8")
            elif block.language == "python":
                self._run(block, [sys.executable, "-P", "-c", block.text])

    def _run(self, block: Block, command: list[str]) -> None:
        done = subprocess.run(
            command, cwd=self.folder, env=self._environment, capture_output=True, text=True,
            timeout=1800, check=False,
        )  # fmt: skip
        said = f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        assert done.returncode == 0, f"{block.page}:{block.line}:\n{block.text}\n{said}"

    def write_texts(self, name: str, documents: int) -> None:
        """Documents of English, as JSON lines: parts of the sources of Python's library."""
        sources = sorted(Path(os.__file__).parent.glob("*.py"))
        parts = [
            text[start : start + 3000]
            for source in sources
            for text in [source.read_text(encoding="utf-8", errors="replace")]
            for start in range(0, len(text), 3000)
        ]
        lines = (json.dumps({"text": part}) for part in parts[:documents])
        (self.folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _without_setup(text: str) -> str:
    """What installs or activates an environment, or runs for minutes by `make`, is left out."""
    return "\n".join(line for line in text.splitlines() if not re.match(r"make |\. \.venv", line))
