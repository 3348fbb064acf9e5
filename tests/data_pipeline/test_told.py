"""What the verbs of data say while they work, and of what they do not know."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch.distributed as dist

from data_pipeline import prepare, tokenizer
from data_pipeline.manifest import load_manifest
from pretrain.distributed.signals import SIGNALS
from pretrain.errors import Stopped
from tests.distributed.test_meeting import end_wait

TEXTS = ["some words and other words, again and again"] * 40


def test_a_training_of_a_tokenizer_tells_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenizer, "_LINE", 0.0)
    train = sentencepiece.SentencePieceTrainer.Train

    def slowly(**words: Any) -> None:
        time.sleep(0.1)
        train(**words)
        time.sleep(0.2)

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "Train", slowly)
    model = tokenizer.train_tokenizer(TEXTS, 275, threads=1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("tokenizer: read 0.0 MB")
    assert lines[-1].startswith("tokenizer: learning from 0.0 MB")
    monkeypatch.undo()
    assert tokenizer.train_tokenizer(TEXTS, 275, threads=1) == model
    assert not capsys.readouterr().err  # it was short


def test_a_signal_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 2)  # type: ignore[attr-defined]

    def long(**_: Any) -> None:  # inside compiled code
        store.wait(["never"], timedelta(seconds=4))

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "Train", long)
    SIGNALS.listen()
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    try:
        with pytest.raises(Stopped):
            tokenizer.train_tokenizer(TEXTS, 275)
        assert time.monotonic() - began < 2
    finally:
        SIGNALS.restore()
        end_wait(tmp_path / "store")


def test_a_size_that_nobody_measured_is_no_zero(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of adopted tokens, the texts of training are not decoded."""
    known = load_manifest(data)
    prepare.print_info(data)
    assert "?" not in capsys.readouterr().out
    entries = tuple(replace(one, bytes=one.bytes * (one.split != "train")) for one in known.entries)
    monkeypatch.setattr(prepare, "load_manifest", lambda _: replace(known, entries=entries))
    prepare.print_info(data)
    lines = capsys.readouterr().out.splitlines()
    for line in lines:
        if "train" in line:
            assert line.count("?") == 2 and "0.00" not in line, line
        elif "test" in line or "val " in line:
            assert "?" not in line, line
    assert any(line.startswith("?: only held-out texts") for line in lines)
