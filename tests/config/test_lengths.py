"""Shares and steps: what cannot be told apart is refused, what a run does not have is said."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pretrain.checkpoint.reader import list_checkpoints, step_of
from pretrain.config.recipe import Config, apply_overrides, dump_config, load_config, parse_config
from pretrain.config.schedule import decay_multiplier
from pretrain.decay.lengths import check_lengths, remarks
from pretrain.errors import UsageError
from pretrain.runs.metrics import read_metrics
from pretrain.training import periodic
from pretrain.training.state import Moving
from tests.tools import base_recipe, run, write_recipe

LENGTHS = [0, 0.0, 0.001, 0.01, 0.2, 0.5, 0.97, 0.999, 1, 1.0, 1.5, 2, 3, 7, 30, 59, 60, 61, 1000]
POLICY = "optimizer.weight_decay.policies"


def drawn(seed: int) -> Config:
    """A recipe whose lengths may fit or not."""
    rng = random.Random(seed)
    policy = {
        "kind": "schedule",
        "roles": ["attention"],
        "shape": rng.choice(["linear", "cosine", "step", "warmup", "window"]),
        "start": rng.choice([0, 0, *LENGTHS]),
        "stop": rng.choice([None, *LENGTHS]),
        "first": 2.0,
        "last": 0.5,
    }
    schedule = {
        "kind": rng.choice(["cosine", "linear", "constant", "wsd"]),
        "warmup": rng.choice([0, 0.1, 5, *LENGTHS]),
        "decay": rng.choice([0.2, 10, *LENGTHS]),
    }
    return parse_config(
        {
            "train": {"steps": rng.choice([1, 2, 3, 6, 60, 61, 300])},
            "optimizer": {"schedule": schedule, "weight_decay": {"policies": [policy]}},
        }
    )


def faults_of(config: Config) -> list[str]:
    """Keys whose phases, step by step, are not those that were asked for."""
    found = []
    steps, schedule = config.train.steps, config.optimizer.schedule
    peak = config.optimizer.learning_rate
    rates = [config.learning_rate(step) for step in range(steps)]
    falls = schedule.kind != "constant"
    if max(rates) < peak or (falls and rates[-1] > schedule.final_fraction * peak * (1 + 1e-9)):
        found.append("optimizer.schedule")
    one: Any
    (one,) = config.optimizer.weight_decay.policies
    values = [
        decay_multiplier(step, steps, one.shape, one.start, one.stop, one.first, one.last)
        for step in range(steps)
    ]
    if len(set(values)) == 1:
        found.append(POLICY)
    ramp = one.shape in ("linear", "cosine", "warmup")
    low, high = (0.0, one.first) if one.shape == "warmup" else (one.last, one.first)
    if ramp and steps > 2 and not any(low < value < high for value in values):
        found.append(POLICY)
    return found


@pytest.mark.parametrize("part", range(4))
def test_what_a_run_does_not_have_is_said(part: int) -> None:
    """Over random lengths: a phase that the updates do not show is refused or said by its key."""
    quiet = faulty = 0
    for seed in range(500 * part, 500 * (part + 1)):
        config = drawn(seed)
        faults = faults_of(config)
        try:
            check_lengths(config)
        except UsageError as error:
            assert "\n" not in str(error)
            continue
        said = remarks(config)
        assert all("\n" not in one for one in said)
        for key in faults:
            assert any(one.startswith(key) for one in said), (key, said, config.optimizer)
        faulty += bool(faults)
        quiet += not said
    assert faulty > 30 and quiet > 30


def test_a_usual_recipe_is_quiet() -> None:
    for file in Path("configs").rglob("*.yaml"):
        values = yaml.safe_load(file.read_text())
        if "recipe" not in values and "model" in values:
            config = load_config(file)
            check_lengths(config)
            assert not remarks(config), file


KEYS = [
    "optimizer.schedule.warmup", "optimizer.schedule.decay", f"{POLICY}[0].start",
    f"{POLICY}[0].stop",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", ["1", "1.0", "0.999", "2.0", "2.5", "1e0"])
def test_one_may_be_a_share_or_a_step(key: str, value: str, tmp_path: Path) -> None:
    """1 is a step, 1.0 is refused with the mend; what is written to a run folder says the same."""
    word = f"{key}={value}"
    if key.startswith(POLICY):
        leaf = key.rpartition(".")[2]
        word = f"{POLICY}=[{{kind: schedule, roles: [mlp], shape: window, {leaf}: {value}}}]"
    config = parse_config({"train": {"steps": 40}, "optimizer": {"schedule": {"kind": "wsd"}}})
    config = apply_overrides(config, [word])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    again = load_config(tmp_path / "config.yaml")  # also of earlier versions: never refused here
    assert again == config
    for one in (config, again):
        if value in ("1", "0.999", "2.0"):
            check_lengths(one)
            continue
        wanted = "is not a share" if value == "2.5" else "write 1 for one step, 40 for all steps"
        with pytest.raises(UsageError, match=wanted) as error:
            check_lengths(one)
        assert str(error.value).startswith(f"{key}: ")


@pytest.mark.parametrize(("start", "stop"), [(0.5, 0.5), (0.6, 0.5), (9, 8), (0.5, 3), (0, 0)])
def test_a_stop_before_its_start(start: float, stop: float) -> None:
    policy = {"kind": "schedule", "roles": ["mlp"], "start": start, "stop": stop}
    values = {"train": {"steps": 40}, "optimizer": {"weight_decay": {"policies": [policy]}}}
    with pytest.raises(UsageError, match=r"policies\[0\]\.stop: .* is not after start"):
        check_lengths(parse_config(values))


def test_it_is_said_at_the_start_and_in_the_dry_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path / "r.yaml", base_recipe(data)))
    word = "optimizer.schedule.warmup=1000"
    wanted = (
        "optimizer.schedule.warmup: 1,000 steps in a run of 6: the learning rate ends at 0.599 %"
    )
    assert run(monkeypatch, "train", recipe, word, "--dry-run") == 0
    assert wanted in " ".join(capfd.readouterr().out.split())
    assert run(monkeypatch, "train", recipe, word, "--dry-run", "--json") == 0
    assert json.loads(capfd.readouterr().out)["remarks"][0].startswith(wanted)
    words = ["train", recipe, word, "--out", str(tmp_path / "run"), "evaluation.at_end=none"]
    assert run(monkeypatch, *words) == 0
    assert wanted in capfd.readouterr().err
    policy = "[{kind: schedule, roles: [mlp], stop: 1.0}]"
    words = ["train", recipe, f"{POLICY}={policy}", "--out", str(tmp_path / "other")]
    assert run(monkeypatch, *words) == 2
    assert f"{POLICY}[0].stop: 1.0 could be one step" in capfd.readouterr().err
    assert not (tmp_path / "other").exists()


def test_best_of_what_is_saved_and_evaluated() -> None:
    """`keep_best` wants an evaluation of every checkpoint, as it compares their losses."""
    for seed in range(200):
        rng = random.Random(seed)
        saves, evaluations = rng.choice([0, *range(1, 13)]), rng.choice([0, *range(1, 13)])
        values = {
            "train": {"steps": rng.randint(1, 200)},
            "checkpoint": {"every": saves, "keep_best": True, "keep": rng.choice([0, 1, 3])},
            "evaluation": {"every": evaluations},
        }
        config = parse_config(values)
        every = [config.interval(name) for name in ("checkpoint", "evaluation")]
        evaluated = set(range(0, 2000, every[1]))
        misses = any(step not in evaluated for step in range(0, 2000, every[0]))
        if not (misses and config.checkpoint.keep):
            check_lengths(config)
            continue
        with pytest.raises(UsageError, match=rf"checkpoint\.every: {every[0]} .* {every[1]}") as e:
            check_lengths(config)
        advice = int(str(e.value).split("; use ")[1].split(",")[0])
        values["checkpoint"]["every"] = advice
        check_lengths(parse_config(values))


class Scripted:
    """Held-out losses by step, and evaluations that a signal cuts short."""

    def __init__(self, losses: dict[int, float], cut: list[int]) -> None:
        self.losses, self.cut = losses, list(cut)

    def __call__(self, job: Any, chosen: Any, step: int, show: Any = None) -> dict[str, Any]:
        if step in self.cut:
            self.cut.remove(step)
            raise periodic._CutShortError
        return {"overall": {"loss": self.losses[step]}}


@pytest.mark.parametrize("seed", range(2))
def test_the_best_is_kept(
    data: Path,
    tmp_path: Path,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With any losses, evaluations cut short, and in a fork: the least loss of a checkpoint."""
    rng = random.Random(seed)
    recipe = deepcopy(base_recipe(data))
    recipe["train"]["steps"] = 12
    recipe["checkpoint"] = {"every": 2, "keep": 1, "keep_best": True}
    recipe["evaluation"] |= {"every": 1, "at_end": "none"}
    path = str(write_recipe(tmp_path / "r.yaml", recipe))
    losses = {step: 5 + rng.random() for step in range(13)}
    best = rng.choice([2, 4, 6])
    losses[best] = 1.0
    losses[best + 1] = 0.5  # of no checkpoint
    monkeypatch.setattr(periodic, "_figures", Scripted(losses, [best] if seed else []))
    words = ["train", path, "--out", str(tmp_path / "run")]
    codes = [run(monkeypatch, *words)]
    if seed:
        assert codes == [75], capfd.readouterr().err
        codes.append(run(monkeypatch, *words))
    assert codes[-1] == 0, capfd.readouterr().err
    kept = [step_of(one) for one in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == [best, 12]
    rows = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "run", "evaluation")}
    assert rows == losses
    fork = ["--fork", f"{tmp_path}/run@{best}", "--out", str(tmp_path / "fork")]
    assert run(monkeypatch, "train", path, *fork) == 0, capfd.readouterr().err
    kept = [step_of(one) for one in list_checkpoints(tmp_path / "fork" / "checkpoints")]
    assert kept == [best, 12]


