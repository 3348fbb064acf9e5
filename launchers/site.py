"""SITE.yaml: the properties of a cluster, written once and kept apart from recipes."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pretrain.config.explain import explain
from pretrain.config.mapping import read_mapping
from pretrain.config.section import Section
from pretrain.errors import UsageError


class ContainerConfig(Section):
    """The image in which the job runs."""

    kind: Literal["none", "pyxis", "apptainer"] = Field(
        "none", description="how Slurm starts it; Kubernetes and SkyPilot use only the image"
    )
    image: str = ""
    mounts: list[str] = Field([], description="HOST:CONTAINER")


class SlurmSite(Section):
    """Options of `sbatch`."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = Field(
        "", description="time limit: minutes, H:MM:SS or D-HH:MM:SS; empty: the partition's"
    )
    warning: int = Field(
        180, ge=1, description="seconds before the limit when SIGUSR1 asks for a checkpoint"
    )
    memory: str = Field("", description="memory per node, such as 200G")
    options: dict[str, str | int] = Field(
        {}, description="further long options of sbatch, such as constraint: h100"
    )

    @field_validator("options")
    @classmethod
    def _are_options(cls, value: dict[str, str | int]) -> dict[str, str | int]:
        for name in value:
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name, re.ASCII):
                raise ValueError(f"slurm.options: {name!r} is not a long option of sbatch")
        return value

    @field_validator("time", mode="before")
    @classmethod
    def _in_quotes(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError(
                f'slurm.time: {value} is a number; write it in quotes, such as "60" (minutes) or '
                '"1:00:00", which YAML would read as 3600'
            )
        return value


class HostsSite(Section):
    """Settings of `--on hostfile` and `--on mpi`."""

    file: str = Field("", description="a file with lines `HOST slots=N`")
    launcher: Literal["pdsh", "openmpi", "mpich", "impi", "slurm", "mvapich"] = Field(
        "pdsh", description="how DeepSpeed reaches the hosts (--on hostfile)"
    )
    mpirun: list[str] = Field(["mpirun"], description="the program and its options (--on mpi)")


class KubernetesSite(Section):
    """Settings of `--on kubernetes`."""

    kind: Literal["PyTorchJob", "JobSet"] = Field(
        "PyTorchJob", description="Kubeflow's training operator, or JobSet with torchrun"
    )
    namespace: str = ""
    claims: dict[str, str] = Field(
        {}, description="persistent volume claims: NAME: /where/it/is/mounted"
    )
    node_selector: dict[str, str] = Field({}, description="labels that a node must have")
    memory: str = Field("", description="memory per pod, such as 200Gi")
    secrets: list[str] = Field(
        [], description="names of Secrets whose keys become environment variables of every process"
    )
    grace: int = Field(180, ge=1, description="seconds between SIGTERM and SIGKILL")
    gpu_resource: str = "nvidia.com/gpu"


class SkyPilotSite(Section):
    """Settings of `--on skypilot`."""

    accelerators: str = Field("", description="of one node, such as H100:8")
    infra: str = Field("", description="such as aws, gcp/us-central1 or kubernetes; empty: any")
    spot: bool = Field(False, description="use spot instances, which can be taken away")
    setup: list[str] = Field(
        ["pip install -e ."], description="shell lines that install this program on a node"
    )
    mounts: dict[str, str] = Field({}, description="/remote/path: local path or bucket URL")
    secrets: list[str] = Field(
        [], description="variables that `sky jobs launch --secret NAME` takes from your environment"
    )


class Site(Section):
    """The machines to launch on, independent of what starts the processes."""

    nodes: int = Field(1, ge=1)
    min_nodes: int = Field(
        0,
        ge=0,
        description="continue with at least this many if some are missing; 0: all are needed",
    )
    gpus_per_node: int = Field(0, ge=0)
    processes_per_node: int = Field(0, ge=0, description="0: one per GPU, or one")
    gpu: Literal["", "a100", "a100-40", "h100", "h200", "b200", "l40s", "mi300x"] = Field(
        "", description="what they are, for the plan before a launch; empty: h100 is assumed"
    )
    gpu_hour_price: float = Field(
        0.0, ge=0, description="of one GPU, in any currency; 0: not known, no cost is shown"
    )
    cpus_per_process: int = Field(0, ge=0, description="0: the scheduler's default")
    restarts: int = Field(3, ge=0, description="how often the job restarts itself")
    doctor: bool = Field(True, description="check the allocation first (Slurm): `pretrain doctor`")
    port: int = Field(
        29_500,
        ge=1024,
        le=65_535,
        description="port of the rendezvous, where the launcher lets us choose it",
    )
    python: str = Field(
        "", description="Python on the nodes; empty: this one, or `python3` in an image"
    )
    setup: list[str] = Field([], description="shell lines before the job: modules, activation")
    environment: dict[str, str | int] = Field(
        {}, description="environment variables of every process"
    )
    container: ContainerConfig = ContainerConfig()
    slurm: SlurmSite = SlurmSite()
    hosts: HostsSite = HostsSite()
    kubernetes: KubernetesSite = KubernetesSite()
    skypilot: SkyPilotSite = SkyPilotSite()

    @field_validator("environment")
    @classmethod
    def _are_names(cls, value: dict[str, str | int]) -> dict[str, str | int]:
        for name, text in value.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
                raise ValueError(f"environment: {name!r} is not a valid variable name")
            if "\0" in str(text) or "\n" in str(text):
                raise ValueError(f"environment.{name}: must be one line")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Site:
        if self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes: {self.min_nodes} is more than nodes ({self.nodes})")
        if self.container.kind != "none" and not self.container.image:
            raise ValueError(
                f"container.image: missing; container.kind {self.container.kind} needs it"
            )
        for mount in self.container.mounts:
            if ":" not in mount:
                raise ValueError(f"container.mounts: {mount!r} is not HOST:CONTAINER")
        return self

    @property
    def processes(self) -> int:
        """Number of processes on a node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def sizes(self) -> range:
        """The numbers of nodes that the job may run on."""
        return range(self.min_nodes or self.nodes, self.nodes + 1)

    @property
    def variables(self) -> dict[str, str]:
        """The environment that every process gets."""
        return {name: str(value) for name, value in self.environment.items()}

    def interpreter(self, in_image: bool) -> str:
        """Python on the nodes."""
        return self.python or ("python3" if in_image else sys.executable)


def load_site(path: Path | None, values: dict[str, Any]) -> Site:
    """A site file with some of its values replaced.

    Args:
        values: top-level keys; None keeps the file's value.

    Raises:
        UsageError: one line naming the file and key.
    """
    tree = read_mapping(path, "site file", "keys, such as `nodes:`") if path else {}
    tree |= {key: value for key, value in values.items() if value is not None}
    try:
        return Site.model_validate(tree)
    except ValidationError as error:
        source = str(path) if path else "--site"
        raise UsageError(f"{source}: {explain(error.errors()[0], Site)}") from None
