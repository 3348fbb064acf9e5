"""Sections of a recipe about the run and not about results: files, measurements, faults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_serializer, field_validator

from pretrain.config.section import Section
from pretrain.config.urls import without_secrets
from pretrain.runs.service import SERVICES, ServiceSection


class CheckpointConfig(Section):
    """When and where to save checkpoints, and which to keep."""

    every: int = Field(0, ge=0, description="steps; 0: a tenth of the run")
    minutes: float = Field(
        0.0, ge=0, description="also save when this many minutes passed since the last; 0: never"
    )
    keep: int = Field(2, ge=0, description="number of newest checkpoints to keep; 0: all")
    keep_every: int = Field(
        0, ge=0, description="also keep those at multiples of this number of steps"
    )
    keep_best: bool = Field(
        False,
        description="also keep the one with the lowest held-out loss; every must be a "
        "multiple of evaluation.every",
    )
    asynchronous: bool = Field(
        True, description="training continues while the checkpoint is written"
    )
    mirror: str = Field(
        "",
        description="a folder or fsspec URL (s3://…, gs://…), for any number of runs, that gets a "
        "copy of each checkpoint; a run of this name and recipe whose folder is lost continues "
        "from it; ${NAME} in it is read from the environment",
    )

    @field_serializer("mirror")
    def _shown(self, url: str) -> str:
        """The form for run folders, manifests and services."""
        return without_secrets(url)


class EvaluationConfig(Section):
    """Held-out loss during training, on a fixed sample of documents."""

    every: int = Field(0, ge=0, description="steps; 0: a tenth of the run")
    split: str = Field("val", description="split of the data: val or test")
    documents: int = Field(100, ge=1, description="documents in the fixed sample")
    batch: int = Field(8, ge=1, description="sequences per forward pass")
    at_end: Literal["none", "sample", "all"] = Field(
        "all", description="after the last step: nothing, the sample, or the whole test split"
    )


class RanksConfig(Section):
    """Statistics of the attention products during training."""

    every: int = Field(0, ge=0, description="steps; 0: a twentieth of the run")
    threshold: float = Field(0.95, gt=0, le=1, description="share of Σσ that the rank covers")
    denominator: Literal["head", "model"] = Field(
        "head", description="pseudo-rank = k / head width, or k / model width"
    )
    spectra: bool = Field(False, description="also store every singular value")


_MOST_TRACED = 100
TrackerEntry = Annotated[SerializeAsAny[ServiceSection], BeforeValidator(SERVICES.validate)]


class LoggingConfig(Section):
    """Where metrics go in addition to RUN/metrics.jsonl."""

    every: int = Field(1, ge=1, description="steps between lines of metrics")
    norms: int | None = Field(
        None,
        ge=0,
        description="steps between norms of weights, gradients and updates by layer and role, and "
        "the largest attention logits; 0: never; null: a twentieth of the run, from 10 to 100",
    )
    wandb: str = Field("", description="W&B project; empty: off; offline without an account")
    wandb_group: str = Field("", description="W&B group, for example the sweep's name")
    tensorboard: bool = Field(False, description="write RUN/tensorboard")
    trackers: list[TrackerEntry] = Field(
        default=[], description="further services, also of your own: docs/extending.md"
    )

    def services(self) -> list[ServiceSection]:
        """All services that receive metrics in addition to the file."""
        return [section for _, section in self.services_by_key()]

    def services_by_key(self) -> Iterator[tuple[str, ServiceSection]]:
        """Yield each service with the key that asks for it."""
        if self.wandb:
            entry = {"kind": "wandb", "project": self.wandb, "group": self.wandb_group}
            yield "logging.wandb", SERVICES.section(entry)
        if self.tensorboard:
            yield "logging.tensorboard", SERVICES.section({"kind": "tensorboard"})
        for index, tracker in enumerate(self.trackers):
            yield f"logging.trackers[{index}]", tracker


class ProfileConfig(Section):
    """A trace of some updates, for https://ui.perfetto.dev or chrome://tracing."""

    steps: str = Field(
        "",
        description="updates to trace, such as 100-103, into RUN/profile/rank-N.json.gz; empty: "
        "none",
    )
    ranks: Literal["main", "all"] = Field("main", description="processes that write a trace")

    @field_validator("steps", mode="before")
    @classmethod
    def _one_step(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @field_validator("steps")
    @classmethod
    def _are_a_window(cls, value: str) -> str:
        match = re.fullmatch(r"(\d{1,18})(?:\s*-\s*(\d{1,18}))?", value.strip(), re.ASCII)
        if value and not match:
            raise ValueError(f"must be a step, or two such as 100-103, got {value!r}")
        if match:
            first, last = int(match[1]), int(match[2] or match[1])
            if not 1 <= first <= last:
                raise ValueError(f"steps count from 1, and the first comes first, got {value!r}")
            if last - first >= _MOST_TRACED:
                raise ValueError(
                    f"a trace of {last - first + 1} updates is too large to be read; take "
                    f"{_MOST_TRACED} at the most"
                )
        return value

    @property
    def window(self) -> range:
        """The updates to trace."""
        if not self.steps:
            return range(0)
        first, _, last = self.steps.partition("-")
        return range(int(first), int(last or first) + 1)


class ResumeConfig(Section):
    """What applies if a checkpoint and the recipe disagree."""

    decay: Literal["error", "recipe", "checkpoint"] = Field(
        "error",
        description="λ of a resumed run if the recipe has another one than its checkpoint: refuse, "
        "or follow one of the two",
    )


class FaultsConfig(Section):
    """What to do when numbers, memory or machines fail."""

    skip_limit: int = Field(
        3,
        ge=1,
        description="number of updates in a row that are skipped because a loss or gradient is not "
        "finite; then the run goes back to the last checkpoint and leaves out their samples",
    )
    spike: float = Field(
        0.0,
        ge=0,
        description="a loss is a spike if it is this many standard deviations above the mean of "
        "the last spike_window losses; the run then goes back and leaves out its samples; 0: off",
    )
    spike_window: int = Field(100, ge=10, description="updates")
    go_back_limit: int = Field(
        3, ge=0, description="how often a run goes back before it reaches a new checkpoint"
    )
    compare_every: int = Field(
        100,
        ge=0,
        description="steps between comparisons of replicated weights between processes, to detect "
        "memory that fails silently (also before every checkpoint); 0: never",
    )
    watchdog: float = Field(
        900.0,
        ge=0,
        description="seconds without progress after which stacks are written and the job ends "
        "with exit code 75; 0: off",
    )


class SpeedConfig(Section):
    """How the same numbers are computed: changes speed and memory, and results only by rounding."""

    attention: Literal["auto", "sdpa", "products"] = Field(
        "auto",
        description="PyTorch's attention, or batched matrix products; auto: products in bf16 on a "
        "CPU, where they are faster",
    )
    update: Literal["auto", "flat", "deepspeed"] = Field(
        "auto",
        description="who updates the weights: flat buffers (ZeRO 0 and 1 without a pipeline), or "
        "DeepSpeed; auto: flat where it can be and no raw DeepSpeed key is set",
    )
    loss_mib: int = Field(
        0,
        ge=0,
        description="size of the parts in which the loss is computed: MiB that their logits would "
        "take in float32; 0: 32 on a CPU, 512 on a GPU, 2048 on a GPU with compiled code",
    )
    compile: Literal["auto", True, False] = Field(
        "auto",
        description="fuse the operations between a block's matrix products (torch.compile), for "
        "which the first step waits for the compiler; auto: on a GPU, in runs of more than about "
        "two minutes",
    )
    recompute: Literal["auto", True, False] = Field(
        "auto",
        description="compute what takes no matrix product again in the backward pass instead of "
        "keeping it: values of activation functions and, in compiled code, outputs of norms; auto: "
        "on a CPU; grid.activation_checkpointing recomputes whole blocks",
    )
    graph: Literal["auto", True, False] = Field(
        "auto",
        description="start forward and backward pass as one CUDA graph; auto: on one GPU, for "
        "passes of small models or micro batches; no effect on a CPU or with several processes",
    )

    def loss_bytes(self, device: str, compiled: bool) -> int:
        """Number of bytes of float32 logits that the loss holds at once.

        Args:
            device: device type, cpu or cuda.
            compiled: whether the run's code is compiled.
        """
        if self.loss_mib:
            return self.loss_mib << 20
        return (2048 if compiled else 512) << 20 if device == "cuda" else 32 << 20
