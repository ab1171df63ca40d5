"""How many tokens the checkpoint would have a request generate that doesn't say."""

from __future__ import annotations

from collections.abc import Mapping

from qwen_aot.errors import BuildError
from qwen_aot.runtime.bundle.manifest import MAX_COUNT
from qwen_aot.runtime.bundle.strict_json import parse_object

GENERATION_CONFIG_NAME = "generation_config.json"


def default_max_new_tokens(texts: Mapping[str, str]) -> int | None:
    """`max_new_tokens` of generation_config.json; `max_length` counts the prompt too and says nothing of a default.

    Args:
        texts: the checkpoint's text files, name -> content.

    Returns:
        None: it states none, or one that no graph can count to ("no limit").

    Raises:
        BundleError: generation_config.json isn't a JSON object.
        BuildError: the number isn't a whole one of at least 1.
    """
    if GENERATION_CONFIG_NAME not in texts:
        return None
    document = parse_object(texts[GENERATION_CONFIG_NAME], GENERATION_CONFIG_NAME, is_from_checkpoint=True)
    value = document.get("max_new_tokens")
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise BuildError(
            f"{GENERATION_CONFIG_NAME}: max_new_tokens is {value!r}; accepted: a whole number of at least 1; repair it "
            "in the checkpoint"
        )
    return value if value <= MAX_COUNT else None
