"""What `ranks` must know of a foreign model before it measures it, and the advice that it gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from models.families import EXAMPLE, family_of, known_families
from models.roles import ModelError
from pretrain.config.run import RanksConfig
from pretrain.offline.ranks import find_weights, measure_weights
from tests.foreign import (
    ATTENTION,
    LLAMA,
    llama_tensors,
    measure,
    refused,
    write_model,
)

pytestmark = pytest.mark.slow

# --- what `ranks` must know of -------------------------------------------------------------------


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


# --- advice --------------------------------------------------------------------------------------


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
