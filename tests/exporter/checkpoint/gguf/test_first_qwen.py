"""GGUF files of architecture `qwen`, written by the gguf package from the published names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from qwen_aot.engines.verify.reference import Reference
from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.model.tensors import tensor_shapes
from qwen_aot.exporter.weights.sources import check_headers
from tests.exporter.lowering.lowerings import export
from tests.exporter.stepper import Stepper
from tests.first_qwen import CONFIG, HEADS, HIDDEN, LAYERS, POSITIONS, VOCAB, WIDTH, Statement, make_weights

# What convert_hf_to_gguf.py writes of a QWenLMHeadModel.
FACTS: Mapping[str, Any] = {
    "context_length": POSITIONS,
    "block_count": LAYERS,
    "embedding_length": HIDDEN,
    "feed_forward_length": 2 * WIDTH,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": HIDDEN // HEADS,
    "attention.head_count": HEADS,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
PLAIN = {**CONFIG, "use_logn_attn": False, "use_dynamic_ntk": False}  # what llama.cpp computes of such a file


def write(path: Path, kind: Type = Type.F32, **changed: Any) -> dict[str, np.ndarray]:
    """Writes the tiny checkpoint; gives its tensors as the file has them, dequantized, by their published names."""
    writer = gguf.GGUFWriter(path, "qwen")
    for key, value in (FACTS | changed).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"qwen.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN, LAYERS)
    weights = {}
    for name, array in make_weights().items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        used = kind if array.ndim > 1 else Type.F32
        data = gguf.quantize(array, used)
        writer.add_tensor(target, data, raw_dtype=used)
        weights[name] = gguf.dequantize(data, used).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0])
def test_every_tensor_has_its_place(kind: Type, tmp_path: Path) -> None:
    weights = write(tmp_path / "it.gguf", kind)
    with open_checkpoint(tmp_path / "it.gguf") as checkpoint:
        check_headers(checkpoint)
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == tensor_shapes(checkpoint.config)
        config = checkpoint.config
        assert (config.model_type, config.intermediate_size, config.attention_bias) == ("qwen", WIDTH, True)
        assert (config.logn_attn_length, config.dynamic_ntk_length) == (None, None)
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = slice(part * HIDDEN, (part + 1) * HIDDEN)
            for last in ("weight", "bias"):
                found = checkpoint.read(f"model.layers.1.self_attn.{name}.{last}").astype(np.float32)
                np.testing.assert_array_equal(found, weights[f"transformer.h.1.attn.c_attn.{last}"][rows])
            some = checkpoint.read(f"model.layers.1.self_attn.{name}.weight", slice(3, 9)).astype(np.float32)
            np.testing.assert_array_equal(some, weights["transformer.h.1.attn.c_attn.weight"][rows][3:9])
        for ours, theirs in (("gate_proj", "w2"), ("up_proj", "w1"), ("down_proj", "c_proj")):
            found = checkpoint.read(f"model.layers.0.mlp.{ours}.weight").astype(np.float32)
            np.testing.assert_array_equal(found, weights[f"transformer.h.0.mlp.{theirs}.weight"])


def test_parts_of_a_plain_tensor_have_spans(tmp_path: Path) -> None:
    write(tmp_path / "it.gguf")
    with open_checkpoint(tmp_path / "it.gguf") as checkpoint:
        for part in "qkv":
            for last in ("weight", "bias"):
                info = checkpoint.tensors[f"model.layers.1.self_attn.{part}_proj.{last}"]
                assert info.span is not None
                content = info.span.path.read_bytes()[info.span.offset : info.span.offset + info.span.length]
                assert content == checkpoint.read(info.name).tobytes()


def test_it_computes_what_the_published_model_does_up_to_the_trained_length(tmp_path: Path) -> None:
    weights = write(tmp_path / "it.gguf")
    ids = np.random.default_rng(0).integers(0, VOCAB, 100)
    wanted = Statement(weights, PLAIN).logits(ids.tolist())
    stepper = Stepper(export(tmp_path / "it.gguf", tmp_path / "ort", "ort"), rows=1, capacity=POSITIONS)
    np.testing.assert_allclose(stepper.step([ids.tolist()])[0], wanted[-1], atol=1e-3)
    with open_checkpoint(tmp_path / "it.gguf") as checkpoint:
        np.testing.assert_allclose(Reference(checkpoint).logits(ids, 0), wanted, atol=1e-3)


def test_what_the_file_does_not_say_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "it.gguf")
    with caplog.at_level(logging.WARNING), open_checkpoint(tmp_path / "it.gguf"):
        pass
    assert "neither how many of them the model was trained at nor how it goes beyond (use_logn_attn" in caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"feed_forward_length": 193}, "qwen.feed_forward_length is 193; accepted: even numbers"),
        ({"attention.head_count": 3}, "qwen.embedding_length is 64, not a multiple of attention.head_count"),
        ({"rope.dimension_count": 8}, r"qwen.rope.dimension_count is 8; not supported; accepted: the head size \(16\)"),
        ({"attention.head_count_kv": 2}, r"'blk.0.attn_qkv.weight' has shape \[192, 64\]; accepted: 128 rows"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "it.gguf", **changed)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "it.gguf")
