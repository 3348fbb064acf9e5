"""Prints `pretrain plan` as a table or JSON."""

from __future__ import annotations

from collections.abc import Sequence

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


def in_bytes(value: float) -> str:
    """A number of bytes in the unit that suits it: ``1.5 GB``, ``31 MB``."""
    return _with_unit(value, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1)))


def in_time(seconds: float) -> str:
    """A time in the unit that suits it: ``3.2 days``, ``1.28 ms``."""
    units = (("days", 86400.0), ("hours", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3))
    return _with_unit(seconds, (*units, ("µs", 1e-6)))


def _with_unit(value: float, units: Sequence[tuple[str, float]]) -> str:
    """The largest unit of which there is at least one, with three digits."""
    name, size = next((one for one in units if value >= one[1]), units[-1])
    number = value / size
    return f"{number:,.0f} {name}" if number >= 100 else f"{number:.3g} {name}"


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
    for title, values, form in (
        ("memory of the first, by process", best.memory, in_bytes),
        ("sent by a process in a step", best.traffic, in_bytes),
        ("a step takes", best.seconds, in_time),
    ):
        parts = ", ".join(f"{name} {form(value)}" for name, value in values.items() if value)
        print(f"{title}: {parts or 'nothing'}")
    seconds = 3600 * hours_of(config, best)
    print(f"{config.train.steps:,} steps: {in_time(seconds)}, {in_time(seconds * count)} of a GPU")
    print(f"train it with: pretrain train RECIPE {' '.join(overrides(best))}")
