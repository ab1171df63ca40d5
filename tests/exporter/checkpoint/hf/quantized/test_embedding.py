"""An embedding stored as codes: compressed-tensors folders alone have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.exporter.checkpoint.hf.quantized import test_float_quantized, test_int_quantized
from tests.quantized_files import Saved, compressed_tensors, compressed_tensors_config, random_codes, save_quantized
from tests.saved_folders import EMBEDDING


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_the_files(symmetric: bool, tmp_path: Path) -> None:
    saved = save_quantized(
        tmp_path,
        compressed_tensors_config({"symmetric": symmetric}),
        lambda codes: compressed_tensors(codes, symmetric=symmetric),
        make=lambda n, k, seed: random_codes(n, k, symmetric=symmetric, smallest_zero=0, seed=seed),
        names=("embed_tokens", "q_proj"),
        tied=True,
    )
    codes = saved.weights[EMBEDDING]
    with open_checkpoint(tmp_path) as checkpoint:
        found = checkpoint.read_encoded(EMBEDDING, slice(5, 21))
        assert np.array_equal(found.codes, codes.codes[5:21])
        if not symmetric:
            assert found.zero_points is not None
            assert np.array_equal(found.zero_points, codes.zeros[5:21])
        assert checkpoint.read(EMBEDDING).tobytes() == codes.values.tobytes()


@pytest.mark.parametrize("save", [test_int_quantized.save, test_float_quantized.save], ids=["int8", "E4M3"])
def test_an_embedding_has_no_input_to_round(save: Callable[..., Saved], tmp_path: Path) -> None:
    save(tmp_path, names=("embed_tokens", "q_proj"), tied=True)
    with pytest.raises(
        CheckpointError, match=r"embed_tokens\.input_scale is of an embedding, .*; accepted: an embedding"
    ):
        open_checkpoint(tmp_path)
