"""The second reader of quantized folders: right by itself, and what shows a fault of the first one to `verify`."""

from __future__ import annotations

import ast
import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.engines.verify import quantized_model
from qwen_aot.engines.verify.quantized_model import dequantized
from qwen_aot.engines.verify.reference import Reference
from qwen_aot.engines.verify.reference_model import BY_SECOND
from qwen_aot.engines.verify.scores import Verification, limits_for, verify, windows
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.quantized import gptq as gptq_reader
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine
from qwen_aot.runtime.bundle.load import load_bundle
from tests.checkpoints import reference_logits, tiny_config, tiny_model
from tests.coded_checkpoints import MOE, load
from tests.decisive import TOKENS, decisive_text, save_decisive
from tests.exporter.checkpoint.hf.quantized import test_float_quantized as float_quantized
from tests.exporter.checkpoint.hf.quantized import test_int_quantized as int_quantized
from tests.exporter.checkpoint.hf.quantized.test_golden import CASES, MODULE, READABLE, save, values_of
from tests.exporter.lowering.test_rounded_inputs import rounding_model
from tests.quantized_files import (
    PROJECTIONS,
    Codes,
    awq,
    awq_config,
    borrowed,
    compressed_tensors,
    compressed_tensors_config,
    gptq,
    gptq_config,
    random_codes,
    save_quantized,
)

