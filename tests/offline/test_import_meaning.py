"""`import` computes what `transformers` computes or refuses by name: random keys of all classes."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from models.foreign_config import DEFAULTS, KINDS
from models.roles import ModelError
from tests.foreign import our_logits
from tests.transformers_models import transformers

pytestmark = pytest.mark.slow

_TINY: dict[str, dict[str, Any]] = {
    kind: {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60,
        "intermediate_size": 48, "max_position_embeddings": 16,
    }
    for kind in KINDS
}  # fmt: skip
_TINY["gpt2"].pop("intermediate_size")
_TINY["qwen3"] |= {"head_dim": 16, "num_key_value_heads": 2}
_TINY["smollm3"] |= {"num_key_value_heads": 2, "no_rope_layers": [0, 0], "pad_token_id": 0}
_TOKENS = torch.arange(32).reshape(2, 16) * 7 % 60

# Values beside those that any number, flag or word can have (`_any_value`).
_VALUES: dict[str, list[Any]] = {
    "hidden_act": ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "quick_gelu", "swish",
                   "gelu_python"],
    "activation_function": ["gelu", "gelu_new", "relu", "silu", "gelu_pytorch_tanh", "tanh"],
    "num_key_value_heads": [1, 2, 4, None],
    "head_dim": [8, 16, 10],
    "num_attention_heads": [2, 4, 8],
    "hidden_size": [16, 64],
    "num_hidden_layers": [1, 3],
    "n_inner": [None, 40],
    "max_position_embeddings": [16, 24],
    "vocab_size": [60, 64],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 8},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
         "original_max_position_embeddings": 8},
    ],
    "no_rope_layers": [[0, 0], [1, 0], [1, 1], None],
    "layer_types": [["full_attention"] * 2, ["sliding_attention", "full_attention"], None],
    "sliding_window": [4, None],
    "max_window_layers": [0, 1],
    "pad_token_id": [None, 3],
}  # fmt: skip
# Keys that people's files have and the class has not, or has under another name.
_STRANGE: dict[str, list[Any]] = {
    "rope_scaling": [None, {"type": "linear", "factor": 2.0}, {"rope_type": "default"},
                     {"factor": 2.0}],
    "rope_theta": [10_000.0, 500.0, 2e6],
    "partial_rotary_factor": [1.0, 0.5],
    "rotary_pct": [0.25, 0.5, 1.0],
    "rotary_emb_base": [10_000, 77],
    "is_causal": [True, False],
    "sliding_window": [4, None],
    "n_head": [4, 2],
    "n_embd": [32],
    "attention_multiplier": [0.5],
    "logits_scaling": [2.0],
    "embedding_multiplier": [3.0],
    "attn_logit_softcapping": [50.0],
    "final_logit_softcapping": [30.0],
    "clip_qkv": [None, 0.5],
    "qk_layernorm": [True],
    "alibi": [True],
    "auto_map": [{"AutoModel": "mine.Model"}],
    "quantization_config": [None, {"quant_method": "gptq"}],
}  # fmt: skip
_SKIPPED = {"transformers_version", "architectures", "model_type", "_name_or_path", "id2label",
            "label2id", "problem_type", "dtype", "output_hidden_states", "output_attentions",
            "return_dict", "per_layer_config"}  # fmt: skip


def _any_value(rng: random.Random, key: str, now: Any) -> Any:
    if key in _VALUES:
        return rng.choice(_VALUES[key])
    if isinstance(now, bool):
        return not now
    if isinstance(now, float):
        return rng.choice([now, 1e-2, 0.3])
    if isinstance(now, int):
        return rng.choice([now, 1, 2])
    return now


def _built(kind: str, rng: random.Random) -> tuple[Any, list[str]]:
    """A model whose config has some keys with other values."""
    plain = transformers.AutoConfig.for_model(kind, **_TINY[kind]).to_dict()
    keys = [key for key in plain if key not in _SKIPPED and not key.endswith("token_id")]
    chosen = rng.sample(keys, rng.choice([1, 1, 2, 3]))
    values = {key: _any_value(rng, key, plain[key]) for key in chosen}
    config = transformers.AutoConfig.for_model(kind, **{**_TINY[kind], **values})
    torch.manual_seed(rng.randrange(1 << 30))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # norms and biases away from one and zero, so that a loss shows
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, chosen


def _case(kind: str, seed: int, folder: Path) -> tuple[str, str]:
    """One random model, its file changed as people's are; returns what became of it."""
    rng = random.Random(f"{kind} {seed}")
    try:
        model, chosen = _built(kind, rng)
        model.save_pretrained(folder)
    except Exception as error:  # the library itself has no such model
        return "no such model", str(error)[:60]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if rng.random() < 0.5:
        for key in rng.sample(sorted(_STRANGE), rng.choice([1, 2])):
            config[key] = rng.choice(_STRANGE[key])
            chosen.append(key)
    if rng.random() < 0.4:
        key = rng.choice([one for one in config if one not in ("model_type", "architectures")])
        del config[key]
        chosen.append(key)
    path.write_text(json.dumps(config))
    try:
        found = our_logits(folder, _TOKENS)
    except ModelError as error:
        return "refused", f"{chosen}: {error}"
    except ValueError as error:  # a configuration that our models do not have: pydantic names it
        return "refused", f"{chosen}: {error}"
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    except Exception as error:
        return "no such model", str(error)[:60]
    with torch.no_grad():
        wanted = theirs(input_ids=_TOKENS).logits
    deviation = ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()
    return ("equal" if deviation < 1e-4 else "differs"), f"{chosen}: {deviation:.1e}"


def _trial(kind: str, seeds: range, tmp_path: Path) -> dict[str, int]:
    count: dict[str, int] = {}
    differing = []
    for seed in seeds:
        word, detail = _case(kind, seed, tmp_path / f"{kind}{seed}")
        count[word] = count.get(word, 0) + 1
        if word == "differs":
            differing.append(f"{kind} {seed} {detail}")
    assert not differing, differing
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_equal_or_refused(kind: str, tmp_path: Path) -> None:
    count = _trial(kind, range(24), tmp_path)
    assert count.get("equal", 0) >= 3 and count.get("refused", 0) >= 3, count


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_equal_or_refused_at_length(kind: str, tmp_path: Path) -> None:
    count = _trial(kind, range(1000, 1150), tmp_path)
    assert count["equal"] >= 20 and count["refused"] >= 20, count


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_those_of_the_library(kind: str) -> None:
    theirs = transformers.AutoConfig.for_model(kind)
    for key, value in DEFAULTS[kind].items():
        if key == "rope_theta":
            assert theirs.rope_parameters["rope_theta"] == value
        elif key == "rotary_pct":
            assert theirs.rope_parameters["partial_rotary_factor"] == value
        elif value or isinstance(value, bool):
            assert getattr(theirs, key) == value, key


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    from tests.transformers_models import FAMILIES, build, save

    for family in sorted(FAMILIES.keys() - set(KINDS))[::4]:
        save(build(family), tmp_path / family)
        with pytest.raises(ModelError, match="cannot be trained on"):
            our_logits(tmp_path / family, _TOKENS)


def test_the_plain_models_are_equal(tmp_path: Path) -> None:
    for kind in KINDS:
        config = transformers.AutoConfig.for_model(kind, **_TINY[kind])
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model.save_pretrained(tmp_path / kind)
        with torch.no_grad():
            wanted = model(input_ids=_TOKENS).logits
        assert (our_logits(tmp_path / kind, _TOKENS) - wanted).abs().max() < 1e-5
        assert math.isfinite(wanted.sum())
