"""Files of sources and what came of them, for the tests of the data pipeline."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_pipeline.dataset import held_out
from data_pipeline.manifest import load_manifest
from data_pipeline.readers import WINDOW_MB, line_blocks
from data_pipeline.records import Fields, RecordBlock
from data_pipeline.sources import Source, find_sources
from data_pipeline.tokenizer import load_tokenizer

Used = Counter[tuple[str, str, str]]
"""(split, subset, text)"""


def used(folder: Path) -> Used:
    """The decoded documents of a tokenised folder."""
    manifest = load_manifest(folder)
    decode = load_tokenizer(manifest.tokenizer).decode
    return Counter(
        (split, one.subset, decode(one.tokens.tolist()))
        for split in {entry.split for entry in manifest.entries}
        for one in held_out(manifest, split)
    )


def lines(texts: list[str], subset: str = "Wiki") -> bytes:
    records = ({"text": text, "meta": {"pile_set_name": subset}} for text in texts)
    return "".join(json.dumps(one) + "\n" for one in records).encode()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def in_small_blocks(place: Path, block_bytes: int) -> list[Source]:
    """The sources of lines in a file or folder, read in blocks of this size."""

    def small(source: Source) -> Source:
        def blocks(_: Fields) -> Iterator[RecordBlock]:
            assert source.path is not None
            return line_blocks(source.path, WINDOW_MB, block_bytes)

        return replace(source, blocks=blocks)

    return [small(source) for source in find_sources([str(place)])]


TEXTS = [f"Text {i} é" for i in range(30)]

STRUCT = [{"pile_set_name": "Wiki"}] * 30
