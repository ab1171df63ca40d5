"""examples/dynamo/kv_blocks.py: a router that is told of changes knows what the rows hold."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples.conftest import ROOT

SIZE = 3


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kv_blocks", ROOT / "examples" / "dynamo" / "kv_blocks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


kv_blocks = load()


class Router:
    """Knows blocks by hash, each with its parent and tokens, as it is told."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, tuple[int, ...]]] = {}

    def hear(self, gone: Sequence[int], stored: Sequence[Any]) -> None:
        for number in gone:
            del self.blocks[number]
        for run in stored:
            parent = run.parent
            assert len(run.token_ids) == SIZE * len(run.hashes)
            for index, number in enumerate(run.hashes):
                assert number not in self.blocks and -(2**63) <= number < 2**63
                assert parent is None or parent in self.blocks
                self.blocks[number] = parent, tuple(run.token_ids[SIZE * index : SIZE * (index + 1)])
                parent = number

    def beginnings(self) -> set[tuple[int, ...]]:
        """All tokens from the beginning to the end of each block."""
        found = set()
        for number in self.blocks:
            tokens: tuple[int, ...] = ()
            at: int | None = number
            while at is not None:
                parent, block = self.blocks[at]
                tokens, at = block + tokens, parent
            found.add(tokens)
        return found


def expected(rows: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    return {tuple(row[:end]) for row in rows for end in range(SIZE, len(row) + 1, SIZE)}


ROWS = st.lists(st.lists(st.integers(0, 1), max_size=14), max_size=4)


@settings(deadline=None)
@given(st.lists(ROWS, max_size=6))
def test_a_router_that_is_told_of_changes_knows_the_rows(history: list[list[list[int]]]) -> None:
    told, router = kv_blocks.KvBlocks(SIZE), Router()
    for rows in history:
        router.hear(*told.update(rows))
        assert router.beginnings() == expected(rows)
        assert len(told) == len(router.blocks)


def test_a_router_that_misses_an_event_would_be_seen() -> None:
    told, router = kv_blocks.KvBlocks(SIZE), Router()
    router.hear(*told.update([[1] * 7]))
    told.update([[2] * 7])
    assert router.beginnings() != expected([[2] * 7])
    with pytest.raises(KeyError):
        router.hear(*told.update([]))


def test_what_is_told() -> None:
    told = kv_blocks.KvBlocks(SIZE)
    gone, (first,) = told.update([[1, 2, 3, 4, 5, 6, 7]])
    assert (gone, first.token_ids, len(first.hashes), first.parent) == ([], [1, 2, 3, 4, 5, 6], 2, None)
    gone, (second,) = told.update([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 9, 9, 9]])
    assert (gone, second.token_ids, second.parent) == ([], [9, 9, 9], first.hashes[0])
    gone, stored = told.update([[1, 2, 3, 9, 9, 9]])
    assert (gone, stored) == ([first.hashes[1]], [])
