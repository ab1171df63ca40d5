from __future__ import annotations

from pathlib import Path

import pytest

from qwen_aot.exporter.checkpoint.part_names import part_paths, whole_name


@pytest.mark.parametrize(
    ("name", "whole", "count"),
    [
        ("a-00002-of-00003.gguf", "a.gguf", 3),
        ("a-00002-of-00003.GGUF", "a.GGUF", 3),
        ("a-00004-of-00003.gguf", "a.gguf", None),
        ("a-00000-of-00003.gguf", "a.gguf", None),
        ("a-2-of-3.gguf", "a-2-of-3.gguf", None),
        ("a.gguf", "a.gguf", None),
    ],
)
def test_names_of_parts(name: str, whole: str, count: int | None) -> None:
    paths = part_paths(Path("x") / name)
    assert whole_name(name) == whole
    assert (None if paths is None else len(paths)) == count
    if paths is not None:
        assert Path("x") / name in paths
