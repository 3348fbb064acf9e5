"""Names, values and addresses in files of other programs: quoted, unique, closed to others."""

from __future__ import annotations

import inspect
import os
import random
import re
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

import pretrain.cli.cluster
from launchers import batch, cloud, elastic, hosts
from launchers.launch import PLACES, launch
from launchers.site import Site, load_site
from pretrain.errors import UsageError
from tests.slurm import stand_in
from tests.tools import ROOT, base_recipe, write_recipe

pytestmark = pytest.mark.slow

ODD = [chr(code) for code in range(1, 127) if not chr(code).isalnum()] + ["é", "日", "\u202e"]
"""Every mark that a shell, sbatch or YAML could take for more than itself."""


def odd_names(count: int, without: str = "") -> list[str]:
    """Each odd mark alone, then random words of them."""
    marks = [mark for mark in ODD if mark not in without]
    rng = random.Random(3)
    more = ["".join(rng.choices([*marks, *"ab1"], k=rng.randint(2, 12))) for _ in range(count)]
    return [f"a{mark}b" for mark in marks] + more


def as_sbatch_reads(line: str) -> list[str]:
    """The words of an option line, by the rules of Slurm's ``get_argument``: blanks end a word, a
    quote hides them up to its like, a backslash takes what follows as it is, # begins a comment."""
    words: list[str] = []
    word, quote, begun = "", "", False
    marks = iter(line)
    for mark in marks:
        if mark == "\\":
            word, begun = word + next(marks, ""), True
        elif quote:
            quote, word = ("", word) if mark == quote else (quote, word + mark)
        elif mark in "'\"":
            quote, begun = mark, True
        elif mark.isspace():
            words, word, begun = ([*words, word] if begun else words), "", False
        elif mark == "#":
            break
        else:
            word, begun = word + mark, True
    return [*words, word] if begun else words


def test_sbatch_reads_what_was_meant(tmp_path: Path) -> None:
    for name in odd_names(300, without="\n\r"):
        folder = Path("/w") / name.replace("/", "_")
        site = Site.model_validate({"slurm": {"partition": name, "options": {"comment": name}}})
        text = batch.render(site, ["train", "r.yaml", "--out", "x"], tmp_path, folder, tmp_path)
        head = [line for line in text.split("\n") if line.startswith("#SBATCH ")]
        read = dict(as_sbatch_reads(line[8:])[0].partition("=")[::2] for line in head)
        assert all(len(as_sbatch_reads(line[8:])) == 1 for line in head), name
        assert read["--chdir"] == str(folder) and read["--comment"] == name, name
        assert read["--partition"] == name
    for name in ("a\nb", "a\r#SBATCH"):
        site = Site.model_validate({"slurm": {"partition": name}})
        with pytest.raises(UsageError, match="one line"):
            batch.render(site, ["train", "r.yaml", "--out", "x"], tmp_path, tmp_path, tmp_path)


def test_the_shell_reads_what_was_meant(tmp_path: Path) -> None:
    """Words and variables with every odd mark come through bash as they are."""
    values = odd_names(100, without="\n")
    site = Site.model_validate({"environment": {f"V{n}": text for n, text in enumerate(values)}})
    file = tmp_path / "environment"
    file.write_text(batch.shell_file(site.variables))
    shown = subprocess.run(
        ["bash", "-c", f'. {file}; env -0 | grep -z "^V[0-9]"'], capture_output=True, check=True,
        env={"PATH": os.environ["PATH"]},
    ).stdout  # fmt: skip
    found = dict(line.partition("=")[::2] for line in shown.decode().split("\0") if line)
    assert found == site.variables
    words = ["train", *odd_names(50)]
    text = batch.render(site, [*words, "--out", "x"], tmp_path, tmp_path, file)
    (call,) = [part for part in text.split("step --output=")[1:] if "pretrain train" in part]
    assert shlex.split(call.split("\n  code=$?")[0])[-len(words) - 2 : -2] == words


