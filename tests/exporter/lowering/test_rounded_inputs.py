"""W8A8 checkpoints, int8 and E4M3, in their lowerings, against transformers whose linears round what they read.

The reference takes codes and scales from the file that the test wrote, not from our reader.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.checkpoint.storage import storage_of
from qwen_aot.exporter.graph.save import DATA_FILE, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.encodings import encodings_kept, warn_of_rounding
from qwen_aot.exporter.lowering.ort import contrib as ort
from qwen_aot.exporter.lowering.ort.provider import Provider
from qwen_aot.exporter.lowering.tensorrt import plugin, standard
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import stitch
from tests.checkpoints import reference_logits
from tests.exporter.checkpoint.hf.quantized import test_float_quantized
from tests.exporter.checkpoint.hf.quantized.test_int_quantized import UP, save
from tests.exporter.checkpoint.test_formats import load
from tests.exporter.stepper import Stepper
from tests.quantized_files import Saved, load_tensors

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
# Sums in another order move an input across the middle between two codes now and then: one step of one element in 64.
BOUND = 0.02  # of the logits' deviation; inputs that aren't rounded differ by 0.1 and more
Lower = Callable[[Traced], Traced]
LOWERINGS: dict[str, Lower] = {
    "ort": lambda traced: ort.lower(traced, ort.OrtOptions(own_codes=True, accuracy_level=1)),
    "standard": lambda traced: standard.lower(traced, standard.StandardOptions(own_codes=True)),
    "plugin": lambda traced: plugin.lower(traced, plugin.PluginOptions(own_codes=True)),
}
FLOATS = ("standard", "plugin")  # lowerings that multiply E4M3
KINDS: dict[str, Callable[..., Saved]] = {"int8": save, "E4M3": test_float_quantized.save}
EACH = [(kind, lowering) for kind in KINDS for lowering in (LOWERINGS if kind == "int8" else FLOATS)]
traced_once = functools.cache(trace)


def write(folder: Path, out: Path, lower: Lower, dtype: ir.DataType = ir.DataType.FLOAT) -> tuple[Traced, Path]:
    out.mkdir()
    with open_checkpoint(folder) as checkpoint:
        once = traced_once(checkpoint.config, dtype)
        traced = Traced(once.model.clone(), once.config, dict(once.recipes))
        traced.store_as(storage_of(checkpoint))
        lowered = lower(traced)
        stitch(lowered, checkpoint, out / DATA_FILE)
    return lowered, save_graph(lowered, out)


def rounding_model(saved: Saved, *, rounds: bool = True) -> PreTrainedModel:
    stored = load_tensors(saved.safetensors)
    config = AutoConfig.from_pretrained(saved.folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    values = {}
    for name, array in stored.items():
        if array.dtype.itemsize == 1:
            values[name] = array.astype(np.float32) * stored[f"{name}_scale"].astype(np.float32)
        elif not name.endswith("_scale"):
            values[name] = array.astype(np.float32)
    load(model, values)

    def read(scale: float, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (torch.round(inputs[0] / scale).clamp(-128, 127) * scale,)

    def read_as_floats(scale: float, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return ((inputs[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale,)

    for name, module in model.named_modules():
        scale = stored.get(f"{name}.input_scale")
        if scale is not None and rounds:
            hook = read if stored[f"{name}.weight"].dtype == np.int8 else read_as_floats
            module.register_forward_pre_hook(functools.partial(hook, float(scale.reshape(-1)[0])))
    return model


def difference(model: PreTrainedModel, onnx_file: Path) -> float:
    """The largest difference of a logit from transformers', in deviations of the logits."""
    return float(np.abs(_differences(model, onnx_file)).max())


def root_mean_square(model: PreTrainedModel, onnx_file: Path) -> float:
    """Of all logits' differences, in deviations of the logits."""
    return float(np.sqrt(np.square(_differences(model, onnx_file)).mean()))


