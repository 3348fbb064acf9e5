"""Mistakes, damage and full disks: one line that names the culprit and the mend."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.prepare import train_from_sources
from pretrain.checkpoint.reader import list_checkpoints
from pretrain.config.recipe import load_config
from tests.tools import (
    assert_one_line,
    base_recipe,
    metrics_of,
    pretrain,
    run,
    write_recipe,
)

# --- mistakes -------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]

RECIPE_MISTAKES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a misspelt section": (lambda r: r.update(optimiser={}), ("optimiser", "optimizer")),
    "a misspelt key": (
        lambda r: r["optimizer"].update(learning_rat=1),
        ("learning_rat", "did you mean learning_rate"),
    ),
    "a misspelt role": (
        lambda r: r["optimizer"]["weight_decay"].update(atention=1),
        ("atention", "did you mean attention"),
    ),
    "a wrong type": (lambda r: r["train"].update(steps="many"), ("train.steps", "'many'")),
    "a policy that is none": (
        lambda r: r["optimizer"]["weight_decay"].update(policies=[{"kind": "alfa"}]),
        ("policies[0]", "alpha"),
    ),
    "a misspelt key of a policy": (
        lambda r: r["optimizer"]["weight_decay"].update(
            policies=[{"kind": "rank_target", "target": 0.5, "untill": 0.3}]
        ),
        ("untill", "did you mean until"),
    ),
    "a policy for roles that are not there": (
        lambda r: r["optimizer"]["weight_decay"].update(
            policies=[{"kind": "schedule", "roles": ["mlp_gate"]}]
        ),
        ("policies[0].roles", "mlp_gate"),
    ),
    "two adaptive policies for one role": (
        lambda r: r["optimizer"]["weight_decay"].update(
            policies=[{"kind": "awd"}, {"kind": "rank_target", "target": 0.5}]
        ),
        ("policies", "keep one"),
    ),
    "a rank target for half a product": (
        lambda r: r["optimizer"]["weight_decay"].update(
            policies=[{"kind": "rank_target", "target": 0.5, "roles": ["query"]}]
        ),
        ("rank_target", "write qk"),
    ),
    "a nuclear norm of one factor": (
        lambda r: r["optimizer"]["weight_decay"].update(form={"key": "nuclear"}),
        ("form", "query and key"),
    ),
    "a nuclear norm of what is no product": (
        lambda r: r["optimizer"]["weight_decay"].update(form="nuclear"),
        ("nuclear", "{attention: nuclear}"),
    ),
    "a large decay in every step": (
        lambda r: r["optimizer"]["weight_decay"].update(coupling="none"),
        ("coupling", "1e-4"),
    ),
    "matrices too small for AlphaDecay": (
        lambda r: r["optimizer"]["weight_decay"].update(policies=[{"kind": "alpha"}]),
        ("min_eigenvalues", "lower it"),
    ),
    "a negative decay": (
        lambda r: r["optimizer"]["weight_decay"].update(mlp=-0.1),
        ("weight_decay.mlp", "-0.1"),
    ),
    "an unknown dialect": (lambda r: r["model"].update(dialect="bert"), ("model.dialect", "bert")),
    "heads that do not divide": (
        lambda r: r["model"].update(num_attention_heads=5),
        ("num_attention_heads", "5", "32"),
    ),
    "key heads that do not divide": (
        lambda r: r["model"].update(num_key_value_heads=3),
        ("num_key_value_heads", "3"),
    ),
    "more stages than layers": (
        lambda r: r.update(grid={"pipeline_parallel": 3}),
        ("pipeline_parallel", "num_layers"),
    ),
    "ZeRO 2 with a pipeline": (
        lambda r: r.update(grid={"pipeline_parallel": 2, "zero_stage": 2}),
        ("zero_stage", "0 or 1"),
    ),
    "a grid larger than the processes": (
        lambda r: r.update(grid={"tensor_parallel": 2}),
        ("tensor_parallel", "torchrun"),
    ),
    "bf16 without ZeRO in DeepSpeed": (
        lambda r: r.update(precision="bf16", grid={"zero_stage": 0}, speed={"update": "deepspeed"}),
        ("zero_stage", "1"),
    ),
    "flat buffers under ZeRO 2": (
        lambda r: r.update(grid={"zero_stage": 2}, speed={"update": "flat"}),
        ("speed.update", "zero_stage 2", "auto"),
    ),
    "flat buffers with a key of DeepSpeed": (
        lambda r: r.update(
            speed={"update": "flat"}, deepspeed={"zero_optimization": {"overlap_comm": False}}
        ),
        ("speed.update", "deepspeed", "auto"),
    ),
    "bf16 without masters": (lambda r: r.update(precision="bf16-true"), ("master", "bf16")),
    "bf16 without masters, raw": (
        lambda r: r.update(deepspeed={"bf16": {"bf16_master_weights_and_grads": True}}),
        ("bf16_master_weights_and_grads", "remove"),
    ),
    "a raw key that contradicts": (
        lambda r: r.update(deepspeed={"gradient_clipping": 7.0}),
        ("gradient_clipping", "contradicts"),
    ),
    "a raw optimizer": (
        lambda r: r.update(deepspeed={"optimizer": {"type": "Adam"}}),
        ("deepspeed.optimizer", "remove"),
    ),
    "a micro batch that does not divide": (
        lambda r: r["train"].update(micro_batch=3),
        ("train.micro_batch", "8"),
    ),
    "a rule for layers that are not there": (
        lambda r: r["optimizer"]["weight_decay"].update(
            rules=[{"roles": ["query"], "layers": "7", "decay": 1}]
        ),
        ("rules[0]", "has layer 7"),
    ),
    "a role that the model lacks": (
        lambda r: r["optimizer"]["weight_decay"].update(mlp_gate=0.1),
        ("weight_decay.mlp_gate", "remove"),
    ),
    "no data": (lambda r: r["data"].update(path="/nowhere"), ("/nowhere", "pretrain data")),
    "data not named": (lambda r: r["data"].update(path=""), ("data.path",)),
    "a weight for a missing subset": (
        lambda r: r["data"].update(weights={"Books3": 1.0}),
        ("Books3",),
    ),
    "a vocabulary smaller than the data's": (
        lambda r: r["model"].update(vocabulary_size=100),
        ("vocabulary_size", "100", "400"),
    ),
    "an unknown split": (
        lambda r: r["evaluation"].update(split="dev"),
        ("dev", "val"),
    ),
    "a context longer than the data": (
        lambda r: r["model"].update(context=100_000),
        ("context", "100000"),
    ),
}


@pytest.mark.parametrize("mistake", RECIPE_MISTAKES)
def test_recipe_mistakes(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mistake: str,
) -> None:
    change, culprits = RECIPE_MISTAKES[mistake]
    values = deepcopy(base_recipe(data))
    change(values)
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    code = run(monkeypatch, "train", str(recipe), "--out", str(tmp_path / "run"))
    assert_one_line(capsys.readouterr().err, culprits)
    assert code in (1, 2)
    assert not list(tmp_path.rglob("*.safetensors"))


COMMAND_MISTAKES: dict[str, tuple[list[str], int, tuple[str, ...]]] = {
    "an unknown verb": (["trian"], 2, ("trian",)),
    "no recipe": (["train"], 2, ("recipe",)),
    "a missing recipe": (["train", "no.yaml"], 2, ("no.yaml",)),
    "a recipe that is no YAML": (["train", "{tmp}/broken.yaml"], 2, ("broken.yaml:3",)),
    "a recipe that is a list": (["train", "{tmp}/list.yaml"], 2, ("list.yaml", "mapping")),
    "an override without a value": (["train", "{tmp}/ok.yaml", "seed"], 2, ("'seed'",)),
    "an override into a value": (["train", "{tmp}/ok.yaml", "seed.x=1"], 2, ("seed",)),
    "a fork from nowhere": (["train", "{tmp}/ok.yaml", "--fork", "x@1"], 2, ("x", "checkpoint")),
    "a fork from a missing step": (
        ["train", "{tmp}/ok.yaml", "--fork", "{run}@5"],
        2,
        ("@5", "3, 6"),
    ),
    "a folder in use by something else": (
        ["train", "{tmp}/ok.yaml", "--out", "{tmp}"],
        2,
        ("not a run folder", "--out"),
    ),
    "another recipe in the folder": (
        ["train", "{tmp}/ok.yaml", "model.num_layers=1", "--out", "{run}"],
        2,
        ("model.num_layers=2", "choose another --out"),
    ),
    "other keys in the folder": (
        [
            "train",
            "{tmp}/ok.yaml",
            "seed=9",
            "optimizer.weight_decay.attention=9",
            "--out",
            "{run}",
        ],
        2,
        ("seed=7", "9 (different too: optimizer.weight_decay.attention)"),
    ),
    "another schedule in the folder": (
        ["train", "{tmp}/ok.yaml", "optimizer.schedule.kind=linear", "--out", "{run}"],
        2,
        ("optimizer.schedule.kind=cosine", "@6 and train.steps above 6"),
    ),
    "a fork with nothing left to train": (
        ["train", "{tmp}/ok.yaml", "--fork", "{run}@6", "--out", "{tmp}/n"],
        2,
        ("train.steps: 6", "@6, whose checkpoint has step 6"),
    ),
    "a fork into another model": (
        ["train", "{tmp}/ok.yaml", "model.num_layers=1", "--fork", "{run}@6", "--out", "{tmp}/f"],
        2,
        ("num_layers=2", "checkpoint"),
    ),
    "a fork into other samples": (
        ["train", "{tmp}/ok.yaml", "seed=9", "--fork", "{run}@6", "--out", "{tmp}/s"],
        2,
        ("seed: 9", "7"),
    ),
    "a fork into the past": (
        ["train", "{tmp}/ok.yaml", "train.steps=5", "--fork", "{run}@6", "--out", "{tmp}/p"],
        2,
        ("train.steps: 5",),
    ),
    "data of another tokenizer": (
        ["evaluate", "{run}", "--data", "{other}"],
        2,
        ("another tokenizer",),
    ),
    "training data of another vocabulary": (
        ["train", "{tmp}/ok.yaml", "data.path={other}", "--fork", "{run}@6", "--out", "{tmp}/g"],
        2,
        ("checkpoint", "data"),
    ),
    "nothing to evaluate": (["evaluate", "{tmp}"], 2, ("no checkpoint",)),
    "a sweep evaluated": (
        ["evaluate", "{tmp}/many"],
        2,
        ("many: is a sweep", "such as ", "many/attention=1"),
    ),
    "all steps of a sweep": (["evaluate", "{tmp}/many@*"], 2, ("many: is a sweep",)),
    "a sweep exported": (["export", "{tmp}/many", "--out", "{tmp}/o"], 2, ("is a sweep",)),
    "a loop evaluated": (
        ["evaluate", "{tmp}/loop"],
        2,
        ("loop: is a run of another loop", "no checkpoints of this"),
    ),
    "a loop exported": (["export", "{tmp}/loop@3", "--out", "{tmp}/o"], 2, ("another loop",)),
    "a sweep trained": (
        ["train", "{tmp}/sweep.yaml", "--dry-run"],
        2,
        ("looks like a sweep, for `pretrain sweep`",),
    ),
    "a recipe swept": (
        ["sweep", "{tmp}/ok.yaml"],
        2,
        ("ok.yaml: recipe: is required", "looks like a recipe, for `pretrain train`"),
    ),
    "a stride beyond the context": (["evaluate", "{run}", "--stride", "99"], 2, ("--stride",)),
    "a report of nothing": (["report", "{tmp}"], 2, ("no run folder",)),
    "a source that is not there": (
        ["data", "tokenize", "{tmp}/no.jsonl", "--tokenizer", "{tok}", "--out", "{tmp}/o"],
        2,
        ("no.jsonl",),
    ),
    "a tokenizer that is none": (
        ["data", "tokenize", "{tmp}/ok.jsonl", "--tokenizer", "{tmp}/ok.yaml", "--out", "{tmp}/o"],
        1,
        ("ok.yaml", "SentencePiece"),
    ),
    "a truncated archive": (
        ["data", "tokenize", "{tmp}/cut.jsonl.zst", "--tokenizer", "{tok}", "--out", "{tmp}/o"],
        1,
        ("cut.jsonl.zst", "truncated"),
    ),
    "a vocabulary that the text cannot fill": (
        ["data", "tokenizer", "{tmp}/ok.jsonl", "--vocab-size", "9999", "--out", "{tmp}/t.model"],
        2,
        ("9999",),
    ),
    "info on no data": (["data", "info", "{tmp}"], 2, ("manifest.json",)),
}


@pytest.mark.parametrize("mistake", COMMAND_MISTAKES)
def test_command_mistakes(
    mistake: str,
    data: Path,
    corpus: Path,
    tokenizer: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, code, culprits = COMMAND_MISTAKES[mistake]
    write_recipe(tmp_path / "ok.yaml", base_recipe(data))
    (tmp_path / "broken.yaml").write_text("a: 1\nb: [1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "sweep.yaml").write_text("recipe: ok.yaml\ngrid: {seed: [1, 2]}\n")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/loop.json").write_text("{}")
    (tmp_path / "many/attention=1/checkpoints").mkdir(parents=True)
    (tmp_path / "many/sweep.json").write_text('{"runs": {}}')
    (tmp_path / "ok.jsonl").write_text('{"text": "Hi.", "meta": {"pile_set_name": "A"}}\n')
    whole = (corpus / "train.jsonl.zst").read_bytes()
    (tmp_path / "cut.jsonl.zst").write_bytes(whole[: len(whole) // 2])
    other = tmp_path / "other"
    if any("{other}" in word for word in words):
        train_from_sources([str(corpus)], tmp_path / "x.model", 380, "bpe")
        tokens = ["--tokenizer", str(tmp_path / "x.model"), "--out", str(other)]
        assert run(monkeypatch, "data", "tokenize", str(corpus), *tokens, "--workers", "1") == 0
        capsys.readouterr()
    before = tree_of(trained)
    names = {"tmp": tmp_path, "run": trained, "tok": tokenizer, "other": other}
    filled = [word.format(**names) for word in words]
    assert run(monkeypatch, *filled) == code
    assert_one_line(capsys.readouterr().err, culprits)
    assert tree_of(trained) == before


def tree_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may damage."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damaged_checkpoints_are_named(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    newest = list_checkpoints(copy / "checkpoints")[-1]
    file = newest / ("manifest.json" if damage == "manifest" else "rank-00000.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    assert run(monkeypatch, "evaluate", str(copy)) == 1
    assert_one_line(capsys.readouterr().err, (str(file),))


@pytest.mark.parametrize("end", [".idx", ".bin", ".docs.npy"])
def test_damaged_data_is_named(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: str,
) -> None:
    shutil.copytree(data, tmp_path / "data")
    file = next((tmp_path / "data" / ("val" if "docs" in end else "train")).glob(f"*{end}"))
    file.write_bytes(file.read_bytes()[:-4])
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(tmp_path / "data"))
    assert run(monkeypatch, "train", str(recipe), "--out", str(tmp_path / "run")) == 1
    assert_one_line(capsys.readouterr().err, (str(file), "tokenise again"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_one_rank_fails_and_all_say_it_once(data: Path, tmp_path: Path) -> None:
    """On two processes a mistake still ends quickly, in one line of ours."""
    values = base_recipe(data)
    values["grid"] = {"tensor_parallel": 2}
    values["model"]["num_attention_heads"] = 1
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    done = pretrain("train", str(recipe), "--out", str(tmp_path / "run"), processes=2, timeout=60)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "num_attention_heads" in errors[0], done.stderr
    assert "Traceback" not in done.stderr.split("error: ")[0]


def test_truncated_metrics_line_is_survived(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    recipe = str(copy.parent / "recipe.yaml")
    write_recipe(Path(recipe), base_recipe(Path(load_config(copy / "config.yaml").data.path)))
    assert run(monkeypatch, "train", recipe, "--out", str(copy)) == 0
    assert [r["step"] for r in metrics_of(copy) if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
