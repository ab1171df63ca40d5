"""Bytes of weights that keep a checkpoint's own codes: each tensor has its own bits, groups and zero points."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from qwen_aot.engines.planner.forms import COMPUTE_BYTES, Form, Part, deciding_bits
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.exporter.checkpoint.storage import Storage
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import Parameter, Role, Tensor, WeightClass, layer_parameters, placed_parameters
from qwen_aot.exporter.quantize.blockwise import BLOCK_SIZES, BlockFormat
from qwen_aot.exporter.quantize.own_codes import (
    EXPERT_BLOCK,
    OFFSET_BYTES,
    TABLE_BLOCK,
    block_format,
    make_one_matrix,
    no_blocks,
    no_expert_minimums,
    no_experts,
    no_plugin_experts,
    plugin_experts,
    plugin_linear,
    require_scales,
    signed_format,
)

_REMEMBERED = 8


@dataclass(frozen=True, slots=True)
class OwnChoices:
    """All of a spec that decides these bytes.

    Attributes:
        compute_bytes: of an element of the compute type.
        has_blocks: ONNX Runtime's blocks; else TensorRT's signed codes.
        table_bits: of embedding and head where these are plain numbers; None: they stay so.
        always_zero_points: the quantized embedding has them in any case.
        has_plugin_experts: the QwenMoE plugin reads routed experts.
        has_plugin_linear: the QwenLinear plugin reads projections that it has a form for.
        int8_head: the head is int8 with a scale a channel, beside the embedding if tied.
        fast_prefill: projections have a second form.
        rows: that decode at once.
        deciding_bits: of routers and gates.
    """

    compute_bytes: int
    has_blocks: bool
    table_bits: int | None
    always_zero_points: bool
    has_plugin_experts: bool
    has_plugin_linear: bool
    int8_head: bool
    fast_prefill: bool
    rows: int
    deciding_bits: int

    @property
    def scale_dtype(self) -> DTypeLike:
        """In which kernels take scales."""
        return np.float32 if self.compute_bytes == COMPUTE_BYTES["FLOAT"] else np.float16


def own_choices(spec: BuildSpec) -> OwnChoices:
    """Of a spec with own codes."""
    return OwnChoices(
        COMPUTE_BYTES[spec.combination.compute_type],
        spec.facts.weight_layout == "blocks",
        spec.sensitive_bits,
        spec.facts.always_zero_points,
        spec.moe == "plugin",
        spec.linear == "plugin",
        spec.tensorrt.quantize_head,
        spec.fast_prefill,
        spec.max_batch,
        deciding_bits(spec),
    )


@functools.lru_cache(_REMEMBERED)
def own_weights(config: ModelConfig, choices: OwnChoices, storage: Storage) -> Part:
    """All weights but the rotary tables.

    Raises:
        ExportError: the target can't keep the codes.
    """
    parts = [part for place in placed_parameters(config) for part in _parts(*place, config, choices, storage)]
    if config.tie_word_embeddings:
        parts.append(_tied_head(config, choices, storage))
    return Part(sum(part.stored for part in parts), sum(part.read for part in parts))


def _parts(
    parameter: Parameter, layer: int | None, config: ModelConfig, choices: OwnChoices, storage: Storage
) -> Iterator[Part]:
    tensors = list(parameter.tensors(layer))
    names = [tensor.name for tensor in tensors]
    plain = Form(8 * choices.compute_bytes)
    match parameter.weight_class:
        case WeightClass.NORM:
            yield Part.whole(Form(32).bytes_of(1, parameter.shape[0]))
        case WeightClass.BIAS:
            yield Part.whole(plain.bytes_of(1, parameter.shape[0]))
        case WeightClass.DECIDING:
            yield Part.whole(Form(choices.deciding_bits).bytes_of(*parameter.shape))
        case WeightClass.EMBEDDING | WeightClass.HEAD:
            yield _table(tensors[0], choices, storage)
        case WeightClass.EXPERT:
            assert layer is not None
            yield _experts(parameter, layer, config, choices, storage)
        case _:
            groups = [tensors] if make_one_matrix(names, storage) else [[tensor] for tensor in tensors]
            for group in groups:
                rows, width = sum(tensor.shape[0] for tensor in group), group[0].shape[1]
                heights = [tensor.shape[0] for tensor in group]
                form_of_matrix = _matrix([tensor.name for tensor in group], heights, width, choices, storage)
                yield Part.whole(form_of_matrix.bytes_of(rows, width))
                is_seen = layer != config.num_hidden_layers - 1 or Role.QUERY in parameter.roles
                form = storage.form(group[0].name)
                if choices.fast_prefill and is_seen and form is not None and not form.has_input_scale:
                    yield Part(Form(8, 4).bytes_of(rows, width), 0)


def _matrix(names: Sequence[str], heights: Sequence[int], width: int, choices: OwnChoices, storage: Storage) -> Form:
    """How tensors of one matrix, of so many rows each, are stored."""
    forms = [form for name in names if (form := storage.form(name)) is not None]
    if not forms:
        return Form(8 * choices.compute_bytes)
    require_scales(names[0], forms, choices.scale_dtype)
    if all(form.has_input_scale for form in forms):  # a scale a row
        return Form(8, choices.compute_bytes)
    if choices.has_blocks:
        blocks = block_format(forms, width, choices.compute_bytes)
        if blocks is None:
            raise no_blocks(names[0], forms, BLOCK_SIZES)
        return _blocks(blocks, choices)
    plugged = plugin_linear(forms, heights, width) if choices.has_plugin_linear else None
    if plugged is not None:
        zero_bits = 8 if plugged.has_zeros else 0
        return Form(plugged.bits, choices.compute_bytes, plugged.group_size, zero_point_bits=zero_bits)
    signed = signed_format(forms, width)
    if signed is None:
        raise no_blocks(names[0], forms, BLOCK_SIZES)
    scale_bytes = choices.compute_bytes * (2 if signed.is_split else 1)
    return Form(signed.bits, scale_bytes + OFFSET_BYTES * signed.has_offsets, signed.block_size)


def _blocks(layout: BlockFormat, choices: OwnChoices, *, is_table: bool = False) -> Form:
    """A table's zero points are a byte each, the others' packed."""
    bits = 8 if is_table else layout.bits
    has_zero_points = not layout.symmetric or (is_table and choices.always_zero_points)
    scale_bytes = choices.compute_bytes + OFFSET_BYTES * layout.has_offsets
    return Form(layout.bits, scale_bytes, layout.block_size, True, bits if has_zero_points else 0)


def _table_layout(name: str, width: int, choices: OwnChoices, storage: Storage) -> BlockFormat | None:
    """Of an embedding or head in ONNX Runtime's blocks; None: it is stored as numbers."""
    form = storage.form(name)
    if form is None:
        return None if choices.table_bits is None else BlockFormat(choices.table_bits, TABLE_BLOCK)
    require_scales(name, [form], choices.scale_dtype)
    return block_format([form], width, choices.compute_bytes)


