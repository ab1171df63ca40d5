"""Planned bytes against those of graphs that were really traced and lowered."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.engines.onnxruntime import cpu as onnxruntime
from qwen_aot.engines.onnxruntime import cuda
from qwen_aot.engines.planner.activations import activation_bytes
from qwen_aot.engines.planner.devices import DEVICES
from qwen_aot.engines.planner.footprint import footprint
from qwen_aot.engines.planner.plans import refusal_of
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.engines.spec.targets import Target
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.errors import ExportError
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.tensorrt import plugin, standard
from qwen_aot.exporter.model.config import ModelConfig, MoeConfig
from qwen_aot.exporter.model.tensors import num_parameters, tensor_shapes
from qwen_aot.exporter.model.variants import VARIANTS as PUBLISHED
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import output_bytes
from qwen_aot.runtime.bundle.manifest import IoTensor, cache_capacity
from qwen_aot.runtime.engine.kv_cache import KvCache
from tests.variants import SWEPT

# Of their decoders; tests/engines/test_vision.py adds the tower.
VARIANTS = {name: dataclasses.replace(config, vision=None) for name, config in PUBLISHED.items()}

CONTEXT = 2048
KINDS = ("qwen1.5-0.5b", "qwen1.5-110b", "qwen1.5-moe-a2.7b")  # tied, grouped-query, experts

Lower = Callable[[Traced, BuildSpec], Traced]


def cut(config: ModelConfig, layers: int) -> ModelConfig:
    """The model with its first layers only."""
    moe = config.moe
    if moe is not None:
        moe = dataclasses.replace(moe, sparse_layers=frozenset(i for i in moe.sparse_layers if i < layers))
    return dataclasses.replace(config, num_hidden_layers=layers, moe=moe)


def mixed(config: ModelConfig) -> ModelConfig:
    """Three layers of which the first and the last have no experts."""
    assert config.moe is not None
    return dataclasses.replace(
        config, num_hidden_layers=3, moe=dataclasses.replace(config.moe, sparse_layers=frozenset({1}))
    )


@functools.cache
def _traced(config: ModelConfig, dtype: ir.DataType, positions: int) -> Traced:
    return trace(config, dtype, positions=positions)


def lowered_bytes(config: ModelConfig, spec: BuildSpec, lower: Lower) -> int:
    """Bytes of all weights of the graph that a build makes."""
    dtype = ir.DataType[spec.combination.compute_type]
    positions = cache_capacity(spec.context_for(config.max_position_embeddings), spec.prefill_chunk)
    traced = _traced(config, dtype, positions)
    return output_bytes(lower(Traced(traced.model.clone(), config, dict(traced.recipes)), spec))


def lower_standard(traced: Traced, spec: BuildSpec) -> Traced:
    quantized = spec.precision if spec.precision in get_args(standard.WeightFormat) else None
    return standard.lower(traced, standard.StandardOptions(quantized, spec.tensorrt.quantize_head))


def lower_plugin(traced: Traced, spec: BuildSpec) -> Traced:
    quantized = spec.precision if spec.precision in get_args(standard.WeightFormat) else None
    options = plugin.PluginOptions(quantized, int8_cache=spec.cache_type == "INT8", linear=spec.linear)
    return plugin.lower(traced, options)


def tensorrt_spec(precision: str, **options: Any) -> BuildSpec:
    """Of the flavour without plugins."""
    return BuildSpec(target=Target.TENSORRT_RTX, precision=Precision(precision), **options)


def cpu(**options: Any) -> tuple[BuildSpec, Lower]:
    return BuildSpec(max_context=CONTEXT, **options), onnxruntime.lower


def tensorrt(**options: Any) -> tuple[BuildSpec, Lower]:
    return BuildSpec(target=Target.TENSORRT_RTX, max_context=CONTEXT, **options), lower_standard


def with_plugins(**options: Any) -> tuple[BuildSpec, Lower]:
    return BuildSpec(target=Target.TENSORRT, max_context=CONTEXT, **options), lower_plugin


def on_cuda(**options: Any) -> tuple[BuildSpec, Lower]:
    return BuildSpec(target=Target.CUDA, max_context=CONTEXT, **options), cuda.lower


FORMS: dict[str, tuple[BuildSpec, Lower]] = {
    "cpu-fp32": cpu(precision="fp32"),
    "standard-fp32": (cpu(precision="fp32")[0], lower_standard),
    "cpu-int8": cpu(precision="int8"),
    "cpu-int8-cache": cpu(precision="int8", kv_precision="int8"),
    "cpu-int8-32": cpu(precision="int8", block_size=32),
    "cpu-int8-asymmetric": cpu(precision="int8", symmetric=False),
    "cpu-int4": cpu(precision="int4"),
    "cpu-int4-16": cpu(precision="int4", block_size=16, sensitive_bits=4),
    "cpu-int4-256-asymmetric": cpu(precision="int4", block_size=256, symmetric=False, sensitive_bits=4),
    "cpu-int4-asymmetric": cpu(precision="int4", symmetric=False),
    "cpu-int4-fast-prefill": cpu(precision="int4", fast_prefill=True),
    "cuda-fp16": on_cuda(precision="fp16"),
    "tensorrt-fp16": tensorrt(precision="fp16"),
    "tensorrt-bf16": tensorrt(precision="bf16"),
    "tensorrt-int8": tensorrt(precision="int8"),
    "tensorrt-int4": tensorrt(precision="int4"),
    "tensorrt-int4-head": tensorrt(precision="int4", tensorrt=TensorRtOptions(quantize_head=True)),
    "tensorrt-fp8": tensorrt(precision="fp8"),
    "plugin-fp16": with_plugins(precision="fp16"),
    "plugin-int8": with_plugins(precision="int8", kv_precision="int8"),
    "plugin-int4": with_plugins(precision="int4"),
    "plugin-int8-linear": with_plugins(precision="int8", tensorrt=TensorRtOptions(linear="plugin")),
    "plugin-int4-linear": with_plugins(precision="int4", tensorrt=TensorRtOptions(linear="plugin")),
}


DENSE_ONLY = [form for form in FORMS if form.startswith("tensorrt") and form not in ("tensorrt-fp16", "tensorrt-bf16")]


ALL = list(itertools.product(KINDS, FORMS))
REFUSED = [(name, form) for name, form in ALL if VARIANTS[name].moe is not None and form in DENSE_ONLY]
WEIGHTS = [case for case in ALL if case not in REFUSED]


@pytest.mark.parametrize(("name", "form"), WEIGHTS)
def test_weights_of_every_form(name: str, form: str) -> None:
    config, (spec, lower) = cut(VARIANTS[name], 2), FORMS[form]
    assert footprint(config, spec).weight_bytes == pytest.approx(lowered_bytes(config, spec, lower), rel=0.001)


@pytest.mark.parametrize(("name", "form"), REFUSED)
def test_the_other_forms_are_refused(name: str, form: str) -> None:
    """By the planner and by the build alike."""
    config, (spec, lower) = cut(VARIANTS[name], 2), FORMS[form]
    assert "without a plugin" in (refusal_of(config, spec, DEVICES["rtx-4090"]) or "")
    with pytest.raises(ExportError, match="QwenMoE plugin"):
        lowered_bytes(config, spec, lower)


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"block_size": 16}], ids=str)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_weights_for_cuda(precision: str, options: dict[str, Any]) -> None:
    """Without experts, which cuda doesn't quantize; the embedding has zero points in any case."""
    config, (spec, lower) = cut(VARIANTS["qwen1.5-0.5b"], 2), on_cuda(precision=precision, **options)
    assert footprint(config, spec).weight_bytes == pytest.approx(lowered_bytes(config, spec, lower), rel=0.001)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["cpu-int4", "cpu-int8-asymmetric", "cpu-fp32", "tensorrt-fp16"])
