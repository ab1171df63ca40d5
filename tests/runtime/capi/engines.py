"""An engine of the C library behind the Python runtime's interface, so that both are put to the same tests."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import ContextFullError, EngineMismatchError, GenerationError
from qwen_aot.runtime.bundle.manifest import IoTensor, Manifest
from qwen_aot.runtime.engine.protocol import NonFiniteLogitsError

OK, INVALID_ARGUMENT, OUT_OF_MEMORY, IO, BUNDLE, ENGINE_MISMATCH, ENGINE_FAILED, CONTEXT_FULL = range(8)
UNSUPPORTED, CANCELLED, NOT_FINITE = 8, 10, 13
EXIT_SECONDS = 60.0
NO_TYPES = ("-fno-rtti",)  # for programs that derive from the library's classes, which have no types at run time


class CancelledError(GenerationError):
    """A step was interrupted."""


class Dialog:
    """A program of tests/runtime/capi/src that answers line by line."""

    def __init__(self, program: Path, environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, action: str, **request: Any) -> Any:
        """What it answers."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": action, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            assert self.process.stderr is not None
            self.process.wait(EXIT_SECONDS)
            raise AssertionError(f"exit {self.process.returncode} at {action}: {self.process.stderr.read()}")
        return json.loads(line)

    def want(self, action: str, **request: Any) -> Any:
        """What it answers, which isn't a failure."""
        answer = self.ask(action, **request)
        assert answer["status"] == OK, answer
        return answer

    def close(self) -> str:
        """Ends it, and fails if it ends with a failure, as sanitizers make it; what it wrote to stderr."""
        _, errors = self.process.communicate(timeout=EXIT_SECONDS)
        assert self.process.returncode == 0, errors
        return errors

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.process.kill()
            self.process.communicate()


class NativeEngine:
    """`runtime.engine.protocol.Engine` over a program that `requests.h` serves, but for `reserve` and `close`."""

    def __init__(self, dialog: Dialog, max_batch: int, vocab_size: int, **which: Any) -> None:
        """Takes an open engine.

        Args:
            dialog: the program.
            max_batch: rows.
            vocab_size: V.
            which: goes with every request.
        """
        self.dialog = dialog
        self._vocab_size = vocab_size
        self._lengths = np.zeros(max_batch, np.int64)
        self._which = which

    @property
    def cache_length(self) -> NDArray[np.int64]:
        self._do("lengths")
        return self._lengths.copy()

    def prefill(self, row: int, token_ids: NDArray[np.int64], **more: Any) -> NDArray[np.float32]:
        return self._logits(self._do("prefill", row=row, ids=token_ids.tolist(), **more)).reshape(-1)

    def decode(self, first_row: int, token_ids: NDArray[np.int64], **more: Any) -> NDArray[np.float32]:
        return self._logits(self._do("decode", row=first_row, ids=token_ids.tolist(), **more))

    def truncate(self, row: int, length: int) -> None:
        self._do("truncate", row=row, length=length)

    def copy_row(self, source: int, target: int, length: int) -> None:
        self._do("copy_row", row=source, target=target, length=length)

    def _logits(self, answer: Any) -> NDArray[np.float32]:
        bits = np.frombuffer(bytes.fromhex(answer["logits"]), ">u4").astype(np.uint32)
        logits: NDArray[np.float32] = bits.view(np.float32).reshape(-1, self._vocab_size)
        return logits

    def _do(self, action: str, **request: Any) -> Any:
        answer = self.dialog.ask(action, **request, **self._which)
        raise_failure(answer)
        self._lengths[:] = answer["lengths"]
        return answer


def raise_failure(answer: Any) -> None:
    """A failure that an answer tells, as the error that the Python runtime has for it."""
    status = answer["status"]
    if status == OK:
        return
    assert status > 0, "logits came out of a call that failed"
    message = answer["message"]
    if status == NOT_FINITE:
        error = NonFiniteLogitsError(answer.get("bad_rows", ()))
        assert message == str(error) or not answer.get("bad_rows"), message
        error.args = (message,)
        raise error
    kinds = {CONTEXT_FULL: ContextFullError, CANCELLED: CancelledError, ENGINE_MISMATCH: EngineMismatchError}
    raise kinds.get(status, GenerationError)(message)


def tensors(inputs: Sequence[IoTensor]) -> list[Any]:
    """Inputs as programs read them."""
    return [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in inputs]


def facts(manifest: Manifest) -> dict[str, Any]:
    """What programs read of a toy's manifest."""
    return {
        "max_batch": manifest.max_batch,
        "max_context": manifest.max_context,
        "prefill_chunk": manifest.prefill_chunk,
        "vocab_size": manifest.model.vocab_size,
        "inputs": tensors(manifest.engines.text.inputs),
    }
