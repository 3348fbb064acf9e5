"""Recall and images: the samples, the models, and the same numbers on every grid."""

from __future__ import annotations

import json
import pickle
from copy import deepcopy
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.images import ImageSamples, open_images
from data_pipeline.recall import IGNORED, RecallSamples
from models.gpt import GPT
from models.layers import ParameterFactory
from models.loss import Projection, mean_loss
from models.roles import info_of
from pretrain.checkpoint.reader import Checkpoint, list_checkpoints
from pretrain.config.recipe import parse_config
from pretrain.runs.folder import read_ranks
from pretrain.tasks.tasks import open_task
from pretrain.training.loader import Loader
from tests.tools import (
    ROOT,
    base_recipe,
    losses_of,
    run,
    run_workers,
    spectra_of,
    weights_of,
    write_recipe,
)

COMMON = {
    "seed": 3,
    "train": {"steps": 6, "global_batch": 16},
    "precision": "fp32",
    "optimizer": {"learning_rate": 3e-3, "weight_decay": {"default": 0.1, "attention": 1.0}},
    "evaluation": {"every": 3, "documents": 50, "batch": 16, "at_end": "sample"},
    "ranks": {"every": 3, "spectra": True},
    "checkpoint": {"every": 3, "keep": 0},
}
SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
RECIPES = {
    "recall": COMMON
    | {
        "model": {"dialect": "gpt2", "context": 13, "mlp": False, **SMALL},
        "task": {"kind": "recall", "pairs": 6, "symbols": 8},
    },
    "images": COMMON
    | {
        "model": {
            "dialect": "vit",
            "image_size": 8,
            "patch_size": 2,
            "image_channels": 1,
            **SMALL,
        },
        "task": {"kind": "images"},
    },
}


def test_recall_samples() -> None:
    samples = RecallSamples(1, 2000, pairs=20, symbols=32, random_labels=0.05)
    wrong = 0
    for number in range(2000):
        inputs, labels = samples[number]
        assert inputs.shape == labels.shape == (41,)
        keys, values, asked = inputs[:-1:2], inputs[1::2], inputs[-1]
        assert len(set(keys)) == 20 and (keys < 32).all() and (values >= 32).all()
        assert (labels[:-1] == IGNORED).all()
        place = list(keys).index(asked)  # one of the earlier x
        wrong += labels[-1] != values[place]
    assert 0.03 < wrong / 2000 < 0.07  # 5 %, of which one in 32 is right by chance
    again = RecallSamples(1, 2000, 20, 32, 0.05)
    assert (again[700][0] == samples[700][0]).all()
    assert (RecallSamples(2, 2000, 20, 32, 0.05)[700][0] != samples[700][0]).any()


def test_digits_are_whole_and_held_out() -> None:
    train, held = (open_images("digits", "", split) for split in ("train", "test"))
    assert len(train.labels) + len(held.labels) == 1797
    seen = {train.pixels(i).tobytes() for i in range(len(train.labels))}
    assert len(seen.intersection(held.pixels(i).tobytes() for i in range(len(held.labels)))) <= 2
    samples = ImageSamples(train, 8, 2, 1, seed=1, count=5000)
    epoch = [samples._orders(0), samples._orders(1)]
    assert sorted(epoch[0]) == sorted(epoch[1]) == list(range(len(train.labels)))
    assert (epoch[0] != epoch[1]).any()
    patches, label = samples[0]
    image = train.pixels(int(epoch[0][0]))[..., 0] * 2 - 1
    assert patches.shape == (16, 4) and label[0] == train.labels[epoch[0][0]]
    np.testing.assert_allclose(patches[5], image[2:4, 2:4].ravel())  # second row, second patch


