"""What `pretrain plan` advises and how it writes numbers: no zeros for what is small."""

from __future__ import annotations

import re

import pytest

from pretrain.cluster.plan import rank
from pretrain.cluster.plan_table import in_bytes, in_time, plan
from pretrain.config.recipe import parse_config
from pretrain.engine.accelerators import DEVICES

SMALL = {
    "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "context": 64,
              "vocabulary_size": 1000},
    "train": {"global_batch": 64, "steps": 20},
}  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 8, 16])
def test_a_small_model_is_not_divided_for_memory(count: int) -> None:
    """Every variant fits and takes about as long, so that optimizer states need no ZeRO 2 or 3."""
    found = rank(parse_config(SMALL), DEVICES["h100"], count)
    assert {one.zero_stage for one in found} == {1}


def test_no_figure_is_rounded_to_zero(capsys: pytest.CaptureFixture[str]) -> None:
    plan(parse_config(SMALL), "h100", 4, 3, False)
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith(("memory", "sent", "a step"))]
    assert len(lines) == 3
    for part in ", ".join(line.partition(": ")[2] for line in lines).split(", "):
        number = re.fullmatch(r"[a-z]+ ([\d.,]+) (GB|MB|kB|bytes|s|ms|µs)", part)
        assert number and float(number[1].replace(",", "")) > 0, part
    assert re.search(r"20 steps: [\d.]+ ms, [\d.]+ ms of a GPU", text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (12, "12 bytes"), (999, "999 bytes"), (1.5e9, "1.5 GB"), (31.26e6, "31.3 MB"),
     (123.6e9, "124 GB"), (5.2e12, "5.2 TB")],
)  # fmt: skip
def test_bytes(value: float, text: str) -> None:
    assert in_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(9.52e-5, "95.2 µs"), (1.28e-3, "1.28 ms"), (0.7, "700 ms"), (59, "59 s"), (61, "1.02 min"),
     (5400, "1.5 hours"), (86400 * 3.2, "3.2 days"), (86400 * 3200, "3,200 days")],
)  # fmt: skip
def test_times(value: float, text: str) -> None:
    assert in_time(value) == text
