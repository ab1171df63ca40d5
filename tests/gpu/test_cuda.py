"""Target cuda on a GPU: against transformers, against the CPU provider, and what lies where."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.extras import install_command
from qwen_aot.runtime.backends.cuda.memory import CudaMemory
from qwen_aot.runtime.backends.ort.devices import DEVICES
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.bundle.manifest import CAPACITY_STEP, IoTensor
from qwen_aot.runtime.engine.kv_cache import KvCache
from tests.checkpoints import reference_logits, save_tiny
from tests.exporter.rounded import rounded_model

pytestmark = pytest.mark.gpu

CASES: dict[str, dict[str, Any]] = {
    "mha": {"heads": 4, "kv_heads": 4, "head_dim": 64, "hidden": 256},
    "gqa": {"heads": 8, "kv_heads": 2, "head_dim": 64, "hidden": 256},
    "tied": {"heads": 4, "kv_heads": 4, "head_dim": 64, "hidden": 256, "tied": True},
    "moe": {"heads": 4, "kv_heads": 4, "head_dim": 64, "hidden": 256, "moe": {}},
}
# Of logits with std 1, from the same graph on the CPU, which computes wider than fp16 and sums in another order.
BOUNDS = {"fp16": 3e-2, "fp32": 5e-3, "int8": 3e-2, "int4": 3e-2}
PAIRS = [(case, precision) for case in CASES for precision in BOUNDS if case != "moe" or precision in ("fp16", "fp32")]


@pytest.fixture(scope="module", autouse=True)
def _cuda() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip(f"the installed onnxruntime has no CUDAExecutionProvider: {install_command('cuda')}")


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "-".join(pair))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    case, precision = request.param
    folder = tmp_path_factory.mktemp("cuda")
    model = save_tiny(folder / "checkpoint", **CASES[case])
    spec = BuildSpec(target="cuda", precision=precision, max_context=400, max_batch=3, prefill_chunk=64)
    build_bundle(folder / "checkpoint", spec, folder / "bundle")
    return folder / "bundle", model, precision


def run(engine: OnnxRuntimeEngine) -> list[np.ndarray]:
    """Prompts in chunks, decoding with rows that stand idle in turn, past the first capacity."""
    rng = np.random.default_rng(0)
    found = [engine.prefill(row, rng.integers(0, 131, n)).copy() for row, n in enumerate((253, 5, 40))]
    for step in range(8):
        new = rng.integers(0, 131, 3)
        new[step % 3] = -1
        logits = engine.decode(0, new)
        found += [logits[row].copy() for row in np.flatnonzero(new >= 0)]
    assert engine.cache.capacity > CAPACITY_STEP
    return found


def open_on_cpu(bundle: Path) -> OnnxRuntimeEngine:
    device = dataclasses.replace(DEVICES["cpu"], minimum_version=DEVICES["cuda"].minimum_version)
    return OnnxRuntimeEngine(load_bundle(bundle), device=device)


def test_every_step_equals_the_same_graph_on_the_cpu(built: tuple[Path, Any, str]) -> None:
    bundle, _, precision = built
    with OnnxRuntimeEngine(load_bundle(bundle)) as gpu, open_on_cpu(bundle) as cpu:
        assert gpu.session.get_providers()[0] == "CUDAExecutionProvider"
        assert isinstance(gpu.cache.memory, CudaMemory)
        for found, want in zip(run(gpu), run(cpu), strict=True):
            np.testing.assert_allclose(found, want, atol=BOUNDS[precision], rtol=0)


def test_a_prompt_equals_transformers(built: tuple[Path, Any, str]) -> None:
    bundle, model, precision = built
    if precision in ("int8", "int4"):
        pytest.skip("transformers has no rounded weights; the same graph on the CPU is the reference")
    ids = np.random.default_rng(1).integers(0, 131, 100)
    with OnnxRuntimeEngine(load_bundle(bundle)) as engine:
        logits = engine.prefill(0, ids)
    same = rounded_model(model, "fp16") if precision == "fp16" else model
    want = reference_logits(same, [ids.tolist()])[0, -1].numpy()
    np.testing.assert_allclose(logits, want, atol=BOUNDS[precision], rtol=0)


def test_a_cache_in_gpu_memory_grows_and_keeps_its_content() -> None:
    from cuda.bindings import runtime

    memory = CudaMemory()
    tensor = IoTensor("past_key_values.0.key", "float16", ("B", 2, "C", 64))
    cache = KvCache((tensor,), max_batch=2, max_capacity=2048, memory=memory)
    cache.lengths[:] = (3, CAPACITY_STEP)
    to_device, to_host = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice, runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
    content = np.random.default_rng(0).standard_normal((2, 2, CAPACITY_STEP, 64)).astype(np.float16)
    (region,) = cache.regions(0, 2)
    runtime.cudaMemcpy(region.pointer, content.ctypes.data, content.nbytes, to_device)
    cache.reserve(CAPACITY_STEP + 1)
    (region,) = cache.regions(0, 2)
    grown = np.empty(region.shape, np.float16)
    runtime.cudaMemcpy(grown.ctypes.data, region.pointer, grown.nbytes, to_host)
    np.testing.assert_array_equal(grown[:, :, :CAPACITY_STEP], content)
    assert not grown[:, :, CAPACITY_STEP:].any()
    cache.release()


def test_closing_gives_the_memory_back(built: tuple[Path, Any, str]) -> None:
    from cuda.bindings import runtime

    bundle = load_bundle(built[0])
    free = []
    for _ in range(4):
        with OnnxRuntimeEngine(bundle) as engine:
            run(engine)
        free.append(runtime.cudaMemGetInfo()[1])
    assert free[1] - free[-1] < 16 << 20  # bytes; the first opening loads libraries that stay
