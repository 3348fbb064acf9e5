"""Models of others that are not quite what they say: every fault is one line with its name."""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from models.families import EXAMPLE, family_of, known_families
from models.huggingface import open_pretrained
from models.roles import ModelError
from models.tensor_files import TensorFiles
from pretrain.config.run import RanksConfig
from pretrain.offline.ranks import find_weights, means, measure_weights
from tests.foreign import LLAMA, llama_tensors, our_logits, write_model
from tests.tools import assert_one_line, base_recipe, run, write_recipe

Tensors = dict[str, torch.Tensor]
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


# --- tensors that nothing reads ---------------------------------------------------------------


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


# --- what `ranks` must know of ------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        "q_layernorm.norms.3.weight", "q_norm.weight", "k_norm.weight", "query_layernorm.weight",
        "key_layernorm.weight", "q_ln.weight", "qk_norm.weight", "q_rms_norm.weight",
        "query_norm.scale", "norm_q.weight", "q_LayerNorm.weight",
    ],
)  # fmt: skip
def test_any_qk_norm_is_recognised(part: str, tmp_path: Path) -> None:
    """Balance is no law there, under whatever name the gain stands."""
    tensors = llama_tensors() | {f"model.layers.{one}.self_attn.{part}": torch.ones(8)
                                 for one in range(2)}  # fmt: skip
    found = measure(write_model(tmp_path / "model", tensors))
    assert np.isnan(found["balance_qk"]) and found["balance_vp"] > 0
    outside = llama_tensors() | {f"model.layers.0.{part}": torch.ones(8)}
    assert np.isnan(measure(write_model(tmp_path / "outside", outside))["balance_qk"])


@pytest.mark.parametrize("key", ["use_qk_norm", "qk_layernorm", "qk_norm", "clip_qkv"])
def test_norms_without_tensors_are_recognised(key: str, tmp_path: Path) -> None:
    for value, is_law in ((True, False), (False, True), (None, True)):
        folder = write_model(tmp_path / str(value), llama_tensors(), LLAMA | {key: value})
        assert np.isnan(measure(folder)["balance_qk"]) != is_law


def test_ranks_names_unread_tensors_of_the_attention(tmp_path: Path) -> None:
    """Those that stand between the factors cannot be allowed; a family file can name harmless."""
    for part in ("q_proj.lora_A.weight", "v_norm.weight", "inner_attn_ln.weight", "sinks"):
        folder = write_model(tmp_path / part, llama_tensors() | {ATTENTION + part: torch.ones(8)})
        for allowed in (False, True):
            with pytest.raises(ModelError, match=part):
                measure(folder, allow_unused=allowed)
    values = yaml.safe_load(Path("models/families.yaml").read_text())["llama"]
    family = tmp_path / "family.yaml"
    family.write_text(yaml.safe_dump(values | {"beside": ["sinks"]}))
    assert measure(tmp_path / "sinks", family=family) == measure(
        write_model(tmp_path / "plain", llama_tensors())
    )


def test_ranks_takes_harmless_tensors(tmp_path: Path) -> None:
    plain = measure(write_model(tmp_path / "plain", llama_tensors()))
    more = {
        f"{ATTENTION}q_proj.bias": torch.ones(32), f"{ATTENTION}rotary_emb.inv_freq": torch.ones(4),
        f"{ATTENTION}masked_bias": torch.ones(()), "v_head.weight": torch.ones(1, 32),
        "model.layers.0.post_attention_layernorm.bias": torch.ones(32),
    }  # fmt: skip
    assert measure(write_model(tmp_path / "more", llama_tensors() | more)) == plain


def test_attention_that_is_not_measured_is_named(tmp_path: Path) -> None:
    plain = measure(write_model(tmp_path / "plain", llama_tensors()))
    names = (
        "visual.blocks.0.attn.qkv.weight", "model.layers.0.cross_attn.q_proj.weight",
        "model.layers.1.encoder_attention.k.weight", "h.0.crossattention.c_attn.weight",
        "roberta.encoder.layer.0.crossattention.self.query.weight",
    )  # fmt: skip
    for name in names:
        folder = write_model(tmp_path / name, llama_tensors() | {name: torch.ones(8, 8)})
        with pytest.raises(ModelError, match=r"not measured.*--allow-unused"):
            measure(folder)
        assert measure(folder, allow_unused=True) == plain


def test_layers_of_files_and_of_config_agree(tmp_path: Path) -> None:
    for count, culprit in ((1, "layers.1"), (3, "layers.2"), (10**15, "layers.2")):
        config = LLAMA | {"num_hidden_layers": count}
        refused(write_model(tmp_path / str(count), llama_tensors(), config), culprit,
                importing=count < 10)  # fmt: skip


def test_positions_by_layer(tmp_path: Path) -> None:
    """SmolLM3: pairs are counted only in layers that rotate."""
    config = LLAMA | {"model_type": "smollm3", "no_rope_layers": [1, 0]}
    folder = write_model(tmp_path / "model", llama_tensors(), config)
    rows, _ = measure_weights(find_weights(str(folder)), RanksConfig())
    alive = {row["layer"]: row["rope_pairs_alive"] for row in rows if row["product"] == "qk"}
    assert alive[0] is not None and alive[0] > 0 and np.isnan(alive[1])
    del config["no_rope_layers"]
    folder = write_model(tmp_path / "unsaid", llama_tensors(), config)
    with pytest.raises(ModelError, match="no_rope_layers"):
        measure(folder)