def _differences(model: PreTrainedModel, onnx_file: Path) -> np.ndarray:
    want = reference_logits(model, [IDS])[0, 5:].numpy()
    stepper = Stepper(onnx_file, rows=1, capacity=len(IDS) + 8)
    got = np.stack([stepper.step([IDS[:6]])[0]] + [stepper.step([[token]])[0] for token in IDS[6:]])
    return np.asarray((got - want) / want.std())


SOME: dict[str, Any] = {"names": ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "down_proj")}  # o stays plain
EXPERTS: dict[str, Any] = {  # of which none is rounded, as `quantize` leaves them; nor is the shared one here
    "names": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "moe": {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 64},
    "hidden": 128,
}


@pytest.mark.parametrize(("kind", "lowering"), EACH)
@pytest.mark.parametrize(
    "facts",
    [{}, {"layers": 2, "kv_heads": 4}, SOME, EXPERTS],
    ids=["all", "two layers", "o plain", "experts plain"],
)
def test_inputs_are_rounded_as_the_checkpoint_says(
    kind: str, lowering: str, facts: dict[str, Any], tmp_path: Path
) -> None:
    saved = KINDS[kind](tmp_path / "checkpoint", **facts)
    lowered, onnx_file = write(saved.folder, tmp_path / "out", LOWERINGS[lowering])
    assert difference(rounding_model(saved), onnx_file) < BOUND
    assert difference(rounding_model(saved, rounds=False), onnx_file) > 2 * BOUND
    name = {"int8": "compressed-tensors-w8a8", "E4M3": "compressed-tensors-w8a8-fp8"}[kind]
    assert encodings_kept(lowered) == {name: len(saved.weights)}
    assert warn_of_rounding(lowered) == ()


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_codes_are_the_files_and_each_input_is_rounded_once(lowering: str, tmp_path: Path) -> None:
    saved = save(tmp_path / "checkpoint")
    _, onnx_file = write(saved.folder, tmp_path / "out", LOWERINGS[lowering])
    graph = onnx.load(onnx_file).graph
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    rows = ("q_proj", "k_proj", "v_proj")
    prefix = "model.layers.0.self_attn."
    want = np.concatenate([saved.weights[f"{prefix}{row}.weight"].codes for row in rows]).astype(np.int16) - 128
    (name,) = [name for name in arrays if "layers.0.self_attn.qkv" in name and name.endswith("_codes")]
    codes = arrays[name].T if lowering == "ort" else arrays[name]
    np.testing.assert_array_equal(codes, want)
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 4  # q|k|v, o, gate|up, down
    if lowering == "ort":
        assert sum(node.op_type == "MatMulIntegerToFloat" for node in graph.node) == 4


@pytest.mark.parametrize("lowering", FLOATS)
def test_codes_of_e4m3_are_the_files_and_each_input_is_rounded_once(lowering: str, tmp_path: Path) -> None:
    saved = test_float_quantized.save(tmp_path / "checkpoint")
    _, onnx_file = write(saved.folder, tmp_path / "out", LOWERINGS[lowering])
    graph = ir.load(onnx_file).graph
    prefix = "model.layers.0.self_attn."
    rows = [saved.weights[f"{prefix}{row}.weight"] for row in ("q_proj", "k_proj", "v_proj")]
    (name,) = [name for name in graph.initializers if "layers.0.self_attn.qkv" in name and name.endswith("_codes")]
    codes = graph.initializers[name].const_value
    assert codes is not None
    assert codes.dtype == ir.DataType.FLOAT8E4M3FN
    np.testing.assert_array_equal(codes.numpy().view(np.uint8), np.concatenate([each.codes for each in rows]))
    scales = graph.initializers[name.replace("_codes", "_scales")].const_value
    assert scales is not None
    np.testing.assert_array_equal(scales.numpy() * 2.0**-14, np.concatenate([each.scales[:, 0] for each in rows]))
    assert sum(node.op_type == "QuantizeLinear" for node in graph) == 4  # q|k|v, o, gate|up, down
    products = {"Linear", "MatMul", "Gemm"}
    for node in graph:
        if node.op_type == "DequantizeLinear":  # no scale but one for all in front of a product
            scale = ir.convenience.get_const_tensor(node.inputs[1])
            assert scale is not None
            assert scale.numpy().shape == ()
            assert {use.node.op_type for use in node.outputs[0].uses()} <= products | {"Transpose"}


