"""The default length that a checkpoint states."""

from __future__ import annotations

import pytest

from qwen_aot.engines.bundle.default_length import default_max_new_tokens
from qwen_aot.errors import BuildError, BundleError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", None),
        ('{"max_new_tokens": 2048}', 2048),
        ('{"max_new_tokens": null}', None),
        ('{"max_length": 512}', None),
        ('{"max_length": 512, "max_new_tokens": 64}', 64),
        ('{"max_new_tokens": 2147483647}', 2147483647),
        ('{"max_new_tokens": 2147483648}', None),
        (f'{{"max_new_tokens": {10**30}}}', None),
    ],
)
def test_what_is_stated(text: str, expected: int | None) -> None:
    assert default_max_new_tokens({"generation_config.json": text}) == expected


def test_a_checkpoint_without_generation_config() -> None:
    assert default_max_new_tokens({"tokenizer.json": '{"max_new_tokens": 1}'}) is None


@pytest.mark.parametrize("value", ["0", "-1", '"64"', "64.0", "true", "[64]"])
def test_what_is_no_number_of_tokens(value: str) -> None:
    with pytest.raises(
        BuildError, match=r"generation_config\.json: max_new_tokens is .*; accepted: a whole number of at least"
    ):
        default_max_new_tokens({"generation_config.json": f'{{"max_new_tokens": {value}}}'})


def test_what_is_not_json() -> None:
    with pytest.raises(BundleError, match=r"generation_config\.json is not JSON"):
        default_max_new_tokens({"generation_config.json": "{"})
