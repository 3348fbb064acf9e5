"""Files of foreign models: indexes, shards, pickles, damage."""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.huggingface import open_pretrained
from models.roles import ModelError
from models.tensor_files import TensorFiles
from tests.foreign import (
    ATTENTION,
    TOKENS,
    llama_tensors,
    measure,
    our_logits,
    refused,
    write_model,
)


def shard(folder: Path, count: int = 3) -> Path:
    """The model's single file in shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[number::count])
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_a_single_file_is_read_before_an_index_of_an_earlier_save(tmp_path: Path) -> None:
    """As transformers does; and it is said."""
    from tests.transformers_models import transformers

    older = {name: 3 * one for name, one in llama_tensors().items()}
    folder = shard(write_model(tmp_path / "model", older))
    save_file(llama_tensors(), folder / "model.safetensors", {"format": "pt"})
    said: list[str] = []
    files = TensorFiles(folder, said.append)
    assert torch.equal(files.read("lm_head.weight"), llama_tensors()["lm_head.weight"])
    assert len(said) == 1 and "single file" in said[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        wanted = theirs(input_ids=TOKENS).logits
    assert (our_logits(folder, TOKENS) - wanted).abs().max() < 1e-4


def test_shards_must_be_whole_and_agree(tmp_path: Path) -> None:
    def fresh(name: str) -> tuple[Path, Path, Path]:
        folder = shard(write_model(tmp_path / name, llama_tensors()))
        return (
            folder,
            folder / "model.safetensors.index.json",
            folder / "model-00002-of-00003.safetensors",
        )

    assert our_logits(fresh("good")[0], TOKENS).isfinite().all()
    folder, index, second = fresh("missing")
    second.unlink()
    refused(folder, second.name, "No such file", "1 of 3 shards")
    index.unlink()  # and without its index
    refused(folder, second.name, "No such file")
    folder, index, second = fresh("twice")
    save_file(load_file(second) | {"lm_head.weight": torch.ones(400, 32)}, second)
    refused(folder, "lm_head.weight is in", "remove the file")
    index.unlink()  # nothing else tells which of the two is right
    refused(folder, "lm_head.weight is in", "remove the file")
    folder, index, second = fresh("more")
    save_file(load_file(second) | {f"{ATTENTION}q_proj.bias": torch.ones(32)}, second)
    refused(folder, "index.json", "q_proj.bias", "no shard")
    folder, index, second = fresh("fewer")
    kept = load_file(second)
    lost = sorted(kept)[0]
    save_file({name: one for name, one in kept.items() if name != lost}, second)
    refused(folder, lost, "no shard")
    folder, index, second = fresh("a pipe")
    second.unlink()
    os.mkfifo(second)
    refused(folder, second.name)


def test_types_may_be_mixed(tmp_path: Path) -> None:
    plain = measure(write_model(tmp_path / "plain", llama_tensors()))
    types = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    mixed = {name: one.to(types[number % 4])
             for number, (name, one) in enumerate(llama_tensors().items())}  # fmt: skip
    folder = write_model(tmp_path / "mixed", mixed)
    for name, value in measure(folder).items():
        assert value == pytest.approx(plain[name], rel=0.05)
    assert our_logits(folder, TOKENS).isfinite().all()


def test_pickles_run_nothing_and_do_not_grow(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", llama_tensors())
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    trap = tmp_path / "trap"

    class Foreign:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(trap),))

    for content in ({"weights": Foreign()}, Foreign()):
        torch.save(content, path)
        refused(folder, "more than tensors")
        assert not trap.exists()
    torch.save([torch.ones(3)], path)
    refused(folder, "not a mapping")
    torch.save({"step": 3, **llama_tensors()}, path)
    refused(folder, "step in it is not a tensor")
    huge = llama_tensors()
    huge[f"{ATTENTION}q_proj.weight"] = torch.ones(1).expand(32, 32)
    torch.save(huge, path)
    refused(folder, "larger than its data in the file")
    torch.save(llama_tensors(), path)
    with zipfile.ZipFile(path) as archive:
        parts = {one: archive.read(one) for one in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    refused(folder, "compressed")


@pytest.mark.parametrize("form", ["safetensors", "bin", "index"])
def test_damage_is_one_line(form: str, tmp_path: Path) -> None:
    """Bytes flipped, cut off and put in, anywhere: a refusal or the right shapes, no traceback."""
    folder = write_model(tmp_path / "model", llama_tensors())
    path = folder / "model.safetensors"
    if form == "bin":
        path.unlink()
        path = folder / "pytorch_model.bin"
        torch.save(llama_tensors(), path)
    if form == "index":
        path = shard(folder) / "model.safetensors.index.json"
    good = path.read_bytes()
    rng = random.Random(form)
    failed = 0
    for number in range(60):
        bad = bytearray(good)
        start = rng.randrange(min(len(bad), 4000))
        if number % 3 == 0:
            del bad[start if number % 2 else rng.randrange(len(bad)) :]
        elif number % 3 == 1:
            for place in range(start, min(start + rng.choice([1, 4]), len(bad))):
                bad[place] = rng.randrange(256)
        else:
            bad[start:start] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 8, 64])))
        path.write_bytes(bad)
        try:
            measure(folder)
        except ModelError as error:
            failed += 1
            assert "\n" not in str(error)
    assert failed >= 20


def test_headers_that_claim_too_much(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", llama_tensors())
    path = folder / "model.safetensors"
    huge = {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}
    for header, length in ((json.dumps({"a": huge}).encode(), None), (b"{}", 1 << 40),
                           (b'{"a":' * 10_000, None), (b" " * 100, None)):  # fmt: skip
        path.write_bytes((length or len(header)).to_bytes(8, "little") + header)
        refused(folder, "model.safetensors", "damaged")
    shutil.copy(write_model(tmp_path / "good", llama_tensors()) / "model.safetensors", path)
    for text in (
        "[" * 100_000,
        "[]",
        '{"model_type": "llama"',
        "\ud800".encode("utf-8", "surrogatepass"),
    ):
        config = folder / "config.json"
        config.write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(folder, "config.json", "damaged")


def test_a_good_model_still_has_its_towers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", llama_tensors())
    (tower,) = open_pretrained(folder)
    assert tower.shape.num_layers == 2 and not tower.shape.qk_norm
