"""From a recipe and a site file to jobs, manifests and commands; Slurm for real."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from launchers import batch, cloud, hosts
from launchers.site import Site, load_site
from pretrain.cluster import doctor
from pretrain.errors import UsageError
from pretrain.runs.metrics import read_metrics
from tests.tools import ROOT, base_recipe, metrics_of, pretrain, run, weights_of, write_recipe
from tests.warm import run_warm

SITES = sorted((ROOT / "configs/sites").glob("*.yaml"))


def site_of(**values: Any) -> Site:
    return Site.model_validate(values)


# --- what is rendered ------------------------------------------------------------------------


@pytest.mark.parametrize("path", SITES, ids=lambda path: path.stem)
def test_sites_of_the_repository_load(path: Path) -> None:
    assert load_site(path, {}).processes >= 1


def test_a_batch_script(tmp_path: Path) -> None:
    site = site_of(
        nodes=2, gpus_per_node=4, cpus_per_process=6, setup=["module load cuda"],
        environment={"NCCL_SOCKET_IFNAME": "ib0; rm -rf /"},
        slurm={"partition": "gpu", "time": "1-00:00:00", "warning": 90,
               "options": {"constraint": "h100"}},
        container={"kind": "pyxis", "image": "a b.sqsh", "mounts": ["/data:/data"]},
    )  # fmt: skip
    words = ["train", "/r x.yaml", "optimizer.learning_rate=1e-3", "--out", "/runs/one"]
    text = batch.render(site, words, Path("/runs/one"), tmp_path, tmp_path / "environment")
    head = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    wanted = ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=6",
              "partition=gpu", "time=1-00:00:00", "signal=USR1@90", "constraint=h100", "requeue",
              "open-mode=append", "job-name=rankdecay-one")  # fmt: skip
    for option in wanted:
        assert f"#SBATCH --{option}" in head, option
    assert not any("account" in line for line in head)  # not said: not asked for
    assert f"\n. {tmp_path}/environment\n" in text and "ib0" not in text
    assert batch.shell_file(site.variables) == "export NCCL_SOCKET_IFNAME='ib0; rm -rf /'\n"
    assert "'--container-image=a b.sqsh' --container-mounts=/data:/data" in text
    (step,) = [line for line in text.splitlines() if "pretrain train" in line]
    assert shlex.split(step)[-7:] == ["-m", "pretrain", *words]
    assert any("pretrain doctor" in line and "--fork" not in line for line in text.splitlines())
    checked = subprocess.run(
        ["bash", "-n"], input=text, text=True, check=False, capture_output=True
    )
    assert checked.returncode == 0, checked.stderr
    apptainer = site_of(container={"kind": "apptainer", "image": "x.sif"}, gpus_per_node=1)
    assert "apptainer exec --nv x.sif python3 -P -m pretrain" in batch.render(
        apptainer, words, Path("/runs/one"), tmp_path, tmp_path / "environment"
    )


def test_manifests() -> None:
    pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    import kubernetes_validate

    words = ["train", "r.yaml", "--out", "/runs/one"]
    base = {
        "nodes": 4, "min_nodes": 2, "gpus_per_node": 8, "cpus_per_process": 4, "restarts": 5,
        "environment": {"A": 1}, "container": {"image": "registry/rankdecay:1"},
    }  # fmt: skip
    more = {"namespace": "team", "claims": {"pile": "/data"}, "memory": "100Gi",
            "node_selector": {"gpu": "h100"}, "grace": 77}  # fmt: skip
    found = cloud.kubernetes(site_of(**base, kubernetes=more), words, "one")
    worker = found["spec"]["pytorchReplicaSpecs"]["Worker"]
    policy = found["spec"]["elasticPolicy"]
    assert (policy["minReplicas"], policy["maxReplicas"], policy["maxRestarts"]) == (2, 4, 5)
    assert worker["replicas"] == 4 and found["metadata"]["namespace"] == "team"
    jobset = cloud.kubernetes(site_of(**base, kubernetes={**more, "kind": "JobSet"}), words, "one")
    job = jobset["spec"]["replicatedJobs"][0]["template"]
    assert job["spec"]["completions"] == 4 and job["spec"]["completionMode"] == "Indexed"
    pods = (worker["template"], job["spec"]["template"])
    for pod in pods:
        container = pod["spec"]["containers"][0]
        assert container["resources"]["limits"] == {
            "cpu": "32", "memory": "100Gi", "nvidia.com/gpu": "8"
        }  # fmt: skip
        assert container["command"][-6:] == ["-m", "pretrain", *words]
        assert {"name": "A", "value": "1"} in container["env"]
        assert pod["spec"]["terminationGracePeriodSeconds"] == 77
    # The parts that Kubernetes itself defines, against its own schema.
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **pods[0]}
    kubernetes_validate.validate(whole, "1.30", strict=True)
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job}
    kubernetes_validate.validate(whole, "1.30", strict=True)
    whole["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(whole, "1.30", strict=True)


def test_a_skypilot_task() -> None:
    site = site_of(
        nodes=2, gpus_per_node=8, restarts=2,
        skypilot={"accelerators": "H100:8", "spot": True, "mounts": {"/data": "s3://pile"}},
    )  # fmt: skip
    task = cloud.skypilot(site, ["train", "r.yaml", "--out", "runs/a b"], "one")
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:8"
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert "--nnodes 2 --nproc-per-node 8" in task["run"] and "--out 'runs/a b'" in task["run"]
    checked = subprocess.run(
        ["bash", "-n"], input=task["run"], text=True, check=False, capture_output=True
    )
    assert checked.returncode == 0, checked.stderr
    with pytest.raises(UsageError, match=r"skypilot\.accelerators"):
        cloud.skypilot(site_of(gpus_per_node=1), ["train"], "one")


def test_hosts(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("one slots=4  # fast\n\ntwo slots=2\n")
    found = hosts.read_hosts(file)
    assert found == {"one": 4, "two": 2}
    site = site_of(hosts={"file": str(file)}, environment={"A": "x y"})
    words = hosts.mpi_command(site, ["train", "r.yaml"], found)
    assert words[words.index("-np") + 1] == "6" and "MASTER_ADDR=one" in words
    assert words[words.index("A") - 1] == "-x" and not any("x y" in word for word in words)
    words = hosts.deepspeed_command(site, ["train", "r.yaml"], found)
    assert words[words.index("--hostfile") + 1] == str(file) and words[-2:] == ["train", "r.yaml"]
    for text in ("one slots=4\none slots=2\n", "one slots=x\n", "# nothing\n"):
        file.write_text(text)
        with pytest.raises(UsageError, match="hosts"):
            hosts.read_hosts(file)


# --- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "words", "culprit"),
    [
        ({"nodes": 2, "nods": 1}, ["--on", "slurm"], "nods: unknown key; did you mean nodes?"),
        ({"slurm": {"partiton": "x"}}, ["--on", "slurm"], "did you mean partition?"),
        ({"slurm": {"time": 3600}}, ["--on", "slurm"], "slurm.time: 3600 is a number; write it"),
        ({"nodes": 1, "min_nodes": 2}, ["--on", "slurm"], "min_nodes: 2 is more than nodes"),
        ({"processes_per_node": 3}, ["--on", "slurm"], "train.global_batch: 8"),
        ({"nodes": 4, "min_nodes": 3}, ["--on", "slurm"], "cannot be divided among 3"),
        ({"nodes": 3}, ["--on", "slurm", "grid.tensor_parallel=2"], "does not divide 3"),
        ({"nodes": 2}, ["--on", "local"], "nodes: 2 nodes cannot be used with --on local"),
        ({}, ["--on", "sge"], "--on: 'sge' is not one of local, slurm"),
        ({}, ["--on", "hostfile"], "hosts.file: missing"),
        ({"hosts": {"file": "/none"}}, ["--on", "mpi"], "/none: cannot read the hosts"),
        ({}, ["--on", "kubernetes"], "container.image: missing"),
        ({"container": {"kind": "pyxis"}}, ["--on", "slurm"], "container.image: missing"),
        ({}, ["--on", "slurm", "--out", "a%b"], "--out: 'a%b': Slurm allows no %"),
    ],
)
def test_mistakes_are_one_line(
    site: dict[str, Any], words: list[str], culprit: str, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    file = write_recipe(tmp_path / "site.yaml", site)
    assert run(monkeypatch, "launch", str(recipe), "--site", str(file), *words) == 2
    text = capsys.readouterr().err
    assert culprit in text and len(text.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


# --- what runs ---------------------------------------------------------------------------------


def recipe_for_two(folder: Path, data: Path, steps: int) -> Path:
    values = base_recipe(data)
    values["train"]["steps"] = steps
    values["checkpoint"] = {"every": steps, "keep": 0}
    values["ranks"] = {"every": steps // 2}
    values["evaluation"]["every"] = steps
    values["grid"] = {"tensor_parallel": 2}
    return write_recipe(folder / "recipe.yaml", values)


def test_here(data: Path, tmp_path: Path) -> None:
    """On this machine; DeepSpeed's launcher is asked for as a command (it wants ssh)."""
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    (tmp_path / "hosts").write_text("one slots=2\n")
    values = {"hosts": {"file": str(tmp_path / "hosts")}, "environment": {"RANKDECAY_TEST": "1"}}
    site = write_recipe(tmp_path / "site.yaml", {**values, "restarts": 0})
    words = ["launch", str(recipe), "--site", str(site), "--out", str(tmp_path / "run")]
    done = pretrain(*words, "--on", "hostfile", "--print")
    assert done.returncode == 0 and "--master_addr one" in done.stdout, done.stderr
    assert not (tmp_path / "run").exists()
    done = pretrain(*words, "--on", "local")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/evaluation.json").exists()


