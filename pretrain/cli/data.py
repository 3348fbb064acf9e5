"""`pretrain data …`: corpus, tokenizer, tokens. Nothing heavy is imported until a verb needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.options import Json
from pretrain.cli.program import application
from pretrain.distributed.cores import usable_cores

data_app = application("Make training data: corpus, tokenizer, tokens.")

Sources = Annotated[
    list[str],
    typer.Argument(
        help="Files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt), folders of them, or the name "
        "of a Hub dataset (owner/name)."
    ),
]
TextField = Annotated[str, typer.Option(help="Field with the text.")]
SubsetField = Annotated[str, typer.Option(help="Field with the subset's name.")]
DefaultSubset = Annotated[
    str | None,
    typer.Option(help="Subset of records that have none (otherwise they are malformed)."),
]
Split = Annotated[
    str | None,
    typer.Option(
        help="Use everything as train, val or test, or divide all documents in these percents by a "
        "hash of each text (98,1,1), whatever the files' names; default: by file name. Give it to "
        "`data tokenizer` and `data tokenize` alike."
    ),
]
ZstWindow = Annotated[
    int, typer.Option(min=1, help="Memory in MB that a .zst made with --long may use.")
]


@data_app.command()
def corpus(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    installed: Annotated[
        bool,
        typer.Option(
            "--installed",
            help="Add the sources and documents of every installed package: tens of millions of "
            "tokens on a usual machine. All text of a package is in one split.",
        ),
    ] = False,
) -> None:
    """Make a corpus in the Pile's format from this Python installation; needs no network."""
    from data_pipeline.corpus import write_corpus
    from data_pipeline.installed import installed_files

    if installed:
        print("reading every installed package: a minute per 100 MB of text", file=sys.stderr)
    counts = write_corpus(out, packages=installed_files() if installed else ())
    print(f"{out}: " + ", ".join(f"{split} {count} documents" for split, count in counts.items()))


@data_app.command()
def tokenizer(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="The .model file to write.")],
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=300,
            help="Number of tokens; default: one per 1,500 bytes of text, from 512 to 32,000.",
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            "--type",
            help="bpe; or unigram, which an export can write for transformers only up to ties.",
        ),
    ] = "bpe",
    max_mb: Annotated[int, typer.Option(min=1, help="MB of text to learn from.")] = 256,
    text_field: TextField = "text",
    subset_field: SubsetField = "meta.pile_set_name",
    split: Split = None,
    zst_window_mb: ZstWindow = 512,
) -> None:
    """Train a SentencePiece tokenizer that keeps every byte of every text.

    It learns only from training documents, as `data tokenize` divides the same sources.

    \b
    pretrain data tokenizer texts.jsonl --vocab-size 8192 --out texts.model
    """
    from data_pipeline.prepare import train_from_sources
    from pretrain.errors import UsageError

    if kind not in ("unigram", "bpe"):
        raise UsageError(f"--type: {kind!r} is not bpe or unigram")
    size = train_from_sources(
        sources, out, vocab_size, kind, max_mb << 20, text_field, subset_field, split,
        zst_window_mb,
    )  # fmt: skip
    print(f"{out}: {size:,} tokens")


