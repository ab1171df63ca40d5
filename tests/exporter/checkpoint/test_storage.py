"""What is known of a checkpoint's tensors before any is read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.storage import storage_of
from tests.coded_checkpoints import CODINGS, CodedCheckpoint


def test_orders_forms_and_types_are_the_checkpoints() -> None:
    source = CodedCheckpoint(CODINGS["an order of its own each"])
    storage = storage_of(source)
    assert storage.encodings.keys() == storage.permutations.keys() == source.coded.keys()
    assert storage.dtypes.keys() == source.plain.keys() and set(storage.dtypes.values()) == {np.dtype(np.float16)}
    assert dict(storage.fixed) == storage.encodings
    for name, rows in source.coded.items():
        assert storage.form(name) == rows.form
        np.testing.assert_array_equal(storage.permutation(name), rows.permutation)
    assert storage.form("model.norm.weight") is None and storage.permutation("model.norm.weight") is None


@pytest.mark.parametrize("damage", ["twice", "too large", "negative", "too short", "missing"])
def test_an_order_that_is_none_is_named(damage: str) -> None:
    source = CodedCheckpoint(CODINGS["one order an input"])
    name = "model.layers.1.mlp.down_proj.weight"
    order = np.array(source.coded[name].permutation)
    if damage == "too short":
        order = order[:-1]
    else:
        order[5] = {"twice": order[6], "too large": 160, "negative": -1, "missing": 0}[damage]
    found = None if damage == "missing" else order
    source.coded[name] = dataclasses.replace(source.coded[name], permutation=found)
    with pytest.raises(CheckpointError, match=rf"{name}: the order of its columns isn't one of its 160 columns"):
        storage_of(source)
