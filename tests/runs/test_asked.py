"""A finished thing is finished for the recipe that finished it, and a fork is of one checkpoint.

Every key of a recipe is changed in turn: a finished run, or a finished sweep, refuses the change
with both values, or the key is declared as one that may change, or the run does what is owed.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import torch
import yaml
from pydantic import BaseModel

from models.gpt import whole_model
from pretrain.config.compare import as_written, differences
from pretrain.config.recipe import Config, dump_config, load_config, value_at, with_values
from pretrain.decay.plan import plan_decay
from pretrain.errors import UsageError
from pretrain.runs import finished
from pretrain.runs.finished import is_complete, is_free
from pretrain.runs.folder import CONFIG, ENVIRONMENT, FREE
from pretrain.sweep.check import check_runs
from pretrain.sweep.config import load_sweep
from tests.tools import ATTENTION, base_recipe, run, write_recipe, write_sweep

SPECIAL: dict[str, list[Any]] = {
    "profile.steps": ["2-3"],
    "data.weights": [{"Github": 1.0}, "pile"],
    "deepspeed": [{"zero_optimization": {"reduce_bucket_size": 1000}}],
    "optimizer.weight_decay.rules": [[{"roles": ["mlp_in"], "decay": 0.9}]],
    "optimizer.weight_decay.policies": [
        [{"kind": "schedule", "roles": ["mlp"], "stop": 0.5, "shape": "window"}],
        [{"kind": "awd", "roles": ["mlp"]}],
    ],
    "optimizer.learning_rate_by": [{"query": 0.5}],
    "optimizer.weight_decay.coupling": ["lr2", {"mlp": "lr2"}],
    "optimizer.weight_decay.form": ["l2", {"attention": "nuclear"}],
    "precision": ["bf16"],  # auto is this, or the run's own fp32, by the processor
    "data.path": [],  # its content is compared: below
}


def keys_of(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a recipe that is no section, with its type."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= keys_of(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = kind
    return found


def candidates(kind: Any, value: Any) -> list[Any]:
    """Values of a type that are not the one that is there."""
    if get_origin(kind) in (UnionType, Union):
        return [one for part in get_args(kind) for one in candidates(part, value)]
    if get_origin(kind) is Literal:
        return [one for one in get_args(kind) if one != value]
    if kind is bool:
        return [not value]
    if kind is int:
        return [one for one in ((value or 0) + 1, 2 * (value or 2), 4, 2, 1, 0) if one != value]
    if kind in (float, str):
        some: tuple[Any, ...] = {float: (0.37, 0.5, 2.0, 50.0), str: ("test", "0", "other")}[kind]
        return [one for one in some if one != value]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [str(one.value) for one in kind if one != value]
    return []


def changes(config: Config) -> list[tuple[str, Any]]:
    """For every key of a recipe, one other value that it may have."""
    found = []
    for key, kind in keys_of(Config).items():
        for value in SPECIAL.get(key, candidates(kind, value_at(config, key))):
            try:
                with_values(config, {key: value}, "test")
            except UsageError:
                continue
            found.append((key, value))
            break
        else:
            assert key in UNCHANGEABLE, key
    return found


UNCHANGEABLE = {
    "data.path", "model.image_size", "model.rotary_factor", "task.kind", "task.own",
    "logging.trackers",
}  # fmt: skip
"""Keys that no value but theirs may have in this recipe."""


def same_decay(before: Config, after: Config) -> bool:
    """Whether every tensor has the same λ, and nothing else moves it."""
    infos = whole_model(before.model)
    plans = [plan_decay(infos, one.optimizer.weight_decay).by_name for one in (before, after)]
    moved = differences(before, after, ("optimizer",))
    dynamic = ("policies", "coupling", "form", "adadecay_slope", "nuclear_every")
    return plans[0] == plans[1] and not any(key.split(".")[2] in dynamic for key in moved)


def may_be_told(before: Config, key: str, value: Any) -> bool:
    """Whether a finished run may be started again with another value of a key."""
    if key.startswith("optimizer.weight_decay."):
        try:
            return same_decay(before, with_values(before, {key: value}, "test"))
        except UsageError:  # a role that the model lacks
            return False
    return key in FREE or is_free(key)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_every_key_is_tried(trained: Path) -> None:
    config = load_config(trained / CONFIG)
    tried = {key for key, _ in changes(config)}
    assert tried | UNCHANGEABLE == set(keys_of(Config)) and len(tried) > 90
    for one in finished.FREE:  # each is a key or a section
        assert any(key == one or key.startswith(f"{one}.") for key in keys_of(Config)), one


@pytest.mark.usefixtures("parsed_once")
@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 3))])
def test_a_key_of_a_finished_run(
    trained: Path,
    tmp_path: Path,
    part: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The command, as a person starts it again; the short form takes a share of the keys."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    config = load_config(folder / CONFIG)
    before = hashes(folder)
    every = [one for one in changes(config) if one[0] != "evaluation.at_end"]
    random.Random(5).shuffle(every)
    for key, value in every[part::4]:
        told = may_be_told(config, key, value)
        words = ["train", str(folder / CONFIG), "--out", str(folder), f"{key}={json.dumps(value)}"]
        code = run(monkeypatch, *words)
        said = capfd.readouterr().err
        if told and "does not divide 1 process(es)" in said:
            assert code == 2 and key.startswith("grid.")
        elif told:
            assert code == 0 and "nothing is left to do" in said, (key, value, said)
        else:
            (line,) = [one for one in said.splitlines() if one.startswith("error: ")]
            assert code == 2, (key, value, said)
            if "weight_decay" not in key:
                assert key.rpartition(".")[2] in line, (key, value, line)
            if "the recipe says" in line:
                old, new, named = value_at(config, key), value, key
                if old == {} and isinstance(new, dict):  # its one entry
                    ((part, new),) = new.items()
                    old, named = None, f"{key}.{part}"
                shown = f"{named}={as_written(old)}, the recipe says {as_written(new)}"
                assert shown in line, (key, value, line)
        assert hashes(folder) == before, (key, value)


@pytest.mark.parametrize(
    ("key", "free"),
    [
        ("checkpoint.mirror", True), ("grid.zero_stage", True), ("logging.every", True),
        ("speed.compile", True), ("evaluation.at_end", True), ("evaluation.batch", True),
        ("faults.watchdog", True), ("resume.decay", True),
        ("checkpoint.every", False), ("ranks.every", False), ("evaluation.every", False),
        ("train.steps", False), ("optimizer.learning_rate", False), ("seed", False),
    ],
)  # fmt: skip
def test_what_may_still_be_changed(key: str, free: bool) -> None:
    assert is_free(key) == free and key in keys_of(Config)


def test_a_sweep_of_an_earlier_version_keeps_its_lengths(data: Path, tmp_path: Path) -> None:
    """What such a version took is not asked about again; other lengths are."""
    values = base_recipe(data)
    values["optimizer"]["schedule"] = {"warmup": 1.0}
    values["model"]["vocabulary_size"] = 400
    write_recipe(tmp_path / "recipe.yaml", values)
    sweep = {"recipe": "recipe.yaml", "grid": {ATTENTION: [0.5]}, "seeds": [7]}
    path = write_recipe(tmp_path / "one.yaml", sweep)
    (task,) = load_sweep(path, tmp_path / "runs").tasks
    task.run.mkdir(parents=True)
    (task.run / CONFIG).write_text(dump_config(task.config))
    check_runs(load_sweep(path, tmp_path / "runs"), torch.device("cpu"))
    write_recipe(path, {**sweep, "set": {"train.steps": 77}})
    with pytest.raises(UsageError, match="one step or the whole run"):
        check_runs(load_sweep(path, tmp_path / "runs"), torch.device("cpu"))


@pytest.mark.usefixtures("parsed_once")
def test_a_key_of_a_finished_sweep(trained: Path, data: Path, tmp_path: Path) -> None:
    """The same before anything of the sweep is written, for all keys."""
    here = torch.device("cpu")
    out = tmp_path / "runs"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(base_recipe(data)))
    values = {"recipe": "recipe.yaml", "grid": {ATTENTION: [0.5]}, "seeds": [7]}
    path = write_recipe(tmp_path / "one.yaml", values)
    shutil.copytree(trained, out / "attention=0.5,seed=7")
    config = load_config(trained / CONFIG)
    check_runs(load_sweep(path, out), here)
    quiet = 0
    for key, value in changes(config):
        if key in ("seed", ATTENTION):
            continue  # another run
        write_recipe(path, {**values, "set": {key: value}})
        sweep = load_sweep(path, out)
        if may_be_told(config, key, value):
            check_runs(sweep, here)
            quiet += 1
            continue
        named = key.rpartition(".")[2]
        with pytest.raises(ValueError, match=rf"^[^\n]*({named}|weight decay)[^\n]*$"):
            check_runs(sweep, here)
    assert quiet > 10


def test_a_finished_sweep_with_another_rate(
    trained: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The command refuses with both values and leaves the folder as it is; so does a dry run."""
    out = tmp_path / "runs"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(base_recipe(data)))
    values = {"recipe": "recipe.yaml", "grid": {ATTENTION: [0.5]}, "seeds": [7]}
    path = write_recipe(tmp_path / "one.yaml", values)
    shutil.copytree(trained, out / "attention=0.5,seed=7")
    assert run(monkeypatch, "sweep", str(path), "--out", str(out)) == 0
    assert "1 of 1 runs complete" in capfd.readouterr().out
    before = hashes(out)
    write_recipe(path, {**values, "set": {"optimizer.learning_rate": 1e-4}})
    for more in ([], ["--dry-run"]):
        assert run(monkeypatch, "sweep", str(path), "--out", str(out), *more) == 2
        said = capfd.readouterr()
        assert "optimizer.learning_rate=0.003, the recipe says 0.0001" in said.err
        assert "complete" not in said.out and hashes(out) == before


