"""`pretrain plan`: compares grids before there is a machine: memory, traffic, bubble, time.

Every number is a formula of the recipe's shapes and the machine's rates. The rates are published,
or measured on this machine by `pretrain.cluster.local_rates` (only the allocator of a CPU was
fitted to runs). The grids are those that `pretrain train` accepts, with every key that the recipe
sets (`plan_grids`). The bubble is (p - 1)/m, Narayanan et al. 2021.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pretrain.cluster.plan_grids import candidates
from pretrain.cluster.plan_traffic import traffic_of
from pretrain.config.recipe import Config
from pretrain.engine.accelerators import Device
from pretrain.engine.layout import layout_of
from pretrain.engine.memory import ROOM, kept_by_layer, memory_of
from pretrain.engine.micro_batch import AUTO, largest_micro_batch, with_size
from pretrain.engine.sizes import Layout, Sizes, sizes_of

_LINK = 0.80
"""Share of a link's rate that a ring of large messages reaches."""
_OVERLAP = 0.5
"""Share of data-parallel traffic that overlaps with the backward pass."""
_LAUNCHES, _LAUNCH = 60, 5e-6
"""Kernel launches of a layer, forward and backward, and the seconds of one launch."""
_RESERVE = 0.08
"""Share of a device's memory for the allocator's gaps."""
_EQUAL = 0.01
"""Relative difference of two times below which the plan treats them as equal."""


@dataclass(frozen=True)
class Choice:
    """One grid with its cost per process."""

    tensor: int
    pipeline: int
    data: int
    zero_stage: int
    micro_batch: int
    recompute: bool
    precision: str
    memory: dict[str, float]
    """Bytes by part, on the process that uses most memory."""
    traffic: dict[str, float]
    """Bytes that a process sends in a step, by group."""
    bubble: float
    """Share of a step that stages spend waiting."""
    seconds: dict[str, float]
    """Seconds of a step by part: products, memory, tensor, data, pipeline, and the total."""
    mfu: float
    fits: bool

    @property
    def total(self) -> float:
        """Total bytes."""
        return sum(self.memory.values())

    def plain(self) -> dict[str, Any]:
        """The plan as values for JSON."""
        return {**asdict(self), "memory_total": self.total}


def rank(config: Config, device: Device, count: int, limit: int = 0) -> list[Choice]:
    """Grids for ``count`` devices, each with its best ZeRO stage, micro batch and recomputation.

    The fastest that fits is first; those that do not fit are at the end.

    Args:
        config: keys that it sets in ``grid``, and ``train.micro_batch``, are kept; ``auto`` is what
            training finds on such devices.
        limit: the largest number of grids to return; 0: all.

    Raises:
        UsageError: if `pretrain train` would accept no grid of this number of devices.
    """
    by_grid: dict[tuple[int, int], list[Choice]] = {}
    sizes: dict[int, Sizes] = {}
    for recipe in candidates(config, device.type, device.per_node, count):
        tensor = recipe.grid.tensor_parallel
        if tensor not in sizes:
            sizes[tensor] = sizes_of(recipe)
        choice = choose(recipe, device, count, sizes[tensor])
        by_grid.setdefault((choice.tensor, choice.pipeline), []).append(choice)
    best = sorted((_best(variants, device) for variants in by_grid.values()), key=_order)
    return best[:limit] if limit else best


def _best(choices: list[Choice], device: Device) -> Choice:
    """The fastest variant of one grid; of equally fast ones, the largest micro batch that fits,
    then the lowest ZeRO stage: higher ones divide what has room, and communicate more."""
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        return min(choices, key=lambda choice: choice.total)
    fastest = min(choice.seconds["step"] for choice in fitting)
    near = [choice for choice in fitting if choice.seconds["step"] <= (1 + _EQUAL) * fastest]
    near = [choice for choice in near if choice.total <= ROOM * device.memory * 1e9] or near
    return max(near, key=lambda one: (one.micro_batch, -one.zero_stage, -one.total))


def _order(choice: Choice) -> tuple[bool, float, float]:
    """A sort key: fastest first, then smallest memory; grids that do not fit last, smallest
    first."""
    return (
        not choice.fits,
        round(choice.seconds["step"], 6) if choice.fits else choice.total,
        choice.total,
    )


def choose(config: Config, device: Device, count: int, sizes: Sizes | None = None) -> Choice:
    """The cost of a recipe's grid on ``count`` devices."""
    sizes = sizes or sizes_of(config)
    if config.train.micro_batch == AUTO:
        found = largest_micro_batch(config, device.type, count, device.memory * 1e9, sizes)
        config = with_size(config, found.size)
    layout = layout_of(config, device.type, count, device.base, device.slack)
    memory = memory_of(sizes, layout)
    bubble = (layout.pipeline - 1) / (layout.count + layout.pipeline - 1)
    traffic = traffic_of(sizes, layout)
    seconds = _seconds(sizes, device, layout, traffic, bubble)
    tokens = config.train.global_batch * sizes.context
    mfu = sizes.flops(tokens) / (seconds["step"] * layout.world * _rate(device, layout))
    fits = sum(memory.values()) <= device.memory * 1e9 * (1 - _RESERVE)
    return Choice(
        layout.tensor, layout.pipeline, layout.data, layout.stage, layout.micro, layout.recompute,
        "bf16" if layout.width == 2 else "fp32", memory, traffic, bubble, seconds, mfu, fits,
    )  # fmt: skip


def _rate(device: Device, layout: Layout) -> float:
    """Flops per second of products."""
    return (device.tflops if layout.width == 2 else device.tflops32) * 1e12


def _seconds(
    sizes: Sizes, device: Device, layout: Layout, traffic: dict[str, float], bubble: float
) -> dict[str, float]:
    tokens = sizes.context * layout.micro * layout.count  # of a rank
    recompute_factor = 4 / 3 if layout.recompute else 1.0
    layers = sizes.stage(layout.pipeline)
    # The largest stage sets the pace: the last one also has the head.
    fullest = sizes.block.whole * layers + sizes.head
    uneven = fullest * layout.pipeline / sizes.matrices if layout.pipeline > 1 else 1.0
    rate = layout.world * _rate(device, layout) * device.efficiency
    products = recompute_factor * uneven * sizes.flops(tokens * layout.data) / rate
    # Operations other than products are bound by memory: norms, activations and residuals read and
    # write about six times what is kept; the optimizer reads and writes 28 bytes per parameter.
    moved = 6 * kept_by_layer(sizes, layout) * layout.count * layers
    predicted = sizes.outputs * layout.micro * layout.count
    logits = 6 * 4 * predicted * sizes.vocabulary / layout.tensor / layout.pipeline
    optimizer = 28 * layout.parameters(sizes) / layout.data
    memory = (recompute_factor * moved + logits + optimizer) / (device.bandwidth * 1e9)
    inside = device.node_link * 1e9 * _LINK
    outside = device.network * 1e9 * _LINK
    # Data-parallel neighbours are in one node only if tensor parallelism does not fill it.
    reach = inside if layout.tensor * layout.data <= device.per_node else outside
    parts = {
        "products": products,
        "memory": memory,
        "tensor": traffic["tensor"] / inside,
        "data": traffic["data"] / reach * (1 - _OVERLAP),
        "pipeline": traffic["pipeline"] / (inside if layout.world <= device.per_node else outside),
        "launches": recompute_factor * _LAUNCHES * _LAUNCH * layers * layout.count,
    }
    busy = max(parts["products"] + parts["memory"], parts["launches"])
    working = busy + parts["tensor"] + parts["pipeline"]
    return {**parts, "step": working / (1 - bubble) + parts["data"]}
