"""Copies of the user's code files in the run folder, and comparison of their versions.

A copy is a record: it runs only if the command line names it (``--code``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_pipeline.files import write_aside
from pretrain.config.extension import PINS
from pretrain.config.recipe import Config, code_of
from pretrain.errors import RunError

CODE = "code"
"""Folder of a run folder, with a folder for each SHA-256."""


def keep_code(run: Path, config: Config) -> None:
    """Copy the files of code that a recipe runs into a run folder.

    Raises:
        RunError: if a link is in the place of a folder.
    """
    for code in code_of(config):
        path = _path(run, code.path.name, code.sha256)
        for folder in (path.parent.parent, path.parent):
            if folder.is_symlink():
                raise RunError(
                    f"{folder}: is a link, and nothing is written through links; remove it"
                )
            folder.mkdir(exist_ok=True)
        write_aside(path, code.data)


def kept_code(run: Path, config: Config) -> Iterator[str]:
    """The options that use the copies of a run folder for its recipe."""
    for section in config.optimizer.weight_decay.policies:
        if digest := getattr(section, "sha256", ""):
            named = _path(run, section.kind.rpartition(":")[0], digest)
            # The file may have had another name when it was copied; its bytes are the same.
            copies = sorted(path for path in named.parent.glob("*") if path.is_file())
            yield f"--code {named if named in copies or not copies else copies[0]}"


def changed_code(old: Config, new: Config) -> list[str]:
    """Policies that differ only in their code: ``my_file.py:Mine, OLD -> NEW``."""
    before, after = (
        [part.model_dump(mode="json") for part in config.optimizer.weight_decay.policies]
        for config in (old, new)
    )
    if len(before) != len(after):
        return []
    changes = []
    for policy, replacement in zip(before, after, strict=True):
        pin = next((key for key in PINS if key in policy and key in replacement), "")
        if (
            pin
            and policy[pin] != replacement[pin]
            and {**policy, pin: replacement[pin]} == replacement
        ):
            name = "SHA-256 " * (pin == "sha256")
            changes.append(f"{policy['kind']}, {name}{policy[pin]} -> {replacement[pin]}")
    return changes


def _path(run: Path, name: str, sha256: str) -> Path:
    """The path of a run's copy of a file."""
    return run / CODE / sha256[:16] / name
