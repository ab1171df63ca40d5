"""Blocks of tokens that an engine's rows hold, as a router that looks for beginnings is told of them.

A block is so many tokens behind others: its hash is of its tokens and of the block before it, so that two rows that
begin alike have the same first blocks, and a router finds the longest beginning that a worker has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stored:
    """New blocks, one behind the other.

    Attributes:
        token_ids: of all of them.
        hashes: of each, signed 64-bit numbers.
        parent: the block before the first; None: they are a beginning.
        salt: blocks of different ones are never the same; None: they have none.
    """

    token_ids: list[int]
    hashes: list[int]
    parent: int | None
    salt: str | None


class KvBlocks:
    """What a router was told, so that it need only be told of changes."""

    def __init__(self, size: int) -> None:
        """size: tokens in a block."""
        self._size = size
        self._told: set[int] = set()

    def __len__(self) -> int:
        """How many different blocks the router knows."""
        return len(self._told)

    def update(self, rows: Iterable[tuple[str | None, Sequence[int]]]) -> tuple[list[int], list[Stored]]:
        """Compares what the rows hold with what the router was told.

        Args:
            rows: salt of and tokens in each; those behind its last whole block count for nothing.

        Returns:
            Hashes of blocks that are gone, and runs of new ones, to be told in this order.
        """
        held: set[int] = set()
        stored = []
        for salt, tokens in rows:
            run: Stored | None = None
            parent: int | None = None
            for start in range(0, len(tokens) - self._size + 1, self._size):
                block = list(tokens[start : start + self._size])
                number = _hash(salt, parent, block)
                if number in self._told or number in held:
                    run = None
                elif run is None:
                    run = Stored(block, [number], parent, salt)
                    stored.append(run)
                else:
                    run.token_ids.extend(block)
                    run.hashes.append(number)
                held.add(number)
                parent = number
        gone = sorted(self._told - held)
        self._told = held
        return gone, stored


def _hash(salt: str | None, parent: int | None, block: Sequence[int]) -> int:
    data = repr((salt, parent, *block)).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
