"""Small models of every family, built by `transformers`, and their dense products.

The products come from what the library's own modules compute: its attention function is replaced
by one that records queries, keys and values per head, with the identity as hidden states.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

_TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_IMAGE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}
_GROUPED = {"num_key_value_heads": 2}
_WIDE = {"num_key_value_heads": 2, "head_dim": 16}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _TEXT | _GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", _TEXT | _WIDE),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _TEXT | _GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _TEXT | _WIDE),
    "gemma": (
        "GemmaConfig",
        "GemmaForCausalLM",
        _TEXT | {"num_key_value_heads": 1, "head_dim": 16},
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 96},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _TEXT),
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "hidden_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "vocab_size": 64,
            "max_position_embeddings": 96,
        },
    ),
    "opt": ("OPTConfig", "OPTForCausalLM", _TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 48}),
    "phi": ("PhiConfig", "PhiForCausalLM", _TEXT),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _TEXT | _GROUPED),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", _TEXT),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _TEXT | _GROUPED),
    "bert": ("BertConfig", "BertForMaskedLM", _TEXT),
    "vit": ("ViTConfig", "ViTForImageClassification", _IMAGE),
    "deit": ("DeiTConfig", "DeiTForImageClassification", _IMAGE),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {"text_config": dict(_TEXT), "vision_config": dict(_IMAGE), "projection_dim": 16},
    ),
}


def build(family: str) -> Any:
    """A model of the family with weights of every size and no biases."""
    config_name, model_name, values = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**values)
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                scale = torch.logspace(0, -2, parameter.shape[-1])
                parameter.copy_(torch.randn(parameter.shape) * scale)
            elif name.endswith("bias"):
                parameter.zero_()
    return model


Products = dict[tuple[str, int, str, int], torch.Tensor]
"""Dense float64 products by (tower, layer, ``qk`` or ``vp``, query head)."""


def dense_products(model: Any, family: str) -> Products:
    """What the library's modules make of the identity, head by head."""
    towers = {"": model}
    if family == "clip":
        towers = {"text": model.text_model, "vision": model.vision_model}
    found: Products = {}
    for name, tower in towers.items():
        for layer, (q, k, v, p) in enumerate(_recorded(tower.double(), family, name)):
            group = q.shape[0] // k.shape[0]
            for head in range(q.shape[0]):
                shared = head // group
                # q, k, v: [heads, width, head]; p: [width, heads, head]
                found[name, layer, "qk", head] = k[shared] @ q[head].mT
                found[name, layer, "vp", head] = p[:, head] @ v[shared].mT
    return found


_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "output.dense")


def _recorded(tower: Any, family: str, name: str) -> list[tuple[torch.Tensor, ...]]:
    recorded: list[tuple[torch.Tensor, ...]] = []
    modules: list[Any] = []

    def record(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        recorded.append((query[0], key[0], value[0]))
        modules.append(module)
        return torch.zeros_like(query).transpose(1, 2), None

    eye = torch.eye(48, dtype=torch.float64)[None]

    def identity_in(module, words, more):  # type: ignore[no-untyped-def]
        module.original = words[0] if words else more["hidden_states"]
        if more.get("position_embeddings") is not None:
            cos = more["position_embeddings"][0]
            shape = (1, eye.shape[1], cos.shape[-1])
            more["position_embeddings"] = (torch.ones(shape).double(), torch.zeros(shape).double())
        if words:
            return (eye, *words[1:]), more
        return words, {**more, "hidden_states": eye}

    def zero_out(module, words, out):  # type: ignore[no-untyped-def]
        zero = torch.zeros_like(module.original)
        return (zero, *out[1:]) if isinstance(out, tuple) else zero

    transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.register("record", record)
    for module in tower.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "record"
        if hasattr(module, "q_norm"):
            module.q_norm = module.k_norm = torch.nn.Identity()
        if family == "gpt_neo" and hasattr(module, "_attn"):
            module._attn = lambda q, k, v, *rest, module=module: (
                record(module, q, k, v)[0].transpose(1, 2),
                None,
            )
    attention = [one for one in tower.modules() if _is_attention(one)]
    for module in attention:
        module.register_forward_pre_hook(identity_in, with_kwargs=True)
        module.register_forward_hook(zero_out)
    with torch.no_grad():
        if family in ("vit", "deit") or name == "vision":
            tower(pixel_values=torch.zeros(1, 3, 16, 16, dtype=torch.float64))
        else:
            tower(input_ids=torch.zeros(1, 8, dtype=torch.int64))
    assert len(recorded) == len(attention) == 2
    answers: list[tuple[torch.Tensor, ...]] = []
    for module, (query, k, v) in zip(modules, recorded, strict=True):
        q = query / module.scaling if family == "opt" else query  # it scales before, others within
        eye_out = torch.eye(q.shape[0] * q.shape[-1], dtype=torch.float64)
        p = _output(module, tower)(eye_out).mT  # [width, heads · head]
        answers.append((q, k, v, p.unflatten(1, (q.shape[0], -1)).detach()))
    return answers


def _is_attention(module: Any) -> bool:
    kind = type(module).__name__
    inner = ("SelfAttention", "SdpaAttention", "FlashAttention")
    return kind.endswith(("Attention", *inner)) and not any(
        type(one).__name__.endswith(("Attention", *inner))
        for one in module.modules()
        if one is not module
    )


def _output(module: Any, tower: Any) -> Any:
    """The projection that the library applies to what its attention function returns."""
    for name in _OUTPUTS:
        if hasattr(module, name):
            return getattr(module, name)
    # BERT-like: the projection is a sibling's
    for parent in tower.modules():
        if any(child is module for child in parent.children()):
            return parent.output.dense
    raise AssertionError(f"no output projection beside {type(module).__name__}")


def save(model: Any, folder: Path, form: str = "safetensors") -> None:
    """As the library saves it; ``sharded`` in many files, ``bin`` as pickled weights."""
    if form == "bin":
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        size = "60KB" if form == "sharded" else "1GB"
        model.save_pretrained(folder, max_shard_size=size)
