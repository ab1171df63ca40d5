"""Bytes that an engine takes where it runs, from the model's facts alone: no graph is made, nothing heavy is imported.

Weights and cache are exact. Activations are an estimate, and carry that in their name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from qwen_aot.engines.planner.activations import activation_bytes, vision_activation_bytes
from qwen_aot.engines.planner.forms import COMPUTE_BYTES, Form, Forms, Part, is_blockwise, weight_forms
from qwen_aot.engines.planner.own_weights import own_choices, own_weights
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.storage import Storage
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.position_tables import position_tables
from qwen_aot.exporter.model.tensors import Parameter, Role, WeightClass, layer_kinds, outer_parameters
from qwen_aot.exporter.model.vision import CHANNELS, VisionConfig
from qwen_aot.exporter.model.vision_tensors import vision_parameters
from qwen_aot.exporter.quantize.blockwise import BLOCK_SIZES
from qwen_aot.runtime.bundle.manifest import cache_capacity

_CACHE_BYTES = COMPUTE_BYTES | {"INT8": 1}
_SCALE_BYTES = 4  # fp32: what queries at a position are multiplied by
_CACHE_SCALE_BYTES = 2  # fp16: one for each key and each value of a head and token


_FORMS: Mapping[WeightClass, Callable[[Forms], Form]] = {
    WeightClass.NORM: lambda _: Form(32),
    WeightClass.BIAS: lambda forms: forms.plain,
    WeightClass.DECIDING: lambda forms: forms.deciding,
    WeightClass.EMBEDDING: lambda forms: forms.embedding,
    WeightClass.HEAD: lambda forms: forms.head,
    WeightClass.PROJECTION: lambda forms: forms.projection,
    WeightClass.DOWN: lambda forms: forms.down,
    WeightClass.EXPERT: lambda forms: forms.expert,
}


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of one engine at its full context and batch, in bytes.

    Attributes:
        weight_bytes: exact, each weight once, those of a vision engine too; an engine's own code isn't in it.
        cache_bytes: exact, of the whole capacity.
        activation_bytes_estimated: see `activation_bytes`; of a vision engine as well, which runs beside the decoder.
        step_bytes: what a decode step of all rows must move, each row at its full context.
    """

    weight_bytes: int
    cache_bytes: int
    activation_bytes_estimated: int
    step_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of memory."""
        return self.weight_bytes + self.cache_bytes + self.activation_bytes_estimated


def footprint(
    config: ModelConfig, spec: BuildSpec, storage: Storage | None = None, *, own_kernels: bool = True
) -> Footprint:
    """Sizes up what `spec` builds of a model.

    A decode step reads every weight but these: of the embedding and the rotary tables one row a sequence, of routed
    experts the chosen ones, min(E, B·k) (rows that choose the same experts read fewer), and nothing of what prefill
    alone uses. It reads the cache up to the context, not to the capacity; where native attention copies its window
    first, it reads that, writes it and reads it again.

    Args:
        config: the model's facts.
        spec: what is built; `engines.spec.own_codes.settled` by the storage, where there is one.
        storage: the checkpoint's, which weights that keep its codes are stored by.
        own_kernels: whether the project's kernels run it where a bundle has a graph for them, and not ONNX Runtime's:
            their cache has another type.

    Raises:
        BuildError: the context is beyond the model's, or own codes are asked for without a checkpoint.
        ExportError: the target can't keep the checkpoint's codes.
    """
    context = spec.context_for(config.max_position_embeddings)
    if spec.own_codes:
        if storage is None:
            raise BuildError("own_codes has no size without the checkpoint whose codes these are; give its storage")
        parts = [own_weights(config, own_choices(spec), storage), _position_tables(config, spec, context)]
    else:
        parts = list(_parts(config, spec, context))
    activations = activation_bytes(config, spec)
    if config.vision is not None:
        parts.append(Part(vision_weight_bytes(config.vision, spec), 0))
        activations += vision_activation_bytes(config.vision, spec)
    if spec.has_calibrated_cache:
        parts.append(Part.whole(4 * 2 * config.num_hidden_layers * config.key_value_size))
    return Footprint(
        weight_bytes=sum(part.stored for part in parts),
        cache_bytes=_cache_bytes(config, spec, cache_capacity(context, spec.prefill_chunk), own_kernels),
        activation_bytes_estimated=activations,
        step_bytes=sum(part.read for part in parts)
        + _window_passes(spec) * _cache_bytes(config, spec, context, own_kernels),
    )


def vision_weight_bytes(config: VisionConfig, spec: BuildSpec) -> int:
    """Of a vision engine, exact: two tables of positions, one resized, and two vectors are its own."""
    itemsize = COMPUTE_BYTES[spec.combination.compute_type]
    stored = sum(math.prod(part.shape) * (4 if part.is_fp32 else itemsize) for part in vision_parameters(config))
    return stored + 2 * 4 * CHANNELS


def _window_passes(spec: BuildSpec) -> int:
    """How often a decode step moves the attended part of the cache (docs/tensorrt.md, the plan)."""
    return 3 if spec.facts.memory.copies_window and spec.attention == "native" else 1


def _cache_bytes(config: ModelConfig, spec: BuildSpec, tokens: int, own_kernels: bool) -> int:
    itemsize = _CACHE_BYTES[(own_kernels and spec.own_kernels_cache_type) or spec.cache_type]
    has_scales = spec.cache_type == "INT8" and not spec.has_calibrated_cache  # calibrated ones are weights
    scales = 2 * config.num_hidden_layers * config.num_key_value_heads if has_scales else 0
    return spec.max_batch * tokens * (config.kv_bytes_per_token(itemsize) + scales * _CACHE_SCALE_BYTES)


def _parts(config: ModelConfig, spec: BuildSpec, context: int) -> Iterator[Part]:
    """Every weight of the model, layers of one kind together."""
    forms = weight_forms(spec)
    for parameter in outer_parameters(config):
        yield _part(parameter, config, spec, forms)
    if config.tie_word_embeddings:
        yield _tied_head(config, forms)
    yield _position_tables(config, spec, context)
    for layers, parameters in layer_kinds(config):
        for parameter in parameters:
            yield _part(parameter, config, spec, forms) * len(layers)
    yield from _channels(config, forms)


def _position_tables(config: ModelConfig, spec: BuildSpec, context: int) -> Part:
    """The rotary tables, of which a step reads a row a sequence, and the queries' factors."""
    rotary = weight_forms(spec).rotary
    tables = position_tables(config, context, cache_capacity(context, spec.prefill_chunk))
    part = Part(rotary.bytes_of(tables.rotary_rows, config.head_dim), rotary.bytes_of(spec.max_batch, config.head_dim))
    if not tables.scales_queries:
        return part
    return Part(part.stored + _SCALE_BYTES * tables.positions, part.read + _SCALE_BYTES * spec.max_batch)


