"""Checkpoints whose linears are codes, drawn at random: what a reader of GPTQ, AWQ or compressed-tensors gives.

What they stand for is worked out here element by element, apart from `exporter.checkpoint.encoding`, and put into a
transformers model in fp32.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import TensorInfo, TokenizerFiles
from qwen_aot.exporter.checkpoint.encoding import CodeForm, CodeType, EncodedRows, Encoding
from qwen_aot.exporter.checkpoint.hf.config import parse
from tests import e4m3
from tests.checkpoints import tiny_config, tiny_model
from tests.exporter.checkpoint.test_formats import load
from tests.gguf_files import hugging_face_state

HALF, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
LINEAR = re.compile(r"layers\.\d+\.(self_attn|mlp)\..*_proj\.weight$")
# Order of columns: the tensor's own; one for all that read the same input; one for each tensor; of output projections
# one that keeps each head together, all heads alike.
Permuted = Literal["no", "by input", "by tensor", "within heads"]
SHAPE: dict[str, Any] = {"hidden": 128, "intermediate": 160, "heads": 4, "kv_heads": 2, "head_dim": 32}
MOE: dict[str, Any] = {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 160}
WHOLE_ROW = 1 << 30  # a group size that every row is less than


@dataclass(frozen=True, slots=True)
class Coding:
    """How tensors are stored."""

    bits: int = 4
    group_size: int = 128
    zero_points: bool = False
    permuted: Permuted = "no"
    scale_dtype: np.dtype[Any] = HALF
    offsets: bool = False
    input_scale: float | None = None  # a number of float16
    code_type: CodeType = CodeType.INTEGER

    def form(self, width: int) -> CodeForm:
        return CodeForm(
            self.bits,
            min(self.group_size, width),
            self.scale_dtype,
            self.zero_points,
            self.permuted != "no",
            has_offsets=self.offsets,
            has_input_scale=self.input_scale is not None,
            code_type=self.code_type,
        )


def rng_of(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def drawn_rows(coding: Coding, name: str, shape: tuple[int, int], head_dim: int) -> EncodedRows:
    """Random codes of one tensor; zero points are 0, the largest code, and all between."""
    rows, width = shape
    form, rng, top = coding.form(width), rng_of(name, coding.bits), (1 << coding.bits) - 1
    groups = -(-width // form.group_size)
    is_float = coding.code_type is CodeType.E4M3
    codes = rng.choice(e4m3.CODES, shape).astype(np.uint8) if is_float else rng.integers(0, top + 1, shape, np.uint8)
    middle = 1 << (coding.bits - 1)
    zeros = None
    if coding.zero_points:
        near = np.clip(np.rint(rng.normal(middle, middle / 8, (rows, groups))), 0, top)
        zeros = near.astype(np.uint8)
        zeros[0], zeros[1], zeros[2 % rows] = 0, top, middle
    deviation = float(np.std(e4m3.NUMBERS)) if is_float else 0.58 * middle
    size = 1.2 * width**-0.5 / deviation  # a weight's deviation is then that of `tiny_model`
    scales = (size * rng.uniform(0.7, 1.4, (rows, groups))).astype(coding.scale_dtype)
    offsets = None
    if coding.offsets:  # a minimum is an fp16 number, and an offset a few codes from it
        minimums = (-middle * scales.astype(np.float64) * rng.uniform(0.8, 1.2, scales.shape)).astype(np.float16)
        offsets = minimums.astype(np.float64) + middle * scales.astype(np.float64)
    permutation = _permutation(coding.permuted, name, width, head_dim)
    return EncodedRows(form, codes, scales, zeros, permutation, offsets, coding.input_scale)


def _permutation(permuted: Permuted, name: str, width: int, head_dim: int) -> NDArray[np.int64] | None:
    if permuted == "no":
        return None
    if permuted == "within heads" and "o_proj" in name:
        heads = np.arange(width // head_dim)[:, None] * head_dim
        return (heads + rng_of("heads", name).permutation(head_dim)).reshape(-1)
    if permuted != "by tensor":  # q, k and v read one input, gate and up (of all experts) another
        name = re.sub(r"[qkv]_proj", "qkv", re.sub(r"(experts\.\d+\.)?(gate|up)_proj", "gate_up", name))
    return rng_of("order", name).permutation(width)


def values_of(rows: EncodedRows) -> NDArray[np.float32]:
    """(code - zero point) * scale, one fp32 product, and the offset added in fp64, in the tensor's own columns."""
    if rows.form.code_type is CodeType.E4M3:
        numbers = np.vectorize(e4m3.number, otypes=[np.float32])(rows.codes)
        return np.asarray(numbers * np.repeat(rows.scales.astype(np.float32), rows.form.group_size, 1))
    out = np.empty(rows.codes.shape, np.float32)
    for k in range(rows.codes.shape[1]):
        group = k // rows.form.group_size
        zero = 1 << (rows.form.bits - 1) if rows.zero_points is None else rows.zero_points[:, group].astype(np.int32)
        column = k if rows.permutation is None else rows.permutation[k]
        product = (rows.codes[:, k].astype(np.int32) - zero).astype(np.float32) * rows.scales[:, group].astype(
            np.float32
        )
        offset = 0.0 if rows.offsets is None else rows.offsets[:, group]
        out[:, column] = product.astype(np.float64) + offset
    return out