def test_folder_of_images(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee", "cat"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(256, size=(40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    values: dict[str, Any] = deepcopy(RECIPES["images"])
    values["model"] |= {"image_size": 16, "patch_size": 8, "image_channels": 3}
    values["task"] = {"kind": "images", "source": "folder", "path": str(tmp_path)}
    for augment in ("none", "crop", "randaugment"):
        values["task"]["augment"] = augment
        config = parse_config(values)
        task = open_task(config)
        assert task.complete(config.model).vocabulary_size == 3
        data = task.training(config)
        one, again = data[4], data[4]
        assert one[0].shape == (4, 192) and (one[0] == again[0]).all()
        assert (data[13][0] == one[0]).all() == (augment == "none" and data[13][1] == one[1] and
            task.training(config)._orders(1)[4] == task.training(config)._orders(0)[4])  # type: ignore[attr-defined]  # fmt: skip
        assert np.abs(one[0]).max() <= 1


def test_workers_change_nothing(tmp_path: Path) -> None:
    config = parse_config(RECIPES["images"])
    data = open_task(config).training(config)

    class Alone:
        data, data_rank, device = 1, 0, torch.device("cpu")

    batches = []
    others = set(active_children())  # of earlier tests
    for workers in (0, 2):
        loader = Loader(data, Alone(), 16, 8, 1, 2, workers)  # type: ignore[arg-type]
        batches.append([next(loader) for _ in range(4)])
        assert len(set(active_children()) - others) == workers
        loader.close()
    assert not set(active_children()) - others
    for (x, y), (other, label) in zip(*batches, strict=True):
        assert torch.equal(x, other) and torch.equal(y, label)


@pytest.mark.parametrize("kind", ["text", "recall", "images"])
def test_samples_can_be_sent_to_workers(kind: str, data: Path) -> None:
    config = parse_config(base_recipe(data) if kind == "text" else RECIPES[kind])
    samples = open_task(config).training(config)
    sent = pickle.loads(pickle.dumps(samples))
    for number in (0, 17):
        for one, other in zip(samples[number], sent[number], strict=True):
            assert (one == other).all()


def test_only_asked_positions_count() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 4, 16, generator=generator)  # [sequence, batch, hidden]
    labels = torch.full((4, 13), IGNORED)
    labels[:, -1] = torch.tensor([3, 1, 15, 0])
    wanted = torch.nn.functional.cross_entropy(hidden[-1], labels[:, -1])
    found = mean_loss(Projection(hidden, torch.eye(16)), labels, partial_labels=True)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_vision_transformer_sees_every_patch_and_no_order_but_positions() -> None:
    config = parse_config(RECIPES["images"]).model.model_copy(update={"vocabulary_size": 10})
    model = GPT(config, ParameterFactory(0))
    patches = torch.randn(2, 16, 4)
    with torch.no_grad():
        base = model(patches)
        assert base.shape == (1, 2, 16)  # classes padded to a multiple of 8
        assert (base[..., 10:] == -torch.inf).all()
        for place in (0, 15):  # no mask: the first sees the last
            other = patches.clone()
            other[:, place] += 1
            assert (model(other)[..., :10] - base[..., :10]).abs().max() > 1e-6
        position = next(p for p in model.parameters() if info_of(p).name == "position.weight")
        position.zero_()
        shuffled = model(patches[:, torch.randperm(16)])
        assert torch.allclose(model(patches)[..., :10], shuffled[..., :10], atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "sigmoid"])
@pytest.mark.parametrize("causal", [True, False])
def test_other_mixing_is_the_textbooks(kind: str, causal: bool) -> None:
    values: dict[str, Any] = deepcopy(RECIPES["recall"])
    values["model"] |= {
        "attention": kind,
        "causal": causal,
        "num_attention_heads": 1,
        "biases": False,
    }
    config = parse_config(values).model.model_copy(update={"vocabulary_size": 16})
    layer: Any = GPT(config, ParameterFactory(0)).layers[2].attention
    x = torch.randn(5, 3, 32)
    found = layer(x)
    q, k, v = (x @ w.mT for w in (layer.query, layer.key, layer.value))
    for t in range(5):
        last = t + 1 if causal else 5
        scores = torch.einsum("bh,sbh->bs", q[t], k[:last]) / 32**0.5
        weights = scores / last if kind == "linear" else torch.sigmoid(scores - np.log(last))
        mixed = torch.einsum("bs,sbh->bh", weights, v[:last]) @ layer.output.mT
        assert torch.allclose(found[t], mixed, atol=1e-5)


GRIDS = {1: [(1, 1, 0), (1, 1, 1)], 2: [(2, 1, 1), (1, 2, 0), (1, 1, 3)], 4: [(2, 2, 1)]}
LONG = {
    ("recall", 2, 1, 1), ("recall", 1, 2, 0), ("images", 1, 1, 3), ("images", 2, 2, 1),
}  # fmt: skip
"""Each task keeps a tensor and a pipeline parallel grid in the short form."""


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[tuple[Any, ...], Path]:
    is_long = request.config.getoption("--long")
    folder = tmp_path_factory.mktemp("tasks")
    found = {}
    for processes, grids in GRIDS.items():
        cases = []
        for kind, recipe in RECIPES.items():
            for tensor, pipeline, stage in grids:
                if (kind, tensor, pipeline, stage) in LONG and not is_long:
                    continue
                key = (kind, processes, tensor, pipeline, stage)
                found[key] = folder / "-".join(map(str, key))
                grid = {
                    "tensor_parallel": tensor,
                    "pipeline_parallel": pipeline,
                    "zero_stage": stage,
                }
                cases.append({"recipe": {**recipe, "grid": grid}, "run": str(found[key])})
        run_workers(processes, "train", cases, folder / f"workers-{processes}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", RECIPES)
