"""Decay by role for models of other loops: λ proved by zero gradients, audits, errors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.live import LiveParameter, live_parameters
from models.roles import ModelError, ParameterInfo, Role
from pretrain.api.groups import DecayGroups, decay_groups
from pretrain.api.slices import rows_of
from pretrain.errors import RunError, UsageError
from tests.api.by_slices import (
    RATE,
    WORDS,
    build_odd,
    mostly_long,
    worst_after_zero_gradients,
)
from tests.transformers_models import FAMILIES, build

OPTIMIZERS: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "sgd with momentum": lambda groups, lr: torch.optim.SGD(groups, lr, momentum=0.9),
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "adamw, not foreach": lambda groups, lr: torch.optim.AdamW(groups, lr, foreach=False),
    "adamw with a tensor as rate": lambda groups, lr: torch.optim.AdamW(
        groups, torch.tensor(lr), capturable=False, foreach=False
    ),
}


def attached(model: nn.Module, make: Any = torch.optim.AdamW, **words: Any) -> Any:
    """The groups and their optimizer."""
    groups = decay_groups(model, **(words or WORDS))
    return groups, groups.attach(make(groups, lr=RATE))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_every_role_has_its_own_decay(family: str) -> None:
    model = build_odd(family)
    start = copy.deepcopy(model.state_dict())
    for name, make in OPTIMIZERS.items():
        model.load_state_dict(start)
        _, optimizer = attached(model, make)
        assert worst_after_zero_gradients(model, optimizer) < 1e-6, name


@pytest.mark.parametrize("family", mostly_long("gpt_neox", "gpt2"))
def test_slices_get_the_bits_of_an_optimizer_of_one_decay(family: str) -> None:
    """One step with real gradients: the hook's factors and the optimizer's own are the same."""

    def trained(**words: float) -> dict[str, torch.Tensor]:
        model = build_odd(family).train()
        _, optimizer = attached(model, default=0.1, attention_output=0.1, **words)
        tokens = torch.arange(32).view(2, 16) % 64
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        return {one.name: one.parameter.detach() for one in live_parameters(model)}

    apart = trained(query=0.5, key=0.3, value=0.2)
    fused = [one for one in live_parameters(build_odd(family)) if one.part is not None]
    assert len(fused) == 2
    for index, decay in enumerate((0.5, 0.3, 0.2)):
        same = trained(query=decay, key=decay, value=decay)
        for one in fused:
            assert one.part is not None
            rows = (one.part == index).nonzero().flatten()
            mine, native = (
                weights[one.name].index_select(one.dim, rows) for weights in (apart, same)
            )
            assert torch.equal(mine, native)


def test_a_sharded_model() -> None:
    """`fully_shard` of one process; tests/api/sharded.py has two."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build_odd("gpt_neox")
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        _, optimizer = attached(model)
        assert worst_after_zero_gradients(model, optimizer, backward=True) < 1e-6
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_one_group(family: str) -> None:
    model = build(family)
    groups, optimizer = attached(model, default=0.1, attention=0.5, mlp=0.2)
    inside = [id(one) for group in groups for one in group["params"]]
    assert len(set(inside)) == len(inside)
    assert set(inside) == {id(one) for one in model.parameters()}
    groups.audit()
    for name, decay in groups.decays.items():
        vector = dict(model.named_parameters())[name.partition(":")[0]].dim() < 2
        in_attention = any(word in name for word in ("q_proj", "c_attn", "query", "qkv", "v_proj"))
        wanted = 0.0 if vector else 0.5 if in_attention else decay
        assert decay == wanted, name
    assert optimizer.param_groups[0]["name"]


def test_a_tied_embedding_is_there_once() -> None:
    model = build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    groups = decay_groups(model, default=0.1, embedding=0.4)
    assert [name for name in groups.decays if "wte" in name or "lm_head" in name] == [
        "transformer.wte.weight"
    ]
    with pytest.raises(UsageError, match="head"):
        decay_groups(model, head=0.1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({x: nn.Linear(8, 8, bias=False) for x in "qkvo"})
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([Block(), Block()])


TEN_LINES: dict[str, Any] = {
    "layer": "blocks.{layer}.attn.",
    "query": "q.weight", "key": "k.weight", "value": "v.weight", "output": "o.weight",
    "layers": 2, "heads": 2, "width": 8,
    "roles": {"mlp_in": "blocks.{layer}.up.weight", "mlp_out": "blocks.{layer}.down.weight",
              "embedding": "emb.weight"},
}  # fmt: skip


def test_a_model_of_ones_own_in_ten_lines(tmp_path: Path) -> None:
    import yaml

    rules = [{"roles": ["qk", "mlp_in"], "layers": "1", "decay": 0.9}]
    groups = decay_groups(Own(), default=0.1, vo=0.3, rules=rules, family=TEN_LINES)
    assert groups.decays["blocks.1.attn.k.weight"] == 0.9 == groups.decays["blocks.1.up.weight"]
    assert groups.decays["blocks.0.attn.k.weight"] == 0.1
    assert groups.decays["blocks.0.attn.o.weight"] == 0.3
    assert groups.decays["blocks.0.up.bias"] == 0.0
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(TEN_LINES))
    again = decay_groups(Own(), {"default": 0.1, "vo": 0.3, "rules": rules}, family=file)
    assert again.decays == groups.decays
    less = {**TEN_LINES, "roles": {"embedding": "emb.weight"}}
    with pytest.raises(ModelError, match=r"blocks\.0\.up\.weight \(and 3 more\) has no role"):
        decay_groups(Own(), default=0.1, family=less)
    more = {"mlp_in": "blocks.{layer}.up.weight", "default": "blocks.{layer}.down.weight"}
    named = decay_groups(Own(), default=0.1, mlp_in=0.2, family=less, roles=more)
    assert named.decays["blocks.0.down.weight"] == 0.1
    assert named.decays["blocks.0.up.weight"] == 0.2


