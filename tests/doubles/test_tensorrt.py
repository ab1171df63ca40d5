"""The double of TensorRT refuses what the library leaves undefined, and has nothing that the library hasn't."""

import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.doubles.gpu import Gpu, MisuseError
from tests.doubles.install import VERSIONS
from tests.doubles.tensorrt import (
    Context,
    Engine,
    ILogger,
    RtxEngine,
    Runtime,
    RuntimeCache,
    RuntimeConfig,
    make_tensorrt,
)
from tests.doubles.test_cuda_runtime import THREAD_LOCAL, Program
from tests.runtime.backends.tensorrt.engines import write_checksum_bundle
from tests.tools import require_package

CACHE = ("past_key_values.0.key", "past_key_values.0.value")
SHAPES: dict[str, tuple[int, ...]] = {
    "input_ids": (1, 2),
    "position_ids": (1, 2),
    "cache_length": (1,),
    "new_tokens": (1,),
    "key_positions": (256,),
    CACHE[0]: (1, 2, 1024, 8),
    CACHE[1]: (1, 2, 1024, 8),
}


class Logger(ILogger):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        self.messages.append(message)


class Bound(Program):
    """A context of the checksum toy's prefill profile with everything bound as it should be."""

    def __init__(self, engine_file: Path) -> None:
        super().__init__(Gpu())
        self.trt: Any = make_tensorrt(self.gpu, "tensorrt", VERSIONS["tensorrt"])
        self.logger = Logger()
        self.runtime = self.trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(engine_file.read_bytes())
        self.context = self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self.scratch = self("cudaMalloc", 4096)
        self.context.set_device_memory(self.scratch, 4096)
        self.addresses = {name: self("cudaMalloc", 65536) for name in (*SHAPES, "logits")}
        for address in self.addresses.values():
            self("cudaMemsetAsync", address, 0, 65536, self.stream)
        self.bind(SHAPES)
        self("cudaStreamSynchronize", self.stream)

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Sets every address, and these shapes."""
        for name, address in self.addresses.items():
            self.context.set_tensor_address(name, address)
        for name in CACHE:
            self.context.set_tensor_address(name.replace("past_key_values", "present"), self.addresses[name])
        for name, shape in shapes.items():
            assert self.context.set_input_shape(name, shape)

    def step(self) -> bool:
        is_started = bool(self.context.execute_async_v3(int(self.stream)))
        self("cudaStreamSynchronize", self.stream)
        return is_started


@pytest.fixture
def bound(tmp_path: Path) -> Iterator[Bound]:
    program = Bound(write_checksum_bundle(tmp_path / "bundle", "tensorrt") / "engine.plan")
    yield program
    del program.context, program.engine, program.runtime
    gc.collect()


def test_a_step_as_it_should_be(bound: Bound) -> None:
    assert bound.step() and not bound.logger.messages


def test_a_shape_outside_the_profile(bound: Bound) -> None:
    assert not bound.context.set_input_shape("input_ids", (1, 9))
    assert not bound.context.set_input_shape("input_ids", (2, 1))  # a prefill step has one row
    assert not bound.context.set_input_shape("key_positions", (1025,))
    assert "(1, 9) is outside profile 0" in bound.logger.messages[0]
    assert bound.context.set_optimization_profile_async(1, int(bound.stream))
    assert not bound.context.set_input_shape("input_ids", (1, 2))


def test_what_is_not_set(bound: Bound) -> None:
    context = bound.engine.create_execution_context(bound.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    assert not context.execute_async_v3(int(bound.stream))
    for name, shape in SHAPES.items():
        context.set_input_shape(name, shape)
    assert not context.execute_async_v3(int(bound.stream))
    assert ["no shape" in bound.logger.messages[0], "no address" in bound.logger.messages[1]] == [True, True]


def _bind_elsewhere(bound: Bound) -> None:
    bound.context.set_tensor_address("present.0.key", bound("cudaMalloc", 65536))


def _bind_too_little(bound: Bound) -> None:
    bound.context.set_tensor_address("logits", bound("cudaMalloc", 211 * 4 - 1))


def _bind_host_memory(bound: Bound) -> None:
    bound.context.set_tensor_address("input_ids", bound("cudaMallocHost", 65536))


def _bind_between(bound: Bound) -> None:
    bound.context.set_tensor_address("input_ids", bound.addresses["input_ids"] + 8)


def _bind_over_each_other(bound: Bound) -> None:
    bound.context.set_tensor_address("position_ids", bound.addresses["input_ids"])


def _bind_scratch_memory(bound: Bound) -> None:
    bound.context.set_tensor_address("input_ids", bound.scratch)


def _disagree_on_the_rows(bound: Bound) -> None:
    assert bound.context.set_optimization_profile_async(1, int(bound.stream))  # decode: prefill has one row only
    bound.bind(SHAPES | {"input_ids": (1, 1), "position_ids": (1, 1)})
    assert bound.context.set_input_shape("cache_length", (2,))


def _capture_before_a_step(bound: Bound) -> None:
    bound("cudaStreamBeginCapture", bound.stream, THREAD_LOCAL)
    bound.context.execute_async_v3(int(bound.stream))


def _replay_after_a_change(bound: Bound) -> None:
    bound.step()
    bound("cudaStreamBeginCapture", bound.stream, THREAD_LOCAL)
    bound.context.execute_async_v3(int(bound.stream))
    graph = bound("cudaStreamEndCapture", bound.stream)
    executable = bound("cudaGraphInstantiate", graph, 0)
    bound.context.set_input_shape("key_positions", (512,))
    bound("cudaGraphLaunch", executable, bound.stream)


def _replay_after_the_context(bound: Bound) -> None:
    bound.step()
    bound("cudaStreamBeginCapture", bound.stream, THREAD_LOCAL)
    bound.context.execute_async_v3(int(bound.stream))
    executable = bound("cudaGraphInstantiate", bound("cudaStreamEndCapture", bound.stream), 0)
    bound.context = None
    bound("cudaGraphLaunch", executable, bound.stream)


def _change_while_pending(bound: Bound) -> None:
    bound.context.execute_async_v3(int(bound.stream))
    bound.context.set_input_shape("key_positions", (512,))
    bound("cudaStreamSynchronize", bound.stream)


def _give_too_little_scratch_memory(bound: Bound) -> None:
    bound.context.set_device_memory(bound.scratch, 4095)


def _free_under_a_context(bound: Bound) -> None:
    bound("cudaFree", bound.scratch)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (_bind_elsewhere, r"present\.0\.key isn't bound where past_key_values\.0\.key is"),
        (_bind_too_little, "844 bytes at .* are in no live device memory"),
        (_bind_host_memory, "are pinned memory; needed: device"),
        (_bind_between, "isn't aligned to 256 bytes"),
        (_bind_over_each_other, "overlap"),
        (_bind_scratch_memory, "overlap"),
        (_disagree_on_the_rows, "B is 1 and, in cache_length, 2"),
        (_capture_before_a_step, "captured before one ran with its shapes"),
        (_replay_after_a_change, "shapes or addresses changed before its step ran, or after its capture"),
        (_replay_after_the_context, "a step runs on a context that has ended"),
        (_change_while_pending, "shapes or addresses changed before its step ran"),
        (_give_too_little_scratch_memory, "4095 bytes of scratch memory"),
        (_free_under_a_context, "device memory was freed while an execution context is alive"),
    ],
)
def test_what_the_library_leaves_undefined(bound: Bound, misuse: Callable[[Bound], None], message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        misuse(bound)
        bound.step()


def test_lives_that_end_in_the_wrong_order(tmp_path: Path) -> None:
    bound = Bound(write_checksum_bundle(tmp_path / "bundle", "tensorrt") / "engine.plan")
    del bound.runtime
    del bound.engine
    del bound.context
    assert bound.gpu.misuses == ["the runtime ended before its engine", "the engine ended before its contexts"]


def test_a_logger_must_be_made_as_the_library_says(bound: Bound) -> None:
    class Unmade(ILogger):
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="call its __init__"):
        bound.trt.Runtime(Unmade())


@pytest.mark.tools
@pytest.mark.trt
def test_it_has_nothing_that_the_library_has_not() -> None:
    real = require_package("tensorrt_rtx", "pip install 'qwen-aot[tensorrt-rtx]'")
    pairs = (
        (Engine, real.ICudaEngine),
        (RtxEngine, real.ICudaEngine),
        (Context, real.IExecutionContext),
        (Runtime, real.Runtime),
        (RuntimeConfig, real.IRuntimeConfig),
        (RuntimeCache, real.IRuntimeCache),
    )
    own = {"kind", "end", "resolve", "compute", "compile"}
    for double, library in pairs:
        ours = {name for name in vars(double) if not name.startswith("_")} - own
        assert ours <= set(dir(library)), double
    assert "cuda_graph_strategy" in dir(real.IRuntimeConfig)
    # The bindings' own text: what a cache is given and gives back.
    assert "deserialize(self" in real.IRuntimeCache.deserialize.__doc__
    assert real.IRuntimeCache.deserialize.__doc__.splitlines()[0].endswith("Buffer) -> bool")
    assert real.IRuntimeCache.serialize.__doc__.splitlines()[0].endswith("IHostMemory")
    assert real.IRuntimeConfig.set_runtime_cache.__doc__.splitlines()[0].endswith("-> bool")
    module = make_tensorrt(Gpu(), "tensorrt_rtx", VERSIONS["tensorrt_rtx"])
    for name in (name for name in dir(module) if name[0].isupper()):
        ours, theirs = getattr(module, name), getattr(real, name)
        for member in getattr(ours, "__members__", ()):
            assert hasattr(theirs, member), (name, member)