@data_app.command()
def tokenize(  # noqa: PLR0913, PLR0917  (an option each)
    sources: Sources,
    tokenizer: Annotated[
        Path, typer.Option(help="SentencePiece .model or Hugging Face tokenizer.json.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default: one per core.")
    ] = None,
    split: Split = None,
    text_field: TextField = "text",
    subset_field: SubsetField = "meta.pile_set_name",
    default_subset: DefaultSubset = None,
    eod_token: Annotated[
        str | None,
        typer.Option(help="End-of-document token of a tokenizer.json, or piece of a .model."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a malformed record.")] = False,
    lossless: Annotated[
        bool,
        typer.Option(
            "--lossless", help="Stop at a document that the tokenizer does not reproduce exactly."
        ),
    ] = False,
    add_special_tokens: Annotated[
        bool,
        typer.Option(
            "--add-special-tokens",
            help="Put the tokens that a tokenizer.json adds to a text (such as a "
            "beginning-of-sequence token) around every document.",
        ),
    ] = False,
    parse_special_tokens: Annotated[
        bool,
        typer.Option(
            "--parse-special-tokens",
            help="Turn text such as <|endoftext|> inside a document into that token; default: it "
            "stays text.",
        ),
    ] = False,
    zst_window_mb: ZstWindow = 512,
    shard: Annotated[
        str | None,
        typer.Option(help="I/N: only part I of N of the sources, to divide work among machines."),
    ] = None,
    json: Json = False,
) -> None:
    """Tokenise into Megatron .bin/.idx pairs, one per split and subset, with a manifest.

    The file's name decides the split (train, val, test); otherwise documents are divided 98:1:1.
    If there is only a train.jsonl, --split 98,1,1 takes validation and test documents from it.
    If the command is interrupted, rerun it to continue; after it has finished, it does nothing.
    Several machines with one file system divide the sources with --shard 1/4 to --shard 4/4; the
    same command without --shard then joins the shards.

    \b
    pretrain data tokenize texts.jsonl --tokenizer texts.model \\
        --default-subset mine --out data/texts
    """
    from data_pipeline.json_tokenizer import SpecialTokens
    from data_pipeline.prepare import tokenize_sources

    report = tokenize_sources(
        sources, tokenizer, out, workers or usable_cores(), split, text_field, subset_field,
        default_subset, eod_token, strict, zst_window_mb,
        SpecialTokens(add_special_tokens, parse_special_tokens), lossless, shard,
    )  # fmt: skip
    for line in report.shown:
        print(f"skipped {line}", file=sys.stderr)
    if report.problems > len(report.shown):
        print(f"skipped {report.problems - len(report.shown)} more", file=sys.stderr)
    if json:
        from data_pipeline.strict_json import to_json

        print(to_json(report.manifest))
    elif report.already_done:
        print(f"{out}: already complete")
    elif report.shard is not None:
        print(
            f"{out}: {report.shard} is finished; when all are, the same command without --shard "
            "joins them"
        )
    else:
        info(out)


@data_app.command()
def adopt(
    prefixes: Annotated[
        list[Path],
        typer.Argument(help="PREFIX of PREFIX.bin and PREFIX.idx; each one is a subset."),
    ],
    tokenizer: Annotated[
        Path,
        typer.Option(
            help="tokenizer.json, SentencePiece .model, or vocab.json with merges.txt beside it."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; the tokens stay where they are.")],
    split: Annotated[
        str, typer.Option(help="Shares of documents in train, val and test.")
    ] = "98,1,1",
    name: Annotated[
        list[str] | None, typer.Option(help="Name of each subset; default: the prefix's.")
    ] = None,
    eod_token: Annotated[str | None, typer.Option(help="End-of-document token.")] = None,
    packed: Annotated[
        bool | None,
        typer.Option(
            help="Use each sequence as a sample (Pythia's preshuffled Pile); default: if all have "
            "one length."
        ),
    ] = None,
) -> None:
    """Prepare to train on tokens of Megatron-LM or GPT-NeoX without copying them.

    It writes a manifest that points to them, with the tokenizer and the sizes of the held-out
    texts.
    """
    from data_pipeline.adopt import adopt as adopt_pairs
    from pretrain.cli.console import Progress
    from pretrain.errors import UsageError
    from pretrain.runs.aside import whole_folder

    try:
        train, val, test = (float(part) for part in split.split(","))
    except ValueError:
        raise UsageError(f"--split: {split!r} is not three numbers, such as 98,1,1") from None
    progress = Progress(1, "adopt", True)
    with whole_folder(out, "adopt") as aside:
        lines = adopt_pairs(
            prefixes, tokenizer, aside, (train, val, test), name, eod_token, packed,
            lambda done, total: progress.update(done, total=total),
        )  # fmt: skip
    progress.close()
    for line in lines:
        print(line)
    info(out)


@data_app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Tokenised folder.")],
) -> None:
    """Compare every file with its checksum and its counts; exit code 1 if one is damaged.

    Training makes the same check when it first reads data.
    """
    from data_pipeline.checksums import check_folder
    from pretrain.cli.console import Progress

    progress = Progress(1, "check", True)
    damaged, without = check_folder(
        folder, lambda done, total: progress.update(done, total=total), usable_cores()
    )
    progress.close()
    for line in damaged:
        print(line, file=sys.stderr)
    if without:
        print(f"{without} file(s) without checksums (made by another tool or an earlier version)")
    print(f"{folder}: {len(damaged)} problem(s)")
    raise typer.Exit(1 if damaged else 0)


@data_app.command()
def info(
    folder: Annotated[Path, typer.Argument(help="Tokenised folder.")], json: Json = False
) -> None:
    """Show the contents of a tokenised folder."""
    from data_pipeline.prepare import print_info

    print_info(folder, as_json=json)
