"""Every verb of the command line, by its words."""

from __future__ import annotations

import click
import typer.main

from pretrain.__main__ import app


def all_verbs() -> set[str]:
    """``train``, ``data tokenize``, ``paper fig1`` and so on."""
    return set(_leaves(typer.main.get_command(app), ()))  # type: ignore[arg-type]


def _leaves(command: click.Command, words: tuple[str, ...]) -> list[str]:
    inner = getattr(command, "commands", None)
    if inner is None:
        return [" ".join(words)]
    return [found for name, one in inner.items() for found in _leaves(one, (*words, name))]