@pytest.mark.parametrize(
    ("site", "culprit"),
    [
        ({"environment": {"A;rm -rf /": 1}}, "is not a valid variable name"),
        ({"environment": {"A$(x)": 1}}, "is not a valid variable name"),
        ({"environment": {"A B": 1}}, "is not a valid variable name"),
        ({"environment": {"": 1}}, "is not a valid variable name"),
        ({"environment": {"A": "x\nB=1"}}, "must be one line"),
        ({"slurm": {"options": {"wrap x": "y"}}}, "is not a long option of sbatch"),
        ({"slurm": {"options": {"a\n#SBATCH --b": 1}}}, "is not a long option of sbatch"),
    ],
)
def test_names_that_are_none(site: dict[str, Any], culprit: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=culprit):
        load_site(write_recipe(tmp_path / "site.yaml", site), {})


def test_secrets_are_in_closed_files_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    values = {"environment": {"KEY": "s3cret word"}, "container": {"image": "x"}}
    site = write_recipe(tmp_path / "site.yaml", values)
    monkeypatch.setenv("PATH", stand_in(tmp_path / "bin", "sbatch", "7"))
    os.umask(0o022)
    for place in ("slurm", "kubernetes", "skypilot"):
        run = tmp_path / place
        assert launch(recipe, [], place, site, None, None, run, None, show=False, code=[]) == 0
        for file in (run / "launch").rglob("*"):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
        assert "s3cret" not in capsys.readouterr().out
    assert "s3cret" not in (tmp_path / "slurm/launch/slurm.sh").read_text()
    assert "s3cret word" in (tmp_path / "slurm/launch/environment").read_text()
    assert (
        launch(recipe, [], "slurm", site, None, None, tmp_path / "shown", None, show=True, code=[])
        == 0
    )
    assert (
        launch(recipe, [], "mpi", site, None, None, tmp_path / "shown", None, show=True, code=[])
        == 0
    )
    assert "s3cret" not in capsys.readouterr().out


def test_every_run_has_an_object_name_of_its_own() -> None:
    rng = random.Random(1)
    folders = [Path("/runs") / name.replace("/", "_") for name in odd_names(500)]
    long = "optimizer.weight_decay.attention="
    folders += [
        Path(f"/runs/{long}{value},seed={seed}") for value in range(20) for seed in range(9)
    ]
    folders += [Path(f"/{sweep}/seed=1") for sweep in range(50)]
    folders += [Path("/runs") / ("x" * rng.randint(1, 200)) for _ in range(50)]
    folders = list(dict.fromkeys(folders))
    names = [cloud.object_name(folder) for folder in folders]
    assert len(set(names)) == len(folders)
    for name in names:
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name), name
        assert len(f"{name}-node-0-9999-abcde") <= 63, name


FIRST_ADDRESSES = [
    # what the name, NodeAddr and the interfaces say; what the ranks are told
    (["127.0.1.1"], "n1", [], ["10.0.0.5"], "10.0.0.5"),
    (["127.0.0.1"], "10.1.1.1", ["10.1.1.1"], ["172.17.0.1"], "10.1.1.1"),
    (["10.0.0.7", "10.0.0.7"], "n1", ["10.0.0.7"], [], "10.0.0.7"),
    ([], "10.2.0.1", ["10.2.0.1"], [], "10.2.0.1"),
    (["::1", "127.0.1.1", "fd00::7"], "n1", [], [], "fd00::7"),
    (["fe80::1", "192.168.1.4"], "n1", [], [], "192.168.1.4"),
    ([], "127.0.0.1", ["127.0.0.1"], [], "127.0.0.1"),  # nodes that are one machine
    ([], "", [], [], "127.0.0.1"),
]


@pytest.mark.parametrize(("name", "given", "behind", "own", "wanted"), FIRST_ADDRESSES)
def test_the_first_node_is_told_by_an_address_that_leads_there(
    name: list[str], given: str, behind: list[str], own: list[str], wanted: str, tmp_path: Path
) -> None:
    """The script's own lines, with what a machine would answer put in."""
    text = batch.render(Site(), ["train", "r", "--out", "x"], tmp_path, tmp_path, tmp_path)
    lines = text[text.index("node=$(scontrol") : text.index("export MASTER_PORT")]
    answers = {"node1": name, given: behind}
    tools = {
        "scontrol": f'[ "$2" = hostnames ] && echo node1 || echo "NodeName=n1 NodeAddr={given} x"',
        "getent": "case $2 in "
        + " ".join(f"'{key}') printf '%s STREAM\\n' {shlex.join(found)};;"
                   for key, found in answers.items() if found and key)
        + " esac",
        "hostname": f"echo {' '.join(own)}",
    }  # fmt: skip
    for tool, script in tools.items():
        (tmp_path / tool).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / tool).chmod(0o755)
    found = subprocess.run(
        ["bash", "-uc", f"{lines}\necho $MASTER_ADDR"], capture_output=True, text=True, check=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]"},
    )  # fmt: skip
    assert found.stdout.strip() == wanted, found.stderr


