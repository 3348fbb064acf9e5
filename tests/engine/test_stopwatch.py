"""What a line of metrics says of time, memory and utilisation, and that no update waits for it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config.recipe import parse_config
from pretrain.engine.accelerators import DEVICES, device_named
from pretrain.engine.stopwatch import Stopwatch
from pretrain.runs.metrics import read_metrics
from pretrain.training.utilisation import Utilisation
from tests.tools import base_recipe


def test_parts_are_summed_and_taken_once() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for name in ("data", "update", "data"):
        with watch.part(name):
            time.sleep(0.02)
    with pytest.raises(KeyError), watch.part("update"):  # an update that fails took time, too
        raise KeyError
    taken = watch.take()
    assert taken["data"] >= 0.04 and 0.02 <= taken["update"] < taken["data"]
    assert watch.take() == {}


def test_on_a_gpu_events_are_read_when_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside an update nothing waits: a part only records two events."""
    happened: list[str] = []
    finished = 4

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("record")

        def query(self) -> bool:
            return happened.count("record") <= finished

        def elapsed_time(self, other: Any) -> float:
            happened.append("read")
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(2):
        with watch.part("data", on_host=True):
            pass
        with watch.part("forward_backward"):
            pass
    assert happened == ["record"] * 4
    assert watch.take()["forward_backward"] == 0.5 and happened[4:] == ["read"] * 2
    assert watch.take() == {}
    with watch.part("forward_backward"):  # of the next update, which the device still computes
        pass
    assert watch.take() == {}
    finished = 6
    assert watch.take() == {"forward_backward": 0.25}


def test_what_a_run_logs(trained: Path) -> None:
    rows = read_metrics(trained)
    for row in rows:
        parts = [row["time"][name] for name in ("data", "forward_backward", "update")]
        assert min(parts) > 0 and sum(parts) <= row["seconds"] * 1.01
        assert row["device"]["tokens_per_second"] == row["tokens_per_second"]
        assert 0.05 < row["device"]["peak_memory_gib"] < 64 and "mfu" not in row["device"]
    measured = {row["step"] for row in read_metrics(trained, "ranks")}
    for row in rows[1:]:  # what happens after a line is in the next one
        assert "statistics" in row["time"]
        if row["step"] - 1 in measured:
            (seconds,) = (one["seconds"] for one in read_metrics(trained, "ranks")
                          if one["step"] == row["step"] - 1)  # fmt: skip
            assert row["time"]["statistics"] >= seconds


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_mfu_is_the_share_of_the_published_rate(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = base_recipe(Path("/nowhere"))
    layers, width, context, vocabulary = 4, 256, 128, 50_304
    values["model"] |= {"num_layers": layers, "hidden_size": width, "context": context,
                        "vocabulary_size": vocabulary}  # fmt: skip
    values["precision"] = precision
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 << 30)
    grid: Any = type("G", (), {"device": torch.device("cuda"), "world_size": 2})()
    figures = Utilisation(parse_config(values), grid).figures(1e5)
    # GPT-2: 12 d² weights of a layer, the head, and half of attention's 12 L s d.
    flops = 6 * (12 * layers * width**2 + vocabulary * width) + 6 * layers * context * width
    peak = {"bf16": 989e12, "fp32": 67e12}[precision]
    assert figures["mfu"] == pytest.approx(1e5 * flops / (2 * peak), rel=0.01)
    assert figures["tokens_per_second"] == 5e4 and figures["peak_memory_gib"] == 3.0


@pytest.mark.parametrize(("name", "key"), [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100"), ("NVIDIA H200", "h200"),
    ("NVIDIA L40S", "l40s"), ("NVIDIA B200", "b200"), ("AMD Instinct MI300X OAM", "mi300x"),
    ("NVIDIA A10G", None), ("Tesla V100-SXM2-16GB", None), ("", None),
])  # fmt: skip
def test_names_of_devices(name: str, key: str | None) -> None:
    assert device_named(name) == (DEVICES[key] if key else None)
