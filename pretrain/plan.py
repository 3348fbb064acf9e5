"""`pretrain plan`: which grid to ask for, before any machine is: memory, traffic, bubble, time.

Every number is a formula of the recipe's shapes and the machine's rates: published ones, or those
that `pretrain.here` measures of the machine at hand (only the allocator of a CPU is fitted to
runs). Sources:
activations, Korthikanti et al. 2022, for what these layers keep; traffic of ZeRO, Rajbhandari et
al. 2020; the bubble, (p - 1)/m, Narayanan et al. 2021; rings, Thakur et al. 2005.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.config import Config
from pretrain.errors import UsageError


@dataclass(frozen=True)
class Device:
    """One accelerator, dense rates as published, a direction of its links."""

    name: str
    tflops: float
    """bf16 matrix products."""
    memory: float
    """GB (10⁹ bytes)."""
    bandwidth: float
    """GB/s of its memory."""
    node_link: float
    """GB/s to its neighbours in the node."""
    network: float
    """GB/s to other nodes, for each device."""
    per_node: int = 8
    width: int = 2
    """Bytes of a number in products: bf16."""
    efficiency: float = 0.70
    """Share of the rate that the products of a step reach."""
    base: float = 0.0
    """Bytes that a process takes before it has a model."""
    type: str = "cuda"
    """As PyTorch calls it."""
    slack: float = 0.0
    """What the allocator keeps beside what is used, as a share of it."""


DEVICES = {
    "a100": Device("a100", 312, 80, 2039, 300, 25),
    "a100-40": Device("a100-40", 312, 40, 1555, 300, 25),
    "h100": Device("h100", 989, 80, 3350, 450, 50),
    "h200": Device("h200", 989, 141, 4800, 450, 50),
    "b200": Device("b200", 2250, 180, 8000, 900, 50),
    "l40s": Device("l40s", 362, 48, 864, 32, 12.5),
    "mi300x": Device("mi300x", 1307, 192, 5300, 448, 50),
}
_LINK = 0.80
"""Share of a link's rate that a ring of large messages reaches."""
_OVERLAP = 0.5
"""Share of data-parallel traffic that is hidden behind the backward pass."""
_LAUNCHES, _LAUNCH = 60, 5e-6
"""Kernels that a layer starts forward and backward, and seconds that starting one takes."""
_RESERVE = 0.08
"""Share of a device's memory for the context, the allocator's gaps and collectives' buffers."""


@dataclass(frozen=True)
class Choice:
    """One grid with what it costs on a rank."""

    tensor: int
    pipeline: int
    data: int
    zero_stage: int
    micro_batch: int
    recompute: bool
    memory: dict[str, float]
    """Bytes by part, of the fullest rank."""
    traffic: dict[str, float]
    """Bytes that a rank sends in a step, by group."""
    bubble: float
    """Share of a step that stages wait."""
    seconds: dict[str, float]
    """Of a step: products, memory, tensor, data, pipeline, and what is left of them in all."""
    mfu: float
    fits: bool

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.memory.values())

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "memory_total": self.total}


