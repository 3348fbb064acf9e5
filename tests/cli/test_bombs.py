"""Files of strangers that grow without bound: every verb that reads one ends in bounded memory.

Two lists make the cases: the files that a verb reads, with their format (`PLACES`), and what may
lie in the place of a file of that format (`tests.bombs`).
"""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard

from pretrain.checkpoint.reader import CHECKPOINTS
from tests.bombs import KINDS, Bomb
from tests.foreign import llama_tensors, write_model
from tests.tokenizer_files import byte_level
from tests.tools import ROOT, base_recipe, environment, write_recipe, write_sweep
from tests.warm import run_warm

MOST, SECONDS = 1000, 40
"""MiB and seconds of a processor that a verb may take."""
WAIT = 200.0
"""Seconds until it hangs: other work slows a machine down."""


@dataclass(frozen=True)
class Place:
    """A file that a verb reads."""

    words: str
    """Of the command, in the folder of `stage`."""
    file: str
    kind: str

    def __str__(self) -> str:
        return f"{self.words} | {self.file}"


WEIGHTS = f"{CHECKPOINTS}/step-00000003"
OF_RUN = (
    ("config.yaml", "yaml"), ("identity.json", "json"), ("environment.json", "json"),
    ("evaluation.json", "json"), ("metrics.jsonl", "jsonl"), ("ranks.parquet", "parquet"),
    ("run-id", "binary"), (f"{CHECKPOINTS}/latest", "binary"), ("jumps.json", "json"),
    (f"{WEIGHTS}/manifest.json", "manifest"), (f"{WEIGHTS}/rank-00000.safetensors", "safetensors"),
)  # fmt: skip
OF_DATA = (
    ("manifest.json", "json"), ("tokenizer.model", "binary"),
    *((f"{split}/Github{end}", "index" if end == ".idx" else "binary")
      for split in ("train", "val", "test") for end in (".bin", ".idx", ".docs.npy", ".crc")),
)  # fmt: skip
OF_MODEL = (
    ("config.json", "config"), ("model.safetensors", "safetensors"), ("tokenizer.json", "json"),
    ("generation_config.json", "json"),
)  # fmt: skip
ADOPT = "data adopt data/train/Github --out out --tokenizer"
READERS = (
    "tokenize texts --tokenizer small.model --out out",
    "tokenizer texts --out out.model --vocab-size 300",
)
FORK = "train recipe.yaml --fork run@3 --out out"
OTHERS = (
    ("train recipe.yaml --out out", "recipe.yaml", "yaml"),
    ("train recipe.yaml --dry-run", "recipe.yaml", "yaml"),
    ("plan recipe.yaml", "recipe.yaml", "yaml"),
    ("doctor recipe.yaml", "recipe.yaml", "yaml"),
    ("sweep sweep/small.yaml --out out --dry-run --no-timing", "sweep/small.yaml", "yaml"),
    ("sweep sweep/small.yaml --out out --dry-run --no-timing", "sweep/recipe.yaml", "yaml"),
    ("launch recipe.yaml --on slurm --site site.yaml --print", "site.yaml", "yaml"),
    ("launch recipe.yaml --on mpi --site site.yaml --print", "hosts", "binary"),
    ("ranks model --family family.yaml", "family.yaml", "yaml"),
    ("ranks sharded", "sharded/model.safetensors.index.json", "json"),
    ("ranks pickled", "pickled/pytorch_model.bin", "binary"),
    ("report study --out out.html", "study/sweep.json", "json"),
    ("report study --out out.html", "study/run/metrics.jsonl", "jsonl"),
    ("data tokenize texts --tokenizer small.model --out out", "small.model", "binary"),
    ("data tokenize texts --tokenizer small.json --out out", "small.json", "json"),
    *((f"{ADOPT} small.model", file, kind) for file, kind in (
        ("small.model", "binary"), ("data/train/Github.idx", "index"),
        ("data/train/Github.bin", "binary"),
    )),
    (f"{ADOPT} small.json", "small.json", "json"),
    (f"{ADOPT} old/vocab.json", "old/vocab.json", "json"),
    (f"{ADOPT} old/vocab.json", "old/merges.txt", "binary"),
    *((f"data {verb}", f"texts/train{end}", "source") for verb in READERS
      for end in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet")),
)  # fmt: skip
PLACES = [
    *(Place(words, f"{words.split()[place]}/{file}", kind) for words, place in (
        ("train recipe.yaml --out run", 3), ("train recipe.yaml --out begun", 3),
        ("evaluate run", 1), ("export run --out out", 1), ("report run --out out.html", 1),
        ("ranks run", 1),
    ) for file, kind in OF_RUN),
    *(Place(FORK, f"run/{file}", kind) for file, kind in OF_RUN),
    *(Place(words, f"data/{file}", kind) for words in (
        "train recipe.yaml --out out", "evaluate run", "data check data", "export run --out out",
    ) for file, kind in OF_DATA),
    *(Place(words, f"model/{file}", kind) for words in (
        "ranks model", "import model foreign.yaml --out out",
    ) for file, kind in OF_MODEL),
    *(Place(*one) for one in OTHERS),
]  # fmt: skip
CASES = [(place, bomb) for place in PLACES for bomb in KINDS[place.kind]]


def kind_of(bomb: Bomb) -> str:
    """The name of a bomb; that of a number at one key is the same at every key."""
    return bomb.__name__.partition("_at_")[0]


def sample() -> list[tuple[Place, Bomb]]:
    """Every bomb once, and every kind of file, at places that differ from one to the next."""
    rng = random.Random(1)
    bombs = dict.fromkeys(kind_of(bomb) for _, bomb in CASES)
    chosen = [rng.choice([one for one in CASES if kind_of(one[1]) == name]) for name in bombs]
    met = {place.kind for place, _ in chosen}
    return chosen + [
        rng.choice([one for one in CASES if one[0].kind == kind])
        for kind in KINDS
        if kind not in met
    ]


def named(case: tuple[Place, Bomb]) -> str:
    return f"{case[0]}-{case[1].__name__}".replace("/", ".")


@pytest.fixture(scope="module")
def stage(
    trained: Path, data: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with one of everything that a verb reads."""
    folder = tmp_path_factory.mktemp("stage") / "stage"
    shutil.copytree(data, folder / "data")
    write_recipe(folder / "recipe.yaml", base_recipe(Path("data")))
    foreign = base_recipe(Path("data"))
    write_recipe(folder / "foreign.yaml", foreign)
    for name in ("run", "begun", "study/run"):
        shutil.copytree(trained, folder / name)
        config = (folder / name / "config.yaml").read_text()
        (folder / name / "config.yaml").write_text(config.replace(str(data), "data"))
        (folder / name / "jumps.json").write_text("[]")
    shutil.rmtree(folder / "begun" / CHECKPOINTS / "step-00000006")
    (folder / "begun" / CHECKPOINTS / "latest").write_text("step-00000003")
    (folder / "study/sweep.json").write_text(json.dumps({"baseline": None, "runs": {"run": {}}}))
    write_sweep(folder / "sweep", Path("data"))
    (folder / "hosts").write_text("one slots=2\n")
    write_recipe(folder / "site.yaml", {"nodes": 1, "hosts": {"file": "hosts"}})
    tensors = llama_tensors()
    for name in ("model", "sharded", "pickled"):
        model = write_model(folder / name, tensors)
        byte_level(model / "tokenizer.json")
        (model / "generation_config.json").write_text("{}")
    (folder / "sharded/model.safetensors").rename(
        folder / "sharded/model-00001-of-00001.safetensors"
    )
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "sharded/model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "pickled/model.safetensors").unlink()
    torch.save(tensors, folder / "pickled/pytorch_model.bin")
    write_recipe(
        folder / "family.yaml",
        {"model_types": ["llama"], "layer": "model.layers.{layer}.self_attn."},
    )
    shutil.copy(tokenizer, folder / "small.model")
    made = byte_level(folder / "small.json")
    (folder / "old").mkdir()
    made.model.save(str(folder / "old"))
    records = [{"text": f"number {i}", "meta": {"pile_set_name": "Web"}} for i in range(50)]
    lines = "".join(json.dumps(one) + "\n" for one in records).encode()
    (folder / "texts").mkdir()
    for end, pack in (
        (".jsonl", bytes),
        (".jsonl.gz", gzip.compress),
        (".jsonl.zst", zstandard.compress),
        (".txt", bytes),
    ):
        (folder / f"texts/train{end}").write_bytes(pack(lines))
    pq.write_table(pa.Table.from_pylist(records), folder / "texts/train.parquet")
    return folder


def check(stage: Path, place: Place, bomb: Bomb, folder: Path) -> int:
    """Run a verb on a bomb; returns the most memory that it took, in MiB.

    Raises:
        AssertionError: if it takes too much memory or time, or ends in more than one line.
    """
    work = folder / "work"
    shutil.copytree(stage, work)
    bomb(work / place.file)
    words, script = place.words.split(), ROOT / "tests" / "measured.py"
    with contextlib.chdir(work):
        done = run_warm([str(SECONDS), *words], environment(), folder, script=script, timeout=WAIT)
    said = re.fullmatch(r"(.*?)peak (\d+)\n", done.stderr, re.DOTALL)
    assert said, (done.returncode, done.stderr[-500:])
    errors = [line for line in said[1].splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said[1] and done.returncode in (0, 1, 2), said[1][-1500:]
    if done.returncode and "data check" not in place.words:  # which lists all that is wrong
        assert len(errors) == 1 and len(errors[0]) < 1000, said[1][-1500:]
    if done.returncode:
        culprits = {Path(place.file).name.partition(".")[0], place.file.partition("/")[0]}
        assert any(word in said[1] + done.stdout for word in culprits), said[1][-1500:]
    assert int(said[2]) < MOST, said[2]
    return int(said[2])


@pytest.mark.parametrize("case", sample(), ids=named)
def test_bombs(case: tuple[Place, Bomb], stage: Path, tmp_path: Path) -> None:
    check(stage, *case, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("place", PLACES, ids=lambda place: str(place).replace("/", "."))
def test_every_bomb_at_every_place(place: Place, stage: Path, tmp_path: Path) -> None:
    for number, bomb in enumerate(KINDS[place.kind]):
        folder = tmp_path / str(number)
        folder.mkdir()
        check(stage, place, bomb, folder)
        shutil.rmtree(folder)
