"""Bytes that a process sends in a step: the collectives of training, if they are rings.

A ring of n processes sends 2 (n - 1)/n of what it reduces and (n - 1)/n of what it gathers or
scatters (Thakur et al. 2005). Small messages are left out: the loss, the gradient's norm, the flags
of a step.
"""

from __future__ import annotations

from pretrain.engine.sizes import Layout, Sizes


def traffic_of(sizes: Sizes, layout: Layout) -> dict[str, float]:
    """Bytes that the busiest process sends in a step, by group."""
    return {
        "tensor": _tensor(sizes, layout),
        "pipeline": _pipeline(sizes, layout),
        "data": _data(sizes, layout),
    }


def _message(sizes: Sizes, layout: Layout) -> float:
    """Bytes of a micro batch between two layers."""
    return float(sizes.context * layout.micro * sizes.hidden * layout.width)


def _tensor(sizes: Sizes, layout: Layout) -> float:
    """Sums over tensor-parallel processes; a gather and a scatter instead send the same."""
    if layout.tensor == 1:
        return 0.0
    layers = sizes.stage(layout.pipeline)
    products = 2 if sizes.ffn else 1  # attention and MLP: a sum in each pass
    passes = 3 if layout.recompute else 2
    is_image = sizes.outputs < sizes.context
    embedding = 0 if is_image else 1  # patches are embedded on every process
    head = sizes.outputs / sizes.context
    ends = embedding + head if layout.pipeline == 1 else max(embedding, head)
    activations = _message(sizes, layout) * (layers * products * passes + ends)
    # For each prediction: the largest logit, the correct one, the sum of exponentials.
    loss = 3 * 4 * sizes.outputs * layout.micro
    fullest = sizes.fullest_stage(layout.pipeline)
    replicas = fullest.replicated if layout.sequence else 0
    gradients = layout.width * (replicas or layers * sizes.summed)
    # Muon's matrices: gathered, and sent by the process that makes one to the others of its group.
    matrices = 4 * fullest.orthogonal * (1 + 1 / layout.data)
    ring = (layout.tensor - 1) / layout.tensor
    return ring * (2 * layout.count * (activations + loss + gradients) + matrices)


def _pipeline(sizes: Sizes, layout: Layout) -> float:
    """Activations to the next stage, their gradients to the previous one, and a tied head's."""
    if layout.pipeline == 1:
        return 0.0
    message = _message(sizes, layout) / (layout.tensor if layout.sequence else 1) * layout.count
    # The first and the last stage sum a tied head in float32.
    at_ends = message + 4 * sizes.tied.on(layout.tensor)
    return max(at_ends, 2 * message) if layout.pipeline > 2 else at_ends


def _data(sizes: Sizes, layout: Layout) -> float:
    """Gradients that are reduced in float32, and weights that are gathered.

    Flat buffers are reduced once: scattered under ZeRO 1, whole under ZeRO 0. DeepSpeed reduces a
    whole bucket under ZeRO 1 and 2, under 2 after every micro batch. ZeRO 3 scatters it, and
    gathers weights for each pass, except those that it still keeps.
    """
    if layout.data == 1:
        return 0.0
    local = layout.parameters(sizes)
    if layout.stage == 3:
        gathered = 2 * local - layout.kept_gathered(sizes) + _recomputed(sizes, layout)
        sent = layout.count * (4 * local + layout.width * gathered)
    else:
        reductions = layout.count if layout.stage == 2 else 1
        transfers = 1 if layout.flat and layout.stage else 2
        sent = local * (transfers * 4 * reductions + (layout.width if layout.stage else 0))
    # Muon needs whole matrices of gradients that are divided, and shares what it makes of them.
    times = 3 if layout.stage else 1
    sent += times * 4 * sizes.fullest_stage(layout.pipeline).orthogonal / layout.tensor
    return sent * (layout.data - 1) / layout.data


def _recomputed(sizes: Sizes, layout: Layout) -> float:
    """Parameters that ZeRO 3 gathers once more because it freed them before the backward pass."""
    block = sizes.block.on(layout.tensor)
    frees = layout.recompute and min(layout.live, layout.reuse) < 2 * block
    return block * sizes.stage(layout.pipeline) if frees else 0.0
