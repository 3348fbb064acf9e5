"""Commands that are started at one moment, in forks of one process; some are killed.

A script of `tests.tools.run_processes`: ``together.py REQUEST``. The request has ``rounds``, each a
list of commands ``{"words": [...], "kill_after": seconds or null}``, and ``answer``, the file for
``[[{"code": ..., "stderr": ...}, ...], ...]``; a code below 0 is a signal. With ``library``, what
takes long in every such process is made small: `data corpus` reads that folder instead of Python's
own, runs of a sweep are forks, and `demo` only writes a file slowly.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def main() -> None:
    """Run the rounds of the request, one after the other."""
    request = json.loads(Path(sys.argv[1]).read_text())
    if "library" in request:
        _make_cheap(request["library"])
    answers = [_round(commands) for commands in request["rounds"]]
    Path(request["answer"]).write_text(json.dumps(answers))


def _round(commands: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ready, go = os.pipe()
    started = []
    for command in commands:
        output = Path(tempfile.mkstemp()[1])
        process = os.fork()
        if process == 0:
            os.close(go)
            os.read(ready, 1)  # ends when the parent closes its side: for all at once
            _run(command["words"], output)
        started.append((process, output, command.get("kill_after")))
    os.close(ready)
    os.close(go)
    for process, _, after in sorted(started, key=lambda one: one[2] or 0.0):
        if after is not None:
            time.sleep(after)
            os.kill(process, signal.SIGKILL)
    found = []
    for process, output, _ in started:
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        found.append({"code": code, "stderr": output.read_text(errors="replace")})
        output.unlink()
    return found


def _run(words: list[str], output: Path) -> None:
    """The command line in this fork, which ends here."""
    opened = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    sys.argv = ["pretrain", *words]
    code = 70
    try:
        from pretrain.__main__ import main as command

        command()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException as error:
        print(f"Traceback: {error!r}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class ForkingExecutor:
    """Runs of a sweep as forks of this process, which has everything imported."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._running: dict[int, str] = {}

    def submit(self, jobs: list[Any]) -> None:
        """Start jobs."""
        for job in jobs:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.touch()
            process = os.fork()
            if process == 0:
                _run(job.words, job.log)
            self._running[process] = job.name

    def poll(self) -> dict[str, int]:
        """Exit codes of the jobs that have ended."""
        ended = {}
        for process in list(self._running):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                ended[self._running.pop(process)] = os.waitstatus_to_exitcode(status)
        return ended

    def stop(self) -> None:
        """End everything."""
        for process in self._running:
            os.kill(process, signal.SIGTERM)


def _slow_demo(out: Path, steps: int) -> None:
    for part in ("corpus", "report.html"):
        (out / part).write_text(f"{part} {steps}")
        time.sleep(0.05)


def _make_cheap(library: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    import data_pipeline.corpus
    import launchers.sweeps
    import pretrain.cli.demo
    import pretrain.offline.export
    import pretrain.offline.import_model
    import pretrain.offline.ranks
    import pretrain.paper.fig4
    import pretrain.paper.fig5
    import pretrain.report.figures
    import pretrain.report.page
    import pretrain.report.printed
    import pretrain.sweep.run

    # In its module alone: others ask sysconfig too.
    data_pipeline.corpus.sysconfig = SimpleNamespace(  # type: ignore[assignment, attr-defined]
        get_paths=lambda: {"stdlib": library}
    )
    launchers.sweeps.LocalExecutor = ForkingExecutor  # type: ignore[assignment, attr-defined]
    pretrain.sweep.run._PAUSE = 0.05
    pretrain.cli.demo._run = _slow_demo


if __name__ == "__main__":
    main()
