"""Recognises quantised weights by their config.json and by the names of their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.roles import ModelError
from models.tensor_files import TensorFiles

_PARTS = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale": "FP8 or compressed-tensors",
    "weight_scale_inv": "FP8 in blocks",
    "weight_zero_point": "compressed-tensors",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes int8",
    "weight_format": "bitsandbytes",
    "W_q": "HQQ",
    "input_scale": "FP8",
}
"""Endings of the names that quantisers give to scales, codes and tables."""
_TAILS = {"_blocks": "MXFP4", "_scales": "MXFP4", "_qdata": "torchao", "_scale_inv": "FP8"}
_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
_ADAPTER = "adapter_config.json"
_MEND = "use the model that it was made from, in bfloat16, float16 or float32"


def refuse_quantised(folder: Path, config: dict[str, Any], files: TensorFiles) -> None:
    """Refuse a model whose numbers are codes, because their scales are not applied here.

    Raises:
        ModelError: naming the method, where it was found, and what to do.
    """
    if (folder / _ADAPTER).is_file():
        raise ModelError(
            f"{folder / _ADAPTER}: an adapter changes the weights of this folder; merge it into "
            "them (peft: merge_and_unload) and save the whole model elsewhere"
        )
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            if section.get(key):
                raise ModelError(
                    f"{folder / 'config.json'}: {key} says that the weights are quantised "
                    f"({_method(section[key])}); {_MEND} (if they already are, remove "
                    f"{key})"
                )
    for name in files.names:
        method = _method_of(name)
        if method:
            raise ModelError(f"{folder}: {name} is part of quantised weights ({method}); {_MEND}")
    for file, method in _FILES.items():
        if (folder / file).is_file():
            raise ModelError(
                f"{folder / file}: says that the weights are quantised ({method}); {_MEND} (if "
                "they already are, remove the file)"
            )


def _method(section: Any) -> str:
    return (
        str(section.get("quant_method", "no quant_method"))
        if isinstance(section, dict)
        else str(section)
    )


def _method_of(name: str) -> str:
    last = name.rpartition(".")[2]
    if ".quant_state." in name:
        return "bitsandbytes"
    tails = [method for tail, method in _TAILS.items() if last.endswith(tail)]
    return _PARTS.get(last) or (tails[0] if tails else "")
