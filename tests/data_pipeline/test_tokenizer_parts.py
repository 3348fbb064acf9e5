"""Every combination of a tokenizer's parts, vocabularies with holes, and damaged files."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from data_pipeline.account import account_of, described
from data_pipeline.manifest import load_manifest
from data_pipeline.prepare import tokenize_sources
from data_pipeline.records import DataError
from data_pipeline.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.tokenizer_files import EOD, TEXTS, byte_level, ids_of, write_texts

pytestmark = pytest.mark.slow

# --- every combination of parts ------------------------------------------------------------------


NORMALIZERS = {
    "none": None,
    "lower": normalizers.Lowercase(),
    "nfd-strip": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "nfkc": normalizers.NFKC(),
    "bert": normalizers.BertNormalizer(),
    "strip": normalizers.Strip(),
    "prepend": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "nmt": normalizers.Nmt(),
    "bytes": normalizers.ByteLevel(),
}

PRE_TOKENIZERS = {
    "none": None,
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "bytes-prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "space": pre_tokenizers.Whitespace(),
    "space-split": pre_tokenizers.WhitespaceSplit(),
    "metaspace": pre_tokenizers.Metaspace(),
    "bert": pre_tokenizers.BertPreTokenizer(),
    "digits": pre_tokenizers.Digits(individual_digits=True),
}

DECODERS = {
    "none": None,
    "bytes": decoders.ByteLevel(),
    "wordpiece": decoders.WordPiece(),
    "metaspace": decoders.Metaspace(),
    "fallback": decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
    "bpe": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
}

POSTS = ("none", "bert", "roberta", "template", "bytes")

KINDS = ("bpe", "bpe-unk", "bpe-fallback", "wordpiece", "wordlevel", "wordlevel-none", "unigram")


def make_model(kind: str) -> models.Model:
    letters = sorted(set("".join(TEXTS[:2])) | set("ĠĊĉ"))
    names = [EOD, "[UNK]", "<s>", "</s>"]
    names += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*names, *letters, *(f"##{one}" for one in letters), "the", "quick", "fox"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    if kind == "wordpiece":
        return models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=12)
    if kind == "wordlevel":
        return models.WordLevel(vocabulary, unk_token="[UNK]")
    if kind == "wordlevel-none":
        return models.WordLevel(vocabulary, unk_token="missing")
    if kind == "unigram":
        return models.Unigram([(piece, -1.0) for piece in vocabulary], 1, byte_fallback=False)
    return models.BPE(
        vocabulary, [], unk_token="[UNK]" if kind == "bpe-unk" else None,
        byte_fallback=kind == "bpe-fallback",
    )  # fmt: skip


def make_post(name: str) -> processors.PostProcessor | None:
    if name == "bert":
        return processors.BertProcessing(("</s>", 3), ("<s>", 2))
    if name == "roberta":
        return processors.RobertaProcessing(("</s>", 3), ("<s>", 2))
    if name == "template":
        return processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    return processors.ByteLevel() if name == "bytes" else None


def check_combination(names: tuple[str, ...], path: Path) -> str:
    """Encode all texts with a tokenizer of these parts; returns what happened.

    Whether a text comes back is found out here with the library alone.
    """
    kind, normal, pre, decoder, post = names
    made = tokenizers.Tokenizer(make_model(kind))
    parts = {
        "normalizer": NORMALIZERS[normal],
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "decoder": DECODERS[decoder],
        "post_processor": make_post(post),
    }
    for part, value in parts.items():
        if value is not None:
            setattr(made, part, value)
    made.add_special_tokens([EOD])
    made.save(str(path))
    made.encode_special_tokens = True
    tokenizer = load_tokenizer(path)
    try:
        wanted = [made.encode(text, add_special_tokens=False).ids for text in TEXTS]
    except Exception:
        with pytest.raises(DataError, match="cannot encode"):
            tokenizer.encode(TEXTS)
        return "refused"
    found = tokenizer.encode(TEXTS)
    assert [one.tolist() for one in found] == wanted
    exact = [made.decode(ids, skip_special_tokens=False) == text
             for ids, text in zip(wanted, TEXTS, strict=True)]  # fmt: skip
    account = account_of(tokenizer, TEXTS, found)
    assert account.exact == sum(exact) and account.is_exact == all(exact)
    unknown: Any = tokenizer.unknown
    assert account.unknown == sum(one.count(unknown) for one in wanted)
    assert account.eod_inside == sum(one.count(tokenizer.eod) for one in wanted)
    said = " ".join(described(account, tokenizer, False))
    assert ("comes back as" in said) == (not all(exact)) and ("100 %" in said or not all(exact))
    assert account.bytes == sum(len(text.encode()) for text in TEXTS) >= account.bytes_back
    return "exact" if all(exact) else "said"


def combinations() -> list[tuple[str, ...]]:
    return list(itertools.product(KINDS, NORMALIZERS, PRE_TOKENIZERS, DECODERS, POSTS))


def test_a_sample_of_all_combinations(tmp_path: Path) -> None:
    """Each is exact, or says what is lost, or is refused in one line."""
    chosen = random.Random(5).sample(combinations(), 400)
    found = {check_combination(names, tmp_path / "t.json") for names in chosen}
    lossless = ("bpe-fallback", "none", "none", "fallback", "bert")
    assert check_combination(lossless, tmp_path / "t.json") == "exact"
    assert {"said", "refused"} <= found


@pytest.mark.long
def test_all_combinations(tmp_path: Path) -> None:
    """17,640 tokenizers."""
    outcomes = [check_combination(names, tmp_path / "t.json") for names in combinations()]
    assert len(outcomes) == 17_640 and {"exact", "said", "refused"} == set(outcomes)


# --- vocabularies with holes ---------------------------------------------------------------------


def holed(path: Path, sizes: tuple[int, int], rng: random.Random) -> list[str]:
    """A WordLevel tokenizer with so many tokens and so large a largest id; returns its words."""
    count, largest = sizes
    ids = {0, largest, *rng.sample(range(1, largest), count - 2)}
    vocabulary = {EOD if one == 0 else f"w{one}": one for one in ids}
    made = tokenizers.Tokenizer(models.WordLevel({EOD: 0}, unk_token=EOD))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    values = json.loads(made.to_str())  # the library itself would walk through the holes
    values["model"]["vocab"] = vocabulary
    path.write_text(json.dumps(values))
    return [name for name in vocabulary if name != EOD]


@pytest.mark.parametrize(
    "sizes",
    [(50, 60), (300, 300), (400, 65_498), (400, 65_499), (400, 65_500), (400, 65_535),
     (400, 65_536), (30_000, 70_000), (65_536, 65_536), (65_000, 131_072), (10, 2**31 - 2)],
)  # fmt: skip
def test_ids_come_back_as_they_were(sizes: tuple[int, int], tmp_path: Path) -> None:
    """Around 2^16, with holes, the largest id in use."""
    rng = random.Random(str(sizes))
    words = holed(tmp_path / "tokenizer.json", sizes, rng)
    texts = [" ".join(rng.choices(words, k=20)) for _ in range(30)] + [f"w{sizes[1]}"]
    tokenize_sources(
        [str(write_texts(tmp_path / "in", texts))], tmp_path / "tokenizer.json", tmp_path / "out"
    )
    manifest = load_manifest(tmp_path / "out")
    assert manifest.vocabulary_size == sizes[1] + 1
    assert np.iinfo(manifest.dtype).max >= sizes[1]
    wanted = sorted([int(word[1:]) for word in text.split()] for text in texts)
    assert sorted(ids_of(tmp_path / "out")) == wanted


def test_an_id_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    holed(tmp_path / "tokenizer.json", (10, 2**31 - 1), random.Random(0))
    with pytest.raises(DataError, match="has token 2147483647; only ids up to 2147483646"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_an_id_beyond_the_vocabulary_is_never_written(tmp_path: Path) -> None:
    byte_level(tmp_path / "plain.json")

    class Wrong:
        """A tokenizer with a bug."""

        def __init__(self, token: int) -> None:
            self._inner, self._token = load_tokenizer(tmp_path / "plain.json"), token

        def __getattr__(self, name: str) -> object:
            return getattr(self._inner, name)

        def encode(self, texts: list[str]) -> list[np.ndarray]:
            return [np.array([self._token], dtype=np.int64) for _ in texts]

    from data_pipeline.encode import _stored

    for token in (-1, 300, 2**16 + 5, 2**32 + 5):
        wrong = Wrong(token)
        with pytest.raises(DataError, match=f"made token {token}"):
            _stored(wrong.encode(["x"]), wrong)  # type: ignore[arg-type]


# --- files that are damaged or something else ----------------------------------------------------


def damaged(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    what = rng.choice(("cut", "flip", "join", "zero"))
    if what == "cut":
        return data[: rng.randrange(len(data))]
    if what == "join":
        return data + data[rng.randrange(len(data)) :]
    for _ in range(rng.choice((1, 4, 40))):
        at = rng.randrange(len(data))
        changed[at] = 0 if what == "zero" else changed[at] ^ (1 << rng.randrange(8))
    return bytes(changed)


def changed(data: bytes, rng: random.Random) -> bytes:
    """The same JSON but for one value, of any depth."""
    tree = json.loads(data)
    node, places = tree, []
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        places.append((node, key))
        node = node[key]
    holder, key = rng.choice(places)
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice([None, -1, 0, 7, 2**31, 2**40, 1.5, "x", "", [], {}, True])
    return json.dumps(tree).encode()


def use(path: Path) -> str:
    """Load a tokenizer and account for all texts: it works and says what is lost, or one line."""
    try:
        tokenizer = load_tokenizer(path)
        ids = tokenizer.encode(TEXTS)
        account = account_of(tokenizer, TEXTS, ids)
        exact = [tokenizer.decode(one) == text for one, text in zip(ids, TEXTS, strict=True)]
    except DataError as error:
        assert "\n" not in str(error)
        return "refused"
    assert account.exact <= sum(exact) and described(account, tokenizer, False)
    assert all(one.max(initial=0) < tokenizer.vocabulary_size for one in ids)
    return "used"


def fuzz(path: Path, count: int) -> dict[str, int]:
    data, rng = path.read_bytes(), random.Random(11)
    outcomes = {"refused": 0, "used": 0}
    for _ in range(count):
        target = path.with_name("fuzzed" + path.suffix)
        damage = changed if path.suffix == ".json" and rng.random() < 0.7 else damaged
        target.write_bytes(damage(data, rng))
        outcomes[use(target)] += 1
    return outcomes


def test_damaged_tokenizers(tokenizer: Path, tmp_path: Path) -> None:
    byte_level(tmp_path / "plain.json")
    (tmp_path / "small.model").write_bytes(tokenizer.read_bytes())
    for name in ("plain.json", "small.model"):
        outcomes = fuzz(tmp_path / name, 60)
        assert outcomes["refused"] and outcomes["used"], (name, outcomes)


@pytest.mark.long
def test_damaged_tokenizers_long(tokenizer: Path, tmp_path: Path) -> None:
    byte_level(tmp_path / "plain.json")
    (tmp_path / "small.model").write_bytes(tokenizer.read_bytes())
    for name in ("plain.json", "small.model"):
        assert sum(fuzz(tmp_path / name, 3000).values()) == 3000


def test_the_piece_that_ends_documents_can_be_named(tokenizer: Path) -> None:
    found = SentencePieceTokenizer(tokenizer, "\n")
    assert found.eod_name == "\n" and found.eod != SentencePieceTokenizer(tokenizer).eod
    with pytest.raises(DataError, match="has no piece '<nothing>'"):
        load_tokenizer(tokenizer, "<nothing>")


def test_a_folder_with_both_files_copies_the_one_that_is_used(
    tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "both").mkdir()
    byte_level(tmp_path / "both/tokenizer.json")
    (tmp_path / "both/tokenizer.model").write_bytes(tokenizer.read_bytes())
    tokenize_sources([str(write_texts(tmp_path / "in"))], tmp_path / "both", tmp_path / "out")
    assert load_manifest(tmp_path / "out").tokenizer.read_bytes() == tokenizer.read_bytes()
