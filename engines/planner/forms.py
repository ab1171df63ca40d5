"""How each target and precision stores each kind of weight."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from qwen_aot.engines.spec.build_spec import BuildSpec

COMPUTE_BYTES = {"FLOAT": 4, "FLOAT16": 2, "BFLOAT16": 2}


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix [N, K] is stored.

    Attributes:
        bits: of an element or its code.
        scale_bytes: of one scale; 0: not quantized.
        block_size: elements along K that share a scale; None: the whole row.
        fills_blocks: a row's last block is stored whole, however much of it is used.
        zero_point_bits: of a block's zero point, packed row by row; 0: none.
    """

    bits: int
    scale_bytes: int = 0
    block_size: int | None = None
    fills_blocks: bool = False
    zero_point_bits: int = 0

    def bytes_of(self, rows: int, width: int) -> int:
        """Of a matrix [rows, width]."""
        block = self.block_size or width
        blocks = -(-width // block)
        stored = blocks * block if self.fills_blocks else width
        zero_points = -(-blocks * self.zero_point_bits // 8)
        return -(-rows * stored * self.bits // 8) + rows * (blocks * self.scale_bytes + zero_points)


@dataclass(frozen=True, slots=True)
class Part:
    """Some weights: bytes that lie in memory, and bytes that a decode step reads of them."""

    stored: int
    read: int

    @classmethod
    def whole(cls, size: int) -> Part:
        """A step reads all of it."""
        return cls(size, size)

    def __mul__(self, count: int) -> Part:
        return Part(self.stored * count, self.read * count)


@dataclass(frozen=True, slots=True)
class Forms:
    """How one target and precision stores each kind of weight.

    Attributes:
        plain: biases: the compute type.
        deciding: routers and gates.
        rotary: the rotary tables.
        embedding, head, down, projection, expert: the matrices of these names; `down` are the down projections of
            dense MLPs and shared experts.
        shares_tied_head: the head reads the embedding's own bytes where the model ties them.
        channels: a second form of the projections, for prefill alone; None: there is none.
    """

    plain: Form
    deciding: Form
    rotary: Form
    embedding: Form
    head: Form
    down: Form
    projection: Form
    expert: Form
    shares_tied_head: bool = True
    channels: Form | None = None


def is_blockwise(spec: BuildSpec) -> bool:
    """Whether the weights are ONNX Runtime's blocks (`exporter.quantize`)."""
    return spec.precision.row.is_quantized and spec.facts.weight_layout == "blocks"


def deciding_bits(spec: BuildSpec) -> int:
    """Of a number of routers and gates: TensorRT's standard lowering has them in fp32."""
    is_standard = spec.facts.weight_layout == "dequantized" and "plugin" not in (spec.attention, spec.moe, spec.linear)
    return 32 if is_standard else 8 * COMPUTE_BYTES[spec.combination.compute_type]


def weight_forms(spec: BuildSpec) -> Forms:
    """How a build of `spec` stores each kind of weight."""
    plain = Form(8 * COMPUTE_BYTES[spec.combination.compute_type])
    if is_blockwise(spec):
        return _block_forms(spec, plain)
    # RotaryEmbedding wants its tables in the type of its input, so they are cast when they are written; the plugin
    # reads fp32.
    rotary = Form(32) if spec.attention == "plugin" else plain
    forms = Forms(plain, Form(deciding_bits(spec)), rotary, plain, plain, plain, plain, plain)
    if spec.precision.row.is_quantized:
        weights = Form(spec.precision.row.bits, plain.bits // 8, spec.effective_block_size)
        forms = dataclasses.replace(forms, down=weights, projection=weights, expert=weights)
        if spec.tensorrt.quantize_head:
            forms = dataclasses.replace(forms, head=weights, shares_tied_head=False)
    return forms


def _block_forms(spec: BuildSpec, plain: Form) -> Forms:
    """Blocks, filled up; the embedding's zero points are a byte each, the others' packed.

    Some targets want the embedding's zero points in any case.
    """

    def blocks(bits: int, zero_point_bits: int, *, always: bool = False) -> Form:
        zero_points = zero_point_bits if always or not spec.symmetric else 0
        return Form(bits, plain.bits // 8, spec.effective_block_size, fills_blocks=True, zero_point_bits=zero_points)

    bits, sensitive = spec.precision.row.bits, spec.effective_sensitive_bits
    assert sensitive is not None
    return Forms(
        plain=plain,
        deciding=plain,
        rotary=plain,
        embedding=blocks(sensitive, 8, always=spec.facts.always_zero_points),
        head=blocks(sensitive, sensitive),
        down=blocks(sensitive, sensitive),
        projection=blocks(bits, bits),
        expert=blocks(bits, bits),
        channels=Form(8, 4) if spec.fast_prefill else None,
    )
