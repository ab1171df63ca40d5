"""What the vision engine's weights are made of: resized tables and reordered rows, against torch and the layout."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from qwen_aot.exporter.model.vision import VisionConfig
from qwen_aot.exporter.weights.vision_recipes import deinterleaved, resize_matrix, resized, vision_recipes
from tests.vision_reference import TINY


@given(grid=st.integers(1, 64), seed=st.integers(0, 100))
def test_tables_are_resized_as_torch_does(grid: int, seed: int) -> None:
    table = np.random.default_rng(seed).standard_normal((256, 3)).astype(np.float32)
    square = torch.from_numpy(table).reshape(1, 16, 16, 3).permute(0, 3, 1, 2)
    theirs = functional.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    np.testing.assert_allclose(resized(table, grid), theirs[0].flatten(1).T.numpy(), atol=3e-5)


def test_a_table_of_the_same_grid_stays_as_it_is() -> None:
    table = np.random.default_rng(0).standard_normal((256, 3)).astype(np.float32)
    assert resized(table, 16) is table
    np.testing.assert_allclose(resize_matrix(16), np.eye(16), atol=1e-12)
    np.testing.assert_allclose(resize_matrix(23).sum(axis=1), 1)


@given(heads=st.integers(1, 8), size=st.integers(1, 8))
def test_rows_of_heads_come_apart(heads: int, size: int) -> None:
    stored = [(head, part, row) for head in range(heads) for part in "qkv" for row in range(size)]
    order = deinterleaved(heads, heads * size)
    wanted = [(head, part, row) for part in "qkv" for head in range(heads) for row in range(size)]
    assert [stored[place] for place in order] == wanted


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_what_stays_fp32(dtype: ir.DataType) -> None:
    recipes = vision_recipes(VisionConfig(**dataclasses.asdict(TINY)), dtype)
    wide = {name for name, recipe in recipes.items() if recipe.outputs[0].dtype == ir.DataType.FLOAT}
    kinds = {name.split(".")[-2] if name.endswith((".weight", ".bias")) else name for name in wide}
    assert kinds == {
        *("vision.pixel_scale", "vision.pixel_shift", "vision.positions"),
        *("ln_pre", "ln_1", "ln_2", "ln_q", "ln_kv", "ln_post", "kv_proj"),
        *("vision.resampler.query", "vision.resampler.query_positions", "vision.resampler.key_positions"),
    }
