"""Engines with plugin layers on strict doubles: the library is loaded first, and no window is needed."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from qwen_aot.exporter.lowering.tensorrt import plugin
from qwen_aot.exporter.lowering.tensorrt.plugin import PluginOptions
from tests.checkpoints import reference_logits, save_tiny
from tests.doubles.bundles import export_tensorrt_bundle
from tests.runtime.backends.tensorrt.engines import ids, install_plugin_library, opened, write_checksum_bundle

TOLERANCE = 1e-4  # of logits (std 1), from transformers in fp32: rounding of a few layers' sums
# A cache of 8 bits: keys and values are off by up to 1/254 of their head's largest. Seen with models like these: 0.04.
INT8_CACHE_TOLERANCE = 0.1


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install_plugin_library(tmp_path / "own.so", monkeypatch)


@pytest.mark.parametrize("moe", [None, {}], ids=["gqa", "moe"])
def test_decode_steps_across_windows_share_one_graph(moe: dict[str, int] | None, tmp_path: Path) -> None:
    reference = save_tiny(tmp_path / "checkpoint", kv_heads=2, moe=moe)
    bundle = export_tensorrt_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "tensorrt", lower=plugin.lower)
    sequence = [1 + (7 * i) % 130 for i in range(270)]
    with opened(bundle) as (engine, gpu):
        logits = [engine.prefill(1, ids(*sequence[:240]))] + [
            engine.decode(1, ids(i))[0].copy() for i in sequence[240:]
        ]
        assert gpu.calls["load_library"] == 1
        assert gpu.calls["cudaStreamBeginCapture"] == 1
    np.testing.assert_allclose(np.stack(logits[1:]), reference_logits(reference, [sequence])[0, 240:], atol=TOLERANCE)


def test_an_int8_cache(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path / "checkpoint", kv_heads=2)
    lower = functools.partial(plugin.lower, options=PluginOptions(int8_cache=True))
    bundle = export_tensorrt_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "tensorrt", lower=lower)
    rows = [[1, 5, 9], list(range(2, 40)), [3] * 20, [8, 9]]
    with opened(bundle) as (engine, _):
        assert [(tensor.row_shape, tensor.slot_bytes) for tensor in engine.cache.tensors[:4]] == [
            ((2, 768, 16), 16),
            ((2, 768, 16), 16),
            ((2, 768), 2),
            ((2, 768), 2),
        ]
        for row, sequence in enumerate(rows):
            engine.prefill(row, ids(*sequence))
        for token in range(5, 9):
            logits = engine.decode(0, ids(token, token, -1, token))
            for row in (0, 1, 3):
                rows[row].append(token)
        for row in (0, 1, 3):
            want = reference_logits(reference, [rows[row]])[0, -1]
            np.testing.assert_allclose(logits[row], want, atol=INT8_CACHE_TOLERANCE)


def test_an_engine_without_plugins_loads_none(tmp_path: Path) -> None:
    with opened(write_checksum_bundle(tmp_path / "bundle")) as (_, gpu):
        assert gpu.calls["load_library"] == 0
