"""Tokenised folders: training blends and held-out documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.blend import Blend
from data_pipeline.checksums import load_documents, verify
from data_pipeline.indexed import open_indexed
from data_pipeline.manifest import Entry, Manifest
from data_pipeline.pile import PILE_WEIGHTS
from data_pipeline.sources import ChoiceError, DataError
from data_pipeline.subsets import EpochedSubset, PackedSubset

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
        self._blend = Blend(subsets, list(self.shares.values()), samples)

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
