"""Numbers with errors as people read them, and rows as JSON."""

from __future__ import annotations

import json

import pytest

from qwen_aot.runtime.cli.comparison_table import with_error
from tests.runtime.cli.reports import COMPARISON


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.18624, 0.0031, "0.186 ± 0.003"),
        (0.18624, 0.0014, "0.1862 ± 0.0014"),
        (0.00498, 0.000083, "0.00498 ± 0.00008"),
        (22.1349, 0.4012, "22.1 ± 0.4"),
        (1234.5, 67.8, "1234 ± 68"),
        (12345.6, 1234.5, "12346 ± 1234"),
        (0.996, 0.0996, "1.00 ± 0.10"),
        (1.2e-9, 3.4e-10, "1.2e-09 ± 3e-10"),
        (-1.2e-17, 3e-18, "-1.2e-17 ± 3e-18"),
        (1.5e308, 1e307, "1.5e+308 ± 1e+307"),
        (0.0, 0.0, "0 ± 0"),
        (1.0, 0.0, "1 ± 0"),
        (0.5, None, "0.5"),
    ],
)
def test_as_many_places_as_the_error_has_digits(value: float, error: float | None, shown: str) -> None:
    assert with_error(value, error) == shown


def test_rows_are_json() -> None:
    reference, int8, _, lost = (json.loads(json.dumps(row.to_json())) for row in COMPARISON.rows)
    assert (reference["bundle"], reference["bits_per_weight"], reference["decode_tokens_per_second"]) == (
        None,
        32,
        None,
    )
    assert int8["bits_per_weight"] == pytest.approx(8 * 154e6 / 134_515_008)
    assert int8["accuracy"]["kl_divergence"] == 0.00498 and int8["by_kind"]["code"]["kl_divergence"] == 0.005
    assert int8["not_compared"] is None
    assert (lost["accuracy"], lost["by_kind"], lost["layers"]) == (None, {}, [])
    assert "TensorRT" in lost["not_compared"]
