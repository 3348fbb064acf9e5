"""What a stranger may put into the place of a file, by the format that a reader expects there.

Nothing large is written: holes, links, and small files that unpack to giants.
"""

from __future__ import annotations

import gzip
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard

from pretrain.checkpoint.manifest import SEAL, sealed

Bomb = Callable[[Path], None]
"""Puts itself into the place of a file, whose bytes it may read first."""

GIANT = 6 << 30
"""Bytes of holes."""


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def hole(path: Path) -> None:
    """Nothing but zeros."""
    path.write_bytes(b"")
    os.truncate(path, GIANT)


def tail(path: Path) -> None:
    """A whole file with zeros behind it, on one line."""
    os.truncate(path, path.stat().st_size + (GIANT))


def line(path: Path) -> None:
    """Behind a whole file one line of nearly 2 GiB."""
    os.truncate(path, 1 << 31)


def deep(path: Path) -> None:
    path.write_text("[" * 200_000)


def digits(path: Path) -> None:
    path.write_text('{"version": ' + "9" * 100_000 + "}")


def aliases(path: Path) -> None:
    """Ten times ten times ...: 10^9 words in a few hundred bytes."""
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 9):
        text += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    path.write_text(text)


def merges(path: Path) -> None:
    """The same with mappings that are merged."""
    text = "a0: &a0 {x: 1}\n"
    for level in range(1, 25):
        text += f"a{level}: &a{level} {{<<: [*a{level - 1}, *a{level - 1}], y{level}: 1}}\n"
    path.write_text(text)


def aliases_in_place(path: Path) -> None:
    """The alias bomb as a value of a key that is known."""
    tree = yaml.safe_load(path.read_text())
    key = next(iter(tree))
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 9):
        bomb += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    rest = {name: value for name, value in tree.items() if name != key}
    path.write_text(
        f"{yaml.safe_dump(rest)}\n{key}:\n" + "".join(f"  {x}\n" for x in bomb.splitlines())
    )


def header(path: Path) -> None:
    """A safetensors file whose header would take 2^40 bytes."""
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{")
    os.truncate(path, GIANT)


def shapes(path: Path) -> None:
    """A safetensors file whose first tensor would have 2^40 elements."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + size])
    first = next(name for name in head if name != "__metadata__")
    head[first]["shape"] = [1 << 20, 1 << 20]
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def counts(path: Path) -> None:
    """An index of 2^40 sequences."""
    data = path.read_bytes()
    path.write_bytes(data[:18] + struct.pack("<QQ", 1 << 40, (1 << 40) + 1) + data[34:])


def rows(path: Path) -> None:
    """A table of 200 million rows, all alike, in a few KB."""
    table = pq.read_table(path).slice(0, 1)
    many = table.take(pa.array([0] * 1_000_000, pa.int32()))
    with pq.ParquetWriter(path, many.schema, compression="zstd") as writer:
        writer.write_table(many, row_group_size=1_000_000)


def texts(path: Path) -> None:
    """A table whose texts are one of 3 MB, which stands in the file once."""
    table = pq.read_table(path)
    count = 1050
    columns = {}
    for name in table.column_names:
        one = table.column(name).slice(0, 1)
        if pa.types.is_string(one.type):
            columns[name] = pa.DictionaryArray.from_arrays(
                pa.array([0] * count, pa.int32()), pa.array(["x" * 3_000_000])
            )
        else:
            columns[name] = one.take(pa.array([0] * count, pa.int32()))
    pq.write_table(pa.table(columns), path, compression="zstd", store_schema=False,
                   dictionary_pagesize_limit=1 << 30)  # fmt: skip


def numbers(path: Path) -> None:
    """Every number is 10^12."""
    _write(path, _replaced(json.loads(path.read_text()), ""))


def number_at(key: str) -> Bomb:
    """One key's numbers are 10^12, wherever it stands."""

    def bomb(path: Path) -> None:
        _write(path, _replaced(json.loads(path.read_text()), key))

    bomb.__name__ = f"number_at_{key}"
    return bomb


def _replaced(value: Any, key: str, inside: bool = False) -> Any:
    if isinstance(value, dict):
        return {
            name: part if name == "version" else _replaced(part, key, name == key)
            for name, part in value.items()
        }
    if isinstance(value, list):
        return [_replaced(part, key, inside) for part in value]
    chosen = inside or not key
    return 10**12 if chosen and isinstance(value, int) and not isinstance(value, bool) else value


def _write(path: Path, tree: Any) -> None:
    """The tree, with the seal that who changed it would put on it."""
    if isinstance(tree, dict):
        tree.pop("checksum", None)
    if isinstance(tree, dict) and tree.pop(SEAL, None):
        path.write_bytes(sealed(tree))
    else:
        path.write_text(json.dumps(tree))


def packed(path: Path) -> None:
    """Archives of 3 GiB of one line, as members or frames of 16 MiB each; else the line's start."""
    piece = b"x" * (16 << 20)
    packers: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".zst": zstandard.compress,
    }
    if path.suffix in packers:
        path.write_bytes(packers[path.suffix](piece) * 192)
    else:
        path.write_bytes(piece[: 1 << 20])


ANY: tuple[Bomb, ...] = (pipe, device, loop, hole, tail)
KINDS: dict[str, tuple[Bomb, ...]] = {
    "yaml": (*ANY, deep, aliases, merges, aliases_in_place),
    "json": (*ANY, deep, digits, numbers),
    "config": (
        *ANY,
        deep,
        digits,
        numbers,
        *map(
            number_at,
            (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "vocab_size",
                "max_position_embeddings",
            ),
        ),
    ),
    "manifest": (
        *ANY,
        deep,
        digits,
        numbers,
        *map(
            number_at,
            (
                "hidden_size",
                "num_layers",
                "num_attention_heads",
                "vocabulary_size",
                "context",
                "step",
                "steps",
                "shape",
                "size",
                "layer",
                "tensor",
                "fragments",
            ),
        ),
    ),
    "jsonl": (*ANY, line),
    "binary": ANY,
    "index": (*ANY, counts),
    "safetensors": (*ANY, header, shapes),
    "parquet": (*ANY, rows, texts),
    "source": (*ANY, packed),
}
