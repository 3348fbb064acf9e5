"""The command line with a fault put in: ``faulty.py FAULT RANK UPDATES WORDS...``.

On one rank, in the training updates of this process with the given numbers (``5`` or ``5,6,7``,
counted as they happen), the fault strikes; everything else is `python -m pretrain WORDS...`.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from typing import Any

import torch

import pretrain.engine.engine
import pretrain.ranks.writer
import pretrain.runs.metrics
from models.roles import declared_parameters
from pretrain.__main__ import main


def poison_loss(engine: Any) -> None:
    """The loss of this update is NaN."""
    loss = engine.loss
    engine.loss = lambda logits, labels: loss(logits, labels) * float("nan")


def poison_label(engine: Any) -> None:
    """The labels are of the vocabulary's padding: the loss is infinite, its gradient is not."""
    loss = engine.loss

    def of_padding(projection: Any, labels: torch.Tensor) -> torch.Tensor:
        padding = torch.full_like(labels, projection.weight.shape[0] - 1)
        large: torch.Tensor = loss(projection, padding)
        return large

    engine.loss = of_padding


def poison_gradient(engine: Any) -> None:
    """One element of one gradient is infinite, and the loss is not."""
    parameter = next(iter(declared_parameters(engine.module)))

    def strike(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        gradient = gradient.clone()
        gradient.view(-1)[3] = float("inf")
        return gradient

    handle = parameter.register_hook(strike)


def poison_layer(engine: Any) -> None:
    """The output of block 1's MLP is NaN until the next update: the program repeats this one."""
    part = engine.module.get_submodule("layers.3.mlp")
    handle = part.register_forward_hook(lambda _, __, output: output * float("nan"))
    _until_the_next.append(handle)


_until_the_next: list[Any] = []


def flip_weight(engine: Any) -> None:
    """One bit of a working weight changes."""
    *_, parameter = declared_parameters(engine.module)
    parameter.data.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 20)


def kill(engine: Any) -> None:
    """The process dies; started again by its launcher, it lives."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def stop(engine: Any) -> None:
    """The process stands still."""
    os.kill(os.getpid(), signal.SIGSTOP)


def jump_clock(engine: Any) -> None:
    """The machine's clock is set back by an hour, as after a wrong start of NTP."""
    real = time.time
    time.time = lambda: real() - 3600.0


def linger(engine: Any) -> None:
    """The process takes its time."""
    time.sleep(3.0)


def refuse(engine: Any) -> None:
    """The disk takes no more metrics and rank statistics; the next time, it does again."""
    for module, name in (
        (pretrain.runs.metrics, "_append"), (pretrain.ranks.writer, "add_ranks"),
    ):  # fmt: skip
        _exchange(module, name)


def _exchange(module: Any, name: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    original = _refused.pop(name, None)
    if original is None:
        _refused[name] = getattr(module, name)
    setattr(module, name, original or full)


_refused: dict[str, Any] = {}


FAULTS = {
    "clock": jump_clock,
    "linger": linger,
    "loss": poison_loss,
    "label": poison_label,
    "gradient": poison_gradient,
    "layer": poison_layer,
    "flip": flip_weight,
    "refuse": refuse,
    "kill": kill,
    "stop": stop,
}


def arm(fault: str, rank: int, updates: set[int]) -> None:
    """Put the fault where it is wanted."""
    if int(os.environ.get("RANK", "0")) != rank:
        return
    original = pretrain.engine.engine.Engine.train_step
    count = 0

    def train_step(self: Any, batches: Any, more: bool = False) -> float:
        nonlocal count
        count += 1
        struck = count in updates
        while _until_the_next:
            _until_the_next.pop().remove()
        if struck and fault != "flip":
            FAULTS[fault](self)
        found = original(self, batches, more)
        vars(self).pop("loss", None)
        if struck and fault == "flip":
            FAULTS[fault](self)
        return found

    pretrain.engine.engine.Engine.train_step = train_step  # type: ignore[method-assign]


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]), set(map(int, sys.argv[3].split(","))))
    sys.argv = ["pretrain", *sys.argv[4:]]
    main()
