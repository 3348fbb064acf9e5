"""Bytes that a layer keeps for the backward pass, beside those of a plain loop's: counts.

    python benchmarks/kept.py --out benchmarks/results/kept-cpu.json

Models of two and of four layers make a forward pass on a CPU, and half of the difference is a
layer's. All tensors that autograd saves count, except parameters. A memory that several tensors
share counts once, and as a whole if they use a part of it. The unit is a hidden state: tokens times
hidden size times the bytes of a weight. In bf16 the plain loop uses autocast, so it keeps float32
tensors too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn

from benchmarks.contenders.plain_model import PlainGPT, PlainLlama
from benchmarks.contenders.shapes import Shape
from benchmarks.results_file import answer, ask, finish
from models.config import GPTConfig
from models.gpt import GPT
from models.kernels import Kernels
from models.layers import ParameterFactory
from models.loss import mean_loss

SHAPES = {
    "gpt2": Shape(layers=4, hidden=64, heads=4, context=128, batch=8, vocabulary=512),
    "llama": Shape(layers=4, hidden=64, heads=4, context=128, batch=8, vocabulary=512,
                   dialect="llama", key_value_heads=4, inner=160),
}  # fmt: skip
KINDS: dict[str, dict[str, Any] | None] = {
    "plain loop": None,
    "rankdecay": {},
    "rankdecay, speed.recompute": {"selective": True},
}
"""The kernels of a GPU, with these changes; None: the plain loop."""


def kept(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that a forward pass keeps."""
    parameters = {one.untyped_storage().data_ptr() for one in module.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(sizes.values())


def by_layer(kind: str, dialect: str, precision: str, compiles: bool) -> float:
    """Hidden states that a layer keeps."""
    shape, sizes = SHAPES[dialect], []
    for layers in (2, 4):
        torch.compiler.reset()
        tokens = torch.randint(shape.vocabulary, (shape.batch, shape.context))
        make = _plain if KINDS[kind] is None else _ours
        module, forward = make(shape, layers, precision, compiles, KINDS[kind] or {})
        sizes.append(kept(partial(forward, tokens), module))
    unit = shape.batch * shape.context * shape.hidden * (2 if precision == "bf16" else 4)
    return (sizes[1] - sizes[0]) / 2 / unit


Made = tuple[nn.Module, Callable[[Tensor], Tensor]]


def _plain(shape: Shape, layers: int, precision: str, compiles: bool, _: dict[str, Any]) -> Made:
    sized = Shape(**{**shape.plain(), "layers": layers})  # type: ignore[arg-type]
    module = (PlainLlama if shape.is_llama else PlainGPT)(sized)
    run = torch.compile(module) if compiles else module

    def forward(tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss: Tensor = run(tokens, tokens)
        return loss

    return module, forward


def _ours(
    shape: Shape, layers: int, precision: str, compiles: bool, changes: dict[str, Any]
) -> Made:
    config = GPTConfig.model_validate({
        "dialect": shape.dialect, "num_layers": layers, "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads, "context": shape.context,
        "vocabulary_size": shape.vocabulary, "ffn_hidden_size": shape.inner,
    })  # fmt: skip
    kernels = Kernels(joined=True, compiled=compiles, **changes)
    module = GPT(config, ParameterFactory(0), kernels)
    module.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    return module, lambda tokens: module(tokens, partial(mean_loss, labels=tokens))


def main() -> None:
    """Count each case in a process of its own, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        kind, dialect, precision, form = options.here
        answer({"kept": by_layer(kind, dialect, precision, form == "compiled")})
        return
    table: dict[str, Any] = {}
    for dialect in SHAPES:
        for precision in ("bf16", "fp32"):
            for form in ("compiled", "not compiled"):
                for kind in KINDS:
                    found = round(ask("--here", kind, dialect, precision, form)["kept"], 2)
                    row = table.setdefault(f"{dialect}, {precision}, {form}", {})
                    row[kind] = found
                    print(f"{dialect}, {precision}, {form}, {kind}: {found}", file=sys.stderr)
    finish({"shapes": {name: one.plain() for name, one in SHAPES.items()}, "kept": table},
           options.out)  # fmt: skip


if __name__ == "__main__":
    main()