@pytest.mark.parametrize("kind", KINDS)
def test_scales_that_differ_within_a_stack_make_products_of_their_own(kind: str, tmp_path: Path) -> None:
    saved = KINDS[kind](tmp_path / "checkpoint")
    saved.change(**{f"{UP}.input_scale": np.array([0.125], np.float16)})
    for lowering in LOWERINGS if kind == "int8" else FLOATS:
        _, onnx_file = write(saved.folder, tmp_path / lowering, LOWERINGS[lowering])
        assert difference(rounding_model(saved), onnx_file) < BOUND, lowering


@pytest.mark.parametrize(("kind", "lowering"), [("int8", "ort"), ("E4M3", "standard")])
def test_one_changed_scale_is_seen(kind: str, lowering: str, tmp_path: Path) -> None:
    saved = KINDS[kind](tmp_path / "checkpoint")
    _, onnx_file = write(saved.folder, tmp_path / "out", LOWERINGS[lowering])
    # Floats are as fine at any scale, so that only one that cuts inputs off, at 0.9, changes much.
    scale = {"int8": 0.25, "E4M3": 0.002}[kind]
    saved.change(**{"model.layers.0.self_attn.o_proj.input_scale": np.array([scale], np.float16)})
    assert difference(rounding_model(saved), onnx_file) > BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_in_fp16_the_numbers_are_the_same(kind: str, tmp_path: Path) -> None:
    saved = KINDS[kind](tmp_path / "checkpoint")
    _, onnx_file = write(saved.folder, tmp_path / "out", LOWERINGS["standard"], ir.DataType.FLOAT16)
    # Activations of 11 bits cross more middles between two codes; those of E4M3 lie up to an eighth apart.
    if kind == "int8":
        assert difference(rounding_model(saved), onnx_file) < 0.1
    rounded, plain = (root_mean_square(rounding_model(saved, rounds=rounds), onnx_file) for rounds in (True, False))
    assert rounded < plain / 2


@pytest.mark.parametrize("kind", KINDS)
def test_in_fp16_each_product_is_that_of_its_rounded_input(kind: str, tmp_path: Path) -> None:
    """Of the very input that a product reads, so that its codes are the same and fp16's digits alone differ."""
    saved = KINDS[kind](tmp_path / "checkpoint")
    _, onnx_file = write(saved.folder, tmp_path / "out", LOWERINGS["standard"], ir.DataType.FLOAT16)
    stored = {name: each.const_value for name, each in ir.load(onnx_file).graph.initializers.items()}
    model = onnx.load(onnx_file, load_external_data=False)
    by_name = {node.name: node for node in model.graph.node}
    products = [name.removesuffix("_scaled") for name in by_name if name.endswith("_scaled")]
    assert len(products) == 4  # q|k|v, o, gate|up, down
    ends = [(by_name[f"{name}_input_codes"].input[0], by_name[f"{name}_scaled"]) for name in products]
    for read, node in ends:
        for name in {read, node.output[0]} - {each.name for each in model.graph.output}:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, None))
    shown = onnx_file.with_name("shown.onnx")
    shown.write_bytes(model.SerializeToString())

    def value(name: str) -> np.ndarray:
        return Stepper(shown, rows=1, capacity=len(IDS) + 8)._step([IDS], 0, 1, name).astype(np.float32)

    files = load_tensors(saved.safetensors)
    for read, node in ends:
        scales, codes = stored[node.input[1]], stored[node.input[1].replace("_scales", "_codes")]
        assert scales is not None and codes is not None
        unit = {"int8": 2.0**-12, "E4M3": 2.0**-14}[kind]
        weight = codes.numpy().astype(np.float64) * scales.numpy().astype(np.float64)[:, None] * unit
        module = {"qkv_proj": "q_proj", "gate_up_proj": "up_proj"}
        part = node.input[1].removesuffix(".weight_scales")
        for stacked, own in module.items():
            part = part.replace(stacked, own)
        x, scale = value(read), float(files[f"{part}.input_scale"].reshape(-1)[0])
        if kind == "int8":
            rounded = np.clip(np.rint(x / scale), -128, 127) * scale
        else:
            rounded = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
        found = value(node.output[0])
        want, plain = (each.astype(np.float64) @ weight.T for each in (rounded, x))
        # The product and what it is by its row's scale are rounded to 11 bits each; near 0 by half of 2^-24 times that.
        bound = 2.0**-10 * np.abs(want) + 2.0**-18
        assert (np.abs(found - want) <= bound).all(), part
        assert (np.abs(found - plain) > bound).mean() > 0.5, part


