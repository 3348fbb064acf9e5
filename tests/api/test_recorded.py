"""The run folder of another loop has only what is known of it, and reports say the same."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from models.factors import AttentionShape
from pretrain.api.commands import load_run as load_loop
from pretrain.api.folder import loop_recipe
from pretrain.api.groups import decay_groups
from pretrain.api.probe import RankProbe
from pretrain.cli.watched import view_of
from pretrain.config.recipe import Config, dump_config, parse_config
from pretrain.errors import UsageError
from pretrain.offline.ranks import find_weights
from pretrain.report.compare import unpaired
from pretrain.report.figure_parts import about
from pretrain.report.findings import findings
from pretrain.report.load import load_study
from pretrain.report.read_run import load_run
from pretrain.report.tables import tables_of
from pretrain.report.varying import varying
from pretrain.runs.loop import NOT_RECORDED, flat
from tests.fake_runs import recipe, write_run
from tests.transformers_models import build

pytestmark = pytest.mark.slow

GIVEN: dict[str, tuple[str, Any]] = {
    "seed": ("seed", 3),
    "learning_rate": ("optimizer.learning_rate", 0.02),
    "global_batch": ("train.global_batch", 2),
    "context": ("model.context", 16),
    "precision": ("precision", "bf16"),
    "steps": ("train.steps", 4),
}
"""What a loop may tell about itself, with the recipe's key."""
ALWAYS = ("model.", "ranks.", "evaluation.at_end")
"""What a probe knows by itself."""


def write_loop(run: Path, decay: float | None = None, last: int = 4, **about: Any) -> Path:
    """A loop without training: a measurement at its ends, and a line for each update."""
    model = build("gpt2")
    groups = decay_groups(model, default=0.1, attention=decay) if decay is not None else None
    if groups is not None:
        groups.attach(torch.optim.AdamW(groups, lr=0.02))
    probe = RankProbe(model, run, every=4, log_every=1, decay=groups, **about)
    probe.begin()
    for step in range(1, last + 1):
        probe.step(step, loss=1.0, learning_rate=0.01 * step)
    probe.close()
    return run


def subsets() -> Iterator[tuple[str, ...]]:
    """Each key alone, each one missing, all and none."""
    for size in (0, 1, len(GIVEN) - 1, len(GIVEN)):
        yield from itertools.combinations(GIVEN, size)


