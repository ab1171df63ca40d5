"""The TensorRT backend on a GPU: whichever flavours are installed, with tiny engines built here.

Without a GPU the same logic is tested on doubles (tests/runtime/backends/tensorrt/test_engine.py). TensorRT's own
layers; those of plugins have tests/gpu/test_tensorrt_plugins.py.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.runtime.backends.cuda.runtime import Device, find_device, load_cuda
from qwen_aot.runtime.backends.tensorrt.engine import TensorRtEngine
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.engine.protocol import NonFiniteLogitsError
from tests.checkpoints import reference_logits, save_tiny
from tests.exporter.rounded import rounded_model

pytestmark = [pytest.mark.gpu, pytest.mark.trt]

TARGETS = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
# Largest difference of logits (std 1) from transformers in float32 with the weights that the engine has: 11 bits in
# cache and activations. Against unrounded weights a token may take another expert, which is no error: on ONNX Runtime
# one row in 500 did, and was off by 0.46; the others, and all rows against rounded weights, by at most 0.03.
TOLERANCE = 5e-2
CONTEXT, ROWS, CHUNK = 1024, 4, 32


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    if importlib.util.find_spec(TARGETS[request.param]) is None:
        pytest.skip(f"{TARGETS[request.param]} isn't installed")
    return str(request.param)


@pytest.fixture(scope="module")
def device() -> Device:
    return find_device(load_cuda())


@pytest.fixture(scope="module", params=["gqa", "moe"])
def model(
    request: pytest.FixtureRequest, target: str, device: Device, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.nn.Module, Path]:
    """A tiny model of transformers with weights rounded to fp16, and its engine for this machine's GPU."""
    folder = tmp_path_factory.mktemp(f"{target}-{request.param}")
    moe = {} if request.param == "moe" else None
    reference = save_tiny(folder / "checkpoint", kv_heads=2, max_position_embeddings=CONTEXT, moe=moe)
    build(folder / "checkpoint", folder / "bundle", target, device)
    return rounded_model(reference, "fp16"), folder / "bundle"


@pytest.fixture
def engine(model: tuple[torch.nn.Module, Path]) -> Iterator[TensorRtEngine]:
    with TensorRtEngine(load_bundle(model[1])) as engine:
        yield engine


def build(checkpoint: Path, out: Path, target: str, device: Device, speculate: int | None = None) -> None:
    # TensorRT proper builds for the GPU that it runs on.
    capabilities = (device.compute_capability,) if target == "tensorrt-rtx" else ()
    spec = BuildSpec(
        target=target,  # type: ignore[arg-type]  # BuildSpec takes names
        max_context=CONTEXT,
        max_batch=ROWS,
        prefill_chunk=CHUNK,
        speculate=speculate,
        tensorrt=TensorRtOptions(compute_capabilities=capabilities, attention="native", moe="native"),
    )
    build_bundle(checkpoint, spec, out)


def ids(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, np.int64)


def prompt_of(count: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(1, 131, count)]


def teacher_forced(engine: TensorRtEngine, row: int, sequence: list[int], prefilled: int) -> np.ndarray:
    """Logits [n, V] of the last prefilled token and of each one decoded after it."""
    logits = [engine.prefill(row, ids(*sequence[:prefilled])).copy()]
    logits += [engine.decode(row, ids(token))[0].copy() for token in sequence[prefilled:]]
    return np.stack(logits)


def expected(model: torch.nn.Module, sequence: list[int], prefilled: int) -> np.ndarray:
    return reference_logits(model, [sequence])[0, prefilled - 1 :].numpy()