def test_a_long_check_of_the_folders_is_seen(
    trained: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(base_recipe(data)))
    values = {"recipe": "recipe.yaml", "grid": {ATTENTION: [0.5]}, "seeds": [7, 8]}
    path = write_recipe(tmp_path / "one.yaml", values)
    shutil.copytree(trained, out / "attention=0.5,seed=7")
    check_runs(load_sweep(path, out), torch.device("cpu"))
    assert "check" not in capfd.readouterr().err
    check_runs(load_sweep(path, out), torch.device("cpu"), silent=-1.0)
    assert "check of the folders 0/2" in capfd.readouterr().err


def test_a_sweep_whose_trunk_ends_elsewhere(trained: Path, data: Path, tmp_path: Path) -> None:
    """An arm remembers the step that it was forked at."""
    path = write_sweep(tmp_path, data, steps=6, seeds=[7], fork={"step": 3}, baseline=None)
    out = tmp_path / "runs"
    sweep = load_sweep(path, out)
    arm = sweep.tasks[-1].run
    shutil.copytree(trained, arm)
    (arm / CONFIG).write_text(yaml.safe_dump(sweep.tasks[-1].config.model_dump(mode="json")))
    starts = json.loads((arm / ENVIRONMENT).read_text())
    starts[0]["forked"] = {"run": "elsewhere", "step": 2}
    (arm / ENVIRONMENT).write_text(json.dumps(starts))
    with pytest.raises(UsageError, match=r"forked at step 2, but the sweep has fork\.step: 3"):
        check_runs(sweep, torch.device("cpu"))