@pytest.mark.parametrize("name", [name for name in SWEPT if name not in KINDS])
def test_weights_of_every_variant(name: str, form: str) -> None:
    config, (spec, lower) = cut(VARIANTS[name], 3), FORMS[form]
    assert footprint(config, spec).weight_bytes == pytest.approx(lowered_bytes(config, spec, lower), rel=0.001)


@pytest.mark.parametrize("form", ["cpu-int4-fast-prefill", "cpu-int4-256-asymmetric"])
def test_weights_of_a_model_where_few_layers_have_experts(form: str) -> None:
    config, (spec, lower) = mixed(VARIANTS["qwen1.5-moe-a2.7b"]), FORMS[form]
    assert footprint(config, spec).weight_bytes == pytest.approx(lowered_bytes(config, spec, lower), rel=0.001)


@pytest.mark.parametrize("hidden_size", [416, 40])
def test_experts_whose_width_no_block_size_divides(hidden_size: int) -> None:
    """416 = 13 x 32 takes blocks of 32 for 64 and fills 1,400 up; 40 has no block size at all and stays fp32."""
    moe = cut(VARIANTS["qwen1.5-moe-a2.7b"], 2).moe
    assert moe is not None
    moe = dataclasses.replace(moe, moe_intermediate_size=1400)
    config = tiny(model_type="qwen2_moe", hidden_size=hidden_size, vocab_size=50_000, moe=moe)
    spec, lower = FORMS["cpu-int4"]
    assert footprint(config, spec).weight_bytes == pytest.approx(lowered_bytes(config, spec, lower), rel=0.005)