def test_hosts_meet_at_a_name_that_leads_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match=r"hosts\.file: missing"):
        hosts.mpi_command(Site(nodes=2), ["train"], {})
    assert "MASTER_ADDR=127.0.0.1" in hosts.mpi_command(Site(), ["train"], {})
    file = tmp_path / "hosts"
    for first in ("localhost", "127.0.1.1", "::1"):
        file.write_text(f"{first} slots=1\nother slots=1\n")
        with pytest.raises(UsageError, match="processes connect to the first host"):
            hosts.read_hosts(file)
        file.write_text(f"{first} slots=2\n")
        assert hosts.read_hosts(file) == {first: 2}


def run_script(folder: Path, codes: list[int], left: int, saved: bool = False) -> tuple[int, str]:
    """The batch script with srun's answers put in; returns its code and what it said."""
    site = Site.model_validate({"restarts": 2, "doctor": False, "slurm": {"warning": 100}})
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    text = batch.render(site, ["train", "r", "--out", "x"], run, folder, folder)
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    step = 'n=$(cat starts 2>/dev/null || echo 0); echo $((n+1)) > starts; sed -n "$((n+1))p" codes'
    save = f'echo step-$n > "{run}/checkpoints/latest"; ' if saved else ""
    tools = {"scontrol": 'echo "$*" >> calls; echo n1', "srun": f"code=$({step}); {save}exit $code",
             "getent": ":"}  # fmt: skip
    for tool, script in tools.items():
        (folder / tool).write_text(f"#!/bin/bash\ncd {folder}\n{script}\n")
        (folder / tool).chmod(0o755)
    end = int(subprocess.run(["date", "+%s"], capture_output=True, check=True).stdout) + left
    done = subprocess.run(
        ["bash"], input=text, text=True, capture_output=True, check=False,
        env={"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n1",
             "SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_END_TIME": str(end)},
    )  # fmt: skip
    calls = (folder / "calls").read_text()
    return done.returncode, done.stdout + ("REQUEUED" if "requeue 5" in calls else "")


@pytest.mark.parametrize(
    ("codes", "left", "starts", "code", "requeued"),
    [
        ([0], 9999, 1, 0, False),
        ([137, 0], 9999, 2, 0, False),
        ([75], 9999, 1, 0, True),
        ([1], 9999, 1, 1, False),
        ([2], 9999, 1, 2, False),
        ([137, 139, 134], 9999, 3, 134, False),
        ([137, 75], 9999, 2, 0, True),
        ([143], 50, 1, 0, True),  # the allocation ends: not started again inside it
        ([137], 50, 1, 0, True),
        ([1], 50, 1, 1, False),
    ],
)
def test_what_the_batch_script_does_with_codes(
    codes: list[int], left: int, starts: int, code: int, requeued: bool, tmp_path: Path
) -> None:
    found, said = run_script(tmp_path, codes, left)
    assert (found, "REQUEUED" in said) == (code, requeued), said
    assert said.count(": start on 1 node(s)") == starts, said


class FirstFailure:
    """What torchrun says of the first process that failed."""

    def __init__(self, exitcode: int) -> None:
        self.exitcode = exitcode

    def get_first_failure(self) -> tuple[int, Any]:
        return 0, self


def test_torchrun_gives_time_and_the_code() -> None:
    assert [elastic.exit_code(FirstFailure(code)) for code in (75, 2, -9)] == [75, 2, 137]
    waited = []
    close = elastic.patient(lambda _, signal, timeout: waited.append(timeout), 175)
    close(None)
    close(None, timeout=300)
    assert waited == [175, 300]
    words = ["train", "r.yaml"]
    for kind in ("PyTorchJob", "JobSet"):
        values = {"container": {"image": "x"}, "kubernetes": {"kind": kind, "grace": 90}}
        text = str(cloud.kubernetes(Site.model_validate(values), words, "one"))
        assert f"'name': '{elastic.GRACE}', 'value': '85'" in text
        assert "'-P', '-m', 'launchers.elastic'" in text


