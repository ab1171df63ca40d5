"""E4M3 by its fields: a sign, four bits of exponent with a bias of 7, three of fraction.

Source: Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv:2209.05433), table 1: no infinities; NaN alone has
all bits but the sign.
"""

from __future__ import annotations

NAN = 0x7F  # without its sign


def number(code: int) -> float:
    """Of a code; not of NaN."""
    assert code & NAN != NAN
    sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
    size = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


CODES = [code for code in range(256) if code & NAN != NAN]
NUMBERS = [number(code) for code in CODES]
