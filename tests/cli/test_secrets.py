"""Secrets of a whole small life: none is written where others read, and none is said."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from launchers import cloud
from launchers.site import Site
from pretrain.config.recipe import load_config
from pretrain.errors import UsageError
from tests.slurm import stand_in
from tests.tools import base_recipe, run, write_recipe

MARK = "hunter2-marked-secret"


class Vault(LocalFileSystem):  # type: ignore[misc]
    """Files of this machine behind a URL with a password; its errors say the URL."""

    protocol = "vault"
    closed = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        place = path.split("://", 1)[-1].partition("?")[0]
        inside = "/" + place.split("/", 1)[-1] if "@" in place else place
        stripped: str = super()._strip_protocol(inside)
        return stripped

    def pipe_file(self, path: str, value: bytes, **more: Any) -> None:
        if type(self).closed:
            raise OSError(f"403: vault://me:{MARK}@host/{path}?token={MARK}")
        super().pipe_file(path, value, **more)


@pytest.fixture
def vault(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Vault]]:
    fsspec.register_implementation("vault", Vault, clobber=True)
    monkeypatch.setattr(Vault, "closed", False)
    yield Vault
    sys.modules["fsspec.registry"]._registry.pop("vault", None)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with secrets in every variable that services read."""
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY",
                 "MIRROR_WORD"):  # fmt: skip
        monkeypatch.setenv(name, MARK)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PATH", stand_in(tmp_path / "bin", "sbatch", "7"))
    monkeypatch.chdir(tmp_path)
    os.umask(0o022)
    return tmp_path


def leaks(folder: Path, given: set[str]) -> list[str]:
    """Files with the secret that are not the user's own, nor closed to all others."""
    found = []
    for file in folder.rglob("*"):
        if MARK in file.name:
            found.append(str(file))
        if not file.is_file() or file.relative_to(folder).as_posix() in given:
            continue
        if MARK.encode() in file.read_bytes() and stat.S_IMODE(file.stat().st_mode) != 0o600:
            found.append(f"{file} {stat.S_IMODE(file.stat().st_mode):o}")
    return found


def test_a_whole_life(
    data: Path, home: Path, vault: type[Vault], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = base_recipe(data)
    url = f"vault://me:{MARK}@host{home}/mirror?token={MARK}"
    recipe["checkpoint"]["mirror"] = url
    recipe["logging"] = {"wandb": "project"}
    write_recipe(home / "recipe.yaml", recipe)
    site = {
        "environment": {"KEY": MARK, "OTHER": f"a {MARK} b"}, "container": {"image": "x"},
        "hosts": {"file": "hosts"},
    }  # fmt: skip
    write_recipe(home / "site.yaml", site)
    (home / "hosts").write_text("one slots=1\n")
    assert load_config(home / "recipe.yaml").checkpoint.mirror == url

    def does(code: int, *words: str) -> None:
        assert run(monkeypatch, *words) == code, (words, capfd.readouterr().err)

    does(0, "train", "recipe.yaml", "--out", "run")
    assert len(list((home / "mirror").rglob("manifest.json"))) > 1
    vault.closed = True  # a mirror that refuses: its errors name the URL
    does(0, "train", "recipe.yaml", "train.steps=8", "--out", "run2", "--fork", "run@3")
    vault.closed = False
    does(0, "train", "recipe.yaml", "--dry-run")
    does(0, "evaluate", "run")
    does(0, "export", "run", "--out", "model")
    does(0, "report", "run", "--out", "report.html")
    does(0, "report", "run", "--format", "csv", "--out", "tables")
    shutil.rmtree(home / "run")
    does(0, "train", "recipe.yaml", "--out", "run")  # from the mirror
    does(0, "doctor", "recipe.yaml", "--out", "run")
    does(2, "train", "recipe.yaml", f"checkpoint.mirror=[{url}]")
    does(2, "train", "recipe.yaml", f"checkpoint.mirror={{{url}")
    does(2, "train", "recipe.yaml", f"seed={url}")
    for place in ("slurm", "kubernetes", "skypilot", "mpi", "hostfile"):
        words = ("launch", "recipe.yaml", "--on", place, "--site", "site.yaml", "--out", place)
        if place in ("slurm", "mpi", "hostfile"):
            does(0, *words, "--print")  # the others print what kubectl takes, with its values
        if place not in ("mpi", "hostfile"):
            does(0, *words)
    said = capfd.readouterr()
    assert MARK not in said.out + said.err, [
        line for line in (said.out + said.err).splitlines() if MARK in line
    ]
    assert leaks(home, {"recipe.yaml", "site.yaml"}) == []
    closed = {file.name for file in home.rglob("launch/*") if MARK in file.read_text()}
    assert closed == {"environment", "kubernetes.yaml", "skypilot.yaml"}


@pytest.mark.parametrize("place", ["local", "slurm", "kubernetes", "skypilot", "mpi", "hostfile"])
def test_a_secret_in_an_override_is_refused_where_it_would_be_on_a_command_line(
    place: str, data: Path, home: Path
) -> None:
    from launchers.launch import launch

    recipe = write_recipe(home / "recipe.yaml", base_recipe(data))
    (home / "hosts").write_text("one slots=1\n")
    site = write_recipe(
        home / "site.yaml", {"container": {"image": "x"}, "hosts": {"file": "hosts"}}
    )
    for url in (f"s3://me:{MARK}@host/x", f"s3://host/x?k={MARK}"):
        with pytest.raises(UsageError, match=r"checkpoint\.mirror: .*\$\{NAME\}") as error:
            launch(
                recipe, [f"checkpoint.mirror={url}"], place, site, None, None, None, None, True, []
            )
        assert MARK not in str(error.value)
    kept = ["checkpoint.mirror=s3://me:${WORD}@host/x"]
    launch(recipe, kept, place, site, None, None, None, None, show=True, code=[])


def test_secrets_by_name() -> None:
    """Kubernetes and SkyPilot get names, whose values are written nowhere."""
    values = {"container": {"image": "x"}, "kubernetes": {"secrets": ["keys", "more"]},
              "skypilot": {"secrets": ["HF_TOKEN"]}}  # fmt: skip
    site = Site.model_validate(values)
    tree = cloud.kubernetes(site, ["train"], "one")
    pod = tree["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    assert pod["envFrom"] == [{"secretRef": {"name": "keys"}}, {"secretRef": {"name": "more"}}]
    assert cloud.skypilot(site, ["train"], "one")["secrets"] == {"HF_TOKEN": None}
