"""A vision engine over ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import EngineMismatchError, GenerationError, onnxruntime_errors
from qwen_aot.runtime.backends.ort.devices import DEVICES
from qwen_aot.runtime.backends.ort.engine import OrtOptions, open_session
from qwen_aot.runtime.bundle.load import Bundle
from qwen_aot.runtime.engine.exclusive import Exclusive, hold_at_exit
from qwen_aot.runtime.engine.vision_table import VisionTable, check_rows, check_run, vision_table

__all__ = ["OnnxRuntimeVision"]


class OnnxRuntimeVision:
    """`runtime.engine.vision.VisionRunner` for the targets whose engine file is an ONNX graph."""

    def __init__(self, bundle: Bundle, options: OrtOptions | None = None) -> None:
        """Opens the bundle's second graph.

        Args:
            bundle: checked.
            options: how the session is made.

        Raises:
            EngineMismatchError: ONNX Runtime is missing or can't run this graph, or its inputs and outputs aren't those
                that this runtime knows.
        """
        manifest = bundle.manifest
        self._table: VisionTable = vision_table(manifest)
        if manifest.target not in DEVICES:
            raise EngineMismatchError(
                f"the bundle's target is {manifest.target!r} and its vision engine an ONNX graph; accepted: "
                f"{', '.join(DEVICES)}"
            )
        path = bundle.path / self._table.file
        self._session: Any = open_session(path, options or OrtOptions(), DEVICES[manifest.target])
        self._lock = Exclusive()
        hold_at_exit(self._lock)
        self.image_size, self.rows, self.width = self._table.image_size, self._table.rows, self._table.width
        self.max_images = self._table.max_images

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `runtime.engine.vision.VisionRunner.encode`."""
        check_run(self._table, pixels)
        with self._lock:
            if self._session is None:
                raise GenerationError("the engine is closed; open the bundle again")
            try:
                (rows,) = self._session.run([self._table.output], {self._table.input: pixels.astype(np.float32)})
            except onnxruntime_errors() as error:
                raise GenerationError(
                    f"ONNX Runtime failed to encode {len(pixels)} images: {error}. If memory ran out, give fewer"
                ) from error
        return check_rows(np.asarray(rows))

    def close(self) -> None:
        """See `runtime.engine.vision.VisionRunner.close`."""
        self._lock.run(self._end)

    def _end(self) -> None:
        self._session = None
