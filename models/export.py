"""Converts our tensors to the names and layouts of Hugging Face's classes.

These are pure functions of a configuration and of a function that reads a tensor by our name; they
handle one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from models.config import GPTConfig
from models.roles import ModelError

Read = Callable[[str], Tensor]
"""A function that reads a global tensor by our name."""


_WRITTEN = frozenset({
    "dialect", "num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "ffn_hidden_size", "context", "vocabulary_size", "vocabulary_multiple", "position",
    "rotary_fraction", "rotary_base", "rotary_factor", "rotary_old_context", "rotary_low",
    "rotary_high", "norm", "norm_epsilon", "activation", "biases",
    "parallel_residual", "tied_head", "qk_norm", "attention", "causal", "mlp", "image_size",
    "patch_size", "image_channels", "initialization", "init_std",
})  # fmt: skip
"""The settings that `class_of` decides about, or the exported files have. A model that uses any
other setting is refused: it would be exported as a model that computes something else."""


def class_of(config: GPTConfig) -> str:
    """The class that computes exactly this model: gpt2, gpt_neox, llama, qwen3 or smollm3.

    Raises:
        ModelError: naming the settings that no class has.
    """
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name not in _WRITTEN and value != field.default:
            raise ModelError(
                f"no Hugging Face class is known for a model with model.{name} {value}; "
                "models/export.py has to be extended for it"
            )
    common = config.causal and config.attention == "softmax" and config.mlp
    layernorm = common and config.norm == "layernorm" and config.biases and not config.qk_norm
    grouped = config.key_value_heads != config.num_attention_heads
    square = config.head_size * config.num_attention_heads == config.hidden_size
    if layernorm and config.activation != "swiglu" and square and not grouped:
        if config.position == "learned" and not config.parallel_residual:
            return "gpt2"
        if config.position == "rotary":
            return "gpt_neox"
    llama = common and config.norm == "rmsnorm" and config.activation == "swiglu"
    if llama and not config.parallel_residual and not config.biases:
        if config.position == "none" and not config.qk_norm:
            return "smollm3"
        if config.rotary_dim == config.head_size:
            return "qwen3" if config.qk_norm else "llama"
    raise ModelError(
        "no Hugging Face class computes this model (model.position "
        f"{config.position}, norm {config.norm}, activation {config.activation}, biases "
        f"{config.biases}, attention {config.attention}, mlp {config.mlp}); the dialects gpt2, "
        "gpt_neox and llama can be exported with their default settings"
    )


def has_free_heads(config: GPTConfig) -> bool:
    """Whether the class allows heads in both products that are not hidden_size / heads wide."""
    return class_of(config) == "smollm3"


_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "swiglu": "silu"}


def config_json(
    config: GPTConfig, head_size: int, eod: int | None, ids: dict[str, Any] | None = None
) -> dict[str, Any]:
    """``config.json`` of the class, for heads of ``head_size``.

    Args:
        eod: the token that begins and ends documents, if the data has documents.
        ids: keys of special tokens from an imported model, which replace ``eod``.
    """
    kind = class_of(config)
    common: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocabulary_size,
        "tie_word_embeddings": config.tied_head,
        "dtype": "float32",
    }
    default_ids = {"bos_token_id": eod, "eos_token_id": eod, "pad_token_id": None}
    common |= default_ids if ids is None else ids
    if kind == "gpt2":
        return common | {
            "n_embd": config.hidden_size,
            "n_layer": config.num_layers,
            "n_head": config.num_attention_heads,
            "n_positions": config.context,
            "n_inner": config.ffn_size,
            "activation_function": _ACTIVATIONS[config.activation],
            "layer_norm_epsilon": config.norm_epsilon,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    common |= {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_size,
        "hidden_act": _ACTIVATIONS[config.activation],
        "max_position_embeddings": config.context,
        "rope_parameters": {**_scaling(config), "rope_theta": config.rotary_base},
        "rope_theta": config.rotary_base,
    }
    if kind == "gpt_neox":
        common["rope_parameters"]["partial_rotary_factor"] = config.rotary_fraction
        return common | {
            "rotary_pct": config.rotary_fraction,
            "rotary_emb_base": config.rotary_base,
            "layer_norm_eps": config.norm_epsilon,
            "use_parallel_residual": config.parallel_residual,
        }
    common |= {
        "num_key_value_heads": config.key_value_heads,
        "head_dim": head_size,
        "rms_norm_eps": config.norm_epsilon,
        "attention_bias": False,
    }
    if kind == "smollm3":
        common["no_rope_layers"] = [0] * config.num_layers
    return common


def _scaling(config: GPTConfig) -> dict[str, Any]:
    """The kind of rotary positions, and its parameters."""
    scaling = config.rotary_scaling
    if scaling is None:
        return {"rope_type": "default"}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.context,
    }


def shards(config: GPTConfig, read: Read, head_size: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of the class, one part at a time: the embedding, each layer, the last part.

    Args:
        head_size: head width of the attention tensors that ``read`` returns; if it is less than
            the model's, queries are scaled so that the effective 1/√head_size does not change.
    """
    # No variable of this frame keeps a part alive while the next one is made.
    yield _first(config, read)
    scale = (head_size / config.head_size) ** 0.5
    for layer in range(config.num_layers):
        yield _layer(config, read, layer, scale)
    yield _last(config, read)


