"""Translates a Hugging Face ``config.json`` into our settings, and refuses what has no equivalent.

Every key is read, or known to change no logit, or named in an error. A missing key has the default
of its class in transformers.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

from models.roles import ModelError

T = TypeVar("T")

_GELU = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
_GATED = {"silu": "swiglu", "swish": "swiglu"}
_COMMON = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "rope_theta": 10_000.0,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "vocab_size": 50257, "max_position_embeddings": 1024, "tie_word_embeddings": True,
    },
    "gpt_neox": {
        **_COMMON, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
        "intermediate_size": 24576, "vocab_size": 50432, "rotary_pct": 0.25,
    },
    "llama": {**_COMMON, "num_key_value_heads": 0, "head_dim": 0},
    "qwen3": {
        **_COMMON, "intermediate_size": 22016, "vocab_size": 151936, "num_key_value_heads": 32,
        "max_position_embeddings": 32768, "head_dim": 128,
    },
    "smollm3": {
        **_COMMON, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
        "vocab_size": 128256, "num_key_value_heads": 4, "max_position_embeddings": 32768,
        "head_dim": 0, "tie_word_embeddings": True, "rope_theta": 2_000_000.0,
    },
}  # fmt: skip
"""The value that transformers uses for a missing key; 0: it is derived from other keys."""
KINDS = tuple(DEFAULTS)
_ALIASES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}  # fmt: skip
"""GPT-2's names of keys; transformers accepts either."""

