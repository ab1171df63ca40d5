"""A kept answer is the reference's own, to exactly what was asked, and is computed once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tests.kept_reference import KeptReference


class Told:
    """A reference whose answers tell what was asked."""

    read_by = "nobody"

    def __init__(self, asked: Counter[str]) -> None:
        self._asked = asked

    def logits(self, token_ids: Any, first: int) -> Any:
        self._asked[f"logits {token_ids} {first}"] += 1
        return np.array([[1, first, *token_ids]], np.float32)

    def greedy(self, prompt: Any, count: int) -> list[int]:
        self._asked[f"greedy {prompt} {count}"] += 1
        return [2, count, *prompt]


def test_each_question_has_its_own_answer_and_is_asked_once(tmp_path: Path) -> None:
    asked: Counter[str] = Counter()
    loaded = []

    def load() -> Any:
        loaded.append(True)
        return Told(asked)

    for _ in range(2):  # two processes
        kept = KeptReference(load, tmp_path / "answers")
        assert kept.read_by == "nobody"
        for ids in ([3, 4, 5], [3, 4, 6], [3, 4]):
            for number in (1, 2):
                assert kept.logits(np.array(ids), number).tolist() == [[1, number, *ids]]
                assert kept.greedy(np.array(ids), number) == [2, number, *ids]
    assert len(asked) == 12 and set(asked.values()) == {1}
    assert len(loaded) == 1
