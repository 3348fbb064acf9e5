"""Uses tokens that Megatron-LM or GPT-NeoX prepared without copying them; writes only a manifest.

Their ``.bin/.idx`` pairs have the format of this pipeline. A manifest adds what they lack: the
tokenizer, the held-out documents, and the bytes of text in these. Sequences of one length (the
preshuffled Pile of Pythia) are taken as samples, in the order of the file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.account import share, why_lossy
from data_pipeline.assemble import file_names
from data_pipeline.disk import naming
from data_pipeline.encode import DOCUMENT_TYPE, hash_text
from data_pipeline.files import read_tokenizer, write_aside
from data_pipeline.indexed import index_classes
from data_pipeline.json_tokenizer import HuggingFaceTokenizer, ask_library, check_ids
from data_pipeline.manifest import MANIFEST, manifest_values
from data_pipeline.pairs import Looked, Pair, look_at_all, read_pair
from data_pipeline.records import ChoiceError, DataError
from data_pipeline.sources import sha256_of
from data_pipeline.strict_json import to_json
from data_pipeline.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

_SPLITS = ("train", "val", "test")


def adopt(
    prefixes: list[Path],
    tokenizer_path: Path,
    out: Path,
    shares: tuple[float, float, float] = (98.0, 1.0, 1.0),
    names: list[str] | None = None,
    eod_token: str | None = None,
    packed: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write a manifest for pairs that stay where they are.

    Args:
        prefixes: of the pairs; each is a subset.
        tokenizer_path: ``tokenizer.json``, a SentencePiece model, or GPT-2's ``vocab.json`` with
            ``merges.txt`` beside it.
        shares: of documents in train, val and test, by their order (Megatron's ``--split``).
        names: of the subsets; default the prefixes' names.
        packed: each sequence is a sample; None: if all have the same length.

    Returns:
        What to know about the data, one line each.

    Raises:
        DataError: one line that names the culprit.
    """
    if out.exists() and any(out.iterdir()):
        raise ChoiceError(f"{out}: not empty; choose another --out")
    pairs = [read_pair(prefix.absolute()) for prefix in prefixes]
    types = {pair.dtype for pair in pairs}
    if len(types) > 1:
        raise DataError(f"the pairs have tokens of different types ({', '.join(sorted(types))})")
    names = names or [pair.prefix.name.removesuffix("_text_document") for pair in pairs]
    if len(set(names)) != len(pairs):
        raise ChoiceError(f"--name: {', '.join(names)} are not {len(pairs)} different names")
    stems = file_names(names)
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        file, tokenizer = _take_tokenizer(tokenizer_path, out, eod_token)
        notes: list[str] = []
        entries: list[dict[str, Any]] = []
        files: dict[str, str] = {file.name: sha256_of(file)}
        for number, (name, pair) in enumerate(zip(names, pairs, strict=True)):
            as_samples = bool(pair.packed) if packed is None else packed
            if as_samples and not pair.packed:
                raise ChoiceError(f"{pair.prefix}: --packed, but its sequences differ in length")
            indexed = index_classes().IndexedDataset(str(pair.prefix), multimodal=False, mmap=True)
            looked = look_at_all(pair, tokenizer, progress)
            notes += _told(pair, looked, tokenizer, as_samples)
            checksums = f"checksums/{number}.crc"
            write_aside(out / checksums, looked.checksums.values().tobytes())
            files[checksums] = sha256_of(out / checksums)
            files[str(pair.path(".idx"))] = sha256_of(pair.path(".idx"))
            parts = _parts(pair, shares)
            for split, (start, stop) in parts.items():
                where = f"{split}/{stems[name]}"
                entry = _entry(pair, split, name, where, start, stop, as_samples)
                entry["checksums"] = checksums
                if split != "train":
                    entry["bytes"] = _measure(
                        indexed, tokenizer, out / f"{where}.docs.npy", start, stop, progress
                    )
                    files[entry["index"]] = sha256_of(out / entry["index"])
                entries.append(entry)
        lossy = why_lossy(tokenizer)
        if lossy and any(entry["split"] != "train" for entry in entries):
            notes.append(
                f"{tokenizer_path.name} does not reproduce every text ({lossy}): the bytes of "
                "held-out documents, and so bits per byte, are those of the decoded text, not of "
                "the original"
            )
        lying = [str(pair.prefix) for pair in pairs]
        sources = [{"name": name, "size": 0, "sha256": None} for name in lying]
        manifest = manifest_values(
            file.name,
            tokenizer,
            pairs[0].dtype,
            entries,
            0,
            sources,
            {"adopted": lying},
            files,
        )
        write_aside(out / MANIFEST, to_json(manifest, indent=1).encode())
        return notes
    except BaseException:
        if is_new:
            shutil.rmtree(out, ignore_errors=True)
        raise


