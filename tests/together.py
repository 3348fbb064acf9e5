"""Commands that are started at one moment, in forks of one process; some are killed.

A script of `tests.tools.run_processes`: ``together.py REQUEST``. The request has ``rounds``, each a
list of commands ``{"words": [...], "kill_after": seconds or null, "delay": seconds or null}``, and
``answer``, the file for ``[[{"code": ..., "stderr": ..., "seconds": ...}, ...], ...]``; a code
below 0 is a signal. With ``library``, what takes long in every such process is made small:
`data corpus` reads that folder instead of Python's own, runs of a sweep are forks, images have few
points, `demo`, the paper's figures and `sbatch` only write their files slowly. Two writers of one
such file at once are a traceback.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.forks import begin_anew, run_command, run_to_the_end
from tests.tools import draw_small


def main() -> None:
    """Run the rounds of the request, one after the other."""
    request = json.loads(Path(sys.argv[1]).read_text())
    if "library" in request:
        make_cheap(request["library"])
    gc.freeze()  # a fork's collector would copy all that is shared
    answers = [_round(commands) for commands in request["asked"]]
    Path(request["answer"]).write_text(json.dumps(answers))


def _round(commands: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ready, go = os.pipe()
    started = []
    for command in commands:
        opened, name = tempfile.mkstemp()
        os.close(opened)
        output = Path(name)
        process = os.fork()
        if process == 0:
            os.close(go)
            os.read(ready, 1)  # ends when the parent closes its side: for all at once
            time.sleep(command.get("delay") or 0.0)
            _run(command["words"], output)
        started.append((process, output, command.get("kill_after")))
    os.close(ready)
    os.close(go)
    began = time.monotonic()
    for process, _, after in sorted(started, key=lambda one: one[2] or 0.0):
        if after is not None:
            time.sleep(after)
            os.kill(process, signal.SIGKILL)
    found = []
    for process, output, _ in started:
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        found.append({
            "code": code, "stderr": output.read_text(errors="replace"),
            "seconds": time.monotonic() - began,
        })  # fmt: skip
        output.unlink()
    return found


def _run(words: list[str], output: Path) -> None:
    """The command line in this fork, which ends here."""
    opened = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    begin_anew()
    run_to_the_end(lambda: run_command(words))


def _write_slowly(paths: list[Path], text: str) -> None:
    """Write files one after the other; nobody else may write them meanwhile.

    Raises:
        FileExistsError: if somebody does.
    """
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        marker = path.with_name(f"{path.name}.busy")
        try:
            marker.open("x").close()
            path.write_text(text)
            time.sleep(0.02)
            marker.unlink()
        except FileExistsError:
            raise
        except BaseException:  # a signal may come at any line
            marker.unlink(missing_ok=True)
            raise


def _slow_demo(out: Path, steps: int) -> None:
    _write_slowly([out / "corpus", out / "report.html"], str(steps))


def _slow_figure(name: str, real: Callable[..., None]) -> Callable[..., None]:
    """What writes the files of one of the paper's figures, whatever it is drawn from."""
    signature = inspect.signature(real)

    def figure(*words: Any, **more: Any) -> None:
        given = signature.bind(*words, **more).arguments
        out, told = given["out"], given.get("name", name)  # one function draws fig3 and fig7
        _write_slowly([out / f"{told}.png", out / f"{told}.csv"], told)
        (out / f"{told}.json").write_text('{"checks": [], "extra": ""}')

    return figure


def _slow_sweep(name: str, runs: Path, parallel: int, data: Path | None = None) -> Path:
    """The runs of a figure: what stands for them is written under the lock of the real ones."""
    from data_pipeline.files import held

    with held(runs / name):
        _write_slowly([runs / name / "run"], name)
    return runs / name


def _slow_submit(script: Path) -> str:
    """What stands for `sbatch`: it reads the script and its variables; nobody may change them."""
    files = [script, script.with_name("environment")]
    before = {file: file.read_bytes() for file in files}
    _write_slowly([script.with_name("submitted")], script.read_text())
    assert {file: file.read_bytes() for file in files} == before
    return "1"


PAPER = {
    "fig1": ("fig1", "run"), "fig2": ("fig2", "figure"), "fig3": ("fig3", "figure"),
    "table1": ("fig3", "table"), "fig3-vit": ("fig3_vit", "figure"), "fig5": ("fig5", "run"),
    "modern": ("modern", "figure"), "rank-cost": ("rank_cost", "figure"),
}  # fmt: skip
"""Figure: (module, function). Figures 4 and 6 of a model are drawn."""


def _make_paper_cheap() -> None:
    for name, (module, function) in PAPER.items():
        owner = importlib.import_module(f"pretrain.report.paper.{module}")
        setattr(owner, function, _slow_figure(name, getattr(owner, function)))
    import launchers.paper
    import pretrain.cli.paper
    import pretrain.report.paper.page

    launchers.paper.experiment = _slow_sweep
    drawn = pretrain.cli.paper._scatter

    def scatter(
        name: str, sweep: str, out: Path, runs: Path, existing: Path | None, model: str | None,
        family: Path | None, parallel: int,
    ) -> None:  # fmt: skip
        if model is not None:
            drawn(name, sweep, out, runs, existing, model, family, parallel)
        else:
            _slow_sweep(sweep, runs, parallel)
            _slow_figure(name, drawn)(name, sweep, out, runs, existing, model, family, parallel)

    pretrain.cli.paper._scatter = scatter


def make_cheap(library: str) -> None:
    """Make small what takes long; imports what the verbs need."""
    import data_pipeline.corpus
    import launchers.batch
    import pretrain.cli.demo
    import pretrain.offline.export
    import pretrain.offline.import_model
    import pretrain.offline.ranks
    import pretrain.report.figures
    import pretrain.report.page
    import pretrain.report.printed
    import pretrain.sweep.run

    draw_small()
    # In its module alone: others ask sysconfig too.
    data_pipeline.corpus.sysconfig = SimpleNamespace(  # type: ignore[assignment, attr-defined]
        get_paths=lambda: {"stdlib": library}
    )
    pretrain.sweep.run._PAUSE = 0.05
    pretrain.offline.export._SHARD = 1  # many files, which could be mixed
    launchers.batch.submit = _slow_submit
    pretrain.cli.demo._run = _slow_demo
    _make_paper_cheap()
    _make_command_once()


def _make_command_once() -> None:
    """The command line of all verbs, made here instead of in every fork."""
    import typer.main

    import pretrain.__main__

    made = typer.main.get_command(pretrain.__main__.app)
    pretrain.__main__.app = made  # type: ignore[assignment]


if __name__ == "__main__":
    main()
