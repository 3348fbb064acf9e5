"""A signal that comes while a library is imported waits until it is: PyTorch would abort."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from pretrain.distributed.signals import SIGNALS
from pretrain.errors import Stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("place", ["site-packages", "own"])
def test_an_import_is_not_interrupted(
    number: signal.Signals, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the user's own code is."""
    folder, name = tmp_path / place, f"slow_{number.name.lower()}_{place[:3]}"
    folder.mkdir()
    inner = "import time\nbegan = time.monotonic()\nwhile time.monotonic() < began + 0.4: pass\n"
    (folder / f"{name}_inner.py").write_text(inner)
    (folder / f"{name}.py").write_text(f"import {name}_inner\ndone = True\n")
    monkeypatch.syspath_prepend(str(folder))
    SIGNALS.listen()
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        with pytest.raises(Stopped):
            importlib.import_module(name)
            until = time.monotonic() + 5
            while time.monotonic() < until:
                time.sleep(0.01)
        assert (name in sys.modules) == (place == "site-packages")
        assert SIGNALS.name == number.name
    finally:
        SIGNALS.restore()
