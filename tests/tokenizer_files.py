"""Small tokenizers and texts that show what they do."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from data_pipeline.dataset import held_out
from data_pipeline.manifest import load_manifest
from tests.conftest import write_jsonl

EOD = "<|endoftext|>"

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces\tand a tab\n\n\nlines  ",
    "Café naïve Ångström ﬁ ½ ＡＢＣ",
    "🙂 漢字かな Привет",
    f"a text that speaks of {EOD} in its middle",
    "",
    "[CLS] [SEP] [UNK] <s> </s> <unk> ##ing",
    "\u2581 a mark and a \0 byte \u200b",
]

FILLED = [text for text in TEXTS if text]
"""Empty documents are no documents."""


def write_texts(folder: Path, texts: list[str] = FILLED) -> Path:
    records = [{"text": text, "meta": {"pile_set_name": "Web"}} for text in texts]
    write_jsonl(folder / "train.jsonl", records)
    return folder


def byte_level(path: Path, texts: list[str] = TEXTS) -> tokenizers.Tokenizer:
    """A tokenizer that loses nothing, as the GPT-2 family has; also written to ``path``."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=[EOD, "<|padding|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    made.save(str(path))
    return made


def ids_of(folder: Path) -> list[list[int]]:
    return [one.tokens.tolist() for one in held_out(load_manifest(folder), "train")]
