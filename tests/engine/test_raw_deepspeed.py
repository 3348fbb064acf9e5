"""Raw DeepSpeed keys: each that is allowed changes no number, every other is refused by name."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.engine.raw_deepspeed import ALLOWED, IMPLIED, check_raw
from pretrain.errors import UsageError
from tests.tools import base_recipe, by_form, losses_of, run, run_workers, write_recipe

TRIED: dict[type, tuple[Any, ...]] = {int: (5000,), bool: (True, False), str: ("cpu",)}


def nested(key: str, value: Any) -> dict[str, Any]:
    *sections, last = key.split(".")
    tree = {last: value}
    for part in reversed(sections):
        tree = {part: tree}
    return tree


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The keys of both, section by section."""
    both = {key: merged(one[key], other[key]) for key in one.keys() & other.keys()}
    return {**one, **other, **both}


def settings(key: str) -> list[dict[str, Any]]:
    found = [nested(key, value) for value in TRIED[ALLOWED[key]]]
    if "offload" in key and not key.endswith("device"):  # means something on a CPU alone
        for one in found:
            one["zero_optimization"]["offload_optimizer"]["device"] = "cpu"
    return found


def check(
    data: Path, folder: Path, precision: str, tried: list[tuple[int, dict[str, Any]]]
) -> None:
    """Train each (ZeRO stage, raw keys) on two ranks beside a run without."""
    cases = []
    for number, (stage, raw) in enumerate([(1, {}), *tried]):
        values = deepcopy(base_recipe(data))
        values |= {"precision": precision, "deepspeed": raw, "grid": {"zero_stage": stage}}
        values["train"] = {"steps": by_form(3, 4), "global_batch": 8, "micro_batch": 2}
        for section in ("ranks", "evaluation", "checkpoint"):
            values[section]["every"] = by_form(3, 4)
        values["evaluation"] |= {"documents": 1, "at_end": "none"}
        cases.append({"recipe": values, "run": str(folder / f"{precision}-{number}")})
    run_workers(2, "train", cases, folder / f"workers-{precision}")
    wanted = losses_of(folder / f"{precision}-0")
    rounding = 1e-6 if precision == "fp32" else 1e-3
    for number, one in enumerate(tried, 1):
        found = losses_of(folder / f"{precision}-{number}")
        np.testing.assert_allclose(found, wanted, rtol=rounding, err_msg=f"{precision} {one}")


@pytest.mark.slow
def test_allowed_keys_change_no_number(data: Path, tmp_path: Path) -> None:
    """Each value of each key once, several keys at once, their stage by turns."""
    together: dict[tuple[int, int, bool], dict[str, Any]] = {}
    for number, key in enumerate(ALLOWED):
        stage = 3 if "stage3" in key or "sub_group" in key else 1 + number % 3
        for which, raw in enumerate(settings(key)):
            alike = (stage, which, "offload" in key)
            together[alike] = merged(together.get(alike, {}), raw)
    check(data, tmp_path, "bf16", [(stage, raw) for (stage, *_), raw in together.items()])


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_allowed_keys_on_every_stage(data: Path, tmp_path: Path, precision: str) -> None:
    raws = [raw for key in ALLOWED for raw in settings(key)]
    check(data, tmp_path, precision, [(stage, raw) for stage in (1, 2, 3) for raw in raws])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("torch_autocast.lower_precision_safe_modules", ["os.system"]),
        ("csv_monitor.output_path", "/tmp"),
        ("flops_profiler.output_file", "/tmp/x"),
        ("optimizer.type", "Adam"),
        ("zero_optimization.zero_quantized_gradients", True),
        ("zero_optimization.offload_optimizer.device", "nvme"),
        ("zero_optimization.offload_optimizer.nvme_path", "/tmp"),
        ("zero_optimization.reduce_bucket_size", -1),
        ("zero_optimization.reduce_bucket_size", True),
        ("zero_optimization.reduce_bucket_size", 0),
        ("zero_optimization.reduce_bucket_size", 10**13),
        ("zero_optimization.allgather_bucket_size", 5),
        ("zero_optimization.sub_group_size", 10**30),
        ("zero_optimization.overlap_comm", "yes"),
        ("compression_training", {}),
        ("unheard_of", None),
    ],
)
def test_other_keys_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"deepspeed\.{key}: "):
        check_raw(nested(key, value))


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_run_is_refused_before_its_folder_is_made(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    words = ["train", str(recipe), "deepspeed.unheard_of=1", "--out", str(tmp_path / "run")]
    assert run(monkeypatch, *words, *more) == 2
    assert "deepspeed.unheard_of: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_the_recipe_implies_is_no_unknown_key() -> None:
    for key in IMPLIED:
        check_raw(nested(key, 1))
    check_raw({"zero_optimization": {"offload_optimizer": {}}})
    check_raw({"zero_optimization": {}})
