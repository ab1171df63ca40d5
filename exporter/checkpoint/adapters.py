"""Adapters (LoRA and the like) change what a model computes and aren't merged into it here: named, with the remedy."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.commands import resave_command
from qwen_aot.exporter.checkpoint.model_name import located
from qwen_aot.exporter.checkpoint.text_files import read_text

logger = logging.getLogger(__name__)

CONFIG_NAME = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Kinds of peft that have no weights to merge into: what they learn is an input.
_NOT_MERGEABLE = frozenset(
    {"ADAPTION_PROMPT", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"}
)
# Segments of names that peft gives an adapter's tensors and the weights under it.
_SEGMENTS = frozenset(
    {
        "base_layer",
        "hada_w1_a",
        "ia3_l",
        "lokr_w1",
        "lora_A",
        "lora_B",
        "lora_E",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "modules_to_save",
        "oft_R",
        "original_module",
        "vera_lambda_b",
    }
)


def refuse_adapter(folder: Path) -> None:
    """Checks the files of a folder: transformers applies an adapter that lies in a model's folder.

    An adapter one folder up or down isn't applied by anyone; it is named in a warning.

    Raises:
        CheckpointError: there is an adapter in it.
    """
    found = _adapter_file(folder)
    if found is not None:
        raise CheckpointError(f"{folder} holds an adapter ({found}), which changes the model; {_remedy(folder)}")
    folder = located(folder)
    beside = [folder.parent, *sorted(each for each in folder.iterdir() if each.is_dir())]
    adapters = [str(each / name) for each in beside if (name := _adapter_file(each)) is not None]
    if adapters:
        logger.warning(
            "%s: an adapter lies near the model and is not applied: %s; merge it first if it is meant",
            folder,
            ", ".join(adapters),
        )


def refuse_adapter_tensors(path: Path, names: Iterable[str]) -> None:
    """Checks the names of a checkpoint's tensors.

    Raises:
        CheckpointError: some are an adapter's, which wasn't merged into the weights.
    """
    found = [name for name in names if not _SEGMENTS.isdisjoint(name.split("."))]
    if found:
        raise CheckpointError(
            f"{path} holds {len(found)} tensors of an adapter that isn't merged ({found[0]}, ...); accepted: plain "
            "weights. Call `merge_and_unload()` on the peft model and save what it returns."
        )


def _adapter_file(folder: Path) -> str | None:
    # os.path: a folder that can't be looked into (lost+found of a disk's root) holds nothing that anyone applies.
    return next((name for name in (CONFIG_NAME, *_WEIGHTS) if os.path.exists(folder / name)), None)


def _remedy(folder: Path) -> str:
    config = _config(folder)
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind in _NOT_MERGEABLE:
        return f"it is of kind {kind}, which can't be merged into weights and is not supported"
    folder = located(folder)
    base = config.get("base_model_name_or_path")
    of = f" (of {base})" if isinstance(base, str) and base else ""
    command = resave_command("peft.AutoPeftModelForCausalLM", folder, ".merge_and_unload()", "-merged")
    return (
        f"merge it{of} into the weights with peft: {command} (then copy the tokenizer's files), or move the adapter's "
        "files away to build the model without it"
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(folder / CONFIG_NAME))
    except (CheckpointError, ValueError, RecursionError):  # only to say more: that there is an adapter is known
        return {}
    return content if isinstance(content, dict) else {}
