"""int4 codes as numbers, each byte less each zero: as Triton's interpreter computes them, and as they are compiled."""

import ctypes
import re

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.plugins.conftest import IS_INTERPRETED
from tests.plugins.ptx.interpreter import Interpreter, Range, pointers
from tests.plugins.ptx.programs import aligned
from tests.plugins.ptx.widening import BYTES, ROWS, WARPS, compile_widening, widen_all

if not IS_INTERPRETED:
    pytest.skip("compiled codes are executed on the CPU only", allow_module_level=True)

PACKED = np.arange(BYTES, dtype=np.uint8).view(np.int8)
ZEROS = (np.arange(ROWS) % 17).astype(np.int8)
NUMPY = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}


def expected() -> tuple[np.ndarray, np.ndarray]:
    """Low and high nibbles [ROWS, BYTES] by Python's integers."""
    low = [[byte % 16 - int(zero) for byte in range(BYTES)] for zero in ZEROS]
    high = [[byte // 16 - int(zero) for byte in range(BYTES)] for zero in ZEROS]
    return np.array(low), np.array(high)


@pytest.mark.parametrize("dtype", NUMPY)
def test_the_definition(dtype: str) -> None:
    low, high = (torch.full((ROWS, BYTES), torch.nan, dtype=TORCH[dtype]) for _ in range(2))
    widen_all[(1,)](torch.from_numpy(PACKED), torch.from_numpy(ZEROS), low, high, ROWS, BYTES)
    for actual, wanted in zip((low, high), expected(), strict=True):
        assert (actual.float().numpy() == wanted).all()


@pytest.fixture(scope="module", params=list(NUMPY))
def compiled(request: pytest.FixtureRequest) -> tuple[str, str, int]:
    """A dtype, the kernel's PTX, and its bytes of shared memory."""
    return (request.param, *compile_widening(request.param))


def execute(interpreter: Interpreter, dtype: str, text: str, shared_bytes: int) -> list[np.ndarray]:
    outputs = [aligned(np.full((ROWS, BYTES), np.nan, NUMPY[dtype])) for _ in range(2)]
    buffers = [aligned(PACKED), aligned(ZEROS), *outputs]
    interpreter.load(text).launch(
        "widen_all",
        grid=(1,),
        threads=32 * WARPS,
        parameters=pointers([*(ctypes.c_void_p(array.ctypes.data) for array in buffers), *[ctypes.c_void_p()] * 2]),
        ranges=[Range(str(index), array.ctypes.data, array.nbytes) for index, array in enumerate(buffers)],
        shared_bytes=shared_bytes,
    )
    return outputs


def is_exact(outputs: list[np.ndarray]) -> bool:
    return all((actual.astype(np.float64) == wanted).all() for actual, wanted in zip(outputs, expected(), strict=True))


def test_the_compiled_form(compiled: tuple[str, str, int], interpreter: Interpreter) -> None:
    dtype, text, shared_bytes = compiled
    assert "prmt.b32 pair" in text  # and not the definition
    assert is_exact(execute(interpreter, dtype, text, shared_bytes))


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        ("0x0f0f0f0f", "0x070f0f0f"),
        ("0x4140", "0x4041"),
        ("0x4342;", "0x4343;"),
        (r"(sixteenth|one), 0x(..)..", r"\1, 0x\g<2>01"),
    ],
    ids=["a mask", "an order", "a byte", "a factor"],
)
def test_another_form_is_noticed(
    pattern: str, replacement: str, compiled: tuple[str, str, int], interpreter: Interpreter
) -> None:
    dtype, text, shared_bytes = compiled
    changed = re.sub(pattern, replacement, text)
    assert changed != text
    assert not is_exact(execute(interpreter, dtype, changed, shared_bytes))
