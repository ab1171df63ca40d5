"""Every call that the backend makes fails once: the error is clear, nothing hangs, and nothing is left on the GPU."""

import logging
from pathlib import Path

import numpy as np
import pytest

from qwen_aot.errors import DeployError, GenerationError
from qwen_aot.runtime.backends.tensorrt.engine import TensorRtEngine
from qwen_aot.runtime.bundle.load import load_bundle
from tests.doubles.gpu import Gpu
from tests.doubles.install import installed
from tests.runtime.backends.tensorrt.engines import FLAVOURS, ids, opened, write_checksum_bundle
from tests.runtime.toys import checksum

STICKY = "cudaErrorIllegalAddress"
NEVER_FATAL = ("cudaFree", "cudaFreeHost", "cudaStreamDestroy", "cudaGraphDestroy", "cudaGraphExecDestroy")


@pytest.fixture(scope="module", params=FLAVOURS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checksum_bundle(tmp_path_factory.mktemp("b") / "checksum", request.param)


@pytest.fixture(scope="module")
def captured_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checksum_bundle(tmp_path_factory.mktemp("b") / "captured", "tensorrt")


def session(engine: TensorRtEngine) -> None:
    """Prefill in two chunks, then decode: enqueued, captured and replayed, on one row and on two."""
    sequence = list(range(1, 13))
    engine.truncate(0, 0)
    assert engine.prefill(0, ids(*sequence)).argmax() == checksum(sequence)
    for token_id in range(3):
        sequence.append(token_id)
        assert engine.decode(0, ids(token_id))[0].argmax() == checksum(sequence)
    for token_id in range(3):
        sequence.append(token_id)
        assert engine.decode(0, ids(token_id, -1))[0].argmax() == checksum(sequence)


def calls_of(bundle: Path, *, while_open: bool) -> dict[str, int]:
    """How often each call is made by opening an engine, or by a session on an open one."""
    with installed(Gpu()) as gpu, TensorRtEngine(load_bundle(bundle)) as engine:
        at_open = gpu.calls.copy()
        session(engine)
        return dict(gpu.calls - at_open) if while_open else dict(at_open)


def places(count: int) -> list[int]:
    """Which of a function's calls are to fail: all, or the ends and the middle of many."""
    return sorted({1, 2, count // 2, count - 1, count}) if count > 6 else list(range(1, count + 1))


def names_its_cause(error: Exception, status: str) -> bool:
    """CUDA's status, or what the double of TensorRT logs when it is told to fail."""
    return any(text in str(error) for text in (status, "told to fail", "can't be set"))


@pytest.mark.parametrize("status", ["cudaErrorUnknown", STICKY])
def test_each_call_of_opening(bundle: Path, status: str) -> None:
    for call, count in calls_of(bundle, while_open=False).items():
        for nth in places(count):
            with installed(Gpu()) as gpu:
                gpu.fail(call, status, nth)
                with pytest.raises(DeployError) as caught:
                    TensorRtEngine(load_bundle(bundle))
                assert not gpu.untold_faults
                assert names_its_cause(caught.value, status), call
                assert not gpu.allocations and not gpu.streams and not gpu.objects["engine"], (call, nth)


@pytest.mark.parametrize("status", ["cudaErrorUnknown", STICKY])
def test_each_call_of_a_session(bundle: Path, status: str) -> None:
    for call, count in calls_of(bundle, while_open=True).items():
        for nth in places(count):
            with installed(Gpu()) as gpu, TensorRtEngine(load_bundle(bundle)) as engine:
                gpu.fail(call, status, nth)
                error = None
                try:
                    session(engine)
                except GenerationError as raised:
                    error = raised
                assert not gpu.untold_faults
                if gpu.lost:
                    # At the latest the next step says so; nothing but a new process helps.
                    with pytest.raises(GenerationError, match=rf"can't be used any more.*{STICKY}.*open the bundle ag"):
                        engine.prefill(0, ids(1))
                elif error is not None:
                    assert names_its_cause(error, status), call
                    _check_recovery(engine, call)


def _check_recovery(engine: TensorRtEngine, call: str) -> None:
    """After an error that isn't sticky the engine goes on as if nothing had been asked, or says that it can't."""
    try:
        session(engine)
    except GenerationError as error:
        assert "open the bundle again" in str(error), call


def test_a_failed_step_leaves_the_row_as_it_was(bundle: Path) -> None:
    with opened(bundle) as (engine, gpu):
        engine.prefill(0, ids(1, 2))
        gpu.fail("execute_async_v3", nth=2)
        with pytest.raises(GenerationError, match=r"failed to start a step: the double was told to fail: enqueue\. If"):
            engine.prefill(0, ids(*range(12)))
        assert engine.cache_length.tolist() == [2, 0, 0, 0]
        for tensor in engine.cache.tensors:  # [4, 2, 1024, 8]
            engine.prefill(1, ids(5))  # waits for the scrub
            content = gpu.view(tensor.address, tensor.row_bytes).view(np.float32).reshape(tensor.row_shape)
            assert content[:, :2].any() and not content[:, 2:].any()
        assert engine.prefill(0, ids(3)).argmax() == checksum([1, 2, 3])


def test_a_kernel_that_fails_is_told_with_its_status(captured_bundle: Path) -> None:
    for after in range(4):  # enqueued, before its capture, replayed
        with opened(captured_bundle) as (engine, gpu):
            for token_id in range(after):
                engine.decode(0, ids(token_id))
            gpu.fail("kernel", STICKY)
            with pytest.raises(GenerationError, match=rf"cudaStreamSynchronize: {STICKY}; .*open the bundle again in"):
                engine.decode(0, ids(9))
            assert engine.cache_length.tolist() == [after, 0, 0, 0]
            with pytest.raises(GenerationError, match="the engine can't be used any more"):
                engine.decode(0, ids(9))


@pytest.mark.parametrize("call", NEVER_FATAL)
def test_freeing_goes_on_whatever_it_says(captured_bundle: Path, caplog: pytest.LogCaptureFixture, call: str) -> None:
    with opened(captured_bundle) as (engine, gpu), caplog.at_level(logging.WARNING):
        gpu.fail(call)
        for token_id in range(4):
            engine.decode(0, ids(token_id))
        engine.close()
        assert not gpu.untold_faults
    assert f"the GPU failed in {call}: cudaErrorUnknown" in caplog.text


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_memory_that_runs_out_while_opening(tmp_path: Path, flavour: str) -> None:
    # As if another program had taken it since the check: the manifest names no bytes.
    nothing = {"weight_bytes": 0, "cache_bytes": 0, "activation_bytes_estimated": 0}
    bundle = write_checksum_bundle(tmp_path / "bundle", flavour, facts=nothing)
    for total in range(960 << 10, (1 << 20) + (520 << 10), 64 << 10):
        with installed(Gpu(total_bytes=total)) as gpu:
            with pytest.raises(DeployError, match=r"end other programs"):
                TensorRtEngine(load_bundle(bundle))
            assert not gpu.allocations


def test_an_interrupt_leaves_nothing(captured_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(captured_bundle) as (engine, gpu):
        engine.decode(0, ids(1))
        assert engine._decode is not None and engine._decode._graphs is not None

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(engine._decode._buffers, "download", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.decode(0, ids(2))
        assert gpu.objects["context"] == 2
        assert engine.decode(0, ids(2))[0].argmax() == checksum([1, 2])
