"""Words that several verbs of the command line share."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key.path=value, for example optimizer.weight_decay.attention=0.3"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
