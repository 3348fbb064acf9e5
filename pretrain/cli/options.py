"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key.path=value, for example optimizer.weight_decay.attention=0.3"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
