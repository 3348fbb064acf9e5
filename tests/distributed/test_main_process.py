"""What each process has for the main one reaches it, over few connections."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tools import ROOT, run_processes


def test_values_arrive_and_few_files_are_open(tmp_path: Path) -> None:
    """The main process is connected to all others, the others to a few; nothing comes later."""
    size, request, answer = 12, tmp_path / "request", tmp_path / "answer"
    request.write_text(json.dumps({"answer": str(answer)}))
    done = run_processes([str(request)], size, 120, script=ROOT / "tests" / "descriptors.py")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(answer.read_text())
    for rank, one in enumerate(found):
        sent = [[[other, "x" * 1000 * turn] for other in range(size)] for turn in range(3)]
        assert one["got"] == (sent if rank == 0 else [[], [], []])
        assert one["told"] == [["from", 0, turn] for turn in range(3)]
        assert one["later"] == 0  # a process that is lost then is noticed, not waited for
        assert one["opened"] <= (size + 3 if rank == 0 else 10), (rank, one["opened"])
