"""What the reference said is read back as it was said, after the reference is gone."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path

import numpy as np
import pytest

from qwen_aot.engines.verify import kept_reference
from qwen_aot.engines.verify.kept_reference import keep_reference, require_disk
from qwen_aot.errors import BuildError
from tests.engines.verify.rows_engine import RowsReference, after, table

VOCAB = 11
TABLE = table(0, VOCAB)
WINDOWS = [np.random.default_rng(1).integers(0, VOCAB, length) for length in (9, 4, 8)]


def test_logits_and_greedy_tokens_are_the_references() -> None:
    told: list[tuple[int, int]] = []
    with keep_reference(
        lambda: RowsReference(TABLE), WINDOWS, VOCAB, greedy_tokens=3, on_progress=lambda *done: told.append(done)
    ) as kept:
        for index, window in enumerate(WINDOWS):
            for position in range(len(window) - 1):
                expected = after(TABLE, window[: position + 1].tolist())
                np.testing.assert_array_equal(kept.logits(index, position), expected)
            prompt = window[: len(window) // 4].tolist()
            np.testing.assert_array_equal(kept.prompt(index), prompt)
            for choice in kept.greedy[index]:
                assert choice == after(TABLE, prompt).argmax()
                prompt.append(choice)
            assert len(kept.greedy[index]) == 3
    assert told == [(8, 18), (11, 18), (18, 18)]


def test_the_reference_is_gone_and_so_is_the_file_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    alive: list[weakref.ref[RowsReference]] = []

    def load() -> RowsReference:
        reference = RowsReference(TABLE)
        alive.append(weakref.ref(reference))
        return reference

    with keep_reference(load, WINDOWS, VOCAB, greedy_tokens=1):
        assert alive[0]() is None
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_before_the_reference_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> RowsReference:
        raise AssertionError("it was loaded")

    needed = 18 * VOCAB * 4
    monkeypatch.setattr(kept_reference, "free_disk_bytes", lambda folder: needed - 1)
    with (
        pytest.raises(
            BuildError, match=r"logits of 18 tokens take 792 bytes, and .* has 791 free: score fewer.*TMPDIR"
        ),
        keep_reference(load, WINDOWS, VOCAB, greedy_tokens=1),
    ):
        pass
    monkeypatch.setattr(kept_reference, "free_disk_bytes", lambda folder: needed)
    require_disk(18, VOCAB)
