"""What TensorRT-RTX made of each profile's step, read from its engine: kernels, products, copies, scratch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, TypeAlias, TypeVar

from qwen_aot.engines.tensorrt.graph_names import GraphNames
from qwen_aot.engines.tensorrt.program_text import Call, Program, Tensor
from qwen_aot.errors import BuildError
from qwen_aot.runtime.bundle.manifest import MatrixProduct, PlanTensor, StepPlan

DTYPES: Mapping[str, str] = {
    "float": "float32",
    "half": "float16",
    "bf16": "bfloat16",
    "fp8_e4m3": "float8_e4m3",
    "int8": "int8",
    "int4": "int4",
    "int32": "int32",
}
_BITS = {"int4": 4, "int8": 8, "fp8_e4m3": 8, "bool": 8, "half": 16, "bf16": 16, "float": 32, "int32": 32, "int64": 64}
_FLOATS = frozenset({"float", "half", "bf16", "fp8_e4m3", "int8"})  # of activations
_LAUNCHES = frozenset({"function", "fully_connected", "runtime_fusion"})  # not what moves a condition to the host
_PRODUCT = "fully_connected"
_ATTENTION = re.compile(r"^_ge(?:mm|mv)_mha")  # both products of attention and what is between them
# Of a kernel's name, which says all that it computes: what changes no value, and the scale that attention's keys get.
_WORD = re.compile(r"[A-Z][a-z]*")
_MOVES = frozenset({"Slic", "Resh", "Move", "Tran", "Gath", "Conc", "Repl", "Spli"})
_SCALES = frozenset({"Mul"})
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_PlanTensor: TypeAlias = tuple[str, str, "int | None"]  # name, op, bytes
_Fact = TypeVar("_Fact", bound="tuple[Any, ...]")  # its first is the name
_SUFFIX = re.compile(r"( \[profile \d+\])?(\.\d+)?$")


def step_plans(
    programs: Sequence[Program],
    names: GraphNames,
    num_hidden_layers: int,
    shapes: Mapping[str, Mapping[str, Sequence[int]]],
) -> dict[str, StepPlan]:
    """The plan of each profile.

    Args:
        programs: of the engine, in its order.
        names: of the graph that it was compiled from.
        num_hidden_layers: of the model.
        shapes: profile, in the engine's order -> input of the graph -> its largest shape.

    Raises:
        BuildError: the programs aren't those of the profiles, or hold what TensorRT-RTX 1.7.1 doesn't write.
    """
    steps = [index for index, program in enumerate(programs) if program.is_step]
    if len(steps) != len(shapes):
        raise BuildError(f"the engine holds {len(steps)} programs of steps for the profiles {list(shapes)}")
    plans = {}
    for index, (profile, inputs) in zip(steps, shapes.items(), strict=True):
        fusions = list(takewhile(lambda program: not program.is_step, programs[index + 1 :]))
        try:
            plans[profile] = _Step(programs[index], fusions, names, inputs).plan(num_hidden_layers)
        except (LookupError, ValueError) as error:
            raise BuildError(f"the program of the {profile} profile can't be read: {error!r}") from error
    return plans


def stored_bytes(programs: Sequence[Program]) -> int:
    """Bytes of all constants that the steps read, those that several share once."""
    constants = {
        tensor.place: tensor.constant_bytes
        for program in programs
        if program.is_step
        for tensor in program.tensors.values()
        if tensor.constant_bytes is not None
    }
    return sum(constants.values())


class _Step:
    """One profile's program, with what its fused kernels compute, the graph's names and the largest sizes."""

    def __init__(
        self,
        program: Program,
        fusions: Sequence[Program],
        names: GraphNames,
        shapes: Mapping[str, Sequence[int]],
    ) -> None:
        self._program = program
        self._fusions = fusions
        self._names = names
        self._sizes = _largest(program, shapes)

    def plan(self, num_hidden_layers: int) -> StepPlan:
        taken = list(_longest_path(self._program))
        layers = [self._names.layer(call.layers) for call in taken]
        return StepPlan(
            kernels=len(taken),
            layer_kernels=tuple(layers.count(index) for index in range(num_hidden_layers)),
            matrix_products=self._products(),
            copies=self._tensors(self._copy),
            weight_scratch=self._scratch(),
        )

    def _products(self) -> tuple[MatrixProduct, ...]:
        found: list[tuple[str, str, str, str]] = []
        for call in self._program.calls:
            operands = self._operands(call)
            if operands is None:
                continue
            weights = self._names.multiplied(call.layers)
            output = self._product_of(call, weights)
            if output is None:
                continue
            left, right, written = (DTYPES[tensor.dtype] for tensor in (*operands, output))
            found.append(("+".join(weights) or call.name, left, right, written))
        return tuple(MatrixProduct(*product, count) for product, count in _alike(found))

    def _product_of(self, call: Call, weights: Sequence[str]) -> Tensor | None:
        """The output that holds the products; None: of several, none has as many columns as the weights have rows."""
        outputs = [self._tensor(name) for name in call.outputs]
        if len(outputs) == 1:
            return outputs[0]
        rows = [self._names.shape(weight)[0] for weight in weights]
        return next(
            (tensor for tensor in outputs if _fixed(tensor)[-1:] in ([sum(rows)], *([row] for row in rows))), None
        )

    def _operands(self, call: Call) -> tuple[Tensor, Tensor] | None:
        """What the kernel of a product reads: activations, weight. None: it is of none."""
        if _ATTENTION.match(call.name):
            query, key = call.inputs[:2]
            return self._tensor(query), self._tensor(key)
        if call.op == _PRODUCT:
            left, right = call.inputs[:2]
            return self._tensor(left), self._tensor(right)
        if call.fusion is None:
            return self._operands_of_function(call)
        inner = self._fusions[call.fusion]
        product = next((inside for inside in inner.calls if inside.op == _PRODUCT), None)
        if product is None:
            return None
        left, right = (_origin(inner, name) for name in product.inputs[:2])
        return inner.tensors[left], inner.tensors[right]

    def _operands_of_function(self, call: Call) -> tuple[Tensor, Tensor] | None:
        """The same of a generated kernel, which multiplies by a vector beside other work: of one token a row."""
        sizes = {math.prod(self._names.shape(weight)) for weight in self._names.multiplied(call.layers)}
        read = [self._tensor(name) for name in call.inputs]
        activations = [tensor for tensor in read if tensor.constant_bytes is None and tensor.dtype in _FLOATS]
        matrices = [tensor for tensor in read if tensor.constant_bytes is not None and _elements(tensor) in sizes]
        if not activations or not matrices:
            return None
        return max(activations, key=_elements), max(matrices, key=_elements)

    def _tensors(self, of: Callable[[Call], _PlanTensor | None]) -> tuple[PlanTensor, ...]:
        found = [tensor for call in self._program.calls if (tensor := of(call)) is not None]
        return tuple(PlanTensor(*tensor, count) for tensor, count in _alike(found))

    def _copy(self, call: Call) -> _PlanTensor | None:
        """Of a kernel that only moves what one tensor holds: whose values it writes again."""
        words = _words(call)
        if not words & _MOVES or not words <= _MOVES | _SCALES or len(call.outputs) != 1:
            return None
        output = self._tensor(call.outputs[0])
        read = [tensor for tensor in map(self._tensor, call.inputs) if tensor.constant_bytes is None]
        sources = [tensor for tensor in read if tensor.dtype == output.dtype]
        if len(sources) != 1 or any(tensor.dtype not in ("int32", "int64") for tensor in read if tensor not in sources):
            return None
        name = _SUFFIX.sub("", sources[0].name)
        if not name.startswith("present."):
            layer = self._names.layer(call.layers)
            name = "activations" if layer is None else f"layers.{layer}.activations"
        return name, "".join(_WORD.findall(call.name)), self._bytes(output)

    def _scratch(self) -> tuple[PlanTensor, ...]:
        found = [tensor for call in self._program.calls for tensor in self._scratch_of(call)]
        return tuple(PlanTensor(*tensor, count) for tensor, count in _alike(found))

    def _scratch_of(self, call: Call) -> Iterator[_PlanTensor]:
        """Of a kernel that makes matrices of constants anew: those that it writes."""
        if call.op != "function" or _ATTENTION.match(call.name):
            return
        read = [self._tensor(name) for name in call.inputs]
        if any(tensor.constant_bytes is None and tensor.dtype not in ("int32", "int64") for tensor in read):
            return
        matrices = [math.prod(_fixed(tensor)[-2:]) for tensor in read if tensor.constant_bytes and _is_matrix(tensor)]
        if not matrices:
            return
        op, weights = "".join(_WORD.findall(call.name)), self._names.weights(call.layers)
        for written in map(self._tensor, call.outputs):
            size = math.prod(_fixed(written)[-2:])
            own = [weight for weight in weights if math.prod(self._names.shape(weight)[-2:]) == size]
            if size >= min(matrices):
                yield "+".join(own or weights) or "weights", op, self._bytes(written)

    def _tensor(self, name: str) -> Tensor:
        return self._program.tensors[name]

    def _bytes(self, tensor: Tensor) -> int | None:
        sizes = [dim if isinstance(dim, int) else self._sizes.get(dim) for dim in tensor.dims]
        known = [size for size in sizes if size is not None]
        return None if len(known) < len(sizes) else math.prod(known) * _BITS[tensor.dtype] // 8


def _largest(program: Program, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The largest value of each number that an input of the graph has as its size."""
    sizes: dict[str, int] = {}
    for tensor in program.tensors.values():
        shape = shapes.get(_SUFFIX.sub("", tensor.name), ())
        if len(shape) == len(tensor.dims):
            sizes |= {dim: size for dim, size in zip(tensor.dims, shape, strict=True) if isinstance(dim, str)}
    return sizes


