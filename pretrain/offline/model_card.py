"""Writes the files beside exported weights: the tokenizer, and a card with recipe and scores."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from data_pipeline.dataset import held_out
from data_pipeline.fast_tokenizer import fast_tokenizer, other_tokens, special_names
from data_pipeline.json_tokenizer import HuggingFaceTokenizer
from data_pipeline.manifest import Manifest
from data_pipeline.strict_json import to_json
from data_pipeline.tokenizer import Tokenizer, name_of_token
from pretrain.checkpoint.reader import Checkpoint
from pretrain.config.recipe import dump_config
from pretrain.errors import RunError
from pretrain.runs.folder import CONFIG, EVALUATION, read_evaluation, was_imported, write_text
from pretrain.runs.records import shown
from pretrain.training.state import GENERATION

_SAMPLE = 64
"""Number of held-out documents on which a converted tokenizer must agree."""


def write_tokenizer(folder: Path, manifest: Manifest, context: int, pad: int | None = None) -> str:
    """Write the data's tokenizer to the folder, and return a description of what was written.

    It is written as ``tokenizer.json`` if that gives the same tokens; a SentencePiece model is
    copied beside it. Settings that were switched off for documents are also off there.

    Args:
        pad: the padding token of an imported model.
    """
    source = manifest.tokenizer
    if not source.is_file():
        return f"no tokenizer ({source} does not exist)"
    tokenizer = manifest.open_tokenizer()
    parses = manifest.special.parse and isinstance(tokenizer, HuggingFaceTokenizer)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        # Names of special tokens in documents are plain text, unless the run parsed them as tokens.
        "split_special_tokens": not parses,
    }
    names = special_names(source, tokenizer)
    # Documents begin as they end, with this token.
    names["bos_token"] = names["eos_token"]
    padding = None if pad is None else name_of_token(source, pad)
    names |= {"pad_token": padding} if padding else {}
    settings |= names
    if isinstance(tokenizer, HuggingFaceTokenizer):
        text: str | None = tokenizer.as_used()
        description = "tokenizer.json"
    else:
        shutil.copyfile(source, folder / "tokenizer.model")
        text = fast_tokenizer(source, _texts(manifest, tokenizer), tokenizer.eod_name)
        description = "tokenizer.json and tokenizer.model"
    if text is None:
        return "only tokenizer.model (tokenizer.json would give other tokens)"
    write_text(folder / "tokenizer.json", text)
    other = other_tokens(text, tokenizer, list(names.values()), not parses)
    if other:
        description += f" (transformers gives other tokens for some texts, such as {other[:40]!r})"
    write_text(folder / "tokenizer_config.json", to_json(settings, indent=1))
    return description


def _texts(manifest: Manifest, tokenizer: Tokenizer) -> list[str]:
    splits = {entry.split for entry in manifest.entries}
    split = next((name for name in ("test", "val", "train") if name in splits), None)
    if split is None:
        return []
    documents = held_out(manifest, split, _SAMPLE)
    return [tokenizer.decode([int(token) for token in document.tokens]) for document in documents]


def write_card(folder: Path, checkpoint: Checkpoint, kind: str, name: str, width: str) -> None:
    """Write README.md: what the model is, how and with which λ it was trained, its scores."""
    config = checkpoint.config
    decay = config.optimizer.weight_decay
    count = sum(_numel(entry["shape"]) for entry in checkpoint.parameters.values())
    tokens = checkpoint.step * config.train.global_batch * config.model.context
    origin = "trained from scratch"
    if checkpoint.state.get(GENERATION) or was_imported(checkpoint.path.parent.parent):
        origin = "imported, and trained on"
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation",
        "tags: [rankdecay, attention-weight-decay]", "---", "",
        f"# {name}", "",
        f"A {kind} model of {count:,} parameters, {origin} by rankdecay for "
        f"{checkpoint.step:,} updates ({tokens:,} tokens){width}.", "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")',
        "```", "",
        "## Weight decay", "",
        "| role | λ |", "|---|---|",
        *(f"| {role} | {value} |" for role, value in _decays(checkpoint).items()), "",
    ]  # fmt: skip
    if decay.policies:
        lines += [
            "λ changed during training (`policies` in the recipe); these are the last values.",
            "",
        ]
    lines += _scores(checkpoint)
    lines += ["## Recipe", "", "```yaml", dump_config(config).strip(), "```", ""]
    write_text(folder / "README.md", "\n".join(lines))


def _numel(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _decays(checkpoint: Checkpoint) -> dict[str, str]:
    """λ by role; several values if layers differ."""
    decays: dict[str, set[float]] = {}
    for entry in checkpoint.parameters.values():
        decays.setdefault(entry["role"], set()).add(entry["decay"])
    return {
        role: ", ".join(f"{value:g}" for value in sorted(values)) for role, values in decays.items()
    }


def _scores(checkpoint: Checkpoint) -> list[str]:
    """The run's final evaluation, if it belongs to this checkpoint."""
    path = checkpoint.path.parent.parent / EVALUATION
    try:
        figures = read_evaluation(path)
    except (OSError, RunError):
        return []
    if figures.get("step") != checkpoint.step or "bits_per_byte" not in figures["overall"]:
        return []
    rows = [*figures.get("subsets", {}).items(), ("all", figures["overall"])]
    return [
        f"## Evaluation ({figures.get('split', 'unknown')} split)", "",
        "| subset | documents | perplexity | bits per byte |", "|---|---:|---:|---:|",
        *(
            f"| {name} | {shown(row, 'documents', ',')} | {shown(row, 'perplexity', '.2f')} | "
            f"{shown(row, 'bits_per_byte', '.4f')} |"
            for name, row in rows
        ), "",
    ]  # fmt: skip


def name_of(checkpoint: Checkpoint) -> str:
    """The model's name: that of the run folder, or of the checkpoint."""
    run = checkpoint.path.parent.parent
    return run.name if (run / CONFIG).exists() else checkpoint.path.name
