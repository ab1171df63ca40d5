"""Bundles with two engines: their manifest, sizes, weights by bytes, and what TensorRT-RTX compiles of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qwen_aot.engines.build import build_bundle, plan_build
from qwen_aot.engines.planner.activations import vision_activation_bytes
from qwen_aot.engines.planner.footprint import footprint, vision_weight_bytes
from qwen_aot.engines.planner.plans import plan
from qwen_aot.engines.spec.build_spec import IMAGES_OF_RUN, BuildSpec
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.engines.verify.weights import check_weights
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.model.variants import variant_config
from qwen_aot.exporter.model.vision import VisionConfig
from qwen_aot.runtime.bundle.load import load_bundle
from tests.bundle_copies import changed, data_tensors
from tests.vision_reference import Sizes
from tests.vl_checkpoints import SeeingModel

Seeing = tuple[SeeingModel, Path]


def rtx_spec(precision: str, **options: object) -> BuildSpec:
    return BuildSpec(
        target="tensorrt-rtx",  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        max_context=512,
        max_batch=2,
        prefill_chunk=128,
        tensorrt=TensorRtOptions(compute_capabilities=("8.9",), attention="native"),
        **options,  # type: ignore[arg-type]
    )


def test_the_manifest_has_both(seeing: Seeing) -> None:
    manifest = load_bundle(seeing[1]).manifest
    vision, text = manifest.engines.vision, manifest.engines.text
    assert vision is not None and (vision.file, vision.precision, vision.max_batch) == ("vision.onnx", "fp32", 4)
    assert {"model.onnx", "model.onnx.data", "vision.onnx", "vision.onnx.data"} <= manifest.files.keys()
    assert [tensor.name for tensor in vision.inputs] == ["pixels"] and vision.plan is None
    assert {"image_embeddings", "image_positions"} <= {tensor.name for tensor in text.inputs}
    assert vision.weight_hashes is not None and all(name.startswith("vision.") for name in vision.weight_hashes)
    weights = sum(math.prod(array.shape) for array in seeing[0].weights.values())
    tower = sum(parameter.numel() for parameter in seeing[0].tower.parameters())
    assert manifest.model.num_parameters == weights + tower


def test_weights_are_compared_by_bytes(seeing: Seeing, tmp_path: Path) -> None:
    with open_checkpoint(seeing[0].folder) as checkpoint:
        manifest = load_bundle(seeing[1]).manifest
        whole = check_weights(seeing[1], manifest, checkpoint)
        assert whole.verdict is Verdict.PASSED and whole.compared == "bytes"

        def flip(values: np.ndarray) -> None:
            values.view(np.uint8)[0] ^= 1

        name = "vision.layers.1.qkv_proj.bias"
        damaged = changed(seeing[1], tmp_path / "damaged", name, flip, "vision.onnx")
        found = check_weights(damaged, manifest, checkpoint)
    assert found.verdict is Verdict.FAILED and found.differing == ("vision.layers.1.qkv_proj.bias",)
    assert found.tensors == whole.tensors > len(data_tensors(seeing[1]))


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_sizes_of_a_cpu_bundle(seeing: Seeing, precision: str, tmp_path: Path) -> None:
    spec = BuildSpec(precision=precision, max_context=512)  # type: ignore[arg-type]
    with open_checkpoint(seeing[0].folder) as checkpoint:
        planned = plan_build(checkpoint, spec, tmp_path / "bundle")
        assert planned.vision is not None
        outputs = [o for recipe in planned.vision.lowered.recipes.values() for o in recipe.outputs]
        assert checkpoint.config.vision is not None
        exact = vision_weight_bytes(checkpoint.config.vision, spec)
        assert exact == sum(output.nbytes for output in outputs)
        blind = dataclasses.replace(checkpoint.config, vision=None)
        both, alone = footprint(checkpoint.config, spec), footprint(blind, spec)
    assert both.weight_bytes - alone.weight_bytes == exact and both.step_bytes == alone.step_bytes
    assert both.activation_bytes_estimated > alone.activation_bytes_estimated
    assert planned.estimate.bundle_bytes > exact + alone.weight_bytes * 0.9


@pytest.mark.parametrize(
    "precision", ["fp16", pytest.param("bf16", marks=pytest.mark.deep), pytest.param("int8", marks=pytest.mark.deep)]
)
def test_tensorrt_rtx_compiles_both(seeing: Seeing, precision: str, tmp_path: Path) -> None:
    report = build_bundle(seeing[0].folder, rtx_spec(precision, speculate=3), tmp_path / "bundle")
    manifest, stages = report.manifest, [cost.stage for cost in report.stages]
    vision = manifest.engines.vision
    assert vision is not None and vision.file == "vision.rtx" and vision.tensorrt is not None
    assert vision.precision == ("bf16" if precision == "bf16" else "fp16")  # the tower isn't quantized
    assert stages[3:6] == ["compile", "write vision", "compile vision"]
    assert sorted(name for name in manifest.files if name.endswith((".rtx", ".onnx", ".data"))) == [
        "engine.rtx",
        "vision.rtx",
    ]
    assert vision.tensorrt.cache_bytes == 0 and vision.tensorrt.weight_bytes == sum(
        output.nbytes for output in _outputs(seeing, precision)
    )
    assert vision.plan is not None and len(vision.plan["encode"].layer_kernels) == 2
    products, narrow = vision.plan["encode"].matrix_products, "bfloat16" if precision == "bf16" else "float16"
    assert {product.left for product in products} == {narrow, "float32"}
    assert [product.name for product in products if product.left == "float32"] == ["vision.resampler.kv_proj.weight"]
    with open_checkpoint(seeing[0].folder) as checkpoint:
        assert check_weights(report.out, manifest, checkpoint).verdict is Verdict.PASSED


def _outputs(seeing: Seeing, precision: str) -> list[object]:
    from qwen_aot.exporter.weights.vision_recipes import vision_recipes

    dtype = ir.DataType.BFLOAT16 if precision == "bf16" else ir.DataType.FLOAT16
    config = VisionConfig(**seeing[0].config["visual"])
    return [output for recipe in vision_recipes(config, dtype).values() for output in recipe.outputs]


def test_activations_beside_what_the_builder_said() -> None:
    """Of the published widths and two layers, which TensorRT-RTX 1.7.1 was asked; docs/planner.md."""
    config = VisionConfig(**dataclasses.asdict(Sizes()))
    assert IMAGES_OF_RUN == 4
    assert 1.0 < vision_activation_bytes(config, rtx_spec("fp16")) / 222_101_504 < 1.1


def test_a_target_that_builds_none(seeing: Seeing, tmp_path: Path) -> None:
    spec = BuildSpec(target="cuda", precision="fp16", max_context=512)  # type: ignore[arg-type]
    message = r"target cuda builds no model that takes images; accepted: cpu, tensorrt-rtx, tensorrt"
    with pytest.raises(BuildError, match=message):
        build_bundle(seeing[0].folder, spec, tmp_path / "bundle")
    planned = plan("qwen-vl", variant_config("qwen-vl"), spec, "rtx-4090")
    assert planned.refusal == "target cuda builds no model that takes images"
