"""torchrun for jobs over several machines; time to end, its code and its restarts are put right.

``python -m launchers.elastic`` takes torchrun's words. torchrun kills its processes thirty seconds
after SIGTERM (some versions whatever ``TORCH_ELASTIC_SHUTDOWN_TIMEOUT`` says), while a checkpoint
may take minutes; it ends with 1 whatever its processes said, so that "try again" is lost; and it
starts again what a mistake of usage ended, which would end the same.
"""

from __future__ import annotations

import os
import sys
from functools import wraps
from typing import Any

from launchers.supervise import FINAL
from pretrain.errors import TRY_AGAIN

GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Variable with the seconds; torch reads it from 2.13 on."""


def main() -> None:
    """Run torchrun with the words of this process; ends with its processes' code."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # The class is what all versions have in common; each kind of process goes through it.
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
    """The agent's look at its processes, after which mistakes and trouble are not tried again."""

    @wraps(monitor)
    def look(self: Any, *arguments: Any) -> Any:
        result = monitor(self, *arguments)
        failures = (result.failures or {}).values() if result.is_failed() else ()
        if any(one.exitcode in FINAL for one in failures):
            self._remaining_restarts = 0
        return result

    return look


def exit_code(error: Any) -> int:
    """Of a job whose first process to fail ended so: its own, or 128 and its signal."""
    _, failure = error.get_first_failure()
    code = int(failure.exitcode)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
