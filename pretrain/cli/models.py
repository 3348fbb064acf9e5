"""Commands on stored models: evaluate, export, import, ranks. Nothing heavy at import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.cli.console import plain
from pretrain.cli.options import Code, Json, Overrides

AttentionRank = Annotated[
    str | None,
    typer.Option(
        help="Cut every head's W_QK and W_VP to this share of its singular values (0.75), or to "
        "its measured pseudo-rank (measured)."
    ),
]
AttentionProduct = Annotated[str, typer.Option(help="Which product to cut: qk, vp or both.")]


def print_evaluation(figures: dict[str, Any]) -> None:
    """Print the figures of ``evaluation.json`` as a table to standard output."""
    from pretrain.runs.records import shown

    overall = figures["overall"]
    step = figures.get("model") or f"step {figures.get('step', 'unknown')}"
    what = f"{_documents(figures)}, {step}"
    if "accuracy" in overall:
        print(
            f"{what}: {shown(overall, 'samples', ',')} samples, loss "
            f"{shown(overall, 'loss', '.4f')}, accuracy {shown(overall, 'accuracy', '.4f')}"
        )
        return
    from rich.table import Table

    from pretrain.cli.console import show_table

    table = Table(title=what)
    for column in ("subset", "documents", "tokens", "bytes", "loss", "perplexity", "bits/byte"):
        table.add_column(column, justify="left" if column == "subset" else "right")
    rows = [*figures.get("subsets", {}).items(), ("all", overall)]
    for name, row in rows:
        table.add_row(
            name,
            *(shown(row, count, ",") for count in ("documents", "tokens", "bytes")),
            shown(row, "loss", ".4f"),
            shown(row, "perplexity", ".2f"),
            shown(row, "bits_per_byte", ".4f"),
        )
    show_table(table, 120)
    present = len(figures.get("pile_subsets_present", ()))
    weighted = figures.get("pile_weighted")
    if weighted:
        print(
            f"{present} of the Pile's 22 subsets present; weighted by their published shares: "
            f"perplexity {shown(weighted, 'perplexity', '.2f')}, "
            f"{shown(weighted, 'bits_per_byte', '.4f')} bits/byte"
        )


def _documents(figures: dict[str, Any]) -> str:
    split = figures.get("split", "unknown")
    return "all documents" if split == "all" else f"{split} split"


def print_evaluations(rows: list[dict[str, Any]]) -> None:
    """Print one line for each of several evaluations to standard output."""
    from rich.table import Table

    from pretrain.cli.console import show_table
    from pretrain.runs.records import shown

    cut = any("attention_rank" in row for row in rows)
    title = _documents(rows[0])
    table = Table(title=title)
    counts, figures = ("documents", "tokens"), ("loss", "perplexity", "bits/byte")
    for column in ("model", *(("rank kept",) if cut else ()), *counts, *figures):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        overall, share = row["overall"], row.get("attention_rank", "")
        table.add_row(
            plain(row["model"]),
            *((share if isinstance(share, str) else f"{share:g}",) if cut else ()),
            *(shown(overall, count, ",") for count in counts),
            shown(overall, "loss", ".4f"),
            shown(overall, "perplexity", ".2f"),
            shown(overall, "bits_per_byte", ".4f"),
        )
    show_table(table, 120)


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            help="RUN, RUN@STEP, RUN@* (all checkpoints), a checkpoint, the folder of a Hugging "
            "Face model, a folder of several, or a name on the Hub (@REVISION, @step*)."
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Further models, and overrides such as grid.tensor_parallel=2."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Tokenised folder; default: the run's own. For a Hugging Face model also files "
            "of text (.jsonl, .jsonl.zst, .parquet, .txt; repeat the option) or a folder of them."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Which documents to score: train, val or test. Default: test; or all documents of "
            "files of text, if none of their names means test."
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(help="Field with the text, in files of text; as in `data tokenize`."),
    ] = None,
    subset_field: Annotated[
        str | None,
        typer.Option(help="Field with the subset's name, in files of text."),
    ] = None,
    documents: Annotated[
        int | None, typer.Option(help="Score a fixed sample of N documents; default: all.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 16,
    stride: Annotated[
        int, typer.Option(min=0, help="Tokens per window after the first; 0: disjoint (lm-eval).")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the figures. Default: evaluation.json of RUN; for other settings, or "
            "another step than the last, a file named after them "
            "(evaluation-step=200-stride=8.json); for other models, or several, none."
        ),
    ] = None,
    attention_rank: Annotated[
        str | None,
        typer.Option(
            help="Cut every head's W_QK and W_VP to this share of its singular values (0.75), or "
            "to its measured pseudo-rank (measured); several with commas."
        ),
    ] = None,
    attention_product: AttentionProduct = "both",
    code: Code = None,
    json: Json = False,
) -> None:
    """Measure held-out loss, perplexity and bits per byte, overall and per subset, on any grid.

    A Hugging Face model is scored with its own tokenizer, in float32 unless precision=bf16 is
    given; the figures are those of lm-eval's rolling log-likelihood. Several models, or several
    values of --attention-rank, make one table.

    \b
    pretrain evaluate runs/mine precision=fp32 model.context=64
    pretrain evaluate runs/mine@* runs/other --attention-rank 1,0.5,measured
    pretrain evaluate EleutherAI/pythia-160m --data documents.jsonl.zst
    """
    from data_pipeline.records import Fields
    from pretrain.config.extension import run_code
    from pretrain.offline.evaluations import Asked, evaluate_models, split_words

    run_code(code or [])
    asked = Asked(
        data or (), split, documents, batch, stride, out, attention_rank, attention_product,
        Fields(text_field or Fields.text, subset_field or Fields.subset)
        if text_field or subset_field
        else None,
    )  # fmt: skip
    rows, path, is_main = evaluate_models(*split_words(target, words or []), asked)
    if not is_main:
        return
    if json:
        from data_pipeline.strict_json import to_json

        print(to_json(rows[0] if len(rows) == 1 else {"evaluations": rows}))
        return
    if len(rows) == 1:
        print_evaluation(rows[0])
    else:
        print_evaluations(rows)
    if path:
        print(f"written: {plain(str(path))}")


def export(
    target: Annotated[str, typer.Argument(help="Run folder, RUN@STEP or checkpoint folder.")],
    out: Annotated[Path, typer.Option(help="Folder of the Hugging Face model; new or empty.")],
    form: Annotated[str, typer.Option("--format", help="huggingface.")] = "huggingface",
    attention_rank: AttentionRank = None,
    attention_product: AttentionProduct = "both",
    data: Annotated[
        Path | None, typer.Option(help="The run's tokenised folder, if it was moved.")
    ] = None,
) -> None:
    """Write a checkpoint as a Hugging Face model: config.json and safetensors.

    The dialects gpt2, gpt_neox and llama become GPT2, GPTNeoX and Llama (Qwen3 with QK-norm,
    SmolLM3 without positions). With --attention-rank the heads are only as wide as the rank that is
    kept, if the class allows it.
    """
    if form != "huggingface":
        raise typer.BadParameter(f"--format: {form} is not supported; use huggingface")
    from pretrain.offline.export import export_checkpoint
    from pretrain.offline.truncate import parse_rank

    choice = parse_rank(attention_rank, attention_product) if attention_rank else None
    print(f"written: {export_checkpoint(target, out, choice, data)}")


def import_(
    source: Annotated[
        str, typer.Argument(help="Folder of a Hugging Face model, or a name on the Hub.")
    ],
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; its `model` is replaced.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/NAME-OF-RECIPE.")
    ] = None,
    allow_unused: Annotated[
        bool,
        typer.Option("--allow-unused", help="Leave out tensors outside the language model."),
    ] = False,
) -> None:
    """Make a run that starts from a pretrained model: its weights are the checkpoint of step 0.

    Supported are GPT-2, GPT-NeoX (Pythia), Llama, Qwen3 and SmolLM3 without positions. Data, decay,
    schedule and grid are the recipe's; the data must be tokenised with the model's tokenizer.
    """
    from pretrain.offline.import_model import import_model, next_words

    run = out or Path("runs") / recipe.stem
    import_model(source, recipe, overrides or [], run, allow_unused)
    print(f"written: {run}, at step 0; train it with: {next_words(run)}")


def ranks(
    target: Annotated[
        str,
        typer.Argument(
            help="RUN, RUN@STEP, RUN@* (all checkpoints), a checkpoint, the folder of a Hugging "
            "Face model, a folder of several, or a name on the Hub (@REVISION, @step*)."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Write the long table here (.parquet).")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the scatter plots of Figure 4 (.png, .csv).")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Share of Σσ that the rank covers; default: the run's, or 0.95."),
    ] = None,
    denominator: Annotated[
        str | None,
        typer.Option(
            help="Pseudo-rank = k / head width (head) or k / model width (model); default: the "
            "run's, or head."
        ),
    ] = None,
    spectra: Annotated[bool, typer.Option("--spectra", help="Store singular values too.")] = False,
    family: Annotated[
        Path | None,
        typer.Option(help="YAML file that describes where an unknown model stores its attention."),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens per step of a pretrained model, for the table.")
    ] = 0,
    allow_unused: Annotated[
        bool,
        typer.Option("--allow-unused", help="Leave out attention that cannot be measured."),
    ] = False,
    json: Json = False,
) -> None:
    """Compute rank statistics of the attention of a run, or of any pretrained model.

    The model is read tensor by tensor and not built. The table has the columns of a run's own
    ranks.parquet; several revisions (EleutherAI/pythia-160m@step*) make one table over training.
    Known families: llama, mistral, qwen 2/3, gemma, gpt2, gpt_neox, gpt_neo, opt, phi, olmo 1/2,
    bert, vit, deit, clip; describe others with --family.
    """
    if denominator not in (None, "head", "model"):
        raise typer.BadParameter(f"--denominator: {denominator} is not head or model")
    if threshold is not None and not 0 < threshold <= 1:
        raise typer.BadParameter(f"--threshold: {threshold} is not above 0 and at most 1")
    from pretrain.offline.ranks import rank_command

    options = {"threshold": threshold, "denominator": denominator}
    chosen = {key: value for key, value in options.items() if value is not None}
    rank_command(
        target,
        {**chosen, "spectra": spectra},
        family,
        batch_tokens,
        out,
        figures,
        json,
        allow_unused,
    )