def _part(parameter: Parameter, config: ModelConfig, spec: BuildSpec, forms: Forms) -> Part:
    """One initializer of the trace as it is stored."""
    if parameter.weight_class is WeightClass.EXPERT:
        return _experts(parameter, config, spec, forms)
    *lead, width = parameter.shape
    form, rows = _FORMS[parameter.weight_class](forms), math.prod(lead)
    read = spec.max_batch if parameter.weight_class is WeightClass.EMBEDDING else rows
    return Part(form.bytes_of(rows, width), form.bytes_of(read, width))


def _tied_head(config: ModelConfig, forms: Forms) -> Part:
    """The head of a model whose table has none."""
    V, M = config.vocab_size, config.hidden_size
    head = forms.head.bytes_of(V, M)
    if not forms.shares_tied_head:
        return Part.whole(head)
    without = dataclasses.replace(forms.head, zero_point_bits=0)  # those alone are another tensor than its own
    return Part(head - without.bytes_of(V, M), head)


def _channels(config: ModelConfig, forms: Forms) -> Iterator[Part]:
    """The second form of the layers' projections, which prefill alone reads.

    In the last layer, which goes on from q, k and v with one token a row, those alone have it.
    """
    if forms.channels is None:
        return
    last = config.num_hidden_layers - 1
    for layers, parameters in layer_kinds(config):
        for parameter in parameters:
            if parameter.weight_class in (WeightClass.PROJECTION, WeightClass.DOWN):
                is_left_out = last in layers and Role.QUERY not in parameter.roles
                rows, width = parameter.shape
                yield Part(forms.channels.bytes_of(rows, width), 0) * (len(layers) - is_left_out)


def _experts(parameter: Parameter, config: ModelConfig, spec: BuildSpec, forms: Forms) -> Part:
    """One matrix of all routed experts of a layer.

    ONNX Runtime's kernel wants blocks that divide M, and F filled up to whole blocks; where no block size divides M,
    the experts stay as computed.
    """
    assert config.moe is not None and parameter.num_experts is not None
    form, fills = _FORMS[parameter.weight_class](forms), 1
    if is_blockwise(spec):
        assert form.block_size is not None
        dividing = [size for size in BLOCK_SIZES if size <= form.block_size and config.hidden_size % size == 0]
        form = dataclasses.replace(form, block_size=max(dividing)) if dividing else forms.plain
        fills = form.block_size or 1
    _, rows, width = parameter.shape
    if parameter.roles == (Role.EXPERT_DOWN,):
        width = -(-width // fills) * fills
    else:
        rows = sum(-(-shape[0] // fills) * fills for _, shape in parameter.parts)  # gate's and up's each
    expert, E = form.bytes_of(rows, width), parameter.num_experts
    return Part(E * expert, min(E, spec.max_batch * config.moe.num_experts_per_tok) * expert)
