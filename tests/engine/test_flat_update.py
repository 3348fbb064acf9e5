"""Updates on flat buffers are DeepSpeed's, bit by bit, on every grid that has both."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.operations import COMPILED, Operations
from benchmarks.results_file import answered
from models.gpt import GPT
from models.layers import ParameterFactory
from models.loss import mean_loss
from models.roles import Role, declared_parameters, info_of
from pretrain.config.recipe import parse_config
from pretrain.distributed.grid import Grid
from pretrain.engine import optimizers
from pretrain.engine.flat_buffers import FlatBuffer, in_buckets
from pretrain.engine.flat_update import FlatUpdate
from pretrain.engine.norms import SquareSum, square_sum
from pretrain.engine.optimizers import MergedAdamW
from tests.tools import DIALECTS, ROOT, base_recipe, by_form, run_processes, run_workers

SMALL = {"num_layers": 5, "hidden_size": 16, "num_attention_heads": 4, "vocabulary_size": 64}
GRIDS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{}, {"tensor_parallel": 2}, {"tensor_parallel": 2, "sequence_parallel": True}],
    4: [{"tensor_parallel": 2, "sequence_parallel": True}],
}
OPTIMIZERS: list[dict[str, Any]] = [
    {},
    {"name": "sgd"},
    {"name": "lion"},
    {"name": "muon"},
    {"gradient_clipping": 0},
    {"gradient_clipping": 0.1, "weight_decay": {"form": "l2", "default": 0.1}},
    {"weight_decay": {"form": "cautious", "default": 0.1}},
    {"weight_decay": {"form": "adadecay", "default": 0.1}},
    {"weight_decay": {"form": {"attention": "nuclear"}, "default": 0.1}},
    {"weight_decay": {"default": 0.1, "policies": [{"kind": "awd"}]}},
]


def cases(data: Path, processes: int, all_of_them: bool) -> list[dict[str, Any]]:
    """Every grid and stage, each with an optimizer, a dialect, and one or two micro batches.

    Args:
        all_of_them: combine every grid and stage with every optimizer; otherwise each takes a
            quarter or, on one process, a half of the optimizers.
    """
    found: list[dict[str, Any]] = []
    for place, grid in enumerate(GRIDS[processes]):
        for stage in (0, 1):
            fp32 = OPTIMIZERS if all_of_them else OPTIMIZERS[share(processes, place, stage)]
            for precision in ("fp32", "bf16")[: 1 + stage]:
                some = OPTIMIZERS[: 2 if all_of_them else 1]
                for optimizer in fp32 if precision == "fp32" else some:
                    number = len(found)
                    values = deepcopy(base_recipe(data))
                    values["grid"] = grid | {"zero_stage": stage}
                    values["precision"] = precision
                    values["model"] |= DIALECTS[list(DIALECTS)[number % len(DIALECTS)]]
                    values["model"] |= {"vocabulary_size": 96, "tied_head": number % 2 == 0}
                    values["optimizer"] |= deepcopy(optimizer)
                    values["train"] = {
                        "steps": by_form(3, 4),
                        "global_batch": 8,
                        "micro_batch": 8
                        // (1 + number % 2)
                        * grid.get("tensor_parallel", 1)
                        // processes,
                    }
                    found.append({"recipe": values})
    return found


def share(processes: int, place: int, stage: int) -> slice:
    """The optimizers that a grid meets: so that each meets both stages, and each kind of grid."""
    if processes == 1:
        return slice(stage, None, 2)
    first = {2: (0, 1, 2), 4: (3,)}[processes][place]
    return slice((first + 2 * stage) % 4, None, 4)


def test_each_optimizer_meets_each_kind_of_grid() -> None:
    wanted = {
        (kind, value, number)
        for number in range(len(OPTIMIZERS))
        for kind in ("stage", "tensor", "sequence", "data")
        for value in (False, True)
    }
    met = set()
    for processes, grids in GRIDS.items():
        for place, grid in enumerate(grids):
            tensor = grid.get("tensor_parallel", 1)
            for stage in (0, 1):
                kinds = {
                    "stage": bool(stage),
                    "tensor": tensor > 1,
                    "sequence": "sequence_parallel" in grid,
                    "data": processes > tensor,
                }
                numbers = range(len(OPTIMIZERS))[share(processes, place, stage)]
                met |= {(*kind, number) for kind in kinds.items() for number in numbers}
    assert met == wanted


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("processes", GRIDS)
def test_both_updates(processes: int, all_of_them: bool, data: Path, tmp_path: Path) -> None:
    asked = cases(data, processes, all_of_them)
    answers = run_workers(processes, "both", asked, tmp_path)
    for case, answer in zip(asked, answers, strict=True):
        assert answer["engines"] == ["DeepSpeedEngine", "FlatUpdate"], case
        assert answer["moved"] != 0.0, case
        # DeepSpeed's ZeRO 0 updates tensor by tensor, with other ends of vectors.
        one_stage = case["recipe"]["grid"]["zero_stage"] == 1
        assert answer["figures"] <= 2e-6, (case, answer)
        assert answer["weights"] <= (1e-6 if one_stage else 1e-4), (case, answer)


def test_pieces_cover_every_element_once() -> None:
    draw = np.random.default_rng(0)
    for _ in range(60):
        parts = int(draw.integers(1, 9))
        shapes = [tuple(map(int, draw.integers(1, 40, 2))) for _ in range(draw.integers(1, 12))]
        cuts = sorted({0, len(shapes), *map(int, draw.integers(0, len(shapes) + 1, 2))})
        values = [torch.randn(shape) for shape in shapes]
        buffers = []
        for part in range(parts):
            held = [nn.Parameter(one.clone()) for one in values]
            members = [(f"g{a}", held[a:b]) for a, b in pairwise(cuts)]
            buffers.append((held, FlatBuffer(members, torch.float32, parts, part)))
        for number, whole in enumerate(values):
            found = torch.full((whole.numel(),), float("nan"))
            for held, buffer in buffers:
                assert torch.equal(held[number], whole)
                assert held[number].data_ptr() % 4 == 0
                for owner in buffer.owners.values():
                    for piece in owner.pieces:
                        if piece.parameter is held[number]:
                            place = found[piece.offset : piece.offset + piece.count]
                            assert place.isnan().all()
                            place.copy_(owner.tensor[piece.start : piece.start + piece.count])
            assert torch.equal(found, whole.flatten())
        for _, buffer in buffers:
            for owner in buffer.owners.values():
                assert owner.tensor.grad is not None
                owner.tensor.grad.fill_(1.0)
            assert buffer.own_gradient.sum() == sum(
                o.tensor.numel() for o in buffer.owners.values()
            )


def test_square_sums_are_those_of_each_tensor() -> None:
    flat = torch.randn(100_000)
    for sizes in ([100_000], [4096, 2048, 10, 3000, 2048, 2047, 1], [5], [2048] * 9):
        parts = list(flat[: sum(sizes)].split(sizes))
        wanted = sum(float(square_sum(one)) for one in parts)
        assert float(SquareSum(parts)()) == pytest.approx(wanted, rel=1e-14)
        flat *= 2.0  # values may change between calls


def test_neighbours_of_two_storages_are_not_one() -> None:
    whole = bytearray(np.random.default_rng(0).random(8192, dtype=np.float32).tobytes())
    parts = [torch.frombuffer(memoryview(whole)[at : at + 16384], dtype=torch.float32)
             for at in (0, 16384)]  # fmt: skip
    wanted = sum(float(square_sum(one)) for one in parts)
    assert float(SquareSum(parts)()) == pytest.approx(wanted, rel=1e-14)


def test_an_update_that_an_exception_ended_leaves_nothing() -> None:
    """Micro batches of before an exception do not count in the next update."""
    grid = Grid(1, 1, 1, 0, torch.device("cpu"), None, None, None)
    config = parse_config({"model": SMALL})
    made = []
    for broken in (False, True):
        module = GPT(config.model, ParameterFactory(1))
        groups = [{"name": "all", "params": list(declared_parameters(module)), "weight_decay": 0.1}]
        build = partial(torch.optim.AdamW, lr=1e-2)
        update = FlatUpdate(module, grid, groups, build, torch.float32, True, 2, 1.0)
        draw = torch.Generator().manual_seed(0)
        tokens = [torch.randint(0, 64, (2, 8), generator=draw) for _ in range(2)]
        if broken:
            update.begin()
            update.backward(update(tokens[1], partial(mean_loss, labels=tokens[0])))
        update.begin()
        for one in tokens:
            update.backward(update(one, partial(mean_loss, labels=one)))
            update.step()
        made.append(
            (float(update.gradient_norm), [p.detach().clone() for p in module.parameters()])
        )
        update.destroy()
    assert made[0][0] == made[1][0]
    assert all(torch.equal(a, b) for a, b in zip(made[0][1], made[1][1], strict=True))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_have_memory_during_an_update_only(count: int, keeps: bool) -> None:
    """Also if it is skipped because it is not finite, or ends in an exception."""
    grid = Grid(1, 1, 1, 0, torch.device("cpu"), None, None, None)
    module = GPT(parse_config({"model": SMALL}).model, ParameterFactory(1))
    groups = [{"name": "all", "params": list(declared_parameters(module)), "weight_decay": 0.1}]
    build = partial(torch.optim.AdamW, lr=1e-2)
    update = FlatUpdate(module, grid, groups, build, torch.float32, True, count, 1.0, smallest=1)
    update.keeps_gradients = keeps
    assert len(update.buffers) > 2
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))

    def held() -> set[bool]:
        return {buffer.has_gradient() for buffer in update.buffers}

    assert held() == {False}
    for kind in ("plain", "not finite", "ends"):
        update.begin()
        for number in range(count):
            loss = update(tokens, partial(mean_loss, labels=tokens))
            update.backward(loss * (torch.inf if kind == "not finite" else 1.0))
            assert held() == {True}
            ends = kind == "ends" and number == count - 1
            if ends:
                update.optimizer.step = Mock(side_effect=KeyboardInterrupt)  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt) if ends else nullcontext():
                update.step()
            assert held() == {number < count - 1 or keeps}
    if not keeps:  # PyTorch would end the process
        with pytest.raises(RuntimeError, match="call begin"):
            update.step()
        loss = update(tokens, partial(mean_loss, labels=tokens))
        with pytest.raises(RuntimeError, match="call begin"):
            update.backward(loss)


def test_padding_of_a_new_gradient_is_zero() -> None:
    """The other processes would add whatever was in that memory before."""
    parameter = ParameterFactory(1).constant("bias", (3,), Role.BIAS, None, 1.0)
    buffer = FlatBuffer([("all", [parameter])], torch.float32, 2, 0)
    for _ in range(3):
        buffer.free_gradient()
        buffer.allocate_gradient()
        assert buffer.gradient[3:].abs().sum() == 0 and len(buffer.gradient) == 16
        buffer.gradient.fill_(float("nan"))


@pytest.mark.parametrize("decays", [(0.1, 0.1, 0.0), (0.1, 0.2, 0.3), (0.0, 0.0, 0.0)])
def test_groups_with_equal_settings_are_one_step(
    decays: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is PyTorch's AdamW, bit by bit, and hooks see all groups, once."""
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # PyTorch wraps its step at the first object
    step_of_class = optimizers._without_hooks(torch.optim.AdamW.step)
    monkeypatch.setattr(optimizers, "_adamw_step", step_of_class)
    draw = torch.Generator().manual_seed(1)
    start = [torch.randn(50 + n, generator=draw) for n in range(3)]
    seen, found = [], []
    for kind in (torch.optim.AdamW, MergedAdamW):
        owners = [one.clone() for one in start]
        groups = [
            {"name": str(n), "params": [owner], "weight_decay": decay}
            for n, (owner, decay) in enumerate(zip(owners, decays, strict=True))
        ]
        optimizer = kind(groups, lr=1e-2, fused=True)
        optimizer.register_step_pre_hook(lambda it, *_: seen.append(len(it.param_groups)))
        for step in range(4):
            optimizer.param_groups[step % 3]["betas"] = [0.9, 0.999]  # as JSON gives them back
            optimizer.param_groups[1]["weight_decay"] = decays[1] * (1 + step % 2)
            for owner in owners:
                owner.grad = torch.randn(owner.shape, generator=torch.Generator().manual_seed(step))
            with Operations() as counted:
                optimizer.step()
            steps = counted.counts["aten._fused_adamw_.default"]
            if kind is MergedAdamW:
                assert steps == len({group["weight_decay"] for group in optimizer.param_groups})
        found.append((owners, optimizer.state_dict()["state"]))
    assert seen == [3] * 8
    (ours, state), (theirs, other) = found[1], found[0]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    torch.testing.assert_close(state, other, rtol=0, atol=0)


