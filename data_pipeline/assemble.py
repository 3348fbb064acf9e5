"""Makes the finished folder: joins parts into one pair per split and subset, writes the
manifest."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.checksums import Checksums
from data_pipeline.disk import naming
from data_pipeline.encode import EncodingSettings, Key, token_type
from data_pipeline.files import write_aside, write_synced
from data_pipeline.index_file import write_index
from data_pipeline.manifest import MANIFEST, manifest_values
from data_pipeline.part_file import PartPiece, joined
from data_pipeline.parts import WHOLE, Parts
from data_pipeline.records import ChoiceError, without_text
from data_pipeline.sources import sha256_of
from data_pipeline.splits import SPLITS
from data_pipeline.strict_json import to_json
from data_pipeline.tokenizer import Tokenizer, find_tokenizer

_ENDINGS = (".bin", ".idx", ".docs.npy", ".crc")
_RESERVED = re.compile(r"con|prn|aux|nul|com\d|lpt\d")
"""Names that Windows reserves for devices, in upper or lower case."""
_LONGEST = 80


def check_free(out: Path, settings: EncodingSettings) -> None:
    """Check before the work that the results will not overwrite other files.

    Raises:
        DataError: naming the file in the way.
    """
    name, source = tokenizer_file(settings)
    mine = out / name
    taken = [mine] if mine.exists() and sha256_of(mine) != sha256_of(source) else []
    taken += [out / split for split in SPLITS if _holds_something(out / split)]
    if taken:
        raise ChoiceError(
            f"{taken[0]}: already exists and was not made by this command; choose another --out or "
            "move it"
        )


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else os.path.lexists(path)


def tokenizer_file(settings: EncodingSettings) -> tuple[str, Path]:
    """The tokenizer's name in the folder, and the file that it is copied from."""
    source = find_tokenizer(settings.tokenizer_path)
    return f"tokenizer{'.json' if source.suffix == '.json' else '.model'}", source


def assemble(
    state: Parts, settings: EncodingSettings, tokenizer: Tokenizer, left_out: list[str]
) -> dict[str, Any]:
    """Join the parts and write the manifest as the last file.

    Raises:
        DataError: if there is no document, or another file is in the way.
    """
    where: dict[Key, list[PartPiece]] = {}
    for piece in state.pieces():
        where.setdefault(piece.key, []).append(piece)
    if not where:
        text = f"no usable document in {len(state.sources)} source(s)"
        raise without_text(text, state.shown[0] if state.shown else "")
    names = file_names({subset for _, subset in where})
    prefixes = {key: f"{key[0]}/{names[key[1]]}" for key in sorted(where)}
    state.will_make([prefix + end for prefix in prefixes.values() for end in _ENDINGS])
    (state.folder / WHOLE).mkdir(exist_ok=True)
    dtype = token_type(tokenizer.vocabulary_size)
    entries: list[dict[str, Any]] = []
    files: dict[str, str] = {}
    for key, prefix in prefixes.items():
        entries.append(_join(state, key, prefix, where[key], dtype, files))
    name, source = tokenizer_file(settings)
    if not (state.out / name).exists():
        write_aside(state.out / name, source.read_bytes())
    files[name] = sha256_of(state.out / name)
    described = [
        {
            "name": origin.name,
            "size": origin.stamp[0],
            "sha256": origin.sha256,
            "split": origin.split,
            "stamp": origin.stamp,
            "documents": origin.documents,
            "malformed": origin.malformed,
        }
        for origin in state.sources
    ]
    manifest = manifest_values(
        name, tokenizer, dtype.__name__, entries, state.malformed, described, state.identity,
        files, left_out, asdict(settings.special), state.account.values(),
    )  # fmt: skip
    write_aside(state.out / MANIFEST, to_json(manifest, indent=1).encode())
    shutil.rmtree(state.folder)
    return manifest


def _join(
    state: Parts, key: Key, prefix: str, pieces: list[PartPiece], dtype: Any, files: dict[str, str]
) -> dict[str, Any]:
    """Join one pair and its other files, add their hashes to ``files``, and return its entry."""
    aside = state.folder / WHOLE
    checksums, digest = Checksums(), hashlib.sha256()
    with naming(aside / "x.bin"), (aside / "x.bin").open("wb") as file:
        for piece in pieces:
            for data in piece.tokens.pieces():
                file.write(data)
                checksums.update(data)
                digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    all_lengths, all_documents = joined(pieces)
    write_index(aside / "x.idx", all_lengths, dtype)
    with naming(aside / "x.docs.npy"):
        np.save(aside / "x.docs.npy", all_documents)
    write_synced(aside / "x.crc", checksums.values().tobytes())
    (state.out / prefix).parent.mkdir(parents=True, exist_ok=True)
    for end in _ENDINGS:
        built = aside / f"x{end}"
        files[prefix + end] = digest.hexdigest() if end == ".bin" else sha256_of(built)
        os.replace(built, state.out / (prefix + end))
    return {
        "split": key[0],
        "subset": key[1],
        "prefix": prefix,
        "documents": len(all_documents),
        "tokens": int(all_lengths.sum(dtype=np.int64)),
        "bytes": int(all_documents["bytes"].sum()),
    }


def file_names(subsets: Iterable[str]) -> dict[str, str]:
    """A file name for each subset; no two differ only in upper and lower case."""
    hashed = dict.fromkeys(sorted(subsets), 0)
    while True:
        names = {subset: _file_name(subset, length) for subset, length in hashed.items()}
        count = Counter(name.lower() for name in names.values())
        same = [subset for subset, name in names.items() if count[name.lower()] > 1]
        if not same:
            return names
        for subset in same:
            hashed[subset] += 12


def _file_name(subset: str, hash_length: int) -> str:
    slug = re.sub(r"[^A-Za-z0-9]+", "_", subset).strip("_")
    as_it_is = slug == subset.replace(" ", "_").replace("-", "_")
    if not as_it_is or not slug or len(slug) > _LONGEST or _RESERVED.fullmatch(slug.lower()):
        hash_length = max(12, hash_length)
    if hash_length:
        slug = f"{slug[:_LONGEST]}_{hashlib.sha256(subset.encode()).hexdigest()[:hash_length]}"
    return slug
