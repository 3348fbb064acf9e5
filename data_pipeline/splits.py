"""Decides which split the name of a source means.

A name means a split if it is the split's word, alone or with shard numbers (``train``,
``test-00000-of-00007``), or ends with it (``wiki-test``). A word elsewhere in a name
(``unit-test-code``) means a split only if another source has the same name with another split's
word in that place. The innermost part of a path decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "val": "val",
    "valid": "val", "validation": "val", "dev": "val",
}  # fmt: skip
_NEUTRAL = re.compile(
    r"\d+|of|part|parts|shard|chunk|file|set|split|data|[a-z]?\d+|(?=.*\d)[0-9a-f]{4,}"
)
"""Words next to a split's word that mean nothing: shard numbers, hashes of their writers."""


@dataclass(frozen=True)
class Place:
    """The path of a source."""

    parts: tuple[str, ...]
    """Parts of its absolute path; the last one is its name without the suffix."""
    first_part: int
    """Index of the first part that counts by itself: the last part of the given path."""


@dataclass(frozen=True)
class _Candidate:
    index: int
    split: str
    kind: str
    """whole, last, or the other words of the name, with a gap for the split's word."""


def splits_of(places: list[Place]) -> tuple[list[str | None], list[int]]:
    """The split that each source's place means, or None.

    Returns:
        (split of each source, numbers of the sources with a split's word that means no split).
    """
    by_place = [list(_candidates(place)) for place in places]
    splits_by_key: dict[tuple[object, ...], set[str]] = {}
    for place, candidates in zip(places, by_place, strict=True):
        for candidate in candidates:
            splits_by_key.setdefault(_key(place, candidate), set()).add(candidate.split)
    splits: list[str | None] = []
    passed = []
    for number, (place, candidates) in enumerate(zip(places, by_place, strict=True)):
        taken = next(
            (
                candidate.split
                for candidate in candidates
                if len(splits_by_key[_key(place, candidate)]) > 1 or _counts_alone(place, candidate)
            ),
            None,
        )
        splits.append(taken)
        if taken is None and any(candidate.index >= place.first_part for candidate in candidates):
            passed.append(number)
    return splits, passed


def _candidates(place: Place) -> Iterator[_Candidate]:
    """The words of splits in a path, innermost part first."""
    for index in range(len(place.parts) - 1, -1, -1):
        words = [w for w in re.split(r"[^a-z0-9]+", place.parts[index].lower()) if w]
        telling = [w.rstrip("0123456789") for w in words if not _NEUTRAL.fullmatch(w)]
        telling = [word for word in telling if not _NEUTRAL.fullmatch(word)]
        where = [i for i, word in enumerate(telling) if word in SPLIT_WORDS]
        if len({SPLIT_WORDS[telling[i]] for i in where}) != 1:
            continue  # none, or several: a name such as train-test means neither
        last = where[-1]
        if len(telling) == 1:
            kind = "whole"
        elif last == len(telling) - 1:
            kind = "last"
        else:
            kind = "-".join(["", *telling[:last], "*", *telling[last + 1 :]])
        yield _Candidate(index, SPLIT_WORDS[telling[last]], kind)


def _counts_alone(place: Place, candidate: _Candidate) -> bool:
    if candidate.kind == "whole":  # the folder of a file that was given counts too
        return candidate.index >= min(place.first_part, len(place.parts) - 2)
    return candidate.kind == "last" and candidate.index >= place.first_part


def _key(place: Place, candidate: _Candidate) -> tuple[object, ...]:
    """A key that is equal for sources whose paths, up to this part, differ only in the split's
    word."""
    return (candidate.index, place.parts[: candidate.index], candidate.kind)