@dataclass(frozen=True)
class Sizes:
    """What the formulas need to know of a model."""

    parameters: int
    """Of all blocks."""
    ends: int
    """Of embedding, positions and head."""
    layers: int
    hidden: int
    ffn: int
    heads: int
    key_value_width: int
    context: int
    vocabulary: int
    gated: bool
    tied: bool

    @property
    def matrices(self) -> int:
        """Parameters that multiply: the blocks, and the head."""
        return self.parameters + self.vocabulary * self.hidden

    def stage(self, pipeline: int) -> int:
        """Layers of the fullest stage."""
        return -(-self.layers // pipeline)

    def block(self) -> float:
        """Parameters of a layer."""
        return self.parameters / self.layers

    def flops(self, tokens: float) -> float:
        """Of forward and backward: 6 N a token, and 6 L d s for causal attention."""
        return tokens * (6.0 * self.matrices + 6.0 * self.layers * self.hidden * self.context)


def sizes_of(config: Config) -> Sizes:
    """Sizes of a recipe's model.

    Raises:
        UsageError: if the vocabulary is not known.
    """
    from pretrain.engine import whole_model

    model = config.model
    if not model.vocabulary_size and not model.image_size:
        raise UsageError(
            "model.vocabulary_size: not set; give it, as the data that would say is not asked here"
        )
    infos = whole_model(model, config.grid.tensor_parallel)
    blocks = sum(info.numel for info in infos if info.layer is not None)
    whole = sum(info.numel for info in infos)
    return Sizes(
        parameters=blocks,
        ends=whole - blocks,
        layers=model.num_layers,
        hidden=model.hidden_size,
        ffn=model.ffn_size if model.mlp else 0,
        heads=model.num_attention_heads,
        key_value_width=model.key_value_heads * model.head_size,
        context=model.context,
        vocabulary=model.padded_vocabulary(1) if model.vocabulary_size else 0,
        gated=model.activation == "swiglu",
        tied=model.tied_head,
    )


def rank(sizes: Sizes, config: Config, device: Device, count: int, limit: int = 0) -> list[Choice]:
    """Grids for ``count`` devices, each with its best ZeRO stage, micro batch and recomputation.

    The fastest that fits is first; those that do not fit are at the end.

    Args:
        limit: keep so many; 0: all.

    Raises:
        UsageError: if no grid can share the batch.
    """
    best: dict[tuple[int, int, int], Choice] = {}
    for axes in _grids(sizes, config, device, count):
        one = choose(sizes, config, device, *axes)
        known = best.get(axes[:3])
        if known is None or _order(one) < _order(known):
            best[axes[:3]] = one
    found = sorted(best.values(), key=_order)
    if not found:
        raise UsageError(
            f"train.global_batch: {config.train.global_batch} sequences cannot be shared by any "
            f"grid of {count} devices; change one of them"
        )
    return found[:limit] if limit else found


def _order(one: Choice) -> tuple[bool, float, float]:
    """Fast first, and of equals the smaller; what does not fit at the end, the smallest first."""
    return (not one.fits, round(one.seconds["step"], 6) if one.fits else one.total, one.total)


def _grids(
    sizes: Sizes, config: Config, device: Device, count: int
) -> Iterator[tuple[int, int, int, int, int, bool]]:
    batch = config.train.global_batch
    for tensor in _powers(min(device.per_node, count, sizes.heads)):
        if sizes.heads % tensor or count % tensor:
            continue
        for pipeline in range(1, sizes.layers + 1):
            if count % (tensor * pipeline):
                continue
            data = count // (tensor * pipeline)
            if batch % data:
                continue
            for micro in _powers(batch // data):
                if (batch // data) % micro:
                    continue
                for stage in (1,) if pipeline > 1 else (1, 2, 3):
                    if data == 1 and stage > 1:
                        continue
                    for recompute in (False, True):
                        yield tensor, pipeline, data, stage, micro, recompute


def _powers(limit: int) -> list[int]:
    return [1 << bits for bits in range(limit.bit_length())]


def choose(
    sizes: Sizes, config: Config, device: Device, tensor: int, pipeline: int, data: int,
    stage: int, micro: int, recompute: bool,
) -> Choice:  # fmt: skip
    """What one grid costs."""
    count = config.train.global_batch // data // micro
    on = Layout(device.width, tensor, pipeline, data, stage, micro, count, recompute,
                config.speed.loss_bytes(device.type), device.base, device.slack)  # fmt: skip
    memory = memory_of(sizes, on)
    bubble = (pipeline - 1) / (count + pipeline - 1)
    traffic = _traffic(sizes, on)
    seconds = _seconds(sizes, device, on, traffic, bubble)
    tokens = config.train.global_batch * sizes.context
    mfu = sizes.flops(tokens) / (seconds["step"] * on.world * device.tflops * 1e12)
    fits = sum(memory.values()) <= device.memory * 1e9 * (1 - _RESERVE)
    return Choice(
        tensor, pipeline, data, stage, micro, recompute, memory, traffic, bubble, seconds, mfu, fits
    )


@dataclass(frozen=True)
class Layout:
    """How a model lies on a rank."""

    width: int
    """Bytes of a number in products; masters and moments are float32."""
    tensor: int
    pipeline: int
    data: int
    stage: int
    micro: int
    count: int
    """Micro batches of a rank in a step."""
    recompute: bool
    loss_bytes: float = 512 << 20
    """Of float32 logits at once."""
    base: float = 0.0
    slack: float = 0.0
    """As of a `Device`."""

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.tensor * self.pipeline * self.data


def memory_of(sizes: Sizes, on: Layout) -> dict[str, float]:
    """Bytes on the fullest rank, by part, at the moment when they are most.

    That is either the end of a forward pass, with what it keeps and the loss, or the update, with
    DeepSpeed's copies of the gradient: as they come, in its bucket, and in float32.
    """
    # The first stage has the embedding, the last the head; a tied one is on both.
    ends = sizes.ends if on.pipeline == 1 or sizes.tied else sizes.ends / 2
    local = (sizes.block() * sizes.stage(on.pipeline) + ends) / on.tensor
    masters = 4 if on.width == 2 or on.stage else 0
    tokens, vocabulary = sizes.context * on.micro, sizes.vocabulary / on.tensor
    rows = min(tokens, max(256, on.loss_bytes / 4 / max(1.0, vocabulary)))
    kept = _kept(sizes, on.width, on.tensor, tokens)
    held = tokens * sizes.hidden * on.width if on.recompute else kept
    flight = min(on.pipeline, on.count)
    # Summed in float32, in every precision.
    gradients = local * 4 / (on.data if on.stage >= 2 else 1)
    several = on.count > 1  # they wait for the next micro batch
    # Some logits as they come, in float32 and as their gradient; the gradient of the head.
    loss = rows * vocabulary * (2 * on.width + 4) if sizes.vocabulary else 0.0
    loss += vocabulary * sizes.hidden * (on.width + (4 if rows < tokens else 0))
    always = {
        "libraries": on.base,
        "weights": local * on.width / (on.data if on.stage == 3 else 1),
        "optimizer": local * (8 + masters) / (on.data if on.stage else 1),
    }
    forward = {
        "gradients": gradients if several else 0.0,
        "activations": held * sizes.stage(on.pipeline) * flight,
        # One layer's at work: its own, and the gradients that flow through it.
        "work": 1.5 * kept,
        "loss": loss,
    }
    update = {
        "gradients": gradients,
        "bucket": min(local, 5e8) * 4 if on.stage else 0.0,
        "float32 gradients": 4 * local / on.data if on.stage and on.width == 2 else 0.0,
    }
    found = always | max(forward, update, key=lambda parts: sum(parts.values()))
    return found | {"allocator": on.slack * (sum(found.values()) - on.base)}


def _kept(sizes: Sizes, width: int, tensor: int, tokens: float) -> float:
    """Bytes that a layer keeps for its backward pass, without an attention matrix (SDPA)."""
    whole = 4 * sizes.hidden  # inputs of both norms, and what they give
    shared = 2 * sizes.hidden + 2 * sizes.key_value_width  # q, mixed; k, v
    inner = (3 if sizes.gated else 2) * sizes.ffn
    return tokens * width * (whole + (shared + inner) / tensor)


def _traffic(sizes: Sizes, on: Layout) -> dict[str, float]:
    """Bytes that a rank sends in a step; a ring of n sends 2 (n - 1)/n of what it reduces."""
    message = sizes.context * on.micro * sizes.hidden * on.width
    layers = sizes.stage(on.pipeline)
    times = 6 if on.recompute else 4  # all-reduces of a layer: two forward, two backward
    # Gradients reduced in float32, and weights gathered; ZeRO-3 gathers them for each pass.
    numbers = 4 + on.width * (2 if on.stage == 3 else 1)
    return {
        "tensor": 2 * (on.tensor - 1) / on.tensor * message * times * layers * on.count,
        "pipeline": 2 * message * on.count if on.pipeline > 1 else 0.0,
        "data": numbers * (on.data - 1) / on.data * _parameters(sizes, on),
    }


def _parameters(sizes: Sizes, on: Layout) -> float:
    """Of a rank that has both ends of the model."""
    return (sizes.block() * sizes.stage(on.pipeline) + sizes.ends) / on.tensor


def _seconds(
    sizes: Sizes, device: Device, on: Layout, traffic: dict[str, float], bubble: float
) -> dict[str, float]:
    tokens = sizes.context * on.micro * on.count  # of a rank
    again = 4 / 3 if on.recompute else 1.0
    layers = sizes.stage(on.pipeline)
    # The fullest stage sets the pace: the last one has the head, too.
    fullest = sizes.block() * layers + sizes.vocabulary * sizes.hidden
    uneven = fullest * on.pipeline / sizes.matrices if on.pipeline > 1 else 1.0
    rate = on.world * device.tflops * 1e12 * device.efficiency
    products = again * uneven * sizes.flops(tokens * on.data) / rate
    # What is not a product is bound by memory: norms, activations and residuals are read and
    # written about six times what is kept; the optimizer reads and writes 28 bytes a parameter.
    moved = 6 * _kept(sizes, on.width, on.tensor, tokens) * layers
    logits = 6 * 4 * tokens * sizes.vocabulary / on.tensor / on.pipeline
    optimizer = 28 * _parameters(sizes, on) / on.data
    memory = (again * moved + logits + optimizer) / (device.bandwidth * 1e9)
    inside = device.node_link * 1e9 * _LINK
    outside = device.network * 1e9 * _LINK
    # Data-parallel neighbours share a node only where tensor ranks leave room.
    reach = inside if on.tensor * on.data <= device.per_node else outside
    parts = {
        "products": products,
        "memory": memory,
        "tensor": traffic["tensor"] / inside,
        "data": traffic["data"] / reach * (1 - _OVERLAP),
        "pipeline": traffic["pipeline"] / (inside if on.world <= device.per_node else outside),
        "launches": again * _LAUNCHES * _LAUNCH * layers * on.count,
    }
    busy = max(parts["products"] + parts["memory"], parts["launches"])
    working = busy + parts["tensor"] + parts["pipeline"]
    return {**parts, "step": working / (1 - bubble) + parts["data"]}
