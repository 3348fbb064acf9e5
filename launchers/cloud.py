"""A run as a Kubernetes manifest (PyTorchJob or JobSet) or a SkyPilot task."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from pathlib import Path
from typing import Any

from launchers.elastic import GRACE
from launchers.local import OWN_STORE
from launchers.site import Site
from pretrain.errors import TRY_AGAIN, UsageError

Tree = dict[str, Any]

_OF_ELASTIC = {**OWN_STORE, "PYTHONSAFEPATH": "1"}
"""Variables of processes that torchrun starts; the second one prevents imports from the folder."""
_SKY_GRACE = 100
"""Seconds between a cloud's notice and the end of the machine: 120 in most clouds."""


_SHOWN, _DIGEST = 31, 8
"""Characters of a name that are the run's, and that tell it from others. With what is added for
a pod's host name, 40 stay within the 63 of a label."""


def object_name(run: Path) -> str:
    """A name that Kubernetes and SkyPilot allow (RFC 1123 label), different for every run folder.

    Names of a sweep's runs start alike, and runs of two sweeps may have the same name, so the
    name contains a digest of the whole path.
    """
    name = re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}"
    digest = hashlib.sha256(os.fsencode(run.absolute())).hexdigest()[:_DIGEST]
    return f"{name[:_SHOWN].strip('-')}-{digest}"


def kubernetes(site: Site, words: list[str], name: str) -> Tree:
    """A manifest for `kubectl apply`.

    Raises:
        UsageError: if the site names no image.
    """
    if not site.container.image:
        raise UsageError("container.image: missing in the site file; --on kubernetes needs it")
    make = _jobset if site.kubernetes.kind == "JobSet" else _pytorch_job
    manifest = make(site, words, name)
    if site.kubernetes.namespace:
        manifest["metadata"]["namespace"] = site.kubernetes.namespace
    return manifest


def _pytorch_job(site: Site, words: list[str], name: str) -> Tree:
    """A PyTorchJob; Kubeflow's operator sets torchrun's rendezvous in variables (PET_…)."""
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {
            "elasticPolicy": {
                "rdzvBackend": "c10d",
                "minReplicas": min(site.sizes),
                "maxReplicas": site.nodes,
                "maxRestarts": site.restarts,
            },
            "nprocPerNode": str(site.processes),
            "runPolicy": {"cleanPodPolicy": "None", "backoffLimit": site.restarts},
            "pytorchReplicaSpecs": {
                "Worker": {
                    "replicas": site.nodes,
                    "restartPolicy": "OnFailure",
                    # The operator looks for a container of this name.
                    "template": _pod(site, "pytorch", [], words, {}),
                }
            },
        },
    }


def _jobset(site: Site, words: list[str], name: str) -> Tree:
    """One indexed Job; all pods are restarted together and connect to the first one."""
    meeting = [
        "--nnodes", f"{min(site.sizes)}:{site.nodes}", "--nproc-per-node", str(site.processes),
        "--max-restarts", str(site.restarts), "--rdzv-id", name, "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"{name}-node-0-0.{name}:{site.port}",
    ]  # fmt: skip
    pod = _pod(site, "rankdecay", meeting, words, {"restartPolicy": "Never"})
    job = {
        "parallelism": site.nodes,
        "completions": site.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": pod,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": {"maxRestarts": site.restarts},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _literal(text: str) -> str:
    """Escape text for a pod: Kubernetes replaces ``$(NAME)``, and ``$$`` by ``$``."""
    return text.replace("$", "$$")


def _pod(site: Site, container: str, meeting: list[str], words: list[str], extra: Tree) -> Tree:
    settings = site.kubernetes
    amounts: Tree = {}
    if site.cpus_per_process:
        amounts["cpu"] = str(site.cpus_per_process * site.processes)
    if settings.memory:
        amounts["memory"] = settings.memory
    if site.gpus_per_node:
        amounts[settings.gpu_resource] = str(site.gpus_per_node)
    start = [site.interpreter(in_image=True), "-P", "-m", "launchers.elastic", *meeting]
    if site.setup:
        script = "\n".join([*site.setup, 'exec "$@"'])
        start = ["/bin/bash", "-euc", script, "setup", *start]
    variables = {
        "OMP_NUM_THREADS": str(site.cpus_per_process or 1),
        **_OF_ELASTIC,
        # Seconds before Kubernetes kills the pod, so that the exit code is still reported.
        GRACE: str(max(1, settings.grace - 5)),
        **site.variables,
    }
    # Loaders and NCCL pass tensors through shared memory, of which a pod has 64 MB.
    volumes: list[Tree] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    volumes += [
        {"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in settings.claims
    ]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    mounts += [{"name": claim, "mountPath": path} for claim, path in settings.claims.items()]
    spec: Tree = {
        "terminationGracePeriodSeconds": settings.grace,
        "containers": [
            {
                "name": container,
                "image": site.container.image,
                "command": [_literal(word) for word in (*start, "-m", "pretrain", *words)],
                "env": [
                    {"name": key, "value": _literal(str(value))} for key, value in variables.items()
                ],
                "resources": {"requests": amounts, "limits": amounts} if amounts else {},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
        **extra,
    }
    if settings.secrets:
        spec["containers"][0]["envFrom"] = [
            {"secretRef": {"name": name}} for name in settings.secrets
        ]
    if settings.node_selector:
        spec["nodeSelector"] = dict(settings.node_selector)
    return {"spec": spec}


_SKY_RUN = """\
set -u
first=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
exec {start} \\
  --nnodes {nodes} --nproc-per-node {processes} --max-restarts {restarts} \\
  --rdzv-id "$SKYPILOT_TASK_ID" --rdzv-backend c10d --rdzv-endpoint "$first:{port}" \\
  -m pretrain {words}
"""


def skypilot(site: Site, words: list[str], name: str) -> Tree:
    """A task for `sky jobs launch`, which restarts it when its machines are taken away.

    Raises:
        UsageError: if the site names no accelerators though its nodes have GPUs.
    """
    settings = site.skypilot
    if site.gpus_per_node and not settings.accelerators:
        raise UsageError("skypilot.accelerators: missing in the site file; add for example H100:8")
    resources: Tree = {
        "job_recovery": {
            "max_restarts_on_errors": site.restarts,
            "recover_on_exit_codes": [TRY_AGAIN],
        },
        "use_spot": settings.spot,
    }
    if settings.accelerators:
        resources["accelerators"] = settings.accelerators
    elif site.cpus_per_process:
        resources["cpus"] = f"{site.cpus_per_process * site.processes}+"
    if settings.infra:
        resources["infra"] = settings.infra
    if site.container.image:
        resources["image_id"] = f"docker:{site.container.image}"
    start = f"{shlex.quote(site.interpreter(in_image=True))} -P -m launchers.elastic"
    run = _SKY_RUN.format(
        start=start,
        nodes=site.nodes,
        processes=site.processes,
        restarts=site.restarts,
        port=site.port,
        words=shlex.join(words),
    )
    task: Tree = {
        "name": name,
        "num_nodes": site.nodes,
        "resources": resources,
        "workdir": ".",
        "envs": {**_OF_ELASTIC, GRACE: str(_SKY_GRACE), **site.variables},
        "setup": "\n".join(settings.setup),
        "run": "\n".join([*site.setup, run]),
    }
    if settings.secrets:
        task["secrets"] = dict.fromkeys(settings.secrets)
    if settings.mounts:
        task["file_mounts"] = dict(settings.mounts)
    return task
