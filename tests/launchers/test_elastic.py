"""Jobs over several machines: what torchrun starts again, and what it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launchers.test_team import free_port
from tests.tools import ROOT, STARTS, environment, start_processes

AGENT = """
import inspect
inspect.getmodule = lambda *_: None  # of torchrun's stack at each turn: slow with all that is here
from launchers.elastic import main
main()
"""


def agents(
    how: str, script: str, folder: Path, nodes: int, restarts: int
) -> tuple[list[int | None], int, str]:
    """Codes of the agents of so many nodes, starts of rank 0, and all that was said.

    Args:
        how: the agents are forks of a process that has torch, or programs; theirs are programs.
    """
    program = folder / "program.py"
    program.write_text(
        "import os, sys, pathlib, time\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "rank = int(os.environ['RANK'])\n"
        "with (folder / f'starts-{rank}').open('a') as file: file.write('x')\n"
        "starts = (folder / f'starts-{rank}').stat().st_size\n" + script
    )
    words = [
        "--nnodes", str(nodes),
        "--nproc-per-node", "1", "--max-restarts", str(restarts), "--rdzv-backend", "c10d",
        "--rdzv-id", "job", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr",
        "127.0.0.1", str(program),
    ]  # fmt: skip
    agent = folder / "agent.py"
    agent.write_text(AGENT)
    command = [sys.executable, "-P", "-m", "launchers.elastic", *words]
    started = [
        start_processes(words, script=agent, timeout=120)
        if how == "forked"
        else subprocess.Popen(
            command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for _ in range(nodes)
    ]
    said = [one.communicate(timeout=120)[1] for one in started]
    starts = (folder / "starts-0").stat().st_size
    return [one.returncode for one in started], starts, "".join(said)


@pytest.mark.parametrize("how", STARTS)
@pytest.mark.parametrize("code", [2, pytest.param(1, marks=pytest.mark.long)])
def test_a_mistake_is_not_tried_again(code: int, how: str, tmp_path: Path) -> None:
    codes, starts, said = agents(how, f"sys.exit({code})\n", tmp_path, 2, 3)
    assert starts == 1, said
    assert code in codes and 0 not in codes, (codes, said)


@pytest.mark.parametrize("how", STARTS)
def test_what_a_machine_did_is_tried_again(how: str, tmp_path: Path) -> None:
    codes, starts, said = agents(how, "sys.exit(75 if starts < 3 else 0)\n", tmp_path, 1, 3)
    assert (codes, starts) == ([0], 3), said