@pytest.mark.parametrize("names", list(subsets()), ids=lambda names: "+".join(names) or "none")
def test_a_recipe_has_what_is_known_and_nothing_else(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    run = write_loop(tmp_path / "run", **{name: GIVEN[name][1] for name in names})
    written = flat(yaml.safe_load((run / "config.yaml").read_text()))
    wanted = {GIVEN[name][0]: GIVEN[name][1] for name in names} | {"train.steps": 4}
    own = {key: value for key, value in written.items() if not key.startswith(ALWAYS)}
    assert own == {key: value for key, value in wanted.items() if not key.startswith(ALWAYS)}
    assert written.items() >= wanted.items()
    assert flat(load_loop(run).recipe) == written  # what `load_run` of Python says
    data = load_run(run)
    for key in flat(Config().model_dump(mode="json")):
        assert data.value_at(key) == written.get(key, NOT_RECORDED), key
    view = view_of(run)
    view.look()
    assert view.is_finished and "4/4" in view.line()


def test_a_report_says_what_is_not_recorded(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    write_loop(runs / "told", 0.5, seed=7, learning_rate=0.02, global_batch=2)
    write_loop(runs / "untold", 0.5, seed=7)
    write_loop(runs / "seedless", 0.75, learning_rate=0.02, global_batch=2)
    study = load_study([runs])
    names = {run.path.name: one.name for one in study.conditions for run in one.runs}
    assert names == {
        "told": "attention = 0.5",
        "untold": "attention = 0.5, global_batch and learning_rate not recorded",
        "seedless": "attention = 0.75",
    }
    tables = [table.raw for table in tables_of(study)]
    text = json.dumps([about(study), findings(study), unpaired(study), tables])
    assert "number of tokens not recorded" in text and "seedless: its seed is not recorded" in text
    for default in ("0.0006", "1000", "1234"):  # of learning_rate, train.steps and seed
        assert default not in text, default


def test_a_loop_beside_a_run_of_this_program(tmp_path: Path) -> None:
    """Only keys that both know tell them apart; the others are not differences."""
    runs = tmp_path / "runs"
    rng = np.random.default_rng(0)
    values = recipe(model=build_shape(), optimizer__weight_decay={"default": 0.1, "attention": 0.5})
    write_run(runs / "own", values, rng, identity={"data": "d", "tokenizer": "t"})
    write_loop(runs / "loop", 0.5, seed=1)
    study = load_study([runs])
    assert sorted(one.name for one in study.conditions) == ["steps = 4, another loop", "steps = 40"]
    write_loop(runs / "rate", 0.5, seed=1, learning_rate=0.02)
    names = {run.path.name: one.name for one in load_study([runs]).conditions for run in one.runs}
    assert names["loop"] == "steps = 4, learning_rate not recorded, another loop"
    assert varying([load_run(runs / "own"), load_run(runs / "loop")], ["seed"]) == ["seed"]


def build_shape() -> dict[str, Any]:
    """The shape of `build("gpt2")`, as a probe records it."""
    tree: dict[str, Any] = parse_config({}).model_dump(mode="json")
    from models.live import config_of, live_towers
    from pretrain.api.families import described

    model = build("gpt2")
    shape = live_towers(model, described(None, model))[0].shape
    known = loop_recipe(shape, config_of(model), None, parse_config({}).ranks, {})
    return {**tree["model"], **known["model"]}


@pytest.mark.parametrize(
    ("optimizer", "form"), [("AdamW", "decoupled"), ("Adam", "l2"), ("SGD", "l2")]
)
def test_only_what_a_loop_can_have_is_written(optimizer: str, form: str, tmp_path: Path) -> None:
    """No key of a form that it cannot have, and L2 where decay is that."""
    model = build("gpt2")
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1, weight_decay=0.1)
    RankProbe(model, tmp_path / "run", decay=made).close()
    written = flat(yaml.safe_load((tmp_path / "run/config.yaml").read_text()))
    assert not [key for key in written if "nuclear_every" in key or "adadecay" in key]
    assert written["optimizer.weight_decay.form"] == form


def test_positions_are_written_where_they_are_known() -> None:
    for heads_turn, kind, wanted in (
        (0, "gpt2", "learned"), (0, "bloom", None), (0, "", None), (8, "llama", "rotary"),
        (8, "", "rotary"),
    ):  # fmt: skip
        shape = AttentionShape(2, 4, 4, 8, 32, heads_turn, False)
        known = loop_recipe(shape, {"model_type": kind}, None, Config().ranks, {})
        assert known["model"].get("position") == wanted


def test_two_loops_of_one_recipe_need_a_seed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_loop(tmp_path / f"runs/{name}", 0.5)
    with pytest.raises(UsageError, match="no seed is recorded; give seed="):
        load_study([tmp_path / "runs"])


def test_a_loop_that_is_not_closed_has_no_number_of_steps(tmp_path: Path) -> None:
    probe = RankProbe(build("gpt2"), tmp_path / "run", every=1, log_every=1)
    probe.begin()
    probe.step(1, loss=1.0)
    build("gpt2").save_pretrained(tmp_path / "run")
    data = load_run(tmp_path / "run")
    assert not data.is_finished and "not recorded yet" in data.why_unfinished
    assert [weights.step for weights in find_weights(str(tmp_path / "run"))] == [0]
    view = view_of(tmp_path / "run")
    view.look()
    assert "1/?" in view.line()
    probe.close()
    assert load_run(tmp_path / "run").is_finished


def test_the_applied_decay_is_weighted_by_the_rates_that_were_logged(tmp_path: Path) -> None:
    model = build("gpt2")
    groups = decay_groups(model, default=0.1, attention=0.5)
    optimizer = groups.attach(torch.optim.AdamW(groups, lr=1.0))
    probe = RankProbe(model, tmp_path / "run", every=1, log_every=1, decay=optimizer)
    probe.begin()
    rates, decays = (0.3, 0.2, 0.1), (0.5, 0.1, 0.9)
    for step, (rate, decay) in enumerate(zip(rates, decays, strict=True), 1):
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = rate, decay
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad():
            probe._decay._count()  # type: ignore[union-attr]  # what the hook of a step does
        probe.step(step, loss=1.0, learning_rate=rate)
    probe.close()
    taken = sum(rate * decay for rate, decay in zip(rates, decays, strict=True))
    data = load_run(tmp_path / "run")
    assert data.exposure == pytest.approx(taken)
    assert data.decay == pytest.approx(taken / sum(rates))


def test_a_folder_of_an_earlier_version(tmp_path: Path) -> None:
    """It has every key, most of them with a default; its record has what the loop gave."""
    run = write_loop(tmp_path / "old", 0.5, seed=3, learning_rate=0.02)
    config = parse_config(yaml.safe_load((run / "config.yaml").read_text()))
    (run / "config.yaml").write_text(dump_config(config))
    assert json.loads((run / "loop.json").read_text())["learning_rate"] == 0.02
    data = load_run(run)
    assert data.records("seed", "optimizer.learning_rate", "train.steps", "model.num_layers")
    assert data.records("optimizer.weight_decay.attention", "ranks.threshold")
    for key in ("train.global_batch", "optimizer.schedule.kind", "precision", "data.path"):
        assert data.value_at(key) == NOT_RECORDED
    assert data.is_finished
