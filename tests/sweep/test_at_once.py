"""How many runs at once the dry run proposes for a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.config.recipe import Config, parse_config
from pretrain.sweep.at_once import runs_per_gpu

SMALL = {"num_layers": 6, "hidden_size": 256, "num_attention_heads": 4, "context": 256}
LARGE = {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "context": 2048}


def recipe(batch: int = 128, model: dict[str, int] = SMALL, **speed: Any) -> Config:
    return parse_config({
        "model": {**model, "vocabulary_size": 8192}, "train": {"global_batch": batch},
        "speed": speed, "precision": "bf16",
    })  # fmt: skip


HOST, GRAPHS, LONG = "the host limits", "CUDA graphs", "long enough"
NO_GRAPH = recipe(graph=False)


@pytest.mark.parametrize(
    ("configs", "more", "count", "reason"),
    [
        ([recipe()], {}, 1, GRAPHS),
        ([recipe(graph=True)], {}, 1, GRAPHS),
        ([NO_GRAPH], {}, 2, HOST),
        ([recipe(update="deepspeed")], {}, 2, HOST),
        ([NO_GRAPH], {"processes": 2}, 1, "several processes"),
        ([NO_GRAPH], {"peak": 40.0}, 1, "two would take 83 GiB, more than 90% of its 80"),
        ([NO_GRAPH], {"peak": 35.0}, 1, "two would take 73 GiB"),
        ([recipe(32, LARGE, graph=False)], {}, 1, LONG),
        ([recipe(64, LARGE)], {}, 1, LONG),  # too long for a graph to pay
        ([NO_GRAPH, recipe(32, LARGE, graph=False)], {}, 1, LONG),
        ([recipe(32, LARGE, graph=False), NO_GRAPH], {}, 1, LONG),
        ([NO_GRAPH, recipe()], {}, 1, GRAPHS),
    ],
)
def test_runs_per_gpu(configs: list[Config], more: dict[str, Any], count: int, reason: str) -> None:
    words = {"processes": 1, "peak": 3.0, "memory": 80.0} | more
    found, why = runs_per_gpu(configs, **words)
    assert found == count and reason in why
