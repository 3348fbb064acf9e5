"""Copies of weights on several processes: equal in every bit, and a flipped bit is named."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.tools import base_recipe, run_workers

WHOLE, SPLIT = "blocks.1.mlp_norm.weight", "blocks.0.mlp.in.weight"
GRIDS: dict[int, list[dict[str, Any]]] = {
    2: [{"tensor_parallel": 2, "zero_stage": stage} for stage in (0, 1, 2)]
    + [{"tensor_parallel": 2, "zero_stage": 1, "sequence_parallel": True}, {"zero_stage": 1}],
    4: [{"tensor_parallel": 2, "zero_stage": 1},
        {"tensor_parallel": 2, "zero_stage": 0, "pipeline_parallel": 2}],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("processes", GRIDS)
def test_a_flipped_bit_is_named(processes: int, data: Path, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    for number, grid in enumerate(GRIDS[processes]):
        values: dict[str, Any] = deepcopy(base_recipe(data))
        values["model"] |= {"vocabulary_size": 90, "dialect": ["llama", "gpt2"][number % 2]}
        values["model"] |= {"num_key_value_heads": 1} if number % 2 == 0 else {}
        values["train"] = {"steps": 4, "global_batch": 8}
        values["precision"], values["grid"] = ["fp32", "bf16"][grid["zero_stage"] % 2], grid
        asked.append({"recipe": values, "flips": [WHOLE, SPLIT]})
    for case, answer in zip(asked, run_workers(processes, "drift", asked, tmp_path), strict=True):
        grid = case["recipe"]["grid"]
        tensor = grid.get("tensor_parallel", 1)
        data_parallel = processes // tensor // grid.get("pipeline_parallel", 1)
        assert answer["clean"] == ["", ""], grid
        for name in (WHOLE, SPLIT):
            if "pipeline_parallel" in grid and name == SPLIT:  # the last rank has another stage
                assert answer[name] == ["", ""]
                continue
            between_data, between_tensor = answer[name]
            assert bool(between_data) == (data_parallel > 1), (grid, answer)
            assert bool(between_tensor) == (tensor > 1 and name == WHOLE), (grid, answer)
            for text in filter(None, (between_data, between_tensor)):
                assert text.startswith(f"{name} differs between process ranks "), text
                assert text.endswith(str(processes - 1)), text
