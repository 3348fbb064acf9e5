"""Where a value that is not finite came from, and what is kept of its update."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.config import GPTConfig
from models.gpt import GPT
from models.layers import ParameterFactory
from models.loss import mean_loss
from models.roles import declared_parameters, info_of
from pretrain.engine.forensics import first_nonfinite
from tests.faults.tools import events_of, faulty, words_of

pytestmark = pytest.mark.slow

CONFIG = GPTConfig(
    dialect="gpt2", num_layers=2, hidden_size=32, num_attention_heads=2, vocabulary_size=64,
    context=16,
)  # fmt: skip
PARTS = {
    "layers.0": "embedding.weight", "layers.2.attention_norm": "blocks.0.attention_norm",
    "layers.2.attention": "blocks.0.attention", "layers.3": "blocks.1",
    "layers.3.mlp": "blocks.1.mlp",
}  # fmt: skip


def found_in(model: GPT, micro_batches: int = 3) -> str:
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    batches = [(tokens, tokens)] * micro_batches
    place = first_nonfinite(
        model, lambda batch: model(batch[0], lambda x: mean_loss(x, batch[1], False)), batches
    )
    return place.text if place else ""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", PARTS)
def test_the_first_module_is_named(part: str, value: float) -> None:
    model, calls = GPT(CONFIG, ParameterFactory(1)), 0

    def strike(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        output = output.clone()
        if calls == 2:
            output.view(-1)[5] = value
        return output

    model.get_submodule(part).register_forward_hook(strike)
    assert found_in(model) == f"{PARTS[part]} in micro batch 2"
    assert calls == 3  # every micro batch, as other processes wait in them


def test_a_weight_is_named_before_what_it_spoils() -> None:
    for name in ("blocks.1.attention.key.weight", "blocks.0.mlp_norm.bias"):
        model = GPT(CONFIG, ParameterFactory(1))
        assert found_in(model) == ""
        parameter = next(one for one in declared_parameters(model) if info_of(one).name == name)
        parameter.data.view(-1)[3] = float("nan")
        assert found_in(model) == f"the weight {name}"


def test_no_hook_is_left() -> None:
    model = GPT(CONFIG, ParameterFactory(1))
    found_in(model)
    assert not any(part._forward_hooks for part in model.modules())


@pytest.mark.parametrize(
    ("fault", "processes", "more", "wanted"),
    [
        ("layer", 1, (), "(first in blocks.1.mlp in micro batch 1)"),
        ("loss", 1, (), "(in the backward pass, or not again when the forward pass was repeated)"),
        pytest.param(
            "layer", 2, ("grid.zero_stage=3",),
            "(first in blocks.1.mlp in micro batch 1 on process rank 1)", marks=pytest.mark.long,
        ),
        pytest.param(
            "layer", 2, ("grid.tensor_parallel=2",), "(first in blocks.1.mlp in micro batch 1 on "
            "process rank 1)", marks=pytest.mark.long,
        ),
        pytest.param("gradient", 2, ("grid.pipeline_parallel=2",), "", marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_a_skipped_update_says_where(
    data: Path, tmp_path: Path, fault: str, processes: int, more: tuple[str, ...], wanted: str
) -> None:
    done = faulty(fault, processes - 1, "3", words_of(tmp_path, data, *more, steps=4), processes)
    assert done.returncode == 0, done.stderr
    (message,) = [text for text in events_of(tmp_path / "run") if "update is skipped" in text]
    assert wanted in message and message.endswith("the update is skipped")
    kept = sorted((tmp_path / "run/faults").glob("*")) if wanted else []
    if wanted:
        assert [one.name for one in kept][-1] == f"update-00000003-rank-{processes - 1}.npz"
        with np.load(kept[-1]) as batch:
            assert batch["inputs"].shape == batch["labels"].shape and batch["inputs"].ndim == 3
            assert np.array_equal(batch["inputs"][..., 1:], batch["labels"][..., :-1])