@pytest.mark.parametrize("block_size", [16, 32])
def test_experts_are_filled_up_to_whole_blocks(block_size: int) -> None:
    """Gate, up and down each: in blocks of 16 as of 32, 49 to 64 are stored as 64."""

    def planned(intermediate_size: int) -> int:
        config = tiny_moe()
        assert config.moe is not None
        moe = dataclasses.replace(config.moe, moe_intermediate_size=intermediate_size)
        spec = BuildSpec(precision=Precision.INT4, block_size=block_size, max_context=64)
        return footprint(dataclasses.replace(config, moe=moe), spec).weight_bytes

    assert planned(49) == planned(63) == planned(64) < planned(65)
    sixteen_rows = 2 * 8 * 3 * 16 * (64 // 2 + 4 * 64 // 16)  # of 2 layers' 8 experts: codes and fp32 scales
    assert planned(64) - planned(48) == (sixteen_rows if block_size == 16 else 0)


@pytest.mark.parametrize("form", ["cpu-int4", "tensorrt-fp16"])
def test_weights_of_a_whole_model(form: str) -> None:
    config, (spec, lower) = VARIANTS["qwen1.5-0.5b"], FORMS[form]
    assert footprint(config, spec).weight_bytes == pytest.approx(lowered_bytes(config, spec, lower), rel=0.001)


def test_published_parameters_at_two_bytes_are_a_variants_weights() -> None:
    """What is more: norms at four bytes and the rotary tables."""
    for config in VARIANTS.values():
        planned = footprint(config, tensorrt_spec("fp16")).weight_bytes
        assert planned == pytest.approx(2 * num_parameters(config), rel=0.002)


def quantized_bytes(config: ModelConfig, bits: int, block_size: int | None) -> int:
    """Of the checkpoint's tensors as a TensorRT engine stores them, one by one, without the rotary tables.

    fp16, but codes with fp16 scales in the projections, and fp32 norms, routers and gates.
    """
    total = 0
    for name, shape in tensor_shapes(config).items():
        elements = math.prod(shape)
        if name.endswith(("norm.weight", "layernorm.weight", "mlp.gate.weight", "shared_expert_gate.weight")):
            total += 4 * elements
        elif name.endswith("_proj.weight"):
            total += elements * bits // 8 + 2 * shape[0] * (shape[1] // (block_size or shape[1]))
        else:
            total += 2 * elements
    return total


@pytest.mark.parametrize(("precision", "bits", "block_size"), [("int8", 8, None), ("fp8", 8, None), ("int4", 4, 128)])
@pytest.mark.parametrize("name", SWEPT)
def test_quantized_weights_for_tensorrt(name: str, precision: str, bits: int, block_size: int | None) -> None:
    config, spec = VARIANTS[name], tensorrt_spec(precision, max_context=CONTEXT)
    rotary = 2 * cache_capacity(CONTEXT, spec.prefill_chunk) * config.head_dim
    assert footprint(config, spec).weight_bytes == quantized_bytes(config, bits, block_size) + rotary


def test_a_quantized_head_is_stored_apart_from_the_embedding() -> None:
    for config in (tiny(hidden_size=256), tiny(hidden_size=256, tie_word_embeddings=True)):
        kept, quantized = (
            footprint(config, tensorrt_spec("int4", tensorrt=TensorRtOptions(quantize_head=flag))).weight_bytes
            for flag in (False, True)
        )
        head = 1000 * 256 // 2 + 2 * 1000 * 2
        assert quantized - kept == head - (0 if config.tie_word_embeddings else 2 * 1000 * 256)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("target", "precision", "own_kernels", "dtype"),
    [
        ("cpu", "int4", True, "float16"),
        ("cpu", "int4", False, "float32"),
        ("cpu", "fp32", True, "float32"),
        ("tensorrt", "fp16", True, "float16"),
    ],
)
def test_cache_is_what_the_runtime_allocates(
    name: str, target: str, precision: str, own_kernels: bool, dtype: str
) -> None:
    """What the graph for own kernels holds, tests/engines/onnxruntime/test_cpu.py compares with a build."""
    config = cut(VARIANTS[name], 2)
    spec = BuildSpec(target=target, precision=precision, max_context=700, max_batch=3)  # type: ignore[arg-type]
    capacity = cache_capacity(700, spec.prefill_chunk)
    shape = ("B", config.num_key_value_heads, capacity, config.head_dim)
    tensors = [IoTensor(f"past_key_values.{i}.{part}", dtype, shape) for i in range(2) for part in ("key", "value")]
    cache = KvCache(tensors, max_batch=3, max_capacity=capacity)
    assert footprint(config, spec, own_kernels=own_kernels).cache_bytes == cache.nbytes


