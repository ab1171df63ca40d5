"""A vision engine over TensorRT or TensorRT-RTX."""

from __future__ import annotations

import weakref
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.backends.cuda.runtime import find_device, load_cuda
from qwen_aot.runtime.backends.cuda.stream import CudaStream
from qwen_aot.runtime.backends.tensorrt.bundle_code import bundle_code
from qwen_aot.runtime.backends.tensorrt.checks import check_device, tensorrt_facts
from qwen_aot.runtime.backends.tensorrt.context import Context
from qwen_aot.runtime.backends.tensorrt.library import load_library
from qwen_aot.runtime.backends.tensorrt.loaded_engine import LoadedEngine
from qwen_aot.runtime.backends.tensorrt.runtime_cache import RuntimeCache, cache_file
from qwen_aot.runtime.bundle.load import Bundle
from qwen_aot.runtime.engine.exclusive import Exclusive, hold_at_exit
from qwen_aot.runtime.engine.vision_table import check_rows, check_run, vision_table

__all__ = ["TensorRtVision"]


class TensorRtVision:
    """`runtime.engine.vision.VisionRunner` for the targets whose engine file is a TensorRT engine.

    It has a stream and memory of its own, so that it runs beside the decoder. All memory is allocated when it is
    opened, for as many images as a run may have.
    """

    def __init__(self, bundle: Bundle, *, allow_bundle_code: bool = False) -> None:
        """Checks code, library, GPU and free memory, then loads the engine.

        Args:
            bundle: checked.
            allow_bundle_code: let it run native code of its own; see `runtime.backends.tensorrt.bundle_code`.

        Raises:
            EngineMismatchError: see `TensorRtEngine`; or its inputs and outputs aren't those that this runtime knows.
            GenerationError: the GPU failed.
        """
        manifest = bundle.manifest
        self._table = vision_table(manifest)
        entry = manifest.engines.vision
        assert entry is not None  # it has a table
        facts = tensorrt_facts(entry)
        code = bundle_code(bundle, facts, is_allowed=allow_bundle_code)
        library = load_library(manifest, facts)
        cuda = load_cuda()
        device = find_device(cuda)
        check_device(manifest, facts, device)
        size, rows, width, most = (
            self._table.image_size,
            self._table.rows,
            self._table.width,
            self._table.max_images,
        )
        with ExitStack() as resources:  # ends context, engine, runtime, memory, stream
            stream = CudaStream(cuda)
            resources.callback(stream.close)
            runtime_cache = None
            if library.flavour.compiles_on_device:
                path = cache_file(
                    manifest.files[entry.file].sha256, device.compute_capability, str(library.api.__version__)
                )
                runtime_cache = RuntimeCache(library, cuda, path)
            engine = LoadedEngine(library, stream, runtime_cache)
            resources.callback(engine.close)
            engine.load(bundle.path / entry.file, code)
            engine.check_signature(entry, [{"B": (1, most)}])
            engine.allocate_activations()
            self._pixels: NDArray[np.float32] = (
                stream.allocate_pinned(most * size * size * 3 * 4).view(np.float32).reshape(most, size, size, 3)
            )
            self._rows: NDArray[np.float32] = (
                stream.allocate_pinned(most * rows * width * 4).view(np.float32).reshape(most, rows, width)
            )
            self._addresses = {
                self._table.input: stream.allocate(self._pixels.nbytes),
                self._table.output: stream.allocate(self._rows.nbytes),
            }
            self._context: Context | None = engine.make_context(0)
            stream.synchronize()
            self._free = weakref.finalize(self, resources.pop_all().close)
        # The driver may have ended before Python runs what is left; the GPU's memory goes with the process.
        self._free.atexit = False
        self._cuda, self._stream = cuda, stream
        self._lock = Exclusive()
        hold_at_exit(self._lock)
        self.image_size, self.rows, self.width, self.max_images = size, rows, width, most

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `runtime.engine.vision.VisionRunner.encode`."""
        check_run(self._table, pixels)
        with self._lock:
            if self._context is None:
                raise GenerationError("the engine is closed; open the bundle again")
            self._cuda.check_usable()
            count = len(pixels)
            self._pixels[:count] = pixels
            try:
                self._context.bind_all(self._addresses, {self._table.input: pixels.shape})
                self._stream.copy_to_device(self._addresses[self._table.input], self._pixels[:count])
                self._context.enqueue()
                self._stream.copy_to_host(self._rows[:count], self._addresses[self._table.output])
                self._stream.synchronize()
            except BaseException:
                self._stream.drain()
                raise
            return check_rows(self._rows[:count].copy())

    def close(self) -> None:
        """See `runtime.engine.vision.VisionRunner.close`."""
        self._lock.run(self._end)

    def _end(self) -> None:
        self._context = None
        self._free()
