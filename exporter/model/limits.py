"""How large a model's facts may be: far beyond any published one, and small enough to be worked on in a second.

What is larger is damage or malice: listing its tensors or tracing its graph would take hours or all memory.
"""

from __future__ import annotations

from collections.abc import Iterable

from qwen_aot.errors import CheckpointError

# Beside each limit, about the largest of published decoders.
MAX_LAYERS = 1_000  # 126
MAX_EXPERTS = 10_000  # 2,048
MAX_WIDTH = 2**20  # 53,248: of the hidden state, of queries, keys and values, of an MLP or an expert
MAX_VOCABULARY = 2**24  # 256,000
MAX_CONTEXT = 2**28  # 10,000,000 tokens

# Of products, which the limits above would let grow too far.
MAX_LAYERS_BY_WIDTH = 2**26  # 6,700,000: the graph holds indices of every gate's columns
MAX_TENSORS = 250_000  # 70,000
MAX_TENSOR_ELEMENTS = 2**40  # 1.2e10: all experts of a layer in one initializer
MAX_ROTARY_ELEMENTS = 2**34  # 1.3e9: positions by head size

_TENSORS_OF_LAYER = 16  # at most, beside those of experts
_TENSORS_OF_EXPERT = 3


def require_at_most(name: str, value: int, limit: int) -> None:
    """Refuses a count or a product beyond its limit.

    Args:
        name: the field, or the fields that are multiplied ("heads x head_dim").
        value: what they are.
        limit: the most that is accepted.

    Raises:
        CheckpointError: it is beyond the limit.
    """
    if value > limit:
        raise CheckpointError(
            f"{name} is {value:,}; accepted: up to {limit:,}, which is far beyond any published model; "
            "is the configuration damaged?"
        )


def check_products(
    *,
    layers: int,
    hidden_size: int,
    vocab_size: int,
    query_size: int,
    key_value_size: int,
    widths: Iterable[int],
    experts: int,
    sparse_layers: int,
    expert_width: int,
    context: int,
    head_dim: int,
) -> None:
    """Refuses facts of which each is within its limit and whose products aren't.

    Args:
        layers: how many.
        hidden_size: of the residual stream.
        vocab_size: rows of embedding and head.
        query_size: heads x head size.
        key_value_size: key and value heads x head size.
        widths: of dense MLPs, experts and shared experts.
        experts: of a layer; 0: none.
        sparse_layers: how many layers have them.
        expert_width: of one expert.
        context: tokens, rotary scaling counted.
        head_dim: elements of a head.

    Raises:
        CheckpointError: names the product.
    """
    require_at_most("num_attention_heads x head_dim", query_size, MAX_WIDTH)
    require_at_most("num_key_value_heads x head_dim", key_value_size, MAX_WIDTH)
    widest = max(hidden_size, query_size, *widths)
    require_at_most("num_hidden_layers x the widest projection", layers * widest, MAX_LAYERS_BY_WIDTH)
    tensors = layers * _TENSORS_OF_LAYER + sparse_layers * experts * _TENSORS_OF_EXPERT
    require_at_most("the number of tensors (num_hidden_layers x num_experts)", tensors, MAX_TENSORS)
    require_at_most("vocab_size x hidden_size", vocab_size * hidden_size, MAX_TENSOR_ELEMENTS)
    stacked = 2 * experts * expert_width * hidden_size
    require_at_most("num_experts x moe_intermediate_size x hidden_size x 2", stacked, MAX_TENSOR_ELEMENTS)
    require_at_most("max_position_embeddings x head_dim", context * head_dim, MAX_ROTARY_ELEMENTS)
