"""Memory of a process: weights, gradients, optimizer, and what a forward pass keeps.

Activations follow Korthikanti et al. 2022, adapted to what these layers keep.
"""

from __future__ import annotations

from pretrain.engine.sizes import Layout, Sizes

CPU_LIBRARIES = 0.42e9
"""Bytes of a process on a CPU in addition to its model: Python, PyTorch, DeepSpeed, Megatron, and
what their first update adds."""
CPU_SLACK = 0.25
"""Unused memory that glibc's allocator keeps, as a share of the used memory. Only these two numbers
of the plan were chosen to fit runs: six runs of 7 to 125 M parameters (docs/performance.md)."""
GPU_LIBRARIES = 1.5e9
"""Bytes of a GPU that a process uses outside PyTorch's allocator: the CUDA context with the kernels
of PyTorch and cuBLAS, and NCCL's buffers for a few groups. Assumed, not measured."""
ROOM = 0.8
"""Share of a device's memory that a micro batch may fill: the rest is for what the formula leaves
out, and for the allocator's gaps."""
_BUCKET = 5e8
"""Number of gradients that DeepSpeed reduces at once."""


def process_bytes(device: str) -> tuple[float, float]:
    """What a process uses on a device of this type (cuda, cpu) in addition to its model.

    Returns:
        (bytes, unused memory that the allocator keeps as a share of the used memory).
    """
    return (CPU_LIBRARIES, CPU_SLACK) if device == "cpu" else (GPU_LIBRARIES, 0.0)


def memory_of(sizes: Sizes, layout: Layout) -> dict[str, float]:
    """Peak bytes by part, on the process that uses most memory.

    The peak is either at the end of a forward pass, with its activations and the loss, or in the
    update. The start needs less: what the process keeps, and under ZeRO 3 one layer whole. On flat
    buffers, an update has the float32 gradients, and one layer's gradients as computed. DeepSpeed
    has all of them as computed, in its bucket, and in float32.
    """
    fullest = sizes.fullest_stage(layout.pipeline)
    local = fullest.on(layout.tensor)
    shards = layout.data if layout.stage else 1
    masters = 4 if layout.width == 2 or (layout.stage and not layout.flat) else 0
    kept = _kept(sizes, layout)
    per_layer = _between(sizes, layout) if layout.recompute else kept
    waiting = min(layout.pipeline, layout.count)
    # Summed in float32, in every precision.
    gradients = local * 4 / (layout.data if layout.stage >= 2 else 1)
    # They wait for the next micro batch, or a CUDA graph keeps them.
    waits = layout.count > 1 or layout.recorded
    always = {
        "libraries": layout.base,
        "weights": local * layout.width / (layout.data if layout.stage == 3 else 1),
        "optimizer": (fullest.state(layout.tensor) + local * masters) / shards,
    }
    forward = {
        "gradients": gradients if waits else 0.0,
        "gathered": layout.kept_gathered(sizes) * layout.width if layout.stage == 3 else 0.0,
        "activations": per_layer * sizes.stage(layout.pipeline) * waiting,
        # One layer's at work: its own, and the gradients that flow through it.
        "work": 1.5 * kept,
        "loss": _loss(sizes, layout),
    }
    update = {
        "gradients": gradients,
        "bucket": min(local, _BUCKET) * 4 if layout.stage else 0.0,
        "float32 gradients": 4 * local / layout.data if layout.stage and layout.width == 2 else 0.0,
    }
    if layout.flat:
        arriving = max(sizes.block.on(layout.tensor), sizes.tied.on(layout.tensor))
        update = {"gradients": gradients, "arriving gradients": arriving * layout.width}
    if layout.norms:
        update["copy for norms"] = 4 * local / shards
    if sizes.largest:
        # The update and its orthogonal form, flat, and the matrices and products of one parameter.
        mine = fullest.orthogonal / layout.tensor / shards
        update["orthogonal"] = 8 * mine + 6 * 4 * sizes.largest
    peak = always | max(forward, update, key=lambda parts: sum(parts.values()))
    # Flat buffers are allocated once; the allocator wastes memory on what comes and goes.
    lasting = ("weights", "optimizer") if layout.flat else ()
    changing = sum(size for part, size in peak.items() if part not in ("libraries", *lasting))
    return peak | {"allocator": layout.slack * changing}


def kept_by_layer(sizes: Sizes, layout: Layout) -> float:
    """Bytes that a layer reads and writes between its products, once."""
    return _kept(sizes, layout)


def _between(sizes: Sizes, layout: Layout) -> float:
    """Bytes of the activations between two layers."""
    whole = sizes.context * layout.micro * sizes.hidden * layout.width
    return whole / layout.tensor if layout.sequence else whole


def _kept(sizes: Sizes, layout: Layout) -> float:
    """Bytes that a layer keeps for its backward pass."""
    norms = 2.0 * sizes.hidden  # inputs of both; their outputs are inputs of the products
    norms = norms / layout.tensor if layout.sequence else norms
    # q, mixed; k, v, which are repeated for each head of a group.
    shared = (
        4 * sizes.query_width
        if sizes.key_value_width < sizes.query_width
        else 2 * sizes.query_width + 2 * sizes.key_value_width
    )
    inner = ((3 if sizes.gated else 2) - layout.selective) * sizes.ffn
    tokens = sizes.context * layout.micro
    kept = tokens * layout.width * (norms + 2 * sizes.hidden + (shared + inner) / layout.tensor)
    return kept + tokens * sizes.context * sizes.heads / layout.tensor * _of_scores(sizes, layout)


def _of_scores(sizes: Sizes, layout: Layout) -> int:
    """Bytes that a layer keeps of a score: softmax keeps none, sigmoid its float32 value too."""
    return {"softmax": 0, "linear": layout.width, "sigmoid": layout.width + 4}[sizes.attention]


def _loss(sizes: Sizes, layout: Layout) -> float:
    """Bytes of some logits, in both types and as their gradient, and of the head's gradient."""
    if not sizes.vocabulary:
        return 0.0
    tokens, vocabulary = sizes.outputs * layout.micro, sizes.vocabulary / layout.tensor
    rows = min(tokens, max(256, layout.loss_bytes / 4 / max(1.0, vocabulary)))
    wide = 0 if layout.compiled_loss else 4
    logits = rows * vocabulary * (2 * layout.width + wide)
    return logits + vocabulary * sizes.hidden * (layout.width + (4 if rows < tokens else 0))
