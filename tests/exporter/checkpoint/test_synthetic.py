from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import tensor_shapes
from qwen_aot.exporter.model.variants import variant_config

SMALL = ModelConfig("qwen2", 3000, 1024, 256, 1, 16, 16, 64, 512, 1e-6, 1e4, False)
EMBEDDING = "model.embed_tokens.weight"


def test_holds_exactly_the_models_tensors() -> None:
    with RandomCheckpoint(SMALL) as checkpoint:
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == tensor_shapes(SMALL)
        for name, info in checkpoint.tensors.items():
            array = checkpoint.read(name)
            assert (array.shape, array.dtype) == (info.shape, ml_dtypes.bfloat16)
        assert not checkpoint.tokenizer.files
        assert checkpoint.source["format"] == "random"


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [(EMBEDDING, 0, 0.02), ("model.norm.weight", 1, 0.1), ("model.layers.0.self_attn.q_proj.bias", 0, 0.1)],
)
def test_distribution(name: str, mean: float, std: float) -> None:
    values = RandomCheckpoint(SMALL).read(name).astype(np.float32)
    assert abs(values.mean() - mean) < 4 * std / values.size**0.5
    assert values.std() == pytest.approx(std, rel=0.1)


def test_same_seed_same_values_other_seed_or_name_others() -> None:
    first, again, other = RandomCheckpoint(SMALL, 1), RandomCheckpoint(SMALL, 1), RandomCheckpoint(SMALL, 2)
    assert first.read(EMBEDDING).tobytes() == again.read(EMBEDDING).tobytes()
    assert first.read(EMBEDDING).tobytes() != other.read(EMBEDDING).tobytes()
    assert first.read("lm_head.weight").tobytes() != first.read(EMBEDDING).tobytes()
    assert first.source["sha256"] == again.source["sha256"] != other.source["sha256"]


@settings(deadline=None, max_examples=50)
@given(start=st.integers(0, 3000), count=st.integers(0, 1200))
def test_rows_are_those_of_the_whole(start: int, count: int) -> None:
    checkpoint = RandomCheckpoint(SMALL)
    rows = slice(start, start + count)
    assert checkpoint.read(EMBEDDING, rows).tobytes() == checkpoint.read(EMBEDDING)[rows].tobytes()


def test_rows_of_a_large_tensor_cost_only_themselves() -> None:
    checkpoint = RandomCheckpoint(variant_config("qwen1.5-110b"))
    rows: Any = checkpoint.read("lm_head.weight", slice(152_000, 152_064))
    assert rows.nbytes == 64 * 8192 * 2
    assert rows.base is None or rows.base.nbytes == rows.nbytes


def test_refusals() -> None:
    checkpoint = RandomCheckpoint(SMALL, name="small")
    with pytest.raises(CheckpointError, match="a random small has no tensor 'x'"):
        checkpoint.read("x")
    with pytest.raises(CheckpointError, match="have step 2; accepted: 1"):
        checkpoint.read(EMBEDDING, slice(0, 4, 2))