def test_doctor(data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    words = ["doctor", str(recipe), "--out", str(tmp_path / "run"), "--json"]
    done = pretrain(*words, "grid.tensor_parallel=2", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {one["check"]: one for one in json.loads(done.stdout)}
    assert {"versions", "code", "data", "clocks", "disk", "world links", "tensor links"} <= set(
        found
    )
    assert all(one["state"] != "fail" for one in found.values())
    assert "the same on 2 process(es)" in found["data"]["text"]
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".doctor*"))


class Ranks:
    """What the doctor asks of a grid, with the answers of several ranks put in."""

    world_size, is_main = 3, True

    def __init__(self, answers: list[Any]) -> None:
        self._answers = answers

    def gather(self, _: Any) -> list[Any]:
        return self._answers


class Collected(Ranks):
    """One rank, which says what it was asked for."""

    def __init__(self) -> None:
        super().__init__([])

    def gather(self, mine: Any) -> list[Any]:
        return [mine]


def test_the_doctor_names_who_differs() -> None:
    same = Ranks([("a", "1f"), ("a", "1f"), ("b", "1f")])
    assert [one.state for one in doctor._alike(same, "code", "1f")] == ["ok"]  # type: ignore[arg-type]
    (found,) = doctor._alike(Ranks([("a", "1f"), ("a", "1f"), ("b", "2e")]), "code", "1f")  # type: ignore[arg-type]
    assert found.state == "fail" and "rank 2 on b has 2e" in found.text
    old, new = {"python": "3.11", "torch": "2.12", "deepspeed": "1"}, {"torch": "2.13"}
    (found,) = doctor._alike(Ranks([("a", old), ("b", {**old, **new})]), "versions", old)  # type: ignore[arg-type]
    assert found.state == "fail" and "rank 1 on b has torch 2.13" in found.text
    lost = "unreadable (No such file or directory: x)"
    (found,) = doctor._alike(Ranks([("a", lost)]), "data", lost)  # type: ignore[arg-type]
    assert found.state == "fail"


