"""Writes the card beside exported weights: how to use the model, its recipe and its scores."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint.reader import Checkpoint
from pretrain.config.recipe import dump_config
from pretrain.errors import RunError
from pretrain.offline.tokenizer_files import WrittenTokenizer
from pretrain.runs.folder import CONFIG, EVALUATION, read_evaluation, was_imported, write_text
from pretrain.runs.records import shown
from pretrain.training.state import GENERATION

_LOADS = """\
from transformers import AutoModelForCausalLM

folder = "THIS FOLDER"
model = AutoModelForCausalLM.from_pretrained(folder)
"""
_WRITES = {
    "json": """\
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=SOME)[0]))
""",
    "sentencepiece": """\
import torch
from sentencepiece import SentencePieceProcessor

tokenizer = SentencePieceProcessor(model_file=f"{folder}/tokenizer.model")
prompt = torch.tensor([tokenizer.encode("The")])
print(tokenizer.decode(model.generate(prompt, max_new_tokens=SOME)[0].tolist()))
""",
    "": """\
import torch

print(model(torch.tensor([[1, 2, 3]])).logits.argmax(-1))
""",
}
"""How the model is used, by the form of its tokenizer."""
_SCORES = """\
import torch
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask

task = ConfigurableTask(config={
    "task": "held_out",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "DOCUMENTS.jsonl"}},  # {"text": ...} in each line
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [{"metric": "bits_per_byte"}],
})
device = "cuda" if torch.cuda.is_available() else "cpu"
model_args = {"pretrained": "THIS FOLDER", "dtype": "float32", "device": device}
done = simple_evaluate(model="hf", model_args=model_args, tasks=[task], bootstrap_iters=0)
print(done["results"]["held_out"])
"""


def usage(tokenizer: WrittenTokenizer, context: int) -> list[str]:
    """The card's lines about using the model. Tests run this code."""
    code = f"{_LOADS}\n{_WRITES[tokenizer.form]}"
    # A model with learned positions cannot write past its context.
    code = code.replace("SOME", str(max(1, min(20, context // 2))))
    lines = ["```python", *code.splitlines(), "```", ""]
    if tokenizer.note:
        lines += [f"{tokenizer.note[0].upper()}{tokenizer.note[1:]}.", ""]
    if tokenizer.form == "json":
        lines += ["Bits per byte of your documents, with lm-eval:", ""]
        lines += ["```python", *_SCORES.splitlines(), "```", ""]
    return lines


def write_card(
    folder: Path,
    checkpoint: Checkpoint,
    kind: str,
    name: str,
    width: str,
    tokenizer: WrittenTokenizer,
) -> None:
    """Write README.md: what the model is, how and with which λ it was trained, its scores."""
    config = checkpoint.config
    decay = config.optimizer.weight_decay
    count = sum(_numel(entry["shape"]) for entry in checkpoint.parameters.values())
    tokens = checkpoint.step * config.train.global_batch * config.model.context
    origin = "trained from scratch"
    if checkpoint.state.get(GENERATION) or was_imported(checkpoint.path.parent.parent):
        origin = "imported, and trained on"
    exposures = _exposures(checkpoint)
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation",
        "tags: [rankdecay, attention-weight-decay]", "---", "",
        f"# {name}", "",
        f"A {kind} model of {count:,} parameters, {origin} by rankdecay for "
        f"{checkpoint.step:,} updates ({tokens:,} tokens){width}.", "",
        *usage(tokenizer, config.model.context),
        "## Weight decay", "",
        "| role | λ | exposure Σ rate·λ |", "|---|---:|---:|",
        *(
            f"| {role} | {value} | {exposures.get(role, '–')} |"
            for role, value in _decays(checkpoint).items()
        ), "",
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


def _exposures(checkpoint: Checkpoint) -> dict[str, str]:
    """Σ rate·λ over all updates by role, by which sweeps may name a run; several values if
    layers differ."""
    exposures: dict[str, set[str]] = {}
    for site, (_, exposure, _) in checkpoint.state.get("decay", {}).get("books", {}).items():
        exposures.setdefault(site.partition("[")[0], set()).add(f"{exposure:.4g}")
    return {role: ", ".join(sorted(values, key=float)) for role, values in exposures.items()}


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
