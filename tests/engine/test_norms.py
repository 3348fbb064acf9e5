"""Gradient norms are right to rounding, however large the tensor and whatever the grid."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.engine.norms import square_sum
from pretrain.engine.optimizers import orthogonalize
from pretrain.engine.shrink import Shrinker
from tests.tools import base_recipe, metrics_of, run_workers, weights_of

GRIDS = {
    # name: (processes, grid, raw keys)
    **{f"zero-{stage}": (1, {"zero_stage": stage}, {}) for stage in (0, 1, 2, 3)},
    **{f"pipeline-{stage}": (2, {"pipeline_parallel": 2, "zero_stage": stage}, {})
       for stage in (0, 1)},
    "tensor": (2, {"tensor_parallel": 2, "zero_stage": 0}, {}),
    "data": (2, {"zero_stage": 2}, {}),
    **{f"offload-{stage}": (2, {"zero_stage": stage},
                            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
       for stage in (1, 2)},
}  # fmt: skip
FEW = {
    "fp32": ("zero-0", "zero-1", "pipeline-0", "tensor", "data"),
    "bf16": ("zero-3", "pipeline-1", "offload-1"),
}
"""Grids of the short form."""


@pytest.mark.parametrize("count", [0, 1, 2047, 2048, 2049, 3_000_001, 26_000_000])
def test_squares_are_summed_to_rounding(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).mul_(1e-3)
    exact = float(values.double().square().sum())
    assert float(square_sum(values)) == pytest.approx(exact, rel=3e-7)
    if count % 3 == 2 and count > 3:  # not contiguous
        assert float(square_sum(values[: count - 2].view(-1, 3).T)) == pytest.approx(
            float(values[: count - 2].double().square().sum()), rel=3e-7
        )


LARGE = 3_000_000  # PyTorch's own norm of so many is 6e-5 off


def test_the_ratio_of_awd_has_the_norm_of_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.engine.shrink.norm_in_step", lambda _: 1.0)
    draws = torch.Generator().manual_seed(1)
    parts = [torch.randn(LARGE, generator=draws).mul_(1e-3) for _ in range(2)]
    held = SimpleNamespace(
        _engine=None,
        _grid=SimpleNamespace(device=torch.device("cpu"), data_rank=0, world_size=1),
        _fragments=[SimpleNamespace(parameter=part, master=part) for part in parts],
        _replicated=False,
    )
    exact = sum(float(part.double().square().sum()) for part in parts) ** -0.5
    assert Shrinker._norm_ratio(held) == pytest.approx(exact, rel=1e-6)  # type: ignore[arg-type]


def test_muon_begins_with_the_norm_of_the_matrix() -> None:
    """With no iterations: what they start from."""
    matrix = torch.randn(1, LARGE, generator=torch.Generator().manual_seed(1)).mul_(1e-3)
    assert float(orthogonalize(matrix, iterations=0).double().norm()) == pytest.approx(
        1.0, rel=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_norm_of_a_large_gradient(
    data: Path, tmp_path: Path, precision: str, request: pytest.FixtureRequest
) -> None:
    """Of one update of SGD, whose momentum is the gradient; each kind of sum in one precision."""
    chosen = GRIDS if request.config.getoption("--long") else FEW[precision]
    for processes in (1, 2):
        cases: list[dict[str, Any]] = []
        for name in chosen:
            count, grid, raw = GRIDS[name]
            if count == processes and not (precision == "bf16" and grid["zero_stage"] == 0):
                values = deepcopy(base_recipe(data))
                values["model"] |= {"vocabulary_size": 40_000, "hidden_size": 64, "context": 8,
                                    "tied_head": True}  # fmt: skip
                values |= {"precision": precision, "grid": grid, "deepspeed": raw}
                values["train"] = {"steps": 1, "global_batch": 8, "micro_batch": 2}
                values["optimizer"] = {"name": "sgd", "gradient_clipping": 0}
                values["ranks"]["every"] = values["checkpoint"]["every"] = 1
                values["evaluation"] |= {"every": 1, "documents": 1, "at_end": "none"}
                cases.append({"recipe": values, "run": str(tmp_path / name)})
        run_workers(processes, "train", cases, tmp_path / f"workers-{processes}")
        for case in cases:
            weights = weights_of(Path(case["run"]))
            exact = np.sqrt(sum(
                float((values.astype(np.float64) ** 2).sum())
                for name, values in weights.items()
                if name.endswith("/momentum_buffer")
            ))  # fmt: skip
            found = metrics_of(Path(case["run"]))[0]["grad_norm"]
            assert found == pytest.approx(exact, rel=1e-6), case["run"]
