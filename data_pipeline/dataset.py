"""Tokenised folders: training blends and held-out documents.

Megatron's classes read the files and build the samples, with one change: each epoch of a subset is
a separate dataset, shuffled with a seed from (seed, subset, epoch), so that the order does not
depend on how many samples a run requests.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from data_pipeline.bounded import BoundedReader
from data_pipeline.checksums import CheckedReader, load_documents, read_checksums, verify
from data_pipeline.index_file import Header, read_header
from data_pipeline.light_imports import import_light
from data_pipeline.manifest import Entry, Manifest
from data_pipeline.pile import PILE_WEIGHTS
from data_pipeline.shared_indices import shared_arrays
from data_pipeline.sources import ChoiceError, DataError, stamp_of


@cache
def index_classes() -> Any:
    """Import Megatron's dataset classes late (it takes 1 s) and without their warnings."""
    parts = ("indexed_dataset", "gpt_dataset", "blended_dataset", "utils", "helpers_cpp")
    try:
        indexed, gpt, blended, utils, _ = import_light(
            *(f"megatron.core.datasets.{part}" for part in parts)
        )
    except ModuleNotFoundError as error:
        if error.name != "megatron.core.datasets.helpers_cpp":
            raise
        raise DataError(
            "megatron-core is installed without its compiled dataset helpers: install a C++ "
            "compiler, then pip install --force-reinstall --no-deps megatron-core"
        ) from None
    return SimpleNamespace(
        IndexedDataset=indexed.IndexedDataset,
        GPTDataset=_with_shared_indices(gpt.GPTDataset),
        GPTDatasetConfig=gpt.GPTDatasetConfig,
        BlendedDataset=blended.BlendedDataset,
        Split=utils.Split,
    )


def _with_shared_indices(base: Any) -> Any:
    """Megatron's `GPTDataset`, whose indices the processes of a machine share if they are large.

    It is given ``Documents`` instead of an array of their numbers, which is needed only to build.
    """

    class GPTDataset(base):  # type: ignore[misc]
        indices: Any

        def _build_document_sample_shuffle_indices(self) -> Any:
            documents: Documents = self.indices

            def build() -> Any:
                self.indices = documents.numbers()
                try:
                    return base._build_document_sample_shuffle_indices(self)
                finally:
                    self.indices = documents

            samples = documents.tokens // self.config.sequence_length
            key = f"{documents.key}/{self.config.sequence_length}/{self.config.random_seed}"
            digest = hashlib.sha256(key.encode()).hexdigest()[:32]
            return shared_arrays(digest, 4 * documents.count + 12 * samples, build)

    return GPTDataset


@dataclass(frozen=True)
class Documents:
    """The documents of an entry, by their numbers in the file."""

    first: int
    count: int
    tokens: int
    key: str
    """The file and its state."""

    def numbers(self) -> np.ndarray:
        """``[count]`` int32."""
        return np.arange(self.first, self.first + self.count, dtype=np.int32)


def open_indexed(entry: Entry, dtype: str, size: int) -> Any:
    """Megatron's `IndexedDataset` of an entry, after checks that give one-line errors.

    Args:
        size: of the vocabulary; tokens outside it are refused when they are read.

    Raises:
        DataError: if a file is missing, or the sizes of index and data do not agree.
    """
    index, data = (entry.prefix.with_name(entry.prefix.name + end) for end in (".idx", ".bin"))
    for file in (index, data):
        if not file.is_file():
            raise DataError(f"{file}: missing; tokenise again")
    with index.open("rb") as stream:
        header = read_header(stream)
    if header is None or not _fits(header, entry) or index.stat().st_size != header.file_size:
        raise DataError(f"{index}: the index is damaged; tokenise again")
    wanted = (entry.file_tokens or entry.tokens) * np.dtype(dtype).itemsize
    if data.stat().st_size != wanted:
        raise DataError(f"{data}: {data.stat().st_size} bytes, expected {wanted}; tokenise again")
    # Check them before Megatron reads them: it trusts its index.
    for file in (index, entry.checksum_file):
        verify(file, entry.files)
    dataset = index_classes().IndexedDataset(str(entry.prefix), multimodal=False, mmap=True)
    checksums = read_checksums(data, entry.checksum_file)
    if checksums is not None:
        dataset.bin_reader = CheckedReader(dataset.bin_reader, data, checksums)
    starts = dataset.index.sequence_pointers
    dataset.bin_reader = BoundedReader(dataset.bin_reader, data, starts, size)
    return dataset


def _fits(header: Header, entry: Entry) -> bool:
    """Whether an index agrees with the manifest; an adopted document may be many sequences."""
    if entry.file_documents:
        return header.sequences == entry.file_documents
    return header.sequences == entry.documents == header.documents - 1


# --- training -------------------------------------------------------------------------------


