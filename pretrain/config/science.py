"""Sections of a recipe that define its results: task, data, length, grid, optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from pretrain.config.decay import WeightDecayConfig
from pretrain.config.section import Section
from pretrain.tasks.samples import SAMPLE_TASKS, SamplesSection


class DataConfig(Section):
    """The tokens, and how subsets are blended."""

    path: str = Field("", description="folder written by `pretrain data tokenize`")
    weights: Literal["proportional", "pile"] | dict[str, float] = Field(
        "proportional",
        description="share of each subset: by its tokens, the Pile's published shares, or by name",
    )
    attention: Literal["across", "within"] = Field(
        "across",
        description="within: a token sees only its own document, and positions restart there "
        "(docs/data.md); evaluations score each document by itself in either case",
    )
    prefetch: int = Field(4, ge=0, description="number of batches that are read ahead; 0: none")


OwnSamples = Annotated[SerializeAsAny[SamplesSection], BeforeValidator(SAMPLE_TASKS.validate)]


class TaskConfig(Section):
    """The task: text by default."""

    kind: Literal["text", "recall", "images", "own"] = Field(
        "text", description="language modelling; associative recall; images; samples of your own"
    )
    pairs: int = Field(20, ge=1, le=1 << 20, description="recall: pairs (x, y) before the question")
    symbols: int = Field(
        32, ge=2, le=1 << 20, description="recall: number of different x, and of different y"
    )
    random_labels: float = Field(
        0.05, ge=0, le=1, description="recall: share of training answers that are random"
    )
    source: Literal["digits", "folder", "hub"] = Field(
        "digits",
        description="images: scikit-learn's 8 x 8 digits; an ImageFolder (PATH/train/CLASS/*.jpg, "
        "PATH/val/...); a dataset of the Hub or a folder of its parquet files",
    )
    path: str = Field("", description="images: the folder, or the dataset's name")
    augment: Literal["none", "crop", "randaugment"] = Field(
        "none", description="images: random crop and flip; with RandAugment (Cubuk et al. 2020)"
    )
    workers: int = Field(
        0,
        ge=0,
        description="processes that make samples, for images that are augmented; not with own",
    )
    own: OwnSamples | None = Field(
        None, description="own: a class of samples in a file of yours (docs/extending.md)"
    )


class TrainConfig(Section):
    """Length and batch of the run."""

    steps: int = Field(1000, ge=1, le=10**9, description="optimizer updates")
    global_batch: int = Field(8, ge=1, description="sequences per update, over all processes")
    z_loss: float = Field(
        0.0,
        ge=0,
        description="weight of log² Z, of the softmax's normaliser, in the gradient (PaLM: 1e-4); "
        "the logged loss is the cross-entropy alone",
    )
    micro_batch: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        0,
        description="sequences per forward pass; 0: as few passes as possible; auto: as many as "
        "the estimated memory allows",
    )


class GridConfig(Section):
    """How the model is divided among processes; data parallelism uses the rest."""

    tensor_parallel: int = Field(
        1, ge=1, description="processes that share each layer (Shoeybi et al. 2019)"
    )
    pipeline_parallel: int = Field(1, ge=1, description="stages that share the layers")
    sequence_parallel: bool = Field(
        False,
        description="with tensor parallelism: also share the activations between its layers "
        "(Korthikanti et al. 2022)",
    )
    activation_checkpointing: bool = Field(
        False, description="recompute blocks in the backward pass"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO: what is sharded")


class ScheduleConfig(Section):
    """Learning rate over the run."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="shape after the warm-up; wsd: constant, then linear at the end"
    )
    warmup: int | float = Field(0.01, ge=0, description="< 1: share of the steps; else steps")
    final_fraction: float = Field(0.1, ge=0, le=1, description="last rate / peak")
    decay: int | float = Field(
        0.2, ge=0, description="length of wsd's decay phase; < 1: share of the steps; else steps"
    )


class OptimizerConfig(Section):
    """The update rule; decay by role works the same with each."""

    name: Literal["adamw", "sgd", "lion", "muon"] = Field(
        "adamw",
        description="AdamW (Loshchilov & Hutter 2019); SGD with momentum; Lion (Chen et al. 2023); "
        "Muon (Jordan et al. 2024) for the blocks' matrices with AdamW for the rest",
    )
    learning_rate: float = Field(6e-4, ge=0, description="peak η")
    learning_rate_by: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        {},
        description="factors of η by role, such as {attention: 0.5, mlp_out: 2}; the words are "
        "those of weight_decay, and the most specific wins; decay that is coupled to η follows "
        "(docs/decay.md)",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="of AdamW and Lion: first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="of AdamW and Lion: second moment")
    momentum: float = Field(0.95, ge=0, lt=1, description="momentum of sgd and muon")
    epsilon: float = Field(1e-8, gt=0, description="AdamW: added to the root of the second moment")
    gradient_clipping: float = Field(
        1.0, ge=0, description="clip the gradient to this global norm; 0: off"
    )
    schedule: ScheduleConfig = ScheduleConfig()
    weight_decay: WeightDecayConfig = WeightDecayConfig()
