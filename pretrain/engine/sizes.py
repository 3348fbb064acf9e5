"""Sizes of a model, and how a grid divides it: for plans, and for the utilisation of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from models.config import GPTConfig
from models.gpt import whole_model
from models.layers import shares_keys
from models.roles import ParameterInfo, Role
from pretrain.config.recipe import Config
from pretrain.config.science import OptimizerConfig
from pretrain.engine.optimizers import is_muon_role, rule_of
from pretrain.errors import UsageError

_MOMENTS = {"adamw": 8, "lion": 4, "sgd": 4, "muon": 4}
"""Bytes of float32 optimizer state per parameter, by update rule."""


@dataclass(frozen=True)
class Part:
    """Number of parameters in a part of the model."""

    split: int = 0
    """Parameters that tensor parallelism splits."""
    replicated: int = 0
    """Parameters that every tensor-parallel process holds: norms, some biases, positions."""
    moments: int = 0
    """Bytes of optimizer state, of split and replicated parameters together."""
    orthogonal: int = 0
    """Parameters that Muon updates."""

    @property
    def whole(self) -> int:
        """Number on one process without tensor parallelism."""
        return self.split + self.replicated

    def on(self, tensor: int) -> float:
        """Number on each of N tensor-parallel processes."""
        return self.split / tensor + self.replicated

    def with_more(self, other: Part, times: int = 1) -> Part:
        """This part plus another one, N times."""
        return Part(
            self.split + times * other.split,
            self.replicated + times * other.replicated,
            self.moments + times * other.moments,
            self.orthogonal + times * other.orthogonal,
        )

    def state(self, tensor: int) -> float:
        """Bytes of the optimizer's moments on each of N tensor-parallel processes."""
        return self.moments * self.on(tensor) / self.whole if self.whole else 0.0


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that the formulas need."""

    block: Part
    """Parameters of one layer."""
    first: Part
    """Parameters before the layers: embedding and positions."""
    last: Part
    """Parameters after the layers: the norm and the head, a tied one included."""
    tied: Part
    """Parameters of an embedding that is also the head; empty if they are separate."""
    layers: int
    hidden: int
    ffn: int
    query_width: int
    """Heads times their width."""
    key_value_width: int
    heads: int
    summed: int
    """Parameters of a layer whose gradients tensor-parallel processes sum: norms of queries and
    keys, and keys and values that they share."""
    context: int
    outputs: int
    """Number of predicted positions of a sequence: all, or one for an image."""
    vocabulary: int
    gated: bool
    causal: bool
    """Whether attention leaves out later positions, and with them half of its products."""
    attention: str
    largest: int
    """Parameters of the largest matrix that Muon updates."""

    @property
    def parameters(self) -> int:
        """Parameters of all blocks."""
        return self.block.whole * self.layers

    @property
    def ends(self) -> int:
        """Parameters of embedding, positions and head."""
        return self.first.whole + self.last.whole - self.tied.whole

    @property
    def head(self) -> float:
        """Parameters of the head, times the share of positions that are predicted."""
        return self.vocabulary * self.hidden * self.outputs / self.context

    @property
    def matrices(self) -> float:
        """Parameters that multiply: the blocks, and the head."""
        return self.parameters + self.head

    def stage(self, pipeline: int) -> int:
        """Number of layers in the largest stage."""
        return -(-self.layers // pipeline)

    def fullest_stage(self, pipeline: int) -> Part:
        """Parameters of the largest stage."""
        end = max(self.first, self.last, key=lambda part: part.whole)
        if pipeline == 1:
            end = self.first.with_more(self.last).with_more(self.tied, -1)
        return end.with_more(self.block, self.stage(pipeline))

    def flops(self, tokens: float) -> float:
        """Of forward and backward: 6 N a token, and 12 L s w for attention of width w; half of it
        if it is causal."""
        attention = (6.0 if self.causal else 12.0) * self.layers * self.query_width * self.context
        return tokens * (6.0 * self.matrices + attention)


@dataclass(frozen=True)
class Layout:
    """How a model is divided on one process."""

    width: int
    """Bytes of a number in products; masters and moments are float32."""
    tensor: int
    pipeline: int
    data: int
    stage: int
    micro: int
    count: int
    """Micro batches of a process in a step."""
    recompute: bool
    selective: bool = False
    """Whether values of activation functions are computed again."""
    flat: bool = False
    """Whether updates are made on flat buffers, without DeepSpeed."""
    recorded: bool = False
    """Whether passes are CUDA graphs, which keep the memory of the gradients."""
    sequence: bool = False
    """Whether tensor-parallel processes divide the positions between their products."""
    loss_bytes: float = 512 << 20
    """Bytes of float32 logits at once."""
    compiled_loss: bool = False
    """Whether the loss is compiled: then it holds no float32 logits."""
    norms: bool = False
    """Whether some updates are measured, with a copy of the masters meanwhile."""
    live: float = 1e9
    """Parameters that ZeRO 3 keeps gathered, at most."""
    reuse: float = 1e9
    """Parameters until its next use up to which ZeRO 3 keeps one gathered."""
    base: float = 0.0
    slack: float = 0.0
    """The same as in `Device`."""

    @property
    def world(self) -> int:
        """Total number of processes."""
        return self.tensor * self.pipeline * self.data

    def parameters(self, sizes: Sizes) -> float:
        """Parameters of the process with the most, before ZeRO divides them."""
        return sizes.fullest_stage(self.pipeline).on(self.tensor)

    def kept_gathered(self, sizes: Sizes) -> float:
        """Parameters that ZeRO 3 keeps between the two passes of a micro batch: the last ones."""
        return min(self.live, self.reuse / 2, self.parameters(sizes))


def sizes_of(config: Config) -> Sizes:
    """Sizes of a recipe's model, its vocabulary padded as its grid makes it.

    Raises:
        UsageError: if the vocabulary is not known.
    """
    model = config.model
    check_vocabulary(model)
    tensor = config.grid.tensor_parallel
    infos = whole_model(model, tensor)
    ends = [info for info in infos if info.layer is None]
    before = [info for info in ends if info.name.startswith(("embedding.", "position."))]
    tied = [info for info in before if model.tied_head and info.role is Role.EMBEDDING]
    after = [info for info in ends if info not in before] + tied
    optimizer = config.optimizer
    muon = [info for info in infos if optimizer.name == "muon" and is_muon_role(info.role)]
    return Sizes(
        block=_part((info for info in infos if info.layer == 0), optimizer),
        first=_part(before, optimizer),
        last=_part(after, optimizer),
        tied=_part(tied, optimizer),
        layers=model.num_layers,
        hidden=model.hidden_size,
        ffn=model.ffn_size if model.mlp else 0,
        query_width=model.num_attention_heads * model.head_size,
        key_value_width=model.key_value_heads * model.head_size,
        heads=model.num_attention_heads,
        summed=_summed(model, tensor),
        context=model.context,
        outputs=1 if model.image_size else model.context,
        vocabulary=model.padded_vocabulary(tensor) if model.vocabulary_size else 0,
        gated=model.activation == "swiglu",
        causal=_leaves_out(model),
        attention=model.attention,
        largest=max((info.numel for info in muon), default=0),
    )


def _summed(model: GPTConfig, tensor: int) -> int:
    gains = 2 * model.head_size if model.qk_norm else 0
    if not shares_keys(model, tensor):
        return gains
    return gains + 2 * model.key_value_heads * model.head_size * (
        model.hidden_size + int(model.biases)
    )


def check_vocabulary(model: GPTConfig) -> None:
    """Refuse a model whose vocabulary is for its data to say.

    Raises:
        UsageError: naming the key.
    """
    if not model.vocabulary_size and not model.image_size:
        raise UsageError(
            "model.vocabulary_size: not set, and no data is read here; add for example "
            "model.vocabulary_size=50304"
        )


def _leaves_out(model: GPTConfig) -> bool:
    # The other kinds make the whole matrix of scores and mask it.
    return model.causal and model.attention == "softmax"


def _part(infos: Iterable[ParameterInfo], optimizer: OptimizerConfig) -> Part:
    split = replicated = moments = orthogonal = 0
    for info in infos:
        if info.partition_dim is None:
            replicated += info.numel
        else:
            split += info.numel
        rule = rule_of(optimizer.name, info.role)
        remembers = rule != "sgd" or optimizer.momentum > 0
        moments += _MOMENTS[rule] * info.numel if remembers else 0
        orthogonal += info.numel if rule == "muon" else 0
    return Part(split, replicated, moments, orthogonal)
