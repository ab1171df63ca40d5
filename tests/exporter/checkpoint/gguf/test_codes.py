"""GGUF's codes as they are read, against the gguf package and against the block structs by hand."""

from __future__ import annotations

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
FORMS = {"Q8_0": (8, 32, "float16"), "Q4_0": (4, 32, "float16"), "Q5_0": (5, 32, "float16"), "Q6_K": (6, 16, "float32")}


@pytest.mark.parametrize("kind", FORMS)
def test_codes_stand_for_what_the_gguf_package_reads(kind: str, tmp_path: Path) -> None:
    coded = coded_rows(Type[kind], 9, 512)
    with open_checkpoint(one_matrix(tmp_path, Type[kind], coded, 512)) as checkpoint:
        encoding = checkpoint.tensors[NAME].encoding
        assert encoding is not None and encoding.form is not None
        assert encoding.name == f"gguf-{kind.lower()}"
        form = encoding.form
        assert (form.bits, form.group_size, form.scale_dtype.name) == FORMS[kind]
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


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0"])
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


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K"])
def test_types_with_minimums_are_named_and_read_as_floats_only(kind: str, tmp_path: Path) -> None:
    with open_checkpoint(one_matrix(tmp_path, Type[kind], coded_rows(Type[kind], 4, 256), 256)) as checkpoint:
        encoding = checkpoint.tensors[NAME].encoding
        assert encoding is not None and encoding.form is None
        assert encoding.name == f"gguf-{kind.lower()}"
        with pytest.raises(CheckpointError, match=f"{NAME}' isn't stored as codes that can be read; read it as floats"):
            checkpoint.read_encoded(NAME)
        with pytest.raises(CheckpointError, match="tensor 'x' isn't stored as codes"):
            checkpoint.read_encoded("x")
        assert checkpoint.tensors["model.norm.weight"].encoding is None