def _longest_path(program: Program) -> Iterator[Call]:
    """The launches of a step; where it branches, of the branch that has more.

    Branches meet at a label that may be gone, when its block became one with what follows: the next block then that
    none jumps to.
    """
    labels = list(program.blocks)
    aims = {label: [target for call in program.blocks[label] for target in call.targets] for label in labels}
    joined = {target for targets in aims.values() for target in targets}
    best: dict[str, list[Call]] = {}
    for index in reversed(range(len(labels))):
        label, later = labels[index], labels[index + 1 :]
        meeting = next((other for other in later if other not in joined), None)
        following = [target if target in best else meeting for target in aims[label]] or later[:1]
        behind = max((best[target] for target in following if target is not None), key=len, default=[])
        best[label] = [call for call in program.blocks[label] if call.op in _LAUNCHES] + behind
    yield from best[labels[0]]


def _origin(program: Program, name: str) -> str:
    """The tensor that comes into a fused kernel and that one of its own was made of: of the largest input."""
    makers = {output: call for call in program.calls for output in call.outputs}
    while name in makers and makers[name].op != _PRODUCT:
        inputs = makers[name].inputs
        name = max(inputs, key=lambda input_name: _elements(program.tensors[input_name]))
    return name


def _elements(tensor: Tensor) -> int:
    """Those that the fixed sizes make."""
    return math.prod(_fixed(tensor))


def _fixed(tensor: Tensor) -> list[int]:
    return [dim for dim in tensor.dims if isinstance(dim, int)]


def _is_matrix(tensor: Tensor) -> bool:
    return sum(size > 1 for size in _fixed(tensor)) > 1


def _words(call: Call) -> frozenset[str]:
    return frozenset(_WORD.findall(call.name)) if call.op == "function" else frozenset()


def _alike(found: Iterable[_Fact]) -> Iterator[tuple[_Fact, int]]:
    """Each of those that differ in the layer's number of their name alone once, with their number, as each came first.

    What is of one layer keeps its number.
    """
    groups: dict[Any, list[_Fact]] = {}
    for fact in found:
        groups.setdefault((_NUMBER.sub("*", str(fact[0])), *fact[1:]), []).append(fact)
    for starred, facts in groups.items():
        yield (facts[0] if len(set(facts)) == 1 else starred), len(facts)
