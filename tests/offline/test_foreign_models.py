"""Models of others that are not quite what they say: every fault is one line with its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.roles import ModelError
from tests.foreign import (
    ATTENTION,
    LLAMA,
    TOKENS,
    llama_tensors,
    measure,
    our_logits,
    refused,
    write_model,
)
from tests.tools import assert_one_line, base_recipe, run, write_recipe

Tensors = dict[str, torch.Tensor]

# --- quantised weights ---------------------------------------------------------------------------


def fp8_block(weight: torch.Tensor) -> Tensors:
    tiles = weight.reshape(weight.shape[0] // 16, 16, weight.shape[1] // 16, 16)
    scale = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}


def by_row(weight: torch.Tensor, most: int, dtype: torch.dtype) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / most
    codes = weight / scale if dtype.is_floating_point else (weight / scale).round()
    return {"weight": codes.to(dtype), "weight_scale": scale}


def packed(weight: torch.Tensor, *parts: str, dtype: torch.dtype = torch.int32) -> Tensors:
    codes = torch.arange(weight.numel() // 8).reshape(-1, weight.shape[1]) % 100
    return {parts[0]: codes.to(dtype), **{one: torch.ones(4) for one in parts[1:]}}


QUANTISERS: dict[str, Callable[[torch.Tensor], Tensors]] = {
    "fp8": fp8_block,
    "compressed-tensors": lambda w: by_row(w, 448, torch.float8_e4m3fn),
    "w8a8": lambda w: by_row(w, 127, torch.int8),
    "gptq": lambda w: packed(w, "qweight", "qzeros", "scales", "g_idx"),
    "awq": lambda w: packed(w, "qweight", "qzeros", "scales"),
    "nf4": lambda w: packed(
        w, "weight", "weight.absmax", "weight.quant_map",
        "weight.quant_state.bitsandbytes__nf4", dtype=torch.uint8,
    ),
    "llm.int8": lambda w: {"weight": w.to(torch.int8), "SCB": torch.ones(len(w))},
    "pack-quantized": lambda w: packed(w, "weight_packed", "weight_scale", "weight_shape"),
    "mxfp4": lambda w: packed(w, "weight_blocks", "weight_scales", dtype=torch.uint8),
    "hqq": lambda w: packed(w, "W_q", "zero", "scale", dtype=torch.uint8),
    "no scales": lambda w: {"weight": w.to(torch.float8_e5m2)},
    "bitnet": lambda w: packed(w, "weight", "weight_scale", dtype=torch.uint8),
    "int8 alone": lambda w: {"weight": w.to(torch.int8)},
}  # fmt: skip


def quantised(method: str) -> Tensors:
    found: Tensors = {}
    for name, weight in llama_tensors().items():
        if "_proj" not in name:
            found[name] = weight
            continue
        stem = name.removesuffix("weight")
        found |= {f"{stem}{part}": one for part, one in QUANTISERS[method](weight).items()}
    return found


@pytest.mark.parametrize("method", QUANTISERS)
def test_quantised_weights_are_refused(method: str, tmp_path: Path) -> None:
    """By quantization_config where it is written, by names or types where it is not."""
    said = LLAMA | {"quantization_config": {"quant_method": method}}
    tensors = quantised(method)
    refused(
        write_model(tmp_path / "said", tensors, said), "quantization_config", method, "bfloat16"
    )
    refused(write_model(tmp_path / "unsaid", tensors), "_proj.", "bfloat16, float16 or float32")


def test_what_else_says_quantised(tmp_path: Path) -> None:
    nested = LLAMA | {"text_config": {"quantization_config": {"quant_method": "fp8"}}}
    refused(write_model(tmp_path / "nested", llama_tensors(), nested), "quantization_config", "fp8")
    for file, method in (("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")):
        folder = write_model(tmp_path / file, llama_tensors())
        (folder / file).write_text("{}")
        refused(folder, file, method)
    folder = write_model(tmp_path / "adapter", llama_tensors())
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "adapter_config.json", "merge")
    for file, word in (("model-Q4_K_M.gguf", "GGUF"), ("qmodel.pt", "HQQ")):
        folder = write_model(tmp_path / word, llama_tensors())
        (folder / "model.safetensors").rename(folder / file)
        refused(folder, word)


def test_the_advice_for_weights_that_are_numbers_already_works(tmp_path: Path) -> None:
    said = LLAMA | {"quantization_config": {"quant_method": "fp8"}}
    folder = write_model(tmp_path / "model", llama_tensors(), said)
    refused(folder, "remove quantization_config")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert measure(folder)["pseudo_rank_qk"] > 0
    assert our_logits(folder, TOKENS).isfinite().all()


# --- tensors that nothing reads ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.bias", "model.layers.0.self_attn.k_proj.bias",
        "model.layers.1.self_attn.v_proj.bias", "model.layers.0.self_attn.o_proj.bias",
        "model.layers.0.mlp.up_proj.bias", "model.layers.1.input_layernorm.bias",
        "model.layers.1.self_attn.q_norm.weight", "model.layers.1.self_attn.k_layernorm.weight",
        "model.layers.0.self_attn.sinks", "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.post_feedforward_layernorm.weight", "model.layers.2.mlp.up_proj.weight",
        "model.norm.bias", "lm_head.bias", "model.embed_tokens.bias",
    ],
)  # fmt: skip
def test_import_names_what_config_json_does_not_announce(name: str, tmp_path: Path) -> None:
    """Even with --allow-unused: without it the model would compute something else."""
    folder = write_model(tmp_path / "model", llama_tensors() | {name: torch.randn(32)})
    for allowed in (False, True):
        with pytest.raises(ModelError, match=name.replace(".", r"\.")):
            our_logits(folder, TOKENS, allowed)


def test_import_leaves_out_only_what_is_no_language_model(tmp_path: Path) -> None:
    plain = our_logits(write_model(tmp_path / "plain", llama_tensors()), TOKENS)
    folder = write_model(tmp_path / "more", llama_tensors() | {"v_head.weight": torch.randn(1, 32)})
    with pytest.raises(ModelError, match=r"v_head\.weight.*--allow-unused"):
        our_logits(folder, TOKENS)
    assert torch.equal(our_logits(folder, TOKENS, True), plain)


def test_import_reads_what_says_the_same_again(tmp_path: Path) -> None:
    """Saved frequencies and a tied head are checked; base models have no first word."""
    plain = our_logits(write_model(tmp_path / "plain", llama_tensors()), TOKENS)
    frequencies = 10_000.0 ** -(torch.arange(0, 8, 2) / 8)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    same = write_model(tmp_path / "same", llama_tensors() | {name: frequencies.half()})
    assert torch.equal(our_logits(same, TOKENS), plain)
    other = write_model(tmp_path / "other", llama_tensors() | {name: frequencies / 4})
    with pytest.raises(ModelError, match="other frequencies"):
        our_logits(other, TOKENS)
    tied = LLAMA | {"tie_word_embeddings": True}
    unlike = write_model(tmp_path / "unlike", llama_tensors(), tied)
    with pytest.raises(ModelError, match=r"lm_head\.weight is not the embedding"):
        our_logits(unlike, TOKENS)
    (unlike / "config.json").write_text(json.dumps(LLAMA))  # what the error says
    assert torch.equal(our_logits(unlike, TOKENS), plain)
    tensors = llama_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert our_logits(write_model(tmp_path / "tied", tensors, tied), TOKENS).isfinite().all()
    bare = {name.removeprefix("model."): one for name, one in llama_tensors().items()}
    assert torch.equal(our_logits(write_model(tmp_path / "bare", bare), TOKENS), plain)


def test_a_vocabulary_is_never_filled_up(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that are missing, and rows too many; in the real command, and no folder is left."""
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    for rows in (100, 399, 401, 512):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors = llama_tensors()
            tensors[name] = torch.randn(rows, 32)
            folder = write_model(tmp_path / f"{name}{rows}", tensors)
            capsys.readouterr()
            out = tmp_path / "run"
            assert run(monkeypatch, "import", str(folder), str(recipe), "--out", str(out)) == 2
            assert_one_line(capsys.readouterr().err, (f"({rows}, 32)", "config.json needs"))
            assert not out.exists()


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling: rotary scaling"),
        ({"rope_scaling": {"type": "su", "factor": 8.0}}, "rotary scaling"),
        ({"rope_scaling": [4.0]}, "not a mapping"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}, "rope_theta"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rotary scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"attention_multiplier": 0.1}, "attention_multiplier"),
        ({"residual_multiplier": 0.5}, "residual_multiplier"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logit_scale": 2.0}, "logit_scale"),
        ({"clip_qkv": 6.0}, "clip_qkv"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"is_causal": False}, "is_causal"),
        ({"tie_word_embeddings": "false"}, "not true or false"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"num_hidden_layers": 10**12}, "1000000000000 layers"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
        ({"num_hidden_layers": 1}, "layers.1"),
        ({"head_dim": 6}, "config.json needs"),
        ({"hidden_act": None, "mine": {"a": 1}}, "mine"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    ],
)
def test_keys_that_import_does_not_understand(
    change: dict[str, Any], culprit: str, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model", llama_tensors(), LLAMA | change)
    with pytest.raises(ModelError) as caught:
        our_logits(folder, TOKENS)
    assert culprit in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_not_finite_weights_are_named(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        tensors = llama_tensors()
        tensors[f"{ATTENTION}q_proj.weight"][3, 4] = value
        refused(write_model(tmp_path / str(value), tensors), "NaN or infinity")
