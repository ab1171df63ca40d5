"""`export` of a checkpoint and of a variant."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from tests.runtime.cli.conftest import Run


def test_a_checkpoint_gives_graph_and_weights(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "graph"
    result = run("export", checkpoint, "-o", out, "--precision", "fp16", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["has_weights"] is True
    assert (out / "model.onnx.data").stat().st_size == report["weight_bytes"]
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    types = {value.name: value.type.tensor_type.elem_type for value in onnx.load(out / "model.onnx").graph.input}
    assert types["past_key_values.0.key"] == onnx.TensorProto.FLOAT16
    again = run("export", checkpoint, "-o", out)
    assert again.exit_code == 0
    assert "peak memory" in again.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph"]


def test_the_plugin_lowering_carries_its_definitions(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    result = run("export", checkpoint, "-o", tmp_path / "graph", "--lowering", "plugin", "--precision", "int8")
    assert result.exit_code == 0, result.stderr
    model = onnx.load(tmp_path / "graph" / "model.onnx", load_external_data=False)
    assert [function.name for function in model.functions] == ["QwenGQA"]
    assert "key_positions" not in {value.name for value in model.graph.input}


def test_a_variant_gives_the_graph_alone(run: Run, tmp_path: Path) -> None:
    result = run("export", "qwen1.5-0.5b", "-o", tmp_path / "graph", "--precision", "bf16", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["has_weights"] is False
    assert report["weight_bytes"] == pytest.approx(463_987_712 * 2, rel=0.1)
    assert [path.name for path in (tmp_path / "graph").iterdir()] == ["model.onnx"]
    assert report["graph_bytes"] < 5_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--precision", "w8a8"),
            "lowering standard has no precision 'w8a8'; what exists: standard: fp32, fp16, bf16, int8, int4, fp8",
        ),
        (("--precision", "int4", "--block-size", "32"), "the standard lowering is symmetric and chooses its blocks"),
        (("--lowering", "plugin", "--asymmetric"), "the plugin lowering is symmetric and chooses its blocks"),
        (("--max-context", "100000"), "more than the model's 512"),
    ],
)
def test_refusals(run: Run, checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("export", checkpoint, "-o", tmp_path / "graph", *arguments)
    # What only the model can tell isn't wrong usage.
    assert result.exit_code == (1 if "--max-context" in arguments else 2)
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_left_alone(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = run("export", checkpoint, "-o", tmp_path)
    assert result.exit_code == 1
    assert "holds files that an export doesn't write (notes.txt)" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
