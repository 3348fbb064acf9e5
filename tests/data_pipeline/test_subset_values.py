"""What a record may have for a subset: names and whole numbers; all else is named, not replaced."""

from __future__ import annotations

import json
from typing import Any

import pytest

from data_pipeline.records import Fields, RecordBlock, parse_block

ABSENT = object()
NAMES = {"text": "Wiki", "zero": 0, "number": 7, "negative": -3, "large": 2**70}
NONE = {"absent": ABSENT, "null": None, "empty": ""}
WRONG = {"true": True, "false": False, "float": 0.5, "list": ["A", "B"], "object": {"a": 1}}


def block_of(value: Any, as_row: bool) -> RecordBlock:
    meta = {} if value is ABSENT else {"pile_set_name": value}
    record: Any = {"text": "some text", "meta": meta}
    return RecordBlock("a.jsonl", 1, [record if as_row else json.dumps(record).encode()])


@pytest.mark.parametrize("as_row", [True, False])
@pytest.mark.parametrize("default", [None, "misc"])
@pytest.mark.parametrize("kind", [*NAMES, *NONE, *WRONG])
def test_a_subset_is_kept_or_named(kind: str, default: str | None, as_row: bool) -> None:
    value = {**NAMES, **NONE, **WRONG}[kind]
    parsed = parse_block(block_of(value, as_row), Fields(default_subset=default))
    if kind in NAMES:
        assert [one.subset for one in parsed.documents] == [str(value)]
    elif kind in NONE and default:
        assert [one.subset for one in parsed.documents] == [default]
    else:
        assert not parsed.documents and parsed.problems[0].startswith("a.jsonl:1: ")
        assert ("no subset" if kind in NONE else "is not a name") in parsed.problems[0]
