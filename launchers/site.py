"""SITE.yaml: what a cluster is like, written once and kept apart from recipes."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pretrain.config.decay import Section
from pretrain.config.explain import explain
from pretrain.config.recipe import read_mapping
from pretrain.errors import UsageError


class ContainerConfig(Section):
    """The image that the job runs in."""

    kind: Literal["none", "pyxis", "apptainer"] = Field(
        "none", description="how Slurm starts it; Kubernetes and SkyPilot take the image alone"
    )
    image: str = ""
    mounts: list[str] = Field([], description="HOST:CONTAINER")


class SlurmSite(Section):
    """What `sbatch` is told."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = Field("", description="limit: minutes, H:MM:SS or D-HH:MM:SS; empty: partition's")
    warning: int = Field(
        180, ge=1, description="seconds before the limit when SIGUSR1 asks for a checkpoint"
    )
    memory: str = Field("", description="of a node, such as 200G")
    options: dict[str, str | int] = Field(
        {}, description="further long options of sbatch, such as constraint: h100"
    )

    @field_validator("options")
    @classmethod
    def _are_options(cls, value: dict[str, str | int]) -> dict[str, str | int]:
        for name in value:
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name, re.ASCII):
                raise ValueError(f"slurm.options: {name!r} is no long option of sbatch")
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
    """For `--on hostfile` and `--on mpi`."""

    file: str = Field("", description="lines of `HOST slots=N`")
    launcher: Literal["pdsh", "openmpi", "mpich", "impi", "slurm", "mvapich"] = Field(
        "pdsh", description="how DeepSpeed reaches the hosts (--on hostfile)"
    )
    mpirun: list[str] = Field(["mpirun"], description="the program and its options (--on mpi)")


class KubernetesSite(Section):
    """For `--on kubernetes`."""

    kind: Literal["PyTorchJob", "JobSet"] = Field(
        "PyTorchJob", description="Kubeflow's training operator, or JobSet with torchrun"
    )
    namespace: str = ""
    claims: dict[str, str] = Field(
        {}, description="persistent volume claims: NAME: /where/it/is/mounted"
    )
    node_selector: dict[str, str] = Field({}, description="labels that a node must have")
    memory: str = Field("", description="of a pod, such as 200Gi")
    secrets: list[str] = Field(
        [], description="names of Secrets whose keys become variables of every process"
    )
    grace: int = Field(180, ge=1, description="seconds between SIGTERM and SIGKILL")
    gpu_resource: str = "nvidia.com/gpu"


class SkyPilotSite(Section):
    """For `--on skypilot`."""

    accelerators: str = Field("", description="such as H100:8; of one node")
    infra: str = Field("", description="such as aws, gcp/us-central1 or kubernetes; empty: any")
    spot: bool = Field(False, description="take instances that may be taken away")
    setup: list[str] = Field(
        ["pip install -e ."], description="shell lines that install this program on a node"
    )
    mounts: dict[str, str] = Field({}, description="/remote/path: local path or bucket URL")
    secrets: list[str] = Field(
        [], description="variables whose values `sky jobs launch --secret NAME` takes from yours"
    )


class Site(Section):
    """What is there to launch on, whatever starts the processes."""

    nodes: int = Field(1, ge=1)
    min_nodes: int = Field(
        0, ge=0, description="go on with so many where some are missing; 0: all are needed"
    )
    gpus_per_node: int = Field(0, ge=0)
    processes_per_node: int = Field(0, ge=0, description="0: one a GPU, or one")
    cpus_per_process: int = Field(0, ge=0, description="0: the scheduler's default")
    restarts: int = Field(3, ge=0, description="times that the job is started again by itself")
    doctor: bool = Field(True, description="check the allocation first (Slurm): `pretrain doctor`")
    port: int = Field(29_500, ge=1024, le=65_535, description="rendezvous, where it is ours to say")
    python: str = Field("", description="on the nodes; empty: this one, in an image `python3`")
    setup: list[str] = Field([], description="shell lines before the job: modules, activation")
    environment: dict[str, str | int] = Field({}, description="variables of every process")
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
                raise ValueError(f"environment: {name!r} is no name of a variable")
            if "\0" in str(text) or "\n" in str(text):
                raise ValueError(f"environment.{name}: must be one line")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Site:
        if self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes: {self.min_nodes} is more than nodes, {self.nodes}")
        if self.container.kind != "none" and not self.container.image:
            raise ValueError(f"container.image: missing, for container.kind {self.container.kind}")
        for mount in self.container.mounts:
            if ":" not in mount:
                raise ValueError(f"container.mounts: {mount!r} is not HOST:CONTAINER")
        return self

    @property
    def processes(self) -> int:
        """Processes on a node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def sizes(self) -> range:
        """Numbers of nodes that the job may run on."""
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
        values: top-level keys; None keeps what the file says.

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