class CodedCheckpoint:
    """A random tiny model in codes; see `exporter.checkpoint.base.Checkpoint`.

    Attributes:
        model: in fp32, with the values that all tensors stand for.
        coded: the codes of each tensor that has them; a test may change them, and call `remake`.
    """

    def __init__(
        self,
        coding: Coding | Callable[[str], Coding | None],
        *,
        plain_dtype: Any = np.float16,
        fixes_precision: bool = True,
        **config: Any,
    ) -> None:
        facts = tiny_config(**(SHAPE | config))
        self.path, self.name, self.tokenizer = Path("coded"), "coded", TokenizerFiles()
        self.config = parse(facts.to_dict() | {"model_type": facts.model_type})
        self.model: Any = tiny_model(facts)
        self.plain: dict[str, NDArray[Any]] = {}
        self.coded: dict[str, EncodedRows] = {}
        self._fixes = fixes_precision
        for name, array in hugging_face_state(self.model).items():
            own = coding if isinstance(coding, Coding) else coding(name)
            if own is not None and (LINEAR.search(name) or not isinstance(coding, Coding)):
                self.coded[name] = drawn_rows(own, name, array.shape, self.config.head_dim)
            else:
                self.plain[name] = array.astype(plain_dtype)
        self.remake()

    def remake(self) -> None:
        """Gives the model the values that the codes stand for now."""
        self.values = {name: array.astype(np.float32) for name, array in self.plain.items()}
        self.values |= {name: values_of(rows) for name, rows in self.coded.items()}
        load(self.model, self.values)

    def change(self, kind: str, name: str = "model.layers.1.self_attn.q_proj.weight") -> None:
        """Changes one number of a tensor's codes, and the model: the negative control of what compares them.

        `kind`: "zero point", "one code", "one scale", "one offset", "two columns", or "one order": that of a k
        projection for a q's.
        """
        rows = self.coded[name]
        zeros, codes, scales, order = (
            np.array(part) for part in (rows.zero_points, rows.codes, rows.scales, rows.permutation)
        )
        offsets = None if rows.offsets is None else np.array(rows.offsets)
        if kind == "zero point":
            zeros[5, 2] ^= 1
        elif kind == "one code":
            codes[5, 40] ^= 1
        elif kind == "one scale":
            scales[5, 3] *= np.float16(1.5)
        elif kind == "one offset":
            assert offsets is not None
            offsets[5, 2] += 2.0**-12
        elif kind == "two columns":
            order[[3, 90]] = order[[90, 3]]
        else:
            assert kind == "one order"
            order = np.array(self.coded[name.replace("q_proj", "k_proj")].permutation)
        self.coded[name] = replace(
            rows,
            zero_points=None if rows.zero_points is None else zeros,
            codes=codes,
            scales=scales,
            permutation=None if rows.permutation is None else order,
            offsets=offsets,
        )
        self.remake()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        def info(name: str) -> TensorInfo:
            if name in self.plain:
                return TensorInfo(name, self.plain[name].shape, self.plain[name].dtype)
            rows = self.coded[name]
            encoding = Encoding(
                f"test-int{rows.form.bits}-g{rows.form.group_size}", rows.form, fixes_precision=self._fixes
            )
            return TensorInfo(name, rows.codes.shape, np.dtype(np.float32), encoding=encoding)

        return {name: info(name) for name in self.values}

    @property
    def source(self) -> Mapping[str, str]:
        return {"format": "test", "path": self.name, "sha256": "0" * 64}

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        return (self.plain.get(name, self.values[name]))[rows or slice(None)]

    def read_encoded(self, name: str, rows: slice | None = None) -> EncodedRows:
        if name not in self.coded:
            raise CheckpointError(f"{name} has no codes")
        whole, part = self.coded[name], rows or slice(None)
        zeros = None if whole.zero_points is None else whole.zero_points[part]
        offsets = None if whole.offsets is None else whole.offsets[part]
        return replace(whole, codes=whole.codes[part], scales=whole.scales[part], zero_points=zeros, offsets=offsets)

    def close(self) -> None:
        pass

    def __enter__(self) -> CodedCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def mixed(name: str) -> Coding | None:
    """4 and 8 bits, groups of three sizes, with zero points and without; k, and the first layer's gate, are numbers."""
    if not LINEAR.search(name) or "k_proj" in name or "0.mlp.gate_proj" in name:
        return None
    if "v_proj" in name or "down_proj" in name:
        return Coding(8, 32)
    return Coding(4, 64, zero_points="o_proj" in name or "up_proj" in name)


