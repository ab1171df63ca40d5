"""One decoder layer in float32 over whole sequences, which shows what its projections read and what a cache would hold.

Written for calibration: no cache, no export, one layer's weights in memory. Source of the formulas: transformers'
Qwen2DecoderLayer and Qwen2MoeDecoderLayer, with which the tests compare it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.position_tables import query_scales, rotary_rows, rotary_table
from qwen_aot.exporter.model.tensors import Role, layer_parameters

Place = tuple[Role, int | None]  # a tensor of a layer: its role, and its expert if it is of one
Weights = dict[Place, Tensor]


@dataclass(frozen=True, slots=True)
class Reading:
    """Matrices of a layer that read one and the same input.

    Attributes:
        places: of these matrices [N, K], in the order in which the checkpoint's table has them.
    """

    places: tuple[Place, ...]

    @property
    def name(self) -> str:
        """Within its layer, for files and messages."""
        role, expert = self.places[0]
        return role.name.lower() if expert is None else f"{role.name.lower()}-{expert}"


Observe = Callable[[Reading, Tensor], None]  # gets what the matrices read: [tokens, K] float32
RoundInput = Callable[[Reading, Tensor], Tensor]  # gets the same, and gives what they read instead
ObserveCache = Callable[[Tensor, Tensor], None]  # gets rotated keys and values, each [B, Hkv, T, D] float32

_QKV = (Role.QUERY, Role.KEY, Role.VALUE)


def readings(config: ModelConfig, *, is_sparse: bool) -> Iterator[Reading]:
    """Every input of a layer that matrices to be quantized read, in the order in which the layer computes them."""
    roles = {role for parameter in layer_parameters(config, is_sparse=is_sparse) for role in parameter.roles}
    for group in (_QKV, (Role.OUTPUT,), (Role.GATE, Role.UP), (Role.DOWN,)):
        if group[0] in roles:
            yield Reading(tuple((role, None) for role in group))
    if not is_sparse:
        return
    assert config.moe is not None
    for expert in range(config.moe.num_experts):
        yield Reading(((Role.EXPERT_GATE, expert), (Role.EXPERT_UP, expert)))
        yield Reading(((Role.EXPERT_DOWN, expert),))
    if Role.SHARED_GATE in roles:
        yield Reading(((Role.SHARED_GATE, None), (Role.SHARED_UP, None)))
        yield Reading(((Role.SHARED_DOWN, None),))


def load_weights(checkpoint: Checkpoint, layer: int) -> Weights:
    """All tensors of one layer in float32, copied.

    Raises:
        CheckpointError: one can't be read.
    """
    config = checkpoint.config
    found: Weights = {}
    for parameter in layer_parameters(config, is_sparse=config.is_sparse(layer)):
        for tensor in parameter.tensors(layer):
            values = checkpoint.read(tensor.name).astype(np.float32)
            found[tensor.role, tensor.expert] = torch.from_numpy(values)
    return found


class DecoderLayer:
    """Computes layers of one model.

    Args:
        config: the model's facts.
        length: positions of every sequence.
    """

    def __init__(self, config: ModelConfig, length: int) -> None:
        self._config = config
        table = rotary_table(config, length)  # of a first step of all positions
        rows = np.arange(table * length, (table + 1) * length)
        self._cos, self._sin = (
            torch.from_numpy(np.tile(rotary_rows(config, length, rows, function), 2)) for function in (np.cos, np.sin)
        )  # [T, D]
        self._query_scales = torch.from_numpy(query_scales(config, np.arange(length)))[:, None]  # [T, 1]

    @torch.no_grad()
    def __call__(
        self,
        weights: Mapping[Place, Tensor],
        hidden: Tensor,
        observe: Observe = lambda *_: None,
        observe_cache: ObserveCache = lambda *_: None,
        round_input: RoundInput = lambda _, x: x,
    ) -> Tensor:
        """Maps the residual stream [B, T, M] to the one behind the layer.

        Args:
            weights: of the layer, float32.
            hidden: the stream in front of it.
            observe: called with each input that matrices read, in the order of `readings`; experts that no token
                chooses are left out.
            observe_cache: called once, with the keys and values that a cache holds.
            round_input: called behind `observe`, for a layer whose matrices read rounded inputs.
        """

        def read(reading: Reading, x: Tensor) -> Tensor:
            observe(reading, x)
            return round_input(reading, x)

        x = self._norm(weights[Role.INPUT_NORM, None], hidden)
        x = read(Reading(tuple((role, None) for role in _QKV)), _flat(x)).view_as(x)
        attention = self._attention(weights, x, observe_cache)
        attention = read(Reading(((Role.OUTPUT, None),)), _flat(attention)).view_as(attention)
        hidden = hidden + functional.linear(attention, weights[Role.OUTPUT, None])
        x = self._norm(weights[Role.POST_ATTENTION_NORM, None], hidden)
        if (Role.ROUTER, None) not in weights:
            return hidden + self._mlp(weights, _flat(x), (Role.GATE, Role.UP, Role.DOWN), None, read).view_as(x)
        return hidden + self._experts(weights, _flat(x), read).view_as(x)

    def _norm(self, weight: Tensor, x: Tensor) -> Tensor:
        return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._config.rms_norm_eps))

    def _attention(self, weights: Mapping[Place, Tensor], x: Tensor, observe_cache: ObserveCache) -> Tensor:
        """[B, T, M] -> what the output projection reads [B, T, H * D]."""
        config = self._config
        B, T, _ = x.shape

        def heads(role: Role, bias: Role, count: int) -> Tensor:
            y = functional.linear(x, weights[role, None], weights.get((bias, None)))
            return y.view(B, T, count, config.head_dim).transpose(1, 2)

        query = self._rotated(heads(Role.QUERY, Role.QUERY_BIAS, config.num_attention_heads)) * self._query_scales
        key = self._rotated(heads(Role.KEY, Role.KEY_BIAS, config.num_key_value_heads))
        value = heads(Role.VALUE, Role.VALUE_BIAS, config.num_key_value_heads)
        observe_cache(key, value)
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return found.transpose(1, 2).reshape(B, T, config.query_size)

    def _rotated(self, x: Tensor) -> Tensor:
        """RoPE, rotate-half, x [B, heads, T, D]."""
        first, second = x.chunk(2, dim=-1)
        return x * self._cos + torch.cat((-second, first), dim=-1) * self._sin

    def _mlp(
        self, weights: Mapping[Place, Tensor], x: Tensor, roles: Sequence[Role], expert: int | None, read: RoundInput
    ) -> Tensor:
        """SwiGLU of tokens [tokens, M]; `roles`: gate, up, down."""
        gate, up, down = ((role, expert) for role in roles)
        x = read(Reading((gate, up)), x)
        inner = functional.silu(functional.linear(x, weights[gate])) * functional.linear(x, weights[up])
        return functional.linear(read(Reading((down,)), inner), weights[down])

    def _experts(self, weights: Mapping[Place, Tensor], x: Tensor, read: RoundInput) -> Tensor:
        """Routed experts and the shared one of tokens [tokens, M]."""
        moe = self._config.moe
        assert moe is not None
        shares = functional.softmax(functional.linear(x, weights[Role.ROUTER, None]), dim=-1)
        chosen, experts = shares.topk(moe.num_experts_per_tok, dim=-1)
        if moe.norm_topk_prob:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        result = torch.zeros_like(x)
        roles = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
        for expert in range(moe.num_experts):
            tokens, rank = torch.where(experts == expert)
            if len(tokens):
                found = self._mlp(weights, x[tokens], roles, expert, read)
                result.index_add_(0, tokens, found * chosen[tokens, rank, None])
        if (Role.SHARED_GATE, None) in weights:
            shared = self._mlp(weights, x, (Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN), None, read)
            result += torch.sigmoid(functional.linear(x, weights[Role.SHARED_EXPERT_GATE, None])) * shared
        return result


def _flat(x: Tensor) -> Tensor:
    """[B, T, K] -> [B * T, K]."""
    return x.reshape(-1, x.shape[-1])
