"""`inspect` on each kind of thing, sound and damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
    assert {"name": "model.norm.weight", "dtype": "float32", "shape": [64]} in facts["tensors"]
    assert "tokenizer.json" in facts["tokenizer_files"]
    assert "num_hidden_layers" in run("inspect", checkpoint).stdout


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
