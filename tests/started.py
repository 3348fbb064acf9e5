"""What `tests.test_warm` runs: ``sleep N``, ``spin N``, ``start`` another one of these, ``fail`` by
an exception, or ``end CODE``.

``start`` holds a lock and prints what the ones that it started said and how they ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path


def end(code: int) -> None:
    """Say what this process is given, once it has the lock of the folder, and end."""
    with Path("held").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    leads = os.getsid(0) == os.getpid()
    print(os.environ.get("WORD"), "PATH" in os.environ, Path.cwd().name, leads)
    sys.exit(code)


def start() -> None:
    """Start two that end, one of them with an error, and a program."""
    Path("inner").mkdir()
    found: dict[str, object] = {"popen": subprocess.Popen.__name__}
    with Path("held").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for code in ("0", "7"):
            done = subprocess.run(
                [sys.executable, "-P", __file__, "end", code], env={"WORD": "x"}, cwd="inner",
                capture_output=True, text=True, start_new_session=True, check=False,
            )  # fmt: skip
            found[code] = (done.returncode, done.stdout, done.stderr)
        again = [sys.executable, __file__, "end", "0"]
        found["locked"] = subprocess.run(again, capture_output=True, check=False).returncode
    shown = subprocess.run(["echo", "x"], capture_output=True, text=True, check=True)
    print(json.dumps({**found, "program": shown.stdout}))


def spin(seconds: float) -> None:
    """Be busy in a thread of the name WORD."""
    Path("/proc/thread-self/comm").write_text(os.environ["WORD"])
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


if __name__ == "__main__":
    what, *more = sys.argv[1:]
    if what == "sleep":
        time.sleep(float(more[0]))
    elif what == "spin":
        spin(float(more[0]))
    elif what == "start":
        start()
    elif what == "fail":
        raise {"timeout": TimeoutError, "value": ValueError}[more[0]]("a rank failed")
    else:
        end(int(more[0]))