IDS = np.arange(3, 20, dtype=np.int64)
Folder = tuple[dict[str, Any], Callable[[Codes], Any], dict[str, Any]]
ASYMMETRIC = functools.partial(random_codes, symmetric=False, smallest_zero=0)
FOLDERS: dict[str, Folder] = {
    "gptq": (gptq_config(), gptq, {"zero_biases": True}),
    "gptq, v2 zeros of 0": (
        gptq_config(sym=False, checkpoint_format="gptq_v2"),
        functools.partial(gptq, pack_zeros=lambda zeros, bits: sum(z << (bits * i) for i, z in enumerate(zeros))),
        {"make": ASYMMETRIC},
    ),
    "gptq, borrowed zeros of 0": (
        gptq_config(sym=False, meta={"quantizer": ["gptqmodel:4.0.0"]}),
        functools.partial(gptq, pack_zeros=borrowed),
        {"make": ASYMMETRIC},
    ),
    "gptq, 8 bits, act-order, one group a row": (
        gptq_config(bits=8, desc_act=True, sym=False, group_size=-1),
        gptq,
        {"make": functools.partial(random_codes, bits=8, symmetric=False, group_size=-1)},
    ),
    "gptq, act-order": (gptq_config(desc_act=True), gptq, {"make": functools.partial(random_codes, shuffled=True)}),
    "gptq, experts": (gptq_config(), gptq, {"zero_biases": True, "moe": MOE}),
    "gptq, norms of heads": (gptq_config(), gptq, {"zero_biases": True, "generation": "qwen3", "head_dim": 32}),
    "awq, norms of heads": (awq_config(), awq, {"make": ASYMMETRIC, "generation": "qwen3", "head_dim": 32}),
    "awq": (awq_config(), awq, {"make": ASYMMETRIC}),
    "compressed-tensors": (compressed_tensors_config(), compressed_tensors, {}),
    "compressed-tensors, 8 bits, zeros": (
        compressed_tensors_config({"num_bits": 8, "symmetric": False}),
        functools.partial(compressed_tensors, symmetric=False),
        {"make": functools.partial(random_codes, bits=8, symmetric=False, smallest_zero=0)},
    ),
    "compressed-tensors, integers in groups, zeros": (
        int_quantized.config(None, symmetric=False, strategy="group", group_size=32),
        functools.partial(int_quantized.pack, rounds_inputs=False, symmetric=False),
        {"make": functools.partial(random_codes, bits=8, symmetric=False, smallest_zero=0)},
    ),
    "compressed-tensors, rounded inputs": (
        int_quantized.config(),
        int_quantized.pack,
        {"make": functools.partial(random_codes, bits=8, group_size=-1)},
    ),
    "compressed-tensors, floats": (
        float_quantized.config(),
        float_quantized.pack,
        {"make": float_quantized.random_floats},
    ),
    "compressed-tensors, floats with one scale": (
        float_quantized.config(strategy="tensor"),
        functools.partial(float_quantized.pack, one_scale=True),
        {"make": functools.partial(float_quantized.random_floats, one_scale=True)},
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_weights_are_what_was_packed_bit_for_bit(name: str, tmp_path: Path) -> None:
    config, pack, options = FOLDERS[name]
    saved = save_quantized(tmp_path, config, pack, **options)
    state = dequantized(tmp_path, load_file(saved.safetensors))
    for weight, codes in saved.weights.items():
        np.testing.assert_array_equal(state.pop(weight).numpy(), codes.values, err_msg=weight)
    left = {key for key, array in saved.plain.items() if not (key.endswith(".bias") and not array.any())}
    assert left <= state.keys() <= saved.plain.keys()
    assert not any(key.endswith((".o_proj.bias", ".down_proj.bias")) for key in state)


@pytest.mark.parametrize("name", READABLE)
def test_weights_are_what_the_public_libraries_make_of_them(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    state = dequantized(save(case, tmp_path), load_file(tmp_path / "model.safetensors"))
    assert state[f"{MODULE}.weight"].numpy().astype(np.float16).tobytes() == values_of(case).tobytes()


@pytest.mark.parametrize("name", ["gptq, experts", "awq", "compressed-tensors, 8 bits, zeros"])
def test_a_quantized_folder_is_read_past_our_own_reader(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, options = FOLDERS[name][1:]
    saved = save_quantized(tmp_path / "m", FOLDERS[name][0], pack, **options)
    config = {"moe": options["moe"]} if "moe" in options else {}
    model: Any = tiny_model(tiny_config(layers=1, kv_heads=2, **config))
    own = model.state_dict().keys()
    plain = {key: array.astype(np.float32) for key, array in saved.plain.items() if key in own}
    load(model, plain | {key: codes.values for key, codes in saved.weights.items()})
    with open_checkpoint(tmp_path / "m") as checkpoint:
        monkeypatch.setattr(type(checkpoint), "read", None)
        monkeypatch.setattr(type(checkpoint), "read_encoded", None)
        reference = Reference(checkpoint)
    assert reference.read_by == BY_SECOND
    expected = reference_logits(model, [IDS.tolist()])[0].numpy()
    np.testing.assert_allclose(reference.logits(IDS, 0), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("module", [int_quantized, float_quantized], ids=["integers", "floats"])
def test_inputs_are_rounded_as_the_folder_says(module: Any, tmp_path: Path) -> None:
    saved = module.save(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        found = Reference(checkpoint).logits(IDS, 0)
    expected, unrounded = (
        reference_logits(rounding_model(saved, rounds=rounds), [IDS.tolist()])[0].numpy() for rounds in (True, False)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(found - unrounded).max() > 1e-3


def test_shards_that_hold_codes_alone_are_read(tmp_path: Path) -> None:
    saved = save_quantized(tmp_path, gptq_config(), gptq)
    state = load_file(saved.safetensors)
    codes = {key for key in state if key.endswith("qweight")}
    shards = {"a.safetensors": codes, "b.safetensors": state.keys() - codes}
    for file, names in shards.items():
        save_file({key: state[key] for key in names}, tmp_path / file, {"format": "pt"})
    saved.safetensors.unlink()
    index = {"metadata": {}, "weight_map": {key: file for file, names in shards.items() for key in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_checkpoint(tmp_path) as checkpoint:
        reference = Reference(checkpoint)
    name = "model.layers.0.mlp.up_proj.weight"
    found = reference._model.state_dict()[name].numpy()
    np.testing.assert_array_equal(found, saved.weights[name].values)


def test_a_configuration_beside_config_json_is_read(tmp_path: Path) -> None:
    saved = save_quantized(tmp_path, gptq_config(), gptq)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="quant_method None has no second reader; accepted: gptq, awq, compressed"
    ):
        dequantized(tmp_path, load_file(saved.safetensors))
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "sym": True}))
    name = "model.layers.0.mlp.up_proj.weight"
    found = dequantized(tmp_path, load_file(saved.safetensors))[name]
    np.testing.assert_array_equal(found.numpy(), saved.weights[name].values)


def test_it_shares_nothing_with_the_reader() -> None:
    modules = [
        node.module or ""
        for node in ast.walk(ast.parse(inspect.getsource(quantized_model)))
        if isinstance(node, ast.ImportFrom)
    ]
    assert [module for module in modules if module.startswith("qwen_aot")] == ["qwen_aot.errors"]


def save_decisive_codes(folder: Path) -> None:
    """A model that is sure of its text, its projections rounded to GPTQ's 8 bits with zero points."""
    save_decisive(folder)
    state: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    for name in [key for key in state if key.split(".")[-2] in PROJECTIONS and key.endswith("weight")]:
        codes = rounded(state.pop(name).numpy())
        state |= {name.replace("weight", part): torch.from_numpy(array) for part, array in gptq(codes).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    quantization = gptq_config(bits=8, sym=False)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))


def rounded(weight: np.ndarray[Any, Any]) -> Codes:
    """The nearest codes of groups of 32, whose range is cut into 254 steps from zero points between 1 and 255."""
    n, k = weight.shape
    groups = weight.reshape(n, -1, 32)
    low, high = np.minimum(groups.min(axis=-1), 0), np.maximum(groups.max(axis=-1), 0)
    scales = ((high - low) / 250).astype(np.float16)
    zeros = np.rint(-low / scales).astype(np.int64) + 1
    codes = np.clip(np.rint(groups / scales[..., None]) + zeros[..., None], 0, 255).astype(np.int64)
    return Codes(8, codes.reshape(n, k), zeros, scales, np.arange(k) // 32)


def verified(checkpoint: Path, bundle: Path) -> Verification:
    build_bundle(checkpoint, BuildSpec(precision=Precision.FP32, max_context=TOKENS + 64), bundle)
    with open_checkpoint(checkpoint) as opened:
        reference = Reference(opened)
    loaded = load_bundle(bundle)
    limits = limits_for("fp32", loaded.manifest.model.num_parameters, {})
    with OnnxRuntimeEngine(loaded) as engine:
        return verify(engine, reference, windows(decisive_text().tolist(), TOKENS, 1), limits)


def test_zeros_that_our_reader_reads_one_too_high_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_decisive_codes(tmp_path / "m")
    assert verified(tmp_path / "m", tmp_path / "sound").verdict is Verdict.PASSED
    decode = gptq_reader.decode
    monkeypatch.setattr(gptq_reader, "decode", lambda words, bits, **how: decode(words, bits, **how) + np.uint8(1))
    found = verified(tmp_path / "m", tmp_path / "faulty")
    assert found.verdict is Verdict.FAILED
    assert "kl_divergence" in {check.name for check in found.checks if not check.has_passed}
