"""Two of whatever the verbs read, told apart, and the words of each verb that writes."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.data_pipeline.test_adopt import encoded, write_pair
from tests.foreign import llama_tensors, write_model
from tests.tokenizer_files import byte_level
from tests.tools import ROOT, base_recipe, run, run_processes, write_library, write_recipe


@dataclass(frozen=True)
class Kit:
    """What the verbs read: two of each, told apart."""

    runs: list[Path]
    models: list[Path]
    recipes: list[Path]
    sweeps: list[Path]
    texts: list[Path]
    pairs: list[Path]
    tokenizer: Path
    vocabulary: Path
    site: Path
    clusters: list[Path]
    library: Path
    data: Path

    def words(self, verb: str, which: int, out: Path) -> list[str]:
        """The words of a verb that writes ``out`` from one of two things."""
        own, to = str(self.runs[which]), ["--out", str(out)]
        report = ["report", own, *to]
        if verb.startswith("paper ") and verb not in ("paper fig4", "paper fig5", "paper fig6"):
            runs = [] if verb == "paper fig1" else ["--runs", str(out / "runs")]
            return [*verb.split(), *to, *runs]
        return {
            "train": ["train", str(self.recipes[which]), *to],
            "evaluate": ["evaluate", own, "--documents", "3", *to],
            "export": ["export", own, *to],
            "import": ["import", str(self.models[which]), str(self.recipes[which]), *to],
            "ranks": ["ranks", own, *to],
            "ranks --figures": ["ranks", own, "--figures", str(out)],
            "sweep": ["sweep", str(self.sweeps[which]), *to],
            "report": report,
            "report csv": [*report, "--format", "csv"],
            "report md": [*report, "--format", "md"],
            "launch": ["launch", str(self.recipes[which]), "--on", "kubernetes", "--site",
                       str(self.site), *to],
            "launch --on slurm": ["launch", str(self.recipes[which]), "--on", "slurm", "--site",
                                  str(self.clusters[which]), *to],
            "demo": ["demo", "--steps", str(10 + which), *to],
            "data corpus": ["data", "corpus", *to],
            "data tokenizer": ["data", "tokenizer", str(self.texts[which]), "--vocab-size",
                               str(300 + which), *to],
            "data tokenize": ["data", "tokenize", str(self.texts[which]), "--tokenizer",
                              str(self.tokenizer), "--workers", "1", *to],
            "data adopt": ["data", "adopt", str(self.pairs[which]), "--tokenizer",
                           str(self.vocabulary), "--split", "80,10,10", *to],
            "paper fig4": ["paper", "fig4", "--model", own, *to],
            "paper fig5": ["paper", "fig5", *to],
            "paper fig6": ["paper", "fig6", "--model", own, *to],
        }[verb]  # fmt: skip


def make_kit(folder: Path, data: Path, tokenizer: Path) -> Kit:
    """Two small runs, models, recipes and so on, made in this process."""
    models, runs, recipes, sweeps, texts, pairs = [], [], [], [], [], []
    byte_level(folder / "plain.json")
    vocabulary = _gpt2(folder)
    with pytest.MonkeyPatch.context() as patch:
        for which, sign in enumerate((1.0, -1.0)):
            tensors = {name: sign * one for name, one in llama_tensors().items()}
            models.append(write_model(folder / f"model{which}", tensors))
            recipe = base_recipe(data) | {"seed": which}
            recipe["model"] |= {"num_layers": 1}
            recipe["train"] = {"steps": 2, "global_batch": 2}
            recipe["evaluation"] |= {"every": 2, "documents": 2}
            recipe["ranks"] = {"every": 2}
            recipes.append(write_recipe(folder / f"recipe{which}.yaml", recipe))
            runs.append(folder / f"run{which}")
            assert run(patch, "train", str(recipes[-1]), "--out", str(runs[-1])) == 0
            sweep = {"recipe": recipes[-1].name, "seeds": [1],
                     "grid": {"optimizer.weight_decay.attention": [0.0]}}  # fmt: skip
            sweeps.append(write_recipe(folder / f"sweep{which}.yaml", sweep))
            texts.append(_text(folder / f"text{which}.jsonl", which))
            pairs.append(folder / f"pair{which}")
            write_pair(pairs[-1], encoded(vocabulary)[which::2])
    write_library(folder / "library")
    site = write_recipe(
        folder / "site.yaml", {"container": {"image": "i"}, "processes_per_node": 1}
    )
    clusters = [
        write_recipe(
            folder / f"cluster{which}.yaml",
            {"processes_per_node": 1, "environment": {"TOKEN": f"secret{which}"}},
        )
        for which in (0, 1)
    ]
    return Kit(runs, models, recipes, sweeps, texts, pairs, tokenizer, vocabulary, site,
               clusters, folder / "library", data)  # fmt: skip


def _gpt2(folder: Path) -> Path:
    import tokenizers

    from tests.data_pipeline.test_adopt import EOD, texts

    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(texts(), vocab_size=400, special_tokens=[EOD], show_progress=False)
    made.save_model(str(folder))
    return folder / "vocab.json"


def _text(path: Path, which: int) -> Path:
    rng = random.Random(which)
    words = [f"w{which}{letter}{other}" for letter in "abcdefgh" for other in "ijklmnop"]
    rows = [{"text": " ".join(rng.choices(words, k=40)), "meta": {"pile_set_name": f"S{which}"}}
            for _ in range(150)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask_forks(script: str, asked: list[Any], kit: Kit, folder: Path, seconds: int) -> list[Any]:
    """What became of each entry of ``asked``, by a script of tests/ whose forks are the commands.

    Args:
        script: ``disturbed`` or ``together``.
        seconds: that one entry may take at most.
    """
    request, answer = folder / "request.json", folder / "answers.json"
    request.write_text(
        json.dumps({"asked": asked, "answer": str(answer), "library": str(kit.library)})
    )
    done = run_processes([str(request)], 1, 60 + seconds * len(asked), ROOT / f"tests/{script}.py")
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(answer.read_text())
    return answers
