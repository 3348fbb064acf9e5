"""Decides what ``precision: auto`` means on this machine."""

from __future__ import annotations

import torch

from pretrain.config.recipe import Config


def with_precision(config: Config, device: torch.device) -> Config:
    """The recipe with auto replaced by fp32 or bf16."""
    precision = resolve_precision(config.precision, device, config.grid.zero_stage)
    return config.model_copy(update={"precision": precision})


def resolve_precision(precision: str, device: torch.device, zero_stage: int) -> str:
    """The meaning of ``auto``: bf16 on GPUs and on CPUs with bf16 products, fp32 elsewhere."""
    if precision != "auto":
        return precision
    fast = device.type == "cuda" or multiplies_bf16()
    return "bf16" if fast and zero_stage > 0 else "fp32"


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products: AMX (6 x fp32) or AVX512-BF16 (2 x)."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
