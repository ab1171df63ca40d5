"""What a compiler made of one step: its kernels, the types of its matrix products, what it copies.

Facts for people and tests (has a product fallen back to 16 bits, is the cache copied before attention?): nothing at
run time depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.checks import MAX_BYTES, require_counts, require_one_of, require_within

__all__ = ["PRODUCT_DTYPES", "MatrixProduct", "PlanTensor", "StepPlan"]

PRODUCT_DTYPES = (
    "float32",
    "tfloat32",
    "float16",
    "bfloat16",
    "float8_e4m3",
    "float4_e2m1",
    "int32",
    "int8",
    "int4",
)


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """Matrix products alike, as one kernel does each: left × right -> output.

    Attributes:
        name: as the engine says it, with * for a layer's number where `count` is of several layers.
        left: element type that the kernel reads, one of PRODUCT_DTYPES; of the activations, where there are any.
        right: the same of the other operand; of the weight, where there is one.
        output: element type that it writes.
        count: how many.
    """

    name: str
    left: str
    right: str
    output: str
    count: int

    def __post_init__(self) -> None:
        for name in ("left", "right", "output"):
            require_one_of(f"{name} of the matrix product {self.name!r}", getattr(self, name), PRODUCT_DTYPES)
        require_counts(self, "count")


@dataclass(frozen=True, slots=True)
class PlanTensor:
    """Tensors alike that a step writes to device memory for another of its kernels.

    Attributes:
        name: as the engine says it, with * for a layer's number where `count` is of several layers.
        op: what writes it, in the engine's word ("Slice", "Transpose", ...).
        bytes: of one, at the largest sizes of the profile; None: the engine doesn't say.
        count: how many.
    """

    name: str
    op: str
    bytes: int | None
    count: int

    def __post_init__(self) -> None:
        require_within({f"bytes of {self.name!r}": self.bytes}, 0, MAX_BYTES)
        require_counts(self, "count")


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step of one profile.

    Attributes:
        kernels: launches, all together.
        layer_kernels: launches of each of the model's layers, in order; empty: the engine doesn't say whose they are.
        matrix_products: all of them.
        copies: tensors whose values exist elsewhere already, written only to be read again.
        weight_scratch: tensors as large as a weight: weights that are dequantized or laid out anew at each step.
    """

    kernels: int
    layer_kernels: tuple[int, ...]
    matrix_products: tuple[MatrixProduct, ...]
    copies: tuple[PlanTensor, ...]
    weight_scratch: tuple[PlanTensor, ...]

    def __post_init__(self) -> None:
        require_counts(self, "kernels", least=0)
        require_within({f"layer_kernels[{i}]": count for i, count in enumerate(self.layer_kernels)}, 0)
        if self.kernels < sum(self.layer_kernels):
            raise BundleError(
                f"kernels is {self.kernels}, and layer_kernels are {sum(self.layer_kernels)} together; accepted: at "
                "least as many"
            )
