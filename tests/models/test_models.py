"""The model family: shapes, initial values, dialect switches, padding."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import models.loss
from models.config import PRESETS, Dialect, GPTConfig
from models.gpt import GPT, check_tensor_parallel, whole_model
from models.kernels import Kernels
from models.layers import Attention, ParameterFactory, gelu_by_exp
from models.loss import Projection, mean_loss, token_losses
from models.parallel import TensorParallel
from models.products import attention_by_products
from models.roles import ModelError, declared_parameters, info_of
from models.rotary import Rotary
from pretrain.config.recipe import load_config
from tests.engine.test_grid import MODELS

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "context": 16}


def config(dialect: str = "gpt2", **more: object) -> GPTConfig:
    return GPTConfig(dialect=dialect, vocabulary_size=300, **{**SMALL, **more})


@pytest.mark.parametrize(
    ("name", "parameters", "outside_embeddings"),
    [
        ("pythia-14m", 14_067_712, 1_189_888),
        ("pythia-70m", 70_426_624, 18_915_328),
        ("pythia-160m", 162_322_944, 85_056_000),
        ("pythia-410m", 405_334_016, 302_311_424),
        ("pythia-1b", 1_011_781_632, 805_736_448),
        ("pythia-1.4b", 1_414_647_808, 1_208_602_624),
        ("pythia-2.8b", 2_775_208_960, 2_517_652_480),
        ("pythia-6.9b", 6_857_302_016, 6_444_163_072),
        ("pythia-12b", 11_846_072_320, 11_327_027_200),
        ("llama-2-7b", 6_738_415_616, 6_476_271_616),
        ("llama-3-8b", 8_030_261_248, 6_979_588_096),
    ],
)
def test_recipes_have_the_published_sizes(
    name: str, parameters: int, outside_embeddings: int
) -> None:
    model = load_config(CONFIGS / f"{name}.yaml").model
    size = model.vocabulary_size or 50_304  # the small ones take their data's
    infos = whole_model(model.model_copy(update={"vocabulary_size": size}))
    assert sum(info.numel for info in infos) == parameters
    inner = [info for info in infos if info.role not in ("embedding", "head")]
    assert sum(info.numel for info in inner) == outside_embeddings


@pytest.mark.parametrize("recipe", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_recipe_is_valid(recipe: str) -> None:
    assert load_config(CONFIGS / recipe).train.steps > 0


@pytest.mark.parametrize("dialect", ["gpt2", "gpt_neox", "llama"])
def test_shards_are_parts_of_the_whole(dialect: str) -> None:
    """Initial values depend on (seed, name) alone: two shards make the one-process tensor."""
    whole = declared_parameters(GPT(config(dialect), ParameterFactory(5)))
    shards = []
    for rank in range(2):
        tp = TensorParallel(None, rank, 2)
        shards.append(declared_parameters(GPT(config(dialect), ParameterFactory(5, tp))))
    for full, first, second in zip(whole, *shards, strict=True):
        dim = info_of(full).partition_dim
        assert info_of(full).name == info_of(first).name
        joined = first if dim is None else torch.cat([first, second], dim)
        assert torch.equal(joined[: len(full)], full), info_of(full).name
    other = declared_parameters(GPT(config(dialect), ParameterFactory(6)))
    assert not torch.equal(whole[0], other[0])


@pytest.mark.parametrize("dialect", ["gpt2", "gpt_neox", "llama"])
def test_causal_and_unpadded(dialect: str) -> None:
    model = GPT(config(dialect), ParameterFactory(1))
    tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 300
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:9], after[:9]) and not torch.equal(before[9:], after[9:])
    assert before.shape == (16, 2, 384)
    assert (before[..., 300:] == float("-inf")).all()  # padding never takes part
    wide = GPT(config(dialect, vocabulary_multiple=300), ParameterFactory(1))
    with torch.no_grad():
        assert torch.equal(wide(tokens), before[..., :300])


@pytest.mark.parametrize("kind", ["whole", "in parts", "compiled"])
def test_loss_is_cross_entropy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients as PyTorch's, over padding, all tokens at once or some at a time."""
    monkeypatch.setattr(models.loss, "_LEAST_ROWS", 15 if kind == "whole" else 4)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, 8, generator=generator, requires_grad=True)
    weight = torch.randn(12, 8, generator=generator, requires_grad=True)
    bias = torch.tensor([0.0] * 11 + [-torch.inf])  # one row of padding
    labels = torch.randint(0, 11, (3, 5), generator=generator)
    labels[0, 1] = -1  # not asked
    logits = F.linear(hidden, weight, bias).transpose(0, 1).flatten(0, 1)
    wanted = F.cross_entropy(logits, labels.flatten(), ignore_index=-1)
    gradients = torch.autograd.grad(2 * wanted, (hidden, weight))
    kernels = Kernels(loss_bytes=0, compiled=kind == "compiled")
    projection = Projection(hidden, weight, bias, kernels=kernels)
    found = mean_loss(projection, labels, partial_labels=True)
    torch.testing.assert_close(found, wanted)
    others = torch.autograd.grad(2 * found, (hidden, weight))
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other)
    each = F.cross_entropy(logits, labels.clamp_min(0).flatten(), reduction="none").view(3, 5)
    torch.testing.assert_close(token_losses(projection, labels.t().clamp_min(0)).t(), each)