def test_a_fast_prefill_has_the_cache_of_onnxruntimes_kernels() -> None:
    """Its bundles have no graph for own ones."""
    spec = BuildSpec(precision=Precision.INT4, max_context=700, fast_prefill=True)
    without = dataclasses.replace(spec, fast_prefill=False)
    assert footprint(tiny(), spec).cache_bytes == footprint(tiny(), without, own_kernels=False).cache_bytes


@pytest.mark.parametrize("target", [Target.TENSORRT, Target.CPU])
def test_an_int8_cache_is_what_the_runtime_allocates(target: Target) -> None:
    config = cut(VARIANTS[KINDS[1]], 2)
    spec = BuildSpec(target=target, max_context=700, max_batch=3, kv_precision="int8")
    capacity = cache_capacity(700, spec.prefill_chunk)
    shape = ("B", config.num_key_value_heads, capacity, config.head_dim)
    tensors = [
        tensor
        for i in range(2)
        for part in ("key", "value")
        for tensor in (
            IoTensor(f"past_key_values.{i}.{part}", "int8", shape),
            IoTensor(f"past_key_values.{i}.{part}_scale", "float16", shape[:3]),
        )
        if target is Target.TENSORRT or not tensor.name.endswith("_scale")  # the CPU's are weights
    ]
    cache = KvCache(tensors, max_batch=3, max_capacity=capacity)
    assert footprint(config, spec).cache_bytes == cache.nbytes


def tiny(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "model_type": "qwen2",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
    }
    return ModelConfig(**(values | changes))


def tiny_moe(experts: int = 8, chosen: int = 2, shared: int = 0, **changes: Any) -> ModelConfig:
    moe = MoeConfig(experts, chosen, 32, shared, False, frozenset({0, 1}))
    return tiny(model_type="qwen2_moe", moe=moe, **changes)


def test_a_decode_step_reads_the_weights_but_one_row_of_the_embedding_and_the_cache_to_the_context() -> None:
    spec = tensorrt_spec("fp16", max_context=100)
    layer = (4 + 2 + 2) * 16 * 64 + (4 + 2 + 2) * 16 + 64 * 64 + 3 * 64 * 128  # q, k, v, biases, output, MLP
    norms = 4 * 64 * 5
    cache = 2 * 2 * 2 * 16 * 100 * 2
    rows = 2 * 64 + 2 * 16  # of embedding and rotary tables
    weights = 2 * (2 * layer + 1000 * 64) + norms + rows
    assert footprint(tiny(), spec).step_bytes == weights + 3 * cache  # TensorRT's attention copies the window first
    plugin = dataclasses.replace(spec, target=Target.TENSORRT)
    assert plugin.attention == "plugin"
    assert footprint(tiny(), plugin).step_bytes == weights + cache + 2 * 16  # its rotary tables are fp32


