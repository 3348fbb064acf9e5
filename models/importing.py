"""The way back from Hugging Face's classes: a configuration, and tensors under our names.

The inverse of `models.export`, tensor by tensor, for the classes that our switches describe:
GPT-2, GPT-NeoX (Pythia), Llama, Qwen3 and SmolLM3 without positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.config import GPTConfig
from models.roles import ModelError

ReadTheirs = Callable[[str], Tensor]
"""A tensor by its name in the class."""

_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "silu": "swiglu",
}  # fmt: skip
_KINDS = ("gpt2", "gpt_neox", "llama", "qwen3", "smollm3")


def model_values(config: dict[str, Any]) -> dict[str, Any]:
    """Values of `GPTConfig` that describe the model of a ``config.json``.

    Raises:
        ModelError: naming what our models do not have.
    """
    kind = config.get("model_type")
    if kind not in _KINDS:
        raise ModelError(f"model_type {kind!r} cannot be trained on; known: {', '.join(_KINDS)}")
    try:
        values = _gpt2(config) if kind == "gpt2" else _others(kind, config)
    except KeyError as error:
        raise ModelError(f"config.json has no {error.args[0]}") from None
    return {**values, "vocabulary_size": config["vocab_size"]}


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ModelError(f"config.json: activation {name!r}; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _refuse(config: dict[str, Any], key: str, usual: Any) -> None:
    if config.get(key, usual) not in (usual, None):
        raise ModelError(f"config.json: {key} {config[key]!r}; our models have {usual!r} alone")


def _gpt2(config: dict[str, Any]) -> dict[str, Any]:
    _refuse(config, "scale_attn_by_inverse_layer_idx", False)
    _refuse(config, "scale_attn_weights", True)
    return {
        "dialect": "gpt2",
        "num_layers": config["n_layer"],
        "hidden_size": config["n_embd"],
        "num_attention_heads": config["n_head"],
        "ffn_hidden_size": config.get("n_inner") or 4 * config["n_embd"],
        "context": config["n_positions"],
        "activation": _activation(config.get("activation_function", "gelu_new")),
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "tied_head": config.get("tie_word_embeddings", True),
    }


def _others(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", None):
        raise ModelError(f"config.json: rotary scaling {rope!r}; our models have none")
    values = {
        "dialect": "gpt_neox" if kind == "gpt_neox" else "llama",
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "ffn_hidden_size": config["intermediate_size"],
        "context": config["max_position_embeddings"],
        "activation": _activation(config["hidden_act"]),
        "tied_head": config.get("tie_word_embeddings", False),
    }
    if kind == "gpt_neox":
        fraction = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
        base = rope.get("rope_theta", config.get("rotary_emb_base", 10_000.0))
        return values | {
            "rotary_fraction": fraction,
            "rotary_base": base,
            "norm_epsilon": config.get("layer_norm_eps", 1e-5),
            "parallel_residual": config.get("use_parallel_residual", True),
        }
    _refuse(config, "attention_bias", False)
    _refuse(config, "mlp_bias", False)
    _refuse(config, "use_sliding_window", False)
    if kind == "smollm3" and any(config.get("no_rope_layers") or [1]):
        raise ModelError("config.json: no_rope_layers; our models rotate all layers or none")
    heads = config["num_attention_heads"]
    return values | {
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "rotary_base": rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "qk_norm": kind == "qwen3",
        "position": "none" if kind == "smollm3" else "rotary",
    }


def read_as_ours(kind: str, config: GPTConfig, theirs: ReadTheirs, name: str) -> Tensor:
    """A tensor by our name, with its whole vocabulary and no padding.

    Args:
        kind: ``model_type`` of the class.
    """
    prefix = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}.get(kind, "model.")
    if not name.startswith("blocks."):
        table = {"gpt2": _GPT2_ENDS, "gpt_neox": _NEOX_ENDS}.get(kind, _LLAMA_ENDS)
        return theirs(table[name] if name == "head.weight" else prefix + table[name])
    _, layer, part = name.split(".", 2)
    if kind == "gpt2":
        return _gpt2_part(lambda one: theirs(f"{prefix}h.{layer}.{one}"), part)
    if kind == "gpt_neox":
        return _neox_part(config, lambda one: theirs(f"{prefix}layers.{layer}.{one}"), part)
    return theirs(f"{prefix}layers.{layer}.{_LLAMA_PARTS[part]}")


_GPT2_ENDS = {
    "embedding.weight": "wte.weight", "position.weight": "wpe.weight",
    "final_norm.weight": "ln_f.weight", "final_norm.bias": "ln_f.bias",
    "head.weight": "lm_head.weight",
}  # fmt: skip
_NEOX_ENDS = {
    "embedding.weight": "embed_in.weight", "final_norm.weight": "final_layer_norm.weight",
    "final_norm.bias": "final_layer_norm.bias", "head.weight": "embed_out.weight",
}  # fmt: skip
_LLAMA_ENDS = {
    "embedding.weight": "embed_tokens.weight", "final_norm.weight": "norm.weight",
    "head.weight": "lm_head.weight",
}  # fmt: skip
_LLAMA_PARTS = {
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.in.weight": "mlp.up_proj.weight",
    "mlp.out.weight": "mlp.down_proj.weight",
}
_FUSED = ("query", "key", "value")
_GPT2_PARTS = {
    "attention_norm": "ln_1", "mlp_norm": "ln_2", "attention.output": "attn.c_proj",
    "mlp.in": "mlp.c_fc", "mlp.out": "mlp.c_proj",
}  # fmt: skip
_NEOX_PARTS = {
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attention.output": "attention.dense", "mlp.in": "mlp.dense_h_to_4h",
    "mlp.out": "mlp.dense_4h_to_h",
}  # fmt: skip


def _gpt2_part(theirs: ReadTheirs, part: str) -> Tensor:
    """Matrices are stored transposed (Conv1D), queries, keys and values side by side."""
    module, _, kind = part.rpartition(".")
    _, _, which = module.rpartition(".")
    if which in _FUSED:
        fused = theirs(f"attn.c_attn.{kind}")
        return fused.mT.chunk(3)[_FUSED.index(which)] if kind == "weight" else _third(fused, which)
    found = theirs(f"{_GPT2_PARTS[module]}.{kind}")
    return found.mT if found.ndim == 2 else found


def _third(fused: Tensor, which: str) -> Tensor:
    return fused.chunk(3)[_FUSED.index(which)]


def _neox_part(config: GPTConfig, theirs: ReadTheirs, part: str) -> Tensor:
    """Queries, keys and values are interleaved by head."""
    module, _, kind = part.rpartition(".")
    _, _, which = module.rpartition(".")
    if which in _FUSED:
        fused = theirs(f"attention.query_key_value.{kind}")
        by_head = fused.unflatten(0, (config.num_attention_heads, 3, -1))
        return torch.flatten(by_head[:, _FUSED.index(which)], 0, 1)
    return theirs(f"{_NEOX_PARTS[module]}.{kind}")
