"""The published variants that sweeps run over: all of Qwen1.5, and one of each further kind of decoder."""

from __future__ import annotations

from collections.abc import Mapping

from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.published.qwen1_5 import QWEN1_5
from qwen_aot.exporter.model.variants import VARIANTS

# 14 heads that share 2; a shared expert of another width; norms of heads, whose size isn't the hidden one's share;
# these with experts, none of them shared.
KINDS = ("qwen2-0.5b", "qwen2-57b-a14b", "qwen3-0.6b", "qwen3-30b-a3b")

SWEPT: Mapping[str, ModelConfig] = {**QWEN1_5.models, **{name: VARIANTS[name] for name in KINDS}}
