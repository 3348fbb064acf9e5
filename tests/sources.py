"""Files of sources and what came of them, for the tests of the data pipeline."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from data_pipeline.dataset import held_out
from data_pipeline.manifest import load_manifest
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


TEXTS = [f"Text {i} é" for i in range(30)]

STRUCT = [{"pile_set_name": "Wiki"}] * 30
