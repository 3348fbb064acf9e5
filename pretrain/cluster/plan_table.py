"""Prints `pretrain plan` as a table or JSON."""

from __future__ import annotations

from data_pipeline.strict_json import to_json
from pretrain.cluster.plan import Choice, rank
from pretrain.cluster.plan_words import hours_of, overrides
from pretrain.config.recipe import Config
from pretrain.engine.accelerators import DEVICES, Device
from pretrain.engine.memory import GPU_LIBRARIES
from pretrain.engine.sizes import Sizes, sizes_of
from pretrain.errors import UsageError

_CAUTION = (
    "from published rates (70 % of the peak in products, 80 % of the links), not from a measured "
    "run on this device: time a few steps before you reserve a week; "
    f"{GPU_LIBRARIES / 1e9:g} GB of a GPU are assumed for libraries (CUDA context, NCCL)"
)
_HERE = (
    "from the rates of this machine, measured now; more processes than were measured are "
    "extrapolated as if they shared its links"
)


def plan(config: Config, device: str, count: int, limit: int, as_json: bool) -> None:
    """Print the best grids for ``count`` devices.

    Raises:
        UsageError: for an unknown device, or a batch that no grid can share.
    """
    if device not in DEVICES and device != "here":
        raise UsageError(f"--gpu: {device!r} is not one of {', '.join(DEVICES)}, here")
    sizes = sizes_of(config)
    if device == "here":
        from pretrain.cluster.local_rates import measure_here

        machine, note = measure_here(count, config), _HERE
    else:
        machine, note = DEVICES[device], _CAUTION
    choices = rank(config, machine, count, limit)
    if as_json:
        print(to_json({"device": device, "gpus": count, "note": note,
                          "grids": [choice.plain() for choice in choices]}))  # fmt: skip
        return
    _print(config, sizes, machine, count, choices)
    print(f"note: {note}")


def _print(config: Config, sizes: Sizes, device: Device, count: int, choices: list[Choice]) -> None:
    from rich.table import Table

    from pretrain.cli.console import show_table

    tokens = config.train.global_batch * sizes.context
    table = Table(title=f"{count} x {device.name}, {sizes.parameters + sizes.ends:,} parameters")
    columns = ("tensor", "pipeline", "data", "ZeRO", "micro", "recompute", "GB/process", "bubble",
               "s/step", "tokens/s", "MFU")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for choice in choices:
        table.add_row(
            str(choice.tensor), str(choice.pipeline), str(choice.data), str(choice.zero_stage),
            str(choice.micro_batch), "yes" if choice.recompute else "",
            f"{choice.total / 1e9:.1f}" + ("" if choice.fits else " too much"),
            f"{100 * choice.bubble:.0f} %", f"{choice.seconds['step']:.3g}",
            f"{tokens / choice.seconds['step']:,.0f}", f"{100 * choice.mfu:.0f} %",
        )  # fmt: skip
    show_table(table, 120)
    best = choices[0]
    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in best.memory.items())
    print(f"memory of the first, GB per process: {parts}")
    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in best.traffic.items())
    print(f"sent by a process in a step, GB: {parts}")
    parts = ", ".join(f"{name} {value:.3g}" for name, value in best.seconds.items())
    print(f"seconds of a step: {parts}")
    hours = hours_of(config, best)
    print(f"{config.train.steps:,} steps: {hours / 24:.2f} days, {hours * count:,.0f} GPU hours")
    print(f"train it with: pretrain train RECIPE {' '.join(overrides(best))}")
