"""Triton's interpreter (3.9.0) made fit for the plugins' tests: bf16, speed, and a count of bytes read and written.

bf16. NumPy has none, so the interpreter holds bf16 as uint16. It multiplies those integers in `tl.dot`, adds them in
`+`, truncates where the GPU rounds to nearest even, and converts integers to bf16 by value. Here conversions round, a
dot widens its operands to fp32, and arithmetic on bf16 itself is an error: kernels compute in fp32.

Masks. A comparison keeps its operands' type, so that a scalar one becomes an integer when it is broadcast: typed int1.

Speed. Calling one kernel function from another patches all of triton.language each time, though it is patched already.
Each integer operation is checked for overflow by ten others, whose result is dropped unless Triton is debugged. Each
tensor and type makes its shape anew.

Bytes. `counting` records, for each tensor it is given, the unmasked lanes of each load and store times the element's
size. A lane outside all of them is an error, so that a read beyond a tensor doesn't pass unseen.
"""

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

_builder = interpreter.interpreter_builder
_plain = type(_builder)  # its methods, unpatched


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    """fp32 to bf16 bits, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _cast(source: TensorHandle, target: tl.dtype) -> TensorHandle:
    from_type, to_type = source.dtype.scalar, target.scalar
    if tl.bfloat16 not in (from_type, to_type):
        return _plain.cast_impl(_builder, source, target)
    if from_type == to_type:
        return source
    data = _widen(source.data) if from_type == tl.bfloat16 else source.data.astype(np.float32)
    data = _narrow(data) if to_type == tl.bfloat16 else data.astype(interpreter._get_np_dtype(to_type))
    return TensorHandle(data, to_type)


def _convert(source: TensorHandle, target: tl.dtype, rounding: object) -> TensorHandle:
    if tl.bfloat16 in (source.dtype.scalar, target.scalar):
        return _cast(source, target)
    return _plain.create_fp_to_fp(_builder, source, target, rounding)


def _dot(a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: object, imprecise: object) -> TensorHandle:
    left, right = (_cast(side, tl.float32) if side.dtype.scalar == tl.bfloat16 else side for side in (a, b))
    return _plain.create_dot(_builder, left, right, d, precision, imprecise)


_ARITHMETIC = {np.add, np.subtract, np.multiply, np.divide, np.minimum, np.maximum, np.fmin, np.fmax}


def _binary(left: TensorHandle, right: TensorHandle, operation: np.ufunc) -> TensorHandle:
    if operation in _ARITHMETIC and left.dtype.scalar == tl.bfloat16:
        raise TypeError("arithmetic on bf16, which the interpreter computes on its bits; convert to fp32 first")
    result = _plain.binary_op(_builder, left, right, operation)
    return TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result


_prepared: set[object] = set()


def _call(self: InterpretedFunction, *arguments: object, **keywords: object) -> object:
    if self.fn not in _prepared:
        interpreter._patch_lang(self.fn)  # patches triton.language.core, and isn't undone
        _prepared.add(self.fn)
    return self.rewrite()(*arguments, **keywords)


_blocks: dict[tuple[object, ...], dict[str, object]] = {}  # what a block's type has, by element type and sizes
_shapes: dict[str, tuple[tl.tuple, tl.constexpr]] = {}  # shape and number of elements of tensors, by type
_numpy_types: dict[str, np.dtype] = {}
_init_block, _find_numpy_type = tl.block_type.__init__, interpreter._get_np_dtype


def _init_block_type(self: tl.block_type, element_ty: tl.dtype, shape: list[object]) -> None:
    key = (element_ty.name, *[getattr(size, "value", size) for size in shape])
    if key not in _blocks:
        _init_block(self, element_ty, shape)
        _blocks[key] = dict(self.__dict__)
    self.__dict__.update(_blocks[key])


def _numpy_type(type: tl.dtype) -> np.dtype:
    if type.name not in _numpy_types:
        _numpy_types[type.name] = _find_numpy_type(type)
    return _numpy_types[type.name]


def _init_tensor(self: tl.tensor, handle: TensorHandle, type: tl.dtype) -> None:
    if type.name not in _shapes:
        shape = type.shape if type.is_block() else ()
        _shapes[type.name] = (tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape)))
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shapes[type.name]


def install() -> None:
    """Replaces what the module's docstring names, for good."""
    _builder.cast_impl = _cast
    _builder.create_fp_to_fp = _convert
    _builder.create_dot = _dot
    _builder.binary_op = _binary
    InterpretedFunction.__call__ = _call
    tl.block_type.__init__ = _init_block_type
    tl.tensor.__init__ = _init_tensor
    interpreter._get_np_dtype = _numpy_type
    _builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)
    # Tensors are in host memory already: there is nothing to copy there and back.
    executor = interpreter.GridExecutor
    executor._init_args_hst = lambda self, arguments, keywords: (arguments, keywords)
    executor._restore_args_dev = lambda self, *arguments: None


@dataclass
class Traffic:
    """Bytes loaded and stored, by tensor name."""

    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)


@contextlib.contextmanager
def counting(tensors: Mapping[str, torch.Tensor]) -> Iterator[Traffic]:
    """Counts the traffic of kernels that run inside, which may touch these tensors only."""
    traffic = Traffic()
    ranges = {
        name: (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
        for name, tensor in tensors.items()
        if tensor.numel()
    }

    def count(counter: Counter[str], pointers: TensorHandle, mask: TensorHandle) -> None:
        addresses = pointers.data if mask.data.all() else pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if not addresses.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        first, last = int(addresses.min()), int(addresses.max()) + size
        for name, (start, end) in ranges.items():
            if start <= first < end:
                if last > end:
                    raise IndexError(f"an access goes {last - end} bytes beyond the end of {name}")
                counter[name] += addresses.size * size
                return
        raise IndexError(f"an access at {first:#x} is in none of {', '.join(ranges)}")

    def load(pointers, mask, other, policy, is_volatile):  # type: ignore[no-untyped-def]
        count(traffic.read, pointers, mask)
        return _plain.create_masked_load(_builder, pointers, mask, other, policy, is_volatile)

    def store(pointers, value, mask, policy):  # type: ignore[no-untyped-def]
        count(traffic.written, pointers, mask)
        return _plain.create_masked_store(_builder, pointers, value, mask, policy)

    _builder.create_masked_load, _builder.create_masked_store = load, store
    try:
        yield traffic
    finally:
        del _builder.create_masked_load, _builder.create_masked_store
