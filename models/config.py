"""Configuration of the transformers: dialects as presets over one set of switches."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.factors import AttentionShape
from models.rotary import RotaryScaling


class Dialect(StrEnum):
    """A named set of defaults; every switch can still be set by itself."""

    GPT_NEOX = "gpt_neox"
    GPT2 = "gpt2"
    LLAMA = "llama"
    VIT = "vit"


ActivationFunction = Literal["gelu", "gelu_tanh", "swiglu"]
PRESETS: dict[str, dict[str, Any]] = {
    # Pythia / GPT-NeoX: partial rotary, parallel residual, untied (Biderman et al. 2023).
    Dialect.GPT_NEOX: {
        "position": "rotary",
        "rotary_fraction": 0.25,
        "parallel_residual": True,
        "norm": "layernorm",
        "activation": "gelu",
        "biases": True,
        "tied_head": False,
        "initialization": "small_init",
    },
    # GPT-2 / GPT-3: learned positions, pre-norm (Brown et al. 2020).
    Dialect.GPT2: {
        "position": "learned",
        "parallel_residual": False,
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "biases": True,
        "tied_head": True,
        "initialization": "normal",
    },
    # Llama: full rotary, RMSNorm, SwiGLU, no biases, untied (Touvron et al. 2023).
    Dialect.LLAMA: {
        "position": "rotary",
        "rotary_fraction": 1.0,
        "parallel_residual": False,
        "norm": "rmsnorm",
        "activation": "swiglu",
        "biases": False,
        "tied_head": False,
        "initialization": "normal",
    },
    # Vision Transformer: patches, learned positions, no mask, mean-pooled (Beyer et al. 2022).
    Dialect.VIT: {
        "position": "learned",
        "parallel_residual": False,
        "norm": "layernorm",
        "activation": "gelu",
        "biases": True,
        "tied_head": False,
        "initialization": "normal",
        "causal": False,
        "vocabulary_multiple": 8,
    },
}


_MOST, _MOST_LAYERS, _MOST_PIXELS, _MOST_CHANNELS = 1 << 24, 10_000, 1 << 14, 1 << 10
"""Limits beyond any model; within them, the elements of a tensor can be counted in 63 bits."""


class GPTConfig(BaseModel):
    """Shape and switches of a transformer; unset ones follow from the dialect."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dialect: Dialect = Field(Dialect.GPT2, description="a named set of the defaults below")
    num_layers: int = Field(12, ge=1, le=_MOST_LAYERS, description="number of blocks")
    hidden_size: int = Field(768, ge=1, le=_MOST, description="width of the residual stream")
    num_attention_heads: int = Field(12, ge=1, le=_MOST, description="query heads of a block")
    num_key_value_heads: int = Field(0, ge=0, le=_MOST, description="0: one per query head (MHA)")
    head_dim: int = Field(0, ge=0, le=_MOST, description="0: hidden_size / num_attention_heads")
    ffn_hidden_size: int = Field(
        0, ge=0, le=_MOST, description="0: 4 x hidden, or 8/3 x hidden (SwiGLU)"
    )
    context: int = Field(1024, ge=2, le=_MOST, description="tokens in a training sequence")
    vocabulary_size: int = Field(
        0, ge=0, le=_MOST, description="0: taken from the data's tokenizer"
    )
    vocabulary_multiple: int = Field(
        128, ge=1, le=_MOST, description="the vocabulary is padded to this"
    )
    position: Literal["learned", "rotary", "none"] = Field(
        "learned",
        description="none: only the causal mask distinguishes positions (Kazemnejad et al. 2023)",
    )
    rotary_fraction: float = Field(1.0, gt=0, le=1, description="share of head_dim that rotates")
    rotary_base: float = Field(10_000.0, gt=0, description="θ of the rotary frequencies")
    rotary_factor: float = Field(
        1.0,
        ge=1,
        description="rotary frequencies whose wavelength is longer than a context are divided by "
        "this, as in Llama 3.1; 1: none",
    )
    rotary_old_context: int = Field(
        8192, ge=1, le=_MOST, description="of rotary_factor: that context, in tokens"
    )
    rotary_low: float = Field(
        1.0, gt=0, description="of rotary_factor: turns in that context below which all is divided"
    )
    rotary_high: float = Field(
        4.0, gt=0, description="of rotary_factor: turns above which nothing is; between, a mixture"
    )
    norm: Literal["layernorm", "rmsnorm"] = Field(
        "layernorm", description="before attention, before the MLP, and at the end"
    )
    norm_epsilon: float = Field(1e-5, gt=0, description="added to the variance")
    activation: ActivationFunction = Field(
        "gelu_tanh", description="of the MLP; swiglu has a gate (Shazeer 2020)"
    )
    biases: bool = Field(True, description="matrices of the blocks have biases")
    parallel_residual: bool = Field(
        False, description="attention and MLP of a block have the same input"
    )
    logit_softcap: float = Field(
        0.0,
        ge=0,
        description="c: logits become c tanh(logit / c) (Gemma 2: 30); 0: they are not bounded",
    )
    tied_head: bool = Field(True, description="the head is the embedding")
    qk_norm: bool = Field(False, description="RMSNorm of queries and keys, per head")
    attention: Literal["softmax", "linear", "sigmoid"] = Field(
        "softmax",
        description="linear: scores divided by the number of visible positions; sigmoid: of "
        "score - log of that number (Ramapuram et al. 2024)",
    )
    causal: bool = Field(True, description="false: every position sees all others")
    mlp: bool = Field(True, description="false: attention-only blocks")
    image_size: int = Field(
        0, ge=0, le=_MOST_PIXELS, description="> 0: images are classified, not text modelled"
    )
    patch_size: int = Field(0, ge=0, le=_MOST_PIXELS, description="pixels; divides image_size")
    image_channels: int = Field(3, ge=1, le=_MOST_CHANNELS, description="values of a pixel")
    initialization: Literal["normal", "small_init"] = Field(
        "normal", description="small_init: GPT-NeoX's, by width (Nguyen & Salazar 2019)"
    )
    init_std: float = Field(0.02, gt=0, description="of `normal`; small_init follows the width")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_dialect(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        image, patch = values.get("image_size"), values.get("patch_size")
        if isinstance(image, int) and isinstance(patch, int) and image > 0 and patch > 0:
            values = {"context": max(2, (image // patch) ** 2), **values}
        # For an unknown dialect, the field's own validation reports the error.
        return {**PRESETS.get(str(values.get("dialect", Dialect.GPT2)), {}), **values}

    @model_validator(mode="after")
    def _divides(self) -> GPTConfig:
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} does not divide hidden_size "
                f"{self.hidden_size}; change one of them or set head_dim"
            )
        if self.num_attention_heads * self.head_size > 1 << 30:
            raise ValueError(
                f"head_dim: {self.head_size} in each of {self.num_attention_heads} heads is beyond "
                "any model"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.position == "rotary" and (self.rotary_dim < 2):
            raise ValueError(
                f"rotary_fraction: {self.rotary_fraction} of head_dim {self.head_size} leaves no "
                "pair to rotate; raise it"
            )
        if self.rotary_high <= self.rotary_low:
            raise ValueError(
                f"rotary_high: {self.rotary_high:g} must be more than rotary_low "
                f"{self.rotary_low:g}"
            )
        if self.rotary_factor != 1 and self.position != "rotary":
            raise ValueError("rotary_factor: without position rotary it does nothing; remove it")
        if (self.dialect == Dialect.VIT) != bool(self.image_size):
            raise ValueError("image_size: set it exactly if dialect is vit")
        if self.image_size:
            if not self.patch_size or self.image_size % self.patch_size:
                raise ValueError(
                    f"patch_size: {self.patch_size} does not divide image_size {self.image_size}"
                )
            if self.context != (self.image_size // self.patch_size) ** 2:
                raise ValueError(f"context: {self.context} is not the number of patches; remove it")
            if self.tied_head:
                raise ValueError(
                    "tied_head: a vit has no token embedding that the head could share; set it to "
                    "false"
                )
        return self

    @property
    def patch_dim(self) -> int:
        """The number of values in a patch; 0 for text."""
        return self.patch_size**2 * self.image_channels if self.image_size else 0

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Number of key/value heads; fewer than query heads means grouped-query attention."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def attention_shape(self) -> AttentionShape:
        """Heads and widths of the attention layers."""
        return AttentionShape(
            num_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            key_value_heads=self.key_value_heads,
            head_size=self.head_size,
            hidden_size=self.hidden_size,
            rotary_dim=self.rotary_dim,
            qk_norm=self.qk_norm,
        )

    @property
    def rotary_dim(self) -> int:
        """Number of leading dimensions of a head that rotate; even, 0 without rotary positions."""
        if self.position != "rotary":
            return 0
        return int(self.head_size * self.rotary_fraction) // 2 * 2

    @property
    def rotary_scaling(self) -> RotaryScaling | None:
        """How long wavelengths are stretched, if they are."""
        if self.rotary_factor == 1:
            return None
        return RotaryScaling(
            self.rotary_factor, self.rotary_old_context, self.rotary_low, self.rotary_high
        )

    @property
    def ffn_size(self) -> int:
        """Inner width of the MLP."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        if self.activation == "swiglu":
            return -(-8 * self.hidden_size // 3 // 64) * 64
        return 4 * self.hidden_size

    @property
    def init_stds(self) -> tuple[float, float]:
        """Standard deviations of (input-side, residual-output) matrices.

        ``normal``: GPT-2's 0.02 and 0.02/√(2L). ``small_init``: √(2/5d) (Nguyen & Salazar 2019)
        and 2/(L√d) (Wang & Komatsuzaki 2021), as GPT-NeoX and Pythia use.
        """
        if self.initialization == "small_init":
            return (2 / (5 * self.hidden_size)) ** 0.5, 2 / (
                self.num_layers * self.hidden_size**0.5
            )
        return self.init_std, self.init_std / (2 * self.num_layers) ** 0.5

    def padded_vocabulary(self, tensor_parallel: int = 1) -> int:
        """Rows of the embedding: the vocabulary padded to a multiple that the grid divides.

        The padding never contributes to a loss (its logits are -inf), so results do not
        depend on it.
        """
        multiple = self.vocabulary_multiple
        while multiple % tensor_parallel:
            multiple += self.vocabulary_multiple
        return -(-self.vocabulary_size // multiple) * multiple
