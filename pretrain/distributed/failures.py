"""Classifies errors: usage errors, trouble with files, failures of machines, and bugs."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from pathlib import Path

from pretrain.errors import TRY_AGAIN

_USAGE = {"UsageError", "ModelError", "ChoiceError", "ClickException"}
"""By name: importing their modules would be slow, and Typer may carry its own copy of click."""
_TROUBLE = {"RunError", "DataError"}
_OF_PEERS = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_AGAIN = {"MachineError", "StopRequestedError", *_OF_PEERS}
_LOST_PEER = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
_OUT_OF_MEMORY = (
    "out of memory", "DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip
_WRONG_INSTALLATION = (
    "driver version is insufficient", "no kernel image is available", "invalid device ordinal",
    "no CUDA-capable device", "forward compatibility was attempted",
)  # fmt: skip
_OURS = ("device-side assert", "invalid argument", "invalid configuration argument",
         "invalid resource handle")  # fmt: skip
"""Texts of GPU errors that a wrong index or shape causes: these are bugs on every machine."""
_GPU = re.compile(
    r"CUDA error|CUDA driver error|CUDNN_STATUS_|CUBLAS_STATUS_|cuDNN error|NCCL error|HIP error"
    r"|uncorrectable (ECC|NVLink)|ECC error|\bXid\b|fallen off the bus"
)
_OF_MACHINES = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO", "ESTALE", "EMFILE", "ENFILE", "ENOMEM",
                 "ETIMEDOUT", "ENETUNREACH", "EHOSTUNREACH", "ENETDOWN", "EHOSTDOWN", "ENOLCK",
                 "ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "EADDRINUSE", "EADDRNOTAVAIL",
                 "EREMOTEIO", "ENODEV", "ENXIO", "EFBIG", "ETXTBSY", "EBUSY")
    if hasattr(errno, name)
}  # fmt: skip
"""Error numbers of an OSError that no program causes by itself."""
_OF_PATHS = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY,
}  # fmt: skip
"""Error numbers that a wrong path causes: a user's path, or one that a bug made."""


def exit_code(error: BaseException) -> int | None:
    """2: usage errors; 1: trouble with files and memory; 75: try again; None: bugs."""
    names = {part.__name__ for part in type(error).__mro__}
    if names & _USAGE:
        return 2
    if names & _AGAIN or _is_lost_peer(error) or _is_of_gpu(error):
        return TRY_AGAIN
    if names & _TROUBLE or is_out_of_memory(error) or _is_wrong_installation(error):
        return 1
    return 1 if isinstance(error, OSError) and _is_of_files(error) else None


def is_stop(error: BaseException) -> bool:
    """Whether a run ended because a signal asked it to, as it should: this is no error."""
    return type(error).__name__ == "StopRequestedError"


def is_of_machine(error: BaseException) -> bool:
    """Whether this error would probably not occur on another machine or at another time."""
    return exit_code(error) == TRY_AGAIN


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or its GPU was not enough."""
    if isinstance(error, MemoryError) or "OutOfMemoryError" in type(error).__name__:
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _OUT_OF_MEMORY)


def _is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process or the network was lost."""
    if {part.__name__ for part in type(error).__mro__} & _OF_PEERS:
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST_PEER)


def _is_of_gpu(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or not _GPU.search(str(error)):
        return False
    if is_out_of_memory(error) or _is_wrong_installation(error):
        return False
    return not any(word in str(error) for word in _OURS)


def _is_wrong_installation(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in _WRONG_INSTALLATION
    )


def _is_of_files(error: OSError) -> bool:
    """Whether the machine or a path of the user caused the error; anything else is a bug."""
    if error.errno in _OF_MACHINES or isinstance(error, ConnectionError | TimeoutError):
        return True
    return error.errno in _OF_PATHS and error.filename is not None and _was_given(error.filename)


def _was_given(name: str | bytes | int) -> bool:
    """Whether a path is, or is in, a path of the command line or of the default run folder."""
    if isinstance(name, int):
        return False
    path = _resolved(os.fsdecode(name))
    words = [part for word in sys.argv[1:] for part in (word, word.rpartition("=")[2])]
    paths = [_resolved(word.partition("@")[0]) for word in words if word.strip("-")]
    # A folder may be named by a file in it: RECIPE's other files are beside it.
    near = [named.parent for named in paths if named.suffix and named.parent != Path.cwd()]
    return any(
        path == named or named in path.parents for named in [*paths, *near, Path("runs").resolve()]
    )


def _resolved(word: str) -> Path:
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no path, or a link to itself
        return Path(word).resolve()
    return Path(word)


def one_line(error: BaseException) -> str:
    """A readable description of an error: a file and a reason, without a traceback."""
    short = " ".join(str(error).split())
    if _is_lost_peer(error):
        return (
            "another process of the job, or the network, was lost; rerun the same command: the run "
            f"continues from its last checkpoint ({short[:160]})"
        )
    if _is_of_gpu(error):
        return (
            "this machine's GPU failed; rerun the same command, on another machine if it fails "
            f"here again: the run continues from its last checkpoint ({short[:160]})"
        )
    if is_out_of_memory(error):
        return (
            "not enough memory; lower train.micro_batch (auto estimates it), or set "
            "grid.activation_checkpointing, a higher grid.zero_stage or more processes "
            f"({short[:160] or 'MemoryError'})"
        )
    if _is_wrong_installation(error):
        return f"torch cannot use this GPU; install a build of torch for its driver ({short[:160]})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if hasattr(error, "format_message"):
        return " ".join(error.format_message().split())
    return short or type(error).__name__