def test_configs_that_rely_on_defaults(tmp_path: Path) -> None:
    """SigLIP and CLIP say little of their towers; the numbers are their classes'."""
    from tests.transformers_models import transformers

    for kind in ("clip", "siglip"):
        config = transformers.AutoConfig.for_model(kind)
        for name, tower in known_families()[kind].towers.items():
            shape = tower.shape({"text_config": {}, "vision_config": {}}, False)
            theirs = getattr(config, f"{name}_config")
            assert shape.num_attention_heads == theirs.num_attention_heads
            assert (shape.num_layers, shape.hidden_size) == (
                theirs.num_hidden_layers, theirs.hidden_size,
            )  # fmt: skip
    model = transformers.SiglipModel(
        transformers.SiglipConfig(
            text_config={"num_hidden_layers": 1, "vocab_size": 16, "intermediate_size": 32},
            vision_config={"num_hidden_layers": 1, "intermediate_size": 32, "patch_size": 112},
        )
    )
    model.save_pretrained(tmp_path / "siglip")
    path = tmp_path / "siglip/config.json"
    whole = measure(tmp_path / "siglip")
    config = json.loads(path.read_text())
    for part in ("text_config", "vision_config"):
        config[part] = {"num_hidden_layers": 1}
    path.write_text(json.dumps(config))
    assert measure(tmp_path / "siglip") == whole


# --- advice ------------------------------------------------------------------------------------


def test_advice_on_missing_and_wrong_numbers_works(tmp_path: Path) -> None:
    plain = measure(write_model(tmp_path / "plain", llama_tensors()))
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        config = {name: value for name, value in LLAMA.items() if name != key}
        folder = write_model(tmp_path / key, llama_tensors(), config)
        with pytest.raises(ModelError, match=rf"has no {key}; add it \(a file"):
            measure(folder)
        (folder / "config.json").write_text(json.dumps(LLAMA))
        assert measure(folder) == plain
    values = yaml.safe_load(Path("models/families.yaml").read_text())["llama"]
    numbers = {"layers": 2, "heads": 4, "key_value_heads": 4, "head_dim": 8, "width": 32}
    family = tmp_path / "family.yaml"
    family.write_text(yaml.safe_dump(values | numbers))
    folder = write_model(tmp_path / "wrong", llama_tensors(), LLAMA | {"num_attention_heads": 8,
                                                                       "head_dim": 5})  # fmt: skip
    with pytest.raises(ModelError, match="--family"):
        measure(folder)
    assert measure(folder, family=family) == plain


def test_the_example_of_the_messages_is_a_family(tmp_path: Path) -> None:
    path = tmp_path / "family.yaml"
    path.write_text(EXAMPLE.replace(" / ", "\n"))
    tensors = {
        name.replace("self_attn", "attn")
        .replace("_proj", "")
        .replace("model.layers", "blocks"): one
        for name, one in llama_tensors().items()
    }
    config = {"model_type": "mine", "n_layers": 2, "n_heads": 4, "d_model": 32}
    folder = write_model(tmp_path / "model", tensors, config)
    with pytest.raises(ModelError, match="describe the family"):
        measure(folder)
    assert family_of(yaml.safe_load(path.read_text()), str(path)).model_types == ["mine"]
    plain = measure(write_model(tmp_path / "plain", llama_tensors()))
    assert measure(folder, family=path) == plain


def test_two_stacks_of_one_name_are_told_apart_by_a_longer_layer(tmp_path: Path) -> None:
    other = {f"draft.{name}": one for name, one in llama_tensors().items()}
    folder = write_model(tmp_path / "model", llama_tensors() | other)
    with pytest.raises(ModelError, match="make `layer` of a --family file"):
        measure(folder)
    values = yaml.safe_load(Path("models/families.yaml").read_text())["llama"]
    family = tmp_path / "family.yaml"
    family.write_text(yaml.safe_dump(values | {"layer": "draft.model.layers.{layer}.self_attn."}))
    assert measure(folder, family=family, allow_unused=True)["pseudo_rank_qk"] > 0


# --- files --------------------------------------------------------------------------------------


