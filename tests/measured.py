"""The command line with limits; its last line says the most memory that it took (MiB).

``python tests/measured.py SECONDS WORDS...``, or forked by ``tests/warm.py``, which saves the
imports. SECONDS are those of a processor.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path

from pretrain.__main__ import run_command

ROOM = 3 << 30
"""Bytes above what the process has at its start: the machine survives what has no other bound."""


def status(key: str) -> int:
    """A line of the kernel's account of this process, in KiB."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


if __name__ == "__main__":
    most = (status("VmData") << 10) + ROOM
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    seconds = int(sys.argv.pop(1)) + int(sum(os.times()[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    sys.argv[0] = "pretrain"
    code = run_command()
    sys.stdout.flush()
    print(f"peak {status('VmHWM') >> 10}", file=sys.stderr, flush=True)
    os._exit(code)
