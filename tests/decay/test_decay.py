"""Rules -> λ of every parameter -> named groups."""

from __future__ import annotations

from typing import Any

import pytest

from models.config import GPTConfig
from models.gpt import whole_model
from models.roles import ParameterInfo, Role
from pretrain.config.decay import DecayRule, WeightDecayConfig
from pretrain.decay.plan import compact, compare, parse_layers, plan_decay, plan_from
from pretrain.errors import UsageError


def infos(dialect: str = "gpt2", **more: object) -> list[ParameterInfo]:
    shape = {"num_layers": 6, "hidden_size": 32, "num_attention_heads": 4, "context": 16}
    return whole_model(GPTConfig(dialect=dialect, vocabulary_size=300, **shape, **more))


def test_every_parameter_in_exactly_one_group() -> None:
    for dialect in ("gpt2", "gpt_neox", "llama"):
        every = infos(dialect)
        plan = plan_decay(every, WeightDecayConfig(default=0.1, attention=0.3))
        names = [info.name for group in plan.groups for info in group.parameters]
        assert sorted(names) == sorted(info.name for info in every)
        assert len(set(names)) == len(names)
        total = sum(group.numel for group in plan.groups)
        assert total == sum(info.numel for info in every)
        assert len({group.name for group in plan.groups}) == len(plan.groups)


def test_narrower_words_win() -> None:
    config = WeightDecayConfig(default=0.1, attention=0.2, qk=0.3, key=0.4, mlp=0.5, mlp_out=0.0)
    plan = plan_decay(infos("gpt_neox"), config)
    by_role = {group.role: group.decay for group in plan.groups}
    assert by_role[Role.KEY] == 0.4 and by_role[Role.QUERY] == 0.3
    assert by_role[Role.VALUE] == by_role[Role.ATTENTION_OUTPUT] == 0.2
    assert by_role[Role.MLP_IN] == 0.5 and by_role[Role.MLP_OUT] == 0.0
    assert by_role[Role.EMBEDDING] == by_role[Role.HEAD] == 0.1
    assert by_role[Role.NORM] == by_role[Role.BIAS] == 0.0


def test_attention_without_mlp_and_the_reverse() -> None:
    """Impossible in GPT-NeoX, where a zero default folds all groups into one."""
    for attention, mlp in ((0.3, 0.0), (0.0, 0.3)):
        config = WeightDecayConfig(default=0.0, attention=attention, mlp=mlp)
        by_role = {g.role: g.decay for g in plan_decay(infos(), config).groups}
        assert (by_role[Role.QUERY], by_role[Role.MLP_IN]) == (attention, mlp)


def test_first_rule_wins_by_layer() -> None:
    rules = [
        DecayRule(roles=["query", "key"], layers="0-3", decay=0.3),
        DecayRule(roles=["attention"], layers="2,5", decay=0.7),
    ]
    plan = plan_decay(infos(), WeightDecayConfig(default=0.1, rules=rules))
    decay = plan.by_name
    assert decay["blocks.2.attention.query.weight"] == 0.3
    assert decay["blocks.2.attention.value.weight"] == 0.7
    assert decay["blocks.5.attention.query.weight"] == 0.7
    assert decay["blocks.4.attention.query.weight"] == 0.1
    names = {group.name for group in plan.groups if group.role is Role.QUERY}
    assert names == {"query[0-3]", "query[4]", "query[5]"}


@pytest.mark.parametrize(
    ("config", "culprit"),
    [
        ({"rules": [{"roles": ["query"], "layers": "6-9", "decay": 1}]}, "rules[0]"),
        ({"rules": [{"roles": ["mlp_gate"], "decay": 1}]}, "rules[0]"),
        (
            {
                "rules": [
                    {"roles": ["attention"], "decay": 1},
                    {"roles": ["value"], "layers": "1", "decay": 2},
                ]
            },
            "rules[1]",
        ),
        ({"rules": [{"roles": ["queries"], "decay": 1}]}, "'queries' is not a role; known: "),
        ({"rules": [{"roles": ["qwery"], "decay": 1}]}, "did you mean query"),
        ({"rules": [{"roles": ["query"], "layers": "0-9", "decay": 1}]}, "has layer "),
        ({"rules": [{"roles": ["query"], "layers": "a-b", "decay": 1}]}, "'a-b'"),
        ({"rules": [{"roles": ["query"], "layers": "3-1", "decay": 1}]}, "backwards"),
        ({"head": 0.1}, "weight_decay.head"),
        ({"mlp_gate": 0.1}, "weight_decay.mlp_gate"),
    ],
)
def test_what_matches_nothing_is_named(config: dict[str, Any], culprit: str) -> None:
    with pytest.raises(UsageError) as error:
        plan_decay(infos("gpt2"), WeightDecayConfig.model_validate(config))  # tied: no head
    assert culprit in str(error.value)


def test_differences_are_by_role_and_layer() -> None:
    every = infos()
    old = plan_decay(every, WeightDecayConfig(default=0.1)).by_name
    rule = DecayRule(roles=["value"], layers="1-2", decay=0.4)
    new = plan_decay(every, WeightDecayConfig(default=0.1, rules=[rule])).by_name
    (change,) = compare(every, old, new)
    assert (change.role, change.layers, change.before, change.after) == (
        Role.VALUE,
        "1-2",
        0.1,
        0.4,
    )
    assert plan_from(every, new).by_name == new


def test_layers_in_words() -> None:
    assert parse_layers("0-2, 5", "k") == {0, 1, 2, 5}
    assert parse_layers("", "k") is None
    assert compact({0, 1, 2, 5, 7, 8}) == "0-2,5,7-8"
