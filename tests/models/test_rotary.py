"""Rotary frequencies of long contexts, against transformers and by loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.config import GPTConfig
from models.export import config_json
from models.foreign_config import model_values
from models.rotary import Rotary, RotaryScaling

LLAMA: dict[str, Any] = {
    "dialect": "llama",
    "hidden_size": 512,
    "num_attention_heads": 4,
    "vocabulary_size": 64,
}
SCALINGS = [  # factor, old context, low, high: Llama 3.1, 3.2, and others
    (8.0, 8192, 1.0, 4.0),
    (32.0, 8192, 1.0, 4.0),
    (2.5, 100, 0.5, 30.0),
]


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_are_those_of_transformers(
    scaling: tuple[float, int, float, float], base: float
) -> None:
    factor, context, low, high = scaling
    theirs = transformers.LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=131_072,
        rope_parameters={"rope_type": "llama3", "rope_theta": base, "factor": factor,
                         "low_freq_factor": low, "high_freq_factor": high,
                         "original_max_position_embeddings": context},
    )  # fmt: skip
    wanted, times = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    found = Rotary(128, base, RotaryScaling(*scaling)).frequencies()
    assert times == 1.0
    assert torch.allclose(found.float(), wanted, rtol=1e-6, atol=0)
    assert (found < Rotary(128, base).frequencies()).any()


def test_frequencies_by_hand() -> None:
    """Fast pairs keep theirs, slow ones are divided, and those between are mixed by their turns."""
    found = Rotary(64, 500.0, RotaryScaling(8.0, 512, 1.0, 4.0)).frequencies()
    seen = set()
    for pair in range(32):
        plain = 500.0 ** (-2 * pair / 64)
        turns = 512 * plain / (2 * math.pi)
        kept = min(1.0, max(0.0, (turns - 1) / 3))
        seen.add((kept == 0) - (kept == 1))
        assert found[pair].item() == pytest.approx(kept * plain + (1 - kept) * plain / 8)
    assert seen == {-1, 0, 1}


def test_an_export_says_the_scaling() -> None:
    more = {"rotary_factor": 8.0, "rotary_base": 5e5, "rotary_old_context": 4096, "rotary_low": 2.0,
            "rotary_high": 5.0}  # fmt: skip
    config = GPTConfig(**LLAMA, **more)
    written = config_json(config, config.head_size, None)
    theirs = transformers.LlamaConfig(**written)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    assert torch.allclose(
        Rotary(128, 5e5, config.rotary_scaling).frequencies().float(), wanted, rtol=1e-6
    )
    read = model_values(written)
    assert {key: read[key] for key in more} == more
    plain = config_json(GPTConfig(**LLAMA), 128, None)
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    ("values", "culprit"),
    [
        ({"rotary_factor": 8.0, "rotary_low": 4.0}, "rotary_high: 4 must be more than rotary_low"),
        ({"rotary_factor": 2.0, "position": "none"}, "without position rotary"),
        ({"rotary_factor": 0.5}, "greater than or equal to 1"),
    ],
)
def test_mistakes(values: dict[str, Any], culprit: str) -> None:
    with pytest.raises(ValueError, match=culprit):
        GPTConfig(**{**LLAMA, **values})
