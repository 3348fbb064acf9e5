"""Small models in Hugging Face's form, made without its library: weights, config.json, damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.config import GPTConfig
from models.gpt import GPT
from models.importing import ForeignModel
from models.layers import ParameterFactory
from models.roles import ModelError, info_of
from pretrain.config.run import RanksConfig
from pretrain.offline.ranks import find_weights, means, measure_weights

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 32,
    "intermediate_size": 48, "vocab_size": 400, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip


def llama_tensors(layers: int = 2, width: int = 32, inner: int = 48) -> dict[str, torch.Tensor]:
    """The tensors of a Llama."""
    made = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=made)

    found = {
        "model.embed_tokens.weight": random(400, width),
        "lm_head.weight": random(400, width),
        "model.norm.weight": 1 + random(width),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{x}_proj.weight": random(width, width) for x in "qkvo"}
        found |= {f"{prefix}mlp.{x}_proj.weight": random(inner, width) for x in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = random(width, inner)
        norms = ("input_layernorm", "post_attention_layernorm")
        found |= {f"{prefix}{x}.weight": 1 + random(width) for x in norms}
    return found


def write_model(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None
) -> Path:
    """``model.safetensors`` and ``config.json``."""
    folder.mkdir(parents=True)
    save_file({name: one.contiguous() for name, one in tensors.items()},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    (folder / "config.json").write_text(json.dumps(LLAMA if config is None else config))
    return folder


def our_logits(folder: Path, tokens: torch.Tensor, allow_unused: bool = False) -> torch.Tensor:
    """Logits ``[batch, sequence, vocabulary]`` of our model with a foreign one's weights.

    Raises:
        ModelError: if the model is not understood.
    """
    theirs = ForeignModel(folder, lambda text: None)
    config = GPTConfig(**theirs.values)
    model = GPT(config, ParameterFactory(0))
    infos = [info_of(parameter) for parameter in model.parameters()]
    theirs.check(config, infos, allow_unused)
    with torch.no_grad():
        for parameter, info in zip(model.parameters(), infos, strict=True):
            values = theirs.tensor(config, info.name)
            parameter.zero_()
            parameter[: len(values)] = values
        logits: torch.Tensor = model(tokens).transpose(0, 1)[..., : config.vocabulary_size]
        return logits


ATTENTION = "model.layers.1.self_attn."

TOKENS = torch.arange(64).reshape(2, 32) % 400


def refused(folder: Path, *culprits: str, importing: bool = True) -> None:
    """`ranks` and `import` refuse the model in one line that names the culprits."""
    actions: list[Callable[[], Any]] = [lambda: measure(folder)]
    if importing:
        actions.append(lambda: our_logits(folder, TOKENS))
    for action in actions:
        with pytest.raises(ModelError) as caught:
            action()
        text = str(caught.value)
        assert "\n" not in text and all(one in text for one in culprits), text


def measure(folder: Path, **options: Any) -> dict[str, float]:
    rows, _ = measure_weights(find_weights(str(folder), **options), RanksConfig())
    return means(rows)
