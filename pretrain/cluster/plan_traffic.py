"""Bytes that a process sends in a step: the collectives of training, if they are rings.

A ring of n processes sends 2 (n - 1)/n of what it reduces and (n - 1)/n of what it gathers or
scatters (Thakur et al. 2005). Small messages are left out: the loss, the gradient's norm, the flags
of a step.
"""

from __future__ import annotations

from pretrain.cluster.plan_shapes import Layout, Sizes


def traffic_of(sizes: Sizes, on: Layout) -> dict[str, float]:
    """Bytes that the busiest process sends in a step, by group."""
    return {
        "tensor": _tensor(sizes, on),
        "pipeline": _pipeline(sizes, on),
        "data": _data(sizes, on),
    }


def _message(sizes: Sizes, on: Layout) -> float:
    """Bytes of a micro batch between two layers."""
    return float(sizes.context * on.micro * sizes.hidden * on.width)


def _tensor(sizes: Sizes, on: Layout) -> float:
    """Sums over tensor-parallel processes; a gather and a scatter instead send the same."""
    if on.tensor == 1:
        return 0.0
    layers = sizes.stage(on.pipeline)
    products = 2 if sizes.ffn else 1  # attention and MLP: a sum in each pass
    passes = 3 if on.recompute else 2
    is_image = sizes.outputs < sizes.context
    embedding = 0 if is_image else 1  # patches are embedded on every process
    head = sizes.outputs / sizes.context
    ends = embedding + head if on.pipeline == 1 else max(embedding, head)
    activations = _message(sizes, on) * (layers * products * passes + ends)
    # For each prediction: the largest logit, the correct one, the sum of exponentials.
    loss = 3 * 4 * sizes.outputs * on.micro
    fullest = sizes.fullest_stage(on.pipeline)
    replicas = fullest.replicated if on.sequence else 0
    gradients = on.width * (replicas or layers * sizes.gains)
    ring = (on.tensor - 1) / on.tensor
    return ring * (2 * on.count * (activations + loss + gradients) + 4 * fullest.orthogonal)


def _pipeline(sizes: Sizes, on: Layout) -> float:
    """Activations to the next stage, their gradients to the previous one, and a tied head's."""
    if on.pipeline == 1:
        return 0.0
    message = _message(sizes, on) / (on.tensor if on.sequence else 1) * on.count
    at_ends = message + 4 * sizes.tied.on(on.tensor)  # summed in float32 by first and last stage
    return max(at_ends, 2 * message) if on.pipeline > 2 else at_ends


def _data(sizes: Sizes, on: Layout) -> float:
    """Gradients that are reduced in float32, and weights that are gathered.

    Flat buffers are reduced once: scattered under ZeRO 1, whole under ZeRO 0. DeepSpeed reduces a
    whole bucket under ZeRO 1 and 2, under 2 after every micro batch. ZeRO 3 scatters it, and
    gathers weights for each pass, except those that it still keeps.
    """
    if on.data == 1:
        return 0.0
    local = on.parameters(sizes)
    if on.stage == 3:
        gathered = 2 * local - on.kept_gathered(sizes) + _recomputed(sizes, on)
        sent = on.count * (4 * local + on.width * gathered)
    else:
        reductions = on.count if on.stage == 2 else 1
        whole = 1 if on.flat and on.stage else 2
        sent = local * (whole * 4 * reductions + (on.width if on.stage else 0))
    if on.stage:  # Muon needs whole matrices of gradients that are divided
        sent += 2 * 4 * sizes.fullest_stage(on.pipeline).orthogonal / on.tensor
    return sent * (on.data - 1) / on.data


def _recomputed(sizes: Sizes, on: Layout) -> float:
    """Parameters that ZeRO 3 gathers once more because it freed them before the backward pass."""
    block = sizes.block.on(on.tensor)
    frees = on.recompute and min(on.live, on.reuse) < 2 * block
    return block * sizes.stage(on.pipeline) if frees else 0.0
