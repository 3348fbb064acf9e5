"""Writes the tokenizer beside exported weights, as the run used it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.dataset import held_out
from data_pipeline.fast_tokenizer import fast_tokenizer, other_tokens, special_names
from data_pipeline.json_tokenizer import HuggingFaceTokenizer
from data_pipeline.manifest import Manifest
from data_pipeline.strict_json import to_json
from data_pipeline.tokenizer import Tokenizer, name_of_token
from pretrain.runs.folder import write_text

_SAMPLE = 64
"""Number of held-out documents on which a converted tokenizer must agree."""
_SHOWN = 40


@dataclass(frozen=True)
class WrittenTokenizer:
    """The tokenizer of an exported folder."""

    described: str
    """One line about the files."""
    form: str
    """json: `AutoTokenizer` loads it; sentencepiece: only that library does; empty: none."""
    note: str = ""
    """For the model card: how its tokens may differ from those of the run."""


def no_tokenizer(reason: str) -> WrittenTokenizer:
    """A folder without a tokenizer."""
    return WrittenTokenizer(f"no tokenizer ({reason})", "")


def write_tokenizer(
    folder: Path, manifest: Manifest, context: int, pad: int | None = None
) -> WrittenTokenizer:
    """Write the data's tokenizer to the folder.

    It is written as ``tokenizer.json`` if that gives the same tokens; a SentencePiece model is
    copied beside it. Settings that were switched off for documents are also off there.

    Args:
        pad: the padding token of an imported model.
    """
    source = manifest.tokenizer
    if not source.is_file():
        return no_tokenizer(f"{source} does not exist")
    tokenizer = manifest.open_tokenizer()
    parses = manifest.special.parse and isinstance(tokenizer, HuggingFaceTokenizer)
    names = _names(source, tokenizer, pad)
    text, files, note = _convert(folder, manifest, tokenizer)
    if text is None:
        return WrittenTokenizer("only tokenizer.model (tokenizer.json would give other tokens"
                                f"{note})", "sentencepiece")  # fmt: skip
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        # Names of special tokens in documents are plain text, unless the run parsed them as tokens.
        "split_special_tokens": not parses,
        **names,
    }
    write_text(folder / "tokenizer.json", text)
    write_text(folder / "tokenizer_config.json", to_json(settings, indent=1))
    other = other_tokens(text, tokenizer, list(names.values()), not parses)
    if other and not note:
        note = f"`transformers` gives other tokens for some texts, such as {other[:_SHOWN]!r}"
    return WrittenTokenizer(f"{files} ({note})" if note else files, "json", note)


def _names(source: Path, tokenizer: Tokenizer, pad: int | None) -> dict[str, str]:
    """The special tokens, in the form of ``tokenizer_config.json``."""
    names = special_names(source, tokenizer)
    # Documents begin as they end, with this token.
    names["bos_token"] = names["eos_token"]
    padding = None if pad is None else name_of_token(source, pad)
    return names | ({"pad_token": padding} if padding else {})


def _convert(folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> tuple[str | None, str, str]:
    """The text of a ``tokenizer.json`` if there is one, the files, and how its tokens differ."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.as_used(), "tokenizer.json", ""
    source = manifest.tokenizer
    shutil.copyfile(source, folder / "tokenizer.model")
    made = fast_tokenizer(source, _texts(manifest, tokenizer), tokenizer.eod_name)
    example = f"{made.differs[:_SHOWN]!r}{' …' if len(made.differs) > _SHOWN else ''}"
    if made.text is None:
        return None, "tokenizer.model", f", such as for {example}" if made.differs else ""
    note = ""
    if made.differs:
        note = (
            "tokenizer.json cuts a few texts into other pieces than tokenizer.model and training, "
            f"with the same total score; an example is {example}"
        )
    return made.text, "tokenizer.json and tokenizer.model", note


def _texts(manifest: Manifest, tokenizer: Tokenizer) -> list[str]:
    splits = {entry.split for entry in manifest.entries}
    split = next((name for name in ("test", "val", "train") if name in splits), None)
    if split is None:
        return []
    documents = held_out(manifest, split, _SAMPLE)
    return [tokenizer.decode([int(token) for token in document.tokens]) for document in documents]
