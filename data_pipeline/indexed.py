"""Megatron's datasets of tokenised files, opened after checks that give one-line errors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from data_pipeline.bounded import BoundedReader
from data_pipeline.checksums import CheckedReader, read_checksums, verify
from data_pipeline.index_file import Header, read_header
from data_pipeline.light_imports import import_light
from data_pipeline.manifest import Entry
from data_pipeline.shared_indices import shared_arrays
from data_pipeline.sources import DataError


@cache
def index_classes() -> Any:
    """Import Megatron's dataset classes late (it takes 1 s) and without their warnings."""
    parts = ("indexed_dataset", "gpt_dataset", "utils", "helpers_cpp")
    try:
        indexed, gpt, utils, helpers = import_light(
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
        blending_indices=helpers.build_blending_indices,
        normalize=utils.normalize,
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
            return shared_arrays(digest, 4 * len(documents.places) + 12 * samples, build)

    return GPTDataset


@dataclass(frozen=True)
class Documents:
    """Some documents of an entry, by their numbers in the file."""

    places: range
    tokens: int
    """About how many they have."""
    key: str
    """The file, its state, and which documents of it these are."""

    def numbers(self) -> np.ndarray:
        """``[len(places)]`` int32."""
        return np.arange(self.places.start, self.places.stop, self.places.step, dtype=np.int32)


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
