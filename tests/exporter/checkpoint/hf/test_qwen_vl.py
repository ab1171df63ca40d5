"""Qwen-VL's folder: what `visual` of config.json may say, its tensors, and the tokens behind the text models'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from qwen_aot.engines.vision import image_token_warnings
from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf import qwen
from qwen_aot.exporter.checkpoint.hf.tiktoken_file import IMAGE_TOKENS, REGION_TOKENS, SPECIAL_TOKENS, read_tiktoken
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.model.variants import variant_config
from qwen_aot.exporter.model.vision_tensors import vision_tensors
from qwen_aot.exporter.weights.sources import check_headers
from tests.first_qwen import CONFIG
from tests.vl_checkpoints import FIRST_SPECIAL, IMAGE_START, SMALL, make_config, make_seeing_model, ranks_file

# As published (config.json of Qwen-VL and Qwen-VL-Chat).
PUBLISHED = {
    **CONFIG,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "seq_length": 2048,
    "vocab_size": 151936,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
}


def test_the_published_config_is_the_variant() -> None:
    read = qwen.parse(PUBLISHED, {"eos_token_id": 151643, "pad_token_id": 151643})
    ours = variant_config("Qwen/Qwen-VL-Chat")
    assert read.vision == ours.vision and read.dynamic_ntk_length == ours.dynamic_ntk_length == 2048
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "head_dim", "rope_theta"):
        assert getattr(read, name) == getattr(ours, name), name
    assert (read.logn_attn_length, read.max_position_embeddings) == (2048, ours.max_position_embeddings)


def visual(**changes: Any) -> dict[str, Any]:
    return {**make_config(), "visual": {**make_config()["visual"], **changes}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (visual(width=None), r"visual\.width"),
        (visual(layers="48"), r"visual\.layers is '48'"),
        (visual(heads=7), r"visual\.width is 48; accepted: multiples of 7"),
        (visual(mlp_ratio="big"), r"visual\.mlp_ratio is 'big'"),
        (visual(output_dim=256), r"visual\.output_dim is 256; accepted: hidden_size \(128\)"),
        (visual(image_start_id=511), r"visual\.image_start_id is 511; accepted: 1 to vocab_size - 3 \(509\)"),
        (visual(n_queries=64), r"visual\.n_queries is 64; accepted: 256"),
        ({**make_config(), "visual": "yes"}, r"visual is 'yes'; accepted: an object with"),
        ({**make_config(), "visual": {"heads": 16}}, r"visual\.image_size is missing"),
    ],
)
def test_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        qwen.parse(config, {})


def test_unknown_keys_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert qwen.parse(visual(colour="blue"), {}).vision is not None
    assert "visual of config.json has keys that are not known here and are ignored: colour" in caplog.text


def test_a_folder_has_all_tensors_of_both(tmp_path: Path) -> None:
    make_seeing_model(tmp_path / "model")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        assert checkpoint.config.vision is not None
        assert {tensor.name for tensor in vision_tensors(checkpoint.config.vision)} <= checkpoint.tensors.keys()
        check_headers(checkpoint)
        assert image_token_warnings(checkpoint) == ()
        tokenizer = Tokenizer.from_str(checkpoint.tokenizer.files["tokenizer.json"])
    ids = [tokenizer.token_to_id(token) for token in (*REGION_TOKENS, *IMAGE_TOKENS)]
    assert ids == list(range(FIRST_SPECIAL + len(SPECIAL_TOKENS), FIRST_SPECIAL + len(SPECIAL_TOKENS) + 9))
    assert tokenizer.token_to_id("<img>") == IMAGE_START


def test_published_ids() -> None:
    """Behind 151,643 ranks and 208 special tokens: <img> is 151857 as config.json says."""
    assert 151643 + len(SPECIAL_TOKENS) + len(REGION_TOKENS) == PUBLISHED["visual"]["image_start_id"]


def test_regions_are_shown_in_answers_and_images_arent(tmp_path: Path) -> None:
    path = tmp_path / "qwen.tiktoken"
    path.write_text(ranks_file())
    tokenizer = read_tiktoken(path, takes_images=True)
    ids = tokenizer.encode("<ref>a cat</ref><box>(1,2),(3,4)</box><img></img>").ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<ref>a cat</ref><box>(1,2),(3,4)</box>"
    assert read_tiktoken(path).token_to_id("<ref>") is None


@pytest.mark.parametrize("start", [IMAGE_START - 1, IMAGE_START + 1])
def test_other_ids_than_the_tokenizers(start: int, tmp_path: Path) -> None:
    make_seeing_model(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["visual"]["image_start_id"] = start
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    message = rf"has <img>, </img>, <imgpad> at \[474.*config.json at \[{start}"
    with open_checkpoint(tmp_path / "model") as checkpoint, pytest.raises(CheckpointError, match=message):
        image_token_warnings(checkpoint)


def test_without_a_tokenizer_there_is_a_warning(tmp_path: Path) -> None:
    make_seeing_model(tmp_path / "model")
    (tmp_path / "model/qwen.tiktoken").unlink()
    with open_checkpoint(tmp_path / "model") as checkpoint:
        (warning,) = image_token_warnings(checkpoint)
    assert "token ids only, and no images" in warning


def test_sizes_are_the_statements() -> None:
    config = qwen.parse(make_config(), {})
    assert config.vision is not None
    assert (config.vision.width, config.vision.mlp_width) == (SMALL.width, 144)
