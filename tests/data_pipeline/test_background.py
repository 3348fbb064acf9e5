"""Threads in the background: a signal at any moment does not end the wait for one too early."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

import data_pipeline.background
from data_pipeline.background import Background
from tests.data_pipeline.test_replacing import interrupted

FILES = {str(data_pipeline.background.__file__)}


@pytest.mark.slow
def test_a_signal_at_any_moment_of_start_and_wait_loses_no_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_pipeline.background, "_BEGIN", 0.03)
    at, ends = 1, set()
    while True:
        may_end = threading.Event()
        begun: list[int] = []
        ended: list[int] = []

        def work(
            may_end: threading.Event = may_end, begun: list[int] = begun, ended: list[int] = ended
        ) -> None:
            begun.append(1)
            may_end.wait()
            time.sleep(0.002)
            ended.append(1)

        thread = Background(work, "test")

        def start_and_wait(thread: Background = thread) -> None:
            thread.start()
            thread.wait(0.002)

        if not interrupted(FILES, start_and_wait, at):
            break
        may_end.set()
        assert thread.wait(5.0)
        assert begun == ended, at
        ends.add(len(ended))
        at += 1
    may_end.set()
    assert ends == {0, 1} and at > 50


def test_a_real_signal_does_not_end_a_wait_that_comes_later() -> None:
    ended: list[int] = []

    def work() -> None:
        time.sleep(0.4)
        ended.append(1)

    def handle(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR2, handle)
    thread = Background(work, "test")
    try:
        thread.start()
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        with pytest.raises(KeyboardInterrupt):
            thread.wait()
        assert not thread.wait(0.05)
        assert thread.wait() and ended
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_thread_that_was_not_started_is_not_waited_for() -> None:
    assert Background(lambda: None, "test").wait()