def with_minimums(name: str) -> Coding | None:
    """As a GGUF file: some types have minimums and some don't, in one stack too; so has the embedding."""
    if "embed_tokens" in name:
        return Coding(4, 32, offsets=True)
    if not LINEAR.search(name):
        return None
    if "v_proj" in name or "down_proj" in name:
        return Coding(6, 16, scale_dtype=np.dtype(np.float32))
    return Coding(5 if "o_proj" in name else 4, 32, offsets=True)


CODINGS: dict[str, Coding | Callable[[str], Coding | None]] = {
    "4 bits": Coding(),
    "8 bits": Coding(8),
    "4 bits, zero points": Coding(4, 32, zero_points=True),
    "8 bits, zero points": Coding(8, 64, zero_points=True),
    "whole rows": Coding(4, WHOLE_ROW),
    "whole rows of 8 bits, zero points": Coding(8, WHOLE_ROW, zero_points=True),
    "3 bits": Coding(3, 64),
    "bf16 scales": Coding(4, 128, scale_dtype=BF16),
    "one order an input": Coding(4, 64, permuted="by input"),
    "an order of its own each": Coding(4, 32, zero_points=True, permuted="by tensor"),
    "orders within heads": Coding(8, 32, permuted="within heads"),
    "whole rows in order": Coding(4, WHOLE_ROW, permuted="by input"),
    "mixed": mixed,
    "minimums": Coding(4, 32, offsets=True),
    "minimums and not": with_minimums,
}

# Each form once; the others repeat them in other sizes.
FIRST = (
    "4 bits",
    "8 bits, zero points",
    "whole rows",
    "one order an input",
    "an order of its own each",
    "mixed",
    "minimums and not",
)


def codings(*left_out: str) -> list[Any]:
    """Names of CODINGS, those beyond FIRST marked `deep`."""
    return [
        pytest.param(name, marks=() if name in FIRST else pytest.mark.deep) for name in CODINGS if name not in left_out
    ]
