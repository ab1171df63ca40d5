"""Fixtures' helpers: engines over the doubles of CUDA and TensorRT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_aot.runtime.backends.tensorrt.engine import TensorRtEngine
from qwen_aot.runtime.bundle.load import load_bundle
from tests.doubles.bundles import PLUGIN_CONTENT, write_tensorrt_bundle
from tests.doubles.gpu import Gpu
from tests.doubles.install import installed
from tests.runtime.toys import ALL_INPUTS, checksum_model, io_tables, make_manifest

FLAVOURS = ("tensorrt_rtx", "tensorrt")


def ids(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, np.int64)


def write_checksum_bundle(
    folder: Path,
    flavour: str = "tensorrt",
    *,
    names: tuple[str, ...] = ALL_INPUTS,
    logits_rows: int | None = None,
    **options: Any,
) -> Path:
    """The checksum toy of 4 rows and 1000 tokens; options: see `write_tensorrt_bundle`."""
    inputs, outputs = io_tables(names, "float32", capacity=1024)
    manifest = make_manifest(inputs=inputs, outputs=outputs, logits_rows=logits_rows)
    return write_tensorrt_bundle(folder, checksum_model(inputs, outputs), manifest, flavour, **options)


def install_plugin_library(path: Path, monkeypatch: pytest.MonkeyPatch, content: str = PLUGIN_CONTENT) -> Path:
    """Makes this machine's own plugin library; returns its place."""
    path.write_text(content)
    monkeypatch.setenv("QWEN_AOT_PLUGIN_LIBRARY", str(path))
    return path


@contextmanager
def opened(bundle: Path, gpu: Gpu | None = None, **options: Any) -> Iterator[tuple[TensorRtEngine, Gpu]]:
    """An engine on a double; at the end nothing may be left on it. Options: see `installed`."""
    with installed(gpu or Gpu(), **options) as device, TensorRtEngine(load_bundle(bundle)) as engine:
        yield engine, device
