"""Tracing takes seconds and depends on the configuration alone: tests of what comes after trace once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

import qwen_aot.engines.build
import qwen_aot.engines.export
import qwen_aot.engines.verify.remade
from qwen_aot.exporter.weights.recipe import Traced

_TRACED: dict[str, Traced] = {}


@pytest.fixture
def trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes builds, exports and comparisons of a configuration seen before start from a copy of its traced graph."""
    real = qwen_aot.engines.build.trace

    def cached(*arguments: Any, **options: Any) -> Traced:
        key = repr((arguments, options))
        if key not in _TRACED:
            _TRACED[key] = real(*arguments, **options)
        traced = _TRACED[key]
        return Traced(traced.model.clone(), traced.config, dict(traced.recipes))

    monkeypatch.setattr(qwen_aot.engines.build, "trace", cached)
    monkeypatch.setattr(qwen_aot.engines.export, "trace", cached)
    monkeypatch.setattr(qwen_aot.engines.verify.remade, "trace", cached)


@pytest.fixture
def answers_ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt; a shell starts background jobs with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