_WITHOUT_EFFECT = frozenset(
    """
    _name_or_path transformers_version architectures model_type dtype torch_dtype use_cache
    return_dict output_attentions output_hidden_states output_scores torchscript
    return_dict_in_generate use_bfloat16 tf_legacy_loss gradient_checkpointing remove_invalid_values
    _attn_implementation attn_implementation _attn_implementation_autoset
    _attn_implementation_internal transformers.js_config unsloth_version unsloth_fixed
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id tokenizer_class prefix
    initializer_range attention_dropout hidden_dropout classifier_dropout resid_pdrop embd_pdrop
    attn_pdrop summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout id2label label2id num_labels problem_type finetuning_task
    task_specific_params n_ctx reorder_and_upcast_attn pretraining_tp no_rope_layer_interval
    chunk_size_feed_forward max_window_layers is_decoder is_encoder_decoder
    do_sample max_length min_length max_new_tokens early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()  # noqa: SIM905
)
"""Keys that change no logit of these classes: generation, dropout (off while logits are computed),
other heads, the library's own records."""


_WORDS: dict[type, str] = {
    int: "a whole number above 0", float: "a number above 0", bool: "true or false", str: "a word",
}  # fmt: skip


class _Keys:
    """The keys of a config.json, and which of them were read."""

    def __init__(self, values: dict[str, Any], kind: str) -> None:
        self.values, self.kind = values, kind
        self.read: set[str] = set()

    def given(self, key: str) -> Any:
        """Return the value of a key, or None, and mark the key as read."""
        self.read.add(key)
        return self.values.get(key)

    def take(self, key: str, kind: type[T], default: T | None = None) -> T:
        """A value of one type, or the class's default if there is none.

        Raises:
            ModelError: if it has another type, or is a number that is not above 0.
        """
        names = [key, _ALIASES[key]] if self.kind == "gpt2" and key in _ALIASES else [key]
        values = {name: self.given(name) for name in names}
        values = {name: value for name, value in values.items() if value is not None}
        if len(set(map(str, values.values()))) > 1:
            raise ModelError(f"config.json: {' and '.join(names)} differ: {values}; keep one")
        if not values:
            fallback = DEFAULTS[self.kind].get(key) if default is None else default
            if fallback is None:
                raise ModelError(f"config.json has no {key}")
            return fallback
        name = next(iter(values))
        value: Any = values[name]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        counts = isinstance(value, int | float) and not isinstance(value, bool)
        in_range = not counts or 0 < value < math.inf
        if not in_range or type(value) is not kind:
            raise ModelError(f"config.json: {name} is {value!r}, not {_WORDS[kind]}")
        return value

    def only(self, key: str, *usual: Any) -> None:
        """Refuse a key that is present with a value other than the usual one."""
        value = self.given(key)
        if value is not None and not any(
            value == option and type(value) is type(option) for option in usual
        ):
            raise ModelError(
                f"config.json: {key} is {value!r}, but our models support only {usual[0]!r}"
            )

    def check_all_read(self) -> None:
        """Refuse keys that were not read.

        Raises:
            ModelError: naming the key, its value, and what can be done.
        """
        unread = {
            key: value for key, value in self.values.items()
            if value is not None and key not in self.read | _WITHOUT_EFFECT
        }  # fmt: skip
        if unread:
            key = next(iter(unread))
            also = f" (nor {', '.join([*unread][1:6])})" if len(unread) > 1 else ""
            raise ModelError(
                f"config.json: unknown key {key} {str(unread[key])[:80]!r}{also}, which may change "
                "what the model computes; remove the key if it does not"
            )


def model_values(config: dict[str, Any]) -> dict[str, Any]:
    """Values of `GPTConfig` that describe the model of a ``config.json``.

    Raises:
        ModelError: naming the feature that our models do not have.
    """
    kind = config.get("model_type")
    if kind not in KINDS:
        raise ModelError(f"model_type {kind!r} cannot be trained on; known: {', '.join(KINDS)}")
    keys = _Keys(config, kind)
    for key, usual in (("is_causal", True), ("add_cross_attention", False), ("pruned_heads", {})):
        keys.only(key, usual)
        if key in config and config[key] is None:
            raise ModelError(f"config.json: {key} is null; write {usual!r} or remove the key")
    values = {
        "num_layers": keys.take("num_hidden_layers", int),
        "hidden_size": keys.take("hidden_size", int),
        "num_attention_heads": keys.take("num_attention_heads", int),
        "context": keys.take("max_position_embeddings", int),
        "vocabulary_size": keys.take("vocab_size", int),
        "tied_head": keys.take("tie_word_embeddings", bool),
    }
    values |= {"gpt2": _gpt2, "gpt_neox": _neox}.get(kind, _llama)(keys, values)
    keys.check_all_read()
    return values


def _activation(keys: _Keys, key: str, default: str, activations: dict[str, str]) -> str:
    name = keys.take(key, str, default)
    if name not in activations:
        raise ModelError(
            f"config.json: {key}: unknown activation {name!r}; a {keys.kind} can have "
            f"{', '.join(activations)}"
        )
    return activations[name]


def _gpt2(keys: _Keys, common: dict[str, Any]) -> dict[str, Any]:
    keys.only("scale_attn_by_inverse_layer_idx", False)
    keys.only("scale_attn_weights", True)
    return {
        "dialect": "gpt2",
        "ffn_hidden_size": keys.take("n_inner", int, 4 * common["hidden_size"]),
        "activation": _activation(keys, "activation_function", "gelu_new", _GELU),
        "norm_epsilon": keys.take("layer_norm_epsilon", float, 1e-5),
    }


def _neox(keys: _Keys, common: dict[str, Any]) -> dict[str, Any]:
    keys.only("attention_bias", True)
    rotary = _rotary(keys, "rotary_emb_base", "rotary_pct")
    fraction = rotary["rotary_fraction"]
    head = common["hidden_size"] // common["num_attention_heads"]
    if fraction > 1 or int(head * fraction) < 2 or int(head * fraction) % 2:
        raise ModelError(
            f"config.json: rotary_pct (partial_rotary_factor) {fraction} of heads {head} wide; our "
            "models rotate an even number of dimensions"
        )
    return {
        "dialect": "gpt_neox",
        "ffn_hidden_size": keys.take("intermediate_size", int),
        "activation": _activation(keys, "hidden_act", "gelu", _GELU),
        "norm_epsilon": keys.take("layer_norm_eps", float, 1e-5),
        "parallel_residual": keys.take("use_parallel_residual", bool, True),
        **rotary,
    }


def _llama(keys: _Keys, common: dict[str, Any]) -> dict[str, Any]:
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        keys.only(key, False)
    if keys.kind != "llama":
        keys.given("sliding_window")  # without effect, as use_sliding_window is false
    kinds = keys.given("layer_types") or ["full_attention"]
    if kinds != ["full_attention"] * len(kinds):
        raise ModelError(
            f"config.json: layer_types is {kinds!r}, but our models support only full attention"
        )
    if keys.kind == "smollm3" and keys.given("no_rope_layers") != [0] * common["num_layers"]:
        raise ModelError(
            "config.json: no_rope_layers; our models rotate all layers or none, so it is a list of "
            f"{common['num_layers']} zeros in a smollm3"
        )
    rotary = _rotary(keys, "rope_theta", "partial_rotary_factor")
    fraction = rotary.pop("rotary_fraction")
    if keys.kind == "smollm3":  # nothing rotates
        rotary = {"rotary_base": rotary["rotary_base"]}
    if fraction != 1:
        raise ModelError(
            f"config.json: partial_rotary_factor is {fraction}, but a {keys.kind} supports only 1"
        )
    heads, head = common["num_attention_heads"], keys.take("head_dim", int)
    head = head or common["hidden_size"] // heads
    shared = keys.take("num_key_value_heads", int)
    if keys.values.get("num_key_value_heads", shared) is None:
        shared = 0  # null differs from the class's default: it means one per query head
    if keys.kind != "smollm3" and head % 2:
        raise ModelError(f"config.json: head_dim {head} is odd, so its dimensions form no pairs")
    return {
        "dialect": "llama",
        "ffn_hidden_size": keys.take("intermediate_size", int),
        "activation": _activation(keys, "hidden_act", "silu", _GATED),
        "norm_epsilon": keys.take("rms_norm_eps", float, 1e-6),
        "num_key_value_heads": shared or heads,
        "head_dim": head,
        **rotary,
        "qk_norm": keys.kind == "qwen3",
        "position": "none" if keys.kind == "smollm3" else "rotary",
    }


_SCALING = {
    "factor": "rotary_factor",
    "low_freq_factor": "rotary_low",
    "high_freq_factor": "rotary_high",
    "original_max_position_embeddings": "rotary_old_context",
}
"""Llama 3's parameters of scaled positions, and our keys."""


def _scaled(name: str, rope: dict[str, Any]) -> dict[str, Any]:
    """Our keys of scaled positions; empty if a section has none.

    Raises:
        ModelError: if they are scaled in another way than Llama 3's, or a parameter is missing.
    """
    kinds = {rope.get("rope_type"), rope.get("type")} - {None, "default"}
    scaled = rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if not kinds and not scaled:
        return {}
    counts = all(
        isinstance(rope[key], int | float) and not isinstance(rope[key], bool) for key in scaled
    )
    if kinds != {"llama3"} or scaled != _SCALING.keys() or not counts:
        raise ModelError(
            f"config.json: {name}: rotary scaling {rope!r} is not supported by our models, which "
            f"have llama3's with {', '.join(_SCALING)}"
        )
    return {_SCALING[key]: rope[key] for key in sorted(scaled)}


def _rotary(keys: _Keys, base_key: str, share_key: str) -> dict[str, Any]:
    """Base, share of a head that rotates, and scaling, from any of the keys that can hold them.

    Raises:
        ModelError: for scaling that our models lack, and for two different values of one setting.
    """
    sections = {key: keys.given(key) or {} for key in ("rope_parameters", "rope_scaling")}
    scaling: dict[str, Any] = {}
    for name, rope in sections.items():
        if not isinstance(rope, dict):
            raise ModelError(f"config.json: {name} {rope!r} is not a mapping")
        scaling |= _scaled(name, rope)
    if sections["rope_parameters"] and sections["rope_scaling"]:
        raise ModelError("config.json: has rope_parameters and rope_scaling; keep one of them")
    rope = {**sections["rope_parameters"], **sections["rope_scaling"]}
    results = []
    for inner, outer in (("rope_theta", base_key), ("partial_rotary_factor", share_key)):
        stated = {f"rope_parameters.{inner}": rope.get(inner), outer: keys.given(outer)}
        stated = {name: value for name, value in stated.items() if value is not None}
        value = next(iter(stated.values()), DEFAULTS[keys.kind].get(outer, _COMMON.get(inner, 1.0)))
        if keys.given(inner) is not None:
            stated[inner] = keys.given(inner)
        for name, number in stated.items():
            if not isinstance(number, int | float) or isinstance(number, bool) or not number > 0:
                raise ModelError(f"config.json: {name} is {number!r}, not a number above 0")
            if number != value:
                raise ModelError(
                    f"config.json: {name} is {number!r}, but transformers uses {value!r}; write "
                    "one value for both"
                )
        results.append(float(value))
    return {"rotary_base": results[0], "rotary_fraction": results[1], **scaling}
