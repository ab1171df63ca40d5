"""The table of layers in docs/tensorrt.md is what TensorRT-RTX's parser makes of the graphs now."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.bench.tensorrt_layers import FORMS, layers_of_one
from tests.tools import require_package

require_package("tensorrt_rtx", "pip install 'qwen-aot[tensorrt-rtx]'")
pytestmark = [pytest.mark.trt, pytest.mark.slow]

CHECKED = ("dense fp16", "dense int4", "moe fp16")  # the others take as long again; `tensorrt_layers` prints all
PAGE = Path(__file__).parents[2] / "docs" / "tensorrt.md"


def documented() -> list[tuple[set[str], list[int]]]:
    """Rows of the table: layer types, and a count for each form; without the first graph, which is history."""
    section = PAGE.read_text(encoding="utf-8").partition("\n### Layers\n")[2].partition("\n### ")[0]
    rows = re.findall(r"^\| ([A-Zal_, ]+) \|((?: \d+ \|)+)$", section, re.MULTILINE)
    return [
        (set(types.split(", ")), [int(count) for count in re.findall(r"\d+", counts)[1:]]) for types, counts in rows
    ]


def test_the_table_of_layers_is_true() -> None:
    rows = documented()
    named = [kind for kinds, _ in rows for kind in kinds]
    assert len(set(named)) == len(named) > 20
    for index, (form, arguments) in enumerate(FORMS.items()):
        if form not in CHECKED:
            continue
        found: Counter[str] = layers_of_one(*arguments)
        assert set(found) <= set(named), form
        for kinds, counts in rows:
            total = sum(found.values()) if kinds == {"all"} else sum(found[kind] for kind in kinds)
            assert total == counts[index], (form, kinds)