@pytest.mark.usefixtures("parsed_once")
def test_evaluations_that_are_owed(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """`evaluation.at_end` of a finished run may change: what is asked is made, nothing is lost."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    path = folder / "evaluation.json"
    figures = json.loads(path.read_text())
    assert figures.pop("sample") is True
    path.write_text(json.dumps(figures))  # as earlier versions wrote it
    seen = {hashlib.sha256(path.read_bytes()).hexdigest()}
    for wish in ("sample", "none", "all", "all", "sample", "all"):
        words = ["train", str(folder / CONFIG), "--out", str(folder), f"evaluation.at_end={wish}"]
        assert run(monkeypatch, *words) == 0, capfd.readouterr().err
        found = json.loads(path.read_text())
        if wish != "none":
            assert found["split"] == {"sample": "val", "all": "test"}[wish]
            assert found.get("sample", True) is (wish == "sample")
            assert found["overall"]["documents"] == {"sample": 6, "all": 24}[wish]
            config = load_config(folder / CONFIG, [f"evaluation.at_end={wish}"])
            assert is_complete(folder, config)
        there = {
            hashlib.sha256(one.read_bytes()).hexdigest() for one in folder.glob("evaluation*.json")
        }
        assert seen <= there
        seen = there
    assert len(list(folder.glob("evaluation*.json"))) == 4


@pytest.mark.usefixtures("parsed_once")
def test_a_fork_is_of_one_checkpoint(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Every checkpoint for every folder: a fork goes on from the one that it is of, or refuses."""
    trunk, recipe = tmp_path / "trunk", str(trained / CONFIG)
    shutil.copytree(trained, trunk)
    origin: dict[str, str | None] = {"trunk": None, "three": "trunk@3", "six": "trunk@6"}

    def start(out: str, fork: str) -> tuple[int, str]:
        words = ["train", recipe, "--out", str(tmp_path / out), "--fork", f"{tmp_path}/{fork}"]
        # longer, so that each fork has something to train; and no two hold the same
        more = [] if out == "trunk" else [f"{ATTENTION}=2", "train.steps=8"]
        code = run(monkeypatch, *words, *more)
        return code, capfd.readouterr().err

    for out in ("three", "six"):
        code, said = start(out, str(origin[out]))
        assert code == 0, said
    before = hashes(tmp_path)
    for out, began in origin.items():
        for fork in ("trunk@3", "trunk@6", "three@3", "three@6", "six@6"):
            code, said = start(out, fork)
            if began == fork:
                assert code == 0 and "nothing is left to do" in said
                continue
            assert code == 2 and f"/{fork} " in said.replace(",", " ").replace(";", " "), said
            own = fork.startswith(out)
            assert ("itself" if own else f"{began or 'other weights'}, not") in said, said
    shutil.rmtree(tmp_path / "three" / "checkpoints")
    (tmp_path / "three" / "evaluation.json").unlink()

    def logged() -> set[int]:
        lines = (tmp_path / "three" / "metrics.jsonl").read_text().splitlines()
        return {json.loads(line)["step"] for line in lines}

    assert logged() == {4, 5, 6, 7, 8}
    code, said = start("three", "trunk@6")  # nothing is left of the fork that it was
    assert code == 0, said
    assert logged() == {7, 8}
    assert {k: v for k, v in hashes(tmp_path).items() if not k.startswith("three")} == {
        k: v for k, v in before.items() if not k.startswith("three")
    }


def test_the_sample_of_a_run_stays(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Held-out losses of one run are of one sample, also where it is under way."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    for word in ("evaluation.documents=7", "evaluation.split=test"):
        assert run(monkeypatch, "train", str(folder / CONFIG), "--out", str(folder), word) == 2
        key, value = word.split("=")
        said = capfd.readouterr().err
        assert f"{key}=" in said and f"the recipe says {value}" in said


def test_auto_is_said_with_what_it_means(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A refusal names the recipe's own word for the precision, and its meaning here."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    values = yaml.safe_load((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(yaml.safe_dump({**values, "precision": "bf16"}))
    for word, shown in (("auto", "auto, which is fp32 here"), ("fp32", "fp32")):
        words = ["train", str(folder / CONFIG), "--out", str(folder), f"precision={word}"]
        words.append("grid.zero_stage=0")  # auto is then fp32 on every CPU
        assert run(monkeypatch, *words) == 2
        assert f"precision=bf16, the recipe says {shown};" in capfd.readouterr().err
