"""How commands end: whose fault an error is, its code, and a process that ends as it should."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import pretrain.engine.engine
from pretrain.__main__ import run_command
from pretrain.cli import console, exits
from pretrain.distributed.cores import fit_threads, usable_cores
from pretrain.distributed.failures import exit_code, one_line
from pretrain.distributed.grid import Grid, connect, disconnect
from pretrain.distributed.signals import StopRequestedError
from pretrain.errors import TRY_AGAIN, MachineError, RunError, UsageError
from tests.tools import (
    ROOT,
    STARTS,
    assert_one_line,
    base_recipe,
    environment,
    run,
    run_processes,
    write_recipe,
)


class AcceleratorError(RuntimeError):
    """As torch names errors of a GPU."""


def _os(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


OF_USERS = [UsageError("a: no"), UsageError("b")]
OF_FILES = [
    RunError("x"), _os(errno.ENOSPC, "/x"), _os(errno.EIO, "/x"), _os(errno.EMFILE), MemoryError(),
    _os(errno.ESTALE, "/x"), ConnectionRefusedError(errno.ECONNREFUSED, "no"), TimeoutError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("CUDA driver version is insufficient for CUDA runtime version"),
]  # fmt: skip
OF_MACHINES = [
    MachineError("x"),
    AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be"),
    RuntimeError("CUDA error: the launch timed out and was terminated"),
    RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"),
    RuntimeError("CUDA driver error: unknown error"),
    RuntimeError("CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error"),
    RuntimeError("CUDA error: uncorrectable NVLink error detected during the execution"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1, unhandled system error"),
    RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3"),
    torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1"),
    torch.distributed.DistNetworkError("failed to connect"),
]
BUGS = [
    ValueError("x"), KeyError("x"), RuntimeError("shapes do not match"), AssertionError(),
    _os(errno.ENOENT, "/no/such/place"), _os(errno.EBADF), _os(errno.EINVAL, "/x"),
    _os(errno.EACCES, "/elsewhere"), _os(errno.EEXIST, "/elsewhere"), OSError("words alone"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: invalid argument"), UnicodeDecodeError("utf-8", b"", 0, 1, "x"),
]  # fmt: skip
KINDS = [*((e, 2) for e in OF_USERS), *((e, 1) for e in OF_FILES),
         *((e, TRY_AGAIN) for e in OF_MACHINES), *((e, None) for e in BUGS)]  # fmt: skip


@pytest.mark.parametrize(("error", "code"), KINDS, ids=lambda one: str(one)[:40].replace("/", "."))
def test_whose_fault_it_is(error: Exception, code: int | None) -> None:
    assert exit_code(error) == code
    assert len(one_line(error).splitlines()) == 1


def test_a_path_is_the_users_where_he_gave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "evaluate",
        "given/run@4",
        "--out",
        "there.json",
        "data.path=tokens",
        f"--x={tmp_path}/y",
    ]
    monkeypatch.setattr(sys, "argv", ["pretrain", *words])
    for path in ("given/run", "given/run/config.yaml", "there.json", "tokens/a", "y/z", "runs/a"):
        for number in (errno.ENOENT, errno.EACCES, errno.EISDIR):
            assert exit_code(_os(number, path)) == 1, path
            assert exit_code(_os(number, str(tmp_path / path))) == 1, path
    for path in ("given/ru", "other", "/etc/passwd", "tokens2"):
        assert exit_code(_os(errno.ENOENT, path)) is None, path


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (_os(errno.ENOENT, "/no/such/place"), None),
        (_os(errno.ENOSPC, "/full/disk"), 1),
        (AcceleratorError("CUDA error: uncorrectable ECC error encountered"), TRY_AGAIN),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1),
        (KeyError("a bug"), None),
    ],
)
@pytest.mark.parametrize("together", [False, True])
def test_injected_into_a_run(
    error: Exception, code: int | None, together: bool, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In an update, and in a block that all ranks leave with one error."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    name = "audit_decay" if together else "train_step"
    monkeypatch.setattr(pretrain.engine.engine.Engine, name, fail)
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    assert run(monkeypatch, "train", str(recipe), "--out", str(tmp_path / "run")) == (code or 1)
    text = capfd.readouterr().err
    if code is None:
        assert "Traceback (most recent call last)" in text and "in fail" in text
    else:
        assert_one_line(text, ((error.args[1] if isinstance(error, OSError) else str(error))[:30],))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (AcceleratorError("CUDA error: uncorrectable ECC error encountered"), MachineError),
        (RunError("the disk is full"), RunError),
        (UsageError("a: no"), UsageError),
    ],
)
def test_all_ranks_say_the_same(error: Exception, kind: type[Exception]) -> None:
    """A rank ends as its peer that failed: if a GPU did, both ask for another start."""
    sent: list[Any] = []

    class Failed(Grid):
        def gather(self, value: Any) -> list[Any]:
            sent.append(value)
            return [None, value]

    class Heard(Grid):
        def gather(self, value: Any) -> list[Any]:
            return [value, *sent]

    place = (1, 1, 1, 0, torch.device("cpu"), None, None, None)
    with pytest.raises(kind, match=str(error)), Failed(*place).together(""):
        raise error
    with pytest.raises(kind, match=str(error)) as raised, Heard(*place).together(""):
        pass
    assert exit_code(raised.value) == exit_code(error)


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert console.plain("a\x1b[31mb\x07 c\u202ed é日\t") == "a\\x1b[31mb\\x07 c\\u202ed é日\t"


LEAVING = """
import atexit, sys, threading, tempfile, weakref
sys.path.insert(0, {root!r})
from pretrain.cli.exits import leave
import torch.distributed as dist
from pretrain.distributed.grid import connect, build_grid
from pretrain.config.science import GridConfig
held = build_grid(GridConfig(), connect())  # groups that live on
atexit.register(print, "at exit")
folder = tempfile.TemporaryDirectory()
def busy():
    while True:
        held.gather(1)  # inside C++, again and again
