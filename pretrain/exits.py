"""How a command ends: its exit code, and one line on standard error where something is wrong."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from pretrain.errors import TRY_AGAIN


def exit_code(error: Exception) -> int | None:
    """2: mistakes of usage; 1: trouble with files and machines; 75: asked to stop; None: bugs."""
    names = {part.__name__ for part in type(error).__mro__}
    # Typer may carry its own copy of click: its mistakes of usage are known by name too.
    if names & {"UsageError", "ModelError", "ClickException"}:
        return 2
    if "StopRequestedError" in names or _is_lost_peer(error):
        return TRY_AGAIN
    if names & {"RunError", "DataError"} or isinstance(error, OSError):
        return 1
    return None


def _is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed since another process or the network is gone."""
    if {part.__name__ for part in type(error).__mro__} & {"DistBackendError", "DistNetworkError"}:
        return True
    words = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def one_line(error: Exception) -> str:
    """What went wrong, for people: a file and a reason, without a traceback."""
    if _is_lost_peer(error):
        reason = " ".join(str(error).split())[:160]
        return (
            "another process of the job, or the network, is gone; started again, the run goes on "
            f"from its last checkpoint ({reason})"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if hasattr(error, "format_message"):
        return " ".join(error.format_message().split())
    return " ".join(str(error).split())


def fail(text: str, code: int) -> NoReturn:
    """Say what is wrong and leave."""
    # Ranks fail together with the same words: one of them says so.
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)  # do not wait for peers in interpreter shutdown
    if "torch.distributed" in sys.modules:
        from pretrain.grid import disconnect

        disconnect()  # gloo's threads would abort an interpreter that shuts down
    sys.exit(code)