def test_buckets_end_with_layers() -> None:
    config = parse_config({"model": SMALL})
    everything = list(declared_parameters(GPT(config.model, ParameterFactory(1))))
    for smallest in (1, 4000, 1 << 30):
        buckets = in_buckets(everything, smallest)
        assert [id(one) for bucket in buckets for one in bucket] == [id(one) for one in everything]
        sizes = [sum(one.numel() for one in bucket) for bucket in buckets]
        assert all(size >= smallest for size in sizes[:-1])
        layers = [{info_of(one).layer for one in bucket} for bucket in buckets]
        assert all(not a & b - {None} for a, b in pairwise(layers))


def test_operations_of_an_update(data: Path, tmp_path: Path) -> None:
    """What an update adds to forward and backward pass of 12 layers is counted, not timed."""
    values = deepcopy(base_recipe(data))
    values["model"] |= {"num_layers": 12, "vocabulary_size": 96}
    (found,) = run_workers(1, "operations", [{"recipe": values}], tmp_path)
    added = {
        kind: {k: n - found["model"].get(k, 0) for k, n in found[kind].items()} for kind in found
    }
    assert sum(added["flat"].values()) <= 90, added["flat"]
    assert "aten._local_scalar_dense.default" not in found["flat"], "waits for the device"
    assert sum(added["deepspeed"].values()) > 20 * sum(added["flat"].values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compiled", ["", pytest.param(COMPILED, marks=pytest.mark.long)])
def test_operations_beside_a_plain_loop(precision: str, compiled: str) -> None:
    """What the host of a GPU starts for an update."""
    totals = {}
    for case in ("plain loop", "rankdecay, as on a GPU"):
        words = ["--here", case + compiled, precision]
        done = run_processes(words, 1, 300, script=ROOT / "benchmarks" / "operations.py")
        assert done.returncode == 0, done.stderr
        totals[case] = sum(answered(done.stdout).values())
    plain, ours = totals.values()
    assert plain > 280 and ours <= 1.2 * plain, totals
