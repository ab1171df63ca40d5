"""An embedding stored as codes: compressed-tensors folders alone have it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.quantized_files import compressed_tensors, compressed_tensors_config, random_codes, save_quantized
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
