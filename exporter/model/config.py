"""ModelConfig: the facts of one checkpoint, validated once; every other module asks these types only."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.model.limits import (
    MAX_CONTEXT,
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    check_products,
    require_at_most,
)
from qwen_aot.exporter.model.model_types import MODEL_TYPES, ModelType
from qwen_aot.exporter.model.vision import VisionConfig

ROPE_TYPES = ("linear", "yarn", "llama3")  # beside None: those that change frequencies once, not per request
DTYPES = ("bfloat16", "float16", "float32", "float64")
_MAX_ROPE_NUMBER = 2.0**20  # of factors and rotations: published ones are at most 64; fp32 tables and logs stay finite
_MAX_ATTENTION_FACTOR = 100.0  # published: at most about 2; cos and sin times it must fit fp16
_FP32 = (2.0**-126, 2.0**127)  # normal numbers


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """A rotary scaling that is fixed at build time (`exporter.model.rope` has the formulas).

    Attributes:
        rope_type: one of ROPE_TYPES.
        factor: how many times longer the context becomes, >= 1.
        attention_factor: what cos and sin are multiplied by (yarn; 1 for the others).
        original_max_position_embeddings: tokens of the context before scaling (yarn, llama3).
        beta_fast: rotations above which a frequency is kept (yarn).
        beta_slow: rotations below which a frequency is divided by `factor` (yarn).
        truncate: whether yarn rounds its correction range to whole dimensions.
        low_freq_factor: llama3: wavelengths above original / low_freq_factor are divided by `factor`.
        high_freq_factor: llama3: wavelengths below original / high_freq_factor are kept.
    """

    rope_type: str
    factor: float
    attention_factor: float = 1.0
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise CheckpointError(
                f"rope scaling {self.rope_type!r} is not supported; accepted: none, {', '.join(ROPE_TYPES)}. "
                "Remove rope_scaling (rope_parameters.rope_type) to serve the model at its trained context."
            )
        _require_number("rope_scaling.factor", self.factor, 1, _MAX_ROPE_NUMBER)
        _require_number("rope_scaling.attention_factor", self.attention_factor, _FP32[0], _MAX_ATTENTION_FACTOR)
        for name in ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
            _require_number(f"rope_scaling.{name}", getattr(self, name), 1 / _MAX_ROPE_NUMBER, _MAX_ROPE_NUMBER)
        if self.beta_fast < self.beta_slow:
            raise CheckpointError(
                f"rope_scaling.beta_fast is {self.beta_fast}; accepted: from beta_slow ({self.beta_slow})"
            )
        if self.rope_type == "linear":
            return
        if self.original_max_position_embeddings is None:
            raise CheckpointError(
                f"rope_scaling.original_max_position_embeddings is missing; {self.rope_type} needs it (tokens, from 1)"
            )
        _require_count(
            "rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings, 1, MAX_CONTEXT
        )
        if self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                f"rope_scaling.high_freq_factor is {self.high_freq_factor}; it must be greater than "
                f"low_freq_factor ({self.low_freq_factor})"
            )

    def context_for(self, max_position_embeddings: int) -> int:
        """Tokens of context that a model has with this scaling.

        YaRN as it is published leaves `max_position_embeddings` at the trained length and means `factor` times the
        original one; a file that counts the factor already says the same or more. Linear scaling states no original
        length, and llama3 is published with the longer one: both leave what the file says.

        Args:
            max_position_embeddings: as the checkpoint states it.

        Raises:
            CheckpointError: the scaled context is out of range.
        """
        if self.rope_type != "yarn" or self.original_max_position_embeddings is None:
            return max_position_embeddings
        scaled = int(self.factor * self.original_max_position_embeddings)
        name = (
            f"rope_scaling.factor ({self.factor}) x original_max_position_embeddings "
            f"({self.original_max_position_embeddings})"
        )
        require_at_most(name, scaled, MAX_CONTEXT)
        return max(max_position_embeddings, scaled)


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Mixture-of-experts facts, spelled as in config.json."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int  # of one routed expert
    shared_expert_intermediate_size: int  # 0: no shared expert
    norm_topk_prob: bool
    sparse_layers: frozenset[int]  # layer indices with experts (decoder_sparse_step, mlp_only_layers applied)

    def __post_init__(self) -> None:
        _require_count("num_experts", self.num_experts, 1, MAX_EXPERTS)
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise CheckpointError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; accepted: 1 to num_experts ({self.num_experts})"
            )
        _require_count("moe_intermediate_size", self.moe_intermediate_size, 1, MAX_WIDTH)
        _require_count("shared_expert_intermediate_size", self.shared_expert_intermediate_size, 0, MAX_WIDTH)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Facts of one checkpoint, validated once, spelled as in config.json.

    Attributes:
        logn_attn_length: of `qwen`: a query at position p is multiplied by max(1, log(p + 1) / log(this)); None: it
            isn't (`use_logn_attn`).
        dynamic_ntk_length: of `qwen`: tokens of a first step up to which keys are rotated at `rope_theta`; longer ones
            get larger bases (`exporter.model.position_tables`); None: all have that base (`use_dynamic_ntk`).

    Raises:
        CheckpointError: a value is out of range; the message names field, value and accepted range.
    """

    model_type: str  # a key of MODEL_TYPES
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of a dense MLP
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int  # tokens of context, a rotary scaling's extension counted (`RopeScaling.context_for`)
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    attention_bias: bool = True  # q, k, v have biases (a llama-layout checkpoint and qwen3: False)
    rope_scaling: RopeScaling | None = None
    logn_attn_length: int | None = None
    dynamic_ntk_length: int | None = None
    moe: MoeConfig | None = None
    torch_dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # as named: a build leaves out those beyond the vocabulary, with a warning
    pad_token_id: int | None = None
    vision: VisionConfig | None = None  # the tower whose rows this decoder takes in the place of tokens' embeddings

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise CheckpointError(f"model_type is {self.model_type!r}; accepted: {', '.join(MODEL_TYPES)}")
        if self.torch_dtype not in DTYPES:
            raise CheckpointError(f"torch_dtype is {self.torch_dtype!r}; accepted: {', '.join(DTYPES)}")
        for name, limit in (
            ("vocab_size", MAX_VOCABULARY),
            ("hidden_size", MAX_WIDTH),
            ("intermediate_size", MAX_WIDTH),
            ("num_attention_heads", MAX_WIDTH),
            ("num_key_value_heads", MAX_WIDTH),
            ("head_dim", MAX_WIDTH),
            ("max_position_embeddings", MAX_CONTEXT),
        ):
            _require_count(name, getattr(self, name), 1, limit)
        _require_number("rms_norm_eps", self.rms_norm_eps, *_FP32)
        require_layers("num_hidden_layers", self.num_hidden_layers)
        _require_number("rope_theta", self.rope_theta, 0, math.inf)
        if self.rope_theta <= 1:
            raise CheckpointError(f"rope_theta is {self.rope_theta}; accepted: numbers greater than 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_key_value_heads is {self.num_key_value_heads}; it must divide num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}; rotary embedding needs an even number")
        self._check_length_extension()
        if (self.moe is not None) != self.kind.has_experts:
            raise CheckpointError(
                f"moe is {self.moe}; model_type {self.model_type!r} "
                f"{'needs expert facts' if self.moe is None else 'has no experts'}"
            )
        for layer in sorted(self.moe.sparse_layers) if self.moe is not None else ():
            if not 0 <= layer < self.num_hidden_layers:
                raise CheckpointError(
                    f"sparse layer {layer} does not exist; accepted: 0 to {self.num_hidden_layers - 1}"
                )
        for name, token_id in (("bos_token_id", self.bos_token_id), ("pad_token_id", self.pad_token_id)):
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise CheckpointError(f"{name} holds {token_id}; accepted: 0 to vocab_size - 1 ({self.vocab_size - 1})")
        if self.vision is not None and self.vision.output_dim != self.hidden_size:
            raise CheckpointError(
                f"visual.output_dim is {self.vision.output_dim}; accepted: hidden_size ({self.hidden_size})"
            )
        if self.vision is not None and self.vision.image_start_id + 2 >= self.vocab_size:
            raise CheckpointError(
                f"visual.image_start_id is {self.vision.image_start_id}; accepted: 1 to vocab_size - 3 "
                f"({self.vocab_size - 3})"
            )
        self._check_products()

    def _check_length_extension(self) -> None:
        for name, at_least in (("logn_attn_length", 2), ("dynamic_ntk_length", 1)):
            value = getattr(self, name)
            if value is not None:
                _require_count(name, value, at_least, MAX_CONTEXT)
        if self.dynamic_ntk_length is None:
            return
        if self.head_dim < 4:
            raise CheckpointError(f"head_dim is {self.head_dim}; dynamic NTK (use_dynamic_ntk) needs at least 4")
        if self.rope_scaling is not None:
            raise CheckpointError(
                f"rope scaling {self.rope_scaling.rope_type!r} doesn't go with dynamic NTK (use_dynamic_ntk); "
                "accepted: one of them"
            )

    def _check_products(self) -> None:
        moe = self.moe
        check_products(
            layers=self.num_hidden_layers,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            query_size=self.query_size,
            key_value_size=self.key_value_size,
            widths=(self.intermediate_size,)
            if moe is None
            else (self.intermediate_size, moe.moe_intermediate_size, moe.shared_expert_intermediate_size),
            experts=0 if moe is None else moe.num_experts,
            sparse_layers=0 if moe is None else len(moe.sparse_layers),
            expert_width=0 if moe is None else moe.moe_intermediate_size,
            context=self.max_position_embeddings,
            head_dim=self.head_dim,
        )

    @property
    def kind(self) -> ModelType:
        """What its model type says."""
        return MODEL_TYPES[self.model_type]

    @property
    def as_in_transformers(self) -> ModelConfig:
        """The same model with the biases that transformers' class always has; where it has none, they are zeros."""
        return dataclasses.replace(self, attention_bias=True) if self.kind.has_biases else self

    @property
    def query_size(self) -> int:
        """H·D, the width of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Hkv·D, the width of the key and of the value projection."""
        return self.num_key_value_heads * self.head_dim

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer's MLP has experts."""
        return self.moe is not None and layer in self.moe.sparse_layers

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Cache bytes of one token over all layers, keys and values, at `itemsize` bytes an element."""
        return 2 * self.num_hidden_layers * self.key_value_size * itemsize


def require_layers(name: str, value: int) -> int:
    """A number of layers that may be counted through.

    Raises:
        CheckpointError: it is outside 1 … MAX_LAYERS.
    """
    _require_count(name, value, 1, MAX_LAYERS)
    return value


def _require_count(name: str, value: object, at_least: int, at_most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
        shown = (
            f"a number of {len(str(value))} digits" if isinstance(value, int) and abs(value) > 10**18 else repr(value)
        )
        raise CheckpointError(f"{name} is {shown}; accepted: whole numbers from {at_least} to {at_most}")


def _require_number(name: str, value: object, at_least: float, at_most: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not at_least <= value <= at_most:  # type: ignore[operator]
        upper = "" if at_most == math.inf else f" to {at_most:g}"
        raise CheckpointError(f"{name} is {value!r}; accepted: numbers from {at_least:g}{upper}")
