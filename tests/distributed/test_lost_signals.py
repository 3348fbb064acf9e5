"""A signal comes while compiled code calls Python: what is raised there is dropped or replaced."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, field_serializer
from pydantic_core import PydanticSerializationError

from pretrain.distributed.signals import SIGNALS, StopSignals
from pretrain.errors import INTERRUPTED, TRY_AGAIN, Stopped
from tests.tools import run

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def send(number: signal.Signals) -> None:
    """Send it to this process; its handler runs before this ends."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


class Shown(BaseModel):
    """A signal comes while it is written as JSON."""

    number: signal.Signals

    @field_serializer("number")
    def _sent(self, number: signal.Signals) -> str:
        send(number)
        return "x"


class Target:
    """Something that may be gone."""


def in_serializer(number: signal.Signals) -> None:
    with contextlib.suppress(PydanticSerializationError):
        Shown(number=number).model_dump_json()


def in_callback(number: signal.Signals) -> None:
    target = Target()
    kept = weakref.ref(target, lambda _: send(number))
    del target
    assert kept() is None


def in_ctypes(number: signal.Signals) -> None:
    def compare(_one: object, _other: object) -> int:
        send(number)
        return 0

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    ctypes.CDLL(None).qsort((ctypes.c_int * 2)(2, 1), 2, 4, kind(compare))


def in_library(number: signal.Signals) -> None:
    with contextlib.suppress(BaseException):
        send(number)


SWALLOWED: dict[str, Callable[[signal.Signals], None]] = {
    "serializer": in_serializer, "weak reference": in_callback, "ctypes": in_ctypes,
    "library": in_library,
}  # fmt: skip


@pytest.fixture
def listening() -> Iterator[StopSignals]:
    SIGNALS.listen()
    try:
        yield SIGNALS
    finally:
        SIGNALS.restore()


def compute(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def wait(seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.parametrize("then", [compute, wait])
@pytest.mark.parametrize("swallow", SWALLOWED.values(), ids=SWALLOWED.keys())
def test_the_command_goes_on_and_is_told_again(
    swallow: Callable[[signal.Signals], None], then: Callable[[float], None],
    listening: StopSignals, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    number = NUMBERS[len(swallow.__name__) % 3]
    with pytest.raises(Stopped, match=number.name):
        swallow(number)
        assert listening.asked
        then(8)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("number", NUMBERS)
def test_the_error_that_it_became_is_not_shown(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command ends with the signal's code and one line, whatever the error says."""

    def show(**_: Any) -> None:
        Shown(number=number).model_dump_json()

    assert run(monkeypatch, command=show) == (INTERRUPTED if number == signal.SIGINT else TRY_AGAIN)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(("stopped by SIG", "interrupted")) and "rerun the same command" in line


class HalfMade:
    """A signal comes while it is made; its destructor needs what was to come."""

    def __init__(self) -> None:
        send(signal.SIGTERM)
        self.file = 1

    def __del__(self) -> None:
        del self.file


def test_what_it_left_half_made_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command=lambda **_: HalfMade()) == TRY_AGAIN
    gc.collect()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("stopped by SIGTERM")


def test_an_error_of_a_later_command_is_shown(
    listening: StopSignals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is remembered of a signal ends with its command."""
    in_library(signal.SIGTERM)
    listening.restore()

    def fail(**_: Any) -> None:
        raise ZeroDivisionError

    assert run(monkeypatch, command=fail) == 1
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_what_handles_it_is_not_disturbed(listening: StopSignals) -> None:
    """It may take long: no second signal comes until it has ended."""
    done = []
    with pytest.raises(Stopped), contextlib.ExitStack() as stack:
        stack.callback(lambda: done.append("left"))
        try:
            send(signal.SIGTERM)
        finally:
            compute(0.4)
            with contextlib.suppress(OSError):
                Path("/no/such/file").stat()
            wait(1.3)
            done.append("cleaned")
    assert done == ["cleaned", "left"] and listening.asked
