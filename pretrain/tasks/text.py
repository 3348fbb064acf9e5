"""Next-token prediction on a tokenised corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from data_pipeline.dataset import HeldOut, TrainingData, blend_weights, held_out
from data_pipeline.document_ends import check_document_ends
from data_pipeline.manifest import Manifest, load_manifest
from models.config import GPTConfig
from pretrain.config.recipe import Config
from pretrain.distributed.grid import Grid
from pretrain.errors import UsageError
from pretrain.tasks.score import score, summarize
from pretrain.tasks.task import Report, Samples, Uses, digest, use


class Text:
    """Next-token prediction on a tokenised corpus."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.source = str(manifest.path)
        self.tokenizer = manifest.tokenizer_sha256
        self.eod: int | None = manifest.eod
        counts = [
            (entry.split, entry.subset, entry.documents, entry.tokens, entry.bytes)
            for entry in manifest.entries
        ]
        self.identity = digest([counts, manifest.tokenizer_sha256])

    @classmethod
    def open(cls, config: Config) -> Text:
        """The task of a recipe.

        Raises:
            UsageError, DataError: if the data is missing.
        """
        if not config.data.path:
            raise UsageError(
                "data.path: not set; task.kind text needs a folder that `data tokenize` wrote"
            )
        return cls(load_manifest(Path(config.data.path)))

    def uses(self, config: Config) -> Uses:
        """Tokens of every subset."""
        shares = blend_weights(self.manifest, config.data.weights)
        sizes = {entry.subset: entry.tokens for entry in self.manifest.split("train")}
        tokens = config.train.steps * config.train.global_batch * config.model.context
        seen = _apportioned(shares, tokens)
        return {name: use(sizes[name], seen[name]) for name in sorted(seen)} | {
            name: use(sizes[name], 0) for name in sorted(sizes.keys() - shares.keys())
        }

    def complete(self, model: GPTConfig) -> GPTConfig:
        """The model with the tokenizer's vocabulary, unless it asks for a larger one."""
        size = model.vocabulary_size or self.manifest.vocabulary_size
        if size < self.manifest.vocabulary_size:
            raise UsageError(
                f"model.vocabulary_size: {size} is less than the {self.manifest.vocabulary_size} "
                f"tokens of {self.manifest.tokenizer}; remove it to use the data's"
            )
        return model.model_copy(update={"vocabulary_size": size})

    def training(self, config: Config) -> Samples:
        """Megatron's blend of the subsets.

        Raises:
            DataError: if attention must stay inside documents whose ends are not marked.
        """
        if config.data.attention == "within":
            check_document_ends(self.manifest, blend_weights(self.manifest, config.data.weights))
        samples = config.train.steps * config.train.global_batch
        return TrainingData(
            self.manifest, config.data.weights, config.model.context, config.seed, samples,
            config.model.vocabulary_size,
        )  # fmt: skip

    def held_out(self, config: Config, everything: bool = False) -> list[HeldOut]:
        """Documents."""
        limit = None if everything else config.evaluation.documents
        size = config.model.vocabulary_size
        return held_out(self.manifest, self.split(config, everything), limit, size)

    def split(self, config: Config, everything: bool = False) -> str:
        """``test`` for the whole split, if the data has one; else the recipe's."""
        splits = {entry.split for entry in self.manifest.entries}
        return "test" if everything and "test" in splits else config.evaluation.split

    def figures(
        self,
        module: nn.Module,
        grid: Grid,
        config: Config,
        chosen: list[HeldOut],
        report: Report | None,
    ) -> dict[str, Any]:
        """Loss, perplexity and bits per byte, overall and per subset."""
        batch, eod = config.evaluation.batch, self.manifest.eod
        nats = score(module, grid, config.model, chosen, eod, batch, progress=report)
        return {"stride": config.model.context, **summarize(chosen, nats)}


def _apportioned(shares: dict[str, float], tokens: int) -> dict[str, int]:
    """Whole numbers by shares; their sum is ``tokens``, as rounding each alone would not give."""
    parts: dict[str, int] = {}
    before = total = 0.0
    for name in sorted(shares):
        total += shares[name]
        parts[name] = round(min(total, 1.0) * tokens) - round(before * tokens)
        before = min(total, 1.0)
    if parts:
        parts[max(parts, key=lambda name: parts[name])] += tokens - sum(parts.values())
    return parts
