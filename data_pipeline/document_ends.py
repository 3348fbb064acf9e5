"""Checks that documents end with the end-of-document token, where attention depends on it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from data_pipeline.indexed import open_indexed
from data_pipeline.manifest import Entry, Manifest
from data_pipeline.sources import ChoiceError

_LOOKED_AT = 1000
"""Documents of a subset that are looked at, evenly spaced."""


def check_document_ends(manifest: Manifest, subsets: Iterable[str]) -> None:
    """Refuse subsets in which a document does not end with the end-of-document token.

    Folders that `pretrain data tokenize` wrote have it everywhere. Adopted tokens are of any kind;
    samples that are packed already must contain it somewhere.

    Raises:
        DataError: naming the subset and what to do.
    """
    names = set(subsets)
    for entry in manifest.split("train"):
        if entry.subset in names and entry.file_documents:
            _check(entry, manifest)


def _check(entry: Entry, manifest: Manifest) -> None:
    indexed = open_indexed(entry, manifest.dtype, manifest.vocabulary_size)
    count = min(entry.documents, _LOOKED_AT)
    numbers = entry.first + np.linspace(0, entry.documents - 1, count).astype(np.int64)
    if entry.packed:
        without = all(manifest.eod not in indexed.get(int(number)) for number in numbers)
        found = f"none of {count} samples looked at contains"
    else:
        ends = [indexed.get(int(number))[-1:] for number in numbers]
        open_ended = sum(1 for end in ends if manifest.eod not in end)
        without = open_ended > 0
        found = f"{open_ended} of {count} documents looked at do not end with"
    if without:
        raise ChoiceError(
            f"data.attention: within: {entry.subset}: {found} token {manifest.eod}, so it is not "
            "known where documents end; use across, or tokenise the texts with this program"
        )
