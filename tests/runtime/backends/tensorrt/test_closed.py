"""After `close` every part of an engine says that it is closed and touches nothing that is gone; twice is harmless."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.backends.cuda.runtime import load_cuda
from qwen_aot.runtime.backends.cuda.stream import CudaStream
from qwen_aot.runtime.backends.tensorrt.engine import TensorRtEngine
from qwen_aot.runtime.backends.tensorrt.loaded_engine import LoadedEngine
from qwen_aot.runtime.bundle.load import load_bundle
from tests.doubles.gpu import Gpu
from tests.doubles.install import installed
from tests.runtime.backends.tensorrt.engines import FLAVOURS, ids, write_checksum_bundle

CLOSED = "the engine is closed; open the bundle again"
MEMORY = np.zeros(4, np.uint8)

STREAM_CALLS: dict[str, Callable[[CudaStream], Any]] = {
    "allocate": lambda stream: stream.allocate(4),
    "allocate_pinned": lambda stream: stream.allocate_pinned(4),
    "copy_to_device": lambda stream: stream.copy_to_device(0, MEMORY),
    "copy_to_host": lambda stream: stream.copy_to_host(MEMORY, 0),
    "zero": lambda stream: stream.zero(0, 4),
    "zero_blocks": lambda stream: stream.zero_blocks(0, stride=4, width=4, blocks=1),
    "copy_blocks": lambda stream: stream.copy_blocks(0, 8, stride=4, width=4, blocks=1),
    "synchronize": lambda stream: stream.synchronize(),
    "drain": lambda stream: stream.drain(),
    "capture": lambda stream: stream.capture(lambda: None),
    "launch": lambda stream: stream.launch(None),
}
NOT_CALLS = {"close", "require_open", "destroy_graph"}  # ends; asks; has nothing to destroy once closed


def test_every_call_of_a_closed_stream(tmp_path: Path) -> None:
    public = {name for name in vars(CudaStream) if not name.startswith("_")}
    assert public - NOT_CALLS == STREAM_CALLS.keys()
    with installed(Gpu()) as gpu:
        stream = CudaStream(load_cuda())
        stream.allocate(8)
        stream.close()
        before = dict(gpu.calls)
        for call in STREAM_CALLS.values():
            with pytest.raises(GenerationError, match=CLOSED):
                call(stream)
        stream.close()
        assert dict(gpu.calls) == before


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_part_of_a_closed_engine(tmp_path: Path, flavour: str) -> None:
    bundle = write_checksum_bundle(tmp_path / "bundle", flavour)
    with installed(Gpu()) as gpu:
        engine = TensorRtEngine(load_bundle(bundle))
        engine.prefill(0, ids(1, 2))
        step, cache = engine._prefill, engine.cache
        assert step is not None
        context, buffers = step._context, step._buffers
        engine.close()
        step._buffers = None  # type: ignore[assignment]  # pinned memory that is gone: a step may not even look at it
        before = dict(gpu.calls)
        calls: list[Callable[[], Any]] = [
            lambda: engine.prefill(0, ids(1)),
            lambda: engine.decode(0, ids(1)),
            lambda: engine.copy_row(0, 1, 1),
            lambda: engine.reserve(10),
            lambda: step.run(0, ids(1)[None]),
            lambda: cache.copy_row(0, 1, 1),
            lambda: cache.scrub(0, 5),
            lambda: context.enqueue(),
            lambda: context.bind(None, None),  # type: ignore[arg-type]
            lambda: buffers.upload(),
            lambda: buffers.download(1),
        ]
        for call in calls:
            with pytest.raises(GenerationError, match=CLOSED):
                call()
        engine.close()
        assert dict(gpu.calls) == before


def test_a_loaded_engine_makes_no_context_once_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[LoadedEngine] = []
    begin = LoadedEngine.__init__

    def note(self: LoadedEngine, *arguments: Any, **options: Any) -> None:
        made.append(self)
        begin(self, *arguments, **options)

    monkeypatch.setattr(LoadedEngine, "__init__", note)
    with installed(Gpu()):
        TensorRtEngine(load_bundle(write_checksum_bundle(tmp_path / "bundle"))).close()
        (loaded,) = made
        for call in (lambda: loaded.make_context(0), loaded.allocate_activations):
            with pytest.raises(GenerationError, match=CLOSED):
                call()
        loaded.close()
