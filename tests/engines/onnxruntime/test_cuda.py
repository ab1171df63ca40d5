"""Bundles for target cuda: built without a GPU, and run here by the CPU provider with the cache behind CudaMemory."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.errors import EngineMismatchError, ExportError
from qwen_aot.runtime.backends.open import open_engine
from qwen_aot.runtime.backends.ort.devices import DEVICES, Device
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine, OrtOptions, open_session
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.bundle.manifest import CACHE_PREFIX
from tests.checkpoints import reference_logits, save_tiny
from tests.runtime.fake_cuda import HostedCudaMemory

CONTEXT = 400
# Of logits with std 1. fp16: activations of 11 bits, seen 5e-3. fp32: sums in another order.
BOUNDS = {"fp16": 2e-2, "fp32": 1e-3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("cuda") / "tiny"
    return path, save_tiny(path, heads=6, kv_heads=2, hidden=96)


@pytest.fixture(scope="module", params=list(BOUNDS))
def built(request: pytest.FixtureRequest, checkpoint: tuple[Path, Any]) -> tuple[Path, str]:
    out = checkpoint[0].parent / str(request.param)
    spec = BuildSpec(target="cuda", precision=request.param, max_context=CONTEXT, max_batch=3, prefill_chunk=16)  # type: ignore[arg-type]
    build_bundle(checkpoint[0], spec, out)
    return out, str(request.param)


class CopyingBinding:
    """Takes inputs as ONNX Runtime does for a GPU: a host input is copied as it is bound, behind a synchronization."""

    def __init__(self, binding: Any) -> None:
        self._binding = binding
        self._copies: dict[str, np.ndarray[Any, Any]] = {}
        self.is_synchronized = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._binding, name)

    def bind_input(self, name: str, device: str, number: int, kind: Any, shape: list[int], address: int) -> None:
        if not name.startswith(CACHE_PREFIX):
            content = ctypes.string_at(address, math.prod(shape) * 8)
            self._copies[name] = np.frombuffer(content, np.int64).copy()
            address = self._copies[name].ctypes.data
            self.is_synchronized = False
        self._binding.bind_input(name, device, number, kind, shape, address)

    def synchronize_inputs(self) -> None:
        self.is_synchronized = True


class CopyingSession:
    """The CPU's session, whose bindings copy."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def io_binding(self) -> CopyingBinding:
        return CopyingBinding(self._session.io_binding())

    def run_with_iobinding(self, binding: CopyingBinding) -> None:
        assert binding.is_synchronized, "a kernel may run before an input is copied"
        self._session.run_with_iobinding(binding._binding)


@dataclasses.dataclass(frozen=True)
class HostedDevice(Device):
    """A GPU that is the CPU: what the session and the memory behind it are."""

    @property
    def is_gpu(self) -> bool:
        return True


def open_on_cpu(bundle: Path) -> OnnxRuntimeEngine:
    """As on a GPU, but for the provider and whose memory the addresses are of."""
    cpu = DEVICES["cpu"]
    device = HostedDevice(cpu.provider, HostedCudaMemory, cpu.minimum_version, cpu.extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "qwen_aot.runtime.backends.ort.engine.open_session",
            lambda path, options, _, *library: CopyingSession(open_session(path, options, cpu, *library)),
        )
        return OnnxRuntimeEngine(load_bundle(bundle), OrtOptions(threads=1), device)


def test_the_manifest_tells_what_runs_it(built: tuple[Path, str]) -> None:
    bundle, precision = built
    manifest = load_bundle(bundle).manifest
    assert (manifest.target, manifest.engines.text.precision, manifest.engines.text.file) == (
        "cuda",
        precision,
        "model.onnx",
    )
    assert manifest.engines.text.cache_dtype == {"fp16": "float16", "fp32": "float32"}[precision]
    assert {tensor.shape[2] for tensor in manifest.engines.text.inputs if tensor.name.startswith("past")} == {"C"}


def test_it_does_not_open_where_onnxruntime_has_no_cuda(built: tuple[Path, str]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(EngineMismatchError, match="has no CUDAExecutionProvider"):
        open_engine(load_bundle(built[0]))


def test_rows_of_unequal_length_with_idle_ones_and_growth_equal_transformers(
    built: tuple[Path, str], checkpoint: tuple[Path, Any]
) -> None:
    """Prompts in chunks, rows that stand idle beside others, and a row that outgrows the first capacity."""
    bundle, precision = built
    model, rng = checkpoint[1], np.random.default_rng(0)
    rows = [rng.integers(0, 131, n).tolist() for n in (253, 5, 40)]
    with open_on_cpu(bundle) as engine:
        for row, tokens in enumerate(rows):
            engine.prefill(row, np.array(tokens))
        for step in range(8):
            new = rng.integers(0, 131, 3)
            new[step % 3] = -1  # each row stands idle in turn
            logits = engine.decode(0, new).copy()
            for row in np.flatnonzero(new >= 0):
                rows[row].append(int(new[row]))
                want = reference_logits(model, [rows[row]])[0, -1].numpy()
                np.testing.assert_allclose(logits[row], want, atol=BOUNDS[precision], rtol=0)
        assert engine.cache.capacity > 256
        memory = engine.cache.memory
    assert isinstance(memory, HostedCudaMemory)
    assert memory.fake.allocations == 0


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_experts_are_refused_before_anything_is_written(precision: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "moe", moe={})
    with pytest.raises(ExportError, match=r"quantized experts don't exist for cuda.*store this model in fp16"):
        build_bundle(tmp_path / "moe", BuildSpec(target="cuda", precision=precision), tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_device_is_the_cpu_or_a_gpu() -> None:
    assert not DEVICES["cpu"].is_gpu and DEVICES["cuda"].is_gpu
    assert DEVICES["cpu"].providers == [("CPUExecutionProvider", {})]
    assert [name for name, _ in DEVICES["cuda"].providers] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