@pytest.mark.parametrize(("kind", "lowering"), EACH)
def test_scales_of_0(kind: str, lowering: str, tmp_path: Path) -> None:
    """TensorRT takes scales above 0 alone: 0 becomes a smallest number, also of bfloat16's, with codes of 0."""
    saved = KINDS[kind](tmp_path / "checkpoint")
    name = "model.layers.0.self_attn.o_proj.weight_scale"
    scales = load_tensors(saved.safetensors)[name].copy()
    scales[3] = 0
    saved.change(**{name: scales})
    _, onnx_file = write(saved.folder, tmp_path / "out", LOWERINGS[lowering])
    assert difference(rounding_model(saved), onnx_file) < BOUND
    if lowering != "ort":
        initializers = ir.load(onnx_file).graph.initializers
        stored = {part: initializers[name.replace("_scale", part)].const_value for part in ("_codes", "_scales")}
        assert stored["_codes"] is not None and stored["_scales"] is not None
        assert not stored["_codes"].numpy()[3].astype(np.float32).any()
        assert (stored["_scales"].numpy() > 0).all()


def test_scales_below_0(tmp_path: Path) -> None:
    """Of E4M3 the reader refuses them (test_float_quantized)."""
    saved = save(tmp_path / "checkpoint")
    name = "model.layers.0.self_attn.o_proj.weight_scale"
    scales = load_tensors(saved.safetensors)[name].copy()
    scales[5] *= -1
    saved.change(**{name: scales})
    _, onnx_file = write(saved.folder, tmp_path / "negative", LOWERINGS["ort"])
    assert difference(rounding_model(saved), onnx_file) < BOUND
    with pytest.raises(ExportError, match=r"o_proj\.weight, row 5: a scale of -\S+ is negative"):
        write(saved.folder, tmp_path / "refused", LOWERINGS["standard"])


def test_what_is_refused(tmp_path: Path) -> None:
    saved = save(tmp_path / "checkpoint")
    on_cuda = ort.OrtOptions(own_codes=True, accuracy_level=1, provider=Provider.CUDA)
    with pytest.raises(ExportError, match=r"rounded inputs \(W8A8\), for which ONNX Runtime has no kernel on cuda"):
        write(saved.folder, tmp_path / "cuda", lambda traced: ort.lower(traced, on_cuda))
    saved.change(**{f"{UP}.input_scale": np.array([0.1], np.float32)})
    with pytest.raises(ExportError, match=r"the scale of what .* reads is 0\.1.*, which float16 doesn't hold"):
        write(saved.folder, tmp_path / "half", LOWERINGS["standard"], ir.DataType.FLOAT16)
    asymmetric = save(tmp_path / "asymmetric", symmetric=False)
    with pytest.raises(ExportError, match="has rounded inputs, and codes of 8 bits with zero points; accepted"):
        write(asymmetric.folder, tmp_path / "zeros", LOWERINGS["ort"])


