"""How many examples hypothesis tries: a few in the first part of CI, a fixed large number in .ci/deep.

Profiles (`--hypothesis-profile`): `quick` draws the same examples each time, so that a change and not the dice turns a
test red; `deep` draws by `--hypothesis-seed`, and prints how to repeat what it found.
"""

from __future__ import annotations

from hypothesis import settings

QUICK, DEEP = "quick", "deep"
DEEP_FACTOR = 30


def register() -> None:
    """Makes both profiles known; the first is taken unless another one is named."""
    settings.register_profile(QUICK, derandomize=True, deadline=None)
    settings.register_profile(DEEP, max_examples=100 * DEEP_FACTOR, deadline=None, print_blob=True)
    settings.load_profile(QUICK)