def _numbers(name: str, choices: OwnChoices, storage: Storage) -> Form:
    """A table of plain numbers: in 16 bits where the checkpoint has no more and ONNX Runtime computes in fp32."""
    stored = storage.dtypes.get(name, np.dtype(np.float32)).itemsize
    return Form(8 * (min(stored, choices.compute_bytes) if choices.has_blocks else choices.compute_bytes))


def _table(tensor: Tensor, choices: OwnChoices, storage: Storage) -> Part:
    (rows, width), is_embedding = tensor.shape, tensor.role is Role.EMBEDDING
    layout = _table_layout(tensor.name, width, choices, storage) if choices.has_blocks else None
    if layout is not None:
        form = _blocks(layout, choices, is_table=is_embedding)
        return Part(form.bytes_of(rows, width), form.bytes_of(choices.rows if is_embedding else rows, width))
    form = _numbers(tensor.name, choices, storage)
    if is_embedding:
        return Part(form.bytes_of(rows, width), form.bytes_of(choices.rows, width))
    if not choices.has_blocks:
        return Part.whole(_tensorrt_head(tensor.name, rows, width, choices, storage).bytes_of(rows, width))
    return Part(form.bytes_of(rows, width), rows * width * choices.compute_bytes)


def _tensorrt_head(name: str, rows: int, width: int, choices: OwnChoices, storage: Storage) -> Form:
    if storage.form(name) is not None:
        return _matrix([name], [rows], width, choices, storage)
    return Form(8, choices.compute_bytes) if choices.int8_head else Form(8 * choices.compute_bytes)


