"""GGUF's codes as they are read, against the gguf package and against the block structs by hand."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.encoding import dequantize
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import tiny_config, tiny_model
from tests.exporter.checkpoint.gguf.test_reader import coded_rows, one_matrix
from tests.gguf_files import save_gguf

NAME = "model.embed_tokens.weight"
# Bits, group size, dtype of scales, whether there are minimums.
FORMS = {
    "Q8_0": (8, 32, "float16", False),
    "Q4_0": (4, 32, "float16", False),
    "Q4_1": (4, 32, "float16", True),
    "Q5_0": (5, 32, "float16", False),
    "Q5_1": (5, 32, "float16", True),
    "Q2_K": (2, 16, "float32", True),
    "Q3_K": (3, 16, "float32", False),
    "Q4_K": (4, 32, "float32", True),
    "Q5_K": (5, 32, "float32", True),
    "Q6_K": (6, 16, "float32", False),
}


@pytest.mark.parametrize("kind", FORMS)
def test_codes_stand_for_what_the_gguf_package_reads(kind: str, tmp_path: Path) -> None:
    coded = coded_rows(Type[kind], 9, 512)
    with open_checkpoint(one_matrix(tmp_path, Type[kind], coded, 512)) as checkpoint:
        encoding = checkpoint.tensors[NAME].encoding
        assert encoding is not None and encoding.form is not None
        assert encoding.name == f"gguf-{kind.lower()}"
        form = encoding.form
        assert (form.bits, form.group_size, form.scale_dtype.name, form.has_offsets) == FORMS[kind]
        assert not (form.has_zero_points or form.has_permutation)
        for rows in (None, slice(0, 1), slice(3, 8), slice(8, 40)):
            encoded = checkpoint.read_encoded(NAME, rows)
            assert encoded.form == form
            assert encoded.codes.dtype == np.uint8 and encoded.scales.dtype == form.scale_dtype
            assert encoded.codes.max() < 1 << form.bits
            expected = gguf.dequantize(coded[rows or slice(None)], Type[kind])
            np.testing.assert_array_equal(dequantize(encoded), expected)
            np.testing.assert_array_equal(checkpoint.read(NAME, rows), expected)


def test_codes_and_scales_are_the_bytes_of_the_file(tmp_path: Path) -> None:
    coded = coded_rows(Type.Q8_0, 5, 64)
    with open_checkpoint(one_matrix(tmp_path, Type.Q8_0, coded, 64)) as checkpoint:
        encoded = checkpoint.read_encoded(NAME)
    for row, block in np.ndindex(5, 2):
        stored = coded[row, block * 34 : block * 34 + 34]
        assert encoded.scales[row, block].tobytes() == stored[:2].tobytes()
        signed = encoded.codes[row, block * 32 : block * 32 + 32].astype(np.int16) - 128
        np.testing.assert_array_equal(signed, stored[2:].view(np.int8))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2moe"])
def test_rows_have_the_order_of_hugging_face(architecture: str, kind: str, tmp_path: Path) -> None:
    """Rotary rows of a llama file, experts of a mixture."""
    sizes = {"moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}}
    model = tiny_model(tiny_config(kv_heads=2, **(sizes if architecture == "qwen2moe" else {})))
    written = save_gguf(tmp_path / "m.gguf", model, architecture, kind=Type[kind])
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        encoded = [name for name, info in checkpoint.tensors.items() if info.encoding is not None]
        assert len(encoded) > 14
        for name in encoded:
            np.testing.assert_array_equal(dequantize(checkpoint.read_encoded(name)), written[name], err_msg=name)
        q = next(name for name in encoded if ".q_proj." in name)
        np.testing.assert_array_equal(dequantize(checkpoint.read_encoded(q, slice(3, 21))), written[q][3:21])


def test_plain_numbers_have_no_codes(tmp_path: Path) -> None:
    with open_checkpoint(one_matrix(tmp_path, Type.Q4_1, coded_rows(Type.Q4_1, 4, 256), 256)) as checkpoint:
        assert checkpoint.tensors["model.norm.weight"].encoding is None
        for name in ("model.norm.weight", "x"):
            with pytest.raises(CheckpointError, match=f"tensor '{name}' isn't stored as codes that can be read"):
                checkpoint.read_encoded(name)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
def test_a_minimum_is_an_offset_from_the_middle_code(kind: str, tmp_path: Path) -> None:
    """Worked out in exact fractions: blocks begin with the scale and the minimum, both fp16."""
    coded = coded_rows(Type[kind], 6, 64)
    size = coded.shape[1] // 2
    with open_checkpoint(one_matrix(tmp_path, Type[kind], coded, 64)) as checkpoint:
        encoded = checkpoint.read_encoded(NAME)
    assert encoded.offsets is not None and encoded.offsets.dtype == np.float64
    for row, block in np.ndindex(6, 2):
        stored = coded[row, block * size : block * size + 4].view(np.float16)
        scale, minimum = (Fraction(float(number)) for number in stored)
        assert encoded.scales[row, block] == stored[0]
        assert Fraction(float(encoded.offsets[row, block])) == encoded.form.middle * scale + minimum


@pytest.mark.parametrize("sizes", [(2.0**-24, 65504.0), (65504.0, 2.0**-24), (0.0, 1.5), (-0.25, 2.0**-20)])
def test_scales_and_minimums_of_any_size_are_read_exactly(sizes: tuple[float, float], tmp_path: Path) -> None:
    coded = coded_rows(Type.Q4_1, 4, 32)
    coded[:, :4] = np.array(sizes, np.float16).view(np.uint8)
    with open_checkpoint(one_matrix(tmp_path, Type.Q4_1, coded, 32)) as checkpoint:
        read = dequantize(checkpoint.read_encoded(NAME))
    np.testing.assert_array_equal(read, gguf.dequantize(coded, Type.Q4_1))