def _words(kind: str) -> tuple[str, str, str, str]:
    """Names of the class: its prefix, embedding, layers and final norm."""
    names = {
        "gpt2": ("transformer.", "wte.weight", "h.{}.", "ln_f"),
        "gpt_neox": ("gpt_neox.", "embed_in.weight", "layers.{}.", "final_layer_norm"),
    }
    return names.get(kind, ("model.", "embed_tokens.weight", "layers.{}.", "norm"))


def _first(config: GPTConfig, read: Read) -> dict[str, Tensor]:
    kind = class_of(config)
    prefix, embedding, _, _ = _words(kind)
    tensors = {prefix + embedding: read("embedding.weight")[: config.vocabulary_size]}
    if kind == "gpt2":
        tensors["transformer.wpe.weight"] = read("position.weight")
    return _whole(tensors)


def _layer(config: GPTConfig, read: Read, layer: int, scale: float) -> dict[str, Tensor]:
    kind = class_of(config)
    prefix, _, layers, _ = _words(kind)
    make = {"gpt2": _gpt2_layer, "gpt_neox": _neox_layer}.get(kind, _llama_layer)
    tensors = make(config, _of_layer(read, layer), scale)
    return _whole({prefix + layers.format(layer) + name: value for name, value in tensors.items()})


def _last(config: GPTConfig, read: Read) -> dict[str, Tensor]:
    kind = class_of(config)
    prefix, _, _, norm = _words(kind)
    tensors = {f"{prefix}{norm}.weight": read("final_norm.weight")}
    if config.norm == "layernorm":
        tensors[f"{prefix}{norm}.bias"] = read("final_norm.bias")
    if not config.tied_head:
        head = "embed_out.weight" if kind == "gpt_neox" else "lm_head.weight"
        tensors[head] = read("head.weight")[: config.vocabulary_size]
    return _whole(tensors)


def _of_layer(read: Read, layer: int) -> Read:
    return lambda part: read(f"blocks.{layer}.{part}")


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.contiguous() for name, values in tensors.items()}


def _scaled_qkv(read: Read, kind: str, scale: float) -> list[Tensor]:
    query, key, value = (read(f"attention.{part}.{kind}") for part in ("query", "key", "value"))
    return [query * scale if scale != 1.0 else query, key, value]


def _gpt2_layer(config: GPTConfig, read: Read, scale: float) -> dict[str, Tensor]:
    def turned(name: str) -> Tensor:
        return read(name).mT.contiguous()  # at once: the layer need not be there twice

    return {
        "ln_1.weight": read("attention_norm.weight"),
        "ln_1.bias": read("attention_norm.bias"),
        "attn.c_attn.weight": torch.cat(_scaled_qkv(read, "weight", scale)).mT.contiguous(),
        "attn.c_attn.bias": torch.cat(_scaled_qkv(read, "bias", scale)),
        "attn.c_proj.weight": turned("attention.output.weight"),
        "attn.c_proj.bias": read("attention.output.bias"),
        "ln_2.weight": read("mlp_norm.weight"),
        "ln_2.bias": read("mlp_norm.bias"),
        "mlp.c_fc.weight": turned("mlp.in.weight"),
        "mlp.c_fc.bias": read("mlp.in.bias"),
        "mlp.c_proj.weight": turned("mlp.out.weight"),
        "mlp.c_proj.bias": read("mlp.out.bias"),
    }


def _neox_layer(config: GPTConfig, read: Read, scale: float) -> dict[str, Tensor]:
    def interleaved(kind: str) -> Tensor:
        parts = [
            matrix.unflatten(0, (config.num_attention_heads, -1))
            for matrix in _scaled_qkv(read, kind, scale)
        ]
        return torch.cat(parts, 1).flatten(0, 1)

    return {
        "input_layernorm.weight": read("attention_norm.weight"),
        "input_layernorm.bias": read("attention_norm.bias"),
        "post_attention_layernorm.weight": read("mlp_norm.weight"),
        "post_attention_layernorm.bias": read("mlp_norm.bias"),
        "attention.query_key_value.weight": interleaved("weight"),
        "attention.query_key_value.bias": interleaved("bias"),
        "attention.dense.weight": read("attention.output.weight"),
        "attention.dense.bias": read("attention.output.bias"),
        "mlp.dense_h_to_4h.weight": read("mlp.in.weight"),
        "mlp.dense_h_to_4h.bias": read("mlp.in.bias"),
        "mlp.dense_4h_to_h.weight": read("mlp.out.weight"),
        "mlp.dense_4h_to_h.bias": read("mlp.out.bias"),
    }


def _llama_layer(config: GPTConfig, read: Read, scale: float) -> dict[str, Tensor]:
    query, key, value = _scaled_qkv(read, "weight", scale)
    tensors = {
        "input_layernorm.weight": read("attention_norm.weight"),
        "post_attention_layernorm.weight": read("mlp_norm.weight"),
        "self_attn.q_proj.weight": query,
        "self_attn.k_proj.weight": key,
        "self_attn.v_proj.weight": value,
        "self_attn.o_proj.weight": read("attention.output.weight"),
        "mlp.gate_proj.weight": read("mlp.gate.weight"),
        "mlp.up_proj.weight": read("mlp.in.weight"),
        "mlp.down_proj.weight": read("mlp.out.weight"),
    }
    if config.qk_norm:
        tensors["self_attn.q_norm.weight"] = read("attention.query_norm.weight")
        tensors["self_attn.k_norm.weight"] = read("attention.key_norm.weight")
    return tensors
