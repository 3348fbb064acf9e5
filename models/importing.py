"""Converts the tensors of Hugging Face's classes to our names, and leaves none over.

This is the inverse of `models.export`, tensor by tensor, for the classes that our settings
describe: GPT-2, GPT-NeoX (Pythia), Llama, Qwen3 and SmolLM3 without positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from models.config import GPTConfig
from models.foreign_config import model_values
from models.generation import generation_of
from models.quantised import refuse_quantised
from models.roles import ModelError, ParameterInfo, Role
from models.tensor_files import TensorFiles, read_json

ReadTheirs = Callable[[str], Tensor]
"""A function that reads a tensor by its name in the class."""
_PREFIXES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}
_DERIVED = re.compile(
    r"(h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.attention\.(bias|masked_bias))"
)
"""Causal masks that old versions of transformers saved; the class makes its own."""
_FREQUENCIES = re.compile(r"(layers\.\d+\.(attention|self_attn)\.)?rotary_emb\.inv_freq")
_OWN = {
    "gpt2": ("wte", "wpe", "h", "ln_f", "lm_head"),
    "gpt_neox": ("embed_in", "layers", "final_layer_norm", "embed_out", "lm_head"),
}
"""Modules of the language model itself; none of their tensors can be left out."""
_OWN_LLAMA = ("embed_tokens", "layers", "norm", "lm_head")


class ForeignModel:
    """The tensors of a model in the class that its config.json names, under our names."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        """
        Args:
            say: called with a message for what is not read.

        Raises:
            ModelError: naming a key of config.json or a file that is not understood.
        """
        self.folder = folder
        self._json = read_json(folder / "config.json")
        self.files = TensorFiles(folder, say)
        refuse_quantised(folder, self._json, self.files)
        self.values = model_values(self._json)
        """Of `GPTConfig`."""
        self.generation = generation_of(folder, self._json)
        """Kept for an export."""
        self.kind = str(self._json["model_type"])
        layers = self.values["num_layers"]
        if layers > len(self.files.names):
            raise ModelError(
                f"{folder}: config.json says that there are {layers} layers, but the files have "
                "only "
                f"{len(self.files.names)} tensors"
            )

    def tensor(self, config: GPTConfig, name: str) -> Tensor:
        """A tensor by our name, in float32, with its whole vocabulary and no padding.

        Raises:
            ModelError: if it is missing or not finite.
        """
        values = self._as_ours(config, name, self.files.read).float()
        if not torch.isfinite(values).all():
            raise ModelError(f"{self.folder}: {name} contains NaN or infinity")
        return values

    def check(self, config: GPTConfig, infos: Iterable[ParameterInfo], allow_unused: bool) -> None:
        """Account for every tensor of the files, using only names and shapes.

        Args:
            config: of our model, which may have a shorter context than the imported one.
            infos: its parameters.
            allow_unused: leave out tensors that do not belong to the language model.

        Raises:
            ModelError: naming a tensor that is missing, has another shape, or is not read.
        """
        read: set[str] = set()

        def shaped(name: str) -> Tensor:
            read.add(name)
            return torch.empty(self.files.shape(name), device="meta")

        for info in infos:
            shape = tuple(self._as_ours(config, info.name, shaped).shape)
            wanted = self._shape(config, info)
            if shape != wanted:
                raise ModelError(f"{info.name}: {shape}, but config.json needs {wanted}")
        for name in self.files.names:
            if name not in read and not self._is_derived(config, name):
                self._refuse(name, allow_unused)

    def _shape(self, config: GPTConfig, info: ParameterInfo) -> tuple[int, ...]:
        if info.role in (Role.EMBEDDING, Role.HEAD):
            return (config.vocabulary_size, config.hidden_size)
        if info.role is Role.POSITION and config.context <= self.values["context"]:
            return (self.values["context"], config.hidden_size)
        return tuple(info.shape)

    def _as_ours(self, config: GPTConfig, name: str, read: ReadTheirs) -> Tensor:
        def theirs(name: str) -> Tensor:
            bare = name.partition(".")[2]  # base models are saved without the name's first part
            names = [candidate for candidate in (name, bare) if candidate in self.files]
            if not names:
                raise ModelError(f"{self.folder}: has no {name}")
            return read(names[0])

        return read_as_ours(self.kind, config, theirs, name)

    def _bare(self, name: str) -> str:
        return name.removeprefix(_PREFIXES.get(self.kind, "model."))

    def _is_derived(self, config: GPTConfig, name: str) -> bool:
        """Whether a tensor repeats what the model already contains.

        Raises:
            ModelError: if its values differ.
        """
        bare = self._bare(name)
        if _DERIVED.fullmatch(bare):
            return True
        if _FREQUENCIES.fullmatch(bare) and config.position == "rotary":
            steps = torch.arange(0, config.rotary_dim, 2) / config.rotary_dim
            frequencies, wanted = self.files.read(name).float(), config.rotary_base**-steps
            if frequencies.shape != wanted.shape or not torch.allclose(
                frequencies, wanted, rtol=0.02, atol=1e-6
            ):
                raise ModelError(
                    f"{self.folder}: {name} has other frequencies than config.json's rope_theta "
                    f"{config.rotary_base:g}; write the base that the model was trained with"
                )
            return True
        if config.tied_head and bare in ("lm_head.weight", "embed_out.weight"):
            if not torch.equal(
                self.files.read(name).float(), self.tensor(config, "embedding.weight")
            ):
                raise ModelError(
                    f"{self.folder}: tie_word_embeddings is true, but {name} is not the embedding; "
                    "write false into config.json"
                )
            return True
        return False

    def _refuse(self, name: str, allow_unused: bool) -> None:
        own_modules = _OWN.get(self.kind, _OWN_LLAMA)
        if self._bare(name).partition(".")[0] in own_modules:
            raise ModelError(
                f"{self.folder}: contains {name}, which a {self.kind} with this config.json does "
                "not "
                "have and our models cannot use; it is not the model that config.json describes"
            )
        if not allow_unused:
            raise ModelError(
                f"{self.folder}: contains {name}, which is not part of the language model; "
                "--allow-unused leaves such tensors out"
            )


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
        return _gpt2_part(lambda tail: theirs(f"{prefix}h.{layer}.{tail}"), part)
    if kind == "gpt_neox":
        return _neox_part(config, lambda tail: theirs(f"{prefix}layers.{layer}.{tail}"), part)
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
    _, _, role = module.rpartition(".")
    if role in _FUSED:
        fused = theirs(f"attn.c_attn.{kind}")
        return fused.mT.chunk(3)[_FUSED.index(role)] if kind == "weight" else _third(fused, role)
    tensor = theirs(f"{_GPT2_PARTS[module]}.{kind}")
    return tensor.mT if tensor.ndim == 2 else tensor


def _third(fused: Tensor, role: str) -> Tensor:
    return fused.chunk(3)[_FUSED.index(role)]


def _neox_part(config: GPTConfig, theirs: ReadTheirs, part: str) -> Tensor:
    """Queries, keys and values are interleaved by head."""
    module, _, kind = part.rpartition(".")
    _, _, role = module.rpartition(".")
    if role in _FUSED:
        fused = theirs(f"attention.query_key_value.{kind}")
        by_head = fused.unflatten(0, (config.num_attention_heads, 3, -1))
        return torch.flatten(by_head[:, _FUSED.index(role)], 0, 1)
    return theirs(f"{_NEOX_PARTS[module]}.{kind}")
