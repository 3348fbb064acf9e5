"""torchrun for jobs on several machines, with a longer grace time and the processes' exit code.

``python -m launchers.elastic`` takes torchrun's arguments. It corrects three things. torchrun kills
its processes thirty seconds after SIGTERM (some versions ignore
``TORCH_ELASTIC_SHUTDOWN_TIMEOUT``), while a checkpoint may take minutes. Its exit code is always 1,
so that "try again" (75) is lost. It restarts after a usage error, which would end the same way.
"""

from __future__ import annotations

import os
import sys
from functools import wraps
from typing import Any

from launchers.supervise import FINAL
from pretrain.errors import TRY_AGAIN

GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Environment variable with the grace time in seconds; torch reads it from 2.13 on."""


def main() -> None:
    """Run torchrun with this process's arguments and return its processes' exit code."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # All versions have this class in common, and each kind of process uses it.
    PContext.close = patient(PContext.close, int(os.environ.get(GRACE, "30")))  # type: ignore[method-assign]
    LocalElasticAgent._monitor_workers = final(LocalElasticAgent._monitor_workers)  # type: ignore[method-assign]
    try:
        torchrun()
    except ChildFailedError as error:
        sys.exit(exit_code(error))
    except SignalException:
        sys.exit(TRY_AGAIN)  # the processes have ended, with their checkpoint


def patient(close: Any, grace: int) -> Any:
    """``PContext.close`` that waits at least ``grace`` seconds between SIGTERM and SIGKILL."""

    @wraps(close)
    def wait(self: Any, death_sig: Any = None, timeout: int = 30) -> None:
        close(self, death_sig, max(timeout, grace))

    return wait


def final(monitor: Any) -> Any:
    """Wrap the agent's check of its processes, so that errors that would recur are not retried."""

    @wraps(monitor)
    def look(self: Any, *arguments: Any) -> Any:
        result = monitor(self, *arguments)
        failures = (result.failures or {}).values() if result.is_failed() else ()
        if any(failure.exitcode in FINAL for failure in failures):
            self._remaining_restarts = 0
        return result

    return look


def exit_code(error: Any) -> int:
    """The exit code of a job from its first failed process: its code, or 128 plus its signal."""
    _, failure = error.get_first_failure()
    code = int(failure.exitcode)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
