"""`pretrain watch`: shows runs in the terminal while they train. It reads, and changes nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Annotated, Any

import typer

from pretrain.errors import ENDS


def watch(
    run: Annotated[Path, typer.Argument(help="Run folder, or a sweep's folder.")],
    once: Annotated[
        bool, typer.Option("--once", help="Print the present state once and end; for pipes.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Watch a run or a sweep: loss, rank by layer, λ in use, events.

    It ends by itself when the run is finished, or with Ctrl-C. It only reads: training does not
    notice it, and it works on another machine that sees the folder, too. Where the output is not
    a terminal, it prints one line whenever something has changed.
    """
    from pretrain.cli.watched import view_of

    view = view_of(run)
    try:
        _watch(view, once, every)
    except ENDS as end:
        end.add_note("what was watched goes on")
        raise


def _watch(view: Any, once: bool, every: float) -> None:
    from pretrain.cli.console import console

    view.look()
    if once:
        target = console(width=None if sys.stdout.isatty() else 160)
        target.print(view.draw(target.width, 10_000))
    elif sys.stdout.isatty():
        _redraw(view, every)
    else:
        _print_lines(view, every)


def _redraw(view: Any, every: float) -> None:
    from rich.live import Live

    from pretrain.cli.console import console

    screen = console()

    def draw() -> Any:
        return view.draw(screen.width, screen.height)

    with Live(draw(), console=screen, auto_refresh=False) as live:
        _until_finished(view, every, lambda: live.update(draw(), refresh=True))


def _print_lines(view: Any, every: float) -> None:
    told = ""

    def tell() -> None:
        nonlocal told
        line = view.line()
        if line != told:
            print(line, flush=True)
        told = line

    _until_finished(view, every, tell)


def _until_finished(view: Any, every: float, show: Callable[[], None]) -> None:
    show()
    while not view.is_finished:
        sleep(every)
        view.look()
        show()
