"""Matrices as tensors of each format: the words of an independent packer, and what public libraries read in them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_aot.exporter.checkpoint.encoding import CodeForm, EncodedRows, dequantize
from qwen_aot.exporter.checkpoint.hf.quantized.words import pack, unpack
from qwen_aot.exporter.checkpoint.hf.saving.formats import SAVED_FORMATS
from tests.golden.make_saved import codes_of
from tests.quantized_files import Codes, Parts, awq, compressed_tensors, gptq, word
from tests.saved_folders import HALF, drawn, form

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[4] / "golden" / "saved.json").read_text(encoding="utf-8")
)
DTYPES = {"F16": np.float16, "I32": np.int32, "I64": np.int64}


def independent(rows: EncodedRows) -> Codes:
    k = rows.codes.shape[1]
    zeros = rows.zero_points if rows.zero_points is not None else np.full(rows.scales.shape, 2 ** (rows.form.bits - 1))
    groups = np.arange(k) // rows.form.group_size
    return Codes(rows.form.bits, rows.codes.astype(np.int64), zeros.astype(np.int64), rows.scales, groups)


PACKERS: dict[str, Callable[[EncodedRows], Parts]] = {
    "gptq": lambda rows: gptq(independent(rows), word if rows.form.has_zero_points else _v1),
    "awq": lambda rows: awq(independent(rows)),
    "compressed-tensors": lambda rows: compressed_tensors(independent(rows), symmetric=not rows.form.has_zero_points),
}


def _v1(zeros: list[int], bits: int) -> int:
    return word([zero - 1 for zero in zeros], bits)


@pytest.mark.parametrize("name", SAVED_FORMATS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_the_words_are_an_independent_packers(name: str, data: st.DataObject) -> None:
    bits = 4 if name == "awq" else data.draw(st.sampled_from([4, 8]))
    has_zeros = name == "awq" or data.draw(st.booleans())
    whole = 1 if name == "compressed-tensors" else 8
    n = whole * data.draw(st.integers(1, 4))
    group_size = whole * data.draw(st.integers(1, 3))
    k = group_size * data.draw(st.integers(1, 4))
    rows = drawn(form(bits, group_size, zero_points=has_zeros), (n, k), data.draw(st.integers(0, 99)))
    ours, theirs = SAVED_FORMATS[name].pack(rows), PACKERS[name](rows)
    assert ours.keys() == theirs.keys()
    for part, array in ours.items():
        assert array.dtype == theirs[part].dtype, part
        assert array.shape == theirs[part].shape, part
        assert array.tobytes() == np.ascontiguousarray(theirs[part]).tobytes(), part


def test_another_zero_gives_other_words() -> None:
    rows = drawn(form(zero_points=True), (8, 32))
    before = SAVED_FORMATS["awq"].pack(rows)["qzeros"].copy()
    assert rows.zero_points is not None
    rows.zero_points[3, 0] ^= 1
    assert (SAVED_FORMATS["awq"].pack(rows)["qzeros"] != before).any()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['read_by']} {case['form']}")
def test_public_libraries_read_the_very_values(case: dict[str, Any]) -> None:
    bits, group_size, zero_points = case["form"]
    n, k = case["shape"]
    rows = codes_of(CodeForm(bits, group_size, HALF, zero_points), n, k, case["seed"])
    packed = SAVED_FORMATS[case["format"]].pack(rows)
    assert packed.keys() == case["tensors"].keys()
    for part, tensor in case["tensors"].items():
        assert packed[part].dtype == DTYPES[tensor["dtype"]]
        assert list(packed[part].shape) == tensor["shape"]
        assert packed[part].tobytes() == base64.b64decode(tensor["data"]), part
    values = np.frombuffer(base64.b64decode(case["values"]), np.float16)
    assert dequantize(rows).astype(np.float16).tobytes() == values.tobytes()
    rows.codes[0, 0] ^= 1
    assert dequantize(rows).astype(np.float16).tobytes() != values.tobytes()


@given(bits=st.sampled_from([4, 8]), lead=st.integers(1, 3), n=st.integers(0, 40), seed=st.integers(0, 9))
def test_unpack_undoes_pack(bits: int, lead: int, n: int, seed: int) -> None:
    fields = np.random.default_rng(seed).integers(0, 2**bits, (lead, n)).astype(np.uint8)
    for each in (fields, np.asfortranarray(fields)):
        words = pack(each, bits)
        assert words.shape == (lead, -(-n * bits // 32))
        assert words.flags.c_contiguous
        unpacked = unpack(words, bits)
        assert np.array_equal(unpacked[:, :n], fields)
        assert not unpacked[:, n:].any()