def test_a_tied_head_is_read_but_not_stored_again() -> None:
    spec = tensorrt_spec("fp16")
    apart, tied = footprint(tiny(), spec), footprint(tiny(tie_word_embeddings=True), spec)
    assert apart.weight_bytes - tied.weight_bytes == 2 * 1000 * 64
    assert apart.step_bytes == tied.step_bytes


@pytest.mark.parametrize(("batch", "experts_read"), [(1, 2), (2, 4), (3, 6), (4, 8), (64, 8)])
def test_a_decode_step_reads_the_chosen_experts_alone(batch: int, experts_read: int) -> None:
    def read(experts: int, chosen: int, batch: int) -> int:
        spec = tensorrt_spec("fp16", max_batch=batch)
        return footprint(tiny_moe(experts, chosen), spec).step_bytes

    expert = 2 * 3 * 64 * 32
    without = read(8, 2, batch) - 2 * experts_read * expert
    assert without == read(1, 1, batch) - 2 * expert + 2 * 7 * 64 * 4  # whose router is 7 rows smaller


def test_prefill_alone_reads_the_second_form_of_its_projections() -> None:
    slow, fast = (
        footprint(tiny(), BuildSpec(precision=Precision.INT4, max_context=64, fast_prefill=fast), own_kernels=False)
        for fast in (False, True)
    )
    assert fast.weight_bytes > slow.weight_bytes
    assert fast.step_bytes == slow.step_bytes


WORKSPACE = 8_192_000  # of TensorRT-RTX 1.7.1 for matrix products


def test_activations_of_a_model_by_hand() -> None:
    """64 tokens, 4 heads and 2 of keys and values of 16, 256 slots; 2 bytes each."""
    spec = tensorrt_spec("fp16", max_context=192, prefill_chunk=64)
    keys = 2 * 256 * 2 * 16  # of the window, without its values
    always = 4 * 64 * 64 + 4 * 1000 + 2 * 64 * 256 + keys + WORKSPACE  # residual, logits, mask
    assert activation_bytes(tiny(), spec) == always + 2 * 64 * (64 + 3 * 128)
    assert activation_bytes(tiny(intermediate_size=16), spec) == always + 2 * 64 * (64 + 2 * 128 + 64)


def test_more_rows_take_room_in_decode_steps_alone() -> None:
    """Prefill is of one row, whose 64 tokens outweigh a token of each of 2 rows; 64 rows each have a window of 256."""
    one, two, many, most = (
        activation_bytes(tiny(), tensorrt_spec("fp16", max_context=192, prefill_chunk=64, max_batch=rows))
        for rows in (1, 2, 64, 1024)
    )
    assert one == two
    keys = 2 * 256 * 2 * 16
    row = 4 * 64 + 4 * 1000 + 2 * 256 + keys
    assert many == WORKSPACE + 64 * (row + 2 * 1000)  # the head
    # Where keys alone take more than the workspace, attention with its keys and values takes most.
    assert most == 1024 * (row + 2 * (64 + 2 * 128 + 64) + keys)


def test_checking_drafts_takes_room_for_the_logits_of_all_their_tokens() -> None:
    """64 rows of 3 tokens, whose logits are many: the head is the largest phase of such a step."""
    options = {"max_context": 192, "prefill_chunk": 64, "max_batch": 64}
    plain, checking = (
        activation_bytes(tiny(), dataclasses.replace(tensorrt_spec("fp16", **options), speculate=speculate))
        for speculate in (None, 3)
    )
    keys = 2 * 256 * 2 * 16
    assert plain == WORKSPACE + 64 * (4 * 64 + 4 * 1000 + 2 * 256 + keys + 2 * 1000)
    assert checking == WORKSPACE + 64 * (3 * 4 * 64 + 3 * 4 * 1000 + 3 * 2 * 256 + keys + 3 * 2 * 1000)


