"""`inspect` on each kind of thing, sound and damaged."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.quantized_files import (
    awq,
    awq_config,
    compressed_tensors,
    compressed_tensors_config,
    gptq,
    gptq_config,
    random_codes,
    save_quantized,
)
from tests.real_model import real_model
from tests.runtime.cli.conftest import Run


def test_a_bundle(run: Run, bundle: Path) -> None:
    facts = json.loads(run("inspect", bundle, "--json").stdout)
    assert facts["kind"] == "bundle"
    assert facts["precision"] == "fp32"
    assert {file["status"] for file in facts["files"]} == {"ok"}
    assert {"direction": "out", "name": "logits", "dtype": "float32", "shape": ["B", 320]} in facts["io"]
    table = run("inspect", bundle).stdout
    assert "tiny-model" in table and "model.onnx.data" in table and "past_key_values.{0 … 1}.key" in table


@pytest.mark.parametrize("arguments", [(), ("--no-hash",)])
def test_a_damaged_bundle(run: Run, bundle: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    (copy / "tokenizer.json").write_text("{}")
    (copy / "report.json").unlink()
    result = run("inspect", copy, "--json", *arguments)
    assert result.exit_code == 1
    status = {file["name"]: file["status"] for file in json.loads(result.stdout)["files"]}
    assert status["model.onnx.data"] == ("size ok" if arguments else "damaged")
    assert status["tokenizer.json"] == "size is 2"
    assert status["report.json"] == "missing"


def test_a_link_out_of_the_bundle_is_not_followed(run: Run, bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    (copy / "model.onnx").rename(tmp_path / "model.onnx")
    (copy / "model.onnx").symlink_to("../model.onnx")
    result = run("inspect", copy, "--json")
    assert result.exit_code == 1
    status = {file["name"]: file["status"] for file in json.loads(result.stdout)["files"]}
    assert status.pop("model.onnx") == "a link out of the bundle"
    assert set(status.values()) == {"ok"}


def test_a_file_that_may_not_be_read_is_one_row(run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens = Path.open

    def refusing(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if path.name == "tokenizer.json":  # root, as which this test may run, may read everything
            raise PermissionError(13, "Permission denied", str(path))
        return opens(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    result = run("inspect", bundle, "--json")
    assert result.exit_code == 1
    status = {file["name"]: file["status"] for file in json.loads(result.stdout)["files"]}
    assert status.pop("tokenizer.json") == "can't be read: Permission denied"
    assert set(status.values()) == {"ok"}


def test_a_broken_manifest(run: Run, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    result = run("inspect", tmp_path)
    assert result.exit_code == 1
    assert "manifest.json is not JSON" in result.stderr


def test_an_onnx_file(run: Run, bundle: Path) -> None:
    facts = json.loads(run("inspect", bundle / "model.onnx", "--tensors", "--json").stdout)
    assert facts["kind"] == "ONNX graph"
    assert facts["opsets"]["ai.onnx"] == 24
    assert facts["nodes"] == sum(op["count"] for op in facts["ops"])
    assert facts["weight_bytes"] == sum(tensor["bytes"] for tensor in facts["tensors"])
    assert facts["weight_bytes"] <= (bundle / "model.onnx.data").stat().st_size
    assert "ai.onnx" in run("inspect", bundle / "model.onnx").stdout


def test_what_is_not_onnx(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 100)
    result = run("inspect", tmp_path / "model.onnx")
    assert result.exit_code == 1
    assert "isn't an ONNX file" in result.stderr


def test_a_file_without_a_graph(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    result = run("inspect", tmp_path / "empty.onnx")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "empty.onnx holds no graph (0 bytes)" in result.stderr


def test_a_checkpoint(run: Run, checkpoint: Path) -> None:
    facts = json.loads(run("inspect", checkpoint, "--tensors", "--json").stdout)
    assert facts["kind"] == "checkpoint"
    assert facts["vocab_size"] == 320
    assert facts["num_parameters"] * 4 == facts["tensors_by_dtype"][0]["bytes"]
    norm = {"name": "model.norm.weight", "dtype": "float32", "encoding": None, "shape": [64], "bytes": 256}
    assert norm in facts["tensors"]
    assert facts["tensors_by_encoding"] == []
    assert {build["own_codes"] for build in facts["builds_without_flags"]} == {False}
    assert "tokenizer.json" in facts["tokenizer_files"]
    assert "num_hidden_layers" in run("inspect", checkpoint).stdout


# method -> quantization_config, packer, codes, and what `inspect` says of all its linears.
QUANTIZED: dict[str, tuple[Any, ...]] = {
    "gptq": (
        gptq_config(desc_act=True),
        gptq,
        functools.partial(random_codes, shuffled=True),
        ("gptq-int4", 4, 32, "float16", False, "other"),
    ),
    "awq": (
        awq_config(),
        awq,
        functools.partial(random_codes, symmetric=False, scale_dtype=np.float32),
        ("awq-int4", 4, 32, "float32", True, "own"),
    ),
    "compressed-tensors": (
        compressed_tensors_config({"num_bits": 8}),
        compressed_tensors,
        functools.partial(random_codes, bits=8),
        ("compressed-tensors-w8a16", 8, 32, "float16", False, "own"),
    ),
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_a_quantized_folder_is_listed_as_it_is_stored(run: Run, method: str, tmp_path: Path) -> None:
    config, pack, make, stored_as = QUANTIZED[method]
    saved = save_quantized(tmp_path, config, pack, make=make)
    facts = json.loads(run("inspect", tmp_path, "--tensors", "--json").stdout)
    held = load_file(saved.safetensors)
    assert facts["stored_bytes"] == sum(array.nbytes for array in held.values())
    assert [(row["dtype"], row["tensors"]) for row in facts["tensors_by_dtype"]] == [("float16", len(saved.plain))]
    (found,) = facts["tensors_by_encoding"]
    names = ("encoding", "bits", "group_size", "scales", "zero_points", "order")
    assert tuple(found[name] for name in names) == stored_as
    assert found["tensors"] == len(saved.weights)
    assert found["bytes"] == sum(array.nbytes for name, array in held.items() if name not in saved.plain)
    (q_proj,) = (each for each in facts["tensors"] if each["name"] == "model.layers.0.self_attn.q_proj.weight")
    assert (q_proj["dtype"], q_proj["encoding"]) == (None, stored_as[0])
    module = "model.layers.0.self_attn.q_proj."
    parts = [array for name, array in held.items() if name.startswith(module) and not name.endswith("bias")]
    assert q_proj["bytes"] == sum(array.nbytes for array in parts)
    builds = {build["target"]: build for build in facts["builds_without_flags"]}
    assert {build["precision"] for build in builds.values()} == {f"int{stored_as[1]}"}
    assert all(build["own_codes"] for build in builds.values())
    refused = {target for target, build in builds.items() if build["refusal"] is not None}
    assert refused == ({"cuda", "tensorrt-rtx", "tensorrt"} if stored_as[3] == "float32" else set())


def test_a_gguf_file_is_listed_by_its_types(run: Run) -> None:
    facts = json.loads(run("inspect", real_model(), "--json").stdout)
    by_type = {row["encoding"]: row for row in facts["tensors_by_encoding"]}
    assert {name: row["tensors"] for name, row in by_type.items()} == {"gguf-q4_1": 210, "gguf-q8_0": 1}
    # Blocks of 32: 2 fp16 numbers and 16 bytes, or one and 32.
    table = 49152 * 576 // 32
    assert by_type["gguf-q8_0"]["bytes"] == table * 34 and by_type["gguf-q8_0"]["bits"] == 8
    assert by_type["gguf-q4_1"]["bytes"] == (134_515_008 - 49152 * 576 - 61 * 576) // 32 * 20
    assert {build["own_codes"] for build in facts["builds_without_flags"]} == {False}


def test_tensors_that_no_build_takes_are_listed_with_a_warning(run: Run, tmp_path: Path) -> None:
    saved = save_quantized(tmp_path, gptq_config(), gptq)
    saved.change(model__norm__weight=None)
    result = run("inspect", tmp_path, "--json")
    assert json.loads(result.stdout)["builds_without_flags"] == []
    assert "no build takes them" in result.stderr and "model.norm.weight" in result.stderr


def test_what_is_nothing_of_these(run: Run, tmp_path: Path) -> None:
    result = run("inspect", tmp_path)
    assert result.exit_code == 1
    assert "has no config.json" in result.stderr


@pytest.mark.parametrize("encoding", ["ascii:surrogateescape", "latin-1"])
def test_a_locale_without_the_characters_of_a_path(bundle: Path, tmp_path: Path, encoding: str) -> None:
    (tmp_path / "Bündel 束").symlink_to(bundle)
    command = [sys.executable, "-m", "qwen_aot", "inspect", str(tmp_path / "Bündel 束"), "--no-hash"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run(command, cwd=Path(__file__).parents[3], env=environment, capture_output=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert b"ndel ?" in result.stdout
