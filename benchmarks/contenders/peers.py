"""The programs that one would use instead, as contenders: each makes an update per call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.contenders.common import Step, device, half, tensors
from benchmarks.contenders.shapes import Shape, batches


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
    """forward, backward, clip, step; the next batch is made, and a loss is read, while the device
    computes."""
    optimizer = adamw(model, shape)
    data = tensors(shape)
    batch = next(data)
    previous: torch.Tensor | None = None

    def step() -> float:
        nonlocal batch, previous
        inputs, labels = batch
        with autocast():
            loss = loss_of(inputs, labels)
        loss.backward()
        batch = next(data)
        torch.nn.utils.clip_grad_norm_(model.parameters(), shape.clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        late, previous = previous, loss.detach()
        return float("nan") if late is None else float(late)

    return step


def plain(shape: Shape, compiled: bool = True) -> Step:
    """A loop in nanoGPT's manner: its model's arithmetic, torch.compile, fused AdamW."""
    from benchmarks.contenders.plain_model import PlainGPT, PlainLlama

    model = (PlainLlama if shape.is_llama else PlainGPT)(shape).to(device())
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

    kind: dict[str, Any] = {
        "bias": True, "norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP",
        "rotary_percentage": 0.25, "intermediate_size": 4 * shape.hidden,
    }  # fmt: skip
    if shape.is_llama:
        kind = {
            "bias": False, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP",
            "rotary_percentage": 1.0, "intermediate_size": shape.inner,
            "n_query_groups": shape.key_value_heads,
        }  # fmt: skip
    config = Config(
        n_layer=shape.layers, n_embd=shape.hidden, n_head=shape.heads, block_size=shape.context,
        vocab_size=shape.vocabulary, padded_vocab_size=shape.vocabulary, parallel_residual=False,
        **kind,
    )  # fmt: skip
    model = GPT(config).to(device())
    if not shape.is_llama:
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
    """transformers' Trainer and GPT-2 or Llama, SDPA, fused AdamW, torch.compile."""
    import tempfile
    import threading

    from transformers import Trainer, TrainerCallback
    from transformers import TrainingArguments as Arguments

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
        _transformers_model(shape), arguments, train_dataset=_Random(shape), callbacks=[Turns()]
    )
    failures: list[Exception] = []

    def train() -> None:
        try:
            hf_trainer.train()
        except Exception as error:
            failures.append(error)
            done.release()

    threading.Thread(target=train, daemon=True).start()

    def step() -> float:
        go.release()
        done.acquire()
        if failures:
            raise failures[0]
        return float("nan")  # it keeps its losses to itself

    return step


def _transformers_model(shape: Shape) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    shared: dict[str, Any] = {
        "vocab_size": shape.vocabulary, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    if shape.is_llama:
        return LlamaForCausalLM(LlamaConfig(
            hidden_size=shape.hidden, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
            intermediate_size=shape.inner, max_position_embeddings=shape.context, **shared,
        ))  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(
        n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads, n_positions=shape.context,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared,
    ))  # fmt: skip


def trainer_eager(shape: Shape) -> Step:
    """The same without the compiler."""
    return trainer(shape, compiled=False)


def torchtitan(shape: Shape) -> Step:
    """torchtitan's Llama 3 with its FlexAttention, compiled, in the plain loop.

    Raises:
        ValueError: for another model; it has none with learned positions.
    """
    from torchtitan.models import llama3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm

    if not shape.is_llama:
        raise ValueError("torchtitan: Llama alone")
    d, small = shape.hidden, llama3.llama3_configs["debugmodel"]("flex")
    config = llama3.Llama3Model.Config(
        dim=d, vocab_size=shape.vocabulary,
        tok_embeddings=Embedding.Config(num_embeddings=shape.vocabulary, embedding_dim=d,
                                        param_init=small.tok_embeddings.param_init),
        norm=RMSNorm.Config(normalized_shape=d, param_init=small.norm.param_init),
        lm_head=Linear.Config(in_features=d, out_features=shape.vocabulary,
                              param_init=small.lm_head.param_init),
        layers=llama3._build_llama3_layers(
            n_layers=shape.layers, dim=d, n_heads=shape.heads, hidden_dim=shape.inner,
            n_kv_heads=shape.key_value_heads, attn_backend="flex",
            rope=ComplexRoPE.Config(dim=d // shape.heads, max_seq_len=shape.context, theta=1e4),
        ),
    )  # fmt: skip
    model = config.build().to(device())
    model.init_states(buffer_device=device())
    run: Any = torch.compile(model)
    positions = torch.arange(shape.context, device=device()).repeat(shape.batch, 1)
    masks = model.get_attention_masks(positions)

    def loss_of(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = run(inputs, positions, masks).flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, labels.flatten())

    return loop(model, loss_of, shape)