def test_what_is_refused_of_e4m3(tmp_path: Path) -> None:
    saved = test_float_quantized.save(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match=r"both are E4M3 floats, of which this target has no products; accepted: tar"):
        write(saved.folder, tmp_path / "ort", LOWERINGS["ort"])
    wide = test_float_quantized.save(tmp_path / "wide", scale_dtype=np.float32)
    with pytest.raises(
        ExportError, match=r"float32 scales, which float16 doesn't hold; .*; or --precision fp32 or fp16"
    ):
        write(wide.folder, tmp_path / "half", LOWERINGS["standard"], ir.DataType.FLOAT16)
    _, onnx_file = write(wide.folder, tmp_path / "float", LOWERINGS["standard"])
    assert difference(rounding_model(wide), onnx_file) < BOUND
    saved.change(**{f"{UP}.input_scale": np.array([0.1], np.float32)})
    with pytest.raises(
        ExportError, match=r"reads is 0\.1.*, which float16 doesn't hold; .*; or --precision fp32 or fp16"
    ):
        write(saved.folder, tmp_path / "input", LOWERINGS["standard"], ir.DataType.FLOAT16)
    scales = load_tensors(saved.safetensors)[f"{UP}.weight_scale"].copy()
    scales[3] = 5  # 4 is 65536 times 2^-14
    saved.change(**{f"{UP}.weight_scale": scales, f"{UP}.input_scale": np.array([0.125], np.float16)})
    message = r"up_proj\.weight, row 3: a scale of 5 is no float16 number times 6.10352e-05, .*; or --precision"
    with pytest.raises(ExportError, match=message):
        write(saved.folder, tmp_path / "large", LOWERINGS["standard"], ir.DataType.FLOAT16)


@pytest.mark.parametrize(("one_scale", "scale_dtype"), [(True, np.float16), (False, ml_dtypes.bfloat16)])
def test_one_scale_for_all_rows_and_scales_of_bfloat16(one_scale: bool, scale_dtype: Any, tmp_path: Path) -> None:
    saved = test_float_quantized.save(tmp_path / "checkpoint", one_scale=one_scale, scale_dtype=scale_dtype)
    _, onnx_file = write(saved.folder, tmp_path / "out", LOWERINGS["standard"])
    assert difference(rounding_model(saved), onnx_file) < BOUND
    _, halves = write(saved.folder, tmp_path / "half", LOWERINGS["standard"], ir.DataType.FLOAT16)
    scales = ir.load(halves).graph.initializers["model.layers.0.mlp.down_proj.weight_scales"].const_value
    assert scales is not None
    want = saved.weights["model.layers.0.mlp.down_proj.weight"].scales[:, 0].astype(np.float32)
    np.testing.assert_array_equal(scales.numpy() * np.float32(2.0**-14), want)


@pytest.mark.parametrize("scale", [1e-12, 3e-10], ids=["below all scales", "between two"])
def test_a_row_of_next_to_nothing_is_no_reason_to_refuse(scale: float, tmp_path: Path) -> None:
    """Scales of bfloat16 reach further down than those of float16 times 2^-14; such weights are 0 in float16."""
    saved = test_float_quantized.save(tmp_path / "checkpoint", scale_dtype=ml_dtypes.bfloat16)
    name = "model.layers.0.self_attn.o_proj.weight"
    scales = load_tensors(saved.safetensors)[f"{name}_scale"].copy()
    scales[3] = scale
    saved.change(**{f"{name}_scale": scales})
    _, onnx_file = write(saved.folder, tmp_path / "out", LOWERINGS["standard"], ir.DataType.FLOAT16)
    initializers = ir.load(onnx_file).graph.initializers
    stored = {part: initializers[f"{name}_{part}"].const_value for part in ("codes", "scales")}
    assert stored["codes"] is not None and stored["scales"] is not None
    values = stored["codes"].numpy().astype(np.float32) * stored["scales"].numpy().astype(np.float32)[:, None]
    want = saved.weights[name].codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    want *= scales.astype(np.float32)
    assert np.abs(values * np.float32(2.0**-14) - want).max() < 2.0**-25
    np.testing.assert_array_equal((values * np.float32(2.0**-14))[4:], want[4:])


@pytest.mark.parametrize(("kind", "lowering"), EACH)
def test_experts_are_refused(kind: str, lowering: str, tmp_path: Path) -> None:
    moe = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 64}
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    saved = KINDS[kind](tmp_path / "checkpoint", moe=moe, names=names, hidden=128)
    with pytest.raises(ExportError, match=r"expert.*(whose inputs are rounded too|compressed-tensors-w8a8)"):
        write(saved.folder, tmp_path / "out", LOWERINGS[lowering])
