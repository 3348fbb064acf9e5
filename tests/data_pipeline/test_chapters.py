"""Large subsets have chapters, and a blend is made bit by bit: no sample is lost or doubled."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import blend, subsets
from data_pipeline.blend import Blend
from data_pipeline.dataset import TrainingData
from data_pipeline.indexed import index_classes, open_indexed
from data_pipeline.manifest import load_manifest
from data_pipeline.subsets import EpochedSubset


def subset_of(data: Path, context: int, seed: int) -> EpochedSubset:
    manifest = load_manifest(data)
    (entry,) = (entry for entry in manifest.split("train") if entry.subset == "ArXiv")
    return EpochedSubset(entry, manifest, context, seed, manifest.vocabulary_size)


@pytest.mark.parametrize(
    ("context", "chapter"),
    [
        (5, 50), (5, 10**6), (32, 7), (32, 400),
        *(pytest.param(*one, marks=pytest.mark.long)
          for one in ((5, 7), (5, 400), (32, 50), (32, 10**6))),
    ],
)  # fmt: skip
def test_an_epoch_has_every_document_once(
    data: Path, monkeypatch: pytest.MonkeyPatch, context: int, chapter: int
) -> None:
    """All tokens of all chapters but the rest of each, which fills no sample; in any order."""
    monkeypatch.setattr(subsets, "LARGE", 100)
    monkeypatch.setattr(subsets, "CHAPTER", chapter)
    subset = subset_of(data, context, 3)
    entry, count, length = subset._entry, subset._count, subset._length
    assert count == min(-(-((entry.tokens - 1) // context) // chapter), entry.documents)
    indexed = open_indexed(entry, "uint16", 400)
    texts = [indexed.get(entry.first + number) for number in range(entry.documents)]
    parts = [Counter(np.concatenate(texts[start::count]).tolist()) for start in range(count)]
    lengths = [max(0, part.total() - 1) // context for part in parts]
    assert sum(lengths) == length
    passes = []
    for epoch in range(2):
        numbers = list(range(epoch * length, (epoch + 1) * length))
        samples = {}
        for number in sorted(numbers, key=lambda _: random.random()) if count < 3 else numbers:
            samples[number] = subset[number]["tokens"].numpy()
        ordered = [samples[number] for number in numbers]
        passes.append([sample.tobytes() for sample in ordered])
        start = 0
        for part, many in zip(parts, lengths, strict=True):
            found = Counter(np.concatenate([[], *ordered[start : start + many]]).tolist())
            start += many
            assert found <= part and (part - found).total() <= context
    assert Counter(passes[0]) != Counter(passes[1]) or passes[0] != passes[1]
    again, other = subset_of(data, context, 3), subset_of(data, context, 4)
    assert [again[number]["tokens"].numpy().tobytes() for number in range(20)] == passes[0][:20]
    assert [other[number]["tokens"].numpy().tobytes() for number in range(20)] != passes[0][:20]


def test_a_chapter_is_a_mixture_of_the_whole_file(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subsets, "LARGE", 100)
    monkeypatch.setattr(subsets, "CHAPTER", 100)
    subset = subset_of(data, 32, 3)
    assert subset._count > 3
    entry = subset._entry
    order = subset._order(0, 1)
    places = sorted(set(order.document_index.tolist()))
    assert places == list(range(entry.first + 1, entry.first + entry.documents, subset._count))


@pytest.mark.parametrize("seed", range(6))
def test_a_blend_that_grows_is_the_whole_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against Megatron's own array for all samples, whatever is asked for first."""
    rng = random.Random(seed)
    shares = [rng.random() ** 3 + 1e-4 for _ in range(rng.randint(1, 9))]
    samples = rng.randint(1, 5000)
    which, where = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    megatron = index_classes()
    normal = megatron.normalize(shares)
    megatron.blending_indices(which, where, normal, len(shares), samples, False)
    monkeypatch.setattr(blend, "FIRST", rng.choice([1, 10, 1000]))
    grows = Blend([range(samples)] * len(shares), shares, samples)
    for number in [rng.randrange(samples) for _ in range(50)] + list(range(samples)):
        assert grows.place(number) == (which[number], where[number])
    assert len(grows._places[0]) <= samples == len(grows)
    for number in (-1, samples):
        with pytest.raises(IndexError):
            grows[number]


def test_training_data_begins_with_a_part(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(data)
    whole = TrainingData(manifest, "proportional", 32, 1, 4000)
    monkeypatch.setattr(blend, "FIRST", 16)
    part = TrainingData(manifest, "proportional", 32, 1, 4000)
    assert len(part._blend._places[0]) == 16
    for number in (0, 15, 16, 900, 3999):
        assert (part[number][0] == whole[number][0]).all()
