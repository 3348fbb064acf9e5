"""What only a GPU can show: its kernels, and runs that are killed and continue there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import Kernels, compiled
from models.loss import Projection, mean_loss
from models.products import mean_over_sequence
from pretrain.runs.folder import read_ranks
from tests.tools import ROOT, base_recipe, losses_of, weights_of, write_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("vocabulary", [300, 50_304])
def test_loss_and_gradients_in_parts(vocabulary: int, parts: int, z_loss: float) -> None:
    """Of 16-bit hidden states: as with float64 arithmetic on the same values, to their rounding."""
    torch.manual_seed(0)
    tokens, width = 768, 64
    hidden = torch.randn(tokens, 1, width, device="cuda").bfloat16()
    weight = (0.3 * torch.randn(vocabulary, width, device="cuda")).bfloat16()
    labels = torch.randint(vocabulary, (1, tokens), device="cuda")

    def exact(h: Tensor, w: Tensor) -> Tensor:
        logits = h.flatten(0, 1) @ w.T
        logits = logits + (logits.bfloat16().to(h.dtype) - logits).detach()
        normaliser = logits.logsumexp(-1).square().mean()
        return F.cross_entropy(logits, labels.flatten()) + z_loss * normaliser

    kernels = Kernels(loss_bytes=4 * vocabulary * (tokens // parts), compiled=True)

    def found(h: Tensor, w: Tensor) -> Tensor:
        return mean_loss(Projection(h, w, kernels=kernels), labels, z_loss=z_loss)

    answers = []
    for function, dtype in ((exact, torch.float64), (found, torch.bfloat16)):
        leaves = [one.to(dtype).requires_grad_() for one in (hidden, weight)]
        gradients = torch.autograd.grad(function(*leaves), leaves)
        answers.append([one.double() for one in gradients])
    for right, other in zip(*answers, strict=True):
        assert (other - right).norm() / right.norm() < 4e-3
    plain = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).double(), labels.flatten())
    torch.testing.assert_close(found(hidden, weight).double(), plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("length", [1, 7, 48, 256, 2048])
def test_mean_over_a_sequence(length: int) -> None:
    """Compiled and not, of heads that are views of one product: the float64 mean, rounded."""
    torch.manual_seed(0)
    joined = (torch.randn(length, 2, 3 * 128, device="cuda") + 3).bfloat16()
    heads = joined.split(128, -1)[1].unflatten(-1, (4, 32)).permute(1, 2, 0, 3)
    right = heads.double().mean(2, keepdim=True)
    for function in (mean_over_sequence, compiled(partial(mean_over_sequence))):
        found = function(heads)
        assert found.shape == (2, 4, 1, 32)
        assert (found.double() - right).abs().max() <= 2**-8 * right.abs().max()


@pytest.mark.parametrize(
    "more", [{"compile": True}, {"compile": True, "graph": False}, {"compile": False}]
)
@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_a_killed_run_continues_bit_by_bit(
    dialect: str, more: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    """With an empty compiler cache at each start, and evaluations of short documents between."""
    values = base_recipe(data)
    values["model"] |= {"dialect": dialect, "context": 64, "hidden_size": 64}
    values["train"] |= {"steps": 1200, "global_batch": 16, "micro_batch": 8}
    values |= {"precision": "bf16", "speed": more}
    values["evaluation"]["every"] = values["ranks"]["every"] = values["checkpoint"]["every"] = 100
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    assert _train(recipe, tmp_path / "whole", tmp_path / "cache-0").wait(300) == 0
    first = _train(recipe, tmp_path / "killed", tmp_path / "cache-1")
    until = time.monotonic() + 200
    while not (tmp_path / "killed/checkpoints/step-00000400").exists():
        assert first.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    first.kill()
    first.wait()
    killed = len(losses_of(tmp_path / "killed"))
    assert killed < 1200
    assert _train(recipe, tmp_path / "killed", tmp_path / "cache-2").wait(300) == 0
    np.testing.assert_array_equal(losses_of(tmp_path / "killed"), losses_of(tmp_path / "whole"))
    ends, others = weights_of(tmp_path / "killed"), weights_of(tmp_path / "whole")
    assert ends.keys() == others.keys()
    for name, value in ends.items():
        np.testing.assert_array_equal(value, others[name], err_msg=name)


@pytest.mark.parametrize("more", [{"compile": True}, {"compile": False}])
def test_ranks_measured_beside_training_are_those_that_it_waits_for(
    more: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    """Of every fifth update, in a run whose weights change a lot between two of them."""
    values = base_recipe(data)
    values["model"] |= {"context": 64, "hidden_size": 128}
    values["train"] |= {"steps": 203, "global_batch": 16, "micro_batch": 8}
    values["optimizer"]["learning_rate"] = 2e-2
    values |= {"precision": "bf16", "speed": more}
    values["ranks"]["every"], values["checkpoint"]["every"] = 5, 200
    values["evaluation"]["every"] = 1000
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    wait = "import pretrain.ranks.later as m; m.LateRanks.can_begin = lambda late: False; "
    assert _train(recipe, tmp_path / "late", tmp_path / "cache").wait(300) == 0
    assert _train(recipe, tmp_path / "waits", tmp_path / "cache", wait).wait(300) == 0
    late, waits = read_ranks(tmp_path / "late"), read_ranks(tmp_path / "waits")
    assert len({row["step"] for row in late}) == 42 and len(late) == len(waits)
    for one, other in zip(late, waits, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=1e-7, abs=1e-12, nan_ok=True), name


def _train(recipe: Path, out: Path, cache: Path, before: str = "") -> subprocess.Popen[bytes]:
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "a"), "TRITON_CACHE_DIR": str(cache / "b")}
    kept = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    return subprocess.Popen(
        [sys.executable, "-c", f"{before}from pretrain.__main__ import main; main()",
         "train", str(recipe), "--out", str(out)],
        env={**kept, **caches, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        stdout=subprocess.DEVNULL, stderr=(out.parent / f"{cache.name}.txt").open("wb"),
    )  # fmt: skip