threading.Thread(target=busy, daemon=True).start()
print(folder.name)
sys.stdout.write("last words")
{leave}
"""


def ended(code: str, how: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, forked or as a user starts it."""
    if how == "forked":
        script = folder / "code.py"
        script.write_text(code)
        return run_processes([], 1, 120, script)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("how", STARTS)
def test_a_thread_inside_a_library_does_not_make_the_end_an_abort(how: str, tmp_path: Path) -> None:
    """What was printed is there, exit functions ran, the code is the command's."""
    for _ in range(3):
        done = ended(LEAVING.format(root=str(ROOT), leave="leave(75)"), how, tmp_path)
        code, text = done.returncode, done.stdout
        assert code == 75
        folder, rest = text.split("\n", 1)
        assert "last words" in rest and "at exit" in rest and not Path(folder).exists()


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "max 100000"}, None),
        ({"a/cpu.max": "max 100000", "cpu.max": "300000 100000"}, 3),
        ({"a/b/cpu.max": "100000 100000", "cpu.max": "max 100000"}, 1),
        ({"cpu/a/b/cpu.cfs_quota_us": "200000", "cpu/a/b/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_a_quota_of_cores_is_seen(
    files: dict[str, str], quota: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text + "\n")
    (tmp_path / "own").write_text("0::/a/b\n4:cpu,cpuacct:/a/b\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert usable_cores(tmp_path / "fs", tmp_path / "own") == (quota or 16)


@pytest.mark.parametrize(("said", "wanted"), [(None, 1), ("2", 2)])
def test_one_process_takes_no_more_threads_than_its_quota(
    said: str | None, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr("pretrain.distributed.cores.usable_cores", lambda: 1)
    assert fit_threads(2) == wanted
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        connect()
        assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)
        disconnect()


def test_a_signal_amid_an_import_of_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is half imported is not imported again at the end."""
    monkeypatch.setitem(
        sys.modules, "pretrain.distributed.grid", None
    )  # another import of it fails
    assert exits._end("stopped", TRY_AGAIN) == TRY_AGAIN
    assert capsys.readouterr().err == "stopped\n"


def test_a_run_that_was_asked_to_stop_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    stop = StopRequestedError("runs/x: stopped by SIGTERM at step 3, with a checkpoint; rerun")
    assert exits.report_failure(stop) == TRY_AGAIN
    assert capsys.readouterr().err == f"{stop}\n"
    assert exits.report_failure(RunError("runs/x: is damaged")) == 1
    assert capsys.readouterr().err == "error: runs/x: is damaged\n"


def test_an_end_of_a_file_is_no_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Click takes any `EOFError` for Ctrl-D; here it is of a file that a library read."""
    program = typer.Typer()

    @program.command()
    def read() -> None:
        raise EOFError("No data left in file")

    monkeypatch.setattr("sys.argv", ["pretrain"])
    assert run_command(program) == 1
    err = capsys.readouterr().err
    assert "interrupted" not in err and "No data left in file" in err


@pytest.mark.parametrize("how", STARTS)
@pytest.mark.parametrize("closed", [False, True])
def test_a_broken_pipe_is_silent_only_if_it_is_our_output(
    closed: bool, how: str, tmp_path: Path
) -> None:
    """Click ends at any of them without a word: of a helper process, or a socket."""
    code = (
        "import os, sys, pretrain.config.recipe as recipe\n"
        "reading, writing = os.pipe()\n"
        "os.dup2(writing, 1)\n"
        "os.close(writing)\n" + "os.close(reading)\n" * closed + "def broken(*_, **__):\n"
        "    raise BrokenPipeError(32, 'Broken pipe')\n"
        "recipe.load_config = broken\n"
        "from pretrain.__main__ import main\n"
        "sys.argv = ['pretrain', 'train', 'x.yaml']\n"
        "main()\n"
    )
    done = ended(code, how, tmp_path)
    assert done.returncode == 1
    assert done.stderr == ("" if closed else "error: Broken pipe\n")


@cache
def raised() -> list[tuple[str, str, str]]:
    """(place, class, text) of every error that the program raises with a text of its own."""
    found = []
    for folder in ("data_pipeline", "models", "pretrain", "launchers"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                call = node.exc if isinstance(node, ast.Raise) else None
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.args:
                    text = ast.unparse(call.args[0])
                    place = f"{path.relative_to(ROOT)}:{call.lineno}"
                    found.append((place, call.func.id, text))
    return found


@pytest.mark.parametrize("words", ["choose another --out", "'--", "no such file or folder"])
def test_what_another_command_mends_is_a_mistake_in_the_command(words: str) -> None:
    """Code 2, whichever package says it; 1 if another process has the folder, which may end, if
    files are damaged, if texts or a machine failed what an option asks for."""
    at_fault = ("checkpoint/recover.py", "data_pipeline/watch.py", "cluster/local_rates.py")
    found = [
        (place, kind) for place, kind, text in raised()
        if words in text and not place.partition(":")[0].endswith(at_fault)
    ]  # fmt: skip
    waits = {"HeldError", "BusyError"}
    assert len(found) > 2 or words == "no such file or folder"
    assert not [one for one in found if one[1] not in {"UsageError", "ChoiceError"} | waits]
