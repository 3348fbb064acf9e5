"""The training samples of one subset, without end.

Each epoch of a subset is a separate dataset of Megatron's, shuffled with a seed from (seed, subset,
epoch), so that the order does not depend on how many samples a run requests. Building the order of
10⁹ samples takes minutes, so an epoch of a very large subset is divided into chapters: every n-th
document belongs to the same one, and the order of a chapter is built when training comes to it.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np

from data_pipeline.indexed import Documents, index_classes, open_indexed
from data_pipeline.manifest import Entry, Manifest
from data_pipeline.sources import ChoiceError, stamp_of

LARGE = 1 << 27
"""Samples of an epoch above which it has chapters: 275 billion tokens in samples of 2,048."""
CHAPTER = 1 << 24
"""About the number of samples of a chapter."""


class EpochedSubset:
    """All epochs of one subset as one endless dataset that Megatron can blend."""

    def __init__(
        self, entry: Entry, manifest: Manifest, context: int, seed: int, size: int
    ) -> None:
        megatron = index_classes()
        self.index_split = megatron.Split.train
        self.unique_identifiers = OrderedDict(subset=entry.subset, seed=seed)
        self._entry, self._eod = entry, manifest.eod
        self._context, self._seed = context, seed
        self._indexed = open_indexed(entry, manifest.dtype, size)
        samples = (entry.tokens - 1) // context
        if samples < 1:
            raise ChoiceError(
                f"{entry.subset}: {entry.tokens} training tokens are fewer than one sequence of "
                f"model.context {context} + 1; shorten the context or leave out the subset"
            )
        self._count = min(-(-samples // CHAPTER), entry.documents) if samples > LARGE else 1
        lengths = [max(0, tokens - 1) // context for tokens in self._tokens()]
        self._ends = np.cumsum(lengths)
        self._length = int(self._ends[-1])
        self._orders: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def _tokens(self) -> list[int]:
        """The tokens of each chapter."""
        if self._count == 1:
            return [self._entry.tokens]
        first, count = self._entry.first, self._entry.documents
        lengths = self._indexed.sequence_lengths[first : first + count]
        return [
            int(lengths[chapter :: self._count].sum(dtype=np.int64))
            for chapter in range(self._count)
        ]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, position = divmod(int(index), self._length)
        chapter = int(np.searchsorted(self._ends, position, side="right"))
        start = int(self._ends[chapter - 1]) if chapter else 0
        sample: dict[str, Any] = self._order(epoch, chapter)[position - start]
        return sample

    def _order(self, epoch: int, chapter: int) -> Any:
        """The samples of a chapter in the order of an epoch; the last two stay in memory."""
        place = (epoch, chapter)
        if place not in self._orders:
            self._orders[place] = self._build(epoch, chapter)
            while len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[place]

    def _build(self, epoch: int, chapter: int) -> Any:
        megatron = index_classes()
        name = f"{self._seed}/{self._entry.subset}/{epoch}"
        if self._count > 1:
            name += f"/{chapter}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        config = megatron.GPTDatasetConfig(
            random_seed=seed,
            sequence_length=self._context,
            tokenizer=SimpleNamespace(
                eod=self._eod, vocab_size=None, unique_identifiers={"eod": self._eod}
            ),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        entry, file = self._entry, self._entry.path(".idx")
        key = f"{file.resolve()}/{stamp_of(file)}/{entry.first}/{entry.documents}"
        if self._count > 1:
            key += f"/{chapter}/{self._count}"
        documents = Documents(
            range(entry.first + chapter, entry.first + entry.documents, self._count),
            self._length // self._count * self._context,
            key,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return megatron.GPTDataset(
                self._indexed, None, documents, None, self.index_split, config
            )


class PackedSubset:
    """Sequences that already are samples, in their order, repeated without end."""

    def __init__(self, entry: Entry, manifest: Manifest, context: int, size: int) -> None:
        self.index_split = index_classes().Split.train
        self.unique_identifiers = OrderedDict(subset=entry.subset, packed=entry.packed)
        if entry.packed != context + 1:
            raise ChoiceError(
                f"{entry.prefix}: is packed in sequences of {entry.packed} tokens; set "
                f"model.context to {entry.packed - 1}"
            )
        self._entry = entry
        self._indexed = open_indexed(entry, manifest.dtype, size)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        tokens = self._indexed.get(self._entry.first + int(index) % self._entry.documents)
        values = torch.from_numpy(tokens.astype(np.int64))
        return {"tokens": values[:-1], "labels": values[1:]}
