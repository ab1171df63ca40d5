from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf import config as hf_config
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.model.tensors import tensor_shapes
from tests.checkpoints import tiny_config, tiny_model
from tests.gguf_files import hugging_face_state, save_gguf

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"kv_heads": 2}),
    "qwen2-tied": ("qwen2", {"tied": True}),
    "qwen2-head_dim": ("qwen2", {"head_dim": 32}),
    "qwen2moe": ("qwen2moe", {"moe": {}}),
    "llama": ("llama", {"kv_heads": 2}),
    "llama-tied-head_dim": ("llama", {"tied": True, "kv_heads": 1, "head_dim": 8}),
}
QUANTIZED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]  # those that the gguf package can quantize
K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize(("architecture", "shape"), LAYOUTS.values(), ids=LAYOUTS)
def test_gives_back_the_models_tensors(architecture: str, shape: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(tiny_config(**shape))
    path = tmp_path / "model.gguf"
    save_gguf(path, model, architecture)
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == tensor_shapes(config)
        expected = hugging_face_state(model)
        for name in checkpoint.tensors:
            np.testing.assert_array_equal(checkpoint.read(name), expected[name])
        assert config.attention_bias == (architecture != "llama")
        assert config.tie_word_embeddings == model.config.tie_word_embeddings
        assert config.head_dim == model.model.layers[0].self_attn.head_dim
        assert config.vocab_size == model.config.vocab_size
        assert config.rms_norm_eps == pytest.approx(model.config.rms_norm_eps, rel=1e-6)
        if config.moe is not None:
            assert config.moe.num_experts == 4
            assert config.moe.num_experts_per_tok == 2
            assert (config.moe.moe_intermediate_size, config.moe.shared_expert_intermediate_size) == (24, 40)
            assert not config.moe.norm_topk_prob
            assert config.moe.sparse_layers == {0, 1}
        assert checkpoint.source["format"] == "gguf"
        assert checkpoint.source["path"] == "model.gguf"
        assert not checkpoint.tokenizer.files


@pytest.mark.parametrize("kind", ["F16", "BF16", *QUANTIZED])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen2moe", "llama"])
def test_reads_every_type_as_the_gguf_package_dequantizes(architecture: str, kind: str, tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
    model = tiny_model(tiny_config(moe=sizes if architecture == "qwen2moe" else None, kv_heads=2))
    path = tmp_path / "model.gguf"
    written = save_gguf(path, model, architecture, kind=Type[kind])
    with open_checkpoint(path) as checkpoint:
        for name, values in written.items():
            array = checkpoint.read(name)
            assert array.dtype == checkpoint.tensors[name].dtype
            np.testing.assert_array_equal(array.astype(np.float32), values.astype(np.float32), err_msg=name)
        gate = "model.layers.0.self_attn.o_proj.weight"
        plain = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}
        assert checkpoint.tensors[gate].dtype == plain.get(kind, np.float32)
        # Quantizing costs at most half a step of the coarsest type: the values are the model's.
        original = hugging_face_state(model)[gate]
        assert np.abs(checkpoint.read(gate).astype(np.float32) - original).max() < 0.15 * np.abs(original).max()


def one_matrix(folder: Path, kind: Type, blocks: NDArray[np.uint8], width: int, *, bad: str = "") -> Path:
    """A llama file whose embedding is given as coded rows [rows, bytes]."""
    model = tiny_model(tiny_config(layers=1, hidden=width, heads=2, kv_heads=1, tied=True, vocab=len(blocks)))
    path = folder / "model.gguf"
    whole = folder / "whole.gguf"
    save_gguf(whole, model, "llama", without=("token_embd.weight",))
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith("llama."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=kind)
    for tensor in reader.tensors:
        writer.add_tensor(bad or tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        bad = ""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def coded_rows(kind: Type, rows: int, width: int) -> NDArray[np.uint8]:
    """Random rows of a quantized type whose fp16 scales are small and finite."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    coded = np.random.default_rng(1).integers(0, 256, (rows, width // block, block_bytes), dtype=np.uint8)
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for offset in scales.get(kind.name, (0, 2) if kind.name.endswith("_1") else (0,)):
        values = np.random.default_rng(offset).uniform(-0.1, 0.1, (rows, width // block)).astype(np.float16)
        coded[..., offset : offset + 2] = values[..., None].view(np.uint8)
    return coded.reshape(rows, -1)


def half(raw: NDArray[np.uint8]) -> float:
    return float(struct.unpack("<e", raw.tobytes())[0])


def by_hand_q8_0(block: NDArray[np.uint8]) -> list[float]:
    """fp16 scale, then 32 signed bytes."""
    return [half(block[:2]) * int(np.int8(code)) for code in block[2:]]


def by_hand_q4_0(block: NDArray[np.uint8]) -> list[float]:
    """fp16 scale, then 16 bytes: low nibbles are elements 0-15, high nibbles 16-31, both less 8."""
    codes = [int(byte) & 15 for byte in block[2:]] + [int(byte) >> 4 for byte in block[2:]]
    return [half(block[:2]) * (code - 8) for code in codes]


def by_hand_q4_k(block: NDArray[np.uint8]) -> list[float]:
    """Two fp16, 8 six-bit scales and 8 six-bit minimums in 12 bytes, then 256 nibbles in runs of 32."""
    d, dmin, packed = half(block[:2]), half(block[2:4]), [int(byte) for byte in block[4:16]]
    values: list[float] = []
    for group in range(8):
        if group < 4:
            scale, minimum = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6 << 4)
            minimum = (packed[group + 4] >> 4) | (packed[group] >> 6 << 4)
        run = block[16 + group // 2 * 32 :][:32]
        codes = [int(byte) >> 4 if group % 2 else int(byte) & 15 for byte in run]
        values += [d * scale * code - dmin * minimum for code in codes]
    return values


def by_hand_q6_k(block: NDArray[np.uint8]) -> list[float]:
    """128 bytes of low nibbles, 64 of high pairs, 16 signed scales, fp16 scale; codes less 32."""
    low, high, scales, d = block[:128], block[128:192], block[192:208].view(np.int8), half(block[208:])
    values = []
    for element in range(256):
        part, rest = divmod(element, 128)
        quarter, column = divmod(rest, 32)
        nibble = int(low[part * 64 + quarter % 2 * 32 + column]) >> (quarter // 2 * 4) & 15
        pair = int(high[part * 32 + column]) >> (quarter * 2) & 3
        values.append(d * int(scales[element // 16]) * ((nibble | pair << 4) - 32))
    return values


BY_HAND = {"Q8_0": by_hand_q8_0, "Q4_0": by_hand_q4_0, "Q4_K": by_hand_q4_k, "Q6_K": by_hand_q6_k}


@pytest.mark.parametrize("kind", BY_HAND)
def test_dequantizes_as_the_format_says(kind: str, tmp_path: Path) -> None:
    coded = coded_rows(Type[kind], 7, 256)
    _, block_bytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    expected = [[value for block in row.reshape(-1, block_bytes) for value in BY_HAND[kind](block)] for row in coded]
    with open_checkpoint(one_matrix(tmp_path, Type[kind], coded, 256)) as checkpoint:
        array = checkpoint.read("model.embed_tokens.weight")
        # float32 arithmetic in another order
        np.testing.assert_allclose(array, np.array(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*QUANTIZED, *K_QUANTS])
def test_rows_are_those_of_the_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "qwen_aot.exporter.checkpoint.gguf.reader._CHUNK_ELEMENTS", 3 * 256
    )  # several chunks, a short last one
    coded = coded_rows(Type[kind], 11, 256)
    whole = gguf.dequantize(coded, Type[kind])
    with open_checkpoint(one_matrix(tmp_path, Type[kind], coded, 256)) as checkpoint:
        name = "model.embed_tokens.weight"
        assert checkpoint.tensors[name].span is None
        np.testing.assert_array_equal(checkpoint.read(name), whole)
        for rows in (slice(0, 1), slice(4, 9), slice(10, 40), slice(5, 5)):
            np.testing.assert_array_equal(checkpoint.read(name, rows), whole[rows])


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_rows_of_a_rotary_tensor(kind: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(kv_heads=2))
    written = save_gguf(tmp_path / "m.gguf", model, "llama", kind=Type[kind])
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
            assert checkpoint.tensors[name].span is None
            np.testing.assert_array_equal(checkpoint.read(name, slice(3, 21)), written[name][3:21])


def test_spans_hold_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    written = save_gguf(path, tiny_model(tiny_config(moe={})), "qwen2moe")
    content = path.read_bytes()
    with open_checkpoint(path) as checkpoint:
        for name, info in checkpoint.tensors.items():
            assert info.span is not None
            raw = content[info.span.offset : info.span.offset + info.span.length]
            assert raw == written[name].astype(np.float32).tobytes()


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(kv_heads=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()  # a llama file has none
    save_gguf(tmp_path / "m.gguf", model, "llama")
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint, torch.no_grad():
        loaded = tiny_model(tiny_config(kv_heads=2), seed=1)
        state = {name: torch.from_numpy(np.array(checkpoint.read(name))) for name in checkpoint.tensors}
        for name, parameter in loaded.named_parameters():
            parameter.copy_(state.pop(name, torch.zeros_like(parameter)))
        assert not state
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


FACTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "window": (
        "qwen2",
        {"qwen2.attention.sliding_window": 128},
        "sliding_window is 128, fewer tokens than the context of 512; not supported; accepted: 0, or from 512",
    ),
    "clamp": (
        "llama",
        {"llama.attention.clamp_kqv": 8.0},
        r"llama\.attention\.clamp_kqv is 8\.0; not supported",
    ),
    "scale": ("llama", {"llama.logit_scale": 2.0}, r"logit_scale is 2\.0; not supported; accepted: 1\.0"),
    "softcap": ("llama", {"llama.attn_logit_softcapping": 5.0}, "not supported; accepted: absent"),
    "mixtral": ("llama", {"llama.expert_count": 8}, r"llama\.expert_count is 8; not supported; accepted: 0"),
    "heads per layer": (
        "qwen2",
        {"qwen2.attention.head_count_kv": [2, 4]},
        r"is \[2, 4\]; .*accepted: one whole",
    ),
    "no layers": ("qwen2", {"qwen2.block_count": None}, r"qwen2\.block_count is missing"),
    "values": ("qwen2", {"qwen2.attention.value_length": 8}, r"value_length is 8; .*the head size \(16\)"),
    "partial rotary": ("llama", {"llama.rope.dimension_count": 8}, r"dimension_count is 8; not supported"),
    "longrope": (
        "llama",
        {"llama.rope.scaling.type": "longrope"},
        "'longrope'; not supported; accepted: none, linear",
    ),
    "yarn": (
        "llama",
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5},
        r"yarn_ext_factor is 0\.5; not supported; accepted: 1\.0",
    ),
    "huge depth": ("qwen2moe", {"qwen2moe.block_count": 4_000_000_000}, r"block_count is 4000000000; .*to 1000"),
    "experts": ("qwen2moe", {"qwen2moe.expert_count": 5}, r"expert_count is 5, but the tensors have 4"),
    "heads": (
        "qwen2",
        {"qwen2.attention.head_count": 3, "qwen2.attention.key_length": None},
        "embedding_length is 64, not a multiple of attention.head_count",
    ),
    "theta": ("llama", {"llama.rope.freq_base": "x"}, r"rope\.freq_base is 'x'; accepted: a number"),
    "bos": ("llama", {"tokenizer.ggml.bos_token_id": "x"}, r"bos_token_id is 'x'; accepted: a whole number"),
}


@pytest.mark.parametrize(("architecture", "facts", "message"), FACTS.values(), ids=FACTS)
def test_refuses_facts_by_name(architecture: str, facts: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(layers=1, moe={} if architecture == "qwen2moe" else None))
    save_gguf(tmp_path / "m.gguf", model, architecture, facts=facts)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value)


def test_unknown_facts_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(tiny_config(layers=1))
    save_gguf(tmp_path / "m.gguf", model, "llama")
    open_checkpoint(tmp_path / "m.gguf").close()
    assert caplog.records == []
    save_gguf(tmp_path / "m.gguf", model, "llama", facts={"llama.frobnicate": 1})
    open_checkpoint(tmp_path / "m.gguf").close()
    assert "llama keys of the GGUF file are not known here and are ignored: frobnicate" in caplog.text


SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "none": ({"llama.rope.scaling.type": "none"}, None),
    "linear": (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
    ),
    "linear, old": ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    "yarn": (
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 128,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ),
}


@pytest.mark.parametrize(("facts", "same_as"), SCALINGS.values(), ids=SCALINGS)
def test_rope_scaling(facts: dict[str, Any], same_as: dict[str, Any] | None, tmp_path: Path) -> None:
    config = tiny_config(layers=1)
    save_gguf(tmp_path / "m.gguf", tiny_model(config), "llama", facts=facts)

    expected = hf_config.parse(config.to_dict() | {"rope_parameters": None, "rope_scaling": same_as})
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.config.rope_scaling == expected.rope_scaling
        assert checkpoint.config.max_position_embeddings == expected.max_position_embeddings


def test_yarn_extends_the_context_unless_the_file_counts_it(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(layers=1))
    yarn = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
    original = {"qwen2.rope.scaling.original_context_length": 512}
    for facts, context in ((yarn, 2048), (yarn | original, 2048), (yarn | original | {_LENGTH: 2048}, 2048)):
        save_gguf(tmp_path / "m.gguf", model, "qwen2", facts=facts)
        with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
            assert checkpoint.config.max_position_embeddings == context


_LENGTH = "qwen2.context_length"

WITHOUT_EFFECT: dict[str, dict[str, Any]] = {
    "window of the context": {"qwen2.attention.sliding_window": 512},
    "no window": {"qwen2.attention.sliding_window": 0},
    "no padding": {"tokenizer.ggml.padding_token_id": 2**32 - 1},
    "no more predictions": {"qwen2.nextn_predict_layers": 0},
}


@pytest.mark.parametrize("facts", WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
def test_values_without_effect_are_not_refused(
    facts: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(tiny_config(layers=1))
    save_gguf(tmp_path / "m.gguf", model, "qwen2")
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        plain = checkpoint.config
    save_gguf(tmp_path / "m.gguf", model, "qwen2", facts=facts)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.config == plain
    assert caplog.records == []


def test_refuses_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    accepted = "qwen, qwen2, qwen2moe, llama"
    with pytest.raises(CheckpointError, match=rf"general\.architecture is 'gemma'; accepted: {accepted}"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blk.0.attn_sinks.weight", r"tensor 'blk\.0\.attn_sinks\.weight' is not one of a Qwen or llama"),
        ("rope_freqs.weight", r"rope_freqs\.weight \(Llama 3's rotary factors\) is not supported"),
    ],
)
def test_refuses_tensors_by_name(name: str, message: str, tmp_path: Path) -> None:
    path = one_matrix(tmp_path, Type.Q8_0, coded_rows(Type.Q8_0, 4, 32), 32, bad=name)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_refuses_a_tensor_type_by_name(tmp_path: Path) -> None:
    path = one_matrix(tmp_path, Type.IQ4_NL, coded_rows(Type.IQ4_NL, 4, 32), 32)
    with pytest.raises(CheckpointError, match=r"'token_embd\.weight' is of type IQ4_NL; not supported; accepted: F32"):
        open_checkpoint(path)


def test_a_missing_tensor(tmp_path: Path) -> None:
    save_gguf(tmp_path / "m.gguf", tiny_model(tiny_config(layers=1)), "qwen2", without=("token_embd.weight",))
    with pytest.raises(CheckpointError, match=r"no token_embd\.weight; accepted: a whole model"):
        open_checkpoint(tmp_path / "m.gguf")


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    save_gguf(tmp_path / "m.gguf", tiny_model(tiny_config(layers=1)), "qwen2")
    with (
        open_checkpoint(tmp_path / "m.gguf") as checkpoint,
        pytest.raises(CheckpointError, match="no tensor 'x'"),
    ):
        checkpoint.read("x")