def shard(folder: Path, count: int = 3) -> Path:
    """The model's single file in shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[number::count])
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_a_single_file_is_read_before_an_index_of_an_earlier_save(tmp_path: Path) -> None:
    """As transformers does; and it is said."""
    from tests.transformers_models import transformers

    older = {name: 3 * one for name, one in llama_tensors().items()}
    folder = shard(write_model(tmp_path / "model", older))
    save_file(llama_tensors(), folder / "model.safetensors", {"format": "pt"})
    said: list[str] = []
    files = TensorFiles(folder, said.append)
    assert torch.equal(files.read("lm_head.weight"), llama_tensors()["lm_head.weight"])
    assert len(said) == 1 and "single file" in said[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        wanted = theirs(input_ids=TOKENS).logits
    assert (our_logits(folder, TOKENS) - wanted).abs().max() < 1e-4


def test_shards_must_be_whole_and_agree(tmp_path: Path) -> None:
    def fresh(name: str) -> tuple[Path, Path, Path]:
        folder = shard(write_model(tmp_path / name, llama_tensors()))
        return (
            folder,
            folder / "model.safetensors.index.json",
            folder / "model-00002-of-00003.safetensors",
        )

    assert our_logits(fresh("good")[0], TOKENS).isfinite().all()
    folder, index, second = fresh("missing")
    second.unlink()
    refused(folder, second.name, "No such file", "1 of 3 shards")
    index.unlink()  # and without its index
    refused(folder, second.name, "No such file")
    folder, index, second = fresh("twice")
    save_file(load_file(second) | {"lm_head.weight": torch.ones(400, 32)}, second)
    refused(folder, "lm_head.weight is in")
    folder, index, second = fresh("more")
    save_file(load_file(second) | {f"{ATTENTION}q_proj.bias": torch.ones(32)}, second)
    refused(folder, "index.json", "q_proj.bias", "no shard")
    folder, index, second = fresh("fewer")
    kept = load_file(second)
    lost = sorted(kept)[0]
    save_file({name: one for name, one in kept.items() if name != lost}, second)
    refused(folder, lost, "no shard")
    folder, index, second = fresh("a pipe")
    second.unlink()
    os.mkfifo(second)
    refused(folder, second.name)


def test_types_may_be_mixed(tmp_path: Path) -> None:
    plain = measure(write_model(tmp_path / "plain", llama_tensors()))
    types = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    mixed = {name: one.to(types[number % 4])
             for number, (name, one) in enumerate(llama_tensors().items())}  # fmt: skip
    folder = write_model(tmp_path / "mixed", mixed)
    for name, value in measure(folder).items():
        assert value == pytest.approx(plain[name], rel=0.05)
    assert our_logits(folder, TOKENS).isfinite().all()


def test_pickles_run_nothing_and_do_not_grow(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", llama_tensors())
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    trap = tmp_path / "trap"

    class Foreign:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(trap),))

    for content in ({"weights": Foreign()}, Foreign()):
        torch.save(content, path)
        refused(folder, "more than tensors")
        assert not trap.exists()
    torch.save([torch.ones(3)], path)
    refused(folder, "not a mapping")
    torch.save({"step": 3, **llama_tensors()}, path)
    refused(folder, "step in it is not a tensor")
    huge = llama_tensors()
    huge[f"{ATTENTION}q_proj.weight"] = torch.ones(1).expand(32, 32)
    torch.save(huge, path)
    refused(folder, "larger than its data in the file")
    torch.save(llama_tensors(), path)
    with zipfile.ZipFile(path) as archive:
        parts = {one: archive.read(one) for one in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    refused(folder, "compressed")


@pytest.mark.parametrize("form", ["safetensors", "bin", "index"])
def test_damage_is_one_line(form: str, tmp_path: Path) -> None:
    """Bytes flipped, cut off and put in, anywhere: a refusal or the right shapes, no traceback."""
    folder = write_model(tmp_path / "model", llama_tensors())
    path = folder / "model.safetensors"
    if form == "bin":
        path.unlink()
        path = folder / "pytorch_model.bin"
        torch.save(llama_tensors(), path)
    if form == "index":
        path = shard(folder) / "model.safetensors.index.json"
    good = path.read_bytes()
    rng = random.Random(form)
    failed = 0
    for number in range(60):
        bad = bytearray(good)
        start = rng.randrange(min(len(bad), 4000))
        if number % 3 == 0:
            del bad[start if number % 2 else rng.randrange(len(bad)) :]
        elif number % 3 == 1:
            for place in range(start, min(start + rng.choice([1, 4]), len(bad))):
                bad[place] = rng.randrange(256)
        else:
            bad[start:start] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 8, 64])))
        path.write_bytes(bad)
        try:
            measure(folder)
        except ModelError as error:
            failed += 1
            assert "\n" not in str(error)
    assert failed >= 20


def test_headers_that_claim_too_much(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", llama_tensors())
    path = folder / "model.safetensors"
    huge = {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}
    for header, length in ((json.dumps({"a": huge}).encode(), None), (b"{}", 1 << 40),
                           (b'{"a":' * 10_000, None), (b" " * 100, None)):  # fmt: skip
        path.write_bytes((length or len(header)).to_bytes(8, "little") + header)
        refused(folder, "model.safetensors", "damaged")
    shutil.copy(write_model(tmp_path / "good", llama_tensors()) / "model.safetensors", path)
    for text in (
        "[" * 100_000,
        "[]",
        '{"model_type": "llama"',
        "\ud800".encode("utf-8", "surrogatepass"),
    ):
        config = folder / "config.json"
        config.write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(folder, "config.json", "damaged")


def test_a_good_model_still_has_its_towers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", llama_tensors())
    (tower,) = open_pretrained(folder)
    assert tower.shape.num_layers == 2 and not tower.shape.qk_norm
