"""Python processes as forks of this one, which has everything imported: they cost no import.

In a process of `tests.warm`, `subprocess.Popen` is `ForkingPopen`: a command that starts
`python -m pretrain ...` or a script of the tests becomes a fork with its own environment, files,
session and signals; every other command starts a program as usual. So a sweep's runs, or the ranks
of `--processes 2`, are real children of the process that starts them.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
STARTED = subprocess.Popen
"""The plain one, which starts programs."""


def started_by(words: list[str]) -> Callable[[], None] | None:
    """What the command would run, where a fork can run it instead."""
    if not words or words[0] != sys.executable:
        return None
    rest = [word for word in words[1:] if word not in ("-P", "-u")]
    if rest[:2] == ["-m", "pretrain"]:
        return lambda: run_command(rest[2:])
    script = Path(rest[0]) if rest else Path()
    if script.suffix == ".py" and script.resolve().is_relative_to(ROOT / "tests"):
        return lambda: run_script(str(script), rest[1:])
    return None


def make_program_once() -> None:
    """Let typer make the program's commands once in this process and its forks: 0.08 s a call."""
    import typer.main

    typer.main.get_command = cache(typer.main.get_command)


def run_command(words: list[str]) -> None:
    """`pretrain WORDS...` in this process."""
    from pretrain.__main__ import main

    sys.argv = ["pretrain", *words]
    main()


def run_script(path: str, words: list[str]) -> None:
    """A Python file in this process, as if it were started."""
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")


def begin_anew() -> None:
    """Forget what the parent had: its signals, and what it deletes at its end."""
    from pretrain.distributed.signals import SIGNALS

    SIGNALS.__init__()  # type: ignore[misc]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    # Jobs that a shell starts in the background ignore Ctrl-C, and so would this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]


def run_to_the_end(run: Callable[[], None]) -> NoReturn:
    """Run in a fork of a process that is busy: the frames below never see its end."""
    code = 1
    try:
        run()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


class ForkingPopen(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen` that forks where `started_by` knows how; all else is inherited."""

    def _execute_child(self, *given: Any) -> None:
        (args, _, prepare, _, kept, folder, env, _, _, shell,
         p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite) = given[:16]  # fmt: skip
        new_session = given[21]
        run = None if shell or isinstance(args, str) else started_by([os.fspath(a) for a in args])
        if run is None:
            super()._execute_child(*given)  # type: ignore[misc]
            return
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # Where a program is started, no signal comes before it has forgotten its parent's handlers.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        process = os.fork()
        if process == 0:
            streams = {0: p2cread, 1: c2pwrite, 2: errwrite}
            try:
                _take(streams, kept)
                if new_session:
                    os.setsid()
                if folder is not None:
                    os.chdir(folder)
                if env is not None:
                    os.environ.clear()
                    os.environ.update(env)
                begin_anew()
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                if prepare is not None:
                    prepare()
            except BaseException:
                os._exit(255)
            run_to_the_end(run)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.pid = process
        self._child_created = True
        self._close_pipe_fds(  # type: ignore[attr-defined]
            p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite
        )


def _take(streams: dict[int, int], kept: tuple[int, ...]) -> None:
    """Make files the standard streams of this fork, and close every other file of the parent."""
    copies = {number: os.dup(file) for number, file in streams.items() if file >= 0}
    for number, copy in copies.items():
        os.dup2(copy, number)
    held = {0, 1, 2, *kept}
    for number in [int(file.name) for file in Path("/proc/self/fd").iterdir()]:
        if number not in held:
            with contextlib.suppress(OSError):
                os.close(number)
