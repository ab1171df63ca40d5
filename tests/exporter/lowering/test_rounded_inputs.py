"""W8A8 checkpoints in both lowerings, against transformers whose linears round what they read by the definition.

The reference takes codes and scales from the file that the test wrote, not from our reader.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file
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
from tests.exporter.checkpoint.hf.quantized.test_int_quantized import UP, save
from tests.exporter.stepper import Stepper
from tests.quantized_files import Saved

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
# Sums in another order move an input across the middle between two codes now and then: one step of one element in 64.
BOUND = 0.02  # of the logits' deviation; inputs that aren't rounded differ by 0.1 and more
Lower = Callable[[Traced], Traced]
LOWERINGS: dict[str, Lower] = {
    "ort": lambda traced: ort.lower(traced, ort.OrtOptions(own_codes=True, accuracy_level=1)),
    "standard": lambda traced: standard.lower(traced, standard.StandardOptions(own_codes=True)),
    "plugin": lambda traced: plugin.lower(traced, plugin.PluginOptions(own_codes=True)),
}
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
    stored = load_file(saved.folder / "model.safetensors")
    config = AutoConfig.from_pretrained(saved.folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {}
    for name, array in stored.items():
        if array.dtype == np.int8:
            state[name] = torch.from_numpy(array.astype(np.float32)) * torch.from_numpy(
                stored[f"{name}_scale"].astype(np.float32)
            )
        elif not name.endswith(("_scale",)):
            state[name] = torch.from_numpy(array.astype(np.float32))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()

    def read(scale: float, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (torch.round(inputs[0] / scale).clamp(-128, 127) * scale,)

    for name, module in model.named_modules():
        scale = stored.get(f"{name}.input_scale")
        if scale is not None and rounds:
            module.register_forward_pre_hook(functools.partial(read, float(scale.reshape(-1)[0])))
    return model


def difference(model: PreTrainedModel, onnx_file: Path) -> float:
    """The largest difference of a logit from transformers', in deviations of the logits."""
    want = reference_logits(model, [IDS])[0, 5:].numpy()
    stepper = Stepper(onnx_file, rows=1, capacity=len(IDS) + 8)
    got = np.stack([stepper.step([IDS[:6]])[0]] + [stepper.step([[token]])[0] for token in IDS[6:]])
    return float(np.abs(got - want).max() / want.std())


SOME: dict[str, Any] = {"names": ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "down_proj")}  # o stays plain


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("facts", [{}, {"layers": 2, "kv_heads": 4}, SOME], ids=["all", "two layers", "o plain"])
def test_inputs_are_rounded_as_the_checkpoint_says(lowering: str, facts: dict[str, Any], tmp_path: Path) -> None:
    saved = save(tmp_path / "checkpoint", **facts)
    lowered, onnx_file = write(saved.folder, tmp_path / "out", LOWERINGS[lowering])
    assert difference(rounding_model(saved), onnx_file) < BOUND
    assert difference(rounding_model(saved, rounds=False), onnx_file) > 2 * BOUND
    assert encodings_kept(lowered) == {"compressed-tensors-w8a8": len(saved.weights)}
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


def test_scales_that_differ_within_a_stack_make_products_of_their_own(tmp_path: Path) -> None:
    saved = save(tmp_path / "checkpoint")
    saved.change(**{f"{UP}.input_scale": np.array([0.125], np.float16)})
    for lowering, lower in LOWERINGS.items():
        _, onnx_file = write(saved.folder, tmp_path / lowering, lower)
        assert difference(rounding_model(saved), onnx_file) < BOUND, lowering


def test_one_changed_scale_is_seen(tmp_path: Path) -> None:
    saved = save(tmp_path / "checkpoint")
    _, onnx_file = write(saved.folder, tmp_path / "out", LOWERINGS["ort"])
    saved.change(**{"model.layers.0.self_attn.o_proj.input_scale": np.array([0.25], np.float16)})
    assert difference(rounding_model(saved), onnx_file) > BOUND


def test_in_fp16_the_numbers_are_the_same(tmp_path: Path) -> None:
    saved = save(tmp_path / "checkpoint")
    _, onnx_file = write(saved.folder, tmp_path / "out", LOWERINGS["standard"], ir.DataType.FLOAT16)
    assert difference(rounding_model(saved), onnx_file) < 0.1  # activations of 11 bits cross more middles


def test_scales_of_0_and_below(tmp_path: Path) -> None:
    """TensorRT takes scales above 0 alone: 0 becomes the smallest there is, with codes of 0."""
    saved = save(tmp_path / "checkpoint")
    name = "model.layers.0.self_attn.o_proj.weight_scale"
    scales = load_file(saved.folder / "model.safetensors")[name].copy()
    scales[3] = 0
    saved.change(**{name: scales})
    for lowering, lower in LOWERINGS.items():
        _, onnx_file = write(saved.folder, tmp_path / lowering, lower)
        assert difference(rounding_model(saved), onnx_file) < BOUND, lowering
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


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_experts_are_refused(lowering: str, tmp_path: Path) -> None:
    moe = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 64}
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    saved = save(tmp_path / "checkpoint", moe=moe, names=names, hidden=128)
    with pytest.raises(ExportError, match=r"expert.*(whose inputs are rounded too|compressed-tensors-w8a8)"):
        write(saved.folder, tmp_path / "out", LOWERINGS[lowering])
