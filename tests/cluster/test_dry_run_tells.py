"""The dry run says which checkpoints stay and what is evaluated, which surprises people."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from models.gpt import whole_model
from pretrain.checkpoint.retention import superseded
from pretrain.cluster.dry_run import _exposures, _kept
from pretrain.config.recipe import Config, apply_overrides
from pretrain.decay.control import DecayControl
from pretrain.decay.plan import plan_decay
from pretrain.decay.sites import site_of
from tests.tools import base_recipe, run, write_recipe


@pytest.mark.parametrize(
    ("keep", "keep_every", "best"), itertools.product((0, 1, 3), (0, 40), (True, False))
)
def test_what_is_kept_is_what_retention_keeps(keep: int, keep_every: int, best: bool) -> None:
    """Of the checkpoints of a run, the rules leave those that the sentence names."""
    words = ["train.steps=100", "checkpoint.every=10", "evaluation.every=10",
             f"checkpoint.keep={keep}", f"checkpoint.keep_every={keep_every}",
             f"checkpoint.keep_best={str(best).lower()}"]  # fmt: skip
    config = apply_overrides(Config(), words)
    said = _kept(config)
    steps = range(10, 101, 10)
    paths = [Path(f"step-{step:08}") for step in steps]
    losses = dict.fromkeys(paths, 2.0) | {paths[2]: 1.0}
    left = set(paths) - set(superseded(paths, config.checkpoint, losses.__getitem__))
    named = set(paths)
    if keep:
        named = set(paths[-int(re.findall(r"the last (\d+)", said)[0]) :])
        if "multiples of 40" in said:
            named |= {path for path, step in zip(paths, steps, strict=True) if step % 40 == 0}
        if "the best" in said:
            named.add(paths[2])
    assert left == named and said.startswith("every 10 steps; ")


@pytest.mark.parametrize("at_end", ["none", "sample", "all"])
def test_what_is_evaluated(
    at_end: str, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = str(write_recipe(tmp_path / "recipe.yaml", base_recipe(data)))
    assert run(monkeypatch, "train", recipe, f"evaluation.at_end={at_end}", "--dry-run") == 0
    shown = capsys.readouterr().out
    end = {"none": "nothing", "sample": "the same", "all": "all of test"}[at_end]
    (line,) = [line for line in shown.splitlines() if line.startswith("evaluation: ")]
    assert line.startswith("evaluation: a sample of 6 documents of val every 3 steps; ")
    assert end in line and "at the end" in line
    assert run(monkeypatch, "train", recipe, "--dry-run", "--json") == 0
    assert "\nattention: a token sees all earlier documents of its sequence" in shown
    assert {"kept", "scored", "attention"} <= json.loads(capsys.readouterr().out).keys()


def test_exposures_are_those_of_each_tensor() -> None:
    """Tensors that share λ and rate are summed once: the sums are those of each alone."""
    words = [
        "train.steps=50", "model.num_layers=3", "model.hidden_size=16", "model.vocabulary_size=64",
        "model.num_attention_heads=2", "optimizer.weight_decay.bias=0.1",
        "optimizer.weight_decay.coupling={value: lr2}", "optimizer.weight_decay.form={vo: nuclear}",
        "optimizer.weight_decay.nuclear_every=3",
        "optimizer.weight_decay.rules=[{roles: [query], layers: '1', decay: 0.7}]",
        "optimizer.weight_decay.policies=[{kind: schedule, roles: [key], shape: cosine}]",
    ]  # fmt: skip
    config = apply_overrides(Config(), words)
    plan = plan_decay(whole_model(config.model, 1), config.optimizer.weight_decay)
    control = DecayControl(config, plan)
    found = _exposures(control, plan.groups, config)
    for group, exposures in zip(plan.groups, found, strict=True):
        assert exposures
        site, total = site_of(group.parameters[0]), 0.0
        for step in range(50):
            control.begin(step, config.learning_rate(step))
            total += control.now(site).shrink
        assert set(exposures) == {total}, group.name
    assert len({one[0] for one in found if one}) >= 6
