"""The page docs/cli.md: ``python -m pretrain.cli.reference`` prints it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import typer.main

from pretrain.__main__ import app
from pretrain.cli.program import summary
from pretrain.config.reference import as_table, escaped

INTRODUCTION = """# Every command

`pretrain VERB -h` prints what this page says about a verb, `pretrain --version` the version. Errors
are one line on standard error. The exit codes are 0 (done), 2 (a mistake in the command or the
recipe), 1 (trouble with files or memory, or a bug), 75 (try again: a signal, a lost machine) and
130 (Ctrl-C); see [faults](faults.md).

This page is made from the help of the verbs: `python -m pretrain.cli.reference` prints it.
"""


def markdown() -> str:
    """The text of docs/cli.md."""
    program = typer.main.get_command(app)
    verbs = list(_verbs(program, ()))
    rows = [(f"[`{name}`](#pretrain-{_anchor(name)})", summary(verb)) for name, verb in verbs]
    parts = [INTRODUCTION, as_table(("verb", "what it does"), rows)]
    parts += [_section(name, verb) for name, verb in verbs]
    return "\n".join(parts)


def _verbs(group: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield every verb with its words, such as ``data tokenize``."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _verbs(command, (*words, name))
        else:
            yield " ".join((*words, name)), command


def _anchor(words: str) -> str:
    return words.replace(" ", "-")


def _section(name: str, verb: Any) -> str:
    """A verb: what it does, examples, arguments and options."""
    arguments = [one for one in verb.params if one.param_type_name == "argument"]
    options = [one for one in verb.params if one.param_type_name == "option" and not one.hidden]
    usage = " ".join(("pretrain", name, *map(_argument, arguments), "[OPTIONS]" * bool(options)))
    rows = [(f"`{_argument(one)}`", _meaning(one)) for one in arguments]
    rows += [(f"`{_option(one)}`", _meaning(one)) for one in options]
    parts = [f"## pretrain {name}", f"`{usage.strip()}`", *_paragraphs(verb.help or "")]
    return "\n\n".join([*parts, as_table(("argument or option", "meaning"), rows)])


def _argument(argument: Any) -> str:
    """``RECIPE`` or ``[OVERRIDES]...``; the words of Typer's versions differ."""
    name = argument.name.upper()
    several = "..." if argument.nargs == -1 else ""
    return f"{name}{several}" if argument.required else f"[{name}]{several}"


def _option(option: Any) -> str:
    """``--out OUT``, ``--dry-run`` or ``--packed, --no-packed``."""
    names = ", ".join((*option.opts, *option.secondary_opts))
    return names if option.is_flag else f"{names} {option.name.upper()}"


def _meaning(parameter: Any) -> str:
    text = escaped(parameter.help or "")
    text += "." * (text[-1:] not in (".", ")", ""))
    if parameter.param_type_name == "option" and parameter.required:
        return f"{text} Required."
    default = parameter.default
    if default is None or isinstance(default, bool) or default == "" or "default" in text:
        return text
    return f"{text} Default: `{default}`."


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a help text; its examples become blocks of code."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        first, _, rest = paragraph.partition("\n")
        if first.strip() == "\b":
            yield f"```text\n{rest}\n```"
        else:
            yield re.sub(r"\s+", " ", paragraph)


if __name__ == "__main__":
    sys.stdout.write(markdown())
