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
        self.salts: dict[int, str | None] = {}

    def hear(self, gone: Sequence[int], stored: Sequence[Any]) -> None:
        for number in gone:
            del self.blocks[number]
        for run in stored:
            parent = run.parent
            assert len(run.token_ids) == SIZE * len(run.hashes)
            for index, number in enumerate(run.hashes):
                assert number not in self.blocks and -(2**63) <= number < 2**63
                assert parent is None or parent in self.blocks
                assert parent is None or self.salts[parent] == run.salt
                self.blocks[number] = parent, tuple(run.token_ids[SIZE * index : SIZE * (index + 1)])
                self.salts[number] = run.salt
                parent = number

    def beginnings(self) -> set[tuple[str | None, tuple[int, ...]]]:
        """All tokens from the beginning to the end of each block, with the block's salt."""
        found = set()
        for number in self.blocks:
            tokens: tuple[int, ...] = ()
            at: int | None = number
            while at is not None:
                parent, block = self.blocks[at]
                tokens, at = block + tokens, parent
            found.add((self.salts[number], tokens))
        return found


Row = tuple[str | None, Sequence[int]]


def expected(rows: Sequence[Row]) -> set[tuple[str | None, tuple[int, ...]]]:
    return {(salt, tuple(row[:end])) for salt, row in rows for end in range(SIZE, len(row) + 1, SIZE)}


ROWS = st.lists(
    st.tuples(st.sampled_from([None, None, "a", "b"]), st.lists(st.integers(0, 1), max_size=14)), max_size=4
)


@settings(deadline=None)
@given(st.lists(ROWS, max_size=6))
def test_a_router_that_is_told_of_changes_knows_the_rows(history: list[list[Row]]) -> None:
    told, router = kv_blocks.KvBlocks(SIZE), Router()
    for rows in history:
        router.hear(*told.update(rows))
        assert router.beginnings() == expected(rows)
        assert len(told) == len(router.blocks)


def test_a_router_that_misses_an_event_would_be_seen() -> None:
    told, router = kv_blocks.KvBlocks(SIZE), Router()
    router.hear(*told.update([(None, [1] * 7)]))
    told.update([(None, [2] * 7)])
    assert router.beginnings() != expected([(None, [2] * 7)])
    with pytest.raises(KeyError):
        router.hear(*told.update([]))


def test_what_is_told() -> None:
    told = kv_blocks.KvBlocks(SIZE)
    begun = (None, [1, 2, 3, 4, 5, 6, 7])
    gone, (first,) = told.update([begun])
    assert (gone, first.token_ids, len(first.hashes), first.parent) == ([], [1, 2, 3, 4, 5, 6], 2, None)
    gone, (second,) = told.update([begun, (None, [1, 2, 3, 9, 9, 9])])
    assert (gone, second.token_ids, second.parent) == ([], [9, 9, 9], first.hashes[0])
    gone, stored = told.update([(None, [1, 2, 3, 9, 9, 9])])
    assert (gone, stored) == ([first.hashes[1]], [])
    gone, (salted,) = told.update([(None, [1, 2, 3, 9, 9, 9]), ("a", [1, 2, 3])])
    assert (gone, salted.token_ids, salted.parent, salted.salt) == ([], [1, 2, 3], None, "a")
