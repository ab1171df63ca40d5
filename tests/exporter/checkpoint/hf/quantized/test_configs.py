"""Configurations of every format: what is read, what is refused by name, what does nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.quantization_config import AwqConfig, GPTQConfig

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.quantized.formats import FORMATS
from qwen_aot.exporter.checkpoint.hf.quantized.settings import read_quantization
from tests.quantized_files import awq_config, compressed_tensors_config, gptq_config

BASES = {"gptq": gptq_config, "awq": awq_config, "compressed-tensors": compressed_tensors_config}
# With the keys that transformers wrote when Qwen1.5 was published; no published file was at hand.
OF_THAT_TIME = {
    "gptq": {
        "batch_size": 1,
        "bits": 4,
        "block_name_to_quantize": None,
        "cache_block_outputs": True,
        "damp_percent": 0.01,
        "dataset": None,
        "desc_act": False,
        "exllama_config": {"version": 1},
        "group_size": 128,
        "max_input_length": None,
        "model_seqlen": None,
        "module_name_preceding_first_block": None,
        "modules_in_block_to_quantize": None,
        "pad_token_id": None,
        "quant_method": "gptq",
        "sym": True,
        "tokenizer": None,
        "true_sequential": True,
        "use_cuda_fp16": False,
        "use_exllama": True,
    },
    "awq": {
        "bits": 4,
        "group_size": 128,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    },
}


def folder_of(path: Path, quantization: Any, **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def parse(quantization: dict[str, Any]) -> Any:
    return FORMATS[quantization["quant_method"]].parse(quantization)


@pytest.mark.parametrize("method", OF_THAT_TIME)
def test_as_transformers_saved_it_then(method: str) -> None:
    settings = parse(OF_THAT_TIME[method])
    scheme = settings.schemes[0] if method == "gptq" else settings.scheme
    assert (scheme.bits, scheme.group_size, scheme.is_symmetric) == (4, 128, method == "gptq")


@pytest.mark.parametrize(("method", "kind"), [("gptq", GPTQConfig), ("awq", AwqConfig)])
def test_as_transformers_saves_it_today(method: str, kind: Any) -> None:
    """Every key that its class has, with its defaults, has a place."""
    quantization = kind(bits=4, group_size=64).to_dict()
    assert quantization["quant_method"] == method
    parse(json.loads(json.dumps(quantization)))


GPTQMODEL = {  # what GPTQModel 7.7's `to_dict` writes
    "activation": None,
    "bits": 4,
    "checkpoint_format": "gptq",
    "desc_act": False,
    "dynamic": None,
    "format": "gptq",
    "group_size": 128,
    "lm_head": False,
    "meta": {"act_group_aware": True, "damp_percent": 0.05, "quantizer": ["gptqmodel:7.7.0"], "uri": "x", "mse": 0.0},
    "method": "gptq",
    "pack_dtype": "int32",
    "quant_method": "gptq",
    "rotation": None,
    "sym": True,
}


def test_as_gptqmodel_saves_it() -> None:
    assert parse(GPTQMODEL).borrows
    assert not parse({**GPTQMODEL, "meta": {"quantizer": ["auto-round:0.5", "notgptqmodel:1"]}}).borrows
    assert not parse({**GPTQMODEL, "meta": None}).borrows


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "2 bits": ("gptq", {"bits": 2}, "bits is 2; not supported; accepted: 4, 8"),
    "3 bits": ("gptq", {"bits": 3}, "bits is 3; not supported; accepted: 4, 8"),
    "bits text": ("gptq", {"bits": "4"}, "bits is '4'; accepted: a whole number"),
    "no bits": ("gptq", {"bits": None}, "bits is missing"),
    "group 0": ("gptq", {"group_size": 0}, "group_size is 0; accepted: whole numbers from 1 that divide K, or -1"),
    "group -2": ("gptq", {"group_size": -2}, "group_size is -2; accepted"),
    "sym": ("gptq", {"sym": "yes"}, "sym is 'yes'; accepted: true or false"),
    "desc_act": ("gptq", {"desc_act": 1}, "desc_act is 1; accepted: true or false"),
    "marlin": (
        "gptq",
        {"checkpoint_format": "marlin"},
        "checkpoint_format is 'marlin'; not supported; accepted: gptq, gp",
    ),
    "planar": ("gptq", {"format": "gptq_p"}, "format is 'gptq_p'; not supported; accepted: gptq, gptq_v2"),
    "two formats": (
        "gptq",
        {"format": "gptq", "checkpoint_format": "gptq_v2"},
        "is 'gptq_v2' and format 'gptq'; which",
    ),
    "old marlin": ("gptq", {"is_marlin_format": True}, "is_marlin_format is true; not supported; accepted: null"),
    "int16 words": ("gptq", {"pack_dtype": "int16"}, 'pack_dtype is "int16"; not supported; accepted: "int32"'),
    "rotation": ("gptq", {"rotation": "hadamard"}, 'rotation is "hadamard"; not supported; accepted: null'),
    "adapter": ("gptq", {"adapter": {"rank": 8}}, "adapter is .*; not supported"),
    "w4a8": ("gptq", {"activation": {"mode": "w4afp8"}}, "activation is .*; not supported"),
    "unknown key": ("gptq", {"zeta": 1}, "zeta is 1; not known here, and might change the numbers; accepted: null"),
    "unknown zero": ("gptq", {"zeta": 0}, "zeta is 0; not known here"),
    "dynamic list": ("gptq", {"dynamic": ["x"]}, r'dynamic is \["x"\]; accepted: an object'),
    "dynamic text": ("gptq", {"dynamic": {"x": "y"}}, 'dynamic has "y" for "x"; accepted: an object'),
    "dynamic bits": ("gptq", {"dynamic": {"x": {"bits": 3}}}, 'dynamic, of "x": bits is 3; not supported'),
    "dynamic sym": ("gptq", {"dynamic": {"x": {"sym": False}}}, 'dynamic, of "x": sym is another than the model\'s'),
    "dynamic key": ("gptq", {"dynamic": {"x": {"zeta": 2}}}, 'dynamic, of "x": zeta is 2; not known here'),
    "meta": ("gptq", {"meta": "x"}, 'meta is "x"; accepted: an object'),
    "modules": ("gptq", {"modules_in_block_to_quantize": [[1]]}, "modules_in_block_to_quantize is .*a list of lists"),
    "gemv": ("awq", {"version": "gemv"}, "version is 'gemv'; not supported; accepted: gemm"),
    "gemv_fast": ("awq", {"version": "GEMV_FAST"}, "version is 'gemv_fast'; not supported"),
    "exllama": ("awq", {"version": "exllama"}, "version is 'exllama'; not supported; accepted: gemm"),
    "ipex": ("awq", {"version": "ipex"}, "version is 'ipex'; not supported"),
    "awq marlin": ("awq", {"version": "marlin"}, "version is 'marlin'; not supported"),
    "awq format": ("awq", {"format": "gemv"}, "format is 'gemv'; not supported"),
    "version number": ("awq", {"version": 2}, "version is 2; accepted: a text"),
    "llm-awq": ("awq", {"backend": "llm-awq"}, "backend is 'llm-awq'.*not supported"),
    "awq 8 bits": ("awq", {"bits": 8}, "bits is 8; not supported; accepted: 4"),
    "awq modules": ("awq", {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is .*a list of names"),
    "awq dynamic": ("awq", {"dynamic": {"x": {"bits": 8}}}, "dynamic is .*; not supported"),
    "awq unknown": ("awq", {"zeta": [0]}, "zeta is .*not known here"),
    "nvfp4": (
        "compressed-tensors",
        {"format": "nvfp4-pack-quantized"},
        "'nvfp4-pack-quantized'; not supported; accepted: pack-quantized, int-quantized, float-quantized",
    ),
    "marlin-24": ("compressed-tensors", {"format": "marlin-24"}, "'marlin-24'; not supported"),
    "mixed": ("compressed-tensors", {"format": "mixed-precision"}, "'mixed-precision'; not supported"),
    "no format": ("compressed-tensors", {"format": None}, "format is None; not supported"),
    "sparse": (
        "compressed-tensors",
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "weights are sparse; not sup",
    ),
    "kv cache": ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is .*not supported"),
    "transforms": (
        "compressed-tensors",
        {"transform_config": {"config_groups": {"a": 1}}},
        "transform_config is .*not sup",
    ),
    "moe sparsity": ("compressed-tensors", {"moe_sparsity_config": {"x": 1}}, "moe_sparsity_config is .*not supported"),
    "status": ("compressed-tensors", {"quantization_status": "calibration"}, "quantization_status is .*not supported"),
    "no groups": ("compressed-tensors", {"config_groups": {}}, "config_groups is missing"),
    "preset": ("compressed-tensors", {"config_groups": {"W4A16": ["Linear"]}}, r"W4A16 is \[.*accepted: an object"),
    "ct unknown": ("compressed-tensors", {"zeta": True}, "zeta is true; not known here"),
}
REFUSED_WEIGHTS: dict[str, tuple[dict[str, Any], str]] = {
    "3 bits": ({"num_bits": 3}, "num_bits is 3; not supported; accepted: 4, 8"),
    "float": ({"type": "float"}, 'type is "float"; not supported; accepted: "int"'),
    "tensor": ({"strategy": "tensor", "group_size": None}, "strategy is 'tensor' and group_size None; not supported"),
    "block": ({"strategy": "block", "block_structure": [128, 128]}, "block_structure is .*not supported"),
    "no strategy": ({"strategy": None, "group_size": None}, "strategy is None and group_size None"),
    "channel of groups": ({"strategy": "channel"}, "strategy is 'channel' and group_size 32"),
    "group of none": ({"group_size": None}, "strategy is 'group' and group_size None"),
    "dynamic": ({"dynamic": True}, "dynamic is true; not supported"),
    "actorder": (
        {"actorder": "zeta"},
        'actorder is "zeta"; not supported; accepted: group, dynamic, weight, static, null',
    ),
    "scale_dtype": ({"scale_dtype": "torch.float8_e4m3fn"}, "scale_dtype is .*not supported"),
    "unknown": ({"zeta": 3}, "zeta is 3; not known here"),
}


@pytest.mark.parametrize(("method", "change", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(method: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = BASES[method]() | change
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        read_quantization(folder_of(tmp_path, config))


@pytest.mark.parametrize(("change", "message"), REFUSED_WEIGHTS.values(), ids=REFUSED_WEIGHTS)
def test_refused_weights(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config_groups, \"group_0\": {message}"):
        parse(compressed_tensors_config(change))


@pytest.mark.parametrize("key", ["input_activations", "output_activations"])
def test_quantized_activations(key: str) -> None:
    config = compressed_tensors_config()
    config["config_groups"]["group_0"][key] = {"num_bits": 8, "dynamic": True}
    with pytest.raises(CheckpointError, match=f'config_groups, "group_0": {key} is .*; not supported; accepted: null'):
        parse(config)


def test_strategies_that_are_not_said() -> None:
    for group_size, expected in ((-1, -1), (64, 64)):
        settings = parse(compressed_tensors_config({"strategy": None, "group_size": group_size}))
        assert settings.schemes[0].scheme.group_size == expected


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "auto-round", "gptq_marlin", "hqq", 7, ["gptq"], {}])
def test_other_methods(method: Any, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"quant_method is .*; not supported; accepted: gptq, awq, compressed-ten"
    ):
        read_quantization(folder_of(tmp_path, gptq_config(quant_method=method)))


@pytest.mark.parametrize("value", ["gptq", 4, [{}]])
def test_no_object(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config says .*; accepted: an object"):
        read_quantization(folder_of(tmp_path, value))


def test_no_method(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config: quant_method is missing; accepted"):
        read_quantization(folder_of(tmp_path, gptq_config(quant_method=None)))


def test_nothing_is_said(tmp_path: Path) -> None:
    assert read_quantization(folder_of(tmp_path, None)) is None


# Files beside config.json

OLD_GPTQ = {key: value for key, value in gptq_config().items() if key != "quant_method"}
OLD_AWQ = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}


@pytest.mark.parametrize(
    ("name", "content", "config"), [("quantize_config", OLD_GPTQ, gptq_config), ("quant_config", OLD_AWQ, awq_config)]
)
def test_older_files(name: str, content: Any, config: Any, tmp_path: Path) -> None:
    alone = read_quantization(folder_of(tmp_path, None, **{name: content}))
    both = read_quantization(folder_of(tmp_path, config(), **{name: content}))
    only = read_quantization(folder_of(tmp_path / "only", config()))
    assert alone is not None
    assert both is not None
    assert only is not None
    assert alone.settings == both.settings == only.settings
    assert f"config.json and {tmp_path / name}.json" in both.where


def test_each_file_may_say_a_part(tmp_path: Path) -> None:
    quantizer = {"meta": {"quantizer": "gptqmodel:1.0"}, "damp_percent": 0.7}
    found = read_quantization(folder_of(tmp_path, gptq_config(sym=False), quantize_config=quantizer))
    assert found is not None
    assert found.settings.borrows  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "content", "config", "message"),
    [
        (
            "quantize_config",
            {"bits": 8},
            gptq_config(),
            "bits is 4, and 8 in quantize_config.json; accepted: one value",
        ),
        ("quantize_config", {"desc_act": True}, gptq_config(), "desc_act is false, and true in quantize_config.json"),
        ("quant_config", {"w_bit": 8}, awq_config(), "bits is 4, and 8 in quant_config.json"),
        ("quant_config", {"w_bit": 4}, gptq_config(), "quant_method is gptq and awq; accepted: one of them"),
        ("quantize_config", {"quant_method": "awq"}, gptq_config(), "quant_method is gptq and awq"),
        ("quant_config", {"w_bit": 4, "bits": 4}, awq_config(), "w_bit and bits are one key"),
        ("quantize_config", {"method": "qqq"}, gptq_config(), 'quant_method is "qqq"; not supported'),
    ],
)
def test_files_that_differ(name: str, content: Any, config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_quantization(folder_of(tmp_path, config, **{name: content}))


def test_modelopt(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"holds hf_quant_config\.json: .*by ModelOpt, which is not supported; acc"
    ):
        read_quantization(folder_of(tmp_path, None, hf_quant_config={}))


def test_gptqmodels_file_of_an_awq_model(tmp_path: Path) -> None:
    found = read_quantization(folder_of(tmp_path, None, quantize_config=awq_config(method="awq", format="gemm")))
    assert found is not None
    assert found.name == "awq"


# Hostile sizes


def test_many_schemes() -> None:
    dynamic = {str(size): {"group_size": size} for size in range(1, 200)}
    with pytest.raises(CheckpointError, match="199 kinds of bits and groups are named; accepted: up to 100"):
        parse(gptq_config(dynamic=dynamic))
    assert len(parse(gptq_config(dynamic={str(each): {"bits": 8} for each in range(100_000)})).schemes) == 2


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_many_names(method: str) -> None:
    names = [f"layers.{each}" for each in range(5, 300_000)]
    keys = ["modules_to_not_convert"] + ["modules_in_block_to_quantize"] * (method == "gptq")
    settings = parse(BASES[method](**{key: names + ["up_proj"] * ("block" in key) for key in keys}))
    started = time.process_time()
    for layer in range(2000):
        assert (settings.why_plain(f"model.layers.{layer}.mlp.up_proj") is None) == (layer < 5)
    assert settings.why_plain("a." * 1_000_000 + "up_proj") is None
    assert time.process_time() - started < 1  # 0.05; each name with each module: minutes


def test_long_values_are_cut(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        read_quantization(folder_of(tmp_path, gptq_config(quant_method="x" * 10**6)))
    assert len(str(error.value)) < 1000
