"""What readers of quantization configurations share: every key is read, known to do nothing, or refused."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.config_values import count
from qwen_aot.exporter.checkpoint.hf.quantized.scheme import WHOLE_ROW

BITS = (4, 8)
_DEEPEST = 32  # segments of a module's name that are compared; published ones have 7

# Keys of several libraries that tell how a checkpoint was made, or how a library runs it; not what its numbers are.
HARMLESS = frozenset(
    {
        # of calibration
        *("tokenizer", "dataset", "model_seqlen", "batch_size", "pad_token_id", "nsamples", "seqlen", "iters", "lr"),
        *("minmax_lr", "enable_minmax_tuning", "enable_quanted_input", "low_gpu_mem_usage", "low_cpu_mem_usage"),
        *(
            "damp_percent",
            "damp_auto_increment",
            "true_sequential",
            "static_groups",
            "act_group_aware",
            "mse",
            "hyb_act",
        ),
        *("cache_block_outputs", "block_name_to_quantize", "module_name_preceding_first_block", "gptaq", "foem"),
        # of a library's kernels
        *(
            "backend",
            "use_exllama",
            "disable_exllama",
            "exllama_config",
            "max_input_length",
            "use_cuda_fp16",
            "do_fuse",
        ),
        *("fuse_max_seq_len", "modules_to_fuse", "offload_to_disk", "parallel_packing", "run_compressed"),
        # names and versions
        *("model_name_or_path", "model_file_base_name", "autoround_version", "provider", "lm_head"),
    }
)


def check_keys(
    raw: Mapping[str, Any],
    *,
    read: Collection[str],
    accepted: Mapping[str, tuple[object, ...]],
    harmless: Collection[str] = (),
) -> None:
    """Refuses keys that nobody knows, and values that would change the computation.

    Args:
        raw: an object of the configuration.
        read: keys that the caller reads itself.
        accepted: key -> the values, beside those that say nothing, under which the computation is ours.
        harmless: keys without effect, whatever they hold.

    Raises:
        CheckpointError: names the key, its value and what is accepted.
    """
    for key, value in raw.items():
        says_nothing = value is None or value is False or value in ("", {}, [])
        if key in read or key in harmless or says_nothing or value in accepted.get(key, ()):
            continue
        known = ", ".join(json.dumps(each) for each in accepted.get(key, ())) or "null"
        reason = "not supported" if key in accepted else "not known here, and might change the numbers"
        raise CheckpointError(f"{key} is {shown(value)}; {reason}; accepted: {known}")


def bits_of(raw: Mapping[str, Any], key: str, accepted: tuple[int, ...] = BITS) -> int:
    """The bits of a code.

    Raises:
        CheckpointError: it is missing, or not one of those accepted.
    """
    bits = count(raw, key)
    if bits not in accepted:
        raise CheckpointError(f"{key} is {bits}; not supported; accepted: {', '.join(map(str, accepted))}")
    return bits


def group_size_of(raw: Mapping[str, Any], key: str, default: int) -> int:
    """Elements of a group, or WHOLE_ROW.

    Raises:
        CheckpointError: it is something else.
    """
    size = count(raw, key, default)
    if size != WHOLE_ROW and size < 1:
        raise CheckpointError(f"{key} is {size}; accepted: whole numbers from 1 that divide K, or {WHOLE_ROW}")
    return size


def word_of(raw: Mapping[str, Any], key: str, default: str | None = None) -> str | None:
    """A text under a key, in lower case; null is as good as missing.

    Raises:
        CheckpointError: it is something else.
    """
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise CheckpointError(f"{key} is {shown(value)}; accepted: a text")
    return value.lower()


def names_of(raw: Mapping[str, Any], key: str) -> frozenset[str]:
    """A list of names under a key; null is an empty one.

    Raises:
        CheckpointError: it is something else.
    """
    value = raw.get(key)
    if value is None:
        return frozenset()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{key} is {shown(value)}; accepted: a list of names")
    return frozenset(value)


def object_of(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object under a key; null is an empty one.

    Raises:
        CheckpointError: it is something else.
    """
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{key} is {shown(value)}; accepted: an object")
    return value


def part_of(name: str, parts: Collection[str]) -> str | None:
    """The first whole segments of a module's name that are among some: `mlp.gate` of `model.layers.0.mlp.gate`."""
    if not parts:
        return None
    segments = name.split(".")[-_DEEPEST:]
    found = (".".join(segments[i:j]) for i in range(len(segments)) for j in range(len(segments), i, -1))
    return next((part for part in found if part in parts), None)


def end_of(name: str, ends: Collection[str]) -> str | None:
    """The first whole segments at the end of a module's name that are among some."""
    segments = name.split(".")[-_DEEPEST:]
    return next((end for i in range(len(segments)) if (end := ".".join(segments[i:])) in ends), None)


def shown(value: object) -> str:
    """A value for a message, which isn't longer for it."""
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
