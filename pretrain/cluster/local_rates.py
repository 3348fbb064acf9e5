"""Measures this machine's rates in a few seconds, as a device of `pretrain plan`.

A process of a run has a share of the CPU's cores, or its own GPU. The measurements are a matrix
product, an elementwise pass over more data than a cache holds and, for several processes, a ring
reduction between two of them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pretrain.cli.console import warn
from pretrain.config.recipe import Config
from pretrain.distributed.signals import SIGNALS
from pretrain.engine.accelerators import Device
from pretrain.engine.memory import process_bytes
from pretrain.engine.micro_batch import memory_of_device
from pretrain.engine.precision import with_precision
from pretrain.errors import RunError, Stopped

_ASSUMED_LINK = 25e9
_SECONDS = 0.5
"""Seconds for each measurement, which takes the best of as many tries as fit."""


def rates_here(width: int) -> tuple[float, float]:
    """Flops and bytes per second of this machine, with numbers of ``width`` bytes."""
    return product_rate(width), elementwise_rate(width)


def measure_here(
    processes: int, config: Config, rates: Callable[[int], tuple[float, float]] = rates_here
) -> Device:
    """The share of this machine of one of ``processes`` processes, in the recipe's precision.

    Args:
        rates: measures the machine, for numbers of some bytes.
    """
    on_gpu = torch.cuda.is_available()
    shared = 1 if on_gpu else processes
    device = torch.device("cuda" if on_gpu else "cpu")
    width = 2 if with_precision(config, device).precision == "bf16" else 4
    base, slack = process_bytes(device.type)
    rate, bandwidth = rates(width)
    link = link_between(processes, torch.cuda.device_count() if on_gpu else None)
    return Device(
        name="here",
        tflops=rate / shared / 1e12,
        tflops32=rate / shared / 1e12,
        memory=memory_of_device(device) / shared / 1e9,
        bandwidth=bandwidth / shared / 1e9,
        node_link=link / 1e9,
        network=link / 1e9,
        per_node=torch.cuda.device_count() if on_gpu else processes,
        efficiency=0.9,
        base=base,
        type=device.type,
        slack=slack,
    )


def product_rate(width: int) -> float:
    """Flops per second of a square matrix product, in bf16 (2 bytes) or float32 (4)."""
    size = 8192 if torch.cuda.is_available() else 1536
    a, b = _values(size, size, width=width), _values(size, size, width=width)
    return 2.0 * size**3 / _best(lambda: a @ b)


def elementwise_rate(width: int) -> float:
    """Bytes per second that operations between products read and write: GELU, norm and sum."""
    size = 8192 if torch.cuda.is_available() else 1536
    x = _values(4 * size, size, width=width)

    def passes() -> None:
        torch.nn.functional.gelu(x, approximate="tanh")
        torch.nn.functional.layer_norm(x, x.shape[1:])
        x + x

    return 6.0 * x.numel() * width / _best(passes)


def link_between(
    processes: int, gpus: int | None, measure: Callable[[], float] | None = None
) -> float:
    """Bytes per second between two of ``processes`` processes; a GPU holds one process.

    Args:
        gpus: GPUs of this machine; None: processes run on the CPU.
        measure: measures it; by default `link_rate`.
    """
    if processes == 1:
        return 1e12
    if gpus == 1:
        warn(
            f"one GPU is here, so a link between GPUs cannot be measured; {_ASSUMED_LINK / 1e9:g} "
            "GB/s are assumed, as of PCIe 4.0"
        )
        return _ASSUMED_LINK
    return (measure or link_rate)()


def link_rate() -> float:
    """Bytes per second that each of two processes sends in a reduction of 4 MB."""
    from launchers.local import start_environment
    from launchers.team import run_team

    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "rate"
        words = [sys.executable, "-P", "-m", "pretrain.cluster.local_rates", str(answer)]
        code = run_team(words, 2, start_environment(2))
        if SIGNALS.asked:
            raise Stopped(SIGNALS.name)
        if code:
            raise RunError("--gpu here: two processes could not be measured; see above")
        return float(answer.read_text())


def _values(*shape: int, width: int) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.randn(*shape, device=device, dtype=torch.bfloat16 if width == 2 else torch.float32)


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of many tries."""

    def once() -> float:
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    times, stop = [once()], time.perf_counter() + _SECONDS
    while time.perf_counter() < stop:
        times.append(once())
    return min(times)


def _reduce(answer: Path) -> None:
    """The work of each of the two processes of `link_rate`; the first one writes the rate."""
    import torch.distributed as dist

    from pretrain.distributed.grid import connect

    device = connect()
    values = torch.ones(1 << 20, device=device)

    def together() -> float:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(4):
            dist.all_reduce(values)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / 4

    together()
    seconds = min(together() for _ in range(8))
    if dist.get_rank() == 0:
        answer.write_text(str(values.numel() * values.element_size() / seconds))
    dist.destroy_process_group()


if __name__ == "__main__":
    SIGNALS.listen()
    try:
        _reduce(Path(sys.argv[1]))
    except Stopped:
        sys.exit(SIGNALS.code)
