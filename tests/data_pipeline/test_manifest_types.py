"""``manifest.json`` with a value of another type at any place: one line that names the place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.manifest import load_manifest
from data_pipeline.records import DataError

ODD: tuple[Any, ...] = (None, True, -1, 1.5, "x", [], {}, [None], {"a": 1}, 10**40)
READ = ("tokenizer", "entries", "dtype", "malformed", "files", "left_out")
"""Keys that `load_manifest` uses; the others identify a folder to who made it."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value; of a list only the first item."""
    if path:
        yield path
    parts: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        parts = list(value.items())
    elif value and isinstance(value, list):
        parts = [(0, value[0])]
    for key, part in parts:
        yield from places(part, (*path, key))


def test_a_value_of_another_type(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    text = (folder / "manifest.json").read_text()
    refused = 0
    for path in places(json.loads(text)):
        if path[0] not in READ:
            continue
        for odd in ODD:
            values = json.loads(text)
            del values["checksum"]
            part = values
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = odd
            (folder / "manifest.json").write_text(json.dumps(values))
            try:
                manifest = load_manifest(folder)
            except DataError as error:
                assert "manifest.json: not a manifest" in str(error) and "\n" not in str(error)
                refused += 1
            else:  # the type fits: then the sums can be made
                assert odd is not None and type(odd) is not float, (path, odd)
                assert (odd is True) == (path[1:2] == ("special",) and len(path) > 2)
                assert sum(entry.tokens + entry.documents for entry in manifest.entries) >= 0
    assert refused > 100


def test_a_key_that_is_missing(data: Path, tmp_path: Path) -> None:
    text = (data / "manifest.json").read_text()
    for key in ("tokenizer", "entries", "dtype", "malformed"):
        values = json.loads(text)
        del values["checksum"], values[key]
        (tmp_path / "manifest.json").write_text(json.dumps(values))
        with pytest.raises(DataError, match=key):
            load_manifest(tmp_path)