def _parts(pair: Pair, shares: tuple[float, float, float]) -> dict[str, tuple[int, int]]:
    """First and last sequence of each split; a document of several sequences is in one split."""
    if min(shares) < 0 or shares[0] <= 0:
        raise ChoiceError(f"--split: {shares} are not shares, the first above 0")
    count, total = len(pair.bounds) - 1, sum(shares)
    edges = [0]
    for share_of in shares:
        edges.append(min(count, edges[-1] + round(count * share_of / total)))
    edges[-1] = count
    starts = [int(pair.bounds[edge]) for edge in edges]
    parts = {split: (starts[i], starts[i + 1]) for i, split in enumerate(_SPLITS)}
    return {split: part for split, part in parts.items() if part[1] > part[0]}


def _entry(
    pair: Pair, split: str, name: str, where: str, start: int, stop: int, packed: bool
) -> dict[str, Any]:
    return {
        "split": split,
        "subset": name,
        "prefix": str(pair.prefix),
        "documents": stop - start,
        "tokens": int(pair.lengths[start:stop].sum(dtype=np.int64)),
        "bytes": 0,
        "first": start,
        "file_documents": len(pair.lengths),
        "file_tokens": pair.tokens,
        "packed": pair.packed if packed else 0,
        "index": f"{where}.docs.npy" if split != "train" else "",
    }


def _told(pair: Pair, looked: Looked, tokenizer: Tokenizer, packed: bool) -> list[str]:
    """What the tokens show about tokenizer and packing, one line each."""
    count, name = len(pair.lengths), pair.prefix.name
    notes = []
    if looked.unknown:
        notes.append(
            f"{name}: {looked.unknown:,} of {pair.tokens:,} tokens are unknown "
            f"({share(looked.unknown, pair.tokens)}): the vocabulary does not fit this text"
        )
    if packed:
        return [
            f"{name}: {count:,} samples of {pair.packed} tokens, taken in their order: "
            f"train with model.context {pair.packed - 1}",
            *notes,
        ]
    if len(pair.bounds) - 1 != count:
        notes.append(
            f"{name}: {len(pair.bounds) - 1:,} documents of {count:,} sequences; each sequence is "
            "used as a document, and no document is in two splits"
        )
    if looked.eod_inside:
        notes.append(
            f"{name}: {looked.eod_inside:,} end-of-document tokens inside documents: the model "
            "will treat them as ends"
        )
    if not looked.ended:
        return [
            f"{name}: no document ends with token {tokenizer.eod}; if documents are "
            "not separated, the model learns across them (name the token with --eod-token)",
            *notes,
        ]
    return [f"{name}: {count:,} documents ({looked.ended} of {count} looked at end in eod)", *notes]


def _measure(
    indexed: Any,
    tokenizer: Tokenizer,
    path: Path,
    start: int,
    stop: int,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Write the bytes and hash of the text of held-out documents, and return the bytes."""
    rows = np.zeros(stop - start, dtype=DOCUMENT_TYPE)
    for number in range(start, stop):
        tokens = [int(token) for token in indexed.get(number)]
        if tokens and tokens[-1] == tokenizer.eod:
            tokens.pop()
        text = tokenizer.decode(tokens).encode()
        rows[number - start]["bytes"] = len(text)
        rows[number - start]["hash"] = hash_text(text)
        if progress:
            progress(number - start + 1, stop - start)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        np.save(path, rows)
    return int(rows["bytes"].sum())


def _take_tokenizer(path: Path, out: Path, eod_token: str | None) -> tuple[Path, Tokenizer]:
    """Copy the tokenizer into the folder; GPT-2's two files become one."""
    merges = path.with_name(path.name.replace("vocab.json", "merges.txt"))
    if path.name.endswith("vocab.json") and merges.is_file():
        target = out / "tokenizer.json"
        with naming(target):
            target.write_text(_byte_level(path, merges, eod_token), encoding="utf-8")
        return target, HuggingFaceTokenizer(target, eod_token)
    path = find_tokenizer(path)
    load_tokenizer(path, eod_token)  # reports what is wrong before anything is copied
    target = out / ("tokenizer.json" if path.suffix == ".json" else "tokenizer.model")
    with naming(target):
        shutil.copyfile(path, target)
    return target, load_tokenizer(target, eod_token)


def _byte_level(vocabulary: Path, merges: Path, eod_token: str | None) -> str:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    read_tokenizer(merges)  # refuses a file that is too large to read
    wrong = f"{vocabulary}: not GPT-2's vocabulary"
    check_ids(ask_library(lambda: json.loads(read_tokenizer(vocabulary)), wrong), wrong)
    bpe = ask_library(
        lambda: tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges))), wrong
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([eod_token or "<|endoftext|>"])
    return str(bpe.to_str())
