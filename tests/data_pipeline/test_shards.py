"""Several machines tokenise parts of the sources: the result is that of one, byte for byte."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import part_file
from data_pipeline.encode import DOCUMENT_TYPE, Encoded, EncodingSettings
from data_pipeline.part_file import read_part, write_part
from data_pipeline.records import DataError
from data_pipeline.shards import SHARDS, Shard, parse_shard, sources_of
from data_pipeline.sources import Source
from data_pipeline.tokenize import tokenize
from tests.data_pipeline.test_data import tree
from tests.sources import in_small_blocks
from tests.tools import assert_one_line, run

pytestmark = pytest.mark.slow


class StopError(Exception):
    """An interruption."""


def made(
    corpus: Path, tokenizer: Path, out: Path, shard: str = "", after: int = 0, **more: Any
) -> Any:
    """A tokenisation, or one shard, that is interrupted after some blocks if ``after`` is set."""
    seen = 0

    def count(size: int, documents: int) -> None:
        nonlocal seen
        seen += 1
        if after and seen > after:
            raise StopError

    settings = EncodingSettings(tokenizer, **more)
    return tokenize(
        in_small_blocks(corpus, 4000), settings, out, 1, count, 6000,
        shard=parse_shard(shard) if shard else None,
    )  # fmt: skip


@pytest.mark.parametrize("count", [*(pytest.param(n, marks=pytest.mark.long) for n in (1, 2)), 3])
def test_shards_are_byte_for_byte_one_tokenisation(
    count: int, corpus: Path, tokenizer: Path, data: Path, tmp_path: Path
) -> None:
    """In any order, interrupted, and joined by a command that is interrupted too."""
    out, words = tmp_path / "out", [f"{number}/{count}" for number in range(count, 0, -1)]
    for word in words:
        for after in (2, 4):
            try:
                made(corpus, tokenizer, out, word, after)
            except StopError:
                continue
        report = made(corpus, tokenizer, out, word)
        assert report.shard == parse_shard(word) and not report.manifest
        assert not (out / "manifest.json").exists() and not (out / "train").exists()
    assert made(corpus, tokenizer, out, words[0]).resumed  # nothing is left to do
    join = os.replace
    stopped: list[Any] = []

    def fail(source: Any, target: Any) -> None:
        if str(target).endswith(".crc") and not stopped:
            stopped.append(target)
            raise StopError
        join(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.assemble.os.replace", fail)
        with pytest.raises(StopError):
            made(corpus, tokenizer, out)
    assert made(corpus, tokenizer, out).manifest
    assert tree(out) == tree(data)
    assert made(corpus, tokenizer, out, words[0]).already_done


def test_what_is_not_whole_is_named(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(corpus, tokenizer, out, "1/3")
    with pytest.raises(DataError, match=r"shard 2, 3 of 3 is missing.*--shard 2/3"):
        made(corpus, tokenizer, out)
    made(corpus, tokenizer, out, "2/3")
    smallest = next(n for n in (1, 2, 3) if sources_of(Shard(n, 3), in_small_blocks(corpus, 1)))
    assert smallest == 1
    with pytest.raises(StopError):
        made(corpus, tokenizer, out, "3/3", 1)
    with pytest.raises(DataError, match=r"shard 3 of 3 is not finished .*--shard 3/3"):
        made(corpus, tokenizer, out)
    made(corpus, tokenizer, out, "3/3")
    with pytest.raises(DataError, match=r"1-of-3.*another eod|with another eod"):
        made(corpus, tokenizer, out, eod_token="t")
    made(corpus, tokenizer, out, "1/2")
    with pytest.raises(DataError, match="holds shards of 2 and of 3; delete"):
        made(corpus, tokenizer, out)
    shutil.rmtree(out / SHARDS / "1-of-2")
    (out / SHARDS / "notes").mkdir()
    with pytest.raises(DataError, match="notes: was not made by this command"):
        made(corpus, tokenizer, out)
    (out / SHARDS / "notes").rmdir()
    # a source that two shards have read: its size changed in between
    first, second = (out / SHARDS / f"{n}-of-3/.parts" for n in (1, 2))
    shutil.rmtree(second)
    shutil.copytree(first, second)
    own = json.loads((second / "state.json").read_text())
    own["sources"] = [{**source, "done": True} for source in own["sources"]]
    (second / "state.json").write_text(json.dumps(own))
    with pytest.raises(
        DataError, match=r"is in shard \d of 3 and in shard \d of 3; delete .*-of-3 and"
    ):
        made(corpus, tokenizer, out)


def test_shards_and_an_undivided_tokenisation_do_not_mix(
    corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(StopError):
        made(corpus, tokenizer, tmp_path / "out", "", 4)
    with pytest.raises(DataError, match="progress of a tokenisation without --shard"):
        made(corpus, tokenizer, tmp_path / "out", "1/2")


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "-1/2", "1/2/3", "", "1/0"])
def test_a_word_that_is_no_shard(text: str) -> None:
    with pytest.raises(DataError, match=r"--shard: .* such as 3/8"):
        parse_shard(text)


def test_sources_are_divided_by_their_bytes() -> None:
    """Each is in exactly one shard; no shard has more than the mean and one source."""
    rng = random.Random(2)
    for _ in range(200):
        sizes = [rng.choice([0, 1, 10, rng.randint(1, 1000)]) for _ in range(rng.randint(1, 40))]
        sources = [Source(str(i), None, None, (size, 0, 0), lambda fields: iter(()))
                   for i, size in enumerate(sizes)]  # fmt: skip
        count = rng.randint(1, len(sizes))
        parts = [sources_of(Shard(number + 1, count), sources) for number in range(count)]
        assert sorted(itertools.chain(*parts)) == list(range(len(sizes))) and all(parts)
        loads = [sum(sizes[i] for i in part) for part in parts]
        assert max(loads) <= sum(sizes) / count + max(sizes)
    with pytest.raises(DataError, match="3 shards of 2 source"):
        sources_of(Shard(1, 3), sources[:2])


def some_results(seed: int) -> dict[tuple[str, str], Encoded]:
    rng = np.random.default_rng(seed)
    found = {}
    for key in [("train", "A"), ("val", "é"), ("train", "B")]:
        lengths = rng.integers(0, 5, 4).astype(np.int32)
        tokens = rng.integers(0, 400, lengths.sum()).astype(np.uint16)
        documents = rng.integers(0, 99, 8).astype("<u8").view(DOCUMENT_TYPE)
        found[key] = Encoded([tokens[:2], tokens[2:]], [lengths], [documents])
    return found


def test_a_part_is_one_file_and_one_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many subsets it has; and it holds what was written."""
    waits: list[int] = []
    sync = os.fsync

    def counted(file: int) -> None:
        waits.append(file)
        sync(file)

    monkeypatch.setattr(os, "fsync", counted)
    for seed in range(20):
        results, path = some_results(seed), tmp_path / f"{seed:06}.part"
        write_part(path, results)
        found = {piece.key: piece for piece in read_part(path)}
        assert found.keys() == results.keys()
        for key, encoded in results.items():
            tokens = np.frombuffer(b"".join(found[key].tokens.pieces()), np.uint16)
            np.testing.assert_array_equal(tokens, np.concatenate(encoded.tokens))
            lengths, documents = part_file.joined([found[key]])
            np.testing.assert_array_equal(lengths, np.concatenate(encoded.lengths))
            np.testing.assert_array_equal(documents, np.concatenate(encoded.documents))
    assert len(waits) == 20 == len(list(tmp_path.iterdir()))


