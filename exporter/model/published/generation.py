"""What is published of one generation of models: sizes with their facts, and what the endings of names change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qwen_aot.exporter.model.config import ModelConfig, MoeConfig

_ENDOFTEXT = 151643
_IM_END = 151645

Changes = Mapping[str, int | float]  # fields of ModelConfig


@dataclass(frozen=True, slots=True)
class Generation:
    """The models of one generation.

    Attributes:
        name: as its makers write it.
        prefix: that of its models' names, in lower case.
        sizes: what follows the prefix (`7b`) -> the facts of the model whose name has the first ending.
        endings: what may follow the size (`-instruct`) -> facts in which such a model differs, none of them a size.
    """

    name: str
    prefix: str
    sizes: Mapping[str, ModelConfig]
    endings: Mapping[str, Changes]

    @property
    def models(self) -> dict[str, ModelConfig]:
        """A model of each size, with the first ending: its name -> its facts."""
        ending = next(iter(self.endings))
        return {f"{self.prefix}{size}{ending}": config for size, config in self.sizes.items()}

    def named(self) -> Iterator[tuple[str, str, ModelConfig]]:
        """Each name, in lower case; the name that `models` has for the same facts, or this one; the facts."""
        listed = list(self.models)
        for (size, config), first in zip(self.sizes.items(), listed, strict=True):
            for ending, changes in self.endings.items():
                name = f"{self.prefix}{size}{ending}"
                changed = dataclasses.replace(config, **changes)  # type: ignore[arg-type]  # by their names
                yield (name, first, config) if changed == config else (name, name, changed)

    @property
    def words(self) -> str:
        """Its names in a few words: `qwen2.5-0.5b, -1.5b, -7b (each also with -instruct)`."""
        first, *others = self.endings
        sizes = ", ".join(f"{'-' if index else self.prefix}{size}{first}" for index, size in enumerate(self.sizes))
        if not others:
            return sizes
        also = "also with" if not first else "or in its place"
        return f"{sizes} ({'each ' if len(self.sizes) > 1 and not first else ''}{also} {', '.join(others)})"


def decoder(
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    vocab_size: int,
    *,
    model_type: str = "qwen2",
    max_position_embeddings: int = 32768,
    head_dim: int | None = None,
    rms_norm_eps: float = 1e-6,
    rope_theta: float = 1e6,
    tie_word_embeddings: bool = False,
    moe: MoeConfig | None = None,
) -> ModelConfig:
    """The facts of one model, with what most of these have: 1e6 as the base of rotation, Qwen's token ids.

    Args are spelled as in config.json; without `head_dim` heads share the hidden size.
    """
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_attention_heads if head_dim is None else head_dim,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=rms_norm_eps,
        rope_theta=rope_theta,
        tie_word_embeddings=tie_word_embeddings,
        attention_bias=model_type in ("qwen2", "qwen2_moe"),
        moe=moe,
        bos_token_id=_ENDOFTEXT,
        eos_token_ids=(_IM_END, _ENDOFTEXT),
        pad_token_id=_ENDOFTEXT,
    )


def experts(
    count: int, per_token: int, size: int, layers: int, *, shared_size: int = 0, normalised: bool = False
) -> MoeConfig:
    """Experts in every layer.

    Args:
        count: E.
        per_token: k.
        size: F of one of them.
        layers: of the model.
        shared_size: F of the shared expert; 0: there is none.
        normalised: the chosen ones' shares are made to sum to 1.
    """
    return MoeConfig(count, per_token, size, shared_size, normalised, frozenset(range(layers)))
