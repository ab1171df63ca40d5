"""What each TensorRT flavour takes and refuses, decided without its library."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.engines.spec.targets import Target
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.engines.tensorrt import library as tensorrt_library
from qwen_aot.engines.tensorrt.library import known_capabilities, load, require_capabilities
from qwen_aot.errors import BuildError
from qwen_aot.runtime.bundle.flavours import FLAVOURS
from tests.engines.tensorrt.builder_double import make_module


def spec(target: Target, precision: Precision = Precision.FP16, **options: Any) -> BuildSpec:
    return BuildSpec(target=target, precision=precision, tensorrt=TensorRtOptions(**options))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"timing_cache": Path("t.cache")}, "doesn't take timing_cache: it times no kernels when it builds"),
        ({"hardware_compatible": True}, "doesn't take hardware_compatible: .*--compute-capability"),
        ({"version_compatible": True}, "doesn't take version_compatible: the lean runtime"),
        ({"strip_weights": True}, "doesn't take strip_weights: it compiles refittable engines with a GPU only"),
        ({"compute_capabilities": ("8.6", "8.9")}, "fp8 needs compute capability 8.9 or later, and 8.6 is asked for"),
    ],
)
def test_what_rtx_refuses(option: dict[str, Any], message: str) -> None:
    precision = Precision.FP8 if "compute_capabilities" in option else Precision.FP16
    with pytest.raises(BuildError, match=message):
        spec(Target.TENSORRT_RTX, precision, **option)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4, Precision.BF16])
def test_turing_has_fp16_alone(precision: Precision) -> None:
    spec(Target.TENSORRT_RTX, compute_capabilities=("7.5", "8.0"))
    spec(Target.TENSORRT_RTX, precision, compute_capabilities=("8.0",))
    with pytest.raises(BuildError, match=f"{precision} needs compute capability 8.0 or later, and 7.5 is asked for"):
        spec(Target.TENSORRT_RTX, precision, compute_capabilities=("7.5", "8.0"))


def test_what_tensorrt_refuses() -> None:
    with pytest.raises(BuildError, match="doesn't take compute_capabilities: it builds for the GPU that it runs on"):
        spec(Target.TENSORRT, compute_capabilities=("8.9",))


def test_nothing_to_quantize() -> None:
    with pytest.raises(BuildError, match="quantize_head has nothing to quantize in fp16; it goes with int8, int4, fp8"):
        spec(Target.TENSORRT_RTX, quantize_head=True)


@pytest.mark.parametrize(
    ("precision", "asked", "built"),
    [
        (Precision.FP16, (), ("8.6", "8.9", "12.0")),
        (Precision.FP8, (), ("8.9", "12.0")),
        (Precision.BF16, ("12.0", "8.9"), ("8.9", "12.0")),  # 12.0 is later than 8.9, whatever its text says
    ],
)
def test_the_gpus_that_are_built_for(precision: Precision, asked: tuple[str, ...], built: tuple[str, ...]) -> None:
    assert spec(Target.TENSORRT_RTX, precision, compute_capabilities=asked).compute_capabilities == built


def test_tensorrt_builds_for_its_own_gpu() -> None:
    assert spec(Target.TENSORRT).compute_capabilities == BuildSpec().compute_capabilities == ()


@pytest.mark.parametrize(
    ("target", "precision", "recorded"),
    [
        (Target.TENSORRT_RTX, Precision.FP16, {}),
        (Target.TENSORRT_RTX, Precision.INT8, {"symmetric": True, "quantize_head": False}),
        (Target.TENSORRT, Precision.INT4, {"block_size": 128, "symmetric": True, "quantize_head": False}),
    ],
)
def test_what_the_manifest_records(target: Target, precision: Precision, recorded: dict[str, Any]) -> None:
    assert spec(target, precision).quantization == recorded


def import_as(monkeypatch: pytest.MonkeyPatch, found: ModuleType | Exception) -> None:
    def import_module(name: str) -> ModuleType:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(tensorrt_library, "importlib", SimpleNamespace(import_module=import_module))


@pytest.mark.parametrize("target", list(FLAVOURS))
@pytest.mark.parametrize("error", [ModuleNotFoundError("No module"), OSError("libnvinfer.so.10: cannot open")])
def test_a_library_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, target: str, error: Exception) -> None:
    import_as(monkeypatch, error)
    command = re.escape(f"install it with `{FLAVOURS[target].install}`")
    with pytest.raises(BuildError, match=rf"it can't be loaded \({error}\); {command}"):
        load(FLAVOURS[target])


def test_a_library_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    import_as(monkeypatch, make_module(version="10.2.0"))
    with pytest.raises(BuildError, match=r"needs TensorRT 10.3 or later, and 10.2.0 is installed"):
        load(FLAVOURS["tensorrt"])
    import_as(monkeypatch, module := make_module(version="11.1.0"))
    assert load(FLAVOURS["tensorrt"]) is module


def test_the_gpus_that_a_library_knows() -> None:
    module = make_module()
    module.ComputeCapability = type("ComputeCapability", (), {n: 0 for n in ("CURRENT", "SM120", "SM89", "SM100")})  # type: ignore[attr-defined]
    assert known_capabilities(module) == ("8.9", "10.0", "12.0")
    require_capabilities(module, FLAVOURS["tensorrt-rtx"], ("8.9", "12.0"))
    with pytest.raises(BuildError, match=r"can't build for compute capability 8.6; it can for 8.9, 10.0, 12.0"):
        require_capabilities(module, FLAVOURS["tensorrt-rtx"], ("8.6", "12.0"))
