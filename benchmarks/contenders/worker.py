"""One contender in its process: ``worker.py NAME SHAPE``; reads step counts, answers with JSON.

A line with a number asks for so many updates; the answer has their seconds, the last loss and the
peak memory so far. An empty line is the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from benchmarks.contenders.shapes import SHAPES, Shape, batches

Step = Callable[[], float]


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half() -> bool:
    """bf16 where it is fast, as `precision: auto` decides."""
    from pretrain.engine.precision import multiplies_bf16

    return device().type == "cuda" or multiplies_bf16()


def peak_resident() -> int:
    """Bytes, since the program began (ru_maxrss would begin with its parent's)."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def tensors(shape: Shape) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches, on the device: copied from pinned memory, so that no one waits for a copy."""
    on_gpu = device().type == "cuda"
    for pair in batches(shape):
        host = (torch.from_numpy(part) for part in pair)
        pinned = (part.contiguous().pin_memory() if on_gpu else part for part in host)
        inputs, labels = (part.to(device(), non_blocking=True) for part in pinned)
        yield inputs, labels


def autocast() -> torch.autocast:
    """bf16 arithmetic with fp32 masters, where that is fast."""
    return torch.autocast(device().type, torch.bfloat16, enabled=half())


def adamw(model: torch.nn.Module, shape: Shape) -> torch.optim.Optimizer:
    """AdamW as nanoGPT sets it: decay of matrices alone, one fused kernel."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": shape.decay},
              {"params": vectors, "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW(groups, lr=shape.rate, betas=(0.9, 0.95), fused=True)


def loop(model: torch.nn.Module, loss_of: Callable[..., torch.Tensor], shape: Shape) -> Step:
    """forward, backward, clip, step."""
    optimizer = adamw(model, shape)
    data = tensors(shape)

    def step() -> float:
        inputs, labels = next(data)
        with autocast():
            loss = loss_of(inputs, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), shape.clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def recipe_values(
    shape: Shape, compiled: bool = False, grid: dict[str, int] | None = None
) -> dict[str, Any]:
    """The recipe of a shape."""
    return {
        "model": {"dialect": "gpt2", "num_layers": shape.layers, "hidden_size": shape.hidden,
                  "num_attention_heads": shape.heads, "context": shape.context,
                  "vocabulary_size": shape.vocabulary},
        "train": {"steps": 10_000, "global_batch": shape.batch,
                  "micro_batch": 1 if (grid or {}).get("pipeline_parallel") else 0},
        "optimizer": {"learning_rate": shape.rate, "gradient_clipping": shape.clipping,
                      "weight_decay": {"default": shape.decay}},
        "speed": {"compile": compiled},
        "grid": grid or {},
    }  # fmt: skip


def rankdecay(shape: Shape, compiled: bool = True, grid: dict[str, int] | None = None) -> Step:
    """This program, as `pretrain train` runs it with `speed.compile`."""
    return rankdecay_engine(shape, compiled, grid)[1]


def rankdecay_deepspeed(shape: Shape) -> Step:
    """This program as it comes, its updates made by DeepSpeed (`speed.update`)."""
    return rankdecay_engine(shape, compiled=False, update="deepspeed")[1]


def rankdecay_engine(
    shape: Shape,
    compiled: bool = True,
    grid: dict[str, int] | None = None,
    update: str = "auto",
) -> tuple[Any, Step]:
    """Its engine, and what makes an update.

    Args:
        update: `speed.update` of the recipe.
        grid: as in a recipe; pipeline stages work on micro batches of one sequence.
    """
    from models.gpt import whole_model
    from pretrain.config.recipe import parse_config
    from pretrain.decay.plan import plan_decay
    from pretrain.distributed.grid import build_grid, connect
    from pretrain.engine.engine import build_engine, micro_batches
    from pretrain.engine.libraries import load_libraries
    from pretrain.engine.speed import keep_freed_memory

    keep_freed_memory(device())
    values = recipe_values(shape, compiled, grid)
    values["speed"]["update"] = update
    values["speed"] |= json.loads(os.environ.get("SPEED", "{}"))
    config = parse_config(values)
    where = connect()
    load_libraries()
    process_grid = build_grid(config.grid, where)
    plan = plan_decay(whole_model(config.model, process_grid.tensor), config.optimizer.weight_decay)
    engine = build_engine(config, process_grid, plan)
    micro, _ = micro_batches(config, process_grid)
    share = shape.batch // process_grid.data
    first = share * process_grid.data_rank

    def mine() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for inputs, labels in tensors(shape):
            for start in range(first, first + share, micro):
                yield inputs[start : start + micro], labels[start : start + micro]

    data, count = mine(), 0

    def step() -> float:
        nonlocal count
        engine.begin_step(count, shape.rate)
        count += 1
        return engine.train_step(data, more=True)

    return engine, step


def plain(shape: Shape, compiled: bool = True) -> Step:
    """A loop in nanoGPT's manner: its model's arithmetic, torch.compile, fused AdamW."""
    from benchmarks.contenders.plain_model import PlainGPT

    model = PlainGPT(shape).to(device())
    run = torch.compile(model) if compiled else model
    return loop(model, run, shape)


def plain_eager(shape: Shape) -> Step:
    """The same without the compiler."""
    return plain(shape, compiled=False)


def litgpt(shape: Shape) -> Step:
    """litgpt's model, compiled as its `pretrain` does."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        n_layer=shape.layers, n_embd=shape.hidden, n_head=shape.heads, block_size=shape.context,
        vocab_size=shape.vocabulary, padded_vocab_size=shape.vocabulary, bias=True,
        norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP", rotary_percentage=0.25,
        parallel_residual=False, intermediate_size=4 * shape.hidden,
    )  # fmt: skip
    model = GPT(config).to(device())
    model.lm_head.weight = model.transformer.wte.weight
    run: Any = torch.compile(model)

    def loss_of(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = chunked_cross_entropy(run(inputs), labels, chunk_size=0)
        return loss

    return loop(model, loss_of, shape)


class _Random(torch.utils.data.IterableDataset[dict[str, np.ndarray]]):
    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for inputs, _ in batches(self._shape):
            for row in inputs:
                yield {"input_ids": row, "labels": row}


def trainer(shape: Shape, compiled: bool = True) -> Step:
    """transformers' Trainer and GPT-2, SDPA attention, fused AdamW, torch.compile."""
    import tempfile
    import threading

    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback
    from transformers import TrainingArguments as Arguments

    config = GPT2Config(
        n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads, n_positions=shape.context,
        vocab_size=shape.vocabulary, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            go.acquire()

        def on_step_end(self, *_: object, **__: object) -> None:
            done.release()

    arguments = Arguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=shape.batch, max_steps=10**6,
        learning_rate=shape.rate, weight_decay=shape.decay, adam_beta2=0.95,
        max_grad_norm=shape.clipping, optim="adamw_torch_fused", bf16=half(), report_to=[],
        save_strategy="no", logging_strategy="no", use_cpu=device().type == "cpu",
        torch_compile=compiled, disable_tqdm=True,
    )  # fmt: skip
    hf_trainer = Trainer(
        GPT2LMHeadModel(config), arguments, train_dataset=_Random(shape), callbacks=[Turns()]
    )
    threading.Thread(target=hf_trainer.train, daemon=True).start()

    def step() -> float:
        go.release()
        done.acquire()
        return float("nan")  # it keeps its losses to itself

    return step


def trainer_eager(shape: Shape) -> Step:
    """The same without the compiler."""
    return trainer(shape, compiled=False)


GRIDS: dict[str, dict[str, int]] = {
    "rankdecay-eager": {}, "tensor-2": {"tensor_parallel": 2},
    "pipeline-2": {"pipeline_parallel": 2}, "data-2": {},
}  # fmt: skip
"""This program as it comes, without the compiler: on one process, or on two (``-2``)."""
CONTENDERS: dict[str, Callable[[Shape], Step]] = {
    "rankdecay": rankdecay, "rankdecay-deepspeed": rankdecay_deepspeed,
    "plain": plain, "plain-eager": plain_eager, "litgpt": litgpt, "trainer": trainer,
    "trainer-eager": trainer_eager,
    **{name: partial(rankdecay, compiled=False, grid=grid) for name, grid in GRIDS.items()},
}  # fmt: skip


def requests() -> Iterator[int]:
    """Step counts from standard input, told to every process of the contender."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield from (int(line) for line in sys.stdin if line.strip())
        return
    while True:
        turn = [sys.stdin.readline().strip() if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(turn, 0)
        if not turn[0]:
            return
        yield int(turn[0])


def peak_of_all() -> int:
    """Peak memory of the process; of the fullest of several."""
    import torch.distributed as dist

    mine = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return mine
    peaks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, mine)
    return max(peaks)


def main() -> None:
    """Answer until the end."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries may print
    step = CONTENDERS[sys.argv[1]](SHAPES[sys.argv[2]])
    first = os.environ.get("RANK", "0") == "0"
    if first:
        print("ready", file=answers, flush=True)
    for count in requests():
        began, loss = time.monotonic(), float("nan")
        for _ in range(count):
            loss = step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
        answer = {"seconds": seconds, "loss": loss, "peak": peak_of_all()}
        if first:
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