@pytest.mark.parametrize("prefilled", [1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_logits_are_those_of_transformers(
    model: tuple[torch.nn.Module, Path], engine: TensorRtEngine, prefilled: int
) -> None:
    sequence = prompt_of(prefilled + 40)
    logits = teacher_forced(engine, 1, sequence, prefilled)
    np.testing.assert_allclose(logits, expected(model[0], sequence, prefilled), atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["gqa", "moe"])
def test_drafts_are_checked_as_they_are_decoded(kind: str, target: str, device: Device, tmp_path: Path) -> None:
    """A third profile: a few tokens of each row, and the logits behind all of them; rows may differ in number."""
    moe = {} if kind == "moe" else None
    saved = save_tiny(tmp_path / "checkpoint", kv_heads=2, max_position_embeddings=CONTEXT, moe=moe)
    build(tmp_path / "checkpoint", tmp_path / "bundle", target, device, speculate=4)
    reference = rounded_model(saved, "fp16")
    texts = [prompt_of(40, seed) for seed in range(3)]
    with TensorRtEngine(load_bundle(tmp_path / "bundle")) as engine:
        for counts in ((4, 1, 0), (2, 4, 3), (4, 4, 4)):
            fed = np.full((3, 4), -1, np.int64)
            for row, count in enumerate(counts):
                engine.truncate(row, 0)
                engine.prefill(row, ids(*texts[row][: 30 - count]))
                fed[row, :count] = texts[row][30 - count : 30]
            logits = engine.verify(0, fed)
            for row, count in enumerate(counts):
                if count:
                    wanted = expected(reference, texts[row][:30], 31 - count)
                    np.testing.assert_allclose(logits[row, 4 - count :], wanted, atol=TOLERANCE)
            engine.truncate(0, 28)
            again = engine.decode(0, ids(texts[0][28]))[0]
            np.testing.assert_allclose(again, expected(reference, texts[0][:29], 29)[-1], atol=TOLERANCE)


def test_windows_are_crossed(model: tuple[torch.nn.Module, Path], engine: TensorRtEngine) -> None:
    for prefilled in (240, 500, 760):  # W = 256, 512, 768 end within the next 30 tokens
        sequence = prompt_of(prefilled + 30, seed=prefilled)
        engine.truncate(0, 0)
        logits = teacher_forced(engine, 0, sequence, prefilled)
        np.testing.assert_allclose(logits, expected(model[0], sequence, prefilled), atol=TOLERANCE)


def test_rows_of_unequal_length_and_idle_ones(model: tuple[torch.nn.Module, Path], engine: TensorRtEngine) -> None:
    rows = [prompt_of(n, seed=n) for n in (3, 50, 20)]
    for row, sequence in enumerate(rows):
        engine.prefill(row, ids(*sequence))
    for step in range(12):
        tokens = [10 + step, -1 if step % 3 == 0 else 20 + step, 30 + step, -1]  # row 3 stays empty
        logits = engine.decode(0, ids(*tokens))
        for row in (0, 1, 2):
            if tokens[row] >= 0:
                rows[row].append(tokens[row])
                reference = reference_logits(model[0], [rows[row]])[0, -1]
                np.testing.assert_allclose(logits[row], reference, atol=TOLERANCE)
    assert engine.cache_length.tolist() == [len(rows[0]), len(rows[1]), len(rows[2]), 0]


def test_the_cache_is_written_in_place_and_nowhere_else(engine: TensorRtEngine) -> None:
    engine.prefill(1, ids(*prompt_of(40)))
    engine.decode(1, ids(5))
    for tensor in engine.cache.tensors:
        content = read(engine, tensor.address, ROWS * tensor.row_bytes).view(np.float16)
        content = content.reshape(ROWS, *tensor.row_shape)
        assert np.isfinite(content).all()
        assert content[1, :, :41].any(axis=-1).all()
        assert not content[[0, 2, 3]].any()


def read(engine: TensorRtEngine, address: int, count: int) -> np.ndarray:
    """Device memory as bytes."""
    cuda = load_cuda()
    host = np.empty(count, np.uint8)
    kind = cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
    cuda.call("cudaMemcpy", host.ctypes.data, address, count, kind)
    return host


def test_a_replayed_graph_equals_plain_steps(model: tuple[torch.nn.Module, Path]) -> None:
    sequence = prompt_of(60, seed=3)
    results = []
    for use_graphs in (True, False):
        with TensorRtEngine(load_bundle(model[1])) as engine:
            assert engine._decode is not None
            has_graphs = engine._decode._graphs is not None
            if not use_graphs:
                engine._decode._graphs = None
            results.append(teacher_forced(engine, 0, sequence, 20))
            if has_graphs and use_graphs:
                assert engine._decode._graphs is not None and len(engine._decode._graphs) == 1
    np.testing.assert_allclose(results[0], results[1], atol=1e-3)  # the same kernels; RTX may change them as it goes


def test_nan_names_the_row_and_leaves_the_others(target: str, device: Device, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "checkpoint", kv_heads=2, max_position_embeddings=CONTEXT)
    with torch.no_grad():  # a row of the embedding that is in fp16's range and whose products are not
        model.model.embed_tokens.weight[13] = 6e4
        model.model.layers[0].input_layernorm.weight.mul_(3e4)
    model.save_pretrained(tmp_path / "checkpoint")
    build(tmp_path / "checkpoint", tmp_path / "bundle", target, device)
    with TensorRtEngine(load_bundle(tmp_path / "bundle")) as engine:
        with pytest.raises(NonFiniteLogitsError) as caught:
            engine.prefill(2, ids(13))
        assert caught.value.rows == (2,)
        assert engine.cache_length.tolist() == [0, 0, 0, 0]
        for tensor in engine.cache.tensors:
            content = read(engine, tensor.address, ROWS * tensor.row_bytes).view(np.float16)
            assert np.isfinite(content).all()


def test_device_memory_is_flat_over_a_thousand_generations(engine: TensorRtEngine) -> None:
    cuda = load_cuda()

    def generate(times: int) -> None:
        for i in range(times):
            engine.truncate(i % ROWS, 0)
            engine.prefill(i % ROWS, ids(*prompt_of(1 + i % 50, seed=i % 7)))
            for token in range(4):
                engine.decode(i % ROWS, ids(token + 1))

    generate(200)
    before, _ = cuda.call("cudaMemGetInfo")
    generate(1000)
    after, _ = cuda.call("cudaMemGetInfo")
    assert before - after < 4 << 20  # bytes: kernels that are still being loaded, and no growth with generations


def test_kernels_are_kept_for_the_next_start(
    model: tuple[torch.nn.Module, Path],
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """TensorRT-RTX compiles on the device; full TensorRT has compiled when it built, and keeps nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sequence, results, seconds = prompt_of(40, seed=5), [], []
    with caplog.at_level(logging.INFO, "runtime"):
        for _ in range(2):
            started = time.perf_counter()
            with TensorRtEngine(load_bundle(model[1])) as engine:
                results.append(teacher_forced(engine, 0, sequence, 20))
            seconds.append(time.perf_counter() - started)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == (1 if target == "tensorrt-rtx" else 0)
    assert "will be replaced" not in caplog.text  # the library took at the second start what the first one kept
    np.testing.assert_allclose(results[0], results[1], atol=1e-3)
    print(f"{target}: first start {seconds[0]:.2f} s, second {seconds[1]:.2f} s")


def test_closing_gives_the_memory_back(model: tuple[torch.nn.Module, Path]) -> None:
    cuda = load_cuda()
    free = []
    for _ in range(6):
        with ExitStack() as stack:
            engine = stack.enter_context(TensorRtEngine(load_bundle(model[1])))
            teacher_forced(engine, 0, prompt_of(20), 10)
        free.append(cuda.call("cudaMemGetInfo")[0])
    assert max(free[1:]) - min(free[1:]) < 4 << 20  # the first one loads libraries