def test_a_loss_from_before_a_jump_is_not_remembered(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation that is cut short leaves no loss of the same step, evaluated earlier."""
    monkeypatch.setattr(periodic, "_figures", Scripted({6: 9.0}, [6]))
    moving = Moving(jumped=[], held_out_loss=(6, 1.0))
    training: Any = SimpleNamespace(samples=SimpleNamespace(held_out=None), moving=moving)
    assert not periodic.evaluate(training, 6)
    assert moving.held_out_loss[0] != 6 and moving.owes_evaluation


def test_lengths_that_a_run_has_are_not_asked_about_again() -> None:
    """An earlier version took them; its finished runs and sweeps can still be started again."""
    drawn = parse_config({"optimizer": {"schedule": {"warmup": 1.0}}})
    with pytest.raises(UsageError, match="one step or the whole run"):
        check_lengths(drawn)
    check_lengths(drawn, drawn)
    other = apply_overrides(drawn, ["train.steps=77"])
    with pytest.raises(UsageError, match="one step or the whole run"):
        check_lengths(other, drawn)


@pytest.mark.parametrize("steps", [7, 20, 100, 1000])
@pytest.mark.parametrize("evaluations", [0, 1, 3, 100])
def test_the_default_interval_fits_the_choice_of_the_best(steps: int, evaluations: int) -> None:
    keys = {"keep_best": True, "keep": 2}
    config = parse_config(
        {"train": {"steps": steps}, "checkpoint": keys, "evaluation": {"every": evaluations}}
    )
    check_lengths(config)
    assert config.interval("checkpoint") % config.interval("evaluation") == 0


def test_remarks_are_said_by_every_verb_that_reads_a_recipe(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Once, and for how many runs of a sweep."""
    values = base_recipe(data)
    values["optimizer"]["schedule"] = {"warmup": 7}
    recipe = str(write_recipe(tmp_path / "recipe.yaml", values))
    (line,) = remarks(load_config(Path(recipe)))
    sweep = {"recipe": "recipe.yaml", "grid": {"optimizer.learning_rate": [0.1, 0.2]}, "seeds": [1]}
    path = str(write_recipe(tmp_path / "sweep.yaml", sweep))
    out = ["--out", str(tmp_path / "out")]
    for words, more in (
        (["plan", recipe, "model.vocabulary_size=400"], ""),
        (["launch", recipe, "--on", "local", "--print", *out], ""),
        (["sweep", path, "--dry-run", "--no-timing", *out], " (2 runs)"),
        (["train", recipe, "train.steps=6", *out], ""),
    ):
        assert run(monkeypatch, *words) == 0
        said = capfd.readouterr().err
        assert said.count(line) == 1 and f"warning: {line}{more}\n" in said, words