def _tied_head(config: ModelConfig, choices: OwnChoices, storage: Storage) -> Part:
    """What the head of a model whose table has none adds to the embedding, and what it reads."""
    name, rows, width = Role.EMBEDDING.tensor_name(), config.vocab_size, config.hidden_size
    if choices.has_blocks:
        layout = _table_layout(name, width, choices, storage)
        if layout is None:
            return Part(0, rows * width * choices.compute_bytes)
        head = _blocks(layout, choices)
        zero_points = rows * -(-layout.blocks(width) * head.zero_point_bits // 8)
        offsets = rows * layout.blocks(width) * OFFSET_BYTES * layout.has_offsets  # in the order of a product's
        return Part(zero_points + offsets, head.bytes_of(rows, width))
    head = _tensorrt_head(name, rows, width, choices, storage)
    is_shared = storage.form(name) is None and not choices.int8_head
    return Part(0 if is_shared else head.bytes_of(rows, width), head.bytes_of(rows, width))


def _experts(parameter: Parameter, layer: int, config: ModelConfig, choices: OwnChoices, storage: Storage) -> Part:
    """One matrix of all routed experts of a layer, in the blocks that hold both matrices; see `footprint._experts`."""
    assert config.moe is not None and parameter.num_experts is not None
    F, M = config.moe.moe_intermediate_size, config.hidden_size
    both = [each for each in layer_parameters(config, is_sparse=True) if each.weight_class is WeightClass.EXPERT]
    names = [tensor.name for each in both for tensor in each.tensors(layer)]
    forms = [form for name in names if (form := storage.form(name)) is not None]
    stored, padded = Form(8 * choices.compute_bytes), F
    if forms:
        if not choices.has_blocks:
            return _expert_part(_plugin_form(config, choices, storage), parameter, config, choices)
        groups = {each.group_size for each in forms if each.group_size < M}
        if any(form.has_offsets for form in forms):
            raise no_expert_minimums(names[0], forms)
        layout = block_format(forms, F, choices.compute_bytes, (M, *groups))
        if layout is None:
            raise no_blocks(names[0], forms, BLOCK_SIZES)
        stored, padded = _blocks(layout, choices), layout.blocks(F) * layout.block_size
    return _expert_part(stored, parameter, config, choices, padded)


def _expert_part(
    form: Form, parameter: Parameter, config: ModelConfig, choices: OwnChoices, padded: int | None = None
) -> Part:
    """`padded`: the intermediate size as it is stored."""
    moe, M = config.moe, config.hidden_size
    assert moe is not None
    F = padded or moe.moe_intermediate_size
    is_down = parameter.roles == (Role.EXPERT_DOWN,)
    expert = form.bytes_of(M, F) if is_down else form.bytes_of(2 * F, M)
    return Part(moe.num_experts * expert, min(moe.num_experts, choices.rows * moe.num_experts_per_tok) * expert)


@functools.lru_cache(_REMEMBERED)
def _plugin_form(config: ModelConfig, choices: OwnChoices, storage: Storage) -> Form:
    """Of all experts of the model in the QwenMoE plugin."""
    assert config.moe is not None
    tensors = [
        tensor
        for parameter, layer in placed_parameters(config)
        if parameter.weight_class is WeightClass.EXPERT
        for tensor in parameter.tensors(layer)
    ]
    coded = next(tensor.name for tensor in tensors if tensor.name in storage.encodings)
    if not choices.has_plugin_experts:
        raise no_experts(coded, storage.encodings[coded])
    forms = [(tensor.role, form) for tensor in tensors if (form := storage.form(tensor.name)) is not None]
    gate_up = [form for role, form in forms if role is not Role.EXPERT_DOWN]
    down = [form for role, form in forms if role is Role.EXPERT_DOWN]
    require_scales(coded, (*gate_up, *down), choices.scale_dtype)
    found = plugin_experts(gate_up, down, config.hidden_size, config.moe.moe_intermediate_size)
    if found is None:
        raise no_plugin_experts(coded, (*gate_up, *down))
    if found.bits == 8:
        return Form(8, choices.compute_bytes)
    return Form(4, choices.compute_bytes + found.has_zeros, EXPERT_BLOCK)
