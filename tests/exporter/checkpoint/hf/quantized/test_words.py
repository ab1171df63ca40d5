from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.exporter.checkpoint.hf.quantized.words import fields_of, repeated, unpack, words_of
from tests.quantized_files import word


@pytest.mark.parametrize("bits", [4, 8])
@given(data=st.data())
def test_fields_come_back(bits: int, data: st.DataObject) -> None:
    fields = 32 // bits
    rows = data.draw(
        st.lists(
            st.lists(st.integers(0, 2**bits - 1), min_size=2 * fields, max_size=2 * fields), min_size=1, max_size=4
        )
    )
    words = np.array([[word(row[:fields], bits), word(row[fields:], bits)] for row in rows], np.uint32)
    np.testing.assert_array_equal(unpack(words, bits), rows)
    np.testing.assert_array_equal(unpack(np.asfortranarray(words), bits), rows)


@given(bits=st.sampled_from([4, 8]), start=st.integers(0, 40), count=st.integers(1, 40))
def test_a_range_of_fields_is_cut_out_of_its_words(bits: int, start: int, count: int) -> None:
    everything = np.arange(80) % 2**bits
    words = np.array([word(list(part), bits) for part in everything.reshape(-1, 32 // bits)], np.uint32)
    some = words[words_of(start, start + count, bits)]
    assert len(some) == len({field // (32 // bits) for field in range(start, start + count)})
    np.testing.assert_array_equal(
        unpack(some, bits)[fields_of(start, start + count, bits)], everything[start : start + count]
    )


def test_a_word_of_one_field() -> None:
    assert repeated(7, 4) == 0x77777777
    assert repeated(128, 8) == 0x80808080
