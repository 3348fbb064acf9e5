"""How many runs at once the dry run proposes for a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.config.recipe import parse_config
from pretrain.sweep.at_once import runs_per_gpu

SMALL = {"num_layers": 6, "hidden_size": 256, "num_attention_heads": 4, "context": 256}


def proposed(
    speed: dict[str, Any],
    processes: int = 1,
    mfu: float | None = 0.03,
    peak: float = 3.0,
    memory: float = 80.0,
) -> tuple[int, str]:
    recipe = {"model": {**SMALL, "vocabulary_size": 8192}, "train": {"global_batch": 128}}
    config = parse_config({**recipe, "speed": speed, "precision": "bf16"})
    return runs_per_gpu(config, processes, mfu, peak, memory)


@pytest.mark.parametrize(
    ("words", "count", "reason"),
    [
        ({"speed": {}}, 1, "CUDA graphs"),
        ({"speed": {"graph": True}}, 1, "CUDA graphs"),
        ({"speed": {"graph": False}}, 2, "the host limits"),
        ({"speed": {"graph": False}, "mfu": None}, 2, "the host limits"),
        ({"speed": {"graph": False}, "processes": 2}, 1, "several processes"),
        ({"speed": {"graph": False}, "mfu": 0.31}, 1, "31%"),
        ({"speed": {"graph": False}, "peak": 40.0}, 1, "two would take 83 of its 80 GiB"),
        ({"speed": {"update": "deepspeed"}}, 2, "the host limits"),
    ],
)
def test_runs_per_gpu(words: dict[str, Any], count: int, reason: str) -> None:
    found, why = proposed(**words)
    assert found == count and reason in why
