from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.model.tensors import tensor_shapes
from tests.checkpoints import save_tiny

MOE = {"moe": {"mlp_only_layers": [0]}, "layers": 2}
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model twice: experts apart, and fused as transformers 5 holds them."""
    folder = tmp_path_factory.mktemp("moe")
    model = save_tiny(folder / "apart", dtype="bfloat16", generation=request.param, **MOE)
    model.save_pretrained(folder / "fused", save_original_format=False, max_shard_size=60_000)
    return folder


def fused_copy(saved: Path, folder: Path, **changed: Any) -> Path:
    """The fused model in one file, with other tensors."""
    folder.mkdir()
    state: dict[str, Any] = {}
    for path in (saved / "fused").glob("*.safetensors"):
        state |= load_file(path)
    state |= {name.replace("__", "."): array for name, array in changed.items()}
    save_file({name: array for name, array in state.items() if array is not None}, folder / "model.safetensors")
    (folder / "config.json").write_text((saved / "fused/config.json").read_text())
    return folder


def test_fused_experts_are_read_as_those_apart(saved: Path) -> None:
    assert any(EXPERTS + ".gate_up_proj" in load_file(path) for path in (saved / "fused").glob("*.safetensors"))
    with open_checkpoint(saved / "fused") as fused, open_checkpoint(saved / "apart") as apart:
        assert {name: info.shape for name, info in fused.tensors.items()} == tensor_shapes(fused.config)
        assert set(fused.tensors) == set(apart.tensors)
        for name in apart.tensors:
            assert fused.read(name).tobytes() == apart.read(name).tobytes(), name
            assert fused.read(name, slice(1, 5)).tobytes() == apart.read(name, slice(1, 5)).tobytes(), name


def test_nothing_is_copied(saved: Path) -> None:
    with open_checkpoint(saved / "fused") as checkpoint:
        for expert in range(4):
            info = checkpoint.tensors[f"{EXPERTS}.{expert}.up_proj.weight"]
            assert info.span is not None
            with info.span.path.open("rb") as file:
                file.seek(info.span.offset)
                stored = file.read(info.span.length)
            array = checkpoint.read(info.name)
            assert array.tobytes() == stored
            assert not array.flags.owndata
            del array


@pytest.mark.parametrize(
    ("part", "shape", "expected"),
    [
        ("gate_up_proj", (4, 64, 48), r"\[4, 48, 64\]"),  # [E, M, 2F], as other architectures have it
        ("gate_up_proj", (3, 48, 64), r"\[4, 48, 64\]"),
        ("down_proj", (4, 24, 64), r"\[4, 64, 24\]"),
        ("down_proj", (4, 64), r"\[4, 64, 24\]"),
    ],
)
def test_another_layout_is_refused(
    part: str, shape: tuple[int, ...], expected: str, saved: Path, tmp_path: Path
) -> None:
    fused_copy(saved, tmp_path / "x", **{f"{EXPERTS}.{part}": np.zeros(shape, np.float32)})
    with pytest.raises(CheckpointError, match=rf"tensor {EXPERTS}\.{part} has shape .*; accepted: {expected} "):
        open_checkpoint(tmp_path / "x")


def test_a_header_that_claims_a_billion_experts_is_refused_at_once(saved: Path, tmp_path: Path) -> None:
    folder = fused_copy(saved, tmp_path / "x")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    header["model.layers.0.mlp.experts.down_proj"] = {
        "dtype": "F32",
        "shape": [10**9, 64, 0],
        "data_offsets": [end, end],
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(CheckpointError, match=r"has shape \[1000000000, 64, 0\]; accepted: \[4, 64, 24\]"):
        open_checkpoint(folder)


def test_an_expert_fused_and_apart_is_refused(saved: Path, tmp_path: Path) -> None:
    name = f"{EXPERTS}.2.up_proj.weight"
    fused_copy(saved, tmp_path / "x", **{name: np.zeros((24, 64), np.float32)})
    with pytest.raises(CheckpointError, match=rf"has {name} twice, as .* and as .*; accepted: one of them"):
        open_checkpoint(tmp_path / "x")


def test_fused_and_wrapped(saved: Path, tmp_path: Path) -> None:
    folder = fused_copy(saved, tmp_path / "x")
    path = folder / "model.safetensors"
    save_file({f"_orig_mod.{name}": array for name, array in load_file(path).items()}, path)
    with open_checkpoint(folder) as fused, open_checkpoint(saved / "apart") as apart:
        name = f"{EXPERTS}.3.gate_proj.weight"
        assert fused.read(name).tobytes() == apart.read(name).tobytes()


def test_a_dense_model_keeps_a_tensor_of_that_name(tmp_path: Path) -> None:
    save_tiny(tmp_path, layers=1)
    path = tmp_path / "model.safetensors"
    name = "model.layers.0.mlp.experts.down_proj"
    save_file(load_file(path) | {name: np.zeros((1, 2, 2), np.float32)}, path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors[name].shape == (1, 2, 2)  # to be refused by name as one that the model lacks
