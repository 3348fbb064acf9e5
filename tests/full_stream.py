"""The command line with a stream on a full disk: ``full_stream.py DESCRIPTOR WORDS...``."""

from __future__ import annotations

import os
import sys

from pretrain.__main__ import main

if __name__ == "__main__":
    # As in a process whose stream is a file there: with a buffer, which this one may not have.
    descriptor = int(sys.argv.pop(1))
    os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
    stream = open(descriptor, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    setattr(sys, {1: "stdout", 2: "stderr"}[descriptor], stream)
    sys.argv[0] = "pretrain"
    main()
