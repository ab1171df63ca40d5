"""The folders that the benchmark writes are what they say, and its rows say what came of each build."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.weights.sources import check_headers
from tests.bench import quantized_folders
from tests.bench.quantized_folders import KINDS, Kind, Ran, built, write_folder

SMALL = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 4, "vocab_size": 96}
SMALL_MOE = SMALL | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
SMALL_MOE |= {"shared_expert_intermediate_size": 256}


def small(name: str) -> Kind:
    kind = KINDS[name]
    return dataclasses.replace(kind, config=kind.config | (SMALL_MOE if "num_experts" in kind.config else SMALL))


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_is_a_whole_checkpoint_of_its_format(name: str, tmp_path: Path) -> None:
    kind = small(name)
    assert write_folder(kind, tmp_path) == (tmp_path / "model.safetensors").stat().st_size
    with open_checkpoint(tmp_path) as checkpoint:
        check_headers(checkpoint)
        encodings = {info.encoding for info in checkpoint.tensors.values() if info.encoding is not None}
        (encoding,) = encodings
        assert encoding.form is not None
        assert (encoding.form.bits, encoding.form.group_size) == (kind.bits, 128)
        assert encoding.form.has_zero_points == (name == "awq")
        weight = checkpoint.read("model.layers.0.self_attn.o_proj.weight")
    assert weight.std() == pytest.approx(256**-0.5, rel=0.25)
    assert np.abs(weight.mean()) < 0.3 * weight.std()


def test_the_shapes_are_those_of_the_variants() -> None:
    from qwen_aot.exporter.model.variants import VARIANTS

    for kind, variant in ((KINDS["awq"], "qwen1.5-0.5b"), (KINDS["gptq-int4-moe"], "qwen1.5-moe-a2.7b")):
        facts = dataclasses.asdict(VARIANTS[variant]) | dataclasses.asdict(VARIANTS[variant].moe or VARIANTS[variant])
        same = {key: value for key, value in kind.config.items() if key in facts}
        layers = 2 if "moe" in variant else facts["num_hidden_layers"]
        assert len(same) > 9
        assert same | {"torch_dtype": ""} == {key: facts[key] for key in same} | {
            "num_hidden_layers": layers,
            "torch_dtype": "",
        }


NO_LIBRARY = "error: target tensorrt needs TensorRT, and it can't be loaded (No module named 'tensorrt'); install it"
ROWS: dict[str, tuple[str, dict[str, Ran], str]] = {
    "built": ("tensorrt-rtx", {"build": Ran(0, 2.0, 3 << 30, "{}", "")}, "built"),
    "tokens": (
        "cpu",
        {"build": Ran(0, 2.0, 3 << 30, "{}", ""), "generate": Ran(0, 1.0, 1, '{"completion_tokens": 20}', "")},
        "built; 20 tokens",
    ),
    "no tokens": (
        "cpu",
        {"build": Ran(0, 2.0, 3 << 30, "{}", ""), "generate": Ran(1, 1.0, 1, "", "error: no engine")},
        "built; generation failed: error: no engine",
    ),
    "refused": (
        "tensorrt-rtx",
        {"build": Ran(1, 2.0, 3 << 30, "", "a\nerror: no experts")},
        "refused: error: no experts",
    ),
    "exported": (
        "tensorrt",
        {"build": Ran(1, 2.0, 3 << 30, "", NO_LIBRARY), "export": Ran(0, 2.0, 3 << 30, "{}", "")},
        "graph exported; TensorRT isn't installed",
    ),
    "not exported": (
        "tensorrt",
        {"build": Ran(1, 2.0, 3 << 30, "", NO_LIBRARY), "export": Ran(1, 2.0, 3 << 30, "", "error: no form")},
        "refused: error: no form",
    ),
}


@pytest.mark.parametrize(("target", "runs", "outcome"), ROWS.values(), ids=ROWS)
def test_a_row_says_what_came_of_it(
    target: str, runs: dict[str, Ran], outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(arguments: Any, log: Path) -> Ran:
        asked.append(arguments[0])
        return runs[arguments[0]]

    monkeypatch.setattr(quantized_folders, "run", run)
    row = built(tmp_path / "checkpoint", target, tmp_path / "out")
    assert row == [target, "2", "3.22 GB", "-", outcome]
    assert asked == list(runs)


def test_a_process_is_measured(tmp_path: Path) -> None:
    found = quantized_folders.run(["--version"], tmp_path / "log")
    assert found.code == 0 and found.stdout.strip() and found.peak_bytes > 1 << 20 and found.seconds > 0
    assert "No such" in quantized_folders.run(["no-verb"], tmp_path / "log").stderr
