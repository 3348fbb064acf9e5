"""The plan against what can be counted by hand, and against bytes that a real engine holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.cluster import local_rates
from pretrain.cluster.local_rates import link_between, measure_here
from pretrain.cluster.plan import Choice, _best, choose, rank
from pretrain.config.recipe import Config, parse_config, with_values
from pretrain.engine.accelerators import DEVICES
from pretrain.engine.memory import memory_of
from pretrain.engine.sizes import Layout, sizes_of
from tests.tools import ROOT, run

SHAPE = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 8, "context": 128,
         "vocabulary_size": 1024}  # fmt: skip


def config_of(batch: int = 16, **model: object) -> Config:
    return parse_config({"model": {**SHAPE, **model}, "train": {"global_batch": batch}})


def test_sizes_are_the_models() -> None:
    sizes = sizes_of(config_of())
    block = 12 * 256**2 + 13 * 256  # matrices; biases 9, norms 4
    assert sizes.parameters == 4 * block
    assert sizes.ends == (1024 + 128 + 2) * 256  # embedding, positions, final norm
    tokens = 16 * 128
    matrices = 4 * block + 1024 * 256
    assert sizes.flops(tokens) == tokens * (6 * matrices + 6 * 4 * 256 * 128)


def layout(**more: float) -> Layout:
    values = {"width": 2, "tensor": 1, "pipeline": 1, "data": 1, "stage": 1, "micro": 4,
              "count": 1, "recompute": False}  # fmt: skip
    return Layout(**(values | more))  # type: ignore[arg-type]


def test_memory_of_weights_and_states() -> None:
    """2 + 4 + 12 bytes a parameter in bf16; each ZeRO stage shards one more part."""
    sizes = sizes_of(config_of())
    count = sizes.parameters + sizes.ends
    parts = ("weights", "gradients", "optimizer")
    whole = memory_of(sizes, layout(count=4))  # gradients wait for the other micro batches
    assert sum(whole[name] for name in parts) == 18 * count
    for stage, expected in ((1, (2, 4, 12 / 4)), (2, (2, 1, 3)), (3, (0.5, 1, 3))):
        found = memory_of(sizes, layout(data=4, stage=stage, count=4))
        assert [found[name] for name in parts] == [count * one for one in expected]
    large = memory_of(sizes, layout(micro=512))  # activations are the most then
    halved = memory_of(sizes, layout(micro=512, tensor=2))
    norms = 4 * (2 * 2 + 2) * 256 + 2 * 256 + 128 * 256  # with output biases, and positions
    assert halved["weights"] == (large["weights"] + 2 * norms) / 2
    assert halved["loss"] < large["loss"]
    again = memory_of(sizes, layout(micro=512, recompute=True))
    assert again["activations"] < large["activations"] / 10
    # With hardly an activation the update is the fullest moment: bucket and float32 gradients.
    update = memory_of(sizes, layout(micro=1, recompute=True))
    assert sum(update.values()) == (14 + 4 + 4 + 4) * count


def test_a_plan_holds_the_start_too() -> None:
    """However little training needs: with many processes, and one short sequence each."""
    for vocabulary in (1024, 200_000):
        sizes = sizes_of(config_of(vocabulary_size=vocabulary, context=8))
        count = sizes.parameters + sizes.ends
        largest = max(sizes.parameters / 4, vocabulary * 256)  # a layer, or the embedding
        for data in (1, 8, 4096):
            for stage, flat in ((1, True), (2, False), (3, False)):
                found = memory_of(
                    sizes, layout(micro=1, data=data, stage=stage, flat=flat, recompute=True)
                )
                needed = 4 * count / data + (2 * count / data + 2 * largest if stage == 3 else
                                             2 * count + (4 * count if flat else 0))  # fmt: skip
                assert sum(found.values()) >= needed * 0.999, (vocabulary, data, stage)


def test_what_a_recipe_sets_counts() -> None:
    """Optimizer states, the width of heads, precision, libraries; of equals a large micro batch."""
    of = {name: parse_config({"model": {"vocabulary_size": 1024, **SHAPE}, "optimizer": more,
                              "precision": "fp32", "grid": {"zero_stage": 0}})
          for name, more in (("adamw", {}), ("lion", {"name": "lion"}), ("sgd", {"name": "sgd"}),
                             ("plain", {"name": "sgd", "momentum": 0.0}))}  # fmt: skip
    found = {name: choose(config, DEVICES["h100"], 1) for name, config in of.items()}
    count = sizes_of(of["adamw"]).parameters + sizes_of(of["adamw"]).ends
    states = {name: one.memory["optimizer"] / count for name, one in found.items()}
    assert states == {"adamw": 8, "lion": 4, "sgd": 4, "plain": 0}
    assert found["adamw"].precision == "fp32" and found["adamw"].memory["libraries"] == 1.5e9
    wide, usual = sizes_of(config_of(head_dim=128)), sizes_of(config_of())
    attention = [one.flops(1) - 6 * one.matrices for one in (wide, usual)]
    assert attention[0] == 4 * attention[1]
    assert rank(config_of(batch=16), DEVICES["h100"], 1)[0].micro_batch == 16


def test_precision_decides_the_rate() -> None:
    found = {
        word: choose(with_values(config_of(), {"precision": word}, "test"), DEVICES["h100"], 1)
        for word in ("fp32", "bf16")
    }
    ratio = found["fp32"].seconds["products"] / found["bf16"].seconds["products"]
    assert ratio == pytest.approx(989 / 67)


def test_what_attention_costs() -> None:
    """Products of all scores where none is left out; scores that a layer keeps; repeated keys."""

    def attention(**model: object) -> float:
        sizes = sizes_of(config_of(**model))  # type: ignore[arg-type]
        return sizes.flops(1) - 6 * sizes.matrices

    causal = attention()
    assert all(attention(attention=kind) == 2 * causal for kind in ("linear", "sigmoid"))
    assert attention(dialect="gpt_neox", causal=False) == 2 * causal

    def kept(**model: object) -> float:
        sizes = sizes_of(config_of(**model))  # type: ignore[arg-type]
        return memory_of(sizes, layout(micro=512))["activations"]

    scores = 4 * 512 * 128 * 128 * 8  # layers, sequences, queries, keys, heads
    assert kept(attention="linear") - kept() == 2 * scores
    assert kept(attention="sigmoid") - kept() == 6 * scores
    groups = [kept(dialect="llama", num_key_value_heads=count) for count in (1, 4, 8)]
    assert groups == [groups[-1]] * 3


def test_zero_3_keeps_what_it_gathers_between_the_passes() -> None:
    sizes = sizes_of(config_of())
    count = sizes.parameters + sizes.ends
    for reuse, kept in ((1e9, count), (1e6, 5e5), (0, 0)):
        found = memory_of(sizes, layout(micro=512, data=4, stage=3, reuse=reuse))
        assert found["gathered"] == 2 * kept


def test_each_grid_pads_the_vocabulary_in_its_own_way() -> None:
    """To a number of tokens that its processes divide."""
    config = config_of(vocabulary_size=1099, vocabulary_multiple=1)
    eight = with_values(config, {"grid.tensor_parallel": 8}, "test")
    assert (sizes_of(config).vocabulary, sizes_of(eight).vocabulary) == (1099, 1104)
    for found in rank(config, DEVICES["h100"], 8):
        values = {
            "grid.tensor_parallel": found.tensor,
            "grid.pipeline_parallel": found.pipeline,
            "grid.zero_stage": found.zero_stage,
            "grid.activation_checkpointing": found.recompute,
            "train.micro_batch": found.micro_batch,
        }
        assert choose(with_values(config, values, "test"), DEVICES["h100"], 8) == found


def test_of_equals_the_largest_micro_batch_with_room() -> None:
    def choice(micro: int, seconds: float, gigabytes: float) -> Choice:
        some = choose(config_of(), DEVICES["h100"], 1)
        memory = {"weights": gigabytes * 1e9}
        return replace(some, micro_batch=micro, seconds={"step": seconds}, memory=memory)

    def best(*choices: Choice) -> int:
        return _best(list(choices), DEVICES["h100"]).micro_batch

    assert best(choice(2, 1.005, 20), choice(4, 1.0, 60), choice(8, 1.02, 63)) == 4
    assert best(choice(2, 1.005, 20), choice(4, 1.0, 70)) == 2  # 80 % are 64 GB
    assert best(choice(2, 1.005, 66), choice(4, 1.0, 70)) == 4  # nothing has room


def test_grids_are_ranked() -> None:
    config = config_of(batch=64)
    found = rank(config, DEVICES["h100"], 16)
    assert all(one.tensor * one.pipeline * one.data == 16 for one in found)
    assert len({(one.tensor, one.pipeline) for one in found}) == len(found)
    assert all(64 % (one.data * one.micro_batch) == 0 and 8 % one.tensor == 0 for one in found)
    steps = [one.seconds["step"] for one in found if one.fits]
    assert steps == sorted(steps) and all(0 < one.mfu < 0.7 for one in found)
    grid = {"grid.pipeline_parallel": 4, "train.micro_batch": 4}
    small = choose(with_values(config, grid, "test"), DEVICES["h100"], 16)
    assert small.bubble == 3 / 7 and small.traffic["tensor"] == 0


def test_a_model_that_needs_more_than_one_device() -> None:
    """20 B parameters in bf16 with Adam are 320 GB: nothing fits on one, something on 16."""
    big = config_of(num_layers=44, hidden_size=6144, num_attention_heads=64, context=2048,
                    vocabulary_size=50_304)  # fmt: skip
    assert not any(one.fits for one in rank(big, DEVICES["h100"], 1))
    best = rank(big, DEVICES["h100"], 16)[0]
    assert best.fits and best.total < 80e9
    assert best.tensor * best.pipeline > 1 or best.zero_stage == 3


@pytest.mark.slow
def test_this_machine_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes share what one has; a slower machine is planned to be slower."""
    monkeypatch.setattr(local_rates, "_SECONDS", 0.05)  # of each measurement
    config = config_of()
    alone = measure_here(1, config)
    assert alone.tflops > 0 and alone.bandwidth > 0
    assert alone.base > 1e8 and alone.memory > 1
    # Rates that a busy machine does not change.
    one_of_two = measure_here(2, config, rates=lambda width: (3e11, 5e9))
    assert one_of_two.tflops == pytest.approx(0.15) and 0 < one_of_two.node_link < 1000
    assert one_of_two.bandwidth == pytest.approx(2.5)
    assert one_of_two.memory == pytest.approx(alone.memory / 2)
    fast = choose(config, alone, 1)
    slow = choose(config, replace(alone, tflops=alone.tflops / 4, tflops32=alone.tflops32 / 4), 1)
    assert slow.seconds["products"] == pytest.approx(4 * fast.seconds["products"])
    recipe = str(ROOT / "configs/gpt-tiny.yaml")
    words = ["plan", recipe, "--gpus", "1", "--gpu", "here", "model.vocabulary_size=4096"]
    assert run(monkeypatch, *words) == 0
    assert "rates of this machine, measured now" in capsys.readouterr().out


@pytest.mark.parametrize(("processes", "gpus", "wanted", "warns"), [
    (1, 1, 1e12, False), (8, 1, 25e9, True), (2, 2, 7e9, False), (2, None, 7e9, False),
])  # fmt: skip
def test_one_gpu_starts_no_second_process(
    processes: int, gpus: int | None, wanted: float, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes on one GPU are refused; the link that nobody can measure is assumed."""
    assert link_between(processes, gpus, lambda: 7e9) == wanted
    assert ("assumed" in capsys.readouterr().err) == warns


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = str(ROOT / "configs/paper-125m.yaml")
    words = ["plan", recipe, "--gpus", "8", "model.vocabulary_size=50304"]
    assert run(monkeypatch, *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["grids"][0]["fits"] and "published rates" in found["note"]
    assert run(monkeypatch, *words) == 0
    assert "train it with: pretrain train RECIPE grid.tensor_parallel=1" in capsys.readouterr().out
    for more, culprit in (
        (["--gpu", "h1000"], "--gpu: 'h1000' is not one of a100"),
        (["--gpus", "13"], "cannot be divided by any grid of 13 devices"),
    ):
        assert run(monkeypatch, *words, *more) == 2
        assert culprit in capsys.readouterr().err
