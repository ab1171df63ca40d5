"""Engines with plugin layers on strict doubles: the library is checked and loaded first, and no window is needed."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen_aot.errors import EngineMismatchError
from qwen_aot.exporter.lowering.tensorrt import plugin
from qwen_aot.exporter.lowering.tensorrt.plugin import PluginOptions
from qwen_aot.runtime.backends.open import open_engine
from qwen_aot.runtime.backends.tensorrt.engine import TensorRtEngine
from qwen_aot.runtime.bundle.load import Bundle, load_bundle
from qwen_aot.runtime.bundle.manifest import PluginFacts
from tests.checkpoints import reference_logits, save_tiny
from tests.doubles.bundles import PLUGIN_CONTENT, PLUGIN_LIBRARY, export_tensorrt_bundle
from tests.doubles.gpu import Gpu
from tests.doubles.install import installed
from tests.runtime.backends.tensorrt.engines import ids, opened, write_checksum_bundle
from tests.runtime.toys import with_text_engine

TOLERANCE = 1e-4  # of logits (std 1), from transformers in fp32: rounding of a few layers' sums
# A cache of 8 bits: keys and values are off by up to 1/254 of their head's largest. Seen with models like these: 0.04.
INT8_CACHE_TOLERANCE = 0.1


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


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_checksum_bundle(tmp_path / "bundle", plugins=True)


def refused(bundle: Bundle, message: str, gpu: Gpu | None = None) -> None:
    with installed(gpu or Gpu()) as device:
        with pytest.raises(EngineMismatchError, match=message):
            open_engine(bundle)
        assert device.calls["deserialize_cuda_engine"] == 0


def test_a_changed_library_is_not_loaded_though_its_hash_was_skipped(bundle: Path) -> None:
    loaded = load_bundle(bundle, skip_hash_above=1)
    library = bundle / PLUGIN_LIBRARY
    library.write_text(PLUGIN_CONTENT.upper())
    gpu = Gpu()
    refused(loaded, r"has the SHA-256 .*, and the engine was built with .*: copy the bundle again", gpu)
    assert gpu.calls["load_library"] == 0
    library.unlink()
    refused(loaded, r"libqwen_aot_plugins\.so can't be read \(No such file or directory\): copy the whole bundle")


def test_a_library_that_tensorrt_refuses(bundle: Path) -> None:
    gpu = Gpu()
    gpu.fail("load_library")
    refused(load_bundle(bundle), r"can't load the plugin library .*told to fail: load_library\. Rebuild", gpu)


def test_a_library_inside_the_engine_is_left_to_tensorrt(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    facts = loaded.manifest.engines.text.tensorrt
    assert facts is not None and isinstance(facts.plugins, PluginFacts)
    inside = replace(facts, plugins=replace(facts.plugins, in_engine=True))
    with installed(Gpu()) as gpu, pytest.raises(EngineMismatchError, match="Cannot find plugin"):
        # The double's engine doesn't hold it, so that this shows that nothing was loaded.
        TensorRtEngine(Bundle(loaded.path, with_text_engine(loaded.manifest, tensorrt=inside)))
    assert gpu.calls["load_library"] == 0


def test_an_engine_without_plugins_loads_none(tmp_path: Path) -> None:
    with opened(write_checksum_bundle(tmp_path / "bundle")) as (_, gpu):
        assert gpu.calls["load_library"] == 0
