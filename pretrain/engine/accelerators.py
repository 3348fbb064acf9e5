"""Published rates of accelerators, for plans and for the utilisation that a run logs."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.engine.memory import GPU_LIBRARIES


@dataclass(frozen=True)
class Device:
    """One accelerator: published dense rates, and the rates of its links in one direction."""

    name: str
    tflops: float
    """Rate of bf16 matrix products."""
    tflops32: float
    """Rate of float32 matrix products, without TF32, which PyTorch uses only on request."""
    memory: float
    """GB (10⁹ bytes)."""
    bandwidth: float
    """Bandwidth of its memory in GB/s."""
    node_link: float
    """GB/s to its neighbours in the node."""
    network: float
    """GB/s to other nodes, for each device."""
    per_node: int = 8
    efficiency: float = 0.70
    """Share of the rate that the products of a step reach."""
    base: float = GPU_LIBRARIES
    """Bytes that a process uses before it has a model."""
    type: str = "cuda"
    """PyTorch's name of the device type."""
    slack: float = 0.0
    """Unused memory that the allocator keeps, as a share of the used memory."""


DEVICES = {
    "a100": Device("a100", 312, 19.5, 80, 2039, 300, 25),
    "a100-40": Device("a100-40", 312, 19.5, 40, 1555, 300, 25),
    "h100": Device("h100", 989, 67, 80, 3350, 450, 50),
    "h200": Device("h200", 989, 67, 141, 4800, 450, 50),
    "b200": Device("b200", 2250, 80, 180, 8000, 900, 50),
    "l40s": Device("l40s", 362, 91.6, 48, 864, 32, 12.5),
    "mi300x": Device("mi300x", 1307, 163.4, 192, 5300, 448, 50),
}


def device_named(name: str) -> Device | None:
    """The device that PyTorch calls so (``NVIDIA H100 80GB HBM3``); None if it is not known."""
    words = name.lower().replace("-", " ").split()
    return next((device for key, device in DEVICES.items() if key in words), None)