def as_kubernetes_reads(text: str, variables: dict[str, str]) -> str:
    """Expansion in a pod's command and environment: ``$(NAME)`` if known, ``$$`` is one ``$``."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda found: "$" if found[0] == "$$" else variables.get(found[1], found[0]),
        text,
    )


@pytest.mark.parametrize("kind", ["PyTorchJob", "JobSet"])
def test_a_pod_gets_words_and_values_as_they_are(kind: str) -> None:
    marks = ["$$", "$(OMP_NUM_THREADS)", "$$(A)", "$", "$(", "$$$", "$(A)$(B)"]
    for name in [*marks, *odd_names(200)]:
        values = {
            "container": {"image": "x"}, "kubernetes": {"kind": kind}, "setup": [f": {name}"],
            "environment": {"A": name} if "\n" not in name else {},
        }  # fmt: skip
        site = Site.model_validate(values)
        tree = cloud.kubernetes(site, ["train", "r.yaml", "--out", name], "one")
        spec = tree["spec"]
        if kind == "JobSet":
            template = spec["replicatedJobs"][0]["template"]["spec"]["template"]
        else:
            template = spec["pytorchReplicaSpecs"]["Worker"]["template"]
        one = template["spec"]["containers"][0]
        known = {"OMP_NUM_THREADS": "1", "A": "a", "B": "b"}
        read = [as_kubernetes_reads(word, known) for word in one["command"]]
        assert read[-1] == name and any(f": {name}\n" in word for word in read)
        found = {entry["name"]: as_kubernetes_reads(entry["value"], known) for entry in one["env"]}
        assert found.get("A", name) == name


def as_deepspeed_sends(word: str) -> str:
    """A word on the command line of another host's shell, by ``PDSHRunner.parse_user_args``."""
    return '"' + word.replace('"', '\\"') + '"' if " " in word else word


def as_deepspeed_exports(line: str) -> str:
    """A line of ``DS_ENV_FILE`` as that shell gets it, by ``MultiNodeRunner.add_export``."""
    key, value = line.split("=", maxsplit=1)
    value = value.strip()
    return f"export {key}={value}" if re.fullmatch(r"[\w@%+=:,./-]*", value) else (
        f'export {key}="{value}"'
    )  # fmt: skip


def in_bash(script: str) -> list[str]:
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def test_words_and_values_on_hosts_are_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept by DeepSpeed's launcher and the shell behind it, or refused by name."""
    site = Site.model_validate({"nodes": 2, "hosts": {"file": "hosts"}})
    names = ["runs/lr$HOME", "/s/a;touch x", "o'neil", 'p"q', "{a,b}", *odd_names(200, "\0")]
    kept = refused = 0
    for name in names:
        try:
            words = hosts.deepspeed_command(site, ["--out", name], {"h1": 1, "h2": 1})
            sent = " ".join(as_deepspeed_sends(word) for word in words[-2:])
            assert in_bash(f"printf '%s\\0' {sent}") == ["--out", name]
            kept += 1
        except UsageError as error:
            refused += 1
            assert " " in name and repr(name) in str(error)
        try:
            sent = as_deepspeed_exports(hosts.exports({"A": name}).removesuffix("\n"))
            assert in_bash(f"{sent}; printf '%s\\0' \"$A\"") == [name]
        except UsageError as error:
            assert "environment.A" in str(error) and name not in str(error).split(": ", 1)[0]
    assert kept > 150 and refused
    assert hosts.exports({"NCCL_SOCKET_IFNAME": "^docker0,lo"}).strip().endswith("=^docker0,lo")
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    with pytest.raises(UsageError, match="without quoting"):
        hosts.deepspeed_command(site, ["train"], {"h1": 1, "h2": 1})


@pytest.mark.parametrize("place", PLACES)
def test_every_place_is_in_the_help_on_the_page_and_in_the_form(place: str) -> None:
    option = inspect.signature(pretrain.cli.cluster.launch).parameters["on"].annotation
    assert re.search(rf"\b{place}\b", option)
    assert f"\n| `{place}` | " in (ROOT / "docs/launch.md").read_text()
    form = (ROOT / ".github/ISSUE_TEMPLATE/cluster.yml").read_text()
    assert place == "local" or re.search(rf"\b{place}\b", form)
