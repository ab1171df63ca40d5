"""Real Polygraphy, in a process of its own, over doubles of both TensorRT flavours and of the CUDA runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.engines.verify.compare_engine import compare_in_process
from qwen_aot.errors import BuildError, EngineMismatchError
from tests.checkpoints import save_tiny
from tests.doubles import polygraphy_tensorrt
from tests.doubles.bundles import export_tensorrt_bundle, write_tensorrt_bundle
from tests.runtime.toys import ALL_INPUTS, checksum_model, io_tables, make_manifest
from tests.vl_checkpoints import SeeingModel

pytestmark = pytest.mark.tools

LAYERS, CONTEXT, CHUNK = 2, 200, 32
IDS = np.random.default_rng(0).integers(0, 131, CHUNK).tolist()
OUTPUTS = {"logits", *(f"present.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value"))}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 reference, and fp16 engines of the same checkpoint and of another one."""
    folder = tmp_path_factory.mktemp("compare")
    for name, seed in (("one", 0), ("other", 1)):
        save_tiny(folder / name, heads=4, kv_heads=2, layers=LAYERS, seed=seed)
    build_bundle(folder / "one", BuildSpec(precision=Precision.FP32, max_context=CONTEXT), folder / "reference")
    for name, flavour in (("one", "tensorrt_rtx"), ("one", "tensorrt"), ("other", "tensorrt_rtx")):
        export_tensorrt_bundle(
            folder / name,
            folder / f"{name}-{flavour}",
            flavour,
            dtype=ir.DataType.FLOAT16,
            max_context=CONTEXT,
            prefill_chunk=CHUNK,
        )
    return folder


@pytest.fixture(autouse=True)
def _doubles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polygraphy_tensorrt.install(tmp_path / "doubles", monkeypatch)


def compare(bundles: Path, engine: str, bound_db: float = 30.0) -> Mapping[str, Any]:
    return compare_in_process(bundles / engine, bundles / "reference", IDS, bound_db)


@pytest.mark.parametrize("flavour", ["tensorrt_rtx", "tensorrt"])
def test_logits_and_caches_agree_and_the_flavours_own_library_ran(bundles: Path, flavour: str) -> None:
    found = compare(bundles, f"one-{flavour}")
    assert found["library"] == flavour
    assert found["failed"] == []
    ratios = {output["name"]: output["snr_db"] for output in found["outputs"]}
    assert ratios.keys() == OUTPUTS
    assert all(40 < ratio < 100 for ratio in ratios.values()), ratios  # rounded to fp16, so not the reference itself
    assert found["tokens"] == CHUNK


def test_a_decoder_that_takes_images_is_compared_over_a_text(seeing: tuple[SeeingModel, Path], tmp_path: Path) -> None:
    engine = export_tensorrt_bundle(
        seeing[0].folder,
        tmp_path / "engine",
        "tensorrt_rtx",
        dtype=ir.DataType.FLOAT16,
        max_context=CONTEXT,
        prefill_chunk=CHUNK,
    )
    found = compare_in_process(engine, seeing[1], IDS, 30.0)
    assert found["failed"] == [] and {output["name"] for output in found["outputs"]} == OUTPUTS


def test_every_output_under_the_bound_is_named(bundles: Path) -> None:
    assert set(compare(bundles, "other-tensorrt_rtx")["failed"]) == OUTPUTS
    assert set(compare(bundles, "one-tensorrt_rtx", bound_db=120.0)["failed"]) == OUTPUTS


def test_a_step_outside_the_prefill_profile_is_an_error_with_polygraphys_words(bundles: Path) -> None:
    with pytest.raises(BuildError, match=r"(?s)exited with 1: .*input_ids, failed to set shape to: \(1, 33\)"):
        compare_in_process(bundles / "one-tensorrt", bundles / "reference", [*IDS, 1], 30.0)


def test_a_missing_cuda_runtime_is_named(bundles: Path, tmp_path: Path) -> None:
    (tmp_path / "doubles" / "libcudart.so.13").unlink()
    (tmp_path / "doubles" / "cuda").mkdir()
    (tmp_path / "doubles" / "cuda" / "__init__.py").write_text("")
    (tmp_path / "doubles" / "cuda" / "pathfinder.py").write_text(
        "class DynamicLibNotFoundError(Exception): pass\n"
        "def load_nvidia_dynamic_lib(name): raise DynamicLibNotFoundError(name)\n"
    )
    with pytest.raises(
        EngineMismatchError, match=r"^Polygraphy needs the CUDA runtime library .* `pip install nvidia-cuda-runtime`"
    ):
        compare(bundles, "one-tensorrt_rtx")


def test_an_engine_with_plugins_is_refused_before_anything_starts(bundles: Path, tmp_path: Path) -> None:
    inputs, outputs = io_tables(ALL_INPUTS, "float32", capacity=1024)
    manifest = make_manifest(inputs=inputs, outputs=outputs)
    engine = write_tensorrt_bundle(tmp_path / "b", checksum_model(inputs, outputs), manifest, "tensorrt", plugins=True)
    with pytest.raises(EngineMismatchError, match=r"plugins QwenGQA.*--attention native --moe native"):
        compare_in_process(engine, bundles / "reference", IDS, 30.0)