def test_the_doctor_of_a_program_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the pyproject.toml beside the code; without that it says so, and goes on."""

    def not_there(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", not_there)
    lines = doctor._required(ROOT)
    assert lines and any(line.startswith("torch") for line in lines)
    cases = {
        '[project]\ndependencies = ["packaging>=1"]': "ok",
        '[project]\ndependencies = ["packaging>=1,<2", "not-there>3"]': "warn",
        "[project]\ndependencies = [\"not-there>3; python_version < '3'\"]": "ok",
        "[project": "warn",
        "": "warn",
        None: "warn",
    }
    for number, (text, state) in enumerate(cases.items()):
        top = tmp_path / str(number)
        top.mkdir()
        if text is not None:
            (top / "pyproject.toml").write_text(text)
        read = text is not None and text.endswith("]")
        (found,) = doctor._requirements(Collected(), top)  # type: ignore[arg-type]
        assert found.state == state, text
        assert ("unknown: the program" in found.text) == (not read)
        if read and state == "warn":
            assert "packaging" in found.text and "not-there is missing" in found.text


def test_the_doctor_wants_room_for_the_checkpoints(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    words = ["doctor", str(recipe), "--out", str(tmp_path / "run")]
    assert run(monkeypatch, *words) == 0
    assert "fit for a run" in capsys.readouterr().out
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))  # type: ignore[attr-defined]
    assert run(monkeypatch, *words) == 1
    assert "kept checkpoints take" in capsys.readouterr().out


@pytest.mark.slow
def test_warned_and_requeued_on_slurm(
    data: Path, tmp_path: Path, slurm: dict[str, str], request: pytest.FixtureRequest
) -> None:
    """A two-node job of `pretrain launch` gets Slurm's warning signal, is requeued, finishes.

    In the long form the signal is that of the job's own time limit.
    """
    by_limit = request.config.getoption("--long")
    steps = 3000 if by_limit else 300
    recipe = recipe_for_two(tmp_path, data, steps)
    out = tmp_path / "run"
    settings = {"nodes": 2, "processes_per_node": 1, "cpus_per_process": 1,
                "slurm": {"time": "2", "warning": 40} if by_limit else {"time": "20"}}  # fmt: skip
    site = write_recipe(tmp_path / "site.yaml", settings)
    words = ["launch", str(recipe), "--on", "slurm", "--site", str(site), "--out", str(out)]
    done = run_warm(words, slurm, tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    number = done.stdout.split("job ")[1].split(";")[0]
    log = out / "logs" / f"job-{number}.log"
    wait_until(lambda: len(read_metrics(out)) > 5, 300, log)
    began = time.monotonic()
    if not by_limit:
        subprocess.run(["scancel", "--signal=USR1", number], env=slurm, check=True)
    wait_until(lambda: "requeued from" in log.read_text(), 300, log)
    seen = time.monotonic()
    wait_until(lambda: log.read_text().count("start on 2 node(s)") >= 2, 240, log)
    again = time.monotonic()
    wait_until(lambda: "complete" in log.read_text(), 900, log)
    text = log.read_text()
    assert ": start on 2 node(s) from none" in text and "fit for a run" in text
    assert "requeued from step-" in text and "start on 2 node(s) from step-" in text
    assert "stopped by" in (out / "logs/rank-0.log").read_text()
    assert (out / "logs/rank-1.log").exists()
    same = tmp_path / "same"
    done = pretrain("train", str(recipe), "--out", str(same), processes=2)
    assert done.returncode == 0, done.stderr
    assert metrics_of(out) == metrics_of(same)
    weights, wanted = weights_of(out), weights_of(same)
    assert all((weights[name] == value).all() for name, value in wanted.items())
    assert len(json.loads((out / "environment.json").read_text())) >= 2
    what = "its time limit" if by_limit else "scancel --signal"
    found = {
        "fault": f"Slurm's warning ({what}), two nodes", "times": 1,
        "detected within": f"{seen - began:.0f} s to checkpoint, end and requeue",
        "recovered within": f"{again - seen:.0f} s in the queue",
        "samples lost or repeated": "none", "weights": "bitwise",
    }  # fmt: skip
    request.node.user_properties.append(("fault", found))


def wait_until(is_so: Any, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not (log.exists() and is_so()):
        text = log.read_text() if log.exists() else "no log"
        logs = "".join(one.read_text()[-1500:] for one in log.parent.glob("rank-*.log"))
        assert time.monotonic() < deadline, text + logs
        time.sleep(0.5)


def test_what_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", base_recipe(data))
    site = write_recipe(tmp_path / "site.yaml", {"container": {"image": "x"}})
    words = ["launch", str(recipe), "--site", str(site), "--on", "kubernetes"]
    assert run(monkeypatch, *words, "--print") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert not (tmp_path / "runs").exists()
    assert run(monkeypatch, *words) == 0
    file = tmp_path / "runs/recipe/launch/kubernetes.yaml"
    assert f"kubectl apply -f {file.relative_to(tmp_path)}" in capsys.readouterr().out
    assert yaml.safe_load(file.read_text()) == shown
