"""What a checkpoint's generation_config.json says of how tokens are chosen, with transformers' meaning."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from qwen_aot.errors import BundleError

__all__ = ["GENERATION_CONFIG_NAME", "TRANSFORMERS_TOP_K", "read_settings"]

logger = logging.getLogger(__name__)

GENERATION_CONFIG_NAME = "generation_config.json"
TRANSFORMERS_TOP_K = 50  # what transformers takes where it samples and nobody gives a top_k

# Keys that change what transformers generates and that we don't have, with the value that means "off".
_UNSUPPORTED: Mapping[str, object] = {
    # processors of the logits
    "sequence_bias": None,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "begin_suppress_tokens": None,
    "guidance_scale": 1.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "watermarking_config": None,
    # another search, or several outputs
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "num_return_sequences": 1,
    # the prompt, and another end
    "token_healing": False,
    "max_time": None,
}


def read_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that we have, by our names; a warning names the others that would change the output.

    Args:
        document: a parsed generation_config.json.

    Returns:
        do_sample, max_new_tokens (None: not given), min_new_tokens, temperature, top_k, top_p, min_p,
        repetition_penalty, suppress_tokens, stop and eos_token_ids; ranges aren't checked.

    Raises:
        BundleError: a value is of the wrong type.
    """
    _warn(document)
    return {
        "do_sample": _read(document, "do_sample", (bool,), False),
        "max_new_tokens": _read(document, "max_new_tokens", (int,), None),
        "min_new_tokens": _read(document, "min_new_tokens", (int,), 0),
        "temperature": _read(document, "temperature", (int, float), 1.0),
        "top_k": _read(document, "top_k", (int,), TRANSFORMERS_TOP_K),
        "top_p": _read(document, "top_p", (int, float), 1.0),
        "min_p": _read(document, "min_p", (int, float), 0.0),
        "repetition_penalty": _read(document, "repetition_penalty", (int, float), 1.0),
        "suppress_tokens": _read_list(document, "suppress_tokens", int, "a list of ids"),
        "stop": _read_list(document, "stop_strings", str, "a text or a list of texts", may_be_one=True),
        "eos_token_ids": _read_list(document, "eos_token_id", int, "an id or a list of ids", may_be_one=True),
    }


def _warn(document: Mapping[str, Any]) -> None:
    names = [key for key, off in _UNSUPPORTED.items() if document.get(key) not in (None, off, [], {})]
    if document.get("max_length") is not None and document.get("max_new_tokens") is None:
        names.append("max_length")  # prompt and output together; no number of new tokens follows from it
    if document.get("cache_implementation") == "quantized":
        names.append("cache_implementation")
    if names:
        logger.warning(
            "%s sets %s, which this runtime doesn't have: output differs from transformers'",
            GENERATION_CONFIG_NAME,
            ", ".join(names),
        )


def _read(document: Mapping[str, Any], key: str, types: tuple[type, ...], default: Any) -> Any:
    value = document.get(key)
    if value is None:
        return default
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise _refusal(key, value, " or ".join(t.__name__ for t in types))
    return value


def _read_list(
    document: Mapping[str, Any], key: str, item: type, accepted: str, *, may_be_one: bool = False
) -> tuple[Any, ...]:
    value = document.get(key)
    if value is None:
        return ()
    if may_be_one and type(value) is item:
        return (value,)
    if not isinstance(value, list) or not all(type(entry) is item for entry in value):
        raise _refusal(key, value, accepted)
    return tuple(value)


def _refusal(key: str, value: object, accepted: str) -> BundleError:
    return BundleError(f"{GENERATION_CONFIG_NAME}: {key} is {value!r}; accepted: {accepted}; rebuild the bundle")