def test_a_part_that_is_not_whole_is_named(tmp_path: Path) -> None:
    path = tmp_path / "000001.part"
    write_part(path, some_results(1))
    whole = path.read_bytes()
    for size in (*range(40), *range(40, len(whole), 9), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"000001\.part: damaged"):
            read_part(path)
    path.unlink()
    with pytest.raises(DataError, match=r"000001\.part: missing"):
        read_part(path)


def test_progress_of_an_earlier_version_goes_on(
    corpus: Path, tokenizer: Path, data: Path, tmp_path: Path
) -> None:
    """It had a folder for each part, and three files for each split and subset."""
    out = tmp_path / "out"
    with pytest.raises(StopError):
        made(corpus, tokenizer, out, "", 5)
    path = out / ".parts" / "state.json"
    state = json.loads(path.read_text())
    assert len(state["parts"]) > 1
    for part in state["parts"]:
        file = out / ".parts" / part.pop("file")
        part |= {"folder": file.stem, "entries": []}
        folder = out / ".parts" / file.stem
        folder.mkdir()
        for number, piece in enumerate(read_part(file)):
            for span, end in ((piece.tokens, "bin"), (piece.lengths, "len"),
                              (piece.documents, "doc")):  # fmt: skip
                (folder / f"{number}.{end}").write_bytes(b"".join(span.pieces()))
            part["entries"].append([*piece.key, number])
        file.unlink()
    path.write_text(json.dumps(state))
    assert made(corpus, tokenizer, out).resumed
    assert tree(out) == tree(data)


def test_the_command(
    corpus: Path, tokenizer: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["data", "tokenize", str(corpus), "--tokenizer", str(tokenizer), "--workers", "1",
             "--out", str(tmp_path / "out")]  # fmt: skip
    assert run(monkeypatch, *words, "--shard", "4/3") == 2
    assert_one_line(capsys.readouterr().err, ("--shard", "'4/3'"))
    for number in (1, 2):
        assert run(monkeypatch, *words, "--shard", f"{number}/2") == 0
        assert f"shard {number} of 2 is finished" in capsys.readouterr().out
    assert run(monkeypatch, "data", "info", str(tmp_path / "out")) == 2
    assert_one_line(capsys.readouterr().err, ("shards are not joined",))
    assert run(monkeypatch, *words) == 0
    assert "Github" in capsys.readouterr().out
    assert tree(tmp_path / "out") == tree(data)