def blend_weights(manifest: Manifest, weights: str | dict[str, float]) -> dict[str, float]:
    """Share of each training subset, summing to 1.

    Args:
        weights: ``proportional`` to tokens, ``pile`` (the published shares, renormalised over
            the subsets that are present), or shares by name.

    Raises:
        DataError: if a name has no subset, a subset has no weight, or nothing is left.
    """
    entries = {entry.subset: entry for entry in manifest.split("train")}
    if weights == "proportional":
        raw = {name: float(entry.tokens) for name, entry in entries.items()}
    elif weights == "pile":
        unknown = sorted(set(entries) - set(PILE_WEIGHTS))
        if unknown:
            raise ChoiceError(
                f"data.weights: pile: {unknown[0]!r} is not a subset of the Pile; give weights by "
                "name, or proportional"
            )
        raw = {name: PILE_WEIGHTS[name] for name in entries}
    elif isinstance(weights, dict):
        for name in weights:
            if name not in entries:
                raise ChoiceError(
                    f"data.weights.{name}: no such subset in {manifest.path}; it has "
                    f"{', '.join(sorted(entries))}"
                )
        for name in entries:
            if name not in weights:
                raise ChoiceError(
                    f"data.weights: {name!r} has no weight; give one (0 leaves it out)"
                )
        raw = dict(weights)
    else:
        raise ChoiceError(f"data.weights: {weights!r} is not proportional, pile or a mapping")
    if min(raw.values()) < 0 or sum(raw.values()) <= 0:
        raise ChoiceError("data.weights: weights must not be negative, and not all 0")
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items() if value > 0}


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
        self._epochs: OrderedDict[int, Any] = OrderedDict()
        self._length = (entry.tokens - 1) // context
        if self._length < 1:
            raise ChoiceError(
                f"{entry.subset}: {entry.tokens} training tokens are fewer than one sequence of "
                f"model.context {context} + 1; shorten the context or leave out the subset"
            )

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, position = divmod(int(index), self._length)
        sample: dict[str, Any] = self._epoch(epoch)[position]
        return sample

    def _epoch(self, epoch: int) -> Any:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._build(epoch)
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _build(self, epoch: int) -> Any:
        megatron = index_classes()
        name = f"{self._seed}/{self._entry.subset}/{epoch}"
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
        documents = Documents(entry.first, entry.documents, entry.tokens, key)
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


class TrainingData:
    """The blend: sample number -> tokens, which depends only on the seed."""

    def __init__(
        self,
        manifest: Manifest,
        weights: str | dict[str, float],
        context: int,
        seed: int,
        samples: int,
        vocabulary_size: int = 0,
    ) -> None:
        """
        Args:
            vocabulary_size: of the model, if it is larger than the manifest's.
        """
        size = max(manifest.vocabulary_size, vocabulary_size)
        self.shares = blend_weights(manifest, weights)
        by_name = {entry.subset: entry for entry in manifest.split("train")}
        subsets = [
            PackedSubset(by_name[name], manifest, context, size)
            if by_name[name].packed
            else EpochedSubset(by_name[name], manifest, context, seed, size)
            for name in self.shares
        ]
        self._blend = index_classes().BlendedDataset(
            subsets,
            list(self.shares.values()),
            samples,
            SimpleNamespace(path_to_cache=None, defer_npy_index_mmap=False),
        )

    def __len__(self) -> int:
        return len(self._blend)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of sample ``index``, each ``[context]`` int64."""
        sample = self._blend[index]
        return sample["tokens"].numpy(), sample["labels"].numpy()


# --- held-out documents ---------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """One document to score."""

    subset: str
    tokens: np.ndarray
    """The tokens without the end-of-document token."""
    bytes: int
    hash: int


def held_out(
    manifest: Manifest, split: str, limit: int | None = None, vocabulary_size: int = 0
) -> list[HeldOut]:
    """The documents of a split, or a fixed sample of them.

    The sample is the ``limit`` documents whose text hashes are smallest: random, but the same
    for every run, tokenizer and order of the sources.
    """
    chosen: list[tuple[int, Entry, int, int]] = []
    entries = manifest.split(split)
    for entry in entries:
        file = entry.path(".docs.npy")
        if entry.index:
            file = manifest.path / entry.index
        verify(file, entry.files)
        try:
            documents = load_documents(file)
        except (OSError, ValueError):
            raise DataError(f"{file}: missing or damaged; tokenise again") from None
        order = np.argsort(documents["hash"], kind="stable")[:limit]
        chosen += [
            (int(documents["hash"][i]), entry, int(i), int(documents["bytes"][i])) for i in order
        ]
    if limit is not None:
        chosen = sorted(chosen, key=lambda item: (item[0], item[1].subset))[:limit]
    size = max(manifest.vocabulary_size, vocabulary_size)
    readers = {entry.subset: open_indexed(entry, manifest.dtype, size) for entry in entries}
    return [
        HeldOut(
            entry.subset,
            _without_eod(readers[entry.subset].get(entry.first + i), manifest.eod),
            size,
            digest,
        )
        for digest, entry, i, size in sorted(chosen, key=lambda item: (item[1].subset, item[2]))
    ]


def _without_eod(tokens: np.ndarray, eod: int) -> np.ndarray:
    """A copy without the end-of-document token (Megatron's view ends with its reader)."""
    stop = len(tokens) - 1 if len(tokens) and tokens[-1] == eod else len(tokens)
    return np.array(tokens[:stop])