def refused() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "no such parameters", {"mlp_gate": 0.1}
    yield "has layer 7", {"rules": [{"roles": ["qk"], "layers": "7", "decay": 1}]}
    yield "atention", {"atention": 0.1}
    yield "pretrain train", {"policies": [{"kind": "alpha", "roles": ["attention"]}]}
    yield "pretrain train", {"form": "cautious"}
    yield "default", {"default": -1}


@pytest.mark.parametrize("message,words", refused())
def test_what_does_not_fit_is_one_line(message: str, words: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        decay_groups(build("gpt2"), **words)
    assert "\n" not in str(caught.value)


def test_an_unknown_family_says_how_to_describe_it() -> None:
    with pytest.raises(ModelError, match=r"family=.*layer: 'blocks"):
        decay_groups(Own(), default=0.1)
    with pytest.raises(ModelError, match=r"q\.weight under `beside` of family=") as caught:
        decay_groups(Own(), default=0.1, family={**TEN_LINES, "query": "w.weight"})
    assert "--" not in str(caught.value)
    other = {**TEN_LINES, "query": "w.weight", "beside": ["q.weight"]}
    with pytest.raises(ModelError, match=r"has no blocks\.0\.attn\.w\.weight; correct"):
        decay_groups(Own(), default=0.1, family=other)


def zero_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_without_the_hook_is_refused(make: Any) -> None:
    model = build("gpt2")
    optimizer = make(decay_groups(model, **WORDS), lr=RATE)
    with pytest.raises(UsageError, match=r"groups\.attach\(optimizer\)"):
        zero_step(model, optimizer)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    model = build("gpt2")
    groups = decay_groups(model, **WORDS)
    with pytest.raises(UsageError, match="not made of these groups"):
        groups.attach(torch.optim.AdamW(model.parameters(), lr=RATE))
    with pytest.raises(UsageError, match="has no lr"):
        groups.attach(NoRate(groups, {}))
    optimizer = groups.attach(torch.optim.AdamW(groups, lr=RATE))
    with pytest.raises(UsageError, match="already"):
        groups.attach(optimizer)
    group = next(one for one in optimizer.param_groups if one["name"] == "query+key+value")
    flat = nn.Parameter(torch.cat([one.detach().flatten() for one in group["params"]]))
    group["params"] = [flat]  # as ZeRO does
    with pytest.raises(RunError, match="DeepSpeed"):
        zero_step(nn.ParameterList([flat]), optimizer)
    group["params"] = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    with pytest.raises(RunError, match="DeepSpeed"):
        zero_step(nn.ParameterList(group["params"]), optimizer)


class NoRate(torch.optim.Optimizer):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def test_a_loaded_state_cannot_change_decay_silently() -> None:
    model = build("gpt2")
    groups, optimizer = attached(model)
    zero_step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    exposure = groups.books()["query[1]"].exposure
    assert exposure == pytest.approx(RATE * WORDS["query"])

    same, again = attached(model)
    again.load_state_dict(saved)
    zero_step(model, again)
    assert same.books()["query[1]"].exposure == pytest.approx(2 * exposure)

    others, other = attached(model, **{**WORDS, "query": 0.6})
    other.load_state_dict(saved)
    with pytest.raises(RunError, match=r"query\+key\+value.*restore"):
        zero_step(model, other)
    others.restore()
    zero_step(model, other)
    record = others.books()["query[1]"]
    assert record.decay == 0.6 and record.exposure == pytest.approx(RATE * (0.5 + 0.6))
    assert record.retention == pytest.approx((1 - RATE * 0.5) * (1 - RATE * 0.6))


def test_an_update_that_the_scaler_skips_decays_nothing() -> None:
    model = build("gpt2")
    groups, optimizer = attached(model, lambda groups, lr: torch.optim.SGD(groups, lr, fused=True))
    before = copy.deepcopy(model.state_dict())
    optimizer.found_inf = torch.tensor(1.0)
    zero_step(model, optimizer)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert groups.books()["query[0]"].exposure == 0.0


def test_weights_in_bf16_are_multiplied_in_float32() -> None:
    """A factor in bf16 would be 0.99609 instead of 0.9975."""
    model = build("gpt2").bfloat16()
    _, optimizer = attached(model, default=0.0, query=0.5, key=0.3, value=0.2)
    weight = model.transformer.h[0].attn.c_attn.weight
    with torch.no_grad():
        weight.fill_(1.0)[1:].fill_(1.5)
    for group in optimizer.param_groups:
        group["lr"] = 5e-3
    zero_step(model, optimizer)
    assert weight[:, 0].tolist() == [0.99609375] + [1.5] * (len(weight) - 1)


def test_factors_are_those_of_torch() -> None:
    draws = torch.rand(2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = nn.Parameter(torch.ones(2, 1))
    infos = (ParameterInfo("a", Role.QUERY, 0, (1, 1), None),) * 2
    member = LiveParameter("a", matrix, infos, torch.tensor([0, 1]))
    for rate, decay in draws.mul(torch.tensor([1e-2, 1.0])).tolist():
        factor = rows_of(member, (decay, 0.0)).factor(rate)
        assert float(factor[0]) == float(torch.ones(1).mul_(1.0 - rate * decay))


def test_groups_print_what_they_do() -> None:
    text = str(decay_groups(build("gpt2"), **WORDS))
    assert "query+key+value: λ = 0.5 / 0.3 / 0.2" in text
    assert isinstance(decay_groups(build("gpt2")), DecayGroups)