def test_experts_count_with_all_tokens_where_all_of_them_run() -> None:
    every = tensorrt_spec("fp16", max_context=64, prefill_chunk=64)
    more = activation_bytes(tiny_moe(64), every) - activation_bytes(tiny_moe(32), every)
    assert more == 2 * 64 * 32 * (32 + 64)
    own = BuildSpec(precision="int4", prefill_chunk=64)  # type: ignore[arg-type]
    assert activation_bytes(tiny_moe(16), own) == activation_bytes(tiny_moe(8), own)


def test_plugins_keep_no_mask_no_window_and_run_chosen_experts_alone() -> None:
    """64 tokens of four chosen experts: their inner activations [64 x 4, 32] fp16 and results [64 x 4, 64] fp32."""
    spec = BuildSpec(target=Target.TENSORRT, max_context=192, prefill_chunk=64)
    always = 4 * 64 * 64 + 4 * 1000 + WORKSPACE
    assert activation_bytes(tiny_moe(64, 4), spec) == always + 2 * 64 * (64 + 4 * 32) + 4 * 64 * 4 * 64
    assert activation_bytes(tiny(), spec) == always + 2 * 64 * (64 + 3 * 128)


@pytest.mark.parametrize("config", [tiny(intermediate_size=16), tiny_moe()], ids=["dense", "experts"])
def test_tensorrt_copies_the_window_and_keeps_no_scores(config: ModelConfig) -> None:
    """256 slots more: keys of 2 heads of 16 in fp16, and two bytes of mask for each of 64 tokens."""
    longer, shorter = (
        activation_bytes(config, tensorrt_spec("fp16", max_context=context, prefill_chunk=64))
        for context in (4288, 4032)
    )
    assert longer - shorter == 256 * (2 * 2 * 16 + 2 * 64)


def test_only_the_tokens_that_gather_their_experts_count_with_them() -> None:
    """A step of more runs all experts: MoE-A2.7B gathers those of 5 tokens, 4 each, not of a chunk's 512."""
    config = VARIANTS["qwen1.5-moe-a2.7b"]
    gathered = 2 * 5 * 4 * 3 * 2048 * 1408
    assert gathered < activation_bytes(config, tensorrt_spec("fp16", max_context=512)) < 2 * gathered
    assert activation_bytes(config, tensorrt_spec("fp16", max_context=512, prefill_chunk=1)) < gathered / 4


SPECS = st.sampled_from([spec for spec, _ in FORMS.values()])
CONFIGS = st.sampled_from([tiny(), tiny(tie_word_embeddings=True), tiny_moe(), tiny_moe(shared=48), VARIANTS[KINDS[2]]])


@given(CONFIGS, SPECS, st.integers(1, 4096), st.integers(1, 64), st.integers(1, 4096), st.integers(0, 64))
def test_bytes_never_fall_with_context_or_batch(
    config: ModelConfig, spec: BuildSpec, context: int, batch: int, more_tokens: int, more_rows: int
) -> None:
    small = footprint(config, dataclasses.replace(spec, max_context=context, max_batch=batch))
    large = footprint(config, dataclasses.replace(spec, max_context=context + more_tokens, max_batch=batch + more_rows))
    for field in dataclasses.fields(small):
        assert getattr(small, field.name) <= getattr(large, field.name)
    assert small.step_bytes < large.step_bytes


@given(SPECS, st.integers(1, 40))
def test_bytes_grow_by_the_same_with_every_layer(spec: BuildSpec, layers: int) -> None:
    one, two, three = (footprint(tiny(num_hidden_layers=layers + more), spec) for more in (0, 1, 2))
    for field in ("weight_bytes", "cache_bytes", "step_bytes"):
        assert getattr(two, field) - getattr(one, field) == getattr(three, field) - getattr(two, field) > 0
    assert one.activation_bytes_estimated == three.activation_bytes_estimated


@pytest.mark.parametrize("name", SWEPT)
def test_a_narrower_precision_takes_fewer_bytes(name: str) -> None:
    sizes = [footprint(VARIANTS[name], tensorrt_spec(precision)).weight_bytes for precision in ("fp16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
