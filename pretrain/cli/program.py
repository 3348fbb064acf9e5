"""The command line as a Typer application: what every verb has in common."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
"""Verbs inherit these: `-h`, and help as wide as the terminal, up to a width that reads well."""


class _Verbs(TyperGroup):
    """A group of verbs: without a word, it shows its help; the list has whole sentences."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words after the group's name."""
        if not args:
            print(ctx.get_help(), file=sys.stderr)
            raise typer.Exit(2)
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each verb with the first sentence of its help, which Click would cut."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary(verb)) for name, verb in self.commands.items()])


class _Program(_Verbs):
    """The whole program: it prints its version wherever `--version` stands on the command line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words after `pretrain`; the version comes before every other option."""
        asked = args[: args.index("--")] if "--" in args else args
        return super().parse_args(ctx, ["--version"] if "--version" in asked else args)


def summary(verb: Any) -> str:
    """The first sentence of a verb's help."""
    return " ".join(re.split(r"(?<=\.)\s", verb.help or "", maxsplit=1)[0].split())


def application(about: str, whole: bool = False) -> typer.Typer:
    """An application, or a group of verbs of one.

    Args:
        about: its help.
        whole: whether it is the program itself, with `--version`.
    """
    return typer.Typer(
        cls=_Program if whole else _Verbs,
        help=about,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=_CONTEXT,
    )


def _print_version(asked: bool) -> None:
    if asked:
        print(f"rankdecay {version()}")
        raise typer.Exit


def version() -> str:
    """The version of the installed program, or `(not installed)` if it runs from its source."""
    try:
        return metadata.version("rankdecay")
    except metadata.PackageNotFoundError:
        return "(not installed)"


Version = Annotated[
    bool,
    typer.Option(
        "--version", is_eager=True, callback=_print_version, help="Show the version and exit."
    ),
]
