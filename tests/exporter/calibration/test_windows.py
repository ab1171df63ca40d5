"""Pieces of texts: whole, of one work each, drawn by a seed."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer

from qwen_aot.errors import ExportError
from qwen_aot.exporter.calibration.windows import draw_windows, random_windows
from tests.checkpoints import save_tokenizer

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 30, "def main(): return 0\n" * 25, "你好，世界。" * 40]
LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, 320)
    return (folder / "tokenizer.json").read_text(encoding="utf-8")


def pieces_of(tokenizer: str) -> list[list[int]]:
    """All whole pieces, in the texts' order; what is left of a work at its end is none."""
    found = []
    for text in TEXTS:
        ids = Tokenizer.from_str(tokenizer).encode(text, add_special_tokens=False).ids
        found += [ids[number * LENGTH : (number + 1) * LENGTH] for number in range(len(ids) // LENGTH)]
    return found


def test_all_pieces_where_more_tokens_are_asked_for_than_there_are(tokenizer: str) -> None:
    found = draw_windows(tokenizer, TEXTS, 320, tokens=10**9, length=LENGTH, seed=0)
    assert found.dtype == np.int64
    assert found.tolist() == pieces_of(tokenizer)


@pytest.mark.parametrize("tokens", [LENGTH, 3 * LENGTH, 3 * LENGTH + 15])
def test_some_are_drawn_each_once(tokenizer: str, tokens: int) -> None:
    found = draw_windows(tokenizer, TEXTS, 320, tokens=tokens, length=LENGTH, seed=0)
    every = pieces_of(tokenizer)
    assert found.shape == (tokens // LENGTH, LENGTH)
    assert all(piece in every for piece in found.tolist())


def test_the_seed_draws(tokenizer: str) -> None:
    def draw(seed: int) -> list[list[int]]:
        found: list[list[int]] = draw_windows(
            tokenizer, TEXTS, 320, tokens=8 * LENGTH, length=LENGTH, seed=seed
        ).tolist()
        return found

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_short_text_among_longer_ones_gives_nothing(tokenizer: str) -> None:
    with_it = draw_windows(tokenizer, ["short", *TEXTS], 320, tokens=10**9, length=LENGTH, seed=0)
    assert with_it.tolist() == pieces_of(tokenizer)


@pytest.mark.parametrize("texts", [[""], ["short"], ["short", "as well"]])
def test_texts_that_are_too_short(tokenizer: str, texts: list[str]) -> None:
    with pytest.raises(
        ExportError, match=r"the texts have fewer than 16 tokens; accepted: a longer --text, or a shorter"
    ):
        draw_windows(tokenizer, texts, 320, tokens=64, length=LENGTH, seed=0)


def test_a_tokenizer_of_another_model(tokenizer: str) -> None:
    with pytest.raises(ExportError, match=r"the tokenizer gives token \d+, and the model has 131: they aren't of one"):
        draw_windows(tokenizer, TEXTS, 131, tokens=10**9, length=LENGTH, seed=0)


def test_random_ids() -> None:
    found = random_windows(50, tokens=100, length=30, seed=3)
    assert found.shape == (3, 30)
    assert 0 <= found.min() <= found.max() < 50
    assert np.array_equal(found, random_windows(50, tokens=100, length=30, seed=3))
    assert not np.array_equal(found, random_windows(50, tokens=100, length=30, seed=4))
