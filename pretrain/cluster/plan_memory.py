"""Memory of a process: weights, gradients, optimizer, and what a forward pass keeps.

Activations follow Korthikanti et al. 2022, adapted to what these layers keep.
"""

from __future__ import annotations

from pretrain.cluster.plan_shapes import Layout, Sizes

CPU_LIBRARIES = 0.42e9
"""Bytes of a process on a CPU in addition to its model: Python, PyTorch, DeepSpeed, Megatron, and
what their first update adds."""
CPU_SLACK = 0.25
"""Unused memory that glibc's allocator keeps, as a share of the used memory. Only these two numbers
of the plan were chosen to fit runs: six runs of 7 to 125 M parameters (docs/performance.md)."""
GPU_LIBRARIES = 1.5e9
"""Bytes of a GPU that a process uses outside PyTorch's allocator: the CUDA context with the kernels
of PyTorch and cuBLAS, and NCCL's buffers for a few groups. Assumed, not measured."""
_BUCKET = 5e8
"""Number of gradients that DeepSpeed reduces at once."""


def process_bytes(device: str) -> tuple[float, float]:
    """What a process uses on a device of this type (cuda, cpu) in addition to its model.

    Returns:
        (bytes, unused memory that the allocator keeps as a share of the used memory).
    """
    return (CPU_LIBRARIES, CPU_SLACK) if device == "cpu" else (GPU_LIBRARIES, 0.0)


def memory_of(sizes: Sizes, on: Layout) -> dict[str, float]:
    """Peak bytes by part, on the process that uses most memory.

    The peak is either at the end of a forward pass, with its activations and the loss, or in the
    update. On flat buffers, the float32 gradients always exist, and one layer's gradients as
    computed. DeepSpeed has all of them as computed, in its bucket, and in float32.
    """
    fullest = sizes.fullest_stage(on.pipeline)
    local = fullest.on(on.tensor)
    shards = on.data if on.stage else 1
    masters = 4 if on.width == 2 or (on.stage and not on.flat) else 0
    kept = _kept(sizes, on)
    per_layer = _between(sizes, on) if on.recompute else kept
    # Summed in float32, in every precision.
    gradients = local * 4 / (on.data if on.stage >= 2 else 1)
    several = on.count > 1  # they wait for the next micro batch
    always = {
        "libraries": on.base,
        "weights": local * on.width / (on.data if on.stage == 3 else 1),
        "optimizer": (fullest.state(on.tensor) + local * masters) / shards,
    }
    forward = {
        "gradients": gradients if several or on.flat else 0.0,
        "gathered": on.kept_gathered(sizes) * on.width if on.stage == 3 else 0.0,
        "activations": per_layer * sizes.stage(on.pipeline) * min(on.pipeline, on.count),
        # One layer's at work: its own, and the gradients that flow through it.
        "work": 1.5 * kept,
        "loss": _loss(sizes, on),
    }
    update = {
        "gradients": gradients,
        "bucket": min(local, _BUCKET) * 4 if on.stage else 0.0,
        "float32 gradients": 4 * local / on.data if on.stage and on.width == 2 else 0.0,
    }
    if on.flat:
        arriving = max(sizes.block.on(on.tensor), sizes.tied.on(on.tensor))
        update = {"gradients": gradients, "arriving gradients": arriving * on.width}
    if sizes.largest:
        # The update and its orthogonal form, flat, and the matrices and products of one parameter.
        mine = fullest.orthogonal / on.tensor / shards
        update["orthogonal"] = 8 * mine + 6 * 4 * sizes.largest
    peak = always | max(forward, update, key=lambda parts: sum(parts.values()))
    # Flat buffers are allocated once; the allocator wastes memory on what comes and goes.
    lasting = ("weights", "optimizer", "gradients") if on.flat else ()
    changing = sum(size for part, size in peak.items() if part not in ("libraries", *lasting))
    return peak | {"allocator": on.slack * changing}


def kept_by_layer(sizes: Sizes, on: Layout) -> float:
    """Bytes that a layer reads and writes between its products, once."""
    return _kept(sizes, on)


def _between(sizes: Sizes, on: Layout) -> float:
    """Bytes of the activations between two layers."""
    whole = sizes.context * on.micro * sizes.hidden * on.width
    return whole / on.tensor if on.sequence else whole


def _kept(sizes: Sizes, on: Layout) -> float:
    """Bytes that a layer keeps for its backward pass."""
    norms = 2.0 * sizes.hidden  # inputs of both; their outputs are inputs of the products
    norms = norms / on.tensor if on.sequence else norms
    # q, mixed; k, v, which are repeated for each head of a group.
    shared = (
        4 * sizes.query_width
        if sizes.key_value_width < sizes.query_width
        else 2 * sizes.query_width + 2 * sizes.key_value_width
    )
    inner = (3 if sizes.gated else 2) * sizes.ffn
    tokens = sizes.context * on.micro
    kept = tokens * on.width * (norms + 2 * sizes.hidden + (shared + inner) / on.tensor)
    return kept + tokens * sizes.context * sizes.heads / on.tensor * _of_scores(sizes, on)


def _of_scores(sizes: Sizes, on: Layout) -> int:
    """Bytes that a layer keeps of a score: softmax keeps none, sigmoid its float32 value too."""
    return {"softmax": 0, "linear": on.width, "sigmoid": on.width + 4}[sizes.attention]


def _loss(sizes: Sizes, on: Layout) -> float:
    """Bytes of some logits, in both types and as their gradient, and of the head's gradient."""
    if not sizes.vocabulary:
        return 0.0
    tokens, vocabulary = sizes.outputs * on.micro, sizes.vocabulary / on.tensor
    rows = min(tokens, max(256, on.loss_bytes / 4 / max(1.0, vocabulary)))
    logits = rows * vocabulary * (2 * on.width + 4)
    return logits + vocabulary * sizes.hidden * (on.width + (4 if rows < tokens else 0))