@pytest.mark.parametrize("more", [{}, {"num_key_value_heads": 2}, {"qk_norm": True}])
@pytest.mark.parametrize("dialect", ["gpt2", "gpt_neox", "llama"])
def test_one_product_for_queries_keys_and_values(dialect: str, more: dict[str, Any]) -> None:
    """Outputs and gradients are those of three products; the parameters stay three."""
    found = []
    for joined in (False, True):
        model = config(dialect, **more)
        module = GPT(model, ParameterFactory(1), Kernels(joined=joined)).double()
        draw = torch.Generator().manual_seed(2)
        inputs = torch.randint(300, (2, 16), generator=draw)
        module(inputs, partial(mean_loss, labels=inputs)).backward()
        gradients = {info_of(p).name: p.grad for p in module.parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        found.append(gradients)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_gelu_for_the_compiler_is_gelu() -> None:
    """Its other form, over a range that a small model's activations never reach."""
    x = torch.linspace(-8, 8, 1001)
    torch.testing.assert_close(gelu_by_exp(x), F.gelu(x, approximate="tanh"), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("length", "causal"), [(9, True), (300, True), (300, False)])
def test_attention_by_products_is_softmax_attention(length: int, causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(3, 2, length, 4, 8, generator=generator).transpose(2, 3)
    factors.requires_grad_()
    q, k, v = factors
    upstream = torch.randn(2, 4, length, 8, generator=generator)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    found = attention_by_products(q, k, v, causal)
    torch.testing.assert_close(found, wanted)
    (one,) = torch.autograd.grad(wanted, factors, upstream)
    (other,) = torch.autograd.grad(found, factors, upstream)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_attention_is_the_textbooks() -> None:
    """Grouped queries, rotary positions and QK-norm against loops over heads."""
    shape = config("llama", num_key_value_heads=2, qk_norm=True)
    layer = Attention(shape, 0, ParameterFactory(2))
    x = torch.randn(16, 1, 32)
    head, rotary = 8, Rotary(8, 10_000.0)
    total = torch.zeros(16, 32)
    for index in range(4):
        rows, shared = slice(index * head, (index + 1) * head), slice(index // 2 * head, None)
        q = x[:, 0] @ layer.query[rows].T
        k = x[:, 0] @ layer.key[shared][:head].T
        v = x[:, 0] @ layer.value[shared][:head].T
        q, k = (F.rms_norm(t, (head,), eps=1e-5) for t in (q, k))
        q, k = (rotary(t[None, None])[0, 0] for t in (q, k))
        scores = (q @ k.T / head**0.5).masked_fill(~torch.ones(16, 16).tril().bool(), -torch.inf)
        total += scores.softmax(-1) @ v @ layer.output[:, rows].T
    torch.testing.assert_close(layer(x)[:, 0], total, rtol=1e-4, atol=1e-6)


def test_rotary_tables_of_training_stay_where_they_are() -> None:
    """A recorded pass reads them at their address, whatever is scored in between."""
    rotary, cpu = Rotary(8, 10_000.0), torch.device("cpu")
    short = rotary.tables(5, cpu)
    places = [table.data_ptr() for table in rotary.tables(12, cpu)]
    for length in (3, 7, 12, 1, 5):
        tables = rotary.tables(length, cpu)
        assert [table.data_ptr() for table in tables] == places
        for table, own in zip(tables, Rotary(8, 10_000.0).tables(length, cpu), strict=True):
            assert torch.equal(table, own)
    for table, before in zip(rotary.tables(5, cpu), short, strict=True):
        assert torch.equal(table, before)


def test_rotary_depends_on_distance_alone() -> None:
    rotary = Rotary(4, 100.0)
    q, k = torch.randn(6), torch.randn(6)
    scores = rotary(q.expand(1, 1, 9, 6))[0, 0] @ rotary(k.expand(1, 1, 9, 6))[0, 0].T
    for distance in range(5):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line))
    assert not torch.isclose(scores[0, 0], scores[0, 5])


def test_what_cannot_be_divided_is_named() -> None:
    check_tensor_parallel(config("llama", num_key_value_heads=2), 2)
    check_tensor_parallel(config("llama", num_key_value_heads=2), 4)  # two share a head
    with pytest.raises(ModelError, match=r"num_key_value_heads: 2 .*tensor_parallel=3"):
        check_tensor_parallel(
            config("llama", num_attention_heads=6, hidden_size=48, num_key_value_heads=2), 3
        )
    with pytest.raises(ModelError, match="num_attention_heads: 4"):
        check_tensor_parallel(config(), 3)


@pytest.mark.parametrize(("heads", "kv"), [(6, 4), (8, 8), (12, 3), (12, 1), (16, 6)])
def test_the_sizes_that_are_named_fit(heads: int, kv: int) -> None:
    """And no others, up to one head for each process."""
    made = config("llama", num_attention_heads=heads, hidden_size=8 * heads)
    made = made.model_copy(update={"num_key_value_heads": kv})
    fit, named = [], set()
    for size in range(1, 2 * heads):
        try:
            check_tensor_parallel(made, size)
            fit.append(size)
        except ModelError as error:
            named.add(str(error).rpartition("over ")[2])
    assert named == {", ".join(map(str, fit))}


def test_padding_of_vocabularies() -> None:
    assert config().padded_vocabulary(1) == 384 and config().padded_vocabulary(3) == 384
    assert config().padded_vocabulary(5) == 640


def test_every_dialect_has_a_preset_and_is_tested_on_grids() -> None:
    assert PRESETS.keys() == set(Dialect)
    on_grids = {str(one.get("dialect", "gpt2")) for one in MODELS.values()}
    assert on_grids | {Dialect.VIT} == set(Dialect)  # images are a task of `tests/tasks`
