"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key.path=value, for example optimizer.weight_decay.attention=0.3"),
]
Code = Annotated[
    list[Path] | None,
    typer.Option(
        help="Run this file of yours, which a recipe in a run folder names (docs/extending.md)."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