def test_same_numbers_on_every_grid(runs: dict[tuple[Any, ...], Path], kind: str) -> None:
    reference = runs[kind, 1, 1, 1, 0]
    losses, spectra = losses_of(reference), spectra_of(reference)
    wanted = json.loads((reference / "evaluation.json").read_text())["overall"]
    assert set(wanted) == {"samples", "loss", "accuracy"} and wanted["samples"] == 50
    for key, folder in runs.items():
        if key[0] != kind:
            continue
        np.testing.assert_allclose(losses_of(folder), losses, rtol=1e-4, err_msg=str(key))
        for head, sigma in spectra_of(folder).items():
            assert np.abs(sigma - spectra[head]).max() <= 1e-4 * sigma[0], (key, head)
        figures = json.loads((folder / "evaluation.json").read_text())["overall"]
        assert figures["loss"] == pytest.approx(wanted["loss"], rel=1e-5), key
        assert figures["accuracy"] == wanted["accuracy"], key


@pytest.mark.slow
@pytest.mark.parametrize("kind", RECIPES)
def test_scores_by_hand(runs: dict[tuple[Any, ...], Path], kind: str) -> None:
    checkpoint = Checkpoint(list_checkpoints(runs[kind, 1, 1, 1, 0] / "checkpoints")[-1])
    config = checkpoint.config
    model = GPT(config.model, ParameterFactory(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(checkpoint.full(info_of(parameter).name))
        chosen = open_task(config).held_out(config)
        inputs, labels = (
            torch.from_numpy(np.stack(x)) for x in zip(*[chosen[i] for i in range(50)], strict=True)
        )
        logits = model(inputs)[-1].double()
    answers = labels[:, -1]
    found = json.loads((runs[kind, 1, 1, 1, 0] / "evaluation.json").read_text())["overall"]
    loss = torch.nn.functional.cross_entropy(logits, answers).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == answers).double().mean().item())


@pytest.mark.slow
@pytest.mark.parametrize("kind", RECIPES)
def test_resume_and_commands(
    runs: dict[tuple[Any, ...], Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A run that stops half-way and goes on ends where an undisturbed one does; it is scored,
    measured and reported by the usual commands."""
    case = {"recipe": RECIPES[kind], "run": str(tmp_path / "run")}
    run_workers(1, "train", [{**case, "stop": 3}, case], tmp_path / "workers")
    undisturbed = weights_of(runs[kind, 1, 1, 1, 1])
    for name, values in weights_of(tmp_path / "run").items():
        assert (values == undisturbed[name]).all(), name
    assert {row["step"] for row in read_ranks(tmp_path / "run")} == {0, 3, 6}
    target = str(tmp_path / "run")
    assert run(monkeypatch, "evaluate", target) == 0
    assert "accuracy" in capsys.readouterr().out
    assert run(monkeypatch, "ranks", target) == 0
    assert run(monkeypatch, "report", target, "--out", str(tmp_path / "report.html")) == 0
    assert run(monkeypatch, "evaluate", target, "--stride", "4") == 2
    assert "for text" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["recall-base", "vit-digits-base", "vit-s16-imagenet", "lm-base"])
def test_recipes_of_the_paper(name: str) -> None:
    from pretrain.config.recipe import load_config

    load_config(ROOT / f"configs/paper/{name}.yaml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.context": 12}, "13"),
        ({"task.pairs": 9, "model.context": 19}, "task.symbols"),
        ({"task.kind": "images"}, "dialect vit"),
        ({"task.kindd": "x"}, "did you mean kind"),
    ],
)
def test_mistakes(
    change: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = write_recipe(tmp_path / "recipe.yaml", RECIPES["recall"])
    words = [f"{key}={value}" for key, value in change.items()]
    assert run(monkeypatch, "train", str(path), "--out", str(tmp_path / "run"), *words) == 2
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1
